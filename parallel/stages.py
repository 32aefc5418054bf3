"""Which layers a pipeline stage holds. No torch import."""

from __future__ import annotations

from utils.errors import UserError

PP_SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero_bubble")
# Those that give every rank several stages.
VIRTUAL_SCHEDULES = ("interleaved", "zero_bubble")


def split_layers(num_layers: int, num_stages: int, *, first: int | None = None, last: int | None = None) -> list[range]:
    """Layers of each stage, in order; as even as they go, earlier stages taking the odd ones.

    Args:
        first, last: layers of the first and last stage, which also hold the embedding and the output; None: like the others.

    Raises:
        ValueError: one line; fewer layers than stages, or nothing left for some stage.
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
    for place, stage in enumerate(free):
        counts[stage] = left // len(free) + (place < left % len(free))
    ends = [sum(counts[s] for s in range(stage + 1)) for stage in range(num_stages)]
    return [range(end - counts[stage], end) for stage, end in enumerate(ends)]


def min_microbatches(pp_size: int) -> int:
    """Microbatches a step that every schedule can run."""
    return pp_size


def check_microbatches(schedule: str, microbatches: int, pp_size: int, virtual_stages: int) -> None:
    """Refuse what a schedule cannot run.

    Raises:
        ValueError: one line with what would do.
    """
    if pp_size == 1:
        if virtual_stages > 1:
            raise UserError(f"--virtual-stages {virtual_stages} needs --pp-size above 1")
        return
    if (virtual_stages > 1) != (schedule in VIRTUAL_SCHEDULES):
        raise UserError(
            f"--pp-schedule {schedule} with --virtual-stages {virtual_stages}: {' and '.join(VIRTUAL_SCHEDULES)} take 2 or more, others 1"
        )
    if microbatches < min_microbatches(pp_size):
        raise UserError(
            f"--global-batch-size makes {microbatches} microbatches a step, fewer than --pp-size {pp_size}: raise it"
        )
    if schedule in VIRTUAL_SCHEDULES:
        rounds = microbatches // pp_size
        if microbatches % rounds:
            legal = rounds * pp_size
            raise UserError(
                f"--pp-schedule {schedule} cannot run {microbatches} microbatches on {pp_size} ranks: make it {legal} or {legal + pp_size}"
            )
