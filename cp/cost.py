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
        ring, exchange: bytes/s to a neighbour, and of an all-to-all, within a node.
        network: bytes/s between nodes.
        latency: seconds until a message arrives.
        hidden: share of a transfer that computation can hide.
    """

    flops: float
    tile: int
    call: float
    calls_by_document: bool
    memory: float
    merge: float
    ring: float
    exchange: float
    network: float
    latency: float
    hidden: float


# cpu: measured on two cores over gloo by benchmarks/cp_attention.py. cuda: an H100 over NVLink, from published figures
# of attention alone (8K tokens a GPU, 64 query heads): ring 421 and 88 TFLOP/s on one and on packed documents,
# all-gather 601 and 289, Ulysses 601 and 278.
DEVICES = {
    "cpu": Device(
        flops=6e10,
        tile=32,
        call=6e-5,
        calls_by_document=True,
        memory=4e9,
        merge=32,
        ring=1.5e9,
        exchange=1.5e9,
        network=1e8,
        latency=2e-4,
        hidden=0.5,
    ),
    "cuda": Device(
        flops=6.3e14,
        tile=128,
        call=2e-5,
        calls_by_document=False,
        memory=2.5e12,
        merge=75,
        ring=1.5e11,
        exchange=3e11,
        network=4e10,
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
        spans_nodes: the cp group has ranks on several nodes.
    """

    device: str
    row_length: int
    lengths: tuple[float, ...]
    heads: int
    groups: int
    head_dim: int
    item: int
    spans_nodes: bool = False


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

    def pairs(self, tile: int) -> float:
        queries, keys = self.queries + tile / 2, self.keys + tile / 2
        return self.number * queries * keys * (0.5 if self.causal else 1.0)


def _segments(method: str, length: float, degree: int) -> list[_Segment]:
    """The blocks of one document on one of its `degree` ranks."""
    if degree == 1:
        return [_Segment(1, length, length, causal=True)]
    chunk = length / (2 * degree)
    if method == "all_gather":
        return [_Segment(2, chunk, chunk, causal=True), _Segment(2, chunk, chunk * (2 * degree - 1) / 2)]
    return [_Segment(1, 2 * chunk, 2 * chunk, causal=True), _Segment(degree - 1, 2 * chunk, chunk)]


def _degree(length: float, situation: Situation, ring: int, is_hybrid: bool) -> int:
    """Ranks that share a document: all, or as few as can hold it without being the busiest."""
    if not is_hybrid:
        return ring
    room = situation.row_length / ring
    work = sum(situation.lengths) / len(situation.lengths) * room  # squared lengths of a rank
    fits = (d for d in range(1, ring) if ring % d == 0 and length <= room * d and length * length <= work * d)
    return next(fits, ring)


def estimate_cost(situation: Situation, choice: AttentionChoice) -> Cost:
    """The cost of a supported method, in any layout that is balanced."""
    device, a2a_size = DEVICES[situation.device], choice.a2a_size
    ring, is_hybrid = choice.cp_size // a2a_size, choice.layout == "hybrid"
    heads, width = situation.heads / a2a_size, situation.head_dim
    tokens = situation.row_length / ring  # of a rank, after the exchange
    rounds = situation.groups / choice.heads_k_stride if choice.method == "all_gather" else 1
    pairs = calls = merged = shared = 0.0  # shared: tokens of documents on several ranks
    for length in situation.lengths:
        degree = _degree(length, situation, ring, is_hybrid)
        own = tokens / len(situation.lengths)  # tokens of such documents on a rank
        documents = own * degree / length
        segments = _segments(choice.method, length, degree)
        pairs += documents * sum(segment.pairs(device.tile) for segment in segments)
        if device.calls_by_document:
            calls += documents * (segments[0].number + rounds * sum(segment.number for segment in segments[1:]))
        if degree > 1:
            shared += own
            merged += own if choice.method == "all_gather" else 0.75 * own * (degree - 1)
    if not device.calls_by_document:
        calls = 1 + (rounds if choice.method == "all_gather" else ring - 1) * (shared > 0)
    kernels = pairs * 4 * heads * width / device.flops * (1 + BACKWARD) + 2 * calls * device.call
    if is_hybrid:
        kernels *= HYBRID_IMBALANCE
    passes = 2 * merged * heads * width * device.merge / device.memory
    transfers, copied = _transfers(situation, choice, device, kernels=kernels, shared=shared)
    return Cost(kernels, passes + copied / device.memory, transfers)


def _transfers(
    situation: Situation, choice: AttentionChoice, device: Device, *, kernels: float, shared: float
) -> tuple[float, float]:
    """Seconds of exposed transfers, and bytes that are copied for them.

    Args:
        shared: tokens of a rank, after the exchange, whose K and V travel on.
    """
    a2a_size, item = choice.a2a_size, situation.item
    ring, width = choice.cp_size // a2a_size, situation.head_dim
    kv_heads = max(a2a_size, situation.groups) / a2a_size
    exposed = copied = 0.0
    if a2a_size > 1:
        # q, k, v and out of the rank's own tokens, and their gradients.
        elements = situation.row_length / choice.cp_size * 2 * (situation.heads + kv_heads * a2a_size) * width
        crosses = situation.spans_nodes and ring == 1
        speed = device.network if crosses else device.exchange
        exposed += 2 * (elements * item * (a2a_size - 1) / a2a_size / speed + 4 * device.latency)
        copied += 2 * 4 * elements * item
    if ring > 1 and shared:
        kv = 2 * shared * kv_heads * width
        steps = ring - 1
        speed = device.network if situation.spans_nodes else device.ring
        sent = kv * steps * (2 * item + GRADIENT_BYTES)
        if choice.method == "all_gather":
            sent, speed = 0.75 * sent, device.network if situation.spans_nodes else device.exchange
            copied += 3 * sent
        seconds = sent / speed + 2 * steps * device.latency
        exposed += max((1 - device.hidden) * seconds, seconds - kernels * steps / ring)
    return exposed, copied


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
