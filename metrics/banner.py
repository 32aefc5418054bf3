"""What a run is, printed once before its first step."""

from __future__ import annotations

import gzip
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from checkpoint.resume import TrainState
from config.schema import RunConfig, format_skip_steps
from cp.flash_version import flash_version
from data.batch_schedule import BatchSchedule
from data.dataset import BlendedDataset, PackedDataset, SampleDataset
from data.packing import StreamEpoch
from data.tokenizer import TokenIds, Tokenizer
from model.config import GPTConfig, count_parameters
from runtime.distributed import Ranks
from runtime.run import RunPaths
from training.build import RunData
from utils.logger import join_parts, log

MAX_GZIP_TOKENS = 1_000_000  # of the validation text that gzip compresses for comparison


def list_sources(sequences: SampleDataset) -> list[PackedDataset]:
    return sequences.sources if isinstance(sequences, BlendedDataset) else [sequences]


def describe_sequences(sequences: SampleDataset) -> list[str]:
    """Documents, tokens and packing; a line for each source."""
    if isinstance(sequences, BlendedDataset):
        return [
            f"{f'from sample {first:,} on ' if first else ''}{weight / sum(weights):.4%} of samples from "
            f"{sequences.sources[member].name}: {_describe_source(sequences.sources[member])}; "
            f"{_describe_ends(sequences.sources[member])}"
            for first, weights, members in sequences.mixtures
            for member, weight in zip(members, weights, strict=True)
        ]
    assert isinstance(sequences, PackedDataset)
    return [f"{_describe_source(sequences)}; {_describe_ends(sequences)}"]


def describe_phases(sequences: SampleDataset, batches: BatchSchedule, skip_steps: Sequence[range]) -> dict[int, str]:
    """The first step that reads a sample of each later phase -> the phase's mixture in words."""
    later = list(enumerate(sequences.mixtures))[1:] if isinstance(sequences, BlendedDataset) else []
    found: dict[int, str] = {}
    for number, mixture in later:
        shares = ", ".join(f"{share:.4%} {name}" for name, _, share in sequences.list_rows(number))
        step = batches.steps_for(mixture.first + 1)
        while any(step in steps for steps in skip_steps):
            step += 1
        text = f"--data-path: from sample {mixture.first:,} on {shares}"
        found[step] = f"{found[step]}; {text}" if step in found else text
    return found


def _describe_ends(source: PackedDataset) -> str:
    """How many documents end with the end-of-document token, which also fills padding."""
    share, token = source.share_with(source.pad_token, at_end=True), f"end-of-document token {source.pad_token}"
    return f"each document ends with {token}" if share == 1 else f"{share:.1%} of documents end with {token}"


def gzip_bits_per_byte(sequences: SampleDataset, tokenizer: Tokenizer) -> float | None:
    """Bits of `gzip -9` for a byte of the documents' text, or of its beginning; None without text."""
    if isinstance(tokenizer, TokenIds):
        return None
    parts, left = [], MAX_GZIP_TOKENS
    for source in list_sources(sequences):
        for document in source.documents:
            length = min(left, source.tokens.lengths.item(document))
            parts.append(tokenizer.decode(source.tokens.read(document, 0, length).tolist()))
            left -= length
            if not left:
                break
    text = "".join(parts).encode("utf-8", errors="replace")
    return 8 * len(gzip.compress(text, 9)) / len(text) if text else None


def warn_of_missing_ends(sequences: SampleDataset) -> list[str]:
    """A line for each source with documents that do not end with the end-of-document token."""
    return [
        f"warning: {source.name}: {_describe_ends(source)}: the model may not learn to stop; data.prepare ends each "
        "document, unless --no-append-eod"
        for source in list_sources(sequences)
        if source.share_with(source.pad_token, at_end=True) < 1
    ]


def _describe_source(source: PackedDataset) -> str:
    index = source.epoch(0)
    counts = f"{len(source.documents):,} documents, {source.num_tokens:,} tokens"
    text = f"{counts} -> {len(index):,} samples of {source.seq_length:,}"
    if isinstance(index, StreamEpoch) and source.packing.method == "concat":
        return f"{text}; {index.left_over:,} tokens at the stream's end unused in each epoch"
    share = source.num_tokens / (len(index) * source.seq_length)
    if source.packing.method == "greedy":
        return f"{text}, {share:.2%} full; documents cut at a sample's end, none dropped"
    if source.packing.window is not None:
        text += f", packed in windows of {source.packing.window:,} documents"
    cut = f"{source.facts.num_cut:,} documents longer than a sample cut into pieces"
    return f"{text}, {share:.2%} full; {cut}, none dropped"


def describe_epochs(sequences: SampleDataset, n: int) -> str:
    """How many epochs of each source the first `n` samples of a run are."""
    sources = list_sources(sequences)
    counts = sequences.counts(n) if isinstance(sequences, BlendedDataset) else [n]
    epochs = [f"{count / s.samples_per_epoch:.4g} epochs" for s, count in zip(sources, counts, strict=True)]
    if len(epochs) == 1:
        return epochs[0]
    return ", ".join(f"{text} of {source.name}" for text, source in zip(epochs, sources, strict=True))


@dataclass(frozen=True)
class RunSummary:
    """What the banner prints beside the flags.

    Attributes:
        chosen: values of flags that were left open, from `resolve`.
    """

    config: RunConfig
    chosen: list[str]
    architecture: GPTConfig
    ranks: Ranks
    peak_tflops: float | None
    data: RunData
    state: TrainState
    paths: RunPaths

    def print(self) -> None:
        """Print a line for each part, between two rules."""
        lines = {
            "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
            "device": self._describe_device(),
            "grid": f"{self.ranks.grid.describe()} = {self.ranks.grid.sizes.world_size} ranks",
            "chosen": "; ".join(self.chosen) or "no flag was left open",
            "attention": self._describe_attention(),
            "model": self._describe_model(),
            **({"tokenizer": f"changes text: {self.data.tokenizer.change}"} if self.data.tokenizer.change else {}),
            "data": " ".join(self.config.data.data_path or ["the Python standard library of this interpreter"]),
            **({"left out": self.data.left_out} if self.data.left_out else {}),
            **_number("train", describe_sequences(self.data.train)),
            **self._describe_validation(),
            "step": self._describe_step(),
            "start": self._describe_start(),
            **{f"start, {number}": note for number, note in enumerate(self._list_notes(), 1)},
            **({"copies": note} if (note := self._describe_copies()) else {}),
            "epochs": f"at the end {self._describe_last_epoch()}",
            "run": str(self.paths.run_dir),
            "checkpoints": str(self.paths.checkpoints),
            "TensorBoard": str(self.paths.tensorboard or "off"),
            "metrics": str(self.paths.metrics or "off"),
            "log line": "docs/operate.md#observe says what each part means",
        }
        rule = "-" * 80
        items = [join_parts([f"{key:<12}", *value.split(" ")], " ", indent=13) for key, value in lines.items()]
        log("\n".join([rule, *items, rule]))
        for line in warn_of_missing_ends(self.data.train):
            log(line)

    def _describe_device(self) -> str:
        name = f"CPU, {torch.get_num_threads()} threads a rank"
        if self.ranks.device.type == "cuda":
            name = torch.cuda.get_device_name(self.ranks.device)
        if self.peak_tflops:
            return f"{name}; peak {self.peak_tflops} TFLOP/s"
        return f"{name}; no known peak, so no MFU (--peak-tflops)"

    def _describe_validation(self) -> dict[str, str]:
        if self.data.valid is None:
            return {"validation": "off (--eval-interval 0)"}
        bits = gzip_bits_per_byte(self.data.valid, self.data.tokenizer)
        lines = {} if bits is None else {"gzip -9": f"{bits:.2f} bits a byte of the validation text"}
        return _number("validation", describe_sequences(self.data.valid)) | lines

    def _describe_attention(self) -> str:
        parallel, data = self.config.parallel, self.config.data
        method = f"{parallel.attention.backend} {parallel.attention.method}"
        if method.startswith("native") and self.ranks.device.type == "cuda":
            method += f" on FlashAttention-{flash_version()}"
        aligned = f"documents aligned to {data.document_alignment}"
        return f"{method}, {data.qkv_format}, layout {parallel.cp_layout}, {aligned}"

    def _describe_copies(self) -> str | None:
        """A note where --check-weights-interval compares nothing."""
        sizes, interval = self.ranks.grid.sizes, self.config.parallel.check_weights_interval
        is_tied_copy = self.architecture.tie_embeddings and sizes.pp > 1
        if not interval or sizes.dp_replicate > 1 or sizes.tp > 1 or is_tied_copy:
            return None
        return f"--check-weights-interval {interval} compares nothing: no two ranks hold the same weight"

    def _describe_model(self) -> str:
        model = self.architecture
        return (
            f"{count_parameters(model):,} parameters: {model.num_layers} layers, hidden {model.hidden_size}, "
            f"{model.num_attention_heads} heads of {model.kv_channels} in {model.num_query_groups} groups, "
            f"ffn {model.ffn_hidden_size}, vocabulary {model.vocab_size} padded to {model.padded_vocab_size}"
        )

    def _describe_step(self) -> str:
        training, data_ranks = self.config.training, self.ranks.grid.size("batch")
        samples, microbatches = training.global_batch_size, self.config.num_microbatches
        empty = microbatches * training.micro_batch_size * data_ranks - samples
        skips = self.config.data.skip_steps
        grows = training.batches.describe(self.state.first_step)
        return (
            f"{samples} samples = {samples * self.config.data.seq_length:,} tokens in {microbatches} microbatches "
            f"of {training.micro_batch_size} on each of {data_ranks} data ranks"
            + (f", {empty} of their places empty" if empty else "")
            + (f" ({grows})" if "," in grows else "")
            + f"; {training.train_iters} steps"
            + (f" without {format_skip_steps(skips)} (--skip-steps)" if skips else "")
        )

    def _list_notes(self) -> list[str]:
        return self.state.notes + [f"changed: {line}" for line in self.state.changed]

    def _describe_start(self) -> str:
        if self.state.checkpoint is None:
            return "fresh"
        if self.state.is_resumed:
            return f"step {self.state.first_step}, from {self.state.checkpoint}"
        return f"step 0, weights from {self.state.checkpoint}"

    def _describe_last_epoch(self) -> str:
        training = self.config.training
        return describe_epochs(self.data.train, training.batches.first_sample(training.train_iters))


def _number(name: str, lines: list[str]) -> dict[str, str]:
    return {name: lines[0]} if len(lines) == 1 else {f"{name} {number}": line for number, line in enumerate(lines, 1)}
