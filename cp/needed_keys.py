"""Which keys a rank's queries need of other ranks, and the exchange that brings them: pure functions of the row.

A rank holds pieces: runs of consecutive tokens of a document. A piece attends to itself and to all real tokens of its
document before it. So of each document a rank needs the tokens before its last piece, and nothing of other documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cp.layout import shard_indices
from cp.placement import Placement


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of one rank, in its storage order, [pieces] int64 each.

    Attributes:
        start: first token, in the rank's tokens.
        length: real tokens.
        document: number in the row.
        before: tokens of the document before the piece; 0 for a piece without real tokens.
    """

    start: np.ndarray
    length: np.ndarray
    document: np.ndarray
    before: np.ndarray


@dataclass(frozen=True, eq=False)
class Exchange:
    """What one rank sends and receives, its own part included.

    Attributes:
        send: [sum of sent] indices into the rank's tokens, by receiver.
        sent: [cp] number of tokens to each rank.
        received: [cp] number of tokens from each rank.
        order: [sum of received] indices that take received tokens, by sender, to the row's order.
    """

    send: np.ndarray
    sent: np.ndarray
    received: np.ndarray
    order: np.ndarray


class NeededKeys:
    """The keys that each rank needs of a row.

    Args:
        lengths, padded_lengths: [documents] real and stored tokens.
        placement: of the layout hybrid.

    Attributes:
        pieces: of each rank.
        needed: [cp, documents] first tokens of each document that a rank needs.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        padded_lengths: np.ndarray,
        *,
        cp_size: int,
        layout: str,
        placement: Placement | None = None,
    ) -> None:
        self.lengths = lengths
        self.ends = np.cumsum(padded_lengths)
        self.starts = self.ends - padded_lengths
        ranks = range(cp_size)
        cut = partial(shard_indices, padded_lengths, cp_size=cp_size, layout=layout, placement=placement)
        self.shards = [cut(cp_rank=rank) for rank in ranks]
        self.documents = [np.searchsorted(self.ends, owned, side="right") for owned in self.shards]
        self.pieces = [self._find_pieces(rank) for rank in ranks]
        self.needed = np.zeros((cp_size, len(lengths)), np.int64)
        for needed, pieces in zip(self.needed, self.pieces, strict=True):
            np.maximum.at(needed, pieces.document, pieces.before)

    def _find_pieces(self, rank: int) -> Pieces:
        owned, document = self.shards[rank], self.documents[rank]
        # A piece begins where the row's order or the document changes.
        breaks = np.flatnonzero((np.diff(owned) != 1) | (np.diff(document) != 0)) + 1
        start = np.concatenate(([0], breaks)) if len(owned) else np.zeros(0, np.int64)
        document = document[start]
        offset = owned[start] - self.starts[document]  # of the piece in its document
        stored = np.diff(np.append(start, len(owned)))
        real = np.clip(self.lengths[document] - offset, 0, stored)
        return Pieces(start, real, document, np.where(real > 0, offset, 0))

    def _is_needed(self, receivers: int | Sequence[int], sender: int) -> np.ndarray:
        """Which of the sender's tokens each receiver needs: [t], or [receivers, t] bool."""
        document = self.documents[sender]
        return self.needed[receivers][..., document] > self.shards[sender] - self.starts[document]

    def count_exchanged(self) -> np.ndarray:
        """[cp, cp] tokens that each rank (first axis) sends to each other rank (second axis)."""
        ranks = range(len(self.shards))
        counts = np.stack([self._is_needed(ranks, sender).sum(1) for sender in ranks])
        np.fill_diagonal(counts, 0)
        return counts

    def build_exchange(self, rank: int) -> Exchange | None:
        """The rank's part of the exchange; None if no rank needs anything of another."""
        if not self.needed.any():
            return None
        receiver, send = np.nonzero(self._is_needed(range(len(self.shards)), rank))
        masks = [self._is_needed(rank, sender) for sender in range(len(self.shards))]
        tokens = np.concatenate([owned[mask] for owned, mask in zip(self.shards, masks, strict=True)])
        return Exchange(
            send=send,
            sent=np.bincount(receiver, minlength=len(self.shards)),
            received=np.array([np.count_nonzero(mask) for mask in masks]),
            order=np.argsort(tokens, kind="stable"),
        )
