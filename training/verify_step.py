"""Checks inside a run that ranks which must hold the same thing do: `--verify-steps`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from data.loader import Batch
from parallel.fsdp import local_tensor, sharded_parameters
from parallel.grid import Grid


def hash_weights(model: nn.Module) -> int:
    """Of this rank's shards, bit for bit. Copies them to the host."""
    digest = hashlib.blake2b(digest_size=8)
    for parameter in sharded_parameters(model).values():
        # A copy, since numpy() would forbid the original's storage to be resized.
        digest.update(local_tensor(parameter.detach()).cpu().clone().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def check_agreement(value: int, grid: Grid, axis: str, what: str, device: torch.device) -> None:
    """Every rank along `axis` must hold the same value. Collective.

    Raises:
        RuntimeError: on every rank of the group, naming the global ranks that differ from the first.
    """
    group = grid.group(axis)
    if group.size() == 1:
        return
    gathered = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(gathered, torch.tensor([value], dtype=torch.int64, device=device), group=group)
    values = [int(v) for v in gathered]
    ranks = dist.get_process_group_ranks(group)
    differing = [rank for rank, v in zip(ranks, values, strict=True) if v != values[0]]
    if differing:
        raise RuntimeError(f"{what} differ along {axis}: ranks {differing} from rank {ranks[0]} (of {ranks})")


def verify_rows(batches: Sequence[Batch], grid: Grid, device: torch.device) -> None:
    """The cp, tp and pp peers of a row hold the same row and documents.

    Raises:
        RuntimeError: names the axis and the ranks.
    """
    for number, batch in enumerate(batches):
        assert batch.row_hash is not None
        for axis in ("cp", "tp", "pp"):
            check_agreement(batch.row_hash, grid, axis, f"the tokens or documents of microbatch {number}", device)


def verify_weights(model: nn.Module, grid: Grid, device: torch.device) -> None:
    """The replicas hold the same weights, bit for bit. Called after an update, which gradients that differ would part.

    Raises:
        RuntimeError: names the ranks.
    """
    if grid.size("dp_replicate") > 1:
        check_agreement(hash_weights(model), grid, "dp_replicate", "the weights", device)
