"""Initial weights: a pure function of seed, parameter name and block of rows.

A matrix is drawn in blocks of `BLOCK_ROWS` rows, each by its own generator on the CPU, in float32. A rank draws only
the blocks that overlap its shard: the model at step 0 is equal under every layout, and no rank holds a whole matrix.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from model.config import GPTConfig
from model.names import tp_dim
from parallel.tensor import TensorParallel

BLOCK_ROWS = 256

# Matrices that write to the residual stream: std is divided by sqrt(2 * layers) (GPT-2).
RESIDUAL_OUTPUTS = ("attention.output.weight", "mlp.fc2_weight")


def initial_rows(seed: int, name: str, start: int, stop: int, columns: int, std: float) -> Tensor:
    """Draw rows start..stop of the parameter, N(0, std^2). [stop - start, columns] float32 on the CPU."""
    out = torch.empty(stop - start, columns)
    for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
        digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        drawn = torch.empty(BLOCK_ROWS, columns).normal_(0.0, std, generator=generator)
        first = block * BLOCK_ROWS
        low, high = max(start, first), min(stop, first + BLOCK_ROWS)
        out[low - start : high - start] = drawn[low - first : high - first]
    return out


def local_rows(parameter: Tensor) -> tuple[int, int]:
    """This rank's rows (start, stop) of the tp rank's parameter."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    start, stop = 0, parameter.shape[0]
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "parameters are sharded by rows"
            # FSDP2 shards by torch.chunk: chunks have ceil(n / size) rows, except the last ones.
            rows = -(-(stop - start) // parameter.device_mesh.size(dim))
            start, stop = (min(start + rows * (coordinate[dim] + i), stop) for i in (0, 1))
    assert parameter.to_local().shape[0] == stop - start
    return start, stop


@torch.no_grad()
def initialise(
    model: nn.Module, config: GPTConfig, *, seed: int, device: torch.device, tp: TensorParallel | None = None
) -> None:
    """Materialise a model from the meta device; each rank fills its own shards."""
    tp = tp or TensorParallel()
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.dim() == 1:
            local.fill_(1.0)  # every vector is a norm's weight
            continue
        std = config.init_std
        if name.endswith(RESIDUAL_OUTPUTS):
            std /= (2 * config.num_layers) ** 0.5
        start, stop = local_rows(parameter)
        rows, columns = parameter.shape  # of the tp rank's shard
        if tp_dim(name) == 0:
            local.copy_(initial_rows(seed, name, tp.rank * rows + start, tp.rank * rows + stop, columns, std))
        else:
            whole = initial_rows(seed, name, start, stop, columns * tp.size, std)
            local.copy_(whole[:, tp.rank * columns : (tp.rank + 1) * columns])
