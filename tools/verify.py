"""Prove that a layout computes what one rank would: the flags of a run, on the machine at hand.

    torchrun --nproc-per-node 4 tools/verify.py --cp-size 4 [any flag of train.py]
    torchrun --nproc-per-node 4 tools/verify.py --cp-size 4 --all

From the same weights and the run's first samples, the layout's loss, every gradient and the weights after one optimizer
step are compared with one rank in float64, whose attention is an explicit mask and shares no code with `cp/`. Beside
each error stands the noise floor: the error that the dtype imposes, whatever the kernels. Exit code 1: an error exceeds
four times its floor, or a token reaches another document (tools/leak_probe.py).
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from checkpoint.state import whole_tensors
from config.cli import parse_run
from config.schema import ParallelConfig, RunConfig
from cp.dropout_attention import AttentionDropout
from cp.layout import document_unit
from cp.packed_seq import PackedSeq
from cp.support import AttentionChoice, cells
from data.batch import EMPTY, Batch
from data.batch_schedule import BatchSchedule
from data.dataset import PackedSample, padding_sample
from data.packing import resolve_packing
from model.config import GPTConfig
from model.gpt import get_chunks
from parallel.fsdp import NORM_PART
from parallel.grid import AXES, DERIVED_AXES, Grid, GridSizes
from runtime.distributed import broadcast_object, read_launch, read_ranks, run_on_rank_zero_first
from tools.leak_probe import Leak, change_samples, probe
from tools.one_step import compute_gradients, start_grid
from training.build import COMPUTE_DTYPES, build_batch_plan, build_data, build_model
from training.optimizer import build_optimizer
from utils.errors import OneLineParser, UserError, is_installed, run_tool

TOLERANCE = 4.0  # an error may be this many times its noise floor
QUERY_CHUNK = 1024  # rows of scores that exist at a time in the reference attention


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed_seq: PackedSeq,
    group: object = None,
    *,
    dropout: AttentionDropout | None = None,
) -> Tensor:
    """Causal attention within each document of a whole row, by an explicit mask, a chunk of queries at a time.

    q [T, hq, d]; k, v [T, hkv, d]; computed in float64. Padding rows are 0. Differentiable by autograd.
    """
    stored = packed_seq.padded_lengths
    number = np.repeat(np.arange(len(stored)), stored)  # [T]
    ends = (np.cumsum(stored) - stored + packed_seq.lengths)[number]  # of the document's real tokens
    document, is_real = (torch.from_numpy(x).to(q.device) for x in (number, np.arange(len(number)) < ends))
    order = torch.arange(len(q), device=q.device)
    dtype = q.dtype
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if dropout is not None:
        ids_and_positions = packed_seq.token_ids_and_positions(cp_size=1, cp_rank=0)
        ids, positions = (torch.from_numpy(x).to(q.device) for x in ids_and_positions)
    parts = []
    for start in range(0, len(q), QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        allowed = (document[rows, None] == document[None]) & (order[rows, None] >= order[None])
        scores = torch.einsum("qhd,khd->hqk", q[rows], k) * q.shape[-1] ** -0.5
        weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1)
        if dropout is not None:
            weights = weights * dropout.kept(ids[rows], positions, q.shape[1]) / (1 - dropout.rate)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v) * is_real[rows, None, None])
    return torch.cat(parts).to(dtype)


class ExactOperations(TorchDispatchMode):
    """Compute each operation on fp32 or bf16 tensors in float64, and round each result once to its dtype.

    A run in this mode has the errors that its dtypes impose, and none of its kernels'. Operations in place are left
    as they are.
    """

    def __torch_dispatch__(self, func: Any, types: Any, inputs: tuple = (), options: dict | None = None) -> Any:
        options = options or {}
        out = func(*inputs, **options)
        returns, tensors = func._schema.returns, [x for x in tree_leaves((inputs, options)) if isinstance(x, Tensor)]
        is_plain = func.namespace == "aten" and all(type(x) is Tensor or type(x) is nn.Parameter for x in tensors)
        if not is_plain or func._schema.is_mutable or any(r.alias_info for r in returns):
            return out
        if not any(x.dtype in (torch.float32, torch.bfloat16) for x in tensors):
            return out

        def widen(x: Any) -> Any:
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        exact = func(*tree_map(widen, inputs), **tree_map(widen, options))
        for result, value in zip(tree_leaves(out), tree_leaves(exact), strict=True):
            if isinstance(value, Tensor) and value.dtype == torch.float64:
                result.copy_(value)
        return out


@dataclass
class Outcome:
    """Results of one step. Tensors are whole, in float64 on the CPU of rank 0; other ranks have none.

    `leak` is None of the reference.
    """

    leak: Leak | None
    loss: float
    grad_norm: float
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Figure:
    """One figure: the layout's relative error, its noise floor, and the tensor that is furthest above its floor."""

    what: str
    error: float
    floor: float
    name: str = ""

    @property
    def ratio(self) -> float:
        return self.error / self.floor

    @property
    def passed(self) -> bool:
        return self.ratio <= TOLERANCE  # False for NaN


@dataclass(frozen=True)
class Report:
    """A verified layout."""

    title: str
    figures: tuple[Figure, ...]
    leak: Leak

    @property
    def passed(self) -> bool:
        return self.leak.passed and all(figure.passed for figure in self.figures)


def run_step(
    config: RunConfig,
    architecture: GPTConfig,
    samples: list[PackedSample],
    grid: Grid,
    device: torch.device,
    *,
    is_reference: bool = False,
) -> Outcome:
    """One step on the samples, from the run's initial weights. Collective over `grid`.

    Args:
        is_reference: on one rank, with `reference_attention` and `ExactOperations`.
    """
    model = build_model(config, architecture, grid, device)
    if is_reference:
        for layer in get_chunks(model)[0].layers.values():
            layer.attention.attention = reference_attention  # type: ignore[union-attr, assignment]
    optimizer = build_optimizer(model, config.training)
    plan = replace(build_batch_plan(config, architecture, grid), batches=BatchSchedule.constant(len(samples)))
    work = np.array([len(s.tokens) + plan.attention_cost * (s.lengths**2).sum() for s in samples])
    rows = plan.assign_samples(0, np.pad(work, (0, plan.num_places(0) - len(samples))))
    empty = padding_sample(len(samples[0].tokens), samples[0].tokens[-1])

    def build_batches(samples: list[PackedSample]) -> list[Batch]:
        return [plan.build_batch([empty if n == EMPTY else samples[n] for n in row], step=0) for row in rows]

    def run(batches: Sequence[Batch]) -> tuple[float, float]:
        return compute_gradients(config, model, batches, grid, device)

    batches, leak = build_batches(samples), None
    if is_reference:
        with ExactOperations():
            loss, grad_norm = run(batches)
    else:
        changed, parts = change_samples(samples, architecture.vocab_size)
        (loss, grad_norm), leak = probe(model, batches, build_batches(changed), parts, run, grid, device)

    def gather(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = whole_tensors(parts, grid)  # collective
        return {name: x.double() for name, x in whole.items()} if dist.get_rank() == 0 else {}

    grads = gather({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    optimizer.step()
    return Outcome(leak, loss, grad_norm, grads, gather(dict(model.named_parameters())))


def one_rank_config(config: RunConfig, dtype: str) -> RunConfig:
    """The run on one rank: torch layers, one sample a microbatch, a whole row."""
    alone = deepcopy(config)
    qkv_format, layout = config.data.qkv_format, "contiguous"
    choice = AttentionChoice(backend="native", method="all_gather", qkv_format=qkv_format, layout=layout, cp_size=1)
    alone.parallel = ParallelConfig(
        device=config.parallel.device, dp_shard_size=1, sequence_parallel=False, cp_layout=layout, attention=choice
    )
    alone.model.transformer_impl, alone.model.compile = "torch", False
    alone.training.dtype, alone.training.recompute, alone.training.micro_batch_size = dtype, "none", 1
    alone.data.pad_rows = "full"
    return alone


def relative(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of `want`; the difference itself where `want` is 0."""
    return (got - want).norm().item() / (want.norm().item() or 1.0)


def step_noise(grad: Tensor, weight: Tensor, floor: float, config: RunConfig, draws: int = 8) -> float:
    """Relative change of the weight in AdamW's first step by noise of relative size `floor` in its gradient, RMS.

    The first step is lr * g / (|g| + eps). Elements near 0 change sign, so its noise is far larger than the gradient's,
    and erratic in a single run where such elements are few. The noise is drawn in proportion to each row's size.
    """
    generator = torch.Generator().manual_seed(0)
    scale = floor * grad.square().mean(-1, keepdim=True).sqrt()
    eps, squares = config.training.adam_eps, []
    for _ in range(draws):
        noisy = grad + scale * torch.randn(grad.shape, generator=generator, dtype=grad.dtype)
        change = config.training.lr * (noisy / (noisy.abs() + eps) - grad / (grad.abs() + eps))
        squares.append((change.norm() / weight.norm()).item() ** 2)
    return fmean(squares) ** 0.5


def rounded_dtype(dtype: str) -> str:
    """The dtype whose rounding is measured: of fp64, which is as exact as the reference, it is scaled from fp32."""
    return "fp32" if dtype == "fp64" else dtype


def compare(got: Outcome, rounded: Outcome, exact: Outcome, config: RunConfig, *, terms: int) -> tuple[Figure, ...]:
    """The figures of a layout: loss, gradient norm, and of gradients and weights the tensor furthest above its floor.

    The floor is the error of `rounded`, the step in `ExactOperations`, whose sums are exact. Kernels sum bf16 in fp32,
    but fp32 and fp64 in themselves: these floors grow by the root of the `terms` of a sum.

    A floor is measured once and can be small by luck. A tensor's floor counts as at least the mean floor and the
    dtype's unit roundoff; a weight's also as what the optimizer makes of its gradient's floor. A scalar's counts as
    at least the grown roundoff; in bf16 as a sixteenth of it, because scalars are sums of many terms in fp32.
    """
    dtype = config.training.dtype
    unit, rounded_unit = (torch.finfo(COMPUTE_DTYPES[name]).eps / 2 for name in (dtype, rounded_dtype(dtype)))

    def grown(unit: float, terms: int) -> float:
        return unit if dtype == "bf16" else unit * terms**0.5

    scale, scalar_unit = grown(unit, terms) / rounded_unit, unit / 16 if dtype == "bf16" else unit
    least_floors = {"loss": grown(scalar_unit, terms), "grad_norm": grown(scalar_unit, NORM_PART)}
    figures = []
    for what, least in least_floors.items():
        values = [getattr(outcome, what) for outcome in (got, rounded, exact)]
        error, floor = (abs(value / values[2] - 1) for value in values[:2])
        figures.append(Figure(what.replace("_", " "), error, max(floor * scale, least)))
    floors: dict[str, float] = {}
    for what in ("grads", "weights"):
        tensors, rounded_tensors, wanted = (getattr(outcome, what) for outcome in (got, rounded, exact))
        unpaired = sorted(tensors.keys() ^ wanted.keys())
        if unpaired:
            figures.append(Figure(what, math.inf, unit, f"{unpaired[0]} is missing on one side"))
            continue
        noise = {name: scale * relative(rounded_tensors[name], want) for name, want in wanted.items()}
        least = max(unit, fmean(noise.values()))
        moved = {name: step_noise(exact.grads[name], wanted[name], floor, config) for name, floor in floors.items()}
        floors = {name: max(noise[name], least, moved.get(name, 0.0)) for name in wanted}
        each = [Figure(what, relative(tensors[name], want), floors[name], name) for name, want in wanted.items()]
        figures.append(max(each, key=lambda figure: (math.isnan(figure.ratio), figure.ratio)))
    return tuple(figures)


class Verifier:
    """Verifies layouts. Keeps what several layouts are compared with: samples, and outcomes of one rank."""

    def __init__(
        self, config: RunConfig, grid: Grid, device: torch.device, *, layers: int, samples: int | None
    ) -> None:
        self.grid, self.device = grid, device
        parallel = config.parallel
        ends = [n for n in (parallel.first_stage_layers, parallel.last_stage_layers) if n is not None]
        # At least one layer a stage, and those that flags give to the first and last stage.
        fewest = sum(ends) + parallel.pp_size * parallel.virtual_stages - len(ends)
        self.layers = min(max(layers, fewest), config.model.num_layers)
        unit = config.training.micro_batch_size * grid.size("batch")
        least = unit * grid.size("pp")  # a microbatch a stage
        if samples is not None and samples % unit:
            raise UserError(f"--verify-sequences {samples} is not a multiple of micro batch * data ranks = {unit}")
        self.spans = [range(samples or least)]
        phases = config.training.batches.phases
        if len(phases) > 1 and samples is None:  # as many empty places as in the first and in the last step of the ramp
            sizes = [phase.size if phase.size < least else least + phase.size % unit for phase in phases]
            self.spans = [range(phases[n].sample, phases[n].sample + sizes[n]) for n in (0, -1)]
        self.alone = Grid(GridSizes(), 0, dict.fromkeys((*AXES, *DERIVED_AXES), dist.new_group([0])))  # collective
        self._samples: dict[tuple, tuple[GPTConfig, list[PackedSample]]] = {}
        self._outcomes: dict[tuple, Outcome] = {}

    def _data(self, config: RunConfig, span: range) -> tuple[GPTConfig, list[PackedSample]]:
        key = (config.data.qkv_format, config.data.packing, config.data.document_alignment, span)
        if key not in self._samples:
            data = run_on_rank_zero_first(lambda: build_data(config))
            architecture = config.model.architecture(data.tokenizer.vocab_size, num_layers=self.layers)
            samples = [data.train.sample(n) for n in span]
            if not any((sample.labels >= 0).any() for sample in samples):
                raise UserError(f"--verify-sequences {len(span)}: no token of the samples has a label")
            self._samples[key] = architecture, samples
        return self._samples[key]

    def _one_rank(self, config: RunConfig, span: range, dtype: str) -> Outcome:
        key = (config.data.qkv_format, config.data.document_alignment, span, dtype)
        if key not in self._outcomes:
            samples = self._data(config, span)
            alone = one_rank_config(config, dtype)
            self._outcomes[key] = run_step(alone, *samples, self.alone, self.device, is_reference=True)
        return self._outcomes[key]

    def verify(self, config: RunConfig, span: range | None = None) -> Report | None:
        """The report of the layout of resolved flags, on rank 0. Collective. Default samples: the first of `spans`."""
        span = span or self.spans[0]
        got = run_step(config, *self._data(config, span), self.grid, self.device)
        try:
            if dist.get_rank():
                return None
            exact = self._one_rank(config, span, "fp64")
            rounded = self._one_rank(config, span, rounded_dtype(config.training.dtype))
            terms = len(span) * config.data.seq_length  # of a weight's gradient
            figures = compare(got, rounded, exact, config, terms=terms)
            assert got.leak is not None
            of = f", {len(span)} samples from {span.start} on" if len(self.spans) > 1 else ""
            return Report(describe_layout(config) + of, figures, got.leak)
        finally:
            dist.barrier()  # also after an error: the other ranks wait here, and the next layout starts in step


def describe_layout(config: RunConfig) -> str:
    attention = config.parallel.attention
    layout = f"{attention.backend} {attention.method} {config.data.qkv_format} {config.parallel.cp_layout}"
    return f"{layout} {config.training.dtype}"


# What a backend imports.
LIBRARIES = {"te": ("transformer_engine",), "ring": ("ring_flash_attn",)}
CUDA_LIBRARIES = LIBRARIES | {"ring": ("ring_flash_attn", "flash_attn")}


def cells_of(config: RunConfig) -> list[RunConfig]:
    """Resolved flags of every cell of the support table for the run's cp size and device, with one alignment.

    Backends whose library is not installed are left out, and named.
    """
    runs = []
    parallel = config.parallel
    libraries = CUDA_LIBRARIES if parallel.device == "cuda" else LIBRARIES
    missing = {backend: [name for name in names if not is_installed(name)] for backend, names in libraries.items()}
    heads, groups = (n // parallel.tp_size for n in (config.model.num_attention_heads, config.model.num_query_groups))
    for choice, dtype in cells(device=parallel.device, cp_size=parallel.cp_size, heads=heads, groups=max(1, groups)):
        cell = deepcopy(config)
        cell.parallel.attention, cell.parallel.cp_layout = choice, choice.layout
        cell.training.dtype, cell.data.qkv_format = dtype, choice.qkv_format
        cell.data.packing = resolve_packing("auto", choice.qkv_format)
        unit = document_unit("zigzag", parallel.cp_size)
        cell.data.document_alignment = math.lcm(config.data.document_alignment, unit)
        if not missing.get(choice.backend):
            runs.append(cell)
        elif dist.get_rank() == 0:
            names = " and ".join(missing[choice.backend])
            print(f"left out, {names} is not installed: {describe_layout(cell)}")
    return runs


def print_report(report: Report) -> None:
    """Print the table of one layout."""
    verdict = "agrees with" if report.passed else "DIFFERS FROM"
    print(f"\n{report.title}: {verdict} one rank in float64")
    print(f"  {'':12} {'error':>10} {'floor':>10} {'error/floor':>12}")
    for figure in report.figures:
        mark = "ok" if figure.passed else "TOO FAR"
        print(
            f"  {figure.what:12} {figure.error:10.2e} {figure.floor:10.2e} {figure.ratio:12.2f} {mark:8} {figure.name}"
        )
    leak = report.leak
    print(
        f"  leak probe   {leak.others} other tokens: {leak.changed} changed, {leak.gradients} have gradients; "
        f"{leak.later} later tokens: {leak.reached} changed {'ok' if leak.passed else 'LEAK'}"
    )


def print_row(report: Report) -> None:
    """Print error / floor of each figure of one layout, as a row of a table."""
    ratios = " | ".join(f"{figure.ratio:.2f}" for figure in report.figures)
    leaks = report.leak.changed + report.leak.gradients
    print(f"| {report.title:<42} | {ratios} | {leaks} | {'ok' if report.passed else 'TOO FAR'} |", flush=True)


def main(argv: list[str]) -> int:
    parser = OneLineParser(description=__doc__, epilog="All flags of train.py too.")
    add = parser.add_argument
    add("--verify-layers", type=int, default=2, help="layers of the model that are checked; default: 2")
    add("--verify-sequences", type=int, help="samples; default: a microbatch a rank, or a ramp's ends")
    add("--all", action="store_true", help="every layout of cp/support.py for this cp size and device, in each dtype")
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    own, rest = parser.parse_known_args(argv)
    launch, (config, _) = read_launch(), parse_run(rest)
    config.training.eval_interval = 0  # needs no validation documents
    grid, device = start_grid(config, launch)
    if config.model.fp8 != "none":  # its noise is far above any floor, whatever the layout
        if launch.rank == 0:
            print(f"--fp8 {config.model.fp8}: the layout is checked in bf16")
        config.model.fp8, config.model.fp8_first_last_bf16 = "none", False
    verifier = Verifier(config, grid, device, layers=own.verify_layers, samples=own.verify_sequences)
    if launch.rank == 0:
        counts = " and ".join(str(len(span)) for span in verifier.spans)
        size = f"{verifier.layers} layers, {counts} samples of {config.data.seq_length}"
        print(f"{grid.describe()}; {size}; device {config.parallel.device}")
    runs = cells_of(config) if own.all else [config]
    if own.all and launch.rank == 0:
        print(f"Each number is error / noise floor; up to {TOLERANCE:g} agrees. Leaks are tokens, and must be 0.\n")
        print(f"| {'layout':<42} | loss | grad norm | worst gradient | worst weight | leaks | |\n|{'---|' * 7}")
    reports = []
    for run, span in itertools.product(runs, verifier.spans):
        if (report := verifier.verify(run, span)) is not None:
            reports.append(report)
            (print_row if own.all and report.passed else print_report)(report)
    if own.json and launch.rank == 0:
        layouts = [asdict(report) | {"passed": report.passed} for report in reports]
        own.json.write_text(json.dumps({"grid": grid.describe(), "layouts": layouts}, indent=1))
    failed = broadcast_object(not all(report.passed for report in reports))
    dist.barrier()
    dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(run_tool(main, prints=read_ranks()[1] == 0))
