"""The chunked loss against torch's cross-entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cp.packed_seq import IGNORE_LABEL
from model.loss import chunked_cross_entropy
from parallel.fusion import kernels
from planner.fake import MemoryLedger
from planner.fused import plan_kernels
from tests.reference import relative_error

VOCAB, PADDED, HIDDEN, TOKENS = 37, 48, 16, 50


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[::7] = IGNORE_LABEL
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk_size", [1, 16, 1000])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradients_equal_torch(dtype: torch.dtype, limit: float, chunk_size: int, z_loss: float) -> None:
    hidden, weight, labels = problem(dtype)
    loss, cross_entropy = chunked_cross_entropy(
        hidden, weight, labels, vocab_size=VOCAB, chunk_size=chunk_size, z_loss=z_loss
    )
    (3.0 * loss).backward()

    wanted_hidden, wanted_weight, _ = (x.detach().double().requires_grad_() for x in problem(dtype))
    logits = wanted_hidden @ wanted_weight[:VOCAB].T
    wanted = F.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL, reduction="sum")
    counted = labels != IGNORE_LABEL
    total = wanted + z_loss * torch.logsumexp(logits, -1)[counted].square().sum()
    (3.0 * total).backward()

    assert relative_error(loss, total) <= limit
    assert relative_error(cross_entropy, wanted) <= limit
    assert relative_error(hidden.grad, wanted_hidden.grad) <= limit
    assert relative_error(weight.grad, wanted_weight.grad) <= limit
    assert (weight.grad[VOCAB:] == 0).all()
    assert (hidden.grad[~counted] == 0).all()


def test_bf16_weight_gradient_is_accumulated_in_fp32() -> None:
    hidden, weight, labels = problem(torch.bfloat16)
    loss, _ = chunked_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, chunk_size=1)
    loss.backward()
    wanted_hidden, wanted_weight, _ = (x.detach().double().requires_grad_() for x in problem(torch.bfloat16))
    F.cross_entropy(
        wanted_hidden @ wanted_weight[:VOCAB].T, labels, ignore_index=IGNORE_LABEL, reduction="sum"
    ).backward()
    assert relative_error(weight.grad, wanted_weight.grad) < 0.01


def test_no_gradient_work_without_grad(monkeypatch) -> None:
    hidden, weight, labels = problem(torch.float32)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda *_: pytest.fail("a gradient was formed"))
    with torch.no_grad():
        chunked_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, chunk_size=8)


def test_the_divisor_is_not_rounded_to_bf16() -> None:
    hidden, weight, labels = problem(torch.bfloat16)
    loss, _ = chunked_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, chunk_size=64)
    (whole,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss / 2040, hidden)
    assert (
        relative_error(scaled.double() * 2040, whole.double()) < 2.5e-3
    )  # rounded as a bf16 number, 1/2040 is off by 3.9e-3


def test_what_is_reported_does_not_depend_on_how_a_long_row_is_cut() -> None:
    """300,000 tokens: a sum in fp32 would be off by 1e-6, more in small chunks than in large ones."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300_000, 4, generator=generator), torch.randn(8, 4, generator=generator)
    labels = torch.randint(0, 8, (300_000,), generator=generator)
    want = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum").item()
    with torch.no_grad():
        for chunk_size in (256, 100_000):
            _, got = chunked_cross_entropy(hidden, weight, labels, vocab_size=8, chunk_size=chunk_size)
            assert got.dtype == torch.float64 and abs(got.item() / want - 1) < 2e-8


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("is_fused", [True, False])
def test_one_chunk_is_in_memory(is_fused: bool, needs_grad: bool) -> None:
    """Of bf16 logits [c, V] there is one tensor in evaluation as a kernel, and a gradient beside it in training."""
    vocab, width, chunk, peaks = 4096, 8, 64, []
    for tokens in (chunk, 4 * chunk):
        hidden, weight = (
            torch.empty(n, width, dtype=torch.bfloat16, device="meta", requires_grad=needs_grad)
            for n in (tokens, vocab)
        )
        labels = torch.empty(tokens, dtype=torch.int64, device="meta")
        ledger = MemoryLedger(ignored=None)
        with ledger, kernels(plan_kernels(ledger) if is_fused else None), torch.set_grad_enabled(needs_grad):
            chunked_cross_entropy(hidden, weight, labels, vocab_size=vocab, chunk_size=chunk)
        peaks.append(sum(ledger.peaks["weights"].values()))
    assert peaks[1] - peaks[0] < 2**14
    if is_fused:  # the weight, and its gradient in fp32
        assert 0 <= peaks[0] - (2 + 4 * needs_grad) * vocab * width - (1 + needs_grad) * 2 * chunk * vocab < 2**14
