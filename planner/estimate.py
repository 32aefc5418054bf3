"""What a run will cost, told before it starts: `tools/plan.py` and `train.py --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from config.schema import DataConfig, RunConfig
from cp.layout import attention_pairs, balance
from data.packing import pack_epoch
from data.sources import PreparedCorpus, find_tokenizer, open_sources
from model.config import GPTConfig, count_parameters
from parallel.stages import split_layers
from planner.communication import step_bytes
from planner.memory import Memory, rank_memory, stage_parameters
from training.flops import training_flops
from utils.errors import UserError

ROWS_LOOKED_AT = 50  # of a packing, for its balance


@dataclass(frozen=True)
class Rows:
    """What packing makes of documents. Attributes: share of real tokens; max / mean work of the cp ranks; squared lengths a row."""

    packing_efficiency: float
    cp_balance: float
    squared_lengths: float
    documents: int


def parse_lengths(text: str, rng: np.random.Generator) -> np.ndarray:
    """`fixed:N`, `lognormal:MEAN,SIGMA` (mean length; sigma of its logarithm), or a file with one length a line.

    Returns:
        [documents] int64 tokens of each.

    Raises:
        ValueError: none of these.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "fixed":
            lengths = np.full(10_000, int(rest))
        elif kind == "lognormal":
            mean, sigma = (float(word) for word in rest.split(","))
            lengths = np.maximum(1, rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, 20_000).round()).astype(np.int64)
        else:
            with open(text, encoding="utf-8") as file:
                lengths = np.array([int(line) for line in file if line.strip()])
    except (OSError, ValueError) as error:
        raise UserError(
            f"--lengths {text}: must be fixed:N, lognormal:MEAN,SIGMA or a file of lengths ({error})"
        ) from error
    if not len(lengths) or lengths.min() < 1:
        raise UserError(f"--lengths {text}: needs lengths of at least 1")
    return lengths.astype(np.int64)


def data_of(data: DataConfig) -> tuple[int, np.ndarray | None]:
    """The vocabulary, and where --data-path is prepared the lengths of its documents (of large corpora the first million a source).

    Nothing is tokenized or trained: a tokenizer that would be trained counts as --tokenizer-vocab-size.
    """
    parts = open_sources(data.data_path, data.json_key)
    found = find_tokenizer(
        parts,
        [],
        tokenizer_type=data.tokenizer_type,
        model=data.tokenizer_model,
        eod=data.tokenizer_eod,
    )
    prepared = [
        np.asarray(p.content.tokens.lengths[:1_000_000], np.int64)
        for p in parts
        if isinstance(p.content, PreparedCorpus)
    ]
    return found.vocab_size if found else data.tokenizer_vocab_size, np.concatenate(prepared) if prepared else None


def describe_rows(config: RunConfig, lengths: np.ndarray | None) -> Rows:
    """Packing and balance for documents of these lengths; None: each sequence one document."""
    if lengths is None or config.data.packing == "concat":
        whole = np.array([config.data.seq_length])
        pairs = (
            attention_pairs(whole, whole, cp_size=config.parallel.cp_size, layout=config.parallel.cp_layout)
            if config.parallel.cp_size > 1
            else np.ones(1)
        )
        return Rows(1.0, balance(pairs), float(config.data.seq_length) ** 2, 0 if lengths is None else len(lengths))
    epoch = pack_epoch(
        lengths,
        seed=config.training.seed,
        epoch=0,
        seq_length=config.data.seq_length,
        alignment=config.data.document_alignment,
    )
    balances, squares = [], []
    for n in range(min(len(epoch), ROWS_LOOKED_AT)):
        own = epoch.sample_pieces(n)[:, 2]
        squares.append(float((own.astype(np.float64) ** 2).sum()))
        padded = -(-own // config.data.document_alignment) * config.data.document_alignment
        if config.parallel.cp_size > 1:
            balances.append(
                balance(attention_pairs(own, padded, cp_size=config.parallel.cp_size, layout=config.parallel.cp_layout))
            )
    return Rows(
        packing_efficiency=float(lengths.sum() / (len(epoch) * config.data.seq_length)),
        cp_balance=float(np.mean(balances)) if balances else 1.0,
        squared_lengths=float(np.mean(squares)),
        documents=len(lengths),
    )


def worst_memory(config: RunConfig, architecture: GPTConfig) -> Memory:
    """Of the pipeline stage that needs most: the first, which has the most microbatches under way, or the last, which has the loss; all are
    looked at where the stages' sizes are given by hand."""
    uneven = (
        config.parallel.first_stage_layers
        or config.parallel.last_stage_layers
        or architecture.num_layers % (config.parallel.pp_size * config.parallel.virtual_stages)
    )
    stages = range(config.parallel.pp_size) if uneven else sorted({0, config.parallel.pp_size - 1})
    return max((rank_memory(config, architecture, stage) for stage in stages), key=lambda m: m.peak)


@dataclass(frozen=True)
class Plan:
    """Of one step: memory of the fullest rank, floating-point operations of all, bytes that the rank of the first stage sends."""

    memory: Memory
    flops: float
    sent: dict[str, int]
    rows: Rows
    bubble: float
    parameters: int


def make_plan(
    config: RunConfig,
    architecture: GPTConfig,
    lengths: np.ndarray | None,
    memory: Memory | None = None,
    rows: Rows | None = None,
) -> Plan:
    """Args: config: resolved flags; memory, rows: from `worst_memory` and `describe_rows`, where they are known."""
    rows = rows or describe_rows(config, lengths)
    tokens = config.training.global_batch_size * config.data.seq_length * rows.packing_efficiency
    layers = split_layers(
        architecture.num_layers,
        config.parallel.pp_size * config.parallel.virtual_stages,
        first=config.parallel.first_stage_layers,
        last=config.parallel.last_stage_layers,
    )
    own = sum(len(part) for part in layers[:: config.parallel.pp_size])
    microbatches = config.num_microbatches
    idle = (
        (config.parallel.pp_size - 1) / config.parallel.virtual_stages
        if config.parallel.pp_schedule == "interleaved"
        else config.parallel.pp_size - 1
    )
    return Plan(
        memory=memory or worst_memory(config, architecture),
        flops=training_flops(
            architecture, tokens=tokens, squared_lengths=rows.squared_lengths * config.training.global_batch_size
        ),
        sent=step_bytes(config, architecture, parameters=stage_parameters(config, architecture, 0), layers=own),
        rows=rows,
        bubble=idle / (microbatches + idle),
        parameters=count_parameters(architecture),
    )


def plan_text(config: RunConfig, architecture: GPTConfig, lengths: np.ndarray | None = None) -> str:
    """A plan in words, one screen."""
    plan = make_plan(config, architecture, lengths)
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    world = config.parallel.world_size
    grid = " x ".join(f"{axis} {getattr(config.parallel, f'{axis}_size')}" for axis in axes)
    gib = 2**30
    lines = [
        f"{'grid':<14} {grid} = {world} ranks",
        f"{'model':<14} {plan.parameters:,} parameters",
        f"{'step':<14} {config.training.global_batch_size} sequences of {config.data.seq_length:,}, {plan.flops:.3g} FLOPs, {plan.flops / world:.3g} a rank"
        + (f"; pipeline idle {plan.bubble:.1%} of the time" if config.parallel.pp_size > 1 else ""),
        f"{'rows':<14} packing {plan.rows.packing_efficiency:.2%}, cp balance (most / mean work) {plan.rows.cp_balance:.3f}"
        + (f", from {plan.rows.documents:,} documents" if plan.rows.documents else ", each sequence one document"),
        f"{'memory':<14} {plan.memory.peak / gib:.2f} GiB at the fullest moment of a rank of stage {plan.memory.stage}",
        *(
            f"{'':<14} {amount / gib:10.3f} GiB  {part}"
            for part, amount in sorted(plan.memory.parts.items(), key=lambda p: -p[1])
        ),
        f"{'sends a step':<14} "
        + (", ".join(f"{axis} {amount / gib:.3g} GiB" for axis, amount in plan.sent.items()) or "nothing"),
    ]
    return "\n".join(lines)
