"""What a run is, said once before it starts."""

from __future__ import annotations

import platform
from argparse import Namespace
from pathlib import Path

import torch

from data.loader import SequenceDataset
from data.packing import StreamEpoch
from model.config import GPTConfig
from parallel.grid import Grid
from training.resume import Started


def count_parameters(config: GPTConfig) -> int:
    """Weights of the model, padded vocabulary included, a tied matrix once."""
    h, norm = config.hidden_size, config.kv_channels if config.qk_norm else 0
    layer = h * (config.qkv_size + config.query_size + 3 * config.ffn_hidden_size) + 2 * h + 2 * norm
    return config.num_layers * layer + config.padded_vocab_size * h * (1 if config.tie_embeddings else 2) + h


def describe_sequences(sequences: SequenceDataset) -> str:
    """Documents, tokens, and what cutting and packing made of them."""
    lengths, index = sequences.lengths, sequences.epoch(0)
    text = f"{len(lengths):,} documents, {int(lengths.sum()):,} tokens -> {len(index):,} sequences of {sequences.seq_length:,}"
    if isinstance(index, StreamEpoch):
        return f"{text}; {index.left_over:,} tokens at the stream's end left over each epoch"
    cut = int((lengths > sequences.seq_length).sum())
    share = int(lengths.sum()) / (len(index) * sequences.seq_length)
    return f"{text}, {share:.2%} full; {cut:,} documents longer than a sequence cut into pieces, none dropped"


def _describe_start(started: Started) -> str:
    if started.checkpoint is None:
        return "fresh"
    return f"step {started.first_step}, from {started.checkpoint}" if started.goes_on else f"step 0, weights from {started.checkpoint}"


def print_banner(
    args: Namespace,
    grid: Grid,
    *,
    chosen: list[str],
    config: GPTConfig,
    device: torch.device,
    peak_tflops: float | None,
    train: SequenceDataset,
    valid: SequenceDataset | None,
    started: Started,
    paths: dict[str, Path | None],
) -> None:
    """Versions, grid, what every `auto` became, model, data, and where things are written."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads a rank"
    microbatches = args.global_batch_size // (args.micro_batch_size * grid.size("batch"))
    step_tokens = args.global_batch_size * args.seq_length
    lines = {
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
        "device": f"{name}; peak {peak_tflops} TFLOP/s" if peak_tflops else f"{name}; no known peak, so no MFU (--peak-tflops)",
        "grid": f"{grid.describe()} = {grid.sizes.world_size} ranks",
        "chosen": "; ".join(chosen) or "nothing was left to choose",
        "attention": f"{args.attention.backend} {args.attention.method}, {args.qkv_format}, layout {args.cp_layout}, "
        f"documents aligned to {args.document_alignment}",
        "model": f"{count_parameters(config):,} parameters: {config.num_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads of {config.kv_channels} in {config.num_query_groups} groups, "
        f"ffn {config.ffn_hidden_size}, vocabulary {config.vocab_size} padded to {config.padded_vocab_size}",
        "data": args.data_path or "the Python standard library of this interpreter",
        "train": describe_sequences(train),
        "validation": describe_sequences(valid) if valid else "off (--eval-interval 0)",
        "step": f"{args.global_batch_size} sequences = {step_tokens:,} tokens in {microbatches} microbatches of "
        f"{args.micro_batch_size} on each of {grid.size('batch')} data ranks; {args.train_iters} steps",
        "start": _describe_start(started),
        **{f"start, {number}": note for number, note in enumerate(started.notes, 1)},
    } | {name: str(path) if path else "off" for name, path in paths.items()}
    print("-" * 100)
    for key, value in lines.items():
        print(f"{key:<12} {value}")
    print("-" * 100, flush=True)
