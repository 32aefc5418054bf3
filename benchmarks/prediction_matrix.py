"""The prediction matrix: model x sequence x mechanism x hardware, by the step time of planner/step_time.py.

python benchmarks/prediction_matrix.py

Every mechanism of a line runs in the same layout: the one in which the best of native's methods is fastest among those
that fit. Memory is a closed form of what planner/memory.py counts on fake tensors, which would take seconds a cell.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.calibration import cases_table, summary_table
from cp.cost import UNKNOWN_MEDIAN, UNKNOWN_SIGMA, length_quantiles
from cp.layout import attention_pairs, balance
from cp.support import AttentionChoice
from model.config import GPTConfig, count_parameters
from planner.step_time import GIB, RECOMPUTED, Job, Machine, StepTime, build_machines, estimate_step

USABLE = 0.9  # share of a device's memory that a plan may fill; the rest is the allocator's, NCCL's and the context's
TOKENS_A_GPU = 2**17  # of a step
SEQUENCES = (2**13, 2**15, 2**17, 2**20)
HARDWARE = (("H100", 8), ("H100", 64), ("H200", 8), ("H200", 64))
STAGES, TP_SIZES, CP_SIZES = (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64)
STATE_BYTES, TABLE_BYTES, ITEM = 12, 4, 2  # of a parameter: weight and two moments; of fp32; of bf16
TABLES = 5  # fp32 copies of the vocabulary's table at the loss: gradients of both tables, and the loss's own
ROWS_READ, SEED = 3, 1234  # of packed rows whose balance is averaged


def _model(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab_size: int) -> GPTConfig:
    return GPTConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=128,
        vocab_size=vocab_size,
        padded_vocab_size=-(-vocab_size // 1024) * 1024,
    )


# configs/gpt_1b.yaml, and the shapes of Llama 3.
MODELS = {
    "1B": _model(24, 1792, 4864, 14, 2, 32000),
    "8B": _model(32, 4096, 14336, 32, 8, 128256),
    "70B": _model(80, 8192, 28672, 64, 8, 128256),
}


@dataclass(frozen=True)
class Mechanism:
    """How attention reaches other ranks' keys and values.

    Attributes:
        method, layout: of one document, and of packed ones; methods are backend and method.
        masks_documents: packed documents do not see each other.
    """

    name: str
    method: str
    layout: str = "zigzag"
    packed_method: str = ""
    packed_layout: str = ""
    masks_documents: bool = True


NATIVE = (
    Mechanism("p2p", "native p2p"),
    Mechanism("all_gather", "native all_gather"),
    Mechanism("a2a", "native a2a"),
    Mechanism("a2a+p2p", "native a2a+p2p"),
)
MECHANISMS = (
    *NATIVE,
    Mechanism("hybrid", "native p2p", packed_layout="hybrid"),
    Mechanism("NeMo", "pytorch allgather", masks_documents=False),
    Mechanism("Axolotl", "ring ring", "doc_contiguous", "ring llama3", "contiguous"),
)


@dataclass(frozen=True)
class Cell:
    """A mechanism on a line. Attributes: peak: bytes of a rank."""

    time: StepTime
    balance: float
    peak: float
    is_fitting: bool


@dataclass(frozen=True)
class Line:
    """Attributes: job: of the layout, or None where no layout fits. alone: cp 1. least: lowest peak of any layout."""

    machine: str
    gpus: int
    documents: str
    model: str
    seq_length: int
    job: Job | None
    cells: dict[str, Cell | None]
    alone: Cell | None
    least: float


# ---------------------------------------------------------------------------------------------------
# Memory


def peak_memory(job: Job) -> float:
    """Bytes of a rank of the first stage: bf16, Transformer Engine's layers, gradients reduced every microbatch."""
    model, tp, pp, shards = job.architecture, job.tp, job.pp, job.dp * job.choice.cp_size
    h, q, kv = model.hidden_size, model.query_size, model.num_query_groups * model.kv_channels
    parameters, table = count_parameters(model) / tp / pp, model.padded_vocab_size * h / tp
    layers = model.num_layers / pp
    states = parameters * (STATE_BYTES + TABLE_BYTES) / shards
    layer_weights = (count_parameters(model) / tp - 2 * table) / model.num_layers
    gathered = 2 * ITEM * (layer_weights + table / pp) if job.reshard else ITEM * parameters
    fused = 2 * ITEM * model.ffn_hidden_size * h * layers / tp  # gate and up in one

    tokens = job.seq_length / job.choice.cp_size
    mlp = 3 * model.ffn_hidden_size + h
    whole = ITEM * ((3 * h + 3 * q + 3 * kv + mlp) / tp + 2 * h * (1 - 1 / tp))  # of a token and layer
    kept = {"none": whole, "selective": whole - ITEM * mlp / tp, "full": ITEM * h / tp}[job.recompute]
    activations = tokens * layers * kept * min(pp, job.microbatches)
    gradients = ITEM * 2 * (model.ffn_hidden_size + h) / tp
    backward = tokens * (whole - kept + gradients) + _attention_buffers(job)  # of one layer, computed again
    return states + gathered + fused + activations + max(backward, TABLES * TABLE_BYTES * table)


def _attention_buffers(job: Job) -> float:
    """K and V that a gather holds, and their gradients in fp32."""
    choice, model = job.choice, job.architecture
    if choice.cp_size == 1 or choice.method not in ("all_gather", "allgather", "llama3"):
        return 0.0
    held = 1 if choice.backend in ("native", "ring") else max(1, model.num_query_groups // job.tp)  # heads at a time
    return 2.0 * job.seq_length * held * model.kv_channels * (ITEM + TABLE_BYTES)


# ---------------------------------------------------------------------------------------------------
# Layouts


def _choices(mechanism: Mechanism, cp_size: int, heads: int, is_packed: bool) -> Iterator[AttentionChoice]:
    """The mechanism's methods on `cp_size` ranks: one for each legal size of the exchange."""
    method = (mechanism.packed_method or mechanism.method) if is_packed else mechanism.method
    layout = (mechanism.packed_layout or mechanism.layout) if is_packed else mechanism.layout
    backend, name = method.split()
    inner = [n for n in range(2, cp_size) if cp_size % n == 0]
    sizes = {"a2a": [cp_size], "a2a+p2p": inner}.get(name, [1])
    for size in (n for n in sizes if heads % n == 0):
        yield AttentionChoice(
            backend=backend, method=name, qkv_format="thd", layout=layout, cp_size=cp_size, a2a_size=size
        )


@cache
def document_lengths(seq_length: int, is_packed: bool) -> tuple[float, ...]:
    return length_quantiles(None, seq_length) if is_packed else (float(seq_length),)


@cache
def layout_balance(layout: str, seq_length: int, cp_size: int, is_packed: bool) -> float:
    """Busiest cp rank's attention over the mean, of the layouts that do not balance; of log-normal documents."""
    if layout not in ("contiguous", "doc_contiguous") or cp_size == 1:
        return 1.0
    if not is_packed:
        return 2 - 1 / cp_size
    rng, found = np.random.default_rng(SEED), []
    for _ in range(ROWS_READ):
        drawn = rng.lognormal(math.log(UNKNOWN_MEDIAN), UNKNOWN_SIGMA, seq_length // 8)
        ends = np.minimum(np.cumsum(np.clip(drawn.round(), 1, seq_length)), seq_length).astype(np.int64)
        lengths = np.diff(ends, prepend=0)
        lengths = lengths[lengths > 0]
        found.append(balance(attention_pairs(lengths, lengths, cp_size=cp_size, layout=layout)))
    return float(np.mean(found))


def _estimate(job: Job, machine: Machine, mechanism: Mechanism, is_packed: bool) -> Cell | None:
    """The mechanism in the job's layout, with its best exchange; None: it cannot run there."""
    is_masked = is_packed and mechanism.masks_documents
    best = None
    for choice in _choices(mechanism, job.choice.cp_size, job.architecture.num_attention_heads // job.tp, is_masked):
        uneven = layout_balance(choice.layout, job.seq_length, choice.cp_size, is_masked)
        lengths = document_lengths(job.seq_length, is_masked)
        own = replace(job, choice=choice, imbalance=uneven, lengths=lengths)
        time, peak = estimate_step(own, machine), peak_memory(own)
        if best is None or time.total < best.time.total:
            best = Cell(time, uneven, peak, peak <= USABLE * machine.gib * GIB)
    return best


def _jobs(model: GPTConfig, seq_length: int, gpus: int, is_packed: bool) -> Iterator[Job]:
    """Every grid, from the quickest to the most thrifty kind of recomputation and gathering."""
    sequences = gpus * TOKENS_A_GPU // seq_length
    for pp, tp, cp in itertools.product(STAGES, TP_SIZES, CP_SIZES):
        dp, rest = divmod(gpus, pp * tp * cp)
        if rest or not dp or sequences % dp or model.num_layers % pp or model.num_query_groups % tp:
            continue
        choice = AttentionChoice(backend="native", method="p2p", qkv_format="thd", layout="zigzag", cp_size=cp)
        for recompute, reshard in itertools.product(RECOMPUTED, (False, True)):
            yield Job(
                architecture=model,
                seq_length=seq_length,
                lengths=document_lengths(seq_length, is_packed),
                dtype="bf16",
                choice=choice,
                dp=dp,
                microbatches=sequences // dp,
                tp=tp,
                pp=pp,
                recompute=recompute,
                reshard=reshard,
            )


def build_line(name: str, gpus: int, model: str, seq_length: int, is_packed: bool) -> Line:
    """The best layout of a model, sequence and hardware, and every mechanism in it."""
    machine = build_machines()[name]
    limit, least = USABLE * machine.gib * GIB, math.inf
    grids: dict[tuple[int, int, int], Job] = {}
    for job in _jobs(MODELS[model], seq_length, gpus, is_packed):
        peak = peak_memory(job)
        least = min(least, peak)
        if peak <= limit:
            grids.setdefault((job.pp, job.tp, job.choice.cp_size), job)

    def seconds(job: Job) -> float:
        cells = (_estimate(job, machine, mechanism, is_packed) for mechanism in NATIVE)
        return min((cell.time.total for cell in cells if cell and cell.is_fitting), default=math.inf)

    shared = [job for job in grids.values() if job.choice.cp_size > 1]
    whole = [_estimate(job, machine, NATIVE[0], is_packed) for job in grids.values() if job.choice.cp_size == 1]
    best = min(shared, key=seconds, default=None)
    return Line(
        machine=name,
        gpus=gpus,
        documents="packed" if is_packed else "one document",
        model=model,
        seq_length=seq_length,
        job=best,
        cells={m.name: _estimate(best, machine, m, is_packed) for m in MECHANISMS} if best else {},
        alone=min((cell for cell in whole if cell), key=lambda cell: cell.time.total, default=None),
        least=least,
    )


def build_matrix() -> list[Line]:
    return [
        build_line(machine, gpus, model, seq_length, is_packed)
        for (machine, gpus), is_packed, model, seq_length in itertools.product(
            HARDWARE, (False, True), MODELS, SEQUENCES
        )
    ]


# ---------------------------------------------------------------------------------------------------
# Print


def _format_cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    if not cell.is_fitting:
        return f"no: {cell.peak / GIB:.0f} GiB"
    return f"{cell.time.total:.3g} s, {cell.time.exposed / cell.time.total:.0%}, {cell.balance:.2f}"


def _format_layout(job: Job) -> str:
    axes = {"pp": job.pp, "tp": job.tp, "cp": job.choice.cp_size, "dp": job.dp}
    words = [f"{axis}{size}" for axis, size in axes.items() if size > 1]
    return " ".join([*words, *([job.recompute] if job.recompute != "none" else []), *(["reshard"] * job.reshard)])


def matrix_tables() -> str:
    """A table for each hardware and kind of row."""
    names = [mechanism.name for mechanism in MECHANISMS]
    blocks = []
    for (machine, gpus, documents), group in itertools.groupby(
        build_matrix(), key=lambda line: (line.machine, line.gpus, line.documents)
    ):
        lines = [
            f"### {gpus} {machine}, {documents}",
            "",
            f"| model | sequence | layout | GiB | cp 1 | {' | '.join(names)} |",
            f"|{'---|' * (5 + len(names))}",
        ]
        for line in group:
            start = f"| {line.model} | {line.seq_length // 1024}k |"
            alone = _format_cell(line.alone) if line.alone else "no"
            if line.job is None:
                lines.append(f"{start} none fits | {line.least / GIB:.0f} | {alone} |{' |' * len(names)}")
                continue
            cells = " | ".join(_format_cell(line.cells[name]) for name in names)
            layout, peak = _format_layout(line.job), peak_memory(line.job) / GIB
            lines.append(f"{start} {layout} | {peak:.0f} | {alone} | {cells} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(summary_table(), matrix_tables(), cases_table(), sep="\n\n")
