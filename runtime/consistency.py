"""Checks inside a run that ranks hold equal rows and weights: `--verify-steps`, `--check-weights-interval`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batch import Batch
from model.names import tp_dim
from parallel.fsdp import local_tensor, sharded_parameters
from parallel.grid import Grid


def _digest(tensors: Iterable[Tensor]) -> int:
    """A hash of every bit. Copies the tensors to the host."""
    digest = hashlib.blake2b(digest_size=8)
    for x in tensors:
        # A clone: numpy() would pin the size of the original's storage.
        digest.update(local_tensor(x.detach()).cpu().clone().reshape(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def _find_differing(value: int, group: dist.ProcessGroup, device: torch.device) -> tuple[list[int], int]:
    """Global ranks of the group that don't hold the most common value, and the first rank that does. Collective."""
    gathered = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(gathered, torch.tensor([value], dtype=torch.int64, device=device), group=group)
    values = [int(v) for v in gathered]
    usual = max(values, key=lambda v: (values.count(v), -values.index(v)))
    ranks = dist.get_process_group_ranks(group)
    return [rank for rank, v in zip(ranks, values, strict=True) if v != usual], ranks[values.index(usual)]


def _name_ranks(differing: list[int], other: int, group: dist.ProcessGroup) -> str:
    doubt = "; which of the two is wrong is not known" if group.size() == 2 else ""
    return f"ranks {differing} from rank {other} (of {dist.get_process_group_ranks(group)}){doubt}"


def check_agreement(value: int, grid: Grid, axis: str, what: str, device: torch.device) -> None:
    """Every rank along `axis` must hold the same value. Collective.

    Raises:
        RuntimeError: on every rank of the group, naming the global ranks that differ from the others.
    """
    group = grid.group(axis)
    if group.size() == 1:
        return
    differing, other = _find_differing(value, group, device)
    if differing:
        raise RuntimeError(f"{what} differ along {axis}: {_name_ranks(differing, other, group)}")


def verify_rows(batches: Sequence[Batch], grid: Grid, device: torch.device) -> None:
    """The cp, tp and pp ranks of a row hold the same row and documents. Collective.

    Raises:
        RuntimeError: names the axis and the ranks.
    """
    for number, batch in enumerate(batches):
        assert batch.row_hash is not None
        for axis in ("cp", "tp", "pp"):
            check_agreement(batch.row_hash, grid, axis, f"the tokens or documents of microbatch {number}", device)


def verify_weights(
    model: nn.Module,
    grid: Grid,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    tied_group: dist.ProcessGroup | None = None,
) -> None:
    """Copies of a weight hold the same bits. Collective; after an update, which unequal gradients would make unequal.

    Copies: every weight along dp_replicate, weights that tp does not shard along tp, the embedding that the first and
    last stage share.

    Args:
        optimizer: its moments are compared too.
        tied_group: as `Pipeline`'s.

    Raises:
        RuntimeError: names the axis, the ranks and the first parameter that differs.
    """
    parameters = sharded_parameters(model)
    copies = [
        ("dp_replicate", list(parameters), grid.group("dp_replicate")),
        ("tp", [name for name in parameters if tp_dim(name) is None], grid.group("tp")),
    ]
    if tied_group is not None:
        copies.append(("pp, between its ends,", ["embedding.weight"], tied_group))
    states = {
        name: [x, *(state[key] for state in [optimizer.state[x] if optimizer else {}] for key in sorted(state))]
        for name, x in parameters.items()
    }
    for axis, names, group in copies:
        if group.size() == 1:
            continue
        if not _find_differing(_digest(x for name in names for x in states[name]), group, device)[0]:
            continue
        for name in names:
            differing, other = _find_differing(_digest(states[name]), group, device)
            if differing:
                what = "weights" if optimizer is None else "weights or moments"
                raise RuntimeError(
                    f"the {what} of {name} differ along {axis}: {_name_ranks(differing, other, group)}; "
                    "--resume continues from the newest checkpoint before"
                )
