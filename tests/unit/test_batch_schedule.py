"""Batch sizes by step: ramps, changes at a resume, and which samples the ranks read under them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import EMPTY, BatchPlan
from data.batch_schedule import BatchSchedule, Phase, RampUp, count_microbatches, parse_rampup
from tests.flags import resolve_config
from training.lr_schedule import build_lr_schedule
from utils.errors import UserError

RAMPS = st.builds(
    lambda start, increment, count, samples: (start + increment * count, RampUp(start, increment, samples)),
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 200),
)  # fmt: skip
PIPELINES = [(1, "1f1b"), (3, "1f1b"), (2, "interleaved"), (3, "interleaved")]
STEPS = 80


def sizes(schedule: BatchSchedule, steps: int = STEPS) -> list[int]:
    return [schedule.size(step) for step in range(steps)]


@given(RAMPS)
@settings(max_examples=200, deadline=None)
def test_a_ramp_follows_the_samples_read_so_far(ramp: tuple[int, RampUp]) -> None:
    """As Megatron-LM's: the start, and an increment for each full share of the ramp's samples."""
    size, rampup = ramp
    count, read, want = (size - rampup.start) // rampup.increment, 0, []
    for _ in range(STEPS):
        want.append(rampup.start + rampup.increment * min(count, read * count // rampup.samples))
        read += want[-1]
    assert sizes(BatchSchedule.build(size, rampup)) == want


@given(RAMPS, st.lists(st.tuples(st.integers(1, STEPS), RAMPS), max_size=3))
@settings(max_examples=200, deadline=None)
def test_no_sample_is_read_twice_or_left_out(
    first: tuple[int, RampUp], changes: list[tuple[int, tuple[int, RampUp]]]
) -> None:
    """Through changes at resumes, each of which knows the steps before from the checkpoint only."""
    schedule, done = BatchSchedule.build(*first), 0
    for more, (size, rampup) in changes:
        done += more
        saved = BatchSchedule.parse(schedule.to_json(done))
        before = sizes(schedule, done)
        schedule = BatchSchedule.build(size, rampup, done=done, before=saved.phases)
        assert sizes(schedule, done) == before
    read = 0
    for step in range(done + STEPS):
        assert schedule.first_sample(step) == read
        read += schedule.size(step)
    assert [p.step for p in schedule.phases] == sorted({p.step for p in schedule.phases})


@given(RAMPS, st.integers(1, STEPS))
@settings(max_examples=100, deadline=None)
def test_a_resume_that_changes_nothing_changes_nothing(ramp: tuple[int, RampUp], done: int) -> None:
    whole = BatchSchedule.build(*ramp)
    resumed = BatchSchedule.build(*ramp, done=done, before=BatchSchedule.parse(whole.to_json(done)).phases)
    assert resumed == whole


@given(RAMPS, st.integers(0, 500))
@settings(max_examples=100, deadline=None)
def test_the_fewest_steps_for_some_samples(ramp: tuple[int, RampUp], samples: int) -> None:
    schedule = BatchSchedule.build(*ramp)
    steps = schedule.steps_for(samples)
    assert schedule.first_sample(steps) >= samples and (not steps or schedule.first_sample(steps - 1) < samples)


@pytest.mark.parametrize(
    "wrong",
    [None, [], [[0, 0]], [[0, 0, 0]], [[1, 0, 4]], [[0, 0, 4], [2, 9, 4]], [[0, 0, 4], [0, 0, 8]], [[0, 0, "4"]], [1]],
)
def test_corrupted_batch_sizes_are_a_refusal(wrong: object) -> None:
    with pytest.raises(UserError, match="batch sizes are corrupted"):
        BatchSchedule.parse(wrong)


def test_words_for_the_banner() -> None:
    schedule = BatchSchedule.build(6, RampUp(2, 2, 8))
    assert schedule.phases == (Phase(0, 0, 2), Phase(2, 4, 4), Phase(3, 8, 6))
    assert schedule.describe() == "2 from step 1, 4 from step 3, 6 from step 4"
    assert schedule.describe(3) == "6 from step 4"
    assert parse_rampup([6, 2, 8], 6) is None


@given(
    RAMPS, st.integers(1, 3), st.integers(1, 4), st.sampled_from(PIPELINES), st.booleans(), st.integers(0, 10),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_plan_reads_a_step_once_on_any_ranks(
    ramp: tuple[int, RampUp], micro: int, ranks: int, pipeline: tuple[int, str], balanced: bool, step: int
) -> None:
    batches, read = BatchSchedule.build(*ramp), []
    for rank in range(ranks):
        plan = BatchPlan(
            batches=batches, micro_batch_size=micro, batch_size=ranks, batch_rank=rank, cp_size=1, cp_rank=0,
            qkv_format="thd", layout="zigzag", balance_work=balanced, pp_size=pipeline[0], pp_schedule=pipeline[1],
        )  # fmt: skip
        work = np.arange(plan.num_places(step), dtype=np.float64) + 1
        work[batches.size(step) :] = 0
        rows = plan.assign_samples(step, work)
        assert len(rows) == plan.num_microbatches(step) and all(len(row) == micro for row in rows)
        read += [n for row in rows for n in row]
    first = batches.first_sample(step)
    assert sorted(n for n in read if n != EMPTY) == list(range(first, first + batches.size(step)))


def test_microbatches_that_a_pipeline_takes() -> None:
    """Interleaved: the rounds of pp_size microbatches divide their number (torch.distributed.pipelining.schedules)."""
    for samples in range(1, 40):
        for pp_size in (2, 3, 4):
            count = count_microbatches(samples, 1, 1, pp_size=pp_size)
            assert count == max(samples, pp_size)
            count = count_microbatches(samples, 1, 1, pp_size=pp_size, schedule="interleaved")
            assert count >= max(samples, pp_size) and count % max(1, count // pp_size) == 0
    assert count_microbatches(5, 1, 1, pp_size=2, schedule="interleaved") == 6


def test_tokens_instead_of_steps() -> None:
    """With one batch size, tokens are steps; with a ramp, the rate follows the tokens."""
    shape = ["--seq-length", "64", "--global-batch-size", "4", "--lr", "1", "--min-lr", "0.1"]
    in_steps = resolve_config(*shape, "--train-iters", "50", "--lr-warmup-iters", "5").training
    in_tokens = resolve_config(*shape, "--train-tokens", str(64 * 200), "--lr-warmup-tokens", str(64 * 20)).training
    assert in_tokens.train_iters == 50
    rates = [[build_lr_schedule(t, 64).at(step) for step in range(55)] for t in (in_steps, in_tokens)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)

    ramp = ["--rampup-batch-size", "1", "1", "20", "--lr-decay-style", "linear", "--lr-warmup-tokens", "0"]
    training = resolve_config(*shape, *ramp, "--train-tokens", str(64 * 200)).training
    schedule, batches = build_lr_schedule(training, 64), training.batches
    assert batches.first_sample(training.train_iters - 1) < 200 <= batches.first_sample(training.train_iters)
    for step in range(training.train_iters):
        read = min(200, batches.first_sample(step + 1))
        assert schedule.at(step) == pytest.approx(1 - 0.9 * read / 200)


def test_a_resumed_run_changes_its_batch_on_demand_only() -> None:
    saved = {"--global-batch-size": 4, "step": 10, "data": {"batches": [[0, 0, 4]]}}
    with pytest.raises(UserError, match=r"--global-batch-size 6: .*--new-batch allows another batch.*-size 4"):
        resolve_config("--global-batch-size", "6", resumed=saved)
    changed = resolve_config("--global-batch-size", "6", "--new-batch", resumed=saved).training.batches
    assert changed.phases == (Phase(0, 0, 4), Phase(10, 40, 6))
    assert resolve_config("--new-batch", resumed=saved).training.batches == BatchSchedule.constant(4)
    del saved["data"]  # a checkpoint from before batch sizes were stored
    assert resolve_config(resumed=saved, world=3).training.batches == BatchSchedule.constant(4)
