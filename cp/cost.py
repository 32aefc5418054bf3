"""Cost model of context-parallel attention: `--cp-comm-type auto` takes the method that it predicts to be the fastest.

Seconds of one layer's attention over one row, forward and backward, on the busiest rank: kernels, passes over memory
that merge or reorder results, and transfers that computation does not hide. Absolute times are rough; the order of
methods is what the model is for (docs/context_parallel.md compares the order with measurements). No torch import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from cp.support import AttentionChoice

QUANTILES = 24  # lengths that stand for a distribution
MAX_LENGTHS = 20_000  # documents that quantiles are taken from
UNKNOWN_MEDIAN, UNKNOWN_SIGMA = 600, 1.5  # of documents of unknown lengths: log-normal, as web pages
BACKWARD = 2.5  # backward pass of a kernel, in forward passes
GRADIENT_BYTES = 4
HYBRID_IMBALANCE = 1.05  # busiest rank over the mean
HYBRID_DOCUMENTS = 4  # of a row for each cp rank, below which few rows have an even placement
MIN_GAIN = 1.1  # that another method than the first, or the hybrid layout, must promise


Lengths = np.ndarray | None  # [documents] tokens; None: unknown


@dataclass(frozen=True, kw_only=True)
class Device:
    """Speeds of one rank.

    Attributes:
        flops: FLOP/s of the attention kernel on long documents.
        tile: tokens to whose multiple a kernel's work is rounded up, on average by half.
        call: seconds of a kernel call.
        calls_by_document: each document has calls of its own.
        memory: bytes/s of passes over tensors.
        merge: bytes that move for each element of the output that a merge updates.
        ring, exchange: bytes/s to a neighbour, and of an all-to-all or a gather, within a node.
        network: bytes/s of a rank to another node.
        collective: bytes/s that a rank receives in a gather over several nodes, whose ranks share what arrives.
        latency: seconds until a message arrives.
        hidden: share of a transfer that computation can hide.
    """

    flops: float
    tile: float
    call: float
    calls_by_document: bool
    memory: float
    merge: float
    ring: float
    exchange: float
    network: float
    collective: float
    latency: float
    hidden: float


# cpu: two cores over gloo, benchmarks/results. cuda: an H100 with NVLink, from published figures of attention alone.
# `benchmarks/calibration.py --fit` found flops, tile, merge, exchange, network and collective of cuda, and flops and
# ring of cpu; docs/comparison/prediction_matrix.md has the errors.
DEVICES = {
    "cpu": Device(
        flops=6.23e10,
        tile=32,
        call=6e-5,
        calls_by_document=True,
        memory=4e9,
        merge=32,
        ring=8.4e8,
        exchange=1.5e9,
        network=1e8,
        collective=1e8,
        latency=2e-4,
        hidden=0.5,
    ),
    "cuda": Device(
        flops=6.1e14,
        tile=196,
        call=2e-5,
        calls_by_document=False,
        memory=2.5e12,
        merge=66.3,
        ring=1.5e11,
        exchange=1.96e11,
        network=3.99e10,
        collective=1e11,
        latency=2e-5,
        hidden=0.95,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What attention is to compute, alike on every rank.

    Attributes:
        row_length: tokens of a row.
        lengths: document lengths, each of which stands for an equal share of the tokens.
        heads, groups: query heads and key/value heads of one tp rank.
        item: bytes of a number.
        node_ranks: cp ranks on a node.
    """

    device: str
    row_length: int
    lengths: tuple[float, ...]
    heads: int
    groups: int
    head_dim: int
    item: int
    node_ranks: int = 8


@dataclass(frozen=True)
class Cost:
    """Seconds, by part."""

    kernels: float
    passes: float
    transfers: float

    @property
    def total(self) -> float:
        return self.kernels + self.passes + self.transfers


def length_quantiles(lengths: Lengths, longest: int) -> tuple[float, ...]:
    """`QUANTILES` lengths that stand for equal shares of the tokens; documents above `longest` are cut to it.

    Args:
        lengths: [documents]; None: unknown.
    """
    shares = (np.arange(QUANTILES) + 0.5) / QUANTILES
    if lengths is None:
        by_tokens = NormalDist(math.log(UNKNOWN_MEDIAN) + UNKNOWN_SIGMA**2, UNKNOWN_SIGMA)  # weighted by length
        return tuple(min(float(longest), math.exp(by_tokens.inv_cdf(share))) for share in shares)
    some = lengths[:: max(1, len(lengths) // MAX_LENGTHS)]
    ordered = np.sort(np.minimum(some, longest).astype(np.float64))
    tokens = np.cumsum(ordered)
    return tuple(ordered[np.searchsorted(tokens, shares * tokens[-1])].tolist())


@dataclass(frozen=True)
class _Segment:
    """`number` equal blocks of queries x keys in one rank's kernels; `causal`: the lower triangle of a square."""

    number: float
    queries: float
    keys: float
    causal: bool = False

    def pairs(self, tile: float) -> float:
        queries, keys = self.queries + tile / 2, self.keys + tile / 2
        return self.number * queries * keys * (0.5 if self.causal else 1.0)


# Methods that gather K and V of the whole row before any kernel runs, and of them those that then merge part by part.
COLLECTIVE = (("te", "all_gather"), ("pytorch", "allgather"), ("ring", "llama3"))
GATHERS = ("all_gather", "allgather", "llama3")
MERGES_GATHERED = ("allgather",)
BY_HEADS = (("native", "all_gather"), ("ring", "llama3"))  # a kernel call for each --heads-k-stride key/value heads


def _segments(choice: AttentionChoice, length: float, degree: float, tokens: float) -> list[_Segment]:
    """The blocks of one document on one of its `degree` ranks, on average; of `tokens` in a rank."""
    if degree <= 1:
        return [_Segment(1, length, length, causal=True)]
    if choice.layout == "contiguous":
        part = min(tokens, length / 2)
        return [_Segment(1, part, part, causal=True), _Segment(1, part, (length - part) / 2)]
    chunk = length / (2 * degree)
    if choice.method in GATHERS and choice.method not in MERGES_GATHERED:
        return [_Segment(2, chunk, chunk, causal=True), _Segment(2, chunk, chunk * (2 * degree - 1) / 2)]
    return [_Segment(1, 2 * chunk, 2 * chunk, causal=True), _Segment(degree - 1, 2 * chunk, chunk)]


def _degree(length: float, situation: Situation, ring: int, layout: str) -> float:
    """Ranks that share a document: all, or as few as can hold it without being the busiest, or as many as it fills."""
    room = situation.row_length / ring
    if layout == "contiguous":
        return min(ring, max(1.0, length / room))
    if layout != "hybrid":
        return ring
    work = sum(situation.lengths) / len(situation.lengths) * room  # squared lengths of a rank
    fits = (d for d in range(1, ring) if ring % d == 0 and length <= room * d and length * length <= work * d)
    return next(fits, ring)


def estimate_cost(
    situation: Situation, choice: AttentionChoice, device: Device | None = None, *, imbalance: float = 1.0
) -> Cost:
    """The cost of a supported method.

    Args:
        device: None: that of the situation's kind.
        imbalance: busiest rank's kernels over the mean; 1: of a balanced layout.
    """
    device, a2a_size = device or DEVICES[situation.device], choice.a2a_size
    ring = choice.cp_size // a2a_size
    heads, width = situation.heads / a2a_size, situation.head_dim
    tokens = situation.row_length / ring  # of a rank, after the exchange
    is_gather = choice.method in GATHERS
    is_merged_once = is_gather and choice.method not in MERGES_GATHERED
    rounds = situation.groups / choice.heads_k_stride if (choice.backend, choice.method) in BY_HEADS else 1
    pairs = calls = merged = 0.0
    moved: dict[float, float] = {}  # degree -> tokens of a rank whose K and V travel to the other ranks of a document
    for length in situation.lengths:
        degree = _degree(length, situation, ring, choice.layout)
        own = tokens / len(situation.lengths)  # tokens of such documents on a rank
        documents = own * degree / length
        segments = _segments(choice, length, degree, tokens)
        pairs += documents * sum(segment.pairs(device.tile) for segment in segments)
        if device.calls_by_document:
            calls += documents * (segments[0].number + rounds * sum(segment.number for segment in segments[1:]))
        if degree > 1:
            moved[degree] = moved.get(degree, 0.0) + own
            merged += own if is_merged_once else 0.75 * own * (degree - 1)
    if not device.calls_by_document:
        calls = 1 + (rounds if is_merged_once else ring - 1) * bool(moved)
    kernels = pairs * 4 * heads * width / device.flops * (1 + BACKWARD) * imbalance + 2 * calls * device.call
    if choice.layout == "hybrid":
        kernels *= HYBRID_IMBALANCE
    passes = 2 * merged * heads * width * device.merge / device.memory
    transfers, copied = _transfers(situation, choice, device, busy=kernels + passes, moved=moved)
    return Cost(kernels, passes + copied / device.memory, transfers)


def _transfers(
    situation: Situation, choice: AttentionChoice, device: Device, *, busy: float, moved: dict[float, float]
) -> tuple[float, float]:
    """Seconds of exposed transfers, and bytes that are copied for them.

    Args:
        busy: seconds of kernels and merges, behind which a ring hides its transfers.
        moved: tokens of a rank, after the exchange, whose K and V travel on, by the ranks that share their documents.
    """
    a2a_size, item = choice.a2a_size, situation.item
    ring, width = choice.cp_size // a2a_size, situation.head_dim
    kv_heads = max(a2a_size, situation.groups) / a2a_size
    exposed = copied = 0.0
    if a2a_size > 1:
        # q, k, v and out of the rank's own tokens, and their gradients.
        elements = situation.row_length / choice.cp_size * 2 * (situation.heads + kv_heads * a2a_size) * width
        seconds = 2 * elements * item * _exchange_time(a2a_size, situation.node_ranks, device)
        exposed += seconds + 8 * device.latency
        copied += 2 * 4 * elements * item
    node_ring = max(1, situation.node_ranks // a2a_size)
    if (choice.backend, choice.method) in COLLECTIVE and ring > 1:
        # The whole row, gathered in either pass; gradients are reduced in the inputs' dtype.
        received = 2 * situation.row_length / choice.cp_size * (ring - 1) * situation.groups * width * 3 * item
        speed = device.exchange if ring <= node_ring else device.collective
        return exposed + received / speed + 3 * ring * device.latency, copied + 3 * received
    for degree, tokens in moved.items():
        kv, steps = 2 * tokens * kv_heads * width, degree - 1
        sent = kv * steps * (2 * item + GRADIENT_BYTES)
        if choice.method == "all_gather":
            sent *= 0.75
            copied += 3 * sent
            seconds = sent * degree / steps * _exchange_time(degree, node_ring, device)
        else:
            seconds = sent / (device.ring if degree <= node_ring else device.network)
        seconds += 2 * steps * device.latency
        hidden = busy * steps / degree * tokens / sum(moved.values())
        exposed += max((1 - device.hidden) * seconds, seconds - hidden)
    return exposed, copied


def _exchange_time(ranks: float, node_ranks: int, device: Device) -> float:
    """Seconds a byte of a rank that an all-to-all over these ranks deals out evenly."""
    inside = min(ranks, node_ranks)
    return (inside - 1) / ranks / device.exchange + (ranks - inside) / ranks / device.network


def describe_gain(costs: Sequence[Cost]) -> str:
    """Why the first cost is below the second, in a phrase."""
    best, other = costs
    saved = {
        "longer kernels": other.kernels - best.kernels,
        "fewer passes over memory": other.passes - best.passes,
        "less exposed transfer": other.transfers - best.transfers,
    }
    return f"{other.total / best.total:.1f}x, {max(saved, key=lambda name: saved[name])}"


def choose_method(situation: Situation, choices: Sequence[AttentionChoice]) -> tuple[AttentionChoice, str]:
    """The choice with the lowest cost, and the reason in a phrase.

    Args:
        choices: supported methods in the order of the table; the first stays unless another one is `MIN_GAIN` as fast.
            The hybrid layout, which packs samples otherwise, must be `MIN_GAIN` as fast as the best of the others, and
            is taken for rows of many documents only.
    """
    costs = {choice: estimate_cost(situation, choice) for choice in choices}

    def cheapest(among: Sequence[AttentionChoice]) -> AttentionChoice:
        found = min(among, key=lambda choice: costs[choice].total)
        return found if costs[among[0]].total >= MIN_GAIN * costs[found].total else among[0]

    plain = [choice for choice in choices if choice.layout != "hybrid"]
    documents = sum(situation.row_length / length for length in situation.lengths) / len(situation.lengths)
    is_placeable = documents >= HYBRID_DOCUMENTS * choices[0].cp_size
    hybrid = [choice for choice in choices if choice.layout == "hybrid" and (is_placeable or not plain)]
    best = cheapest([cheapest(group) for group in (plain, hybrid) if group])
    others = [choice for choice in choices if choice != best]
    rivals = [choice for choice in others if (choice.method, choice.layout) == (choices[0].method, choices[0].layout)]
    rival = min(rivals or others, key=lambda choice: costs[choice].total)
    if costs[rival].total < MIN_GAIN * costs[best].total:
        return best, f"none is predicted to be {MIN_GAIN:g}x as fast"
    layout = f" {rival.layout}" if rival.method == best.method else ""
    return best, f"predicted over {rival.method}{layout}: {describe_gain((costs[best], costs[rival]))}"
