"""Continue texts with a trained model: `python tools/generate.py --load runs/one --prompt "def " --tokens 64`.

One process, whatever layout wrote the checkpoint. The model's shape is the checkpoint's; the tokenizer is that of the run's config.json,
which lies beside the checkpoints, or the one that flags name: one that is there, for nothing is trained or written here. Keys and values
are kept, so a token costs one token's forward pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from checkpoint.files import find_run_checkpoint, read_run_metadata
from checkpoint.saver import load_checkpoint
from data.blend import parse_blend
from data.indexed_dataset import index_file
from data.sources import open_prepared
from data.tokenizer import TOKENIZER_TYPES, SentencePieceTokenizer, Tokenizer, load_sentencepiece, load_tokenizer
from model.config import GPTConfig
from model.gpt import GPT
from model.transformer import GPTOptions
from parallel.grid import GridSizes, build_grid
from runtime.distributed import Launch, cuda_device_count, initialise_distributed
from tools.kv_cache import CachedAttention, continue_text
from utils.errors import UserError, run_tool

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def config_of(facts: dict[str, Any], checkpoint: Path) -> GPTConfig:
    """The model that a checkpoint's run.json describes.

    Raises:
        ValueError: it does not.
    """
    told = {name.removeprefix("model "): value for name, value in facts.items() if name.startswith("model ")}
    missing = [f.name for f in fields(GPTConfig) if f.name not in told and not f.name.endswith("_dropout")]
    if missing:
        raise UserError(f"--load {checkpoint}: its run.json does not say {', '.join(missing)}")
    return GPTConfig(**told)


def cached_tokenizer(cache: Path, fingerprint: str) -> Tokenizer | None:
    """The one that train.py trained, from under its --data-cache-path."""
    load_sentencepiece()  # a missing library is no fault of a model
    for model in sorted(cache.glob("tokenizer/*/tokenizer.model")):
        with suppress(ValueError):  # a broken one is not it
            if model.is_file() and (found := SentencePieceTokenizer(model)).fingerprint == fingerprint:
                return found
    return None


def run_tokenizer(file: Path, fingerprint: str) -> Tokenizer:
    """The one that a run's config.json tells of, read from where it is. The file may be a stranger's: its paths are only read.

    Raises:
        ValueError: no such file, or no tokenizer where it says.
    """
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; say with what the model was trained: --tokenizer-type, --tokenizer-model"
        )
    try:
        told = json.loads(file.read_text("utf-8"))["flags"]
        kind, model, eod, cache = (
            told[name] for name in ("tokenizer_type", "tokenizer_model", "tokenizer_eod", "data_cache_path")
        )
        corpora = [list(told[name] or ()) for name in ("data_path", "valid_data_path")]
        if not all(isinstance(text, str) for text in (kind, model or "", eod or "", cache, *corpora[0], *corpora[1])):
            raise TypeError("a path that is no text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: not a run's configuration ({error!r})") from error
    if model is not None and not Path(model).is_file():
        raise UserError(f"{file}: its tokenizer {model} is not there; name the file with --tokenizer-model")
    if kind == "byte" or model is not None:
        return load_tokenizer(kind, model, eod)
    prefixes = [Path(part.path) for words in corpora if words for part in parse_blend(words)]
    own = (open_prepared(prefix).tokenizer() for prefix in prefixes if index_file(prefix).is_file())
    found = next(filter(None, own), None) or cached_tokenizer(Path(cache), fingerprint)
    if found is None:
        raise UserError(
            f"{file}: its tokenizer is neither under its --data-cache-path {cache} nor beside a corpus, and none is trained here: "
            "name its file with --tokenizer-model"
        )
    return found


def tokenizer_of(flags: argparse.Namespace, checkpoint: Path, fingerprint: str) -> Tokenizer:
    """The one that the model was trained with.

    Raises:
        ValueError: it cannot be found, or is another one.
    """
    if flags.tokenizer_type or flags.tokenizer_model:
        found = load_tokenizer(flags.tokenizer_type or "auto", flags.tokenizer_model, flags.tokenizer_eod)
    else:
        found = run_tokenizer(checkpoint.parent.parent / "config.json", fingerprint)
    if found.fingerprint != fingerprint:
        raise UserError(
            f"the {found.kind} tokenizer is not the one that {checkpoint} was trained with: --tokenizer-type, --tokenizer-model"
        )
    return found


def load_model(checkpoint: Path, config: GPTConfig, *, device: torch.device, dtype: torch.dtype) -> GPT:
    """The whole model on this device, from a checkpoint of any layout.

    Raises:
        ValueError: a damaged checkpoint or another model.
    """
    grid = build_grid(GridSizes())
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.device(device):
        attention = CachedAttention(config.num_layers, config.kv_channels**-0.5)
        model = GPT(config, attention=attention, cp_group=grid.group("cp"), options=GPTOptions(dtype=stored))
    load_checkpoint(checkpoint, model, None, grid)
    model.compute_dtype = dtype
    return model.to(dtype).eval()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--load", type=Path, required=True, help="a run's folder, a folder of checkpoints, or one checkpoint"
    )
    parser.add_argument("--prompt", action="append", default=[], help="a text to continue; may be given several times")
    parser.add_argument("--prompt-file", type=Path, help="a file whose whole text is one more prompt")
    parser.add_argument("--tokens", type=int, default=64, help="at most so many tokens are added to each")
    parser.add_argument("--temperature", type=float, default=0.8, help="0, or --greedy: always the most likely token")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the fewest tokens that together are so likely"
    )
    parser.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    parser.add_argument("--seed", type=int, default=1234, help="of the draws; the same for each prompt")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the computation")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )
    parser.add_argument("--tokenizer-type", choices=("auto", *TOKENIZER_TYPES), help="default: the run's own tokenizer")
    parser.add_argument("--tokenizer-model", help="SentencePiece model or tokenizer.json; default: the run's own")
    parser.add_argument("--tokenizer-eod", metavar="TOKEN", help="of a tokenizer.json: the token that ends a document")
    return parser


def main(argv: list[str]) -> int:
    flags = build_parser().parse_args(argv)
    for name, legal, words in (
        ("tokens", flags.tokens >= 1, "at least 1"),
        ("temperature", 0 <= flags.temperature < float("inf"), "0 or more"),
        ("top-p", 0 < flags.top_p <= 1, "above 0 and at most 1"),
    ):
        if not legal:
            raise UserError(f"--{name} {getattr(flags, name.replace('-', '_'))}: must be {words}")
    prompts = list(flags.prompt)
    if flags.prompt_file:
        if not flags.prompt_file.is_file():
            raise UserError(f"--prompt-file {flags.prompt_file}: no such file")
        prompts.append(flags.prompt_file.read_text("utf-8"))
    checkpoint = find_run_checkpoint(flags.load)
    facts = read_run_metadata(checkpoint)
    config, tokenizer = config_of(facts, checkpoint), tokenizer_of(flags, checkpoint, facts["tokenizer"])
    kind = ("cuda" if cuda_device_count() else "cpu") if flags.device == "auto" else flags.device
    device, _ = initialise_distributed(Launch(), kind, timeout=timedelta(minutes=10))
    model = load_model(checkpoint, config, device=device, dtype=DTYPES[flags.dtype])
    for prompt in prompts or [""]:
        ids = tokenizer.encode(prompt).tolist() or [tokenizer.eod]
        trained_on = facts.get("--seq-length")
        if trained_on and len(ids) + flags.tokens > trained_on:
            print(
                f"{len(ids)} + {flags.tokens} tokens are more than the {trained_on} that the model was trained on",
                file=sys.stderr,
            )
        added = continue_text(
            model,
            ids,
            tokens=flags.tokens,
            eod=tokenizer.eod,
            temperature=0.0 if flags.greedy else flags.temperature,
            top_p=flags.top_p,
            seed=flags.seed,
        )
        print(prompt + tokenizer.decode(added), flush=True)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
