"""What a run is, said once before it starts."""

from __future__ import annotations

import platform
from argparse import Namespace
from pathlib import Path

import torch

from checkpoint.resume import Started
from data.dataset import BlendedDataset, PackedDataset, SampleDataset
from data.packing import StreamEpoch
from model.config import GPTConfig
from parallel.grid import Grid


def count_parameters(config: GPTConfig) -> int:
    """Weights of the model, padded vocabulary included, a tied matrix once."""
    h, norm = config.hidden_size, config.kv_channels if config.qk_norm else 0
    layer = h * (config.qkv_size + config.query_size + 3 * config.ffn_hidden_size) + 2 * h + 2 * norm
    return config.num_layers * layer + config.padded_vocab_size * h * (1 if config.tie_embeddings else 2) + h


def describe_sequences(sequences: SampleDataset) -> list[str]:
    """Documents, tokens, and what cutting and packing made of them; a line for each source."""
    if isinstance(sequences, BlendedDataset):
        blend = sequences.blend
        return [
            f"{weight / blend.total:.4%} of sequences from {source.name}: {_describe_source(source)}"
            for source, weight in zip(sequences.sources, blend.weights, strict=True)
        ]
    assert isinstance(sequences, PackedDataset)
    return [_describe_source(sequences)]


def _describe_source(source: PackedDataset) -> str:
    index = source.epoch(0)
    text = f"{len(source.documents):,} documents, {source.num_tokens:,} tokens -> {len(index):,} sequences of {source.seq_length:,}"
    if isinstance(index, StreamEpoch) and source.packing.method == "concat":
        return f"{text}; {index.left_over:,} tokens at the stream's end left over each epoch"
    share = source.num_tokens / (len(index) * source.seq_length)
    if source.packing.method == "greedy":
        return f"{text}, {share:.2%} full; documents cut where a sequence ends, none dropped"
    cut = int((source.lengths > source.seq_length).sum()) if source.longest > source.seq_length else 0
    return f"{text}, {share:.2%} full; {cut:,} documents longer than a sequence cut into pieces, none dropped"


def describe_epochs(sequences: SampleDataset, n: int) -> str:
    """How often the first `n` sequences of a run go through each source."""
    sources = sequences.sources if isinstance(sequences, BlendedDataset) else [sequences]
    counts = sequences.blend.counts(n) if isinstance(sequences, BlendedDataset) else [n]
    each = [f"{count / s.samples_per_epoch:.4g}" for s, count in zip(sources, counts, strict=True)]
    if len(each) == 1:
        return f"{each[0]} epochs"
    return ", ".join(
        f"{part} epochs of {place['name']}"
        for part, place in zip(each, sequences.state_dict(n)["sources"], strict=True)
    )


def _describe_start(started: Started) -> str:
    if started.checkpoint is None:
        return "fresh"
    return (
        f"step {started.first_step}, from {started.checkpoint}"
        if started.goes_on
        else f"step 0, weights from {started.checkpoint}"
    )


def _numbered(name: str, lines: list[str]) -> dict[str, str]:
    return {name: lines[0]} if len(lines) == 1 else {f"{name} {number}": line for number, line in enumerate(lines, 1)}


def print_banner(
    args: Namespace,
    grid: Grid,
    *,
    chosen: list[str],
    config: GPTConfig,
    device: torch.device,
    peak_tflops: float | None,
    train: SampleDataset,
    valid: SampleDataset | None,
    started: Started,
    paths: dict[str, Path | None],
) -> None:
    """Versions, grid, what every `auto` became, model, data, and where things are written."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads a rank"
    )
    microbatches = args.global_batch_size // (args.micro_batch_size * grid.size("batch"))
    step_tokens = args.global_batch_size * args.seq_length
    lines = {
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
        "device": f"{name}; peak {peak_tflops} TFLOP/s"
        if peak_tflops
        else f"{name}; no known peak, so no MFU (--peak-tflops)",
        "grid": f"{grid.describe()} = {grid.sizes.world_size} ranks",
        "chosen": "; ".join(chosen) or "nothing was left to choose",
        "attention": f"{args.attention.backend} {args.attention.method}, {args.qkv_format}, layout {args.cp_layout}, "
        f"documents aligned to {args.document_alignment}",
        "model": f"{count_parameters(config):,} parameters: {config.num_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads of {config.kv_channels} in {config.num_query_groups} groups, "
        f"ffn {config.ffn_hidden_size}, vocabulary {config.vocab_size} padded to {config.padded_vocab_size}",
        "data": " ".join(args.data_path or ["the Python standard library of this interpreter"]),
        **_numbered("train", describe_sequences(train)),
        **_numbered("validation", describe_sequences(valid) if valid else ["off (--eval-interval 0)"]),
        "step": f"{args.global_batch_size} sequences = {step_tokens:,} tokens in {microbatches} microbatches of "
        f"{args.micro_batch_size} on each of {grid.size('batch')} data ranks; {args.train_iters} steps"
        + (f" but for {args.skip_steps} (--skip-steps)" if args.skip_steps else ""),
        "start": _describe_start(started),
        **{f"start, {number}": note for number, note in enumerate(started.notes, 1)},
        "epochs": "by the end " + describe_epochs(train, args.train_iters * args.global_batch_size),
    } | {name: str(path) if path else "off" for name, path in paths.items()}
    print("-" * 100)
    for key, value in lines.items():
        print(f"{key:<12} {value}")
    print("-" * 100, flush=True)
