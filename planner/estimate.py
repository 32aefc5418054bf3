"""Memory, FLOPs and sent bytes of a step before a run starts: `tools/plan.py` and `train.py --dry-run`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from config.cli import parse_arguments
from config.progress import resolve_phases
from config.schema import RunConfig
from config.validate import resolve
from cp.layout import attention_pairs, balance, held_documents
from cp.native_a2a import kv_copies
from cp.needed_keys import NeededKeys
from cp.placement import Placement, place
from cp.support import AttentionChoice
from data.balance import deal
from data.packing import pack_epoch
from data.sources import document_lengths, find_tokenizer, list_opened, open_sources
from model.config import GPTConfig, count_parameters
from parallel.grid import AXES
from planner.memory import Memory, rank_layers, rank_memory
from training.build import COMPUTE_DTYPES
from training.flops import attention_cost, training_flops
from utils.errors import UserError
from utils.files import read_text

ROWS_READ = 50  # rows of a packing that its balance is averaged over
STEPS_READ = 2  # steps whose work over all ranks is balanced
GIB = 2**30
STATE_BYTES = 3 * 4  # of a parameter: weight and two moments


@dataclass(frozen=True)
class Rows:
    """Statistics of packed rows.

    Attributes:
        packing_efficiency: share of real tokens.
        cp_balance: attention work of the busiest cp rank over the mean.
        work_balance: work of the busiest rank over the mean of all ranks in a step, as the metric of this name.
        squared_lengths: sum of length^2 over the documents of a sample.
        documents: number of documents that the statistics come from.
        gathered: tokens that the busiest cp rank sends and receives in native's all_gather; None: another method.
        rings: tokens that the busiest sender has in the ring of each degree of the layout hybrid; None: another layout.
    """

    packing_efficiency: float
    cp_balance: float
    work_balance: float
    squared_lengths: float
    documents: int
    gathered: tuple[float, float] | None = None
    rings: dict[int, float] | None = None


@dataclass(frozen=True)
class Plan:
    """One step.

    Attributes:
        memory: of the rank with the highest peak.
        flops: of all ranks.
        sent: bytes that a rank of the first stage sends, by axis.
        bubble: share of the time that pipeline stages idle.
        parameters: of the whole model.
    """

    memory: Memory
    flops: float
    sent: dict[str, int]
    rows: Rows
    bubble: float
    parameters: int


def resolve_without_devices(words: list[str], world: int, node: int) -> RunConfig:
    """Resolved flags for a GPU cluster, unless --device cpu.

    Raises:
        UserError: train.py would refuse them.
    """
    return resolve_for_cluster(parse_arguments(words), world, node)


def resolve_for_cluster(config: RunConfig, world: int, node: int) -> RunConfig:
    """`resolve_without_devices` of parsed flags, in place."""
    parallel, model = config.parallel, config.model
    parallel.device = "cuda" if parallel.device == "auto" else parallel.device
    planned = "te" if model.transformer_impl == "te" else "torch"
    if planned == "te":  # Transformer Engine need not be installed; fp8 is planned as bf16
        model.fp8, model.fp8_first_last_bf16 = "none", False
        parallel.cp_backend = "native" if parallel.cp_backend == "te" else parallel.cp_backend
    model.transformer_impl = "torch"
    resolve(config, world_size=world, local_world_size=min(node, world), cuda_devices=lambda: node)
    model.transformer_impl = planned
    return config


def parse_lengths(text: str, rng: np.random.Generator) -> np.ndarray:
    """`fixed:N`, `lognormal:MEAN,SIGMA` (mean length; sigma of its logarithm), or a file with one length a line.

    Returns:
        [documents] int64 tokens of each document.

    Raises:
        UserError: another form, or a length below 1.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "fixed":
            lengths = np.full(10_000, int(rest))
        elif kind == "lognormal":
            mean, sigma = (float(word) for word in rest.split(","))
            lengths = np.maximum(1, rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, 20_000).round()).astype(np.int64)
        else:
            lines = read_text(Path(text).resolve()).splitlines()
            lengths = np.array([int(line) for line in lines if line.strip()], np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"--lengths {text}: must be fixed:N, lognormal:MEAN,SIGMA or a file of lengths ({error})"
        ) from error
    if not len(lengths) or lengths.min() < 1:
        raise UserError(f"--lengths {text}: needs lengths of at least 1")
    return lengths.astype(np.int64)


def read_vocab_and_lengths(config: RunConfig) -> tuple[int, np.ndarray | None]:
    """The vocabulary size, and the document lengths of prepared sources (the first million of each), None without any.

    Nothing is tokenized or trained: --tokenizer-vocab-size stands for a tokenizer that would be trained.
    """
    data = config.data
    sources = list_opened(open_sources(data.data_path, data.json_key))
    tokenizer = find_tokenizer(sources, [], config.tokenizer)
    return tokenizer.vocab_size if tokenizer else data.tokenizer_vocab_size, document_lengths(sources)


def pack_rows(config: RunConfig, architecture: GPTConfig, lengths: np.ndarray | None) -> Rows:
    """Statistics of rows of documents with these lengths; None: each sample is one document."""
    data, parallel, training = config.data, config.parallel, config.training
    count = max(ROWS_READ * training.micro_batch_size, STEPS_READ * training.global_batch_size)
    if lengths is None or data.packing == "concat":
        whole = np.array([data.seq_length])
        samples, efficiency = [(whole, whole)], 1.0
    else:
        unit = data.document_alignment
        epoch = pack_epoch(lengths, seed=training.seed, epoch=0, seq_length=data.seq_length, alignment=unit)
        pieces = [epoch.sample_pieces(n)[:, 2] for n in range(min(len(epoch), count))]
        samples = [_pad_sample(own, unit, data.seq_length) for own in pieces]
        efficiency = float(lengths.sum() / (len(epoch) * data.seq_length))
    cost = attention_cost(architecture)
    read = samples[: ROWS_READ * training.micro_batch_size]
    balances, gathered, rings = [1.0], None, None
    if parallel.cp_size > 1:
        rows = [_place(config, _join(row), cost) for row in _take(read, training.micro_batch_size)]
        balances = [balance(attention_pairs(*row, **cut)) for row, cut in rows]
        if (parallel.attention.backend, parallel.attention.method) == ("native", "all_gather"):
            busiest = [max(count_gathered(*row, **cut).tolist(), key=sum) for row, cut in rows]
            gathered = tuple(np.mean(busiest, 0).tolist())
        elif parallel.cp_layout == "hybrid":
            each = [_ring_tokens(row[1], cut["placement"], parallel.cp_size) for row, cut in rows if "placement" in cut]
            degrees = {degree for tokens in each for degree in tokens}
            rings = {d: sum(tokens.get(d, 0) for tokens in each) / len(each) for d in sorted(degrees)}
    steps = _take(samples, training.global_batch_size)[:STEPS_READ]
    return Rows(
        packing_efficiency=efficiency,
        cp_balance=float(np.mean(balances)),
        work_balance=float(np.mean([_step_balance(config, step, cost) for step in steps])),
        squared_lengths=float(np.mean([_squares(own) for own in read])),
        documents=0 if lengths is None else len(lengths),
        gathered=gathered,
        rings=rings,
    )


Documents = tuple[np.ndarray, np.ndarray]  # real and padded lengths


def _pad_sample(lengths: np.ndarray, unit: int, seq_length: int) -> Documents:
    """The documents of a sample, and its tail."""
    padded = -(-lengths // unit) * unit
    return np.append(lengths, 0), np.append(padded, seq_length - padded.sum())


def _squares(documents: Documents) -> float:
    return float((documents[0].astype(np.float64) ** 2).sum())


def _take(samples: list[Documents], count: int) -> list[list[Documents]]:
    """Consecutive lists of `count` samples; fewer samples are repeated."""
    samples = samples * -(-count // len(samples))
    return [samples[first : first + count] for first in range(0, len(samples) - count + 1, count)]


def _join(samples: list[Documents]) -> Documents:
    """The row of some samples."""
    return np.concatenate([own for own, _ in samples]), np.concatenate([padded for _, padded in samples])


def _place(config: RunConfig, row: Documents, cost: float) -> tuple[Documents, dict[str, Any]]:
    """The row as the layout has it, with fillers in hybrid, and how it is cut. Args: cost: as `BatchPlan`'s."""
    parallel, (lengths, padded) = config.parallel, row
    cut: dict[str, Any] = dict(cp_size=parallel.cp_size, layout=parallel.cp_layout)
    if parallel.cp_layout != "hybrid":
        return row, cut
    starts, is_document = np.cumsum(padded) - padded, lengths > 0
    placed = place(
        lengths[is_document],
        row_length=int(padded.sum()),
        cp_size=parallel.cp_size,
        attention_cost=cost,
        sample_numbers=starts[is_document] // config.data.seq_length,
        num_samples=config.training.micro_batch_size,
    )
    if placed is None:  # train.py would refuse this row; others of the corpus may fit
        return row, cut | {"layout": "zigzag"}
    return placed[:2], cut | {"placement": placed.placement}


def _rank_pairs(config: RunConfig, row: Documents, cost: float) -> np.ndarray:
    """[cp] query-key pairs of each cp rank on a row."""
    (lengths, padded), cut = _place(config, row, cost)
    return attention_pairs(lengths, padded, **cut)


def _ring_tokens(padded: np.ndarray, placement: Placement, cp_size: int) -> dict[int, int]:
    """Tokens that the busiest sender of a hybrid row has in the ring of each degree."""
    ranks: list[dict[int, int]] = []
    for rank in range(cp_size):
        held = held_documents(placement, rank)
        degrees, tokens = placement.degrees[held], padded[held] // placement.degrees[held]
        ranks.append({d: int(tokens[degrees == d].sum()) for d in np.unique(degrees).tolist() if d > 1})
    return max(ranks, key=lambda tokens: sum(count * (degree - 1) for degree, count in tokens.items()))


def _step_balance(config: RunConfig, samples: list[Documents], cost: float) -> float:
    """Work of the busiest rank of a step over the mean; each data rank counts with its rows' busiest cp ranks."""
    parallel, training, seq_length = config.parallel, config.training, config.data.seq_length
    places = config.num_microbatches * parallel.dp_size * training.micro_batch_size
    nothing = np.array([0]), np.array([seq_length])
    samples = samples + [nothing] * (places - len(samples))
    work = seq_length + cost * np.array([_squares(own) for own in samples])
    shares = np.arange(places).reshape(-1, parallel.dp_size, training.micro_batch_size).swapaxes(0, 1)
    if config.data.balance_work:
        dealt = np.array(deal(work, parallel.dp_size))
        shares = np.stack([own[np.array(deal(work[own], config.num_microbatches))] for own in dealt])
    busiest, known = [], {}  # type: ignore[var-annotated]

    def row_balance(row: list[Documents]) -> float:
        key = tuple(map(id, row))  # without document lengths all samples are one
        if key not in known:
            known[key] = balance(_rank_pairs(config, _join(row), cost))
        return known[key]

    for rows in shares:  # [data ranks, microbatches, samples]
        loads = work[rows].sum(1)
        if parallel.cp_size > 1:
            even = np.array([row_balance([samples[n] for n in row]) for row in rows])
            tokens = rows.shape[1] * seq_length
            loads = tokens + (loads - tokens) * even
        busiest.append(float(loads.sum()))
    return max(busiest) * len(busiest) / float(work.sum())


def max_rank_memory(config: RunConfig, architecture: GPTConfig, limit: float = math.inf) -> Memory:
    """Memory of the stage with the highest peak, or of the first stage found above the limit, in bytes.

    The first has the most microbatches in flight, the last the loss; stages of different sizes are all measured.
    """
    parallel = config.parallel
    is_uneven = (
        parallel.first_stage_layers
        or parallel.last_stage_layers
        or architecture.num_layers % (parallel.pp_size * parallel.virtual_stages)
    )
    stages = range(parallel.pp_size) if is_uneven else sorted({0, parallel.pp_size - 1})
    most = rank_memory(config, architecture, 0)
    for stage in stages[1:]:
        if most.peak <= limit:
            most = max(most, rank_memory(config, architecture, stage), key=lambda memory: memory.peak)
    return most


def stage_parameters(config: RunConfig, architecture: GPTConfig, stage: int) -> int:
    """Parameters of a rank's stages and tp part, before FSDP shards them."""
    layers = [number for part in rank_layers(config, architecture, stage) for number in part]
    is_first, is_last = 0 in layers, architecture.num_layers - 1 in layers
    h, tp = architecture.hidden_size, config.parallel.tp_size
    tables = 1 if architecture.tie_embeddings and config.parallel.pp_size == 1 else is_first + is_last
    table = architecture.padded_vocab_size * h // tp
    return len(layers) * layer_parameters(config, architecture) + tables * table + is_last * h


def layer_parameters(config: RunConfig, architecture: GPTConfig) -> int:
    """Parameters of a layer and tp part, before FSDP shards them."""
    h = architecture.hidden_size
    matrices = architecture.qkv_size + architecture.query_size + 3 * architecture.ffn_hidden_size
    norms = 2 * h + (2 * architecture.kv_channels if architecture.qk_norm else 0)
    return h * matrices // config.parallel.tp_size + norms


def least_memory(config: RunConfig, architecture: GPTConfig) -> float:
    """Least bytes of a rank of the first stage, from sizes alone: states, whole gradients, saved activations."""
    parallel, training = config.parallel, config.training
    parameters = stage_parameters(config, architecture, 0)
    sharded = 1 - 1 / (parallel.dp_shard_size * parallel.cp_size)
    accumulates = config.num_microbatches > 1 and parallel.reduce_every_microbatch != "on"
    states = parameters * (STATE_BYTES * (1 - sharded) + (4 if accumulates else 0))
    h, tp = architecture.hidden_size, parallel.tp_size
    stream = h / (tp if parallel.sequence_parallel else 1)
    # The residual stream, the norm of all tokens of a tp group, what attention and SwiGLU save.
    attention = stream + h + (architecture.qkv_size + architecture.query_size) / tp
    channels = {
        "none": attention + stream + h + 3 * architecture.ffn_hidden_size / tp,
        "selective": attention + stream,
        "full": 0 if training.offload_activations else stream,
    }[training.recompute]
    tokens = training.micro_batch_size * config.data.seq_length / parallel.cp_size
    layers = sum(map(len, rank_layers(config, architecture, 0))) // parallel.virtual_stages
    in_flight = min(parallel.pp_size, config.num_microbatches)
    return states + in_flight * layers * tokens * channels * COMPUTE_DTYPES[training.dtype].itemsize


def make_plan(
    config: RunConfig,
    architecture: GPTConfig,
    rows: Rows,
    memory: Memory | None = None,
) -> Plan:
    """The plan of resolved flags.

    Args:
        rows: from `pack_rows`.
        memory: from `max_rank_memory`; None: measured here.
    """
    parallel, sequences = config.parallel, config.training.global_batch_size
    idle = (parallel.pp_size - 1) / (parallel.virtual_stages if parallel.pp_schedule == "interleaved" else 1)
    tokens = sequences * config.data.seq_length * rows.packing_efficiency
    return Plan(
        memory=memory or max_rank_memory(config, architecture),
        flops=training_flops(architecture, tokens=tokens, squared_lengths=rows.squared_lengths * sequences),
        sent=step_bytes(config, architecture, rows),
        rows=rows,
        bubble=idle / (config.num_microbatches + idle),
        parameters=count_parameters(architecture),
    )


def format_plan(config: RunConfig, plan: Plan) -> str:
    """A plan in words, one screen."""
    parallel, rows, memory = config.parallel, plan.rows, plan.memory
    world = parallel.world_size
    grid = " x ".join(f"{axis} {getattr(parallel, f'{axis}_size')}" for axis in AXES)
    bubble = f"; pipeline idle {plan.bubble:.1%} of the time" if parallel.pp_size > 1 else ""
    documents = f"from {rows.documents:,} documents" if rows.documents else "each sequence one document"
    batches = config.training.batches
    starts = resolve_phases(config.data, batches)
    later = [f"from sample {first:,} on (step {batches.steps_for(first + 1):,})" for first in starts]
    sent = ", ".join(f"{axis} {amount / GIB:.3g} GiB" for axis, amount in plan.sent.items()) or "nothing"
    lines = {
        "grid": f"{grid} = {world} ranks",
        "model": f"{plan.parameters:,} parameters",
        "step": f"{config.training.global_batch_size} sequences of {config.data.seq_length:,}, "
        f"{plan.flops:.3g} FLOPs, {plan.flops / world:.3g} a rank{bubble}",
        **({"batch": batches.describe()} if len(batches.phases) > 1 else {}),
        **({"mixtures": "another " + ", ".join(later)} if later else {}),
        "rows": f"packing {rows.packing_efficiency:.2%}, most / mean attention of the cp ranks {rows.cp_balance:.3f}, "
        f"most / mean work of all ranks {rows.work_balance:.3f}, {documents}",
        "memory": f"{memory.peak / GIB:.2f} GiB peak of a rank of stage {memory.stage}; --reshard-after-forward "
        f"{parallel.reshard_after_forward}",
    }
    text = [f"{name:<14} {line}" for name, line in lines.items()]
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])
    text += [f"{'':<14} {amount / GIB:10.3f} GiB  {label}" for label, amount in parts]
    return "\n".join([*text, f"{'sends a step':<14} {sent}"])


# ---------------------------------------------------------------------------------------------------
# Bytes that a rank sends


def cp_bytes(
    choice: AttentionChoice,
    *,
    tokens: int,
    heads: int,
    groups: int,
    head_dim: int,
    item: int,
    gathered: tuple[float, float] | None = None,
) -> tuple[int, int]:
    """Bytes of one layer and microbatch, forward and backward; benchmarks/cp_attention.py counts them.

    K and V of a rank, kv = 2 * t * hkv * d elements, reach cp-1 other ranks in either pass, in the inputs' dtype;
    their gradients travel in fp32. A ring sends a shard's gradient in each of cp steps, the last one home;
    a reduce-scatter sends each rank cp-1 parts. native's all_gather sends K and V of tokens that others need, and
    gradients of the tokens that it received. An exchange over A ranks keeps 1/A of q, k, v and out, with hkv raised
    to a multiple of A, and the same of their gradients; the remaining ring has cp/A ranks of A times the
    tokens and 1/A of the heads, so kv is as above, with hkv raised. llama3 reduce-scatters in the inputs' dtype.

    Args:
        tokens: t, of this rank.
        heads, groups: of this rank's tp part.
        item: bytes of an input number.
        gathered: tokens that native's all_gather sends and receives, from `count_gathered`.
    """
    if gathered is not None and (choice.backend, choice.method) == ("native", "all_gather"):
        sent, received = (2 * groups * head_dim * number for number in gathered)
        return round(sent * item), round(sent * item + received * 4)
    a2a_size = choice.a2a_size
    kv_heads = groups * (kv_copies(groups, a2a_size) if a2a_size > 1 else 1)
    kv = 2 * tokens * kv_heads * head_dim
    exchanged = tokens * (2 * heads + 2 * kv_heads) * head_dim * item * (a2a_size - 1) // a2a_size
    ring = choice.cp_size // a2a_size
    forward = (ring - 1) * kv * item
    if choice.method == "all_gather":
        gradients = (ring - 1) * kv * 4
    elif choice.method == "llama3":
        gradients = (ring - 1) * kv * item
    else:
        gradients = ring * kv * 4 if ring > 1 else 0
    return exchanged + forward, exchanged + forward + gradients


def count_gathered(
    lengths: np.ndarray,
    padded_lengths: np.ndarray,
    *,
    cp_size: int,
    layout: str,
    placement: Placement | None = None,
) -> np.ndarray:
    """[cp, 2] tokens of a row that each rank sends and receives in native's all_gather."""
    keys = NeededKeys(lengths, padded_lengths, cp_size=cp_size, layout=layout, placement=placement)
    counts = keys.count_exchanged()
    return np.stack((counts.sum(1), counts.sum(0)), 1)


def step_bytes(config: RunConfig, architecture: GPTConfig, rows: Rows | None = None) -> dict[str, int]:
    """Bytes that a rank of the first stage sends in one step, by axis, without scalars (norm, loss, agreement)."""
    parallel, training = config.parallel, config.training
    microbatches, cp, tp = config.num_microbatches, parallel.cp_size, parallel.tp_size
    layers = sum(map(len, rank_layers(config, architecture, 0)))
    item, stored = (COMPUTE_DTYPES[dtype].itemsize for dtype in (training.dtype, training.parameter_dtype))
    tokens = training.micro_batch_size * config.data.seq_length // cp
    sent = dict.fromkeys(("cp", "fsdp", "dp_replicate", "tp", "pp"), 0)
    if cp > 1:
        heads, groups = architecture.num_attention_heads // tp, max(1, architecture.num_query_groups // tp)
        shape: dict[str, Any] = dict(
            tokens=tokens, heads=heads, groups=groups, head_dim=architecture.kv_channels, item=item
        )
        gathered = rows.gathered if rows is not None else None
        forward, backward = cp_bytes(parallel.attention, **shape, gathered=gathered)
        if rows is not None and rows.rings is not None:
            of_ring = [
                cp_bytes(replace(parallel.attention, cp_size=degree), **{**shape, "tokens": round(count)})
                for degree, count in rows.rings.items()
            ]
            forward, backward = (sum(sizes[way] for sizes in of_ring) for way in (0, 1))
        sent["cp"] = microbatches * layers * ((2 if training.recompute == "full" else 1) * forward + backward)

    # A gather sends a rank's shard to all others; a reduce-scatter sends each other rank its part.
    parameters, fsdp, replicas = (
        stage_parameters(config, architecture, 0),
        parallel.dp_shard_size * cp,
        parallel.dp_replicate_size,
    )
    weights = parameters  # gathered in a step
    if parallel.reshard_after_forward == "on":  # layers for both passes, the tables of the vocabulary for one
        weights = microbatches * (parameters + layers * layer_parameters(config, architecture))
    reductions = microbatches if parallel.reduce_every_microbatch == "on" else 1
    sent["fsdp"] = (fsdp - 1) * (weights * item + parameters * reductions * stored) // fsdp
    sent["dp_replicate"] = 2 * (replicas - 1) * (parameters // fsdp) * stored // replicas

    # A layer enters and exits parallel regions twice: an all-gather or a reduce-scatter each (or two all-reduces).
    hidden = tokens * architecture.hidden_size * item
    half = 2 * hidden * (tp - 1) // tp
    per_pass = 2 * half + tokens * architecture.shared_channels(tp) * item
    recomputed = {"none": 0, "selective": half, "full": per_pass}[training.recompute]
    sent["tp"] = microbatches * layers * (2 * per_pass + recomputed)
    if parallel.pp_size > 1:
        sent["pp"] = 2 * microbatches * parallel.virtual_stages * hidden // (tp if parallel.sequence_parallel else 1)
    return {axis: amount for axis, amount in sent.items() if amount}
