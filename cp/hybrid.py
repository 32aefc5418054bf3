"""Attention of the layout `hybrid`: one part for the documents of each degree (cp/placement.py).

A rank's tokens of one degree d are a row of their own, in zigzag order over the d ranks of a group. `p2p` runs the
rings of all degrees together (`cp.native_p2p.rings_attention`): documents of degree 1 are computed while the first
shards of the others travel. Transformer Engine takes one degree after another, the largest first. `all_gather` needs
no groups: `cp.needed_keys` follows the placement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cp.dropout_attention import AttentionOptions
from cp.layout import held_documents
from cp.native_p2p import Ring, build_ring_blocks, rings_attention
from cp.packed_seq import PackedSeq, build_packed_seq
from cp.placement import Placement

Groups = Mapping[int, dist.ProcessGroup]  # this rank's group for each degree above 1


@dataclass(frozen=True, eq=False)
class DegreeRow:
    """The documents of one degree on this rank.

    Attributes:
        tokens: this rank's tokens of the documents.
        packed_seq: the documents as a row in zigzag order over `degree` ranks; tensors on the host.
    """

    degree: int
    tokens: slice
    packed_seq: PackedSeq


def build_degree_rows(packed_seq: PackedSeq, *, cp_size: int, cp_rank: int) -> list[DegreeRow]:
    """The rows of the degrees that this rank holds documents of, the largest degree first."""
    assert packed_seq.layout == "hybrid"
    placement = packed_seq.placement or Placement.on_all_ranks(len(packed_seq.lengths), cp_size)
    held, rows, start = held_documents(placement, cp_rank), [], 0
    degrees = placement.degrees[held]
    for degree in np.unique(degrees)[::-1].tolist():
        documents = held[degrees == degree]
        padded = packed_seq.padded_lengths[documents]
        own, _ = build_packed_seq(
            packed_seq.lengths[documents],
            padded,
            cp_size=degree,
            cp_rank=cp_rank % degree,
            first_ids=packed_seq.first_ids[documents],
        )
        stop = start + int(padded.sum()) // degree
        rows.append(DegreeRow(degree, slice(start, stop), own))
        start = stop
    return rows


def build_rings(
    packed_seq: PackedSeq, *, cp_size: int, cp_rank: int, device: torch.device, with_dropout: bool, groups: Groups
) -> list[Ring]:
    """For `p2p`."""
    rings = []
    for row in build_degree_rows(packed_seq, cp_size=cp_size, cp_rank=cp_rank):
        place: dict[str, Any] = dict(cp_size=row.degree, cp_rank=cp_rank % row.degree)
        blocks = build_ring_blocks(row.packed_seq, device=device, with_dropout=with_dropout, **place)
        rings.append(Ring(row.tokens, blocks, groups[row.degree] if row.degree > 1 else None))
    return rings


def hybrid_p2p(
    q: Tensor, k: Tensor, v: Tensor, rings: list[Ring], group: dist.ProcessGroup, options: AttentionOptions
) -> Tensor:
    """Attention over `build_rings`. q [t, hq, d]; k, v [t, hkv, d] -> [t, hq, d], 0 in padding."""
    return rings_attention(q, k, v, rings, options)
