"""Pipeline parallelism: PyTorch's schedules over a rank's stages, and a forward pass without gradients.

A schedule's public `step()` cuts its input tensors into equal chunks, which rows of documents do not allow. So the
schedule cuts a tensor of microbatch numbers, and each stage looks up its row by the number. Every stage holds the
same rows, with documents and positions. Shapes between stages are static because every row has T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# One stage's forward: (microbatch number, the previous stage's hidden state or None) -> hidden state or loss.
StageForward = Callable[[int, Tensor | None], Tensor]


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
    """Build the schedule of one step over this rank's stages; `.step(numbers)` runs it.

    Args:
        chunks: this rank's stages: pp rank, pp rank + pp size, ... Before each forward their attribute `microbatch`
            is set to the row's number. The first stage's argument [1] has no meaning, other stages take the hidden
            state; the last stage returns the loss [1].
        hidden_shape, dtype: of the hidden state between stages.
    """
    # Imported here: the import takes half a second, which runs without stages do not spend.
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

    class NumberedStage(PipelineStage):
        """Sets the number as an attribute: reading it from an argument would synchronise with the device."""

        def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
            self.submod.microbatch = fwd_chunk_id  # type: ignore[assignment]
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    size, num_stages = group.size(), group.size() * len(chunks)
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = torch.empty(hidden_shape, dtype=dtype, device="meta", requires_grad=True)
    loss = torch.empty(1, dtype=loss_dtype, device="meta", requires_grad=True)
    number = torch.empty(1, dtype=torch.int64, device="meta")
    stages: list[Any] = []
    for index, chunk in enumerate(chunks):
        stage = group.rank() + index * size
        inputs, outputs = (number if stage == 0 else hidden,), (loss if stage == num_stages - 1 else hidden,)
        stages.append(
            NumberedStage(chunk, stage, num_stages, device, input_args=inputs, output_args=outputs, group=group)
        )
    # The loss is already divided by the step's token count: gradients are sums, not means over microbatches.
    options: dict[str, Any] = dict(
        n_microbatches=microbatches, loss_fn=lambda out, target: out.sum(), scale_grads=False
    )
    if schedule == "interleaved":
        return ScheduleInterleaved1F1B(stages, **options)
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
    """Run forward passes without gradients: each stage computes all microbatches, then its rank's next stage does.

    Args:
        forwards: of this rank's stages, ordered as `build_schedule`'s chunks.
        wrap_group: a second group of the same ranks, for messages from the last rank to the first. NCCL runs the
            messages of two ranks in the order of the calls: on one communicator, two ranks with two stages each
            would deadlock.
        hidden: returns an empty tensor that receives a microbatch's hidden state.

    Returns:
        The last stage's output of each microbatch, on the rank that holds this stage; an empty list on other ranks.
    """
    size, rank = group.size(), group.rank()
    to_group, from_group = (wrap_group if at_end else group for at_end in (rank == size - 1, rank == 0))
    following, previous = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    num_stages = size * len(forwards)
    results: list[Tensor] = []
    sends: list[tuple[dist.Work, Tensor]] = []
    for index, forward in enumerate(forwards):
        stage = rank + index * size
        for number in range(microbatches):
            received = None
            if stage > 0:
                received = hidden(number)
                dist.recv(received, previous, group=from_group)
            out = forward(number, received)
            if stage == num_stages - 1:
                results.append(out)
                continue
            out = out.contiguous()
            work = dist.isend(out, following, group=to_group)
            assert work is not None
            sends.append((work, out))
    for work, _ in sends:
        work.wait()
    return results
