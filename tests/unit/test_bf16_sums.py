"""Sums of many bf16 numbers: each gradient is as near to fp32 as rounding allows, however many tokens a row has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cp import flash_attn_cpu
from cp.attention import build_attention
from cp.packed_seq import build_packed_seq
from cp.support import AttentionChoice
from data.batch import BatchPlan
from data.dataset import PackedSample
from model import torch_layers
from model.torch_layers import VocabParallelEmbedding
from parallel.fsdp import clip_grad_norm_, local_tensor
from parallel.grid import Grid, GridSizes, build_grid
from parallel.tensor import TensorParallel
from tests.flags import resolve_config
from tests.reference import BF16_ROUNDING, relative_error
from tools.one_step import compute_gradients
from tools.verify import Report, Verifier
from training.build import build_batch_plan, build_model

SAMPLES, SEQ_LENGTH = 64, 128
SHAPE = f"""--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-query-groups 1 --device cpu
    --seq-length {SEQ_LENGTH} --global-batch-size {SAMPLES}"""


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_grid(GridSizes())
    dist.destroy_process_group()


def samples() -> list[PackedSample]:
    """Most tokens are one token, as spaces are in text: its row of the embedding is a sum of thousands."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((SAMPLES, SEQ_LENGTH + 1)) < 0.7, 32, rng.integers(0, 256, (SAMPLES, SEQ_LENGTH + 1)))
    whole = np.array([SEQ_LENGTH])
    return [PackedSample(row[:-1], row[1:], whole, whole, first_id=n * SEQ_LENGTH) for n, row in enumerate(tokens)]


def gradients(grid: Grid, dtype: str, micro_batch: int, *flags: str) -> dict[str, Tensor]:
    config = resolve_config(*SHAPE.split(), "--dtype", dtype, "--micro-batch-size", str(micro_batch), *flags)
    architecture = config.model.architecture(256)
    model = build_model(config, architecture, grid, torch.device("cpu"))
    plan: BatchPlan = build_batch_plan(config, architecture, grid)
    rows = samples()
    assigned = plan.assign_samples(0, np.ones(SAMPLES))
    batches = [plan.build_batch([rows[n] for n in row], step=0) for row in assigned]
    compute_gradients(config, model, batches, grid, torch.device("cpu"))
    return {name: local_tensor(p.grad).double() for name, p in model.named_parameters()}


@pytest.mark.parametrize("flags", [(), ("--qk-norm", "--tie-embeddings")], ids=["plain", "qk-norm, tied"])
def test_each_gradient_at_any_micro_batch(grid: Grid, flags: tuple[str, ...]) -> None:
    wanted = gradients(grid, "fp32", SAMPLES, *flags)
    for micro_batch in (1, 8, SAMPLES):
        got = gradients(grid, "bf16", micro_batch, *flags)
        errors = {name: relative_error(got[name], want) for name, want in wanted.items()}
        assert max(errors.values()) <= 20 * BF16_ROUNDING, (micro_batch, errors)
        norms = {name: abs(got[name].norm() / want.norm() - 1).item() for name, want in wanted.items()}
        assert max(norms.values()) <= 12 * BF16_ROUNDING, (micro_batch, norms)


class _Second(TensorParallel):
    """The second of two tp ranks, alone: what the other would add is left out."""

    size, rank = 2, 1  # type: ignore[assignment]

    def exit_parallel_region(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("tp", [TensorParallel(), _Second()], ids=["tp 1", "tp 2"])
def test_a_token_of_every_place_gets_its_whole_gradient(tp: TensorParallel) -> None:
    table = VocabParallelEmbedding(8, 4, dtype=torch.bfloat16, tp=tp)
    with torch.no_grad():
        table.weight.fill_(1.0)
    out = table(torch.full((5000,), 6))
    out.backward(torch.ones_like(out))
    assert table.weight.grad is not None and table.weight.grad.dtype == torch.bfloat16
    row = 6 - tp.rank * len(table.weight)
    assert table.weight.grad[row].tolist() == [torch.tensor(5000.0).bfloat16().item()] * 4
    assert table.weight.grad.count_nonzero() == 4


def attention_gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """dq, dk, dv of one document, by native attention on one rank."""
    choice = AttentionChoice(backend="native", method="all_gather", qkv_format="thd", layout="contiguous", cp_size=1)
    document = np.array([len(q)])
    row, _ = build_packed_seq(document, document, cp_size=1, cp_rank=0, qkv_format="thd", layout="contiguous")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    world = dist.group.WORLD
    assert world is not None
    build_attention(choice, head_dim=q.shape[2])(*leaves, row, world).backward(dout)
    return [x.grad for x in leaves if x.grad is not None]


def ring_gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """As `attention_gradients`, by the functions that ring-flash-attn calls."""
    lengths, grads = torch.tensor([0, len(q)]), [torch.empty_like(x) for x in (q, k, v)]
    options = dict(softmax_scale=q.shape[2] ** -0.5, causal=True, cu_seqlens_q=lengths, cu_seqlens_k=lengths)
    out, lse, *_ = flash_attn_cpu._flash_attn_varlen_forward(q=q, k=k, v=v, **options)
    outputs = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    flash_attn_cpu._flash_attn_varlen_backward(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, **outputs, **options)
    return grads


@pytest.mark.parametrize("gradients_of", [attention_gradients, ring_gradients])
def test_keys_of_a_long_document_and_many_heads(grid: Grid, gradients_of: Callable[..., list[Tensor]]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2048, heads, 16, generator=generator).bfloat16() for heads in (8, 1, 1, 8))
    dout = dout + 1  # its sums grow
    wanted = attention_gradients(*(x.double() for x in (q, k, v, dout)))
    errors = [relative_error(*pair) for pair in zip(gradients_of(q, k, v, dout), wanted, strict=True)]
    assert max(errors) <= 4 * BF16_ROUNDING, errors


def test_the_norm_of_a_large_gradient(grid: Grid) -> None:
    parameter = torch.nn.Parameter(torch.empty(1 << 25))
    parameter.grad = torch.full_like(parameter, 0.1)
    norm = clip_grad_norm_({"weight": parameter}, grid, max_norm=0.0, owned=["weight"])
    assert norm.item() == pytest.approx(float(torch.tensor(0.1)) * (1 << 25) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_verify_sees_a_fault_that_one_rank_has_too(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Its floor is what the dtype imposes, not the error of one rank with the same kernels."""
    file = tmp_path / "spaces.jsonl"
    file.write_text("".join(json.dumps({"text": " " * 200 + "words " * n}) + "\n" for n in range(20)))
    flags = [*SHAPE.split(), "--dtype", dtype, "--micro-batch-size", "64", "--tokenizer-type", "byte"]
    flags += ["--data-path", str(file), "--data-cache-path", str(tmp_path / "cache")]
    verifier = Verifier(resolve_config(*flags), grid, torch.device("cpu"), layers=1, samples=None)

    def report() -> Report:
        found = verifier.verify(resolve_config(*flags))
        assert found is not None
        return found

    for figure in report().figures:
        assert figure.passed, figure
    monkeypatch.setattr(torch_layers, "_Embedding", SimpleNamespace(apply=coarse_embedding))
    broken = report()
    assert not broken.passed and broken.figures[2].name == "embedding.weight"


def test_verify_takes_a_step_from_each_end_of_a_ramp(grid: Grid, tmp_path: Path) -> None:
    """Rows of two samples: one place of the first step and one of the last are empty."""
    file = tmp_path / "words.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} words " * n}) + "\n" for n in range(30)))
    flags = [*SHAPE.split(), "--dtype", "fp64", "--micro-batch-size", "2", "--tokenizer-type", "byte"]
    flags += ["--data-path", str(file), "--data-cache-path", str(tmp_path / "cache")]
    config = resolve_config(*flags, "--global-batch-size", "5", "--rampup-batch-size", "1", "4", "6")
    verifier = Verifier(config, grid, torch.device("cpu"), layers=1, samples=None)
    assert verifier.spans == [range(1), range(6, 9)]
    reports = [verifier.verify(config, span) for span in verifier.spans]
    assert all(report is not None and report.passed for report in reports)
    assert [report.title.split(", ")[-1] for report in reports] == ["1 samples from 0 on", "3 samples from 6 on"]


def coarse_embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """F.embedding, whose gradient is summed in bf16 by PyTorch's CPU kernel."""
    return F.embedding(tokens, weight.bfloat16()).to(weight.dtype)


def test_replicas_clip_by_the_same_factor(monkeypatch) -> None:
    """The second replica's node rounds its own sum differently; both must scale by the same bits."""
    sums: list[torch.Tensor] = []
    norms_of = torch._foreach_norm

    def clip(replica: int, total: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        def all_reduce(squares: torch.Tensor, group: str) -> None:
            sums.append(squares.clone())
            if total is not None and group == "loss":
                squares.copy_(total)

        monkeypatch.setattr("parallel.fsdp.dist.all_reduce", all_reduce)
        monkeypatch.setattr(torch, "_foreach_norm", lambda xs: [n * (1 + replica * 2**-22) for n in norms_of(xs)])
        parameter = torch.nn.Parameter(torch.zeros(64))
        parameter.grad = torch.linspace(1, 2, 64)
        sizes = {"loss": 2, "fsdp": 1, "model": 1, "dp_replicate": 2}
        grid = SimpleNamespace(size=sizes.get, group=lambda axis: axis)
        norm = clip_grad_norm_({"weight": parameter}, grid, max_norm=0.5, owned=["weight"])  # type: ignore[arg-type]
        return norm, parameter.grad

    for replica in (0, 1):
        clip(replica, None)
    assert sums[0] != sums[1]
    (norm, grad), (other_norm, other_grad) = (clip(replica, sums[0] + sums[1]) for replica in (0, 1))
    assert torch.equal(norm, other_norm) and torch.equal(grad, other_grad)
    assert grad.norm().item() == pytest.approx(0.5, rel=1e-5)
