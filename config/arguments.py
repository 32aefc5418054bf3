"""Flags, presets and their checks. No torch import, so that a refusal is quick.

`parse_arguments` reads flags and YAML; `resolve` replaces every `auto` by what it means here and checks
everything that can be checked before a process group exists. A check is a small function that raises
`ValueError` with one line: the flag, the numbers that clash, the nearest legal value.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from cp import support
from cp.layout import LAYOUTS, document_unit
from data.packing import PACKINGS, PAD_ROWS, resolve_packing
from data.sources import find_tokenizer, open_parts
from data.tokenizer import TOKENIZER_TYPES, load_sentencepiece
from model.config import FP8_RECIPES, RECOMPUTE, ROPE_SCALINGS, GPTConfig
from parallel.stages import PP_SCHEDULES, check_microbatches, min_microbatches, split_layers
from utils.errors import UserError

FP8_UNIT = 16  # sizes of a matrix in 8 bits are multiples of it
TRANSFORMER_IMPLS = ("auto", "torch", "te")
LR_DECAY_STYLES = ("cosine", "linear", "constant", "wsd")
SWITCH = argparse.BooleanOptionalAction  # --flag and --no-flag, so that a preset can be overruled


class OneLineParser(argparse.ArgumentParser):
    """argparse without the page of usage in front of an error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="train.py",
        description="Pretrain a GPT on packed documents: torchrun --nproc-per-node 4 train.py --cp-size 4",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="flags from a YAML file (keys as the flags, without dashes in front); the command line wins",
    )
    for add in (_add_parallel, _add_model, _add_data, _add_training, _add_checkpoint, _add_logging):
        add(parser)
    return parser


def _add_parallel(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parallel: pp x dp_replicate x dp_shard x cp x tp = number of ranks")
    group.add_argument("--pp-size", type=int, default=1, help="ranks that share the layers, each with its own")
    group.add_argument(
        "--pp-schedule",
        choices=PP_SCHEDULES,
        default="1f1b",
        help="order of the stages' work; interleaved needs --virtual-stages 2 or more",
    )
    group.add_argument("--virtual-stages", type=int, default=1, help="stages on each pp rank")
    group.add_argument("--first-stage-layers", type=int, help="layers of the first stage; default: like the others")
    group.add_argument("--last-stage-layers", type=int, help="layers of the last stage; default: like the others")
    group.add_argument("--dp-replicate-size", type=int, default=1, help="copies of the model, each with its own data")
    group.add_argument(
        "--dp-shard-size",
        type=int,
        default=-1,
        help="ranks that share one copy, each with its own data; -1: all that are left",
    )
    group.add_argument("--cp-size", type=int, default=1, help="ranks that share each sequence")
    group.add_argument("--tp-size", type=int, default=1, help="ranks that share each matrix and its heads")
    group.add_argument(
        "--sequence-parallel", action=SWITCH, help="norms on 1/tp of the tokens; default: on where --tp-size is above 1"
    )
    group.add_argument(
        "--cp-backend",
        choices=("auto", *support.BACKENDS),
        default="auto",
        help="what computes attention over cp ranks",
    )
    group.add_argument(
        "--cp-comm-type",
        choices=support.methods("native"),
        help="of native and te: p2p, a ring; all_gather, K and V of some heads at a time; a2a, Ulysses; a2a+p2p, both; default: p2p",
    )
    group.add_argument(
        "--ring-attn-func",
        choices=support.methods("ring"),
        help="of ring, the ring-flash-attn library; default: zigzag",
    )
    group.add_argument(
        "--cp-rotate-method",
        choices=support.methods("pytorch"),
        help="of pytorch, its own context parallelism; default: allgather",
    )
    group.add_argument(
        "--cp-layout",
        choices=("auto", *LAYOUTS),
        default="auto",
        help="how tokens are cut over cp ranks; auto: what the method does best",
    )
    group.add_argument(
        "--heads-k-stride", type=int, help="key/value heads gathered at a time by all_gather and llama3; default: 1"
    )
    group.add_argument("--cp-a2a-size", type=int, help="neighbours that trade heads in a2a+p2p; a divisor of --cp-size")
    group.add_argument(
        "--reshard-after-forward",
        choices=("auto", "on", "off"),
        default="auto",
        help="free gathered weights between forward and backward: less memory, one more gather; auto: off in one node",
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )
    group.add_argument(
        "--distributed-timeout-minutes",
        type=float,
        default=30.0,
        help="a rank that does not move for longer ends the run, which names it",
    )
    group.add_argument(
        "--distributed-startup-timeout-minutes",
        type=float,
        default=30.0,
        help="the same until the first step is done (data preparation may take longer)",
    )
    group.add_argument(
        "--check-weights-interval",
        type=int,
        default=0,
        help="steps between comparisons of the replicas' weights and moments, bit by bit; 0: never",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--num-layers", type=int, default=6, help="decoder layers")
    group.add_argument("--hidden-size", type=int, default=256, help="channels of the residual stream")
    group.add_argument(
        "--ffn-hidden-size",
        type=int,
        help="channels inside the MLP; default: 8/3 of --hidden-size, up to a multiple of 16",
    )
    group.add_argument("--num-attention-heads", type=int, default=4, help="query heads")
    group.add_argument(
        "--num-query-groups", type=int, default=2, help="key/value heads; equal to the query heads turns GQA off"
    )
    group.add_argument("--kv-channels", type=int, help="channels of one head; default: hidden size / heads")
    group.add_argument("--rotary-base", type=float, default=10000.0, help="base of the rotary frequencies")
    group.add_argument(
        "--rope-scaling",
        choices=ROPE_SCALINGS,
        default="none",
        help="longer contexts than trained on: linear, positions divided by the factor; llama3, slow frequencies only",
    )
    group.add_argument("--rope-scaling-factor", type=float, default=8.0, help="of --rope-scaling")
    group.add_argument(
        "--rope-original-seq-length", type=int, default=8192, help="of llama3: the length that was trained on before"
    )
    group.add_argument("--norm-epsilon", type=float, default=1e-5, help="added to the mean square in RMSNorm")
    group.add_argument("--qk-norm", action=SWITCH, default=False, help="RMSNorm on each query and key head")
    group.add_argument("--tie-embeddings", action=SWITCH, default=False, help="one matrix for embedding and output")
    group.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=128, help="the vocabulary is padded to a multiple of it"
    )
    group.add_argument(
        "--hidden-dropout",
        type=float,
        default=0.0,
        help="share of channels dropped after embedding, attention and MLP; 0: none",
    )
    group.add_argument(
        "--attention-dropout", type=float, default=0.0, help="share of attention probabilities dropped; 0: none"
    )
    group.add_argument("--init-method-std", type=float, default=0.02, help="standard deviation of initial weights")
    group.add_argument(
        "--transformer-impl",
        choices=TRANSFORMER_IMPLS,
        default="auto",
        help="whose layers: te, Transformer Engine's, CUDA only; torch, plain PyTorch; auto: te where it can",
    )
    group.add_argument(
        "--fp8",
        choices=FP8_RECIPES,
        default="none",
        help="matrices of the te layers in 8 bits, scaled by the values of steps before, by the tensor's own or block by block",
    )
    group.add_argument(
        "--fp8-first-last-bf16", action=SWITCH, default=False, help="with --fp8: the first and last layer stay in bf16"
    )
    group.add_argument(
        "--compile",
        action=SWITCH,
        default=False,
        help="torch.compile the torch layers, but for attention; the first steps take minutes",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-path",
        nargs="+",
        metavar="PATH",
        help="prefix of a .bin/.idx corpus; or text, JSON lines, Parquet (.gz, .zst) or a folder of such; or several, WEIGHT PATH "
        "WEIGHT PATH ..., or without weights by size; or a YAML file that lists them; default: Python's standard library",
    )
    group.add_argument(
        "--valid-data-path",
        nargs="+",
        metavar="PATH",
        help="as --data-path, for validation; default: a part of --data-path",
    )
    group.add_argument(
        "--json-key", default="text", help="field of a JSONL record, or Parquet column, that holds the text"
    )
    group.add_argument(
        "--data-split",
        metavar="TRAIN,VALID,TEST",
        help="weights by which documents are split; default: 95,5,0, or 1,0,0 with --valid-data-path",
    )
    group.add_argument("--data-cache-path", default=".cache", help="folder for tokenizers, tokens and packing indices")
    group.add_argument(
        "--tokenizer-type",
        choices=("auto", *TOKENIZER_TYPES),
        default="auto",
        help="byte: UTF-8 bytes, no model; auto: the prepared corpus's own, else by the name of --tokenizer-model",
    )
    group.add_argument(
        "--tokenizer-model",
        help="SentencePiece model or Hugging Face tokenizer.json; default: the prepared corpus's own, or one is trained on the text, once",
    )
    group.add_argument(
        "--tokenizer-eod",
        metavar="TOKEN",
        help="of a tokenizer.json: the token that ends a document; default: a usual one",
    )
    group.add_argument("--tokenizer-vocab-size", type=int, default=4096, help="pieces of a model that is trained here")
    group.add_argument("--seq-length", type=int, default=2048, help="tokens of one sequence")
    group.add_argument(
        "--qkv-format",
        choices=support.QKV_FORMATS,
        default="thd",
        help="thd: packed documents; bshd: one stream, one mask a sequence",
    )
    group.add_argument(
        "--packing",
        choices=("auto", *PACKINGS["thd"]),
        default="auto",
        help="best-fit: documents whole where they fit; greedy: in order, cut where a sequence ends; concat: one stream, attention and "
        "labels cross documents; auto: best-fit for thd, concat for bshd",
    )
    group.add_argument(
        "--packing-window",
        type=int,
        metavar="N",
        help="best-fit over windows of N random documents, for corpora whose index would be too large; default: over all",
    )
    group.add_argument(
        "--pad-rows",
        choices=PAD_ROWS,
        default="full",
        help="full: every row has micro-batch * seq-length tokens; dynamic: a row ends with its last document",
    )
    group.add_argument(
        "--document-alignment",
        type=int,
        help="documents are padded to a multiple of it; default: the smallest legal, 2 * cp for zigzag",
    )
    group.add_argument(
        "--num-workers", type=int, help="processes that build batches ahead; 0: none; default: 2 on cuda, 0 on cpu"
    )
    group.add_argument(
        "--check-data",
        action=SWITCH,
        default=False,
        help="read prepared corpora whole at the start and compare them with their checksums",
    )
    group.add_argument(
        "--skip-steps",
        metavar="A-B,C,...",
        help="steps, as the log counts them, that are passed over: their sequences are not read, nothing is trained, saved or evaluated",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--micro-batch-size", type=int, default=1, help="sequences in a row; nothing but speed depends on it"
    )
    group.add_argument(
        "--global-batch-size",
        type=int,
        help="sequences in a step, over all ranks; default: the fewest that give every data rank and stage work",
    )
    group.add_argument("--train-iters", type=int, default=200, help="steps in all")
    group.add_argument("--seed", type=int, default=1234, help="of the initial weights and of the data's order")
    group.add_argument(
        "--dtype",
        choices=("auto", *support.DTYPES),
        default="auto",
        help="of the computation; fp64: weights too. auto: bf16 on cuda, fp32 on cpu",
    )
    group.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        default="none",
        help="computed again for the backward pass: selective, each MLP; full, each layer",
    )
    group.add_argument("--loss-chunk-size", type=int, default=512, help="tokens whose logits exist at a time")
    group.add_argument("--z-loss", type=float, default=0.0, help="weight of log(Z)^2 in the loss; 0: off")
    group.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    group.add_argument("--min-lr", type=float, default=1e-4, help="learning rate at the end of the decay")
    group.add_argument(
        "--lr-warmup-iters", type=int, help="steps of linear warm-up; default: 20, at most a tenth of --lr-decay-iters"
    )
    group.add_argument("--lr-decay-iters", type=int, help="step at which --min-lr is reached; default: --train-iters")
    group.add_argument(
        "--lr-decay-style", choices=LR_DECAY_STYLES, default="cosine", help="wsd: hold, then decay at the end"
    )
    group.add_argument(
        "--lr-wsd-decay-iters", type=int, help="last steps in which wsd decays; default: a tenth of --lr-decay-iters"
    )
    group.add_argument("--weight-decay", type=float, default=0.1, help="on matrices; 0: off")
    group.add_argument("--adam-beta1", type=float, default=0.9, help="decay of the mean gradient a step")
    group.add_argument("--adam-beta2", type=float, default=0.95, help="decay of the mean squared gradient a step")
    group.add_argument("--adam-eps", type=float, default=1e-8, help="added to the root of the mean squared gradient")
    group.add_argument("--clip-grad", type=float, default=1.0, help="largest global gradient norm; 0: no clipping")
    group.add_argument("--eval-interval", type=int, default=100, help="steps between validations; 0: never")
    group.add_argument(
        "--eval-iters",
        type=int,
        default=20,
        help="global batches in a validation, at most what the held-out documents fill",
    )
    group.add_argument(
        "--dry-run", action=SWITCH, default=False, help="print what the run will need (tools/support.py) and end"
    )
    group.add_argument(
        "--eval-only",
        action=SWITCH,
        default=False,
        help="validate the loaded weights and end; needs --load or --resume",
    )
    group.add_argument(
        "--exit-interval", type=int, help="save and stop after each multiple of so many steps; --resume goes on"
    )
    group.add_argument(
        "--exit-duration-in-mins",
        type=float,
        help="save and stop after the step during which this start (a restart by torchrun too) has lasted so long; --resume goes on",
    )
    group.add_argument(
        "--on-nonfinite",
        choices=("stop", "skip"),
        default="stop",
        help="a loss or gradient that is not finite ends the run, or its step is passed over (on CUDA the host then waits at each step); "
        "its rows are kept for tools/replay.py",
    )
    group.add_argument("--max-skipped-in-a-row", type=int, default=5, help="with --on-nonfinite skip: more end the run")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoint")
    group.add_argument(
        "--run-dir", help="folder of the run: checkpoints, metrics, TensorBoard; default: runs/<date-time>"
    )
    group.add_argument("--save", help="folder for checkpoints; default: <run-dir>/checkpoints")
    group.add_argument("--save-interval", type=int, default=100, help="steps between checkpoints; 0: none on the way")
    group.add_argument(
        "--save-final", action=SWITCH, help="a checkpoint after the last step; default: on, unless --save-interval is 0"
    )
    group.add_argument(
        "--async-save",
        action=SWITCH,
        default=False,
        help="write checkpoints in the background, from a copy in host memory",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=int,
        default=0,
        metavar="N",
        help="the newest N stay, older ones are removed; 0: all stay",
    )
    group.add_argument("--load", help="checkpoint, or folder with some, to start from; refused if there is none")
    group.add_argument(
        "--resume",
        action=SWITCH,
        default=False,
        help="go on from the newest checkpoint under --save if there is one, else start fresh (or as --load --load-weights-only says)",
    )
    group.add_argument(
        "--load-weights-only",
        action=SWITCH,
        default=False,
        help="a new run from --load's weights: step 0, fresh optimiser and data; --seq-length and the rotary flags may be new",
    )
    group.add_argument(
        "--load-fallback",
        action=SWITCH,
        default=False,
        help="take the newest older checkpoint that is whole if the wanted one is damaged",
    )


def _add_logging(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("log")
    group.add_argument(
        "--verify-steps",
        type=int,
        default=1,
        help="first steps in which cp peers compare rows and replicas their new weights; 0: none",
    )
    group.add_argument("--log-interval", type=int, default=10, help="steps between lines")
    group.add_argument("--tensorboard-dir", help="default: <run-dir>/tensorboard; none: off")
    group.add_argument("--metrics-file", help="JSON lines, one a step; default: <run-dir>/metrics.jsonl; none: off")
    group.add_argument(
        "--peak-tflops", type=float, help="dense peak of one device for MFU; default: known GPUs, else no MFU"
    )
    group.add_argument(
        "--sample-tokens", type=int, default=48, help="tokens of text generated before and after training; 0: none"
    )
    group.add_argument("--sample-interval", type=int, default=0, help="steps between samples on the way; 0: none")
    group.add_argument("--sample-prompt", default="def ", help="what the sample continues")
    group.add_argument(
        "--wandb-project", help="send curves to this Weights & Biases project too; needs the wandb package"
    )
    group.add_argument(
        "--timing-log-level",
        type=int,
        default=0,
        help="0: as ever; 1: each phase's time, least and most over ranks, and the slowest rank; 2: more phases, each waited for",
    )
    group.add_argument(
        "--profile", action=SWITCH, default=False, help="trace --profile-steps into <run-dir>/profile, a file a rank"
    )
    group.add_argument("--profile-steps", metavar="A-B", default="10-12", help="of --profile, as the log counts them")


# ---------------------------------------------------------------------------------------------------
# Parsing


def _flags_from_yaml(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """The file's keys as command-line flags, so that types and choices are checked by the same code."""
    try:
        loaded = yaml.load(Path(path).read_text("utf-8"), Loader=_WordsLoader) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path}: must be a mapping of flags to values")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    flags: list[str] = []
    seen: dict[str, str] = {}
    for key, value in loaded.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            raise UserError(f"--config {path}: unknown key {key!r}{_did_you_mean(str(key), actions)}")
        if action.dest in seen:
            raise UserError(f"--config {path}: {key} and {seen[action.dest]} are the same flag")
        seen[action.dest] = key
        flag = action.option_strings[0]
        if action.nargs == 0:
            if value not in ("true", "false"):
                raise UserError(f"--config {path}: {key} must be true or false, not {value!r}")
            flags.append(flag if value == "true" else action.option_strings[1])
        elif (
            action.nargs == "+"
            and isinstance(value, list)
            and value
            and all(isinstance(word, str) and word for word in value)
        ):
            flags += [flag, *value]
        elif not isinstance(value, str) or not value or value in ("null", "~"):
            raise UserError(f"--config {path}: {key} must be one value, not {value!r}")
        else:
            flags.append(f"{flag}={value}")
    return flags


class _WordsLoader(yaml.BaseLoader):
    """Every value as the word that stands there, for argparse to read (`on` stays `on`); the same key twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} is given twice")
        return super().construct_mapping(node, deep)


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(
        word.lstrip("-").replace("-", "_"), [k.lstrip("-").replace("-", "_") for k in known], n=1
    )
    return f"; did you mean --{close[0].replace('_', '-')}?" if close else ""


def parse_arguments(argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """Flags of a run; a YAML preset's first, then the command line's over them.

    Args:
        defaults: in place of the flags' own, by name: what this function returned of another run.

    Raises:
        ValueError: one line for a misspelt flag or key, a wrong type or choice.
    """
    parser = build_parser()
    parser.set_defaults(**(defaults or {}))
    first, _ = _config_parser().parse_known_args(argv)
    flags = _flags_from_yaml(first.config, parser) if first.config else []
    args, unknown = parser.parse_known_args([*flags, *argv])
    if unknown:
        raise UserError(
            f"unknown flag {unknown[0]}{_did_you_mean(unknown[0].split('=')[0], parser._option_string_actions)}"
        )
    return args


def _config_parser() -> OneLineParser:
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


# ---------------------------------------------------------------------------------------------------
# Resolving and checking


def resolve(
    args: argparse.Namespace,
    *,
    world_size: int,
    local_world_size: int,
    cuda_devices: Callable[[], int],
    goes_on_from: Mapping[str, Any] | None = None,
) -> list[str]:
    """Replace every `auto` and open default in `args`, and refuse what cannot be done.

    Args:
        cuda_devices: asked only where a CUDA device could be meant.
        goes_on_from: facts of the checkpoint that the run goes on from, whose data must come in the same order.

    Returns:
        A line for each thing that was chosen, for the banner.

    Raises:
        ValueError: one line, ready to print.
    """
    chosen: list[str] = []
    _resolve_device(args, local_world_size, cuda_devices, chosen)
    _check_positive(args)
    _resolve_grid(args, world_size, local_world_size, chosen)
    _resolve_model(args)
    _resolve_impl(args, chosen)
    _resolve_attention(args, chosen)
    _resolve_sequence(args, chosen, goes_on_from or {})
    _resolve_batch(args, chosen, goes_on_from or {})
    _check_stages(args)
    _resolve_schedule(args)
    _check_data(args, chosen)
    _check_folders(args)
    _check_watching(args)
    return chosen


def _resolve_device(
    args: argparse.Namespace, local_world_size: int, cuda_devices: Callable[[], int], chosen: list[str]
) -> None:
    if args.device != "cpu":
        found = cuda_devices()
        if args.device == "cuda" and not found:
            raise UserError("--device cuda: no CUDA device (or a PyTorch without CUDA); use --device cpu")
        if found and local_world_size > found:
            raise UserError(
                f"{local_world_size} ranks on this node but {found} CUDA devices: use --nproc-per-node {found} or --device cpu"
            )
        if args.device == "auto":
            args.device = "cuda" if found else "cpu"
            chosen.append(f"--device {args.device}")
    if args.dtype == "auto":
        args.dtype = "bf16" if args.device == "cuda" else "fp32"
        chosen.append(f"--dtype {args.dtype}")
    if args.num_workers is None:
        args.num_workers = 2 if args.device == "cuda" else 0
        chosen.append(f"--num-workers {args.num_workers}")


def _resolve_grid(args: argparse.Namespace, world_size: int, local_world_size: int, chosen: list[str]) -> None:
    for name in ("pp", "dp_replicate", "cp", "tp"):
        if getattr(args, f"{name}_size") < 1:
            raise UserError(f"--{name.replace('_', '-')}-size {getattr(args, f'{name}_size')}: must be at least 1")
    if args.sequence_parallel and args.tp_size == 1:
        raise UserError("--sequence-parallel needs --tp-size above 1, which is 1")
    if args.sequence_parallel is None:
        args.sequence_parallel = args.tp_size > 1
        if args.tp_size > 1:
            chosen.append("--sequence-parallel")
    others = args.pp_size * args.dp_replicate_size * args.cp_size * args.tp_size
    nodes = max(1, world_size // local_world_size)

    def start(ranks: int) -> str:
        if nodes == 1:
            return f"use --nproc-per-node {ranks}"
        if ranks % nodes == 0:
            return f"use --nproc-per-node {ranks // nodes} on each of the {nodes} nodes"
        return f"start {ranks} ranks in all (there are {nodes} nodes of {local_world_size})"

    if args.dp_shard_size == -1:
        if world_size % others:
            legal = others * max(1, round(world_size / others))
            raise UserError(
                f"{world_size} ranks do not divide by pp * dp_replicate * cp * tp = {others}: {start(legal)}"
            )
        args.dp_shard_size = world_size // others
        chosen.append(f"--dp-shard-size {args.dp_shard_size}")
    if args.dp_shard_size < 1:
        raise UserError(f"--dp-shard-size {args.dp_shard_size}: must be at least 1, or -1 for all ranks that are left")
    if others * args.dp_shard_size != world_size:
        raise UserError(
            f"the sizes ask for {others * args.dp_shard_size} ranks (pp {args.pp_size} * dp_replicate {args.dp_replicate_size} * "
            f"dp_shard {args.dp_shard_size} * cp {args.cp_size} * tp {args.tp_size}) but there are {world_size}: "
            f"{start(others * args.dp_shard_size)}"
        )
    if args.reshard_after_forward == "auto":
        args.reshard_after_forward = "off" if local_world_size == world_size else "on"
        chosen.append(f"--reshard-after-forward {args.reshard_after_forward}")


def _check_positive(args: argparse.Namespace) -> None:
    at_least_one = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
        "heads_k_stride", "cp_a2a_size", "make_vocab_size_divisible_by", "tokenizer_vocab_size", "seq_length",
        "rope_original_seq_length", "virtual_stages", "first_stage_layers", "last_stage_layers",
        "document_alignment", "packing_window", "micro_batch_size", "global_batch_size", "train_iters", "loss_chunk_size", "lr_decay_iters",
        "eval_iters", "log_interval", "exit_interval",
    )  # fmt: skip
    not_negative = (
        "z_loss", "lr", "min_lr", "lr_warmup_iters", "lr_wsd_decay_iters", "weight_decay", "clip_grad", "eval_interval",
        "save_interval", "keep_checkpoints", "verify_steps", "sample_tokens", "num_workers", "seed", "check_weights_interval",
        "sample_interval", "max_skipped_in_a_row",
    )  # fmt: skip
    above_zero = (
        "rotary_base",
        "rope_scaling_factor",
        "norm_epsilon",
        "init_method_std",
        "adam_eps",
        "peak_tflops",
        "distributed_timeout_minutes",
        "distributed_startup_timeout_minutes",
        "exit_duration_in_mins",
    )
    for names, legal, words in (
        (at_least_one, lambda x: x >= 1, "at least 1"),
        (not_negative, lambda x: 0 <= x < float("inf"), "0 or more"),
        (above_zero, lambda x: 0 < x < float("inf"), "above 0"),
        (
            ("adam_beta1", "adam_beta2", "hidden_dropout", "attention_dropout"),
            lambda x: 0 <= x < 1,
            "from 0 to below 1",
        ),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None and not legal(value):
                raise UserError(f"--{name.replace('_', '-')} {value}: must be {words}")


def _nearest_multiple(value: int, unit: int) -> int:
    """The multiple of `unit` nearest to `value`, at least one."""
    return unit * max(1, round(value / unit))


def _resolve_model(args: argparse.Namespace) -> None:
    heads, groups = args.num_attention_heads, args.num_query_groups
    if heads % groups:
        legal = [g for g in range(1, heads + 1) if heads % g == 0]
        nearest = min(legal, key=lambda g: abs(g - groups))
        raise UserError(
            f"--num-attention-heads {heads} does not divide by --num-query-groups {groups}: nearest legal value {nearest}"
        )
    if args.kv_channels is None:
        if args.hidden_size % heads:
            nearest = _nearest_multiple(args.hidden_size, 2 * heads)  # heads of an even number of channels
            raise UserError(
                f"--hidden-size {args.hidden_size} does not divide by --num-attention-heads {heads}: use {nearest}, or give --kv-channels"
            )
        args.kv_channels = args.hidden_size // heads
    if args.kv_channels % 2:
        raise UserError(
            f"--kv-channels {args.kv_channels}: rotary positions need an even number, such as {args.kv_channels + 1}"
        )
    if args.ffn_hidden_size is None:
        unit = math.lcm(16, args.tp_size)
        args.ffn_hidden_size = -(-args.hidden_size * 8 // 3 // unit) * unit
    tp = args.tp_size
    if groups % tp:
        legal = [t for t in range(1, groups + 1) if groups % t == 0]
        raise UserError(
            f"--tp-size {tp} does not divide --num-query-groups {groups}: choose from {', '.join(map(str, legal))}"
        )
    for flag, value in (
        ("--ffn-hidden-size", args.ffn_hidden_size), ("--make-vocab-size-divisible-by", args.make_vocab_size_divisible_by),
    ):  # fmt: skip
        if value % tp:
            raise UserError(
                f"{flag} {value} does not divide by --tp-size {tp}: nearest legal value {_nearest_multiple(value, tp)}"
            )


def _check_te(asked: str, instead: str) -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError(f"{asked} needs Transformer Engine: pip install -r requirements-gpu.txt, or use {instead}")


def _resolve_impl(args: argparse.Namespace, chosen: list[str]) -> None:
    if args.transformer_impl == "auto":
        able = (
            args.device == "cuda"
            and args.dtype == "bf16"
            and importlib.util.find_spec("transformer_engine") is not None
        )
        args.transformer_impl = "te" if able else "torch"
        chosen.append(f"--transformer-impl {args.transformer_impl}")
    if args.transformer_impl == "te":
        if args.device != "cuda":
            raise UserError(
                f"--transformer-impl te runs on --device cuda, not on {args.device}: use --transformer-impl torch"
            )
        if args.dtype != "bf16":
            raise UserError(f"--transformer-impl te takes --dtype bf16, not {args.dtype}: use --transformer-impl torch")
        _check_te("--transformer-impl te", "--transformer-impl torch")
        if args.compile:
            raise UserError("--compile is of --transformer-impl torch, not of te, whose kernels are fused already")
    if args.fp8_first_last_bf16 and args.fp8 == "none":
        raise UserError("--fp8-first-last-bf16 needs --fp8 delayed, current or block")
    if args.fp8 != "none":
        _check_fp8(args)


def _check_fp8(args: argparse.Namespace) -> None:
    if args.transformer_impl != "te":
        raise UserError(
            f"--fp8 {args.fp8} needs --transformer-impl te (CUDA, bf16, Transformer Engine), not {args.transformer_impl}"
        )
    if args.fp8 == "delayed" and args.recompute != "none":
        raise UserError(
            f"--fp8 delayed cannot go with --recompute {args.recompute}: use --fp8 current, or --recompute none"
        )
    if args.pad_rows == "dynamic":
        raise UserError(
            f"--fp8 {args.fp8} needs rows of a multiple of {FP8_UNIT} tokens on each rank, not --pad-rows dynamic: use full"
        )
    heads = args.num_attention_heads + 2 * args.num_query_groups
    for what, size in (
        (f"--hidden-size {args.hidden_size}", args.hidden_size),
        (f"--ffn-hidden-size {args.ffn_hidden_size} / --tp-size {args.tp_size}", args.ffn_hidden_size // args.tp_size),
        (f"query channels / --tp-size {args.tp_size}", args.num_attention_heads * args.kv_channels // args.tp_size),
        (f"query, key and value channels / --tp-size {args.tp_size}", heads * args.kv_channels // args.tp_size),
        (
            f"--micro-batch-size {args.micro_batch_size} * --seq-length {args.seq_length} / (cp {args.cp_size} * tp {args.tp_size})",
            args.micro_batch_size * args.seq_length // (args.cp_size * args.tp_size),
        ),
    ):
        if size % FP8_UNIT:
            raise UserError(
                f"--fp8 {args.fp8}: {what} = {size} is not a multiple of {FP8_UNIT}: nearest {_nearest_multiple(size, FP8_UNIT)}"
            )


def _resolve_attention(args: argparse.Namespace, chosen: list[str]) -> None:
    if args.cp_backend == "auto":
        args.cp_backend = support.resolve_backend("auto", has_te=args.transformer_impl == "te")
        chosen.append(f"--cp-backend {args.cp_backend}")
    own_flag = support.METHOD_FLAGS[args.cp_backend]
    for flag in dict.fromkeys(support.METHOD_FLAGS.values()):
        name = flag.removeprefix("--").replace("-", "_")
        if flag != own_flag and getattr(args, name) is not None:
            owners = " or ".join(backend for backend, theirs in support.METHOD_FLAGS.items() if theirs == flag)
            raise UserError(f"{flag} {getattr(args, name)} belongs to --cp-backend {owners}, not to {args.cp_backend}")
        if flag == own_flag and getattr(args, name) is None:
            setattr(args, name, support.methods(args.cp_backend)[0])
            chosen.append(f"{flag} {support.methods(args.cp_backend)[0]}")
        if flag == own_flag:
            method = getattr(args, name)
    request = support.AttentionRequest(
        backend=args.cp_backend,
        method=method,
        qkv_format=args.qkv_format,
        layout=args.cp_layout,
        dtype=args.dtype,
        device=args.device,
        cp_size=args.cp_size,
        a2a_size=args.cp_a2a_size,
        heads_k_stride=args.heads_k_stride,
        head_dim=args.kv_channels,
        heads=args.num_attention_heads // args.tp_size,
        groups=args.num_query_groups // args.tp_size,
        dropout=args.attention_dropout,
    )
    args.attention = support.choose(request)
    if args.cp_backend == "te":
        _check_te("--cp-backend te", "--cp-backend native")
    if args.cp_backend == "ring":
        for package in ("ring_flash_attn", *(["flash_attn"] if args.device == "cuda" else [])):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--cp-backend ring needs the package {package.replace('_', '-')}: pip install it, or use --cp-backend native"
                )
    if args.cp_layout == "auto":
        args.cp_layout = args.attention.layout
        chosen.append(f"--cp-layout {args.cp_layout}")


def _resolve_sequence(args: argparse.Namespace, chosen: list[str], goes_on_from: Mapping[str, Any]) -> None:
    if args.packing == "auto":
        args.packing = resolve_packing("auto", args.qkv_format)
        chosen.append(f"--packing {args.packing}")
    legal = PACKINGS[args.qkv_format]
    if args.packing not in legal:
        raise UserError(
            f"--packing {args.packing} is not offered for --qkv-format {args.qkv_format}: use {' or '.join(legal)}"
        )
    if args.packing_window is not None and args.packing != "best-fit":
        raise UserError(
            f"--packing-window {args.packing_window} is of --packing best-fit, not of {args.packing}, which needs none"
        )
    smallest = document_unit(args.cp_layout, args.cp_size)
    kept = goes_on_from.get("--document-alignment")
    if args.document_alignment is None and kept is not None:
        if kept % smallest:
            raise UserError(
                f"--cp-size {args.cp_size}: layout {args.cp_layout} needs documents aligned to a multiple of {smallest}, but the "
                f"checkpoint's data were packed with --document-alignment {kept}: use a --cp-size whose alignment divides {kept}, or "
                "--cp-comm-type all_gather --cp-layout contiguous, or start a new run from its weights with --load-weights-only"
            )
        args.document_alignment = kept
        chosen.append(f"--document-alignment {kept} (the checkpoint's)")
    if args.document_alignment is None:
        args.document_alignment = smallest
        chosen.append(f"--document-alignment {smallest}")
    if args.document_alignment % smallest:
        nearest = _nearest_multiple(args.document_alignment, smallest)
        raise UserError(
            f"--document-alignment {args.document_alignment} is not a multiple of {smallest}, which layout "
            f"{args.cp_layout} over {args.cp_size} cp ranks needs: nearest legal value {nearest}"
        )
    ranks = args.cp_size * args.tp_size
    nearest = _nearest_multiple(args.seq_length, math.lcm(args.document_alignment, ranks))
    for unit, name in ((args.document_alignment, "--document-alignment"), (ranks, "cp * tp =")):
        if args.seq_length % unit:
            raise UserError(
                f"--seq-length {args.seq_length} is not a multiple of {name} {unit}: nearest legal value {nearest}"
            )


def _check_stages(args: argparse.Namespace) -> None:
    split_layers(
        args.num_layers, args.pp_size * args.virtual_stages, first=args.first_stage_layers, last=args.last_stage_layers
    )
    microbatches = args.global_batch_size // (args.micro_batch_size * args.dp_replicate_size * args.dp_shard_size)
    check_microbatches(args.pp_schedule, microbatches, args.pp_size, args.virtual_stages)
    if args.pp_size > 1 and args.pad_rows == "dynamic":
        raise UserError(
            f"--pad-rows dynamic needs --pp-size 1, not {args.pp_size}: what goes from stage to stage has one shape; use full"
        )


def _resolve_batch(args: argparse.Namespace, chosen: list[str], goes_on_from: Mapping[str, Any]) -> None:
    unit = args.micro_batch_size * args.dp_replicate_size * args.dp_shard_size
    if args.global_batch_size is None and "--global-batch-size" in goes_on_from:
        args.global_batch_size = goes_on_from["--global-batch-size"]
        chosen.append(f"--global-batch-size {args.global_batch_size} (the checkpoint's)")
    if args.global_batch_size is None:
        args.global_batch_size = unit * min_microbatches(args.pp_size)
        chosen.append(f"--global-batch-size {args.global_batch_size}")
    if args.global_batch_size % unit:
        nearest = _nearest_multiple(args.global_batch_size, unit)
        raise UserError(
            f"--global-batch-size {args.global_batch_size} does not divide by micro batch {args.micro_batch_size} * dp_replicate "
            f"{args.dp_replicate_size} * dp_shard {args.dp_shard_size} = {unit}: nearest legal value {nearest}"
        )


def _resolve_schedule(args: argparse.Namespace) -> None:
    ends_where_told = args.lr_decay_iters is not None
    if args.lr_decay_iters is None:
        args.lr_decay_iters = args.train_iters
    if args.lr_warmup_iters is None:
        args.lr_warmup_iters = min(20, args.lr_decay_iters // 10)
    # A run shorter than its warm-up is a trial; a decay that ends inside it is a slip.
    if ends_where_told and args.lr_warmup_iters >= args.lr_decay_iters and args.lr_decay_style != "constant":
        raise UserError(
            f"--lr-warmup-iters {args.lr_warmup_iters} leaves nothing of --lr-decay-iters {args.lr_decay_iters}: "
            f"use at most {args.lr_decay_iters - 1}"
        )
    if args.lr_wsd_decay_iters is None:
        args.lr_wsd_decay_iters = max(1, args.lr_decay_iters // 10)
    if args.min_lr > args.lr:
        raise UserError(f"--min-lr {args.min_lr} is above --lr {args.lr}")
    if args.lr_wsd_decay_iters > args.lr_decay_iters:
        raise UserError(
            f"--lr-wsd-decay-iters {args.lr_wsd_decay_iters} is above --lr-decay-iters {args.lr_decay_iters}"
        )


def parse_split(text: str) -> tuple[float, ...]:
    """`95,5,0` -> (95.0, 5.0, 0.0)."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != 3 or not all(0 <= w < float("inf") for w in weights) or weights[0] <= 0:
        raise UserError(
            f"--data-split {text}: must be three weights TRAIN,VALID,TEST, the first above 0, such as 95,5,0"
        )
    return weights


def parse_profile_steps(text: str) -> range:
    """`10-12` -> range(10, 13), `10` -> range(10, 11); steps as the log counts them.

    Raises:
        ValueError: one line.
    """
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first)):
        raise UserError(f"--profile-steps {text}: must be a step or a range such as 10-12")
    return range(int(first), int(last or first) + 1)


def parse_skips(text: str | None, train_iters: int) -> set[int]:
    """`120-125,130` -> {120, ..., 125, 130}; None -> nothing."""
    skipped: set[int] = set()
    for part in text.split(",") if text is not None else ():
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first)):
            raise UserError(f"--skip-steps {text}: {part!r} must be a step or a range such as 120-125")
        if int(last or first) >= train_iters:
            raise UserError(f"--skip-steps {text}: must end before the last step, --train-iters {train_iters}")
        skipped.update(range(int(first), int(last or first) + 1))
    return skipped


def _check_data(args: argparse.Namespace, chosen: list[str]) -> None:
    if args.valid_data_path and args.data_split is not None and any(parse_split(args.data_split)[1:]):
        raise UserError(
            f"--data-split {args.data_split} and --valid-data-path: give one; both say what is validated on"
        )
    if args.data_split is None:
        args.data_split = "1,0,0" if args.valid_data_path else "95,5,0"
    if not parse_split(args.data_split)[1] and args.eval_interval and not args.valid_data_path:
        raise UserError(
            f"--data-split {args.data_split} leaves nothing to validate on: give VALID a weight or use --eval-interval 0"
        )
    if args.valid_data_path and not args.eval_interval:
        raise UserError("--valid-data-path with --eval-interval 0: nothing would be read from it")
    parse_skips(args.skip_steps, args.train_iters)
    if args.tokenizer_model is not None and args.tokenizer_type != "byte" and not Path(args.tokenizer_model).is_file():
        raise UserError(f"--tokenizer-model {args.tokenizer_model}: no such file")
    if args.tokenizer_eod is not None and args.tokenizer_model is None:
        raise UserError(f"--tokenizer-eod {args.tokenizer_eod} needs --tokenizer-model, a tokenizer.json")
    parts = open_parts(args.data_path, args.json_key)
    valid = open_parts(args.valid_data_path, args.json_key, "--valid-data-path") if args.valid_data_path else []
    found = find_tokenizer(
        parts, valid, tokenizer_type=args.tokenizer_type, model=args.tokenizer_model, eod=args.tokenizer_eod
    )
    if found is None:
        load_sentencepiece()
    if args.tokenizer_type == "auto":
        args.tokenizer_type = found.kind if found else "sentencepiece"
        chosen.append(f"--tokenizer-type {args.tokenizer_type}")


def _check_folders(args: argparse.Namespace) -> None:
    if args.save_final is None:
        args.save_final = args.save_interval > 0
    if args.load_weights_only and not args.load:
        raise UserError("--load-weights-only needs --load, which names the checkpoint")
    if args.load_fallback and not (args.load or args.resume):
        raise UserError("--load-fallback needs --load or --resume")
    if args.resume and args.load and not args.load_weights_only:
        raise UserError(
            "--resume and --load: give one (--resume looks under --save, --load names a checkpoint), or add --load-weights-only, for a "
            "run that takes weights at its first start and goes on from its own checkpoints after"
        )
    if args.resume and not (args.save or args.run_dir):
        raise UserError(
            "--resume needs --save or --run-dir: without one every start has a new folder and nothing to go on from"
        )
    folders = {"--run-dir": args.run_dir, "--save": args.save, "--data-cache-path": args.data_cache_path}
    folders |= {flag: value for flag, value in (("--tensorboard-dir", args.tensorboard_dir),) if value != "none"}
    if args.metrics_file not in (None, "none"):
        if Path(args.metrics_file).is_dir():
            raise UserError(f"--metrics-file {args.metrics_file}: is a folder")
        folders["--metrics-file"] = str(Path(args.metrics_file).parent)
    for flag, folder in folders.items():
        # A cache that others filled may be read-only; what it lacks is said when it is looked for.
        if folder is not None and not (flag == "--data-cache-path" and Path(folder).is_dir()):
            _check_can_be_made(flag, Path(folder))
    if args.tensorboard_dir != "none" and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard-dir needs the tensorboard package: pip install -r requirements.txt, or --tensorboard-dir none"
        )


def _check_watching(args: argparse.Namespace) -> None:
    if args.eval_only and not (args.load or args.resume):
        raise UserError("--eval-only needs --load or --resume: there is nothing trained to validate")
    if args.eval_only and not args.eval_interval:
        raise UserError("--eval-only with --eval-interval 0: nothing would be validated")
    if args.sample_interval and not args.sample_tokens:
        raise UserError(
            f"--sample-interval {args.sample_interval} with --sample-tokens 0: there would be nothing to see"
        )
    if args.timing_log_level not in (0, 1, 2):
        raise UserError(f"--timing-log-level {args.timing_log_level}: must be 0, 1 or 2")
    steps = parse_profile_steps(args.profile_steps)
    if args.profile and steps.start > args.train_iters:
        raise UserError(
            f"--profile-steps {args.profile_steps}: begins after the last step, --train-iters {args.train_iters}"
        )
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb-project needs the wandb package: pip install wandb, or leave the flag out")


def _check_can_be_made(flag: str, folder: Path) -> None:
    """Raises ValueError if the folder is not there and cannot be made, or is there and cannot be written in."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        raise UserError(f"{flag} {folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: no permission to write in {there}")


def model_config(args: argparse.Namespace, *, vocab_size: int, padded_vocab_size: int) -> GPTConfig:
    """The model that resolved flags ask for."""
    return GPTConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size,
        rotary_base=args.rotary_base,
        rope_scaling=args.rope_scaling,
        # What a scaling does not read is no part of the model.
        rope_scaling_factor=1.0 if args.rope_scaling == "none" else args.rope_scaling_factor,
        rope_original_seq_length=args.rope_original_seq_length if args.rope_scaling == "llama3" else 0,
        norm_epsilon=args.norm_epsilon,
        qk_norm=args.qk_norm,
        tie_embeddings=args.tie_embeddings,
        init_std=args.init_method_std,
        hidden_dropout=args.hidden_dropout,
        attention_dropout=args.attention_dropout,
    )
