"""Blends: every prefix of a run has its shares; what a flag or YAML may say; sequences of several sources in turn."""

from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.progress import resolve_phases
from config.schema import DataConfig
from data.batch_schedule import BatchSchedule, RampUp
from data.blend import BLOCK, Blend, BlendPart, parse_blend, parse_phases, whole_weights
from data.dataset import BlendedDataset, Mixture, SampleDataset
from data.mixture import add_rows, match_sources, resume_samples
from metrics.banner import describe_phases
from tests.unit.test_packed_rows import dataset
from utils.errors import UserError

weights = st.lists(st.integers(1, 10_000), min_size=1, max_size=7)


@given(weights, st.integers(1, 600))
@settings(max_examples=150, deadline=None)
def test_every_prefix_has_its_shares_to_within_a_sequence(weights: list[int], count: int) -> None:
    blend, given_so_far = Blend(weights), [0] * len(weights)
    bound = 1 - Fraction(1, 2 * len(weights) - 2) if len(weights) > 1 else Fraction(0)  # Tijdeman's
    for n in range(count):
        source, position = blend.at(n)
        assert position == given_so_far[source]
        given_so_far[source] += 1
        for have, weight in zip(given_so_far, weights, strict=True):
            assert abs(have - Fraction(weight * (n + 1), sum(weights))) <= bound
    assert blend.counts(count) == given_so_far


@given(weights, st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=6), st.integers(0, 2 * BLOCK))
@settings(max_examples=40, deadline=None)
def test_any_sample_can_be_read_first_or_resumed_from(weights: list[int], places: list[int], stop: int) -> None:
    forwards = Blend(weights)
    wanted = {n: forwards.at(n) for n in sorted(places)}
    jumping = Blend(weights)
    assert {n: jumping.at(n) for n in places} == wanted
    resumed = Blend(weights, (stop, forwards.counts(stop)))
    assert {n: pickle.loads(pickle.dumps(resumed)).at(n) for n in places} == wanted


def recount(weights: list[int], first: int, counts: list[int], number: int) -> list[int]:
    """The sources of `number` samples from `first` on, by Tijdeman's rule as he states it: every source each time."""
    k, total, given = len(weights), sum(weights), list(counts)
    unit, found = 2 * k - 2, []
    for n in range(first + 1, first + number + 1):
        due = [unit * w * n - unit * total * g for w, g in zip(weights, given, strict=True)]
        late = [Fraction(unit * total - total - d, unit * w) for d, w in zip(due, weights, strict=True)]
        best = min((i for i in range(k) if due[i] >= total), key=lambda i: late[i])
        given[best] += 1
        found.append(best)
    return found


@given(
    st.lists(st.one_of(st.integers(1, 12), st.integers(1, 10**30)), min_size=2, max_size=7),
    st.lists(st.integers(0, 40), min_size=7, max_size=7),
)
@settings(max_examples=100, deadline=None)
def test_samples_come_as_by_a_recount(weights: list[int], start: list[int]) -> None:
    """Also from any start: a resumed run may change the weights."""
    for counts in ([0] * len(weights), start[: len(weights)]):
        blend = Blend(weights)
        block = blend._compute_block(sum(counts), counts)
        assert block.sources[:60].tolist() == recount(weights, sum(counts), counts, 60)


def test_many_sources_cost_no_more_than_two() -> None:
    seconds = []
    for k in (2, 200):
        blend, start = Blend(np.random.default_rng(k).integers(10**5, 10**7, k).tolist()), time.process_time()
        blend.counts(10 * BLOCK)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 10 * seconds[0]  # 35 times as much where every source is looked at for each sample


def test_a_far_place_takes_no_long_way() -> None:
    """Weights that repeat every 10 sequences, and a state for those that never do."""
    assert Blend([7, 3]).counts(10**12) == [7 * 10**11, 3 * 10**11]
    large = [123456789123, 987654321987]
    n = 10**11
    first = n * large[0] // sum(large)
    resumed = Blend(large, (n, [first, n - first]))
    source, position = resumed.at(n)
    assert position == [first, n - first][source]


def test_a_state_of_another_blend_is_refused() -> None:
    for counts in ([1, 1], [3], [1, 1, 1]):
        with pytest.raises(ValueError, match="cannot resume"):
            Blend([1, 2], (3, counts))


def test_weights_become_whole_numbers() -> None:
    assert whole_weights([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert whole_weights([Fraction("1e-3"), Fraction(2)]) == [1, 2000]
    assert whole_weights([40, 60]) == [2, 3]


def test_what_a_flag_may_say(tmp_path: Path) -> None:
    assert [p.weight for p in parse_blend(["a"])] == [None]
    assert [(p.path, p.weight) for p in parse_blend(["0.7", "a", "0.3", "b"])] == [
        ("a", Fraction(7, 10)),
        ("b", Fraction(3, 10)),
    ]
    assert [p.weight for p in parse_blend(["a", "b", "c"])] == [None] * 3
    for words in (["0", "a", "1", "b"], ["-1", "a", "2", "b"], ["nan", "a", "1", "b"], ["inf", "a", "1", "b"]):
        with pytest.raises(ValueError, match="must be a number above 0"):
            parse_blend(words)
    for words in (["0.7", "a", "b"], ["a", "0.7"], ["0.5", "a", "0.5"]):
        with pytest.raises(ValueError, match="stands where a path should"):
            parse_blend(words)
    with pytest.raises(ValueError, match="named twice"):
        parse_blend(["1", "a", "2", "./a"])


def test_a_yaml_lists_sources_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "blend.yaml"
    file.write_text("sources:\n  - {path: web, weight: 0.7}\n  - {path: sub/code, weight: 0.3}\n")
    assert [(p.path, p.weight) for p in parse_blend([str(file)])] == [
        (str(tmp_path / "web"), Fraction(7, 10)),
        (str(tmp_path / "sub/code"), Fraction(3, 10)),
    ]
    file.write_text("sources: [{path: web}, {path: code}]")
    assert [p.weight for p in parse_blend([str(file)])] == [None, None]
    for text, words in (
        ("sources: []", "must hold one key"),
        ("web: 1", "must hold one key"),
        ("sources: [{path: a, weight: .nan}]", "above 0"),
        ("sources: [{path: a, weight: 0}]", "above 0"),
        ("sources: [{path: a, weight: 1}, {path: b}]", "every source a weight, or none"),
        ("sources: [{path: a, wieght: 1}]", "entry 1"),
        ("sources: [", "not YAML"),
        ("sources: !!python/object/apply:os.system ['true']", "not YAML .tag"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            parse_blend([str(file)])
    with pytest.raises(ValueError, match="No such file"):
        parse_blend([str(tmp_path / "missing.yaml")])


def test_a_yaml_lists_phases(tmp_path: Path) -> None:
    file = tmp_path / "phases.yaml"
    file.write_text(
        "phases:\n- sources: [{path: web}]\n"
        "- from-tokens: 300\n  sources: [{path: web, weight: 1}, {path: b, weight: 2}]"
    )
    first, second = parse_phases([str(file)])
    assert (first.start, first.parts) == (0, [BlendPart(str(tmp_path / "web"))])
    assert (second.unit, second.start, len(second.parts)) == ("tokens", 300, 2)
    one = "sources: [{path: a}]"
    for text, words in (
        ("phases: []", "must hold one key"),
        (f"phases: [{{from-step: 3, {one}}}]", "entry 1 of phases .* and begins the run"),
        (f"phases: [{{{one}}}, {{{one}}}]", "entry 2 of phases .* one number, from-step, from-tokens, from-samples"),
        (f"phases: [{{{one}}}, {{from-step: 3, from-tokens: 4, {one}}}]", "entry 2"),
        (f"phases: [{{{one}}}, {{from-step: -3, {one}}}]", "entry 2"),
        (f"phases: [{{{one}}}, {{from-step: {'9' * 19}, {one}}}]", "entry 2"),
        (f"phases: [{{{one}}}, {{from-step: [3], {one}}}]", "entry 2"),
        (f"phases: [{{{one}}}, {{step: 3, {one}}}]", "entry 2"),
        (f"phases: [{{{one}}}, {{from-step: 3, sources: []}}]", "entry 2"),
        ("phases: [{sources: [{path: a}, {path: a}]}]", "named twice"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            parse_phases([str(file)])


def test_where_phases_begin(tmp_path: Path) -> None:
    """Samples are of 64 tokens; steps, counted from 1, are of 1, 1, 2, 2, 3, 3, ... samples."""
    file, batches = tmp_path / "phases.yaml", BatchSchedule.build(4, RampUp(1, 1, 6))
    data = DataConfig(data_path=[str(file)], seq_length=64)

    def resolve(*starts: str) -> list[int]:
        file.write_text("phases:\n- sources: [{path: a}]\n")
        with file.open("a") as out:
            out.writelines(f"- {start}\n  sources: [{{path: a}}]\n" for start in starts)
        return resolve_phases(data, batches)

    steps = [batches.first_sample(step) for step in range(5)]
    assert resolve("from-step: 3", "from-tokens: 300", "from-samples: 9") == [steps[2], 5, 9]
    assert resolve("from-tokens: 320", "from-step: 5") == [5, steps[4]]
    for wrong in (
        ["from-step: 1"],
        ["from-tokens: 0"],
        ["from-samples: 5", "from-tokens: 320"],
        ["from-samples: 5"] * 2,
    ):
        with pytest.raises(UserError, match="phases must ascend"):
            resolve(*wrong)


def blended(weights: list[int]) -> BlendedDataset:
    rng = np.random.default_rng(0)
    sources = [dataset(rng.integers(1, 40, 20).tolist(), seq_length=32, alignment=4) for _ in weights]
    return BlendedDataset(sources, [Mixture(0, weights, list(range(len(weights))))])


def test_sequences_come_from_their_sources_in_their_order() -> None:
    data = blended([5, 3, 1])
    read: Counter = Counter()
    for n in range(3 * max(s.samples_per_epoch for s in data.sources)):
        source, position = data.at(n)
        mine, theirs = data.sample(n), data.sources[source].sample(position)
        assert (mine.tokens == theirs.tokens).all() and (mine.lengths == theirs.lengths).all()
        assert mine.first_id == n * 32  # of the run: dropout must not repeat where a source does
        assert position == read[source]
        read[source] += 1
    assert data.fingerprint() != blended([5, 3, 2]).fingerprint()


def test_fingerprints_depend_on_sources_and_their_order() -> None:
    a, b, c = (dataset(lengths, seq_length=32, alignment=4) for lengths in ([5, 40], [40, 5], [5, 41]))
    prints = [
        BlendedDataset(sources, [Mixture(0, [2, 1], [0, 1])]).fingerprint()
        for sources in ([a, b], [b, a], [a, c], [c, b])
    ]
    assert len(set(prints)) == 4 and prints[0] == BlendedDataset([a, b], [Mixture(0, [2, 1], [0, 1])]).fingerprint()


def test_samples_around_a_blocks_end_are_read_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's samples are dealt by their work: a step back over a block's end computes nothing again."""
    computed, compute = [], Blend._compute_block
    monkeypatch.setattr(
        Blend, "_compute_block", lambda self, *args: (computed.append(args[0]), compute(self, *args))[1]
    )
    blend = Blend([10**9 + 7, 998_244_353, 3])
    forward = [blend.at(n) for n in range(4 * BLOCK)]
    order = np.random.default_rng(0).permutation(range(3 * BLOCK - 200, 3 * BLOCK + 200)).tolist()
    assert [blend.at(n) for n in order] == [forward[n] for n in order]
    assert len(computed) == 4


@pytest.mark.parametrize("stop", [0, 1, 7, 100, BLOCK + 3])
def test_a_state_is_small_and_resumes_exactly(stop: int) -> None:
    whole, resumed = blended([5, 3, 1]), blended([5, 3, 1])
    state = whole.state_dict(stop)
    assert state["sequences"] == stop and len(state["sources"]) == 3
    assert all(p["position"] < s.samples_per_epoch for p, s in zip(state["sources"], whole.sources, strict=True))
    resumed = resume_samples(resumed, state)
    for n in range(stop, stop + 20):
        assert (resumed.sample(n).tokens == whole.sample(n).tokens).all()
    with pytest.raises(ValueError, match="sources"):
        resume_samples(blended([5, 3]), {key: state[key] for key in ("sequences", "sources")})  # of an old version


MIXTURES = st.lists(
    st.tuples(st.integers(0, 60), st.dictionaries(st.integers(0, 3), st.integers(1, 9), min_size=1)),
    min_size=1,
    max_size=4,
)


def mixture_of(every: list, weights: dict[int, int]) -> SampleDataset:
    packed = [every[s] for s in weights]
    mixture = Mixture(0, list(weights.values()), list(range(len(packed))))
    return BlendedDataset(packed, [mixture]) if len(packed) > 1 else packed[0]


@given(MIXTURES, st.integers(0, 40), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_every_source_goes_on_through_changes_of_the_mixture(
    changes: list[tuple[int, dict]], stop: int, phases_stop: int
) -> None:
    """Sources come, go, come back and change their weights: each is read in its order from where it stood. A stop after
    the last change alters nothing. Phases of one run, stopped anywhere, give the same samples.
    """
    rng, n, samples, read, taken = np.random.default_rng(0), 0, None, Counter(), []
    every = [dataset(rng.integers(1, 40, 20).tolist(), seq_length=32, alignment=4) for _ in range(4)]
    for length, weights in changes:
        new, sources = mixture_of(every, weights), list(weights)
        samples = new if samples is None else resume_samples(new, json.loads(json.dumps(samples.state_dict(n))))
        for at in range(n, n + length):
            source, position = samples.at(at) if isinstance(samples, BlendedDataset) else (0, at)
            assert position == read[sources[source]]
            read[sources[source]] += 1
            taken.append((sources[source], position))
        n += length
    resumed = resume_samples(mixture_of(every, weights), samples.state_dict(n + stop))
    for at in range(n + stop, n + stop + 10):
        a, b = resumed.sample(at), samples.sample(at)
        assert (a.tokens == b.tokens).all() and a.first_id == b.first_id == at * 32
    assert resumed.state_dict(n + stop + 10) == samples.state_dict(n + stop + 10)

    firsts = np.cumsum([0, *(length for length, _ in changes)]).tolist()
    kept = [(first, w) for first, (length, w) in zip(firsts, changes, strict=False) if length]
    kept = [one for number, one in enumerate(kept) if not number or one[1] != kept[number - 1][1]]  # as by hand
    if len(kept) > 1:
        whole = BlendedDataset(every, [Mixture(first, list(w.values()), list(w)) for first, w in kept])
        assert [whole.at(at) for at in range(n)] == taken
        at = min(n, phases_stop)
        again = BlendedDataset(every, whole.mixtures)
        resumed = resume_samples(again, again.state_dict(at)) if at else again
        assert [resumed.at(m) for m in range(at, n)] == taken[at:]
        assert resumed.fingerprint() == whole.fingerprint() and resumed.state_dict(n) == whole.state_dict(n)


def test_phases_that_were_read_may_not_change() -> None:
    """Before sample 12: refused; from sample 12 on: allowed, and a phase that did not begin may go."""
    rng = np.random.default_rng(0)
    a, b = (dataset(rng.integers(1, 40, 20).tolist(), seq_length=32, alignment=4) for _ in range(2))
    phases = [Mixture(0, [1], [0]), Mixture(8, [1, 2], [0, 1]), Mixture(12, [1], [1])]
    state = BlendedDataset([a, b], phases).state_dict(12)
    assert [first for first, _ in state["mixtures"]] == [0, 8]
    for changed in ([phases[0], Mixture(9, [1, 2], [0, 1])], [phases[0], Mixture(8, [1, 3], [0, 1])], phases[::2]):
        with pytest.raises(UserError, match=r"before sample 12 are not those .* begin with samples 0, 8"):
            resume_samples(BlendedDataset([a, b], changed), state)
    for changed in (phases, phases[:2], [*phases[:2], Mixture(12, [5, 1], [0, 1])]):
        resumed = resume_samples(BlendedDataset([a, b], changed), state)
        assert sum(resumed.counts(20)) == 20 and resumed.counts(12) == BlendedDataset([a, b], phases).counts(12)
    with pytest.raises(UserError, match="corrupted"):
        resume_samples(BlendedDataset([a, b], phases), state | {"mixtures": [["0", []]]})


HISTORIES = st.lists(st.tuples(st.sampled_from(["alone", "phases"]), st.integers(1, 30)), min_size=1, max_size=5)


@given(HISTORIES)
@settings(max_examples=60, deadline=None)
def test_a_later_phase_brings_a_source_back_where_it_stood(history: list[tuple[str, int]]) -> None:
    """Runs with and without phases follow each other; a mixture that goes on may lack a source of the next phase."""
    rng = np.random.default_rng(0)
    a, b = (dataset(rng.integers(1, 40, 20).tolist(), seq_length=32, alignment=4) for _ in range(2))
    both = Mixture(0, [1, 1], [0, 1])
    samples, read, n = BlendedDataset([a, b], [both]), [0, 0], 0
    for kind, length in [("phases", 25), *history]:
        if n and kind == "alone":  # the second source only
            samples, sources = resume_samples(b, samples.state_dict(n)), [1]
        elif n:  # what was read, then both again
            done = samples.state_dict(n)
            firsts = [first for first, _ in done["mixtures"]]
            members = [[0, 1] if len(rows) == 2 else [1] for _, rows in done["mixtures"]]
            phases = [Mixture(first, [1] * len(m), m) for first, m in zip(firsts, members, strict=True)]
            phases.append(Mixture(n + length // 2, [1, 1], [0, 1]))
            samples, sources = resume_samples(BlendedDataset([a, b], phases), done), [0, 1]
        else:
            sources = [0, 1]
        for at in range(n, n + length):
            source, position = samples.at(at) if isinstance(samples, BlendedDataset) else (0, at)
            assert position == read[sources[source]]
            read[sources[source]] += 1
        n += length


def test_a_phase_is_told_by_the_step_that_reads_it() -> None:
    """A skipped step has no record; two phases may begin in one step."""
    rng = np.random.default_rng(0)
    a, b = (dataset(rng.integers(1, 40, 20).tolist(), seq_length=32, alignment=4) for _ in range(2))
    whole = BlendedDataset([a, b], [Mixture(0, [1], [0]), Mixture(8, [1], [1]), Mixture(9, [1], [0])])
    batches = BatchSchedule.build(4)
    (told,) = describe_phases(whole, batches, [range(3, 5)]).items()
    assert told[0] == 5 and "from sample 8 on" in told[1] and "; --data-path: from sample 9 on" in told[1]
    assert list(describe_phases(whole, batches, [])) == [3]


@pytest.mark.parametrize("n", [0, 8])
def test_the_state_of_a_start_leads_to_its_samples(n: int) -> None:
    """As tools/replay.py reads it: of a fresh run, and of one that is resumed where a phase begins."""
    rng = np.random.default_rng(0)
    a, b = (dataset(rng.integers(1, 40, 20).tolist(), seq_length=32, alignment=4) for _ in range(2))
    phases = [Mixture(0, [1], [0]), Mixture(8, [1, 2], [0, 1])]
    whole = BlendedDataset([a, b], phases)
    started = resume_samples(BlendedDataset([a, b], phases), whole.state_dict(n)) if n else whole
    again = resume_samples(BlendedDataset([a, b], phases), started.state_dict(n))
    assert [again.at(m) for m in range(n, 30)] == [whole.at(m) for m in range(n, 30)]


def test_a_checkpoint_without_fingerprints_goes_on() -> None:
    """Of a version before phases: run.json names each source's documents beside the state."""
    whole = blended([5, 3])
    new = whole.state_dict(9)
    rows = whole.list_rows(0)
    old = {"sequences": 9, "sources": [{k: p[k] for k in ("name", "epoch", "position")} for p in new["sources"]]}
    for state in (old, add_rows(old, rows)):
        resumed = resume_samples(blended([5, 3]), state)
        assert [resumed.at(n) for n in range(9, 40)] == [whole.at(n) for n in range(9, 40)]
    alone = resume_samples(whole.sources[1], add_rows(old, rows))
    assert alone.at(9) == (0, whole.counts(9)[1])
    assert [place["fingerprint"] for place in alone.state_dict(12)["sources"]] == [rows[1][1], rows[0][1]]
    assert add_rows(old, None) == old and add_rows({}, rows) == {}


def test_sources_are_matched_by_name_and_documents_first() -> None:
    saved = [("a", "1", 0), ("b", "2", 0), ("c", "1", 0)]
    assert match_sources(saved, [("c", "1", 0), ("a", "1", 0), ("b", "3", 0)]) == [2, 0, None]
    assert match_sources(saved[:1], [("moved", "1", 0), ("a", "1", 0)]) == [None, 0]
    assert match_sources(saved, [("moved", "1", 0), ("too", "1", 0), ("more", "1", 0)]) == [0, 2, None]


@pytest.mark.parametrize(
    "wrong",
    [{"mixture": 3}, {"mixture": {"sequences": 0}}, {"mixture": {"sequences": -1, "counts": [0, 0, 0]}},
     {"mixture": {"sequences": 0, "counts": [0]}}, {"sources": 5}, {"sequences": "9"}],
)  # fmt: skip
def test_a_corrupted_state_is_a_refusal(wrong: dict) -> None:
    data = blended([5, 3, 1])
    with pytest.raises(UserError):
        resume_samples(data, data.state_dict(9) | wrong)


def test_an_epoch_of_a_blend_repeats_no_source() -> None:
    data = blended([5, 3, 1])
    counts = data.counts(data.samples_per_epoch)
    assert all(c <= s.samples_per_epoch for c, s in zip(counts, data.sources, strict=True))


@pytest.mark.parametrize("kind", ["folder", "corpus", "link"])
def test_a_path_that_is_a_number_is_no_weight(tmp_path: Path, monkeypatch, kind: str) -> None:
    """`--data-path 2023 2024`: two folders of years, not one with a weight."""
    monkeypatch.chdir(tmp_path)
    for name in ("2023", "2024"):
        if kind == "folder":
            Path(name).mkdir()
        elif kind == "corpus":
            Path(f"{name}.idx").write_bytes(b"")
        else:
            Path(name).symlink_to("gone")
    with pytest.raises(ValueError, match=r"2023 is a number and a file or folder; write \./2023 for the path, \+2023"):
        parse_blend(["2023", "2024"])
    if kind != "link":  # `is named twice` compares what links lead to
        assert [(p.path, p.weight) for p in parse_blend(["./2023", "2024"])] == [("./2023", None), ("2024", None)]
        assert [p.path for p in parse_blend(["2024", "./2023", "other"])] == ["2024", "./2023", "other"]
    assert [(p.path, p.weight) for p in parse_blend(["+2023", "2024"])] == [("2024", 2023)]
    assert [p.weight for p in parse_blend(["2022", "2024"])] == [2022]


@pytest.mark.parametrize(
    "text",
    [
        "sources: [{path: a, weight: &a [1, 2]}]",
        "sources: [{path: a, weight: {b: 1}}]",
        "sources: [{path: a, path: b}]",
        "sources: [{path: a, weight: 0." + "9" * 5000 + "}]",
        "sources: " + "[" * 5000,
        "sources: [" + "9" * 5000 + "]",
    ],
)
def test_broken_lists_of_sources_are_one_short_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"--data-path .*b\.yaml") as caught:
        parse_blend([str(tmp_path / "b.yaml")])
    assert type(caught.value) is UserError and len(str(caught.value)) < 700


def test_paths_of_a_yaml_are_words(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("sources:\n- path: 2023-12-01\n- path: on\n- path: 017\n")
    assert [part.path for part in parse_blend([str(tmp_path / "b.yaml")])] == [
        str(tmp_path / name) for name in ("2023-12-01", "on", "017")
    ]


def test_a_value_shared_many_times_is_not_written_out(tmp_path: Path) -> None:
    """Lists shared 30 deep: 2^30 words if printed whole."""
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 31))]
    (tmp_path / "b.yaml").write_text("sources:\n- {" + ", ".join(["path: p", *lines]) + "}\n")
    with pytest.raises(ValueError, match="more than 200000 values") as caught:
        parse_blend([str(tmp_path / "b.yaml")])
    assert len(str(caught.value)) < 1000
