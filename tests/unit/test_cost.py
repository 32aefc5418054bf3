"""The cost model of `--cp-comm-type auto`: its choice over a table of situations, and what the flags make of it."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from cp import cost
from cp.cost import QUANTILES, Situation, choose_method, estimate_cost, length_quantiles
from cp.support import AttentionChoice, AttentionRequest, candidates
from tests.flags import resolve_config

SHORT = tuple(np.random.default_rng(0).integers(500, 4000, 4000).tolist())
SKEWED = tuple(np.random.default_rng(0).lognormal(np.log(600), 1.8, 40_000).round().clip(1).tolist())


def choose(
    device: str,
    cp_size: int,
    heads: int,
    groups: int,
    row: int,
    lengths: tuple[float, ...],
    *,
    backend: str = "native",
    node_ranks: int = 8,
    hybrid: bool = False,
) -> AttentionChoice:
    request = AttentionRequest(
        backend=backend,
        method="auto",
        qkv_format="thd",
        layout="auto",
        dtype="bf16",
        device=device,
        cp_size=cp_size,
        head_dim=128,
        heads=heads,
        groups=groups,
    )
    situation = Situation(
        device=device,
        row_length=row,
        lengths=length_quantiles(np.array(lengths), row),
        heads=heads,
        groups=groups,
        head_dim=128,
        item=2,
        node_ranks=node_ranks,
    )
    legal = [choice for choice in candidates(request) if hybrid or choice.layout != "hybrid"]
    return choose_method(situation, legal)[0]


@pytest.mark.parametrize("backend", ["native", "te"])
@pytest.mark.parametrize(
    ("cp_size", "heads", "groups", "row", "lengths", "method", "a2a_size"),
    [
        (8, 64, 8, 65536, SHORT, "a2a", 8),  # heads divide
        (8, 32, 8, 65536, (65536,), "a2a", 8),
        (16, 8, 8, 131072, SHORT, "a2a+p2p", 8),  # beyond the heads
        (12, 6, 6, 98304, SHORT, "a2a+p2p", 6),
        (8, 1, 1, 2**20, (2**20,), "p2p", 1),  # one long document, no heads to trade
    ],
)
def test_choices_on_gpus(
    backend: str,
    cp_size: int,
    heads: int,
    groups: int,
    row: int,
    lengths: tuple[float, ...],
    method: str,
    a2a_size: int,
) -> None:
    found = choose("cuda", cp_size, heads, groups, row, lengths, backend=backend)
    assert (found.method, found.a2a_size) == (method, a2a_size)


def test_one_long_document_over_nodes_takes_the_ring() -> None:
    assert choose("cuda", 16, 64, 8, 2**20, (2**20,)).method == "p2p"
    assert choose("cuda", 8, 1, 1, 65536, SHORT).method == "all_gather", "the ring merges as often for less work"


def test_skewed_lengths_take_the_hybrid_layout_and_one_document_does_not() -> None:
    assert choose("cuda", 8, 1, 1, 8 * 131072, SKEWED, hybrid=True).layout == "hybrid"
    assert choose("cuda", 8, 1, 1, 8 * 131072, (8 * 131072,), hybrid=True).layout == "zigzag"
    assert choose("cuda", 8, 1, 1, 16 * 8000, (8000,), hybrid=True).layout == "zigzag", "16 documents on 8 ranks"


def test_two_cpu_ranks_with_one_document_keep_the_ring() -> None:
    assert choose("cpu", 2, 4, 2, 4096, (4096,)).method == "p2p"


def test_the_published_figures_of_one_document_on_8_gpus() -> None:
    """Within a tenth, in milliseconds of forward and backward; packed documents in the published order."""
    situation = Situation(device="cuda", row_length=65536, lengths=(65536,), heads=64, groups=8, head_dim=128, item=2)
    flops = 4 * 128 * 64 * 65536**2 / 2 / 8
    published = {"p2p": (421, 432), "all_gather": (601, 516), "a2a": (601, 582), "a2a+p2p": (593, 572)}
    packed = replace(situation, lengths=length_quantiles(np.arange(500, 16384), 16384))
    totals = {}
    for method, (forward, backward) in published.items():
        size = {"a2a": 8, "a2a+p2p": 4}.get(method, 1)
        backend = "te" if method == "all_gather" else "native"  # the chart's gathers the whole row
        choice = AttentionChoice(
            backend=backend, method=method, qkv_format="thd", layout="zigzag", cp_size=8, a2a_size=size
        )
        seconds = flops / 1e12 * (1 / forward + 2.5 / backward)
        assert estimate_cost(situation, choice).total == pytest.approx(seconds, rel=0.1)
        totals[method] = estimate_cost(packed, choice).total
    assert sorted(totals, key=lambda method: totals[method]) == ["a2a", "a2a+p2p", "all_gather", "p2p"]
    assert totals["p2p"] > 2 * totals["a2a"]


def test_quantiles_stand_for_equal_shares_of_the_tokens() -> None:
    assert length_quantiles(np.full(7, 100), 512) == (100.0,) * QUANTILES
    assert length_quantiles(np.array([1000, 3000]), 512) == (512.0,) * QUANTILES
    halves = length_quantiles(np.array([100] * 10 + [1000]), 4096)
    assert halves == (100.0,) * (QUANTILES // 2) + (1000.0,) * (QUANTILES // 2)
    unknown = length_quantiles(None, 2048)
    assert 100 < unknown[0] < unknown[-1] == 2048.0


def test_a_ring_hides_transfers_behind_merges_too() -> None:
    ring = AttentionChoice(backend="native", method="p2p", qkv_format="thd", layout="zigzag", cp_size=32)
    shape = dict(device="cuda", row_length=2**18, heads=64, groups=8, head_dim=128, item=2)
    over_nodes = Situation(lengths=length_quantiles(None, 2**16), **shape)
    slow = replace(cost.DEVICES["cuda"], merge=0.0)
    assert estimate_cost(over_nodes, ring).transfers < 0.3 * estimate_cost(over_nodes, ring, slow).transfers


def test_only_documents_on_several_nodes_cross_the_network() -> None:
    """Short documents of hybrid rows stay on a node, so a slower network costs nothing."""
    hybrid = AttentionChoice(backend="native", method="p2p", qkv_format="thd", layout="hybrid", cp_size=32)
    shape = dict(device="cuda", row_length=2**18, heads=64, groups=8, head_dim=128, item=2)
    slow = replace(cost.DEVICES["cuda"], network=1e9)
    short, long = (Situation(lengths=(length,) * 4, **shape) for length in (2**14, 2**18))
    assert estimate_cost(short, hybrid) == estimate_cost(short, hybrid, slow)
    assert estimate_cost(long, hybrid).transfers < estimate_cost(long, hybrid, slow).transfers


def test_a_gather_of_the_row_shares_what_arrives_at_a_node() -> None:
    """Over nodes native sends each rank what it needs; a collective brings the row to a node once."""
    shape = dict(device="cuda", row_length=2**20, lengths=(2.0**20,), heads=64, groups=8, head_dim=128, item=2)
    choice = AttentionChoice(backend="te", method="all_gather", qkv_format="thd", layout="zigzag", cp_size=64)
    inside, over = (Situation(node_ranks=n, **shape) for n in (64, 8))
    faster = replace(cost.DEVICES["cuda"], collective=cost.DEVICES["cuda"].exchange)
    assert estimate_cost(over, choice, faster) == estimate_cost(inside, choice, faster)
    assert estimate_cost(over, choice).transfers > 1.9 * estimate_cost(inside, choice).transfers


def test_only_methods_that_gather_some_heads_at_a_time_call_a_kernel_for_each() -> None:
    shape = dict(device="cuda", row_length=65536, lengths=(65536.0,), heads=64, head_dim=128, item=2)

    def kernels(backend: str, method: str, groups: int, stride: int = 1) -> float:
        kind = dict(qkv_format="thd", layout="zigzag", cp_size=8, heads_k_stride=stride)
        choice = AttentionChoice(backend=backend, method=method, **kind)
        return estimate_cost(Situation(groups=groups, **shape), choice).kernels

    for backend, method in (("native", "all_gather"), ("ring", "llama3")):
        assert kernels(backend, method, 8) > kernels(backend, method, 8, stride=8) == kernels(backend, method, 1)
    for backend, method in (("te", "all_gather"), ("pytorch", "allgather")):
        assert kernels(backend, method, 8) == kernels(backend, method, 1)
    assert kernels("te", "all_gather", 8) == kernels("native", "all_gather", 8, stride=8)


def test_an_uneven_layout_waits_for_its_busiest_rank() -> None:
    situation = Situation(device="cuda", row_length=65536, lengths=(65536,), heads=64, groups=8, head_dim=128, item=2)
    ring = AttentionChoice(backend="native", method="p2p", qkv_format="thd", layout="zigzag", cp_size=8)
    even, uneven = estimate_cost(situation, ring), estimate_cost(situation, ring, imbalance=1.875)
    assert uneven.kernels == pytest.approx(1.875 * even.kernels, rel=0.02) and uneven.passes == even.passes


# ---------------------------------------------------------------------------------------------------
# The flag

GPU = ["--device", "cuda", "--num-attention-heads", "8", "--num-query-groups", "8", "--transformer-impl", "torch"]


def resolved(*flags: str, world: int = 8, local: int | None = None, resumed: dict | None = None):
    config = resolve_config(*GPU, *flags, world=world, local=local, cuda=8, resumed=resumed)
    return config.parallel


def test_auto_is_the_default_and_says_why() -> None:
    from config.cli import parse_arguments
    from config.validate import resolve

    config = parse_arguments([*GPU, "--cp-size", "8"])
    chosen = resolve(config, world_size=8, local_world_size=8, cuda_devices=lambda: 8)
    assert config.parallel.attention.method == "a2a"
    assert any(text.startswith("--cp-comm-type a2a (predicted over p2p: ") for text in chosen), chosen


def test_beyond_the_heads_the_a2a_size_is_chosen_too() -> None:
    parallel = resolved("--cp-size", "16", "--seq-length", "8192", world=16, local=8)
    assert (parallel.cp_comm_type, parallel.cp_a2a_size, parallel.attention.a2a_size) == ("a2a+p2p", 8, 8)


def test_the_heads_of_a_round_are_chosen_and_said() -> None:
    from config.cli import parse_arguments
    from config.validate import resolve

    config = parse_arguments([*GPU, "--cp-size", "8", "--cp-comm-type", "all_gather"])
    chosen = resolve(config, world_size=8, local_world_size=8, cuda_devices=lambda: 8)
    assert config.parallel.heads_k_stride == config.parallel.attention.heads_k_stride == 4
    assert "--heads-k-stride 4" in chosen
    given = resolved("--cp-size", "8", "--cp-comm-type", "all_gather", "--heads-k-stride", "2")
    assert given.heads_k_stride == given.attention.heads_k_stride == 2


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        (["--cp-comm-type", "p2p"], "p2p"),
        (["--heads-k-stride", "2"], "all_gather"),
        (["--cp-a2a-size", "2"], "a2a+p2p"),
        (["--cp-layout", "contiguous"], "all_gather"),
        (["--cp-backend", "native", "--num-query-groups", "1", "--num-attention-heads", "1"], "all_gather"),
    ],
)
def test_explicit_flags_win(flags: list[str], method: str) -> None:
    assert resolved("--cp-size", "8", *flags).attention.method == method


def test_one_rank_asks_for_no_lengths() -> None:
    with mock.patch("config.validate.document_lengths", side_effect=AssertionError):
        assert resolved("--cp-size", "1", world=1).attention.method == "p2p"


def test_a_checkpoints_alignment_bounds_the_choice() -> None:
    """Every method of the table needs 2 * cp; an alignment that does not divide is refused as before, not changed."""
    with pytest.raises(ValueError, match="--document-alignment 4"):
        resolved("--cp-size", "8", resumed={"--document-alignment": 4})
    parallel = resolved("--cp-size", "8", resumed={"--document-alignment": 32})
    assert parallel.attention.method == "a2a"


def test_lengths_of_the_corpus_decide() -> None:
    from config.cli import parse_arguments
    from config.validate import resolve

    found = {}
    for name, lengths in (("short", np.full(1000, 300)), ("long", np.full(10, 2**20))):
        config = parse_arguments([*GPU, "--cp-size", "16", "--seq-length", str(2**20)])
        resolve(config, world_size=16, local_world_size=8, cuda_devices=lambda: 8, lengths=lengths)
        found[name] = (config.parallel.attention.method, config.parallel.cp_layout)
    assert found == {"short": ("p2p", "hybrid"), "long": ("p2p", "zigzag")}


def test_the_reason_of_a_method_that_nothing_beats() -> None:
    situation = Situation(device="cpu", row_length=4096, lengths=(4096,), heads=4, groups=2, head_dim=64, item=4)
    ring = AttentionChoice(backend="native", method="p2p", qkv_format="thd", layout="zigzag", cp_size=2)
    found, reason = choose_method(situation, [ring, replace(ring, method="all_gather")])
    assert (found, reason) == (ring, "none is predicted to be 1.1x as fast")


def test_the_reason_names_what_is_saved() -> None:
    best, other = cost.Cost(1.0, 0.5, 0.1), cost.Cost(1.2, 2.5, 0.0)
    assert cost.describe_gain((best, other)) == "2.3x, fewer passes over memory"
