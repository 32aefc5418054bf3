"""`PackedSeq`: the documents of one row, which loader, rope, attention and FLOPs read.

A row of T tokens is a concatenation of documents. Each document has a padded length, its stored tokens, and a real
length, at most the padded one. The row's unused tail is a document of real length 0. A BSHD row is the case in which
each document is one sequence of exactly `seq_length` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp.layout import ranges, shard_indices
from cp.placement import Placement
from utils.errors import UserError

# Label of a token without loss.
IGNORE_LABEL = -100


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedSeq:
    """The documents of a whole row, and the positions of this rank's tokens.

    Attributes:
        lengths: [documents] int64 on the host, real length of each document.
        padded_lengths: [documents] int64 on the host, padded length of each document; their sum is T.
        cu_seqlens: [documents + 1] int32, running sum of `lengths`; of the whole row on every rank.
        cu_seqlens_padded: [documents + 1] int32, running sum of `padded_lengths`.
        max_seqlen: longest real length.
        positions: [T / cp_size] int64, index of each of this rank's tokens within its document.
        qkv_format: `thd` or `bshd`.
        layout: how the row is sharded over the cp ranks (`cp.layout`).
        placement: the documents' ranks in the layout hybrid; None: every document lies on all ranks.
        first_ids: [documents] int64 on the host, number of each document's first token in the whole run. On every
            layout a token's id is this number plus its position: dropout masks are functions of ids.
        cache: what attention backends prepare for this row, made once and read by every layer.
    """

    lengths: np.ndarray
    padded_lengths: np.ndarray
    cu_seqlens: Tensor
    cu_seqlens_padded: Tensor
    max_seqlen: int
    positions: Tensor
    qkv_format: str
    layout: str
    first_ids: np.ndarray
    placement: Placement | None = None
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def row_length(self) -> int:
        """T: stored tokens of the row, padding included."""
        return int(self.padded_lengths.sum())

    def move(self, move_tensor: Any) -> PackedSeq:
        """A copy with every tensor passed through `move_tensor`, with an empty cache."""
        tensors = {name: move_tensor(getattr(self, name)) for name in ("cu_seqlens", "cu_seqlens_padded", "positions")}
        return replace(self, **tensors, cache={})

    def cached(self, key: Any, build: Callable[[], Any]) -> Any:
        """The cache's value of the key; built if absent."""
        if key not in self.cache:
            self.cache[key] = build()
        return self.cache[key]

    def owned(self, *, cp_size: int, cp_rank: int) -> np.ndarray:
        """`shard_indices` of a cp rank, [T / cp_size] int64."""
        place = dict(cp_size=cp_size, cp_rank=cp_rank, placement=self.placement)
        return shard_indices(self.padded_lengths, layout=self.layout, **place)  # type: ignore[arg-type]

    def token_ids_and_positions(self, *, cp_size: int, cp_rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and positions of a cp rank's tokens, [T / cp_size] int64 each."""
        owned = self.owned(cp_size=cp_size, cp_rank=cp_rank)
        positions = ranges(np.zeros_like(self.padded_lengths), self.padded_lengths)
        return ranges(self.first_ids, self.padded_lengths)[owned], positions[owned]

    def padding(self, *, cp_size: int, cp_rank: int) -> np.ndarray:
        """Which of a cp rank's tokens are padding, [T / cp_size] bool."""
        owned = self.owned(cp_size=cp_size, cp_rank=cp_rank)
        return (ranges(-self.lengths, self.padded_lengths) >= 0)[owned]  # tokens counted from the padding's first

    @property
    def is_padded(self) -> bool:
        return bool((self.lengths != self.padded_lengths).any())


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array of the row's indices to `device`, through pinned memory so that the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _running_sum(lengths: list[int]) -> Tensor:
    return torch.from_numpy(np.array([0, *accumulate(lengths)], np.int32))


def build_packed_seq(
    lengths: np.ndarray,
    padded_lengths: np.ndarray,
    *,
    cp_size: int = 1,
    cp_rank: int = 0,
    qkv_format: str = "thd",
    layout: str = "zigzag",
    first_ids: np.ndarray | None = None,
    placement: Placement | None = None,
) -> tuple[PackedSeq, np.ndarray]:
    """Describe a row, and select this rank's tokens.

    Args:
        lengths: [documents] real lengths; 0 for the tail.
        padded_lengths: [documents] padded lengths.
        first_ids: as in `PackedSeq`; None: positions in the row.
        placement: as in `PackedSeq`.

    Returns:
        The `PackedSeq` with CPU tensors, and the [T / cp_size] int64 indices of this rank's tokens in the row.

    Raises:
        UserError: a real length above its padded length, or a padded length that the layout cannot cut.
    """
    lengths, padded_lengths = np.asarray(lengths, np.int64), np.asarray(padded_lengths, np.int64)
    if lengths.shape != padded_lengths.shape or lengths.ndim != 1:
        raise UserError(f"{lengths.shape} real lengths beside {padded_lengths.shape} padded ones")
    real, padded = lengths.tolist(), padded_lengths.tolist()  # Python's ints are faster for a row's few documents
    if not all(0 <= a <= b for a, b in zip(real, padded, strict=True)):
        raise UserError("a document's real length must lie between 0 and its padded length")
    owned = shard_indices(padded_lengths, cp_size=cp_size, cp_rank=cp_rank, layout=layout, placement=placement)
    starts = np.array([0, *accumulate(padded)][:-1], np.int64)
    starts_of = np.repeat(starts, padded_lengths)  # [T]
    packed_seq = PackedSeq(
        lengths=lengths,
        padded_lengths=padded_lengths,
        cu_seqlens=_running_sum(real),
        cu_seqlens_padded=_running_sum(padded),
        max_seqlen=max(real, default=0),
        positions=torch.from_numpy(owned - (starts_of if cp_size == 1 else starts_of[owned])),
        qkv_format=qkv_format,
        layout=layout,
        first_ids=starts if first_ids is None else first_ids,
        placement=placement,
    )
    return packed_seq, owned
