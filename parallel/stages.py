"""Pipeline stages: the layers of each, and what a schedule takes. No torch import."""

from __future__ import annotations

from utils.errors import SizeError, UserError

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
        held = "".join(
            f", --{stage}-stage-layers {n}" for stage, n in (("first", first), ("last", last)) if n is not None
        )
        raise SizeError(
            f"--num-layers {num_layers}{held} cannot be cut into {num_stages} stages: {left} layers are left for "
            f"{len(free)}",
            pp_size=range(num_stages, 0, -1),
            num_layers=[num_layers - left + len(free)],
        )
    for index, stage in enumerate(free):
        counts[stage] = left // len(free) + (index < left % len(free))
    ends = [sum(counts[s] for s in range(stage + 1)) for stage in range(num_stages)]
    return [range(end - counts[stage], end) for stage, end in enumerate(ends)]


def check_schedule(schedule: str, pp_size: int, virtual_stages: int) -> None:
    """Check that a schedule takes this number of stages a rank. Raises UserError: it does not."""
    if pp_size == 1:
        if virtual_stages > 1:
            raise UserError(f"--virtual-stages {virtual_stages} needs --pp-size above 1")
        return
    if (virtual_stages > 1) != (schedule == "interleaved"):
        raise SizeError(
            f"--pp-schedule {schedule} with --virtual-stages {virtual_stages}: interleaved takes 2 or more, others 1",
            virtual_stages=(1, 2),
            pp_schedule=PP_SCHEDULES,
        )
