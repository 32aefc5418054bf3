"""How many samples each step reads: a constant, a ramp (--rampup-batch-size), or what a resumed run changed.

Samples are numbered over the whole run, and every step reads the next ones: no sample is read twice or left out,
whatever the batch was before.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from utils.errors import UserError


class Phase(NamedTuple):
    """Consecutive steps with the same batch. Attributes: its first step, the first sample of this step, batch size."""

    step: int
    sample: int
    size: int


class RampUp(NamedTuple):
    """Batch sizes from `start` in steps of `increment`, spread evenly over the first `samples` samples of the run."""

    start: int
    increment: int
    samples: int


@dataclass(frozen=True)
class BatchSchedule:
    """Batch size of each step.

    Attributes:
        phases: in ascending order, the first from step 0.
    """

    phases: tuple[Phase, ...]

    @classmethod
    def constant(cls, size: int) -> BatchSchedule:
        return cls((Phase(0, 0, size),))

    @classmethod
    def build(
        cls, size: int, rampup: RampUp | None = None, *, done: int = 0, before: Sequence[Phase] = ()
    ) -> BatchSchedule:
        """The schedule of a run that goes on after `done` steps.

        Args:
            size: batch after the ramp.
            rampup: None: `size` from here on.
            before: phases of the steps that are done, from a checkpoint.
        """
        phases = [phase for phase in before if phase.step < done]
        assert bool(phases) == bool(done)
        step, sample = done, cls(tuple(phases)).first_sample(done) if phases else 0
        for threshold, wanted in _thresholds(size, rampup):
            # The first step that begins with at least `threshold` samples read.
            if phases and threshold > sample:
                steps = -(-(threshold - sample) // phases[-1].size)
                step, sample = step + steps, sample + steps * phases[-1].size
            if phases and phases[-1].step == step:
                phases.pop()
            if not phases or phases[-1].size != wanted:
                phases.append(Phase(step, sample, wanted))
        return cls(tuple(phases))

    @classmethod
    def parse(cls, phases: Any) -> BatchSchedule:
        """The inverse of `to_json`. Raises UserError: corrupted."""
        try:
            found = tuple(Phase(*phase) for phase in phases)
            if not found or not all(type(n) is int for phase in found for n in phase):
                raise ValueError("not rows of three whole numbers")
            if found[0][:2] != (0, 0) or min(phase.size for phase in found) < 1:
                raise ValueError("the first phase does not begin at step 0, or a batch is empty")
            for one, other in itertools.pairwise(found):
                if other.step <= one.step or other.sample != one.sample + (other.step - one.step) * one.size:
                    raise ValueError(f"step {other.step} does not follow from the phase before")
        except (TypeError, ValueError) as error:
            raise UserError(f"the checkpoint's batch sizes are corrupted ({error})") from error
        return cls(found)

    def to_json(self, done: int) -> list[list[int]]:
        """The phases of the first `done` steps."""
        return [list(phase) for phase in self.phases if phase.step < done]

    def _phase(self, step: int) -> Phase:
        return self.phases[bisect.bisect_right(self.phases, step, key=lambda phase: phase.step) - 1]

    def size(self, step: int) -> int:
        """Samples of step `step`, counted from 0."""
        return self._phase(step).size

    def first_sample(self, step: int) -> int:
        """Samples that the steps before `step` read."""
        phase = self._phase(step)
        return phase.sample + (step - phase.step) * phase.size

    def steps_for(self, samples: int) -> int:
        """The fewest steps that read at least `samples` samples."""
        phase = self.phases[bisect.bisect_left(self.phases, samples, key=lambda phase: phase.sample) - 1]
        return phase.step + -(-(samples - phase.sample) // phase.size) if samples > 0 else 0

    def describe(self, first_step: int = 0) -> str:
        """`4 from step 1, 8 from step 101`, steps counted as in the log; only the phases from `first_step` on."""
        ends = [*(phase.step for phase in self.phases[1:]), None]
        shown = [phase for phase, end in zip(self.phases, ends, strict=True) if end is None or end > first_step]
        return ", ".join(f"{phase.size} from step {phase.step + 1}" for phase in shown)


def count_microbatches(
    samples: int, micro_batch_size: int, data_ranks: int, *, pp_size: int = 1, schedule: str = "1f1b"
) -> int:
    """Microbatches of a step on each of `data_ranks` ranks (dp_replicate * dp_shard).

    Their places are at least the step's `samples`; places without a sample are left empty. A pipeline takes at least a
    microbatch for each of its ranks, and the schedule interleaved only some numbers.
    """
    count = max(-(-samples // (micro_batch_size * data_ranks)), pp_size)
    while pp_size > 1 and schedule == "interleaved" and count % (count // pp_size):
        count += 1
    return count


def _thresholds(size: int, rampup: RampUp | None) -> list[tuple[int, int]]:
    """(samples read before it, batch size) of every batch size of a ramp."""
    if rampup is None:
        return [(0, size)]
    count = (size - rampup.start) // rampup.increment
    return [(-(-n * rampup.samples // count), rampup.start + n * rampup.increment) for n in range(count + 1)]


def parse_rampup(numbers: Sequence[int] | None, size: int) -> RampUp | None:
    """`--rampup-batch-size START INCREMENT SAMPLES` for a batch of `size` samples at its end.

    Raises:
        UserError: not three numbers, or no whole number of increments leads to `size`.
    """
    if numbers is None:
        return None
    words = " ".join(map(str, numbers))
    if len(numbers) != 3 or min(numbers) < 1:
        raise UserError(f"--rampup-batch-size {words}: must be three numbers of at least 1, START INCREMENT SAMPLES")
    rampup = RampUp(*numbers)
    if rampup.start > size or (size - rampup.start) % rampup.increment:
        raise UserError(
            f"--rampup-batch-size {words}: {rampup.start} plus a multiple of {rampup.increment} does not make "
            f"--global-batch-size {size}"
        )
    return rampup if rampup.start < size else None
