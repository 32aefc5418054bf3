"""Prove that a layout computes what one rank would: the flags of a run, on the machine at hand.

    torchrun --nproc-per-node 4 tools/verify.py --cp-size 4 [any flag of train.py]
    torchrun --nproc-per-node 4 tools/verify.py --cp-size 4 --all

From the same weights and the run's own first rows, the asked layout's loss, every gradient and the weights after
one optimiser step are compared with one rank in float64, whose attention is an explicit mask and shares no code
with `cp/`. Beside each error stands the noise floor: what one rank in the run's own dtype is away from float64.
Exit code 1 if an error exceeds four times its floor.

    --verify-layers N     layers of the model that are checked (default 2)
    --verify-sequences N  sequences that are read (default: a microbatch on each data rank, times --pp-size)
    --all                 every backend, method, format, layout and dtype of cp/support.py for this cp size and device
    --json FILE           the same as JSON
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint.saver import whole_tensors
from config.cli import parse_arguments
from config.schema import RunConfig
from config.validate import resolve
from cp.attention import build_attention
from cp.dropout_attention import AttentionDropout
from cp.layout import document_unit
from cp.packed_seq import PackedSeq
from cp.support import AttentionChoice, cells
from data.batch import Batch, build_batch
from data.dataset import PackedSample
from data.packing import resolve_packing
from model.config import GPTConfig
from model.gpt import GPT, Stages
from model.init import initialise
from model.transformer import GPTOptions
from parallel.collectives import sum_over
from parallel.fsdp import clip_grad_norm_, shard_model
from parallel.grid import AXES, DERIVED_AXES, Grid, GridSizes
from runtime.distributed import (
    build_run_grid,
    collective_timeout,
    cuda_device_count,
    initialise_distributed,
    read_launch,
    read_ranks,
    run_on_rank_zero_first,
)
from training.build import COMPUTE_DTYPES, build_batch_plan, build_data, build_model, build_pipeline
from training.optimizer import build_optimizer
from training.step import Pipeline, forward_backward, get_norm_owned_names
from utils.errors import UserError, run_tool

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

    q [T, hq, d]; k, v [T, hkv, d]. Padding rows are 0. Differentiable by autograd.
    """
    ids, positions = (
        torch.from_numpy(x).to(q.device) for x in packed_seq.token_ids_and_positions(cp_size=1, cp_rank=0)
    )
    document, number, at = torch.full((len(q),), -1), 0, 0
    for real, stored in zip(packed_seq.lengths.tolist(), packed_seq.padded_lengths.tolist(), strict=True):
        document[at : at + real] = number
        number, at = number + 1, at + stored
    document = document.to(q.device)
    order = torch.arange(len(q), device=q.device)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    parts = []
    for start in range(0, len(q), QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        allowed = (document[rows, None] == document[None]) & (order[rows, None] >= order[None])
        is_real = (document[rows] >= 0)[:, None, None]
        scores = torch.einsum("qhd,khd->hqk", q[rows], k) * q.shape[-1] ** -0.5
        weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1)
        if dropout is not None:
            weights = weights * dropout.kept(ids[rows], positions, q.shape[1]) / (1 - dropout.rate)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v) * is_real)
    return torch.cat(parts)


@dataclass
class Outcome:
    """What one step computed, whole and in float64 on the CPU; empty but for the scalars on ranks other than 0."""

    loss: float
    grad_norm: float
    seconds: float
    grads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One figure: the layout's relative error, the floor it is measured by, and where it is worst."""

    what: str
    error: float
    floor: float
    name: str = ""

    @property
    def ratio(self) -> float:
        return self.error / self.floor

    @property
    def passed(self) -> bool:
        return self.ratio <= TOLERANCE  # False for nan


@dataclass(frozen=True)
class Report:
    """A verified layout."""

    title: str
    lines: tuple[Line, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(line.passed for line in self.lines)


def _whole(parameters: dict[str, Tensor], grid: Grid, keep: bool) -> dict[str, Tensor]:
    """Full tensors in float64; gathering is collective, keeping is rank 0's."""
    gathered = whole_tensors(parameters, grid)
    return {name: x.double() for name, x in gathered.items()} if keep else {}


def run_step(
    model: GPT | Stages,
    batches: list[Batch],
    grid: Grid,
    device: torch.device,
    config: RunConfig,
    pipeline: Pipeline | None = None,
) -> Outcome:
    """Forward, backward and one AdamW step, as train.py does them, without clipping."""
    optimizer = build_optimizer(model, config.training)
    tokens = torch.tensor(float(sum(b.loss_tokens for b in batches)), dtype=torch.float64, device=device)
    tokens = sum_over(tokens, grid.group("batch"))
    start = time.perf_counter()
    total = forward_backward(
        model, batches, loss_tokens=tokens, device=device, reshard_between=False, pipeline=pipeline
    )
    loss = (sum_over(sum_over(total, grid.group("loss")), grid.group("pp")) / tokens).item()
    seconds = time.perf_counter() - start
    keep = dist.get_rank() == 0
    grads = _whole({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, grid, keep)
    norm = clip_grad_norm_(
        dict(model.named_parameters()), grid, max_norm=0.0, owned=get_norm_owned_names(model, grid)
    ).item()
    optimizer.step()
    weights = _whole(dict(model.named_parameters()), grid, keep)
    return Outcome(loss, norm, seconds, grads, weights)


def one_rank_grid() -> Grid:
    """Rank 0 alone, in the shape that the model's parts ask for. Collective."""
    group = dist.new_group([0])
    return Grid(GridSizes(), 0, dict.fromkeys((*AXES, *DERIVED_AXES), group))


def run_one_rank(
    config: RunConfig,
    architecture: GPTConfig,
    rows: list[PackedSample],
    grid: Grid,
    device: torch.device,
    *,
    dtype: str,
    reference: bool,
) -> Outcome:
    """The whole work on this rank: in float64 with the reference attention, or in the run's dtype with the native one."""
    alone = AttentionChoice(
        backend="native", method="all_gather", qkv_format=config.data.qkv_format, layout="contiguous", cp_size=1
    )
    attention = reference_attention if reference else build_attention(alone, head_dim=architecture.kv_channels)
    with torch.device("meta"):
        model = GPT(
            architecture,
            attention=attention,
            cp_group=grid.group("cp"),
            options=GPTOptions(
                dtype=torch.float64 if dtype == "fp64" else torch.float32,
                dropout_seed=config.training.seed,
                loss_chunk_size=config.training.loss_chunk_size,
                z_loss=config.training.z_loss,
            ),
        )
    compute = COMPUTE_DTYPES[dtype]
    shard_model(
        model, model.layers.values(), grid, device_type=device.type, compute_dtype=compute, reshard_after_forward=False
    )
    initialise(model, architecture, seed=config.training.seed, device=device)
    batches = [
        build_batch([row], cp_size=1, cp_rank=0, qkv_format=config.data.qkv_format, layout="contiguous") for row in rows
    ]
    return run_step(model, batches, grid, device, config)


def relative(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of `want`; the difference itself where `want` is 0."""
    size = want.norm().item()
    return (got - want).norm().item() / (size or 1.0)


def step_noise(grad: Tensor, weight: Tensor, floor: float, config: RunConfig, draws: int = 8) -> float:
    """How far noise of relative size `floor` in a gradient moves the weight in AdamW's first step, root mean square.

    That step is lr * g / (|g| + eps): elements near 0 change sign, so its noise is far larger than the gradient's and, for
    want of many such elements, erratic in a single run. The noise is drawn in proportion to each row's size.
    """
    generator = torch.Generator().manual_seed(0)
    scale = floor * grad.square().mean(-1, keepdim=True).sqrt()
    total = 0.0
    for _ in range(draws):
        noisy = grad + scale * torch.randn(grad.shape, generator=generator, dtype=grad.dtype)
        moved = config.training.lr * (
            noisy / (noisy.abs() + config.training.adam_eps) - grad / (grad.abs() + config.training.adam_eps)
        )
        total += (moved.norm() / weight.norm()).item() ** 2
    return (total / draws) ** 0.5


def compare(got: Outcome, noisy: Outcome, exact: Outcome, config: RunConfig) -> tuple[Line, ...]:
    """The figures of a layout. Worst means furthest above its own floor.

    A floor is measured once and can be small by luck. So a tensor's counts as at least the mean of its kind and the
    dtype's unit roundoff, a weight's as at least what its gradient's floor makes of it in the optimiser, and a scalar's as
    at least the roundoff; in bf16, where scalars are sums of many terms taken in fp32, as a sixteenth of it.
    """
    unit = torch.finfo(COMPUTE_DTYPES[config.training.dtype]).eps / 2
    scalar_unit = unit / 16 if config.training.dtype == "bf16" else 2 * unit
    lines = []
    for what in ("loss", "grad_norm"):
        values = [getattr(outcome, what) for outcome in (got, noisy, exact)]
        error, floor = (abs(v / values[2] - 1) for v in values[:2])
        lines.append(Line(what.replace("_", " "), error, max(floor, scalar_unit)))
    only_one_has = sorted((got.grads.keys() ^ exact.grads.keys()) | (got.weights.keys() ^ exact.weights.keys()))
    if only_one_has:
        return (
            *lines,
            *(
                Line(what, float("inf"), unit, f"{only_one_has[0]} is missing on one side")
                for what in ("grads", "weights")
            ),
        )
    grad_floors: dict[str, float] = {}
    for what in ("grads", "weights"):
        tensors, wanted = getattr(got, what), getattr(exact, what)
        floors = {name: relative(x, wanted[name]) for name, x in getattr(noisy, what).items()}
        least = max(unit, sum(floors.values()) / len(floors))
        floors = {name: max(floor, least) for name, floor in floors.items()}
        if what == "grads":
            grad_floors = floors
        else:
            floors = {
                n: max(f, step_noise(exact.grads[n], wanted[n], grad_floors[n], config)) for n, f in floors.items()
            }
        each = [Line(what, relative(tensors[n], w), floors[n], n) for n, w in wanted.items()]
        lines.append(max(each, key=lambda line: line.ratio if line.ratio == line.ratio else float("inf")))
    return tuple(lines)


class Verifier:
    """Verifies layouts, and keeps what several layouts are compared with: rows, and one rank's outcomes."""

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
        self.num_samples = samples or unit * grid.size("pp")  # a microbatch a stage
        if self.num_samples % unit:
            raise UserError(
                f"--verify-sequences {self.num_samples} is not a multiple of micro batch * data ranks = {unit}"
            )
        self.alone = one_rank_grid()
        self._rows: dict[tuple, tuple[GPTConfig, list[PackedSample]]] = {}
        self._outcomes: dict[tuple, Outcome] = {}

    def _data(self, config: RunConfig) -> tuple[GPTConfig, list[PackedSample]]:
        key = (config.data.qkv_format, config.data.packing, config.data.document_alignment)
        if key not in self._rows:
            data = run_on_rank_zero_first(lambda: build_data(config))
            architecture = config.model.architecture(data.tokenizer.vocab_size, num_layers=self.layers)
            self._rows[key] = architecture, [data.train.sample(n) for n in range(self.num_samples)]
        return self._rows[key]

    def _one_rank(self, config: RunConfig, *, dtype: str, reference: bool) -> Outcome:
        key = (config.data.qkv_format, config.data.document_alignment, dtype, reference)
        if key not in self._outcomes:
            architecture, rows = self._data(config)
            self._outcomes[key] = run_one_rank(
                config, architecture, rows, self.alone, self.device, dtype=dtype, reference=reference
            )
        return self._outcomes[key]

    def verify(self, config: RunConfig) -> Report | None:
        """The report of the layout of resolved flags, on rank 0. Collective."""
        architecture, rows = self._data(config)
        model = build_model(config, architecture, self.grid, self.device)
        plan = replace(build_batch_plan(config, self.grid), global_batch_size=self.num_samples)
        batches = [
            plan.build_batch([rows[n] for n in plan.sample_numbers(0, microbatch)], step=0)
            for microbatch in range(plan.num_microbatches)
        ]
        pipeline = build_pipeline(config, model, self.grid, self.device, plan.num_microbatches)
        got = run_step(model, batches, self.grid, self.device, config, pipeline)
        report = None
        try:
            if dist.get_rank() == 0:
                exact = self._one_rank(config, dtype="fp64", reference=True)
                noisy = self._one_rank(config, dtype=config.training.dtype, reference=False)
                attention = config.parallel.attention
                title = f"{attention.backend} {attention.method} {config.data.qkv_format} {config.parallel.cp_layout}"
                report = Report(f"{title} {config.training.dtype}", compare(got, noisy, exact, config), got.seconds)
        finally:
            dist.barrier()  # also after an error: the other ranks wait here, and the next layout starts in step
        return report


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
    missing = {
        backend: [m for m in modules if importlib.util.find_spec(m) is None] for backend, modules in libraries.items()
    }
    heads, groups = config.model.num_attention_heads, config.model.num_query_groups
    for choice, dtype in cells(device=parallel.device, cp_size=parallel.cp_size, heads=heads, groups=groups):
        if missing.get(choice.backend):
            if dist.get_rank() == 0:
                cell = f"{choice.backend} {choice.method} {choice.qkv_format} {dtype}"
                print(f"left out, {' and '.join(missing[choice.backend])} is not installed: {cell}")
            continue
        cell_config = deepcopy(config)
        cell_config.parallel.attention, cell_config.parallel.cp_layout = choice, choice.layout
        cell_config.training.dtype, cell_config.data.qkv_format = dtype, choice.qkv_format
        cell_config.data.packing = resolve_packing("auto", choice.qkv_format)
        unit = document_unit("zigzag", parallel.cp_size)
        cell_config.data.document_alignment = math.lcm(config.data.document_alignment, unit)
        runs.append(cell_config)
    return runs


def print_report(report: Report) -> None:
    """The table of one layout."""
    print(
        f"\n{report.title}: {'agrees with' if report.passed else 'DIFFERS FROM'} one rank in float64 ({report.seconds:.2f} s a step)"
    )
    print(f"  {'':12} {'error':>10} {'floor':>10} {'error/floor':>12}")
    for line in report.lines:
        mark = "ok" if line.passed else "TOO FAR"
        print(f"  {line.what:12} {line.error:10.2e} {line.floor:10.2e} {line.ratio:12.2f} {mark:8} {line.name}")


def print_summary(reports: list[Report]) -> None:
    """One row a layout: error / floor of each figure."""
    width = max(len(report.title) for report in reports)
    print(f"\n| {'layout':{width}} | loss | grad norm | worst gradient | worst weight | s a step | |")
    print(f"|{'-' * (width + 2)}|---|---|---|---|---|---|")
    for report in reports:
        ratios = " | ".join(f"{line.ratio:.2f}" for line in report.lines)
        print(f"| {report.title:{width}} | {ratios} | {report.seconds:.2f} | {'ok' if report.passed else 'TOO FAR'} |")
    print(f"\nEach number is error / noise floor; up to {TOLERANCE:g} agrees.", flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--verify-layers", type=int, default=2)
    parser.add_argument("--verify-sequences", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json")
    return parser


def write_json(path: Path, grid: Grid, reports: list[Report]) -> None:
    layouts = [
        {
            "title": report.title,
            "passed": report.passed,
            "seconds": report.seconds,
            "figures": [asdict(line) | {"ratio": line.ratio} for line in report.lines],
        }
        for report in reports
    ]
    path.write_text(json.dumps({"grid": grid.describe(), "layouts": layouts}, indent=1))


def main(argv: list[str]) -> int:
    own, rest = build_parser().parse_known_args(argv)
    launch = read_launch()
    config = parse_arguments(rest)
    resolve(
        config,
        world_size=launch.world_size,
        local_world_size=launch.local_world_size,
        cuda_devices=cuda_device_count,
    )
    if config.model.fp8 != "none":  # its noise is far above any floor, whatever the layout
        if launch.rank == 0:
            print(f"--fp8 {config.model.fp8}: the layout is checked in bf16")
        config.model.fp8, config.model.fp8_first_last_bf16 = "none", False
    timeout = collective_timeout(config.parallel)
    device, _ = initialise_distributed(launch, config.parallel.device, timeout=timeout)
    grid = build_run_grid(config.parallel, device)
    verifier = Verifier(config, grid, device, layers=own.verify_layers, samples=own.verify_sequences)
    if launch.rank == 0:
        size = f"{verifier.layers} layers, {verifier.num_samples} samples of {config.data.seq_length}"
        print(f"{grid.describe()}; {size}; device {config.parallel.device}")
    reports = []
    for run in cells_of(config) if own.all else [config]:
        report = verifier.verify(run)
        if report is not None:
            print_report(report)
            reports.append(report)
    failed = torch.tensor([float(not all(report.passed for report in reports))])
    dist.broadcast(failed, src=0)
    if launch.rank == 0:
        if own.all:
            print_summary(reports)
        if own.json:
            write_json(Path(own.json), grid, reports)
    dist.barrier()
    dist.destroy_process_group()
    return int(failed.item())


if __name__ == "__main__":
    sys.exit(run_tool(main, prints=read_ranks()[1] == 0))
