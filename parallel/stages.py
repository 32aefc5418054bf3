"""Pipeline stages: the layers of each, and the microbatches that a schedule takes. No torch import."""

from __future__ import annotations

from utils.errors import UserError

PP_SCHEDULES = ("1f1b", "gpipe", "interleaved")


def split_layers(num_layers: int, num_stages: int, *, first: int | None = None, last: int | None = None) -> list[range]:
    """Split the layers evenly into stages, in order; earlier stages take the remainder.

    Args:
        first, last: layers of the first stage, which also holds the embedding, and of the last, which also holds the
            output; None: as the other stages.

    Raises:
        UserError: fewer layers than stages, or no layer left for a stage.
    """
    if num_stages == 1:
        for flag, given in (("--first-stage-layers", first), ("--last-stage-layers", last)):
            if given is not None:
                raise UserError(f"{flag} {given} needs more than one stage (--pp-size above 1)")
        return [range(num_layers)]
    fixed = {0: first, num_stages - 1: last}
    counts = {stage: count for stage, count in fixed.items() if count is not None}
    free = [stage for stage in range(num_stages) if stage not in counts]
    left = num_layers - sum(counts.values())
    if left < len(free) or (not free and left):
        raise UserError(
            f"--num-layers {num_layers} cannot be cut into {num_stages} stages"
            + (f" of which {counts} hold that many" if counts else "")
            + f": {left} layers are left for {len(free)} stages"
        )
    for index, stage in enumerate(free):
        counts[stage] = left // len(free) + (index < left % len(free))
    ends = [sum(counts[s] for s in range(stage + 1)) for stage in range(num_stages)]
    return [range(end - counts[stage], end) for stage, end in enumerate(ends)]


def check_microbatches(schedule: str, microbatches: int, pp_size: int, virtual_stages: int) -> None:
    """Check that a schedule takes this number of microbatches a step and of stages a rank.

    Raises:
        UserError: the schedule does not; names the nearest numbers that it takes.
    """
    if pp_size == 1:
        if virtual_stages > 1:
            raise UserError(f"--virtual-stages {virtual_stages} needs --pp-size above 1")
        return
    if (virtual_stages > 1) != (schedule == "interleaved"):
        raise UserError(
            f"--pp-schedule {schedule} with --virtual-stages {virtual_stages}: interleaved takes 2 or more, others 1"
        )
    if microbatches < pp_size:
        raise UserError(
            f"--global-batch-size makes {microbatches} microbatches a step, fewer than --pp-size {pp_size}: raise it"
        )
    rounds = microbatches // pp_size
    if schedule == "interleaved" and microbatches % rounds:
        legal = rounds * pp_size
        raise UserError(
            f"--pp-schedule {schedule} cannot run {microbatches} microbatches on {pp_size} ranks: "
            f"make it {legal} or {legal + pp_size}"
        )
