"""Pipeline parallelism: PyTorch's schedules over our stages, and a forward pass without gradients.

A schedule's public `step()` cuts tensors into equal chunks and cannot carry rows of documents. So what it cuts is
a tensor of microbatch numbers, and each stage is told the number, on the host, and looks up its row in a list of its own:
every stage holds the same rows, documents and positions included. Shapes between stages are static, because every row has
T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.stages import VIRTUAL_SCHEDULES

# What a stage computes for one microbatch: (its number, the hidden state from the stage before or None) -> hidden state or loss.
StageForward = Callable[[int, Tensor | None], Tensor]


def is_last_stage(stage: int, num_stages: int) -> bool:
    return stage == num_stages - 1


def build_schedule(
    chunks: Sequence[nn.Module],
    group: dist.ProcessGroup,
    *,
    schedule: str,
    microbatches: int,
    hidden_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """The schedule of one step over this rank's stages; `.step(numbers)` runs it.

    Args:
        chunks: this rank's stages: pp rank, pp rank + pp size, ... Before each forward their attribute `microbatch` is set to
            the row's number. It takes that number [1], which means nothing, on the first stage and the hidden state on others;
            the last returns the loss [1].
        hidden_shape: of what goes from stage to stage.
        dtype: of it.
    """
    # Half a second to import, which runs without stages need not spend.
    from torch.distributed.pipelining import (
        PipelineStage,
        Schedule1F1B,
        ScheduleGPipe,
        ScheduleInterleaved1F1B,
        ScheduleInterleavedZeroBubble,
    )

    class NumberedStage(PipelineStage):
        """The number is an attribute because an argument would come back from the device, which the host would wait for."""

        def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
            self.submod.microbatch = fwd_chunk_id  # type: ignore[assignment]
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    size, num_stages = group.size(), group.size() * len(chunks)
    hidden = torch.empty(hidden_shape, dtype=dtype, device="meta", requires_grad=True)
    loss = torch.empty(
        1, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="meta", requires_grad=True
    )
    number = torch.empty(1, dtype=torch.int64, device="meta")
    stages: list[Any] = []
    for place, chunk in enumerate(chunks):
        index = group.rank() + place * size
        stages.append(
            NumberedStage(
                chunk,
                index,
                num_stages,
                device,
                input_args=(number if index == 0 else hidden,),
                output_args=(loss if is_last_stage(index, num_stages) else hidden,),
                group=group,
            )
        )
    # The loss is already divided by the step's token count: gradients are sums, not means over microbatches.
    options: dict[str, Any] = dict(
        n_microbatches=microbatches, loss_fn=lambda output, target: output.sum(), scale_grads=False
    )
    if schedule in VIRTUAL_SCHEDULES:
        # zero_bubble: weights' gradients are computed where a rank would wait (arXiv:2401.10241).
        return {"interleaved": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}[schedule](
            stages, **options
        )
    return {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}[schedule](stages[0], **options)


@torch.no_grad()
def pipeline_forward(
    forwards: Sequence[StageForward],
    group: dist.ProcessGroup,
    wrap_group: dist.ProcessGroup,
    *,
    microbatches: int,
    hidden: Callable[[int], Tensor],
) -> list[Tensor]:
    """Forward passes alone: each stage works through all microbatches, then its rank's next stage does.

    Args:
        forwards: of this rank's stages, as `build_schedule`'s chunks.
        wrap_group: another one that holds the same ranks, for what goes from the last rank back to the first. NCCL runs what two
            ranks exchange in the order each asked for it: on one communicator two ranks with two stages each would wait for ever.
        hidden: an empty tensor for what arrives for a microbatch.

    Returns:
        What the last stage returned for each microbatch, on the rank that holds it; an empty list elsewhere.
    """
    size, rank = group.size(), group.rank()
    to_group, from_group = (wrap_group if at_end else group for at_end in (rank == size - 1, rank == 0))
    following, previous = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    num_stages = size * len(forwards)
    results: list[Tensor] = []
    sends: list[tuple[dist.Work, Tensor]] = []
    for place, forward in enumerate(forwards):
        stage = rank + place * size
        for number in range(microbatches):
            arrived = None
            if stage > 0:
                arrived = hidden(number)
                dist.recv(arrived, previous, group=from_group)
            out = forward(number, arrived)
            if is_last_stage(stage, num_stages):
                results.append(out)
                continue
            out = out.contiguous()
            work = dist.isend(out, following, group=to_group)
            assert work is not None
            sends.append((work, out))
    for work, _ in sends:
        work.wait()
    return results
