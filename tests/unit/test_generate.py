"""Text with cached keys and values: the training forward's logits token by token, draws, refusals, a run's text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from checkpoint.files import find_run_checkpoint, read_run_metadata
from cp.packed_seq import build_packed_seq
from model.gpt import GPT
from model.transformer import GPTOptions
from parallel.grid import Grid, GridSizes, build_grid
from tests.distributed.test_model_parity import built, config_of
from tests.forked import run_script
from tests.launch import ROOT, SMALL, environment, train, write_corpus
from tools.generate import CachedAttention, choose, continue_text, read_model_config
from utils.errors import UserError

MODELS = {
    "plain": {},
    "all heads": dict(num_query_groups=4),
    "qk norm, tied": dict(qk_norm=True, tie_embeddings=True),
    "llama3": dict(rope_scaling="llama3", rope_scaling_factor=8.0, rope_original_seq_length=8),
    "one layer": dict(num_layers=1),
}


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_grid(GridSizes())
    dist.destroy_process_group()


def pair(grid: Grid, dtype: str, **changes) -> tuple[GPT, GPT]:
    """A model as in training, and the same with a cache."""
    config = config_of(**changes)
    trained = built(grid, config, dtype).eval()
    options = GPTOptions(dtype=torch.float64 if dtype == "fp64" else torch.float32)
    kept = GPT(config, attention=CachedAttention(), cp_group=grid.group("cp"), options=options)
    kept.load_state_dict(trained.state_dict())
    return trained, kept.eval()  # type: ignore[return-value]


@torch.no_grad()
def training_logits(model: GPT, ids: list[int]) -> torch.Tensor:
    """[len(ids), V] of the forward that trains, the whole text at once."""
    padded = np.array([-(-len(ids) // 2) * 2])
    packed_seq, _ = build_packed_seq(np.array([len(ids)]), padded)
    row = torch.tensor(ids + [0] * (int(padded[0]) - len(ids)))
    return model(row, packed_seq, logits_rows=torch.arange(len(ids)))  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "close"), [("fp64", 1e-10), ("fp32", 1e-4)])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", [[5], [7, 3, 60, 1, 1, 22, 9]])
def test_greedy_is_the_argmax_of_the_training_forward(
    grid: Grid, dtype: str, close: float, name: str, prompt: list[int]
) -> None:
    trained, kept = pair(grid, dtype, **MODELS[name])
    seen: list[torch.Tensor] = []

    def spy(logits: torch.Tensor, **options) -> int:
        seen.append(logits)
        return choose(logits, **options)

    with mock.patch("tools.generate.choose", spy):
        added = list(continue_text(kept, prompt, tokens=12, eod=None))
    wanted = training_logits(trained, prompt + added)[len(prompt) - 1 : -1]
    assert added == wanted.argmax(-1).tolist() and len(added) == 12
    torch.testing.assert_close(torch.stack(seen), wanted, rtol=close, atol=close)


def test_a_token_costs_one_tokens_forward(grid: Grid) -> None:
    _, kept = pair(grid, "fp32")
    computed: list[int] = []
    kept.layers["0"].mlp.register_forward_hook(lambda module, inputs, out: computed.append(len(out[1])))  # type: ignore[union-attr]
    list(continue_text(kept, [1, 2, 3, 4, 5], tokens=6, eod=None))
    assert computed == [5, 1, 1, 1, 1, 1]


def test_texts_one_after_another_do_not_see_each_other(grid: Grid) -> None:
    _, kept = pair(grid, "fp64")
    alone = list(continue_text(kept, [4, 4], tokens=5, eod=None))
    list(continue_text(kept, [9, 8, 7, 6], tokens=9, eod=None))
    assert list(continue_text(kept, [4, 4], tokens=5, eod=None)) == alone


def test_the_end_of_a_document_ends_the_text(grid: Grid) -> None:
    _, kept = pair(grid, "fp64")
    whole = list(continue_text(kept, [4, 4], tokens=8, eod=None))
    at = next(n for n in range(1, 8) if whole[n] not in whole[:n])
    assert list(continue_text(kept, [4, 4], tokens=8, eod=whole[at])) == whole[:at]


def drawn(probabilities: list[float], **options) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.tensor(probabilities).log()
    counts = np.bincount(
        [choose(logits, generator=generator, **options) for _ in range(4000)], minlength=len(probabilities)
    )
    return (counts / 4000).tolist()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (dict(temperature=1.0, top_p=1.0), [0.1, 0.6, 0.3]),
        (dict(temperature=1.0, top_p=0.6), [0, 1, 0]),  # reached exactly: no more
        (dict(temperature=1.0, top_p=0.61), [0, 2 / 3, 1 / 3]),
        (dict(temperature=1.0, top_p=0.95), [0.1, 0.6, 0.3]),
        (dict(temperature=1.0, top_p=1e-9), [0, 1, 0]),  # always one
        (dict(temperature=0.5, top_p=1.0), [1 / 46, 36 / 46, 9 / 46]),
        (dict(temperature=0.0, top_p=1.0), [0, 1, 0]),
    ],
)
def test_draws(options: dict, wanted: list[float]) -> None:
    assert drawn([0.1, 0.6, 0.3], **options) == pytest.approx(wanted, abs=0.03)
    assert [p == 0 for p in drawn([0.1, 0.6, 0.3], **options)] == [p == 0 for p in wanted]


def test_the_seed_decides(grid: Grid) -> None:
    _, kept = pair(grid, "fp32")
    texts = [tuple(continue_text(kept, [4], tokens=16, eod=None, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_cache_is_attention(grid: Grid) -> None:
    """Against plain attention over all that was read, one query at a time."""
    q, k, v = (
        torch.randn(6, heads, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(heads))
        for heads in (4, 2, 2)
    )
    cache = CachedAttention()
    row = SimpleNamespace()
    got = [
        cache(q[:3], k[:3], v[:3], row, None),
        *(cache(q[i : i + 1], k[i : i + 1], v[i : i + 1], row, None) for i in range(3, 6)),
    ]  # type: ignore[arg-type]
    wide = [x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v)]
    wanted = F.scaled_dot_product_attention(q.transpose(0, 1), *wide, is_causal=True).transpose(0, 1)
    torch.testing.assert_close(torch.cat(got), wanted)


# ---------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    flags = ["--data-path", str(write_corpus(folder)), "--data-cache-path", str(folder / "cache"), "--device", "cpu"]
    train(0, folder / "run", *SMALL, *flags, "--train-iters", "3", "--save-interval", "3")
    return folder / "run"


def said(*flags: str) -> subprocess.CompletedProcess[str]:
    return run_script("tools/generate.py", *flags, environment=environment(), timeout=120)


def test_a_run_gives_text(run_dir: Path) -> None:
    result = said(
        "--load", str(run_dir), "--prompt", "the ", "--prompt", "a ", "--tokens", "5", "--greedy", "--device", "cpu"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("the ") and "\na " in result.stdout


def test_where_a_checkpoint_is_looked_for(run_dir: Path, tmp_path: Path) -> None:
    newest = run_dir / "checkpoints" / "step_0000003"
    assert (
        find_run_checkpoint(run_dir)
        == find_run_checkpoint(run_dir / "checkpoints")
        == find_run_checkpoint(newest)
        == newest
    )
    with pytest.raises(ValueError, match="--load"):
        find_run_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--top-p", "0"], "--top-p 0.0: must be above 0"),
        (["--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--tokenizer-model", "nowhere.model"], "nowhere.model"),
    ],
)
def test_refusals_are_one_line(run_dir: Path, flags: list[str], words: str) -> None:
    result = said("--load", str(run_dir), "--prompt", "a", *flags)
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("base", [10**30, 10**400, "1e4", True, None])
def test_constants_of_a_strangers_model(run_dir: Path, base: object) -> None:
    """JSON writes integers of any length: PyTorch takes no more than 64 bits, a float no more than 10^308."""
    place = run_dir / "checkpoints" / "step_0000003"
    metadata = read_run_metadata(place) | {"model rotary_base": base}
    if base == 10**30:
        assert isinstance(read_model_config(place, metadata).rotary_base, float)
    else:
        with pytest.raises(UserError, match="does not describe a model"):
            read_model_config(place, metadata)


def test_a_run_whose_checkpoints_lie_elsewhere(tmp_path: Path) -> None:
    save = tmp_path / "far" / "weights"
    flags = ["--data-path", str(write_corpus(tmp_path)), "--data-cache-path", str(tmp_path / "cache")]
    flags += ["--device", "cpu", "--save", str(save)]
    train(0, tmp_path / "run", *SMALL, *flags, "--train-iters", "1", "--save-interval", "1")
    assert find_run_checkpoint(tmp_path / "run") == find_run_checkpoint(save) == save / "step_0000001"
    for load in (tmp_path / "run", save, save / "step_0000001"):
        result = said("--load", str(load), "--prompt", "a ", "--tokens", "2", "--device", "cpu")
        assert result.returncode == 0 and result.stdout.startswith("a "), result.stderr


# ---------------------------------------------------------------------------------------------------
# A run's paths, which may be a stranger's


def with_flags(run: Path, to: Path, **changes) -> Path:
    """A copy of a run whose config.json says something else."""
    shutil.copytree(run, to)
    told = json.loads((to / "config.json").read_text())
    told["flags"] |= changes
    (to / "config.json").write_text(json.dumps(told))
    return to


def under(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def trained_tokenizer(tmp_path_factory) -> Path:
    """The folder of a run with a tokenizer of its own, which lies in `cache` there."""
    folder = tmp_path_factory.mktemp("own")
    flags = ["--data-path", str(write_corpus(folder)), "--data-cache-path", str(folder / "cache"), "--device", "cpu"]
    flags += ["--tokenizer-type", "auto", "--tokenizer-vocab-size", "320"]
    train(0, folder / "run", *SMALL, *flags, "--train-iters", "1", "--save-interval", "1")
    return folder


@pytest.mark.parametrize("kind", ["auto", "sentencepiece"])
def test_paths_of_a_strangers_run_make_nothing(run_dir: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "mine").mkdir()
    changes = dict(
        data_path=[str(write_corpus(tmp_path / "mine"))],
        data_cache_path=str(tmp_path / "mine" / "there"),
        tokenizer_type=kind,
    )
    edited = with_flags(run_dir, tmp_path / "edited", **changes, tokenizer_vocab_size=320)
    before = under(tmp_path)
    result = said("--load", str(edited), "--prompt", "a", "--tokens", "2", "--device", "cpu")
    assert result.returncode == 2 and "--tokenizer-model" in result.stderr and result.stderr.count("\n") == 1
    assert under(tmp_path) == before


@pytest.mark.parametrize(
    "changes",
    [
        dict(tokenizer_type=None),
        dict(data_path=[3]),
        dict(data_cache_path={}),
        dict(data_path=3),
        dict(tokenizer_model="/dev/zero"),
    ],
    ids=str,
)
def test_paths_that_are_none_are_refused_in_one_line(run_dir: Path, tmp_path: Path, changes: dict) -> None:
    result = said(
        "--load", str(with_flags(run_dir, tmp_path / "edited", **changes)), "--prompt", "a", "--device", "cpu"
    )
    assert result.returncode == 2 and "config.json" in result.stderr and result.stderr.count("\n") == 1


def test_a_runs_own_cached_tokenizer_is_read_and_left_alone(trained_tokenizer: Path, tmp_path: Path) -> None:
    before = under(trained_tokenizer)
    assert list((trained_tokenizer / "cache" / "tokenizer").glob("*/tokenizer.model"))
    result = said("--load", str(trained_tokenizer / "run"), "--prompt", "the ", "--tokens", "3", "--device", "cpu")
    assert result.returncode == 0 and result.stdout.startswith("the "), result.stderr
    gone = with_flags(trained_tokenizer / "run", tmp_path / "gone", data_path=[str(tmp_path / "nowhere.jsonl")])
    assert (
        said("--load", str(gone), "--prompt", "the ", "--tokens", "3", "--device", "cpu").stdout == result.stdout
    )  # the corpus is not needed
    assert under(trained_tokenizer) == before


def test_a_cached_tokenizer_that_is_another_is_not_taken(trained_tokenizer: Path, tmp_path: Path) -> None:
    other = tmp_path / "cache" / "tokenizer" / "key"
    other.mkdir(parents=True)
    (other / "tokenizer.model").write_bytes(b"not a model")
    edited = with_flags(trained_tokenizer / "run", tmp_path / "edited", data_cache_path=str(tmp_path / "cache"))
    result = said("--load", str(edited), "--prompt", "a", "--device", "cpu")
    assert result.returncode == 2 and "--tokenizer-model" in result.stderr
    (own,) = (trained_tokenizer / "cache" / "tokenizer").glob("*/tokenizer.model")
    given = said(
        "--load", str(edited), "--prompt", "a", "--tokens", "2", "--device", "cpu", "--tokenizer-model", str(own)
    )
    assert given.returncode == 0, given.stderr


def test_a_prepared_corpus_has_its_tokenizer(trained_tokenizer: Path, tmp_path: Path) -> None:
    (own,) = (trained_tokenizer / "cache" / "tokenizer").glob("*/tokenizer.model")
    prefix = tmp_path / "web"
    command = [
        sys.executable,
        "-m",
        "data.prepare",
        "--input",
        str(trained_tokenizer / "corpus.jsonl"),
        "--output-prefix",
        str(prefix),
    ]
    subprocess.run(
        [*command, "--tokenizer-model", str(own), "--append-eod", "--workers", "1"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    changes = dict(data_path=[str(prefix)], data_cache_path=str(tmp_path / "nowhere"))
    edited = with_flags(trained_tokenizer / "run", tmp_path / "edited", **changes)
    result = said("--load", str(edited), "--prompt", "the ", "--tokens", "2", "--device", "cpu")
    assert result.returncode == 0 and not (tmp_path / "nowhere").exists(), result.stderr
