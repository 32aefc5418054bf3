"""Step times part by part, memory in closed form against the planner's count, and the matrix made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.prediction_matrix import (
    MECHANISMS,
    MODELS,
    Line,
    build_line,
    document_lengths,
    layout_balance,
    matrix_tables,
    peak_memory,
)
from cp.cost import length_quantiles
from cp.support import AttentionChoice
from planner.estimate import resolve_without_devices
from planner.memory import rank_memory
from planner.step_time import GIB, SPEEDS, Job, StepTime, build_machines, estimate_step

ROOT = Path(__file__).resolve().parent.parent.parent
H100 = build_machines()["H100"]


def native(cp_size: int, method: str = "p2p") -> AttentionChoice:
    return AttentionChoice(backend="native", method=method, qkv_format="thd", layout="zigzag", cp_size=cp_size)


def job(cp_size: int = 1, *, dp: int = 1, **changed: Any) -> Job:
    """A step of 8B on 16 sequences of 64k, one document each."""
    base = Job(
        architecture=MODELS["8B"],
        seq_length=2**16,
        lengths=(2.0**16,),
        dtype="bf16",
        choice=native(cp_size),
        dp=dp,
        microbatches=16 // dp,
    )
    return replace(base, **changed)


def seconds(step: Job, machine: str = "H100") -> StepTime:
    return estimate_step(step, build_machines()[machine])


def test_one_rank_sends_nothing() -> None:
    alone = seconds(job())
    assert (alone.tp, alone.cp, alone.fsdp, alone.bubble) == (0, 0, 0, 0)
    assert alone.total == alone.products + alone.attention + alone.passes + alone.optimizer
    assert seconds(job(dp=2)).cp == 0 < seconds(job(dp=2)).fsdp and seconds(job(2)).cp > 0


@pytest.mark.parametrize("axis", ["cp", "dp", "tp", "pp"])
def test_time_falls_with_ranks_and_never_below_the_even_share(axis: str) -> None:
    def with_ranks(n: int) -> Job:
        return {"cp": job(n), "dp": job(dp=n), "tp": job(tp=n), "pp": job(pp=n)}[axis]

    alone = seconds(job()).total
    totals = [seconds(with_ranks(n)).total for n in (1, 2, 4, 8)]
    assert totals == sorted(totals, reverse=True)
    assert all(alone / n <= total < 1.6 * alone / n for n, total in zip((2, 4, 8), totals[1:], strict=True))


def test_documents_shorten_attention_alone() -> None:
    one, packed = seconds(job(8)), seconds(job(8, lengths=length_quantiles(None, 2**16)))
    assert packed.products == one.products and packed.passes == one.passes
    assert packed.attention < 0.7 * one.attention


def test_the_bubble_is_of_microbatches() -> None:
    staged = seconds(job(pp=4))
    busy = staged.products + staged.attention + staged.passes + staged.tp + staged.cp
    assert staged.bubble == pytest.approx(busy * 3 / 16)
    assert seconds(job(pp=4, virtual_stages=2)).bubble == pytest.approx(staged.bubble / 2)


def test_full_recomputation_adds_a_forward_pass_of_the_layers() -> None:
    none, full = seconds(job(tp=2)), seconds(job(tp=2, recompute="full"))
    assert full.attention == pytest.approx(none.attention * 4.5 / 3.5)
    assert full.tp == pytest.approx(none.tp * 1.5)
    assert 1.3 < full.products / none.products < 4 / 3, "not of the output layer"


def test_dtype_kernel_and_device_change_their_own_part() -> None:
    bf16, fp8, slow = (seconds(job(**own)) for own in ({}, {"dtype": "fp8"}, {"kernel": "flash2"}))
    assert fp8.products < bf16.products and fp8.attention == bf16.attention
    assert slow.products == bf16.products and slow.attention > 1.5 * bf16.attention
    h200 = seconds(job(), "H200")
    assert h200.products == bf16.products and h200.passes == pytest.approx(bf16.passes * 3.35 / 4.8)
    assert SPEEDS["cuda"].bf16 < 1 and SPEEDS["cuda"].fp8 < 1, "above the peak"


def test_weights_that_are_gathered_for_each_pass_cost_more() -> None:
    once, again = seconds(job(dp=16)), seconds(job(dp=16, reshard=True))
    assert again.fsdp > once.fsdp and again.products == once.products


@pytest.mark.parametrize(
    ("flags", "own"),
    [
        ("--recompute selective --tp-size 2", dict(recompute="selective", tp=2)),
        ("--recompute full --reshard-after-forward on", dict(recompute="full", reshard=True)),
    ],
)
def test_memory_in_closed_form_is_that_of_the_planner(flags: str, own: dict[str, Any]) -> None:
    """A tenth of the planner's count on fake tensors."""
    small = replace(MODELS["8B"], num_layers=8, vocab_size=32000, padded_vocab_size=32768)
    words = f"""--num-layers 8 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --num-query-groups 8
        --seq-length 65536 --global-batch-size 8 --dtype bf16 --loss-chunk-size 2048 --dp-shard-size -1 --cp-size 2
        --reduce-every-microbatch on --cp-backend native --cp-comm-type p2p --transformer-impl te {flags}"""
    config = resolve_without_devices(words.split(), 8, 8)
    planned = job(2, dp=4 // own.get("tp", 1), architecture=small, **own)
    counted = rank_memory(config, small).peak
    assert peak_memory(planned) == pytest.approx(counted, rel=0.1), f"{peak_memory(planned) / counted:.3f}"


def test_a_gather_of_the_row_is_held() -> None:
    gathered = AttentionChoice(backend="pytorch", method="allgather", qkv_format="bshd", layout="zigzag", cp_size=8)
    kind = dict(recompute="full", architecture=replace(MODELS["8B"], padded_vocab_size=1024))  # the loss is small
    more = peak_memory(job(choice=gathered, **kind)) - peak_memory(job(8, **kind))
    assert more == pytest.approx(2 * 2**16 * 8 * 128 * 6), "K and V of 8 heads in bf16, their gradients in fp32"


@pytest.fixture(scope="module")
def lines() -> dict[bool, Line]:
    return {is_packed: build_line("H100", 8, "8B", 2**17, is_packed) for is_packed in (False, True)}


def test_every_mechanism_runs_in_the_layout_of_its_line(lines: dict[bool, Line]) -> None:
    for line in lines.values():
        assert line.job is not None and line.job.ranks == 8 and line.job.tokens == 8 * 2**17
        assert set(line.cells) == {mechanism.name for mechanism in MECHANISMS}
        assert peak_memory(line.job) <= 0.9 * H100.gib * GIB and line.cells["p2p"].is_fitting
    one, packed = lines[False].cells, lines[True].cells
    assert one["hybrid"] == one["p2p"] and packed["hybrid"].time.total < packed["p2p"].time.total
    assert one["Axolotl"].balance == 2 - 1 / lines[False].job.choice.cp_size
    assert one["Axolotl"].time.total > 1.3 * one["a2a"].time.total


def test_rows_without_a_document_mask_take_the_time_of_one_document(lines: dict[bool, Line]) -> None:
    whole = replace(lines[True].job, lengths=document_lengths(2**17, False))
    choice = replace(whole.choice, backend="pytorch", method="allgather")
    assert lines[True].cells["NeMo"].time == estimate_step(replace(whole, choice=choice), H100)
    assert lines[True].cells["p2p"].time.total < 0.6 * lines[True].cells["NeMo"].time.total


def test_heads_that_do_not_divide_and_memory_that_does_not_fit_are_said() -> None:
    assert build_line("H100", 8, "1B", 2**20, False).cells["a2a"] is None, "14 heads on 8 ranks"
    line = build_line("H100", 8, "70B", 2**13, False)
    assert line.job is None and line.alone is None and line.least > 131 * GIB


def test_contiguous_parts_of_packed_rows_are_uneven() -> None:
    assert layout_balance("zigzag", 2**15, 8, True) == 1.0
    assert layout_balance("doc_contiguous", 2**15, 8, False) == 1.875
    assert 1.5 < layout_balance("contiguous", 2**15, 8, True) < 8


def test_the_page_holds_the_tables() -> None:
    page = (ROOT / "docs/comparison/prediction_matrix.md").read_text()
    printed = [line for line in matrix_tables().splitlines() if line]
    assert len(printed) > 100 and [line for line in printed if line not in page] == []
