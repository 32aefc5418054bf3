"""The flags of a run as typed configuration: a dataclass a group, a field a flag.

`config/cli.py` makes argparse, YAML presets and the tables of docs/flags.md from these fields; `config/validate.py`
fills in what is still open and refuses what cannot be done. No torch import: a refusal takes no seconds.

A field whose default is None and whose type is not optional is unset: `resolve` gives it a value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from cp import support
from cp.layout import LAYOUTS
from cp.support import AttentionChoice
from data.batch_schedule import BatchSchedule, count_microbatches
from data.packing import PACKINGS, PAD_ROWS
from data.tokenizer import TOKENIZER_TYPES, TokenizerSpec
from model.config import FP8_RECIPES, RECOMPUTE, ROPE_SCALINGS, GPTConfig, padded_vocab_size
from parallel.stages import PP_SCHEDULES
from utils.errors import UserError

TRANSFORMER_IMPLS = ("auto", "torch", "te")
BATCH_FLAGS = frozenset({"global_batch_size", "rampup_batch_size"})
OPTIMIZERS = ("adamw", "muon")
LR_DECAY_STYLES = ("cosine", "linear", "constant", "wsd")

# What a resumed run may change. model: part of the weights' shape, compared as GPTConfig; fixed: the order of the data
# or the moments depend on it; printed: stored in the checkpoint, a change is printed; free: not stored.
OnResume = Literal["model", "fixed", "printed", "free"]


class Bound(NamedTuple):
    """Legal values of a number: low <= value < high, or low < value if `excludes_low`; `words` completes "must be"."""

    low: float
    high: float
    words: str
    excludes_low: bool = False

    def allows(self, value: float) -> bool:
        return (self.low < value if self.excludes_low else self.low <= value) and value < self.high


AT_LEAST_ONE = Bound(1, math.inf, "at least 1")
NOT_NEGATIVE = Bound(0, math.inf, "0 or more")
ABOVE_ZERO = Bound(0, math.inf, "above 0", excludes_low=True)
FRACTION = Bound(0, 1, "from 0 to below 1")


@dataclass(frozen=True)
class Flag:
    """What a field says about its flag.

    Attributes:
        help: what the flag sets, unit, meaning of the default, off value.
        parse: turns the word of the command line into the field's value; `text` turns the value back.
    """

    help: str
    choices: tuple[str, ...] = ()
    bound: Bound | None = None
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    text: Callable[[Any], str] = str
    on_resume: OnResume = "free"

    def describe_default(self, default: Any) -> str:
        """The default for help and docs; empty: the flag is left open."""
        if isinstance(default, bool):
            return "on" if default else "off"
        return "" if default in (None, ()) else self.text(default)


def flag(default: Any, help: str, bound: Bound | None = None, **options: Any) -> Any:
    """A dataclass field with a `Flag`; options are those of `Flag`. A resumed run may change its value."""
    return field(default=default, metadata={"flag": Flag(help, bound=bound, **options)})


def printed(default: Any, help: str, bound: Bound | None = None, **options: Any) -> Any:
    """A flag that a resumed run may change; the change is printed."""
    return flag(default, help, bound, on_resume="printed", **options)


def fixed(default: Any, help: str, bound: Bound | None = None, **options: Any) -> Any:
    """A flag that a resumed run must keep: the order of the data, or the moments, depend on the value."""
    return flag(default, help, bound, on_resume="fixed", **options)


def model_flag(default: Any, help: str, bound: Bound | None = None, **options: Any) -> Any:
    """A flag that a resumed run must keep: the weights depend on the value."""
    return flag(default, help, bound, on_resume="model", **options)


# ---------------------------------------------------------------------------------------------------
# Values that are more than a number or a word


def parse_split(text: str) -> tuple[float, ...]:
    """`95,5,0` -> (95.0, 5.0, 0.0)."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != 3 or not all(0 <= w < math.inf for w in weights) or weights[0] <= 0:
        raise UserError(
            f"--data-split {text}: must be three weights TRAIN,VALID,TEST, the first above 0, such as 95,5,0"
        )
    return weights


def format_split(weights: tuple[float, ...]) -> str:
    return ",".join(f"{weight:.12g}" for weight in weights)


def _parse_range(text: str, message: str) -> range:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first)):
        raise UserError(message)
    return range(int(first), int(last or first) + 1)


def _format_range(steps: range) -> str:
    return f"{steps.start}" if len(steps) == 1 else f"{steps.start}-{steps.stop - 1}"


def parse_profile_steps(text: str) -> range:
    """`10-12` -> range(10, 13); `10` -> range(10, 11). Steps count from 1, as in the log."""
    return _parse_range(text, f"--profile-steps {text}: must be a step or a range such as 10-12")


def parse_skip_steps(text: str) -> tuple[range, ...]:
    """`120-125,130` -> (range(120, 126), range(130, 131)). Steps count from 1, as in the log."""
    return tuple(
        _parse_range(part, f"--skip-steps {text}: {part!r} must be a step or a range such as 120-125")
        for part in text.split(",")
    )


def format_skip_steps(ranges: tuple[range, ...]) -> str:
    return ",".join(map(_format_range, ranges))


# ---------------------------------------------------------------------------------------------------
# Groups


@dataclass
class ParallelConfig:
    """parallel: pp x dp_replicate x dp_shard x cp x tp = number of ranks"""

    pp_size: int = flag(1, "pipeline-parallel size: ranks that share the layers")
    pp_schedule: str = flag(
        "1f1b", "pipeline schedule; interleaved needs --virtual-stages of 2 or more", choices=PP_SCHEDULES
    )
    virtual_stages: int = flag(1, "pipeline stages on each pp rank", AT_LEAST_ONE)
    first_stage_layers: int | None = flag(None, "layers of the first stage; default: an equal share", AT_LEAST_ONE)
    last_stage_layers: int | None = flag(None, "layers of the last stage; default: an equal share", AT_LEAST_ONE)
    dp_replicate_size: int = flag(1, "replicas of the model, each with its own data (HSDP's outer dimension)")
    dp_shard_size: int = flag(-1, "ranks over which FSDP shards a replica; -1: all ranks that are left")
    cp_size: int = flag(1, "context-parallel size: ranks that share each sequence")
    tp_size: int = flag(1, "tensor-parallel size: divides the query groups, or is a multiple that divides the heads")
    sequence_parallel: bool = flag(None, "norms on 1/tp of the tokens; default: on if --tp-size is above 1")
    cp_backend: str = flag("auto", "implementation of context-parallel attention", choices=("auto", *support.BACKENDS))
    cp_comm_type: str = flag(
        "auto",
        "communication of native and te: p2p (ring), all_gather (K and V of some heads at a time), a2a (Ulysses), "
        "a2a+p2p (both); auto: the fastest by a cost model of the run's sizes and document lengths",
        choices=("auto", *support.methods("native")),
    )
    ring_attn_func: str | None = flag(
        None, "function of the ring-flash-attn library, for ring; default: zigzag", choices=support.methods("ring")
    )
    cp_rotate_method: str | None = flag(
        None,
        "rotate method of PyTorch's context_parallel, for pytorch; default: allgather",
        choices=support.methods("pytorch"),
    )
    flash_attention: str = flag(
        "auto",
        "FlashAttention's version under native on cuda; 2: PyTorch's own; auto: 3 on Hopper and 4 on Blackwell where "
        "installed, else 2",
        choices=("auto", "2", "3", "4"),
    )
    cp_layout: str = flag(
        "auto", "how tokens are sharded over cp ranks; auto: the method's best layout", choices=("auto", *LAYOUTS)
    )
    heads_k_stride: int | None = flag(
        None,
        "K/V heads that all_gather and llama3 gather at a time; default: 1, for native on cuda half of them or "
        "1 GiB of K and V",
        AT_LEAST_ONE,
    )
    cp_a2a_size: int | None = flag(None, "ranks of the all-to-all in a2a+p2p; a divisor of --cp-size", AT_LEAST_ONE)
    reshard_after_forward: str = flag(
        "auto",
        "FSDP frees weights after forward: less memory, one more all-gather; auto: off under --pp-size above 1, and "
        "where a rank's gathered weights take at most 8 GiB",
        choices=("auto", "on", "off"),
    )
    reduce_every_microbatch: str = flag(
        "auto",
        "reduce gradients after each microbatch, not once a step: no rank holds the gradients of whole weights between "
        "microbatches; auto: on a GPU, where those would take over 8 GiB",
        choices=("auto", "on", "off"),
    )
    device: str = flag("auto", "device of the ranks; auto: cuda if there is one", choices=("auto", "cpu", "cuda"))
    distributed_timeout_minutes: float = flag(
        30.0, "minutes without progress after which the run ends and names the rank", ABOVE_ZERO
    )
    distributed_startup_timeout_minutes: float = flag(30.0, "the same limit until the first step is done", ABOVE_ZERO)
    check_weights_interval: int = flag(
        0, "steps between bitwise comparisons of replicas' weights; 0: off", NOT_NEGATIVE
    )
    # What the flags above mean together; set by `resolve`.
    attention: AttentionChoice = field(default=None)  # type: ignore[assignment]

    @property
    def world_size(self) -> int:
        return self.pp_size * self.dp_size * self.cp_size * self.tp_size

    @property
    def dp_size(self) -> int:
        """Data-parallel size: ranks with distinct data."""
        return self.dp_replicate_size * self.dp_shard_size


@dataclass
class ModelConfig:
    """model"""

    num_layers: int = model_flag(6, "transformer layers", AT_LEAST_ONE)
    hidden_size: int = model_flag(256, "channels of the residual stream", AT_LEAST_ONE)
    ffn_hidden_size: int = model_flag(
        None, "channels in the MLP; default: 8/3 of --hidden-size, up to a multiple of 16", AT_LEAST_ONE
    )
    num_attention_heads: int = model_flag(4, "query heads", AT_LEAST_ONE)
    num_query_groups: int = model_flag(2, "key/value heads; the number of query heads turns GQA off", AT_LEAST_ONE)
    kv_channels: int = model_flag(None, "channels of a head; default: hidden size / heads", AT_LEAST_ONE)
    rotary_base: float = model_flag(10000.0, "base of the rotary frequencies", ABOVE_ZERO)
    rope_scaling: str = model_flag(
        "none",
        "longer contexts than before: linear (positions divided by the factor), llama3 (low frequencies only)",
        choices=ROPE_SCALINGS,
    )
    rope_scaling_factor: float = model_flag(8.0, "factor of --rope-scaling", ABOVE_ZERO)
    rope_original_seq_length: int = model_flag(8192, "sequence length before the scaling, for llama3", AT_LEAST_ONE)
    norm_epsilon: float = model_flag(1e-5, "added to the mean square in RMSNorm", ABOVE_ZERO)
    qk_norm: bool = model_flag(False, "RMSNorm on each query and key head")
    tie_embeddings: bool = model_flag(False, "one matrix for input embedding and output")
    vocab_size: int | None = model_flag(
        None, "tokens that the model knows, also such as no text has; default: the tokenizer's", AT_LEAST_ONE
    )
    make_vocab_size_divisible_by: int = model_flag(128, "the vocabulary is padded to a multiple", AT_LEAST_ONE)
    hidden_dropout: float = printed(0.0, "dropout rate after embedding, attention and MLP; 0: off", FRACTION)
    attention_dropout: float = printed(0.0, "dropout rate of attention probabilities; 0: off", FRACTION)
    init_method_std: float = model_flag(0.02, "standard deviation of the initial weights", ABOVE_ZERO)
    transformer_impl: str = printed(
        "auto",
        "layers: te (Transformer Engine, CUDA only) or torch (plain PyTorch); auto: te if installed, CUDA and bf16",
        choices=TRANSFORMER_IMPLS,
    )
    fp8: str = printed(
        "none",
        "8-bit GEMMs of the te layers; recipe: delayed scaling, current scaling, block scaling; none: off",
        choices=FP8_RECIPES,
    )
    fp8_first_last_bf16: bool = printed(False, "with --fp8: first and last layer stay in bf16")
    compile: bool = flag(False, "torch.compile the torch layers except attention; the first steps take minutes")
    fused_kernels: bool = flag(
        None,
        "one kernel each for loss, ring merge, rotary positions and SwiGLU, by torch.compile; cuda only; default: on "
        "on cuda",
    )

    def architecture(self, vocab_size: int, *, num_layers: int | None = None) -> GPTConfig:
        """The model of resolved flags for a tokenizer's vocabulary; `num_layers` replaces the flag's.

        Raises:
            UserError: --vocab-size is below the tokenizer's.
        """
        if self.vocab_size is not None and self.vocab_size < vocab_size:
            raise UserError(f"--vocab-size {self.vocab_size}: the tokenizer has {vocab_size} tokens")
        vocab_size = self.vocab_size or vocab_size
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(GPTConfig) if hasattr(self, f.name)}
        values |= {"num_layers": num_layers or self.num_layers, "vocab_size": vocab_size}
        values["padded_vocab_size"] = padded_vocab_size(vocab_size, self.make_vocab_size_divisible_by)
        # Flags that a scaling does not read are not part of the model.
        if self.rope_scaling == "none":
            values["rope_scaling_factor"] = 1.0
        if self.rope_scaling != "llama3":
            values["rope_original_seq_length"] = 0
        return GPTConfig(init_std=self.init_method_std, **values)


@dataclass
class DataConfig:
    """data"""

    data_path: list[str] | None = flag(
        None,
        "prefix of a .bin/.idx corpus; text, JSON lines or Parquet (.gz, .zst), or a folder of such files; several: "
        "WEIGHT PATH WEIGHT PATH ..., or paths only, weighted by size; or a YAML file of sources or phases; default: "
        "Python's standard library",
        metavar="PATH",
    )
    new_data: bool = flag(
        False,
        "a resumed run may change --data-path: its sources and weights; each source goes on where it stood",
    )
    valid_data_path: list[str] | None = flag(
        None, "validation data, as --data-path; default: a part of it", metavar="PATH"
    )
    json_key: str = flag(
        "text", "field of a JSONL record, or Parquet column, that holds the text; meta.text: text within meta"
    )
    data_split: tuple[float, ...] = fixed(
        None,
        "weights by which documents are split; default: 95,5,0, or 1,0,0 with --valid-data-path",
        metavar="TRAIN,VALID,TEST",
        parse=parse_split,
        text=format_split,
    )
    data_cache_path: str = flag(".cache", "folder for tokenizers, tokens and packing indices")
    tokenizer_type: str = flag(
        "auto",
        "byte: UTF-8 bytes, no model; auto: the prepared corpus's tokenizer, else by the name of --tokenizer-model",
        choices=("auto", *TOKENIZER_TYPES),
    )
    tokenizer_model: str | None = flag(
        None,
        "SentencePiece model, Hugging Face tokenizer.json, or GPT-2's vocab.json with merges.txt beside; default: the "
        "prepared corpus's, or a model trained once on the text",
    )
    tokenizer_eod: str | None = flag(
        None, "end-of-document token of a tokenizer.json; default: a usual one", metavar="TOKEN"
    )
    eod_id: int | None = flag(
        None,
        "id of the end-of-document token of a prepared corpus whose tokenizer is not at hand; needs --vocab-size",
        NOT_NEGATIVE,
        metavar="ID",
    )
    bos: bool = fixed(
        None, "documents begin with the tokenizer's BOS token; default: as those of the prepared corpora do, else off"
    )
    tokenizer_vocab_size: int = flag(4096, "pieces of a SentencePiece model that is trained here", AT_LEAST_ONE)
    seq_length: int = fixed(2048, "tokens of a sample", AT_LEAST_ONE)
    qkv_format: str = fixed(
        "thd",
        "thd: packed documents with a mask each; bshd: one stream, one causal mask a sample",
        choices=support.QKV_FORMATS,
    )
    packing: str = fixed(
        "auto",
        "best-fit: documents stay whole if they fit; greedy: in order, cut at a sample's end; concat: one stream, "
        "attention and labels cross documents; auto: best-fit for thd, concat for bshd",
        choices=("auto", *PACKINGS["thd"]),
    )
    packing_window: int | None = fixed(
        None,
        "best-fit over windows of N random documents, for corpora whose index would be too large; default: one window",
        AT_LEAST_ONE,
    )
    pad_rows: str = flag(
        "full",
        "full: every row has micro-batch * seq-length tokens; dynamic: a row ends with its last document",
        choices=PAD_ROWS,
    )
    document_alignment: int = fixed(
        None,
        "documents are padded to a multiple of this number of tokens; default: the smallest legal, 2 * cp for zigzag, "
        "for hybrid by --micro-batch-size",
        AT_LEAST_ONE,
    )
    num_workers: int = flag(
        None, "processes that build batches ahead; 0: none; default: 2 on cuda, 0 on cpu", NOT_NEGATIVE
    )
    balance_work: bool = printed(
        True,
        "deal a step's samples to data ranks and microbatches by their estimated work; off: in their order",
    )
    check_data: bool = flag(False, "compare prepared corpora with their checksums before training")
    skip_steps: tuple[range, ...] = flag(
        (),
        "steps to skip, counted as in the log: their samples are not read, nothing is trained, saved or evaluated; "
        "default: none",
        metavar="A-B,C,...",
        parse=parse_skip_steps,
        text=format_skip_steps,
    )

    @property
    def alignment(self) -> int:
        """Tokens to whose multiple the packing pads documents."""
        return self.document_alignment if self.qkv_format == "thd" else 1


@dataclass
class TrainingConfig:
    """training"""

    micro_batch_size: int = flag(
        1,
        "samples of a row; changes speed and memory only, but for hybrid's default --document-alignment",
        AT_LEAST_ONE,
    )
    global_batch_size: int = fixed(
        None,
        "samples of a step, over all ranks; default: one microbatch for each data rank and pipeline stage",
        AT_LEAST_ONE,
    )
    rampup_batch_size: list[int] | None = fixed(
        None,
        "START INCREMENT SAMPLES: begin with START samples a step and reach --global-batch-size in steps of INCREMENT, "
        "spread over the first SAMPLES samples; default: off",
    )
    new_batch: bool = flag(False, "a resumed run may change --global-batch-size and --rampup-batch-size")
    train_iters: int = flag(200, "steps of the whole run", AT_LEAST_ONE)
    train_tokens: int | None = flag(
        None,
        "tokens of the whole run, padding counted, instead of --train-iters; the learning rate then follows tokens",
        AT_LEAST_ONE,
    )
    seed: int = fixed(1234, "seed of initial weights and data order", NOT_NEGATIVE)
    dtype: str = printed(
        "auto",
        "dtype of the computation; fp64: weights too; auto: bf16 on cuda, fp32 on cpu",
        choices=("auto", *support.DTYPES),
    )
    recompute: str = flag(
        "none",
        "activations computed again in the backward pass: selective (each MLP), full (each layer)",
        choices=RECOMPUTE,
    )
    offload_activations: bool = flag(
        False,
        "with --recompute full: each layer's input waits for the backward pass in pinned host memory, not on the GPU",
    )
    loss_chunk_size: int = flag(
        None, "tokens whose logits exist at a time; default: 2048 on cuda, 512 on cpu", AT_LEAST_ONE
    )
    z_loss: float = printed(0.0, "weight of log(Z)^2 in the loss; 0: off", NOT_NEGATIVE)
    optimizer: str = fixed(
        "adamw",
        "muon: orthogonalized updates for the layers' matrices, scaled to AdamW's size; AdamW for the other weights",
        choices=OPTIMIZERS,
    )
    lr: float = printed(1e-3, "maximum learning rate", NOT_NEGATIVE)
    min_lr: float = printed(
        1e-4, "learning rate at the end of the decay; 0: reached one step later, the last step trains", NOT_NEGATIVE
    )
    lr_warmup_iters: int = printed(
        None, "steps of linear warm-up; default: 20, at most a tenth of the decay", NOT_NEGATIVE
    )
    lr_decay_iters: int = printed(None, "step at which --min-lr is reached; default: --train-iters", AT_LEAST_ONE)
    lr_decay_style: str = printed(
        "cosine", "shape of the decay; wsd: constant, then a decay at the end", choices=LR_DECAY_STYLES
    )
    lr_wsd_decay_iters: int = printed(
        None,
        "steps of the decay of wsd, from the end of the warm-up at the earliest; default: a tenth of --lr-decay-iters",
        NOT_NEGATIVE,
    )
    lr_warmup_tokens: int | None = printed(
        None, "with --train-tokens: tokens of linear warm-up; default: 20 steps, at most a tenth", NOT_NEGATIVE
    )
    lr_decay_tokens: int | None = printed(
        None, "with --train-tokens: tokens after which --min-lr is reached; default: all", AT_LEAST_ONE
    )
    lr_wsd_decay_tokens: int | None = printed(
        None, "with --train-tokens: tokens of the decay of wsd; default: a tenth", NOT_NEGATIVE
    )
    weight_decay: float = printed(0.1, "weight decay of matrices; 0: off", NOT_NEGATIVE)
    adam_beta1: float = printed(0.9, "decay of the first moment a step", FRACTION)
    adam_beta2: float = printed(0.95, "decay of the second moment a step", FRACTION)
    adam_eps: float = printed(1e-8, "added to the root of the second moment", ABOVE_ZERO)
    clip_grad: float = printed(1.0, "maximum global gradient norm; 0: off", NOT_NEGATIVE)
    eval_interval: int = flag(100, "steps between validations; 0: off", NOT_NEGATIVE)
    eval_iters: int = flag(20, "global batches of a validation; at most one pass over its data", AT_LEAST_ONE)
    dry_run: bool = flag(False, "print memory, FLOPs and bytes of the run (tools/plan.py) and exit")
    dry_run_ranks: int | None = flag(
        None, "as --dry-run, for this number of GPUs, eight a node, on any machine; default: off", AT_LEAST_ONE
    )
    eval_only: bool = flag(False, "validate the loaded weights and exit; needs --load or --resume")
    exit_interval: int | None = flag(
        None, "save and exit after each multiple of these steps; default: off", AT_LEAST_ONE
    )
    exit_duration_in_mins: float | None = flag(
        None,
        "save and exit after the step during which this start (also a restart by torchrun) reaches this age; default: "
        "off",
        ABOVE_ZERO,
    )
    stop_check_interval: int | None = flag(
        None,
        "steps between agreements of all ranks on a request to stop, fewer if they take five seconds; default: one for "
        "each 256 ranks, at least 1",
        AT_LEAST_ONE,
    )
    on_nonfinite: str = flag(
        "stop",
        "a loss or gradient norm that is not finite: stop the run, or skip the update (on CUDA the host then waits in "
        "each step)",
        choices=("stop", "skip"),
    )
    gc_interval: int = flag(
        100,
        "steps between Python's garbage collections, the same on all ranks, over what is made after the first step; 0: "
        "when Python chooses",
        NOT_NEGATIVE,
    )
    max_skipped_in_a_row: int = flag(5, "with --on-nonfinite skip: consecutive skipped steps allowed", NOT_NEGATIVE)

    # Samples of each step; set by `resolve`.
    batches: BatchSchedule = field(default=None)  # type: ignore[assignment]

    @property
    def parameter_dtype(self) -> str:
        """Dtype of stored weights and moments."""
        return "fp64" if self.dtype == "fp64" else "fp32"


@dataclass
class CheckpointConfig:
    """checkpoint"""

    run_dir: str | None = flag(None, "folder of the run and its outputs; default: runs/<date-time>")
    save: str | None = flag(None, "folder of the checkpoints; default: <run-dir>/checkpoints")
    save_interval: int = flag(100, "steps between checkpoints; 0: off", NOT_NEGATIVE)
    save_final: bool = flag(None, "save after the last step; default: on, unless --save-interval is 0")
    async_save: bool = flag(False, "write checkpoints in the background, from a copy in host memory")
    keep_checkpoints: int = flag(0, "newest checkpoints that are kept; 0: all", NOT_NEGATIVE)
    keep_every: int = flag(
        0, "with --keep-checkpoints: those of each multiple of N steps are kept too; 0: none", NOT_NEGATIVE
    )
    local_save_interval: int = flag(
        0,
        "steps between copies of the state in --local-save-dir and on the next node, which --resume loads if they are "
        "newer than the checkpoint; 0: off",
        NOT_NEGATIVE,
    )
    local_save_dir: str | None = flag(
        None, "folder on each node's own disk or in its memory (/dev/shm), for --local-save-interval"
    )
    load: str | None = flag(
        None,
        "checkpoint, or folder of checkpoints, to start from; with --resume: only while --save is empty; default: none",
    )
    resume: bool = flag(
        False,
        "continue from the newest checkpoint under --save; without one start from --load, or fresh",
    )
    load_weights_only: bool = flag(
        False,
        "start a new run from --load's weights: step 0, new optimizer and data; --seq-length and rotary flags may "
        "change",
    )
    load_fallback: bool = flag(False, "if the checkpoint is corrupted, take the newest older one that is not")


@dataclass
class LoggingConfig:
    """log"""

    verify_steps: int = flag(1, "first steps in which ranks compare rows and new weights; 0: off", NOT_NEGATIVE)
    log_interval: int = flag(10, "steps between log lines", AT_LEAST_ONE)
    tensorboard_dir: str | None = flag(None, "TensorBoard folder; default: <run-dir>/tensorboard; none: off")
    metrics_file: str | None = flag(None, "JSON lines, one a step; default: <run-dir>/metrics.jsonl; none: off")
    peak_tflops: float | None = flag(None, "dense peak of a device, for MFU; default: known GPUs", ABOVE_ZERO)
    sample_tokens: int = flag(48, "tokens of a sample of text, before and after training; 0: no samples", NOT_NEGATIVE)
    sample_interval: int = flag(0, "steps between samples during training; 0: off", NOT_NEGATIVE)
    sample_prompt: str = flag("", "prompt of the samples; default: BOS if documents begin with it, else a line break")
    wandb_project: str | None = flag(
        None, "Weights & Biases project of the TensorBoard curves; needs the wandb package; none: off; default: off"
    )
    timing_log_level: int = flag(
        0,
        "0: off; 1: time of each phase, minimum and maximum over ranks, and the slowest rank; 2: more phases, each "
        "synchronised",
        bound=Bound(0, 3, "0, 1 or 2"),
    )
    profile: bool = flag(False, "trace --profile-steps into <run-dir>/profile, a file a rank")
    profile_steps: range = flag(
        range(10, 13),
        "steps of --profile, counted as in the log",
        metavar="A-B",
        parse=parse_profile_steps,
        text=_format_range,
    )


@dataclass
class RunConfig:
    """Every flag of a run, by group. Mutable until `resolve` has filled it in; read-only by convention after."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step of --global-batch-size on each data rank."""
        parallel, training = self.parallel, self.training
        return count_microbatches(
            training.global_batch_size,
            training.micro_batch_size,
            parallel.dp_size,
            pp_size=parallel.pp_size,
            schedule=parallel.pp_schedule,
        )

    @property
    def tokenizer(self) -> TokenizerSpec:
        data = self.data
        named = data.tokenizer_type, data.tokenizer_model, data.tokenizer_eod
        return TokenizerSpec(*named, bos=data.bos, eod_id=data.eod_id, vocab_size=self.model.vocab_size)

    @property
    def changeable(self) -> frozenset[str]:
        """Fields of fixed flags that this run may change when it is resumed."""
        return BATCH_FLAGS if self.training.new_batch else frozenset()

    @property
    def keeps_data_order(self) -> bool:
        """Whether a loaded checkpoint's data must be this run's: `--eval-only --valid-data-path` trains on none."""
        return not (self.training.eval_only and self.data.valid_data_path)

    def flags(self, on_resume: OnResume | None = None) -> dict[str, Any]:
        """Values by field name as JSON has them; parsed values as the text of the command line.

        Args:
            on_resume: only the flags of this kind.
        """
        found = {}
        for group, name, about in fields_of_flags():
            value = getattr(getattr(self, group), name)
            if on_resume in (None, about.on_resume):
                found[name] = about.text(value) if about.parse and value is not None else value
        return found


def fields_of_flags() -> Iterator[tuple[str, str, Flag]]:
    """(group, field, flag) of every flag, in the order of the help."""
    for group in dataclasses.fields(RunConfig):
        for one in dataclasses.fields(group.default_factory):  # type: ignore[arg-type]
            if "flag" in one.metadata:
                yield group.name, one.name, one.metadata["flag"]


def option(name: str) -> str:
    """`cp_size` -> `--cp-size`."""
    return "--" + name.replace("_", "-")
