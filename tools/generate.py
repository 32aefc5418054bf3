"""Continue texts with a trained model: `python tools/generate.py --load runs/one --prompt "def " --tokens 64`.

One process, whatever layout wrote the checkpoint. Model and tokenizer are those of the run: the checkpoint's metadata
and config.json beside the checkpoints. Nothing is trained or written. Keys and values are cached: each new token costs
the forward pass of one token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, replace
from datetime import timedelta
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoint.files import find_config, find_run_checkpoint, read_run_metadata
from checkpoint.reader import SafeReader
from checkpoint.saver import load_checkpoint
from cp.packed_seq import PackedSeq, build_packed_seq
from data.blend import parse_blend
from data.indexed_dataset import index_file
from data.sources import open_prepared
from data.tokenizer import (
    TOKENIZER_TYPES,
    SentencePieceTokenizer,
    TokenIds,
    Tokenizer,
    TokenizerSpec,
    UnencodableText,
    load_sentencepiece,
)
from model.config import ROPE_SCALINGS, GPTConfig, count_parameters
from model.gpt import GPT
from model.transformer import GPTOptions
from parallel.grid import GridSizes, build_grid
from runtime.distributed import Launch, cuda_device_count, initialise_distributed
from training.build import COMPUTE_DTYPES
from utils.errors import OneLineParser, UserError, run_tool
from utils.files import parse_json, read_text
from utils.logger import one_line

KINDS = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}  # by annotation


class CachedAttention:
    """Attention of one layer over one document that comes in parts: any number of tokens, then one at a time."""

    def __init__(self) -> None:
        self.cached: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, packed_seq: PackedSeq, group: dist.ProcessGroup, **options: Any
    ) -> Tensor:
        """q [t, hq, d]; k, v [t, g, d] of the next t tokens -> [t, hq, d]."""
        if self.cached:
            assert len(q) == 1, "one token at a time after the first part"
            k, v = (torch.cat(pair) for pair in zip(self.cached, (k, v), strict=True))
        self.cached = k, v
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, t, d]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)


def choose(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from the smallest set of most likely tokens that together reach `top_p` (arXiv:1904.09751).

    Args:
        logits: [V].
        temperature: 0 takes the most likely token.
        top_p: above 0; 1 draws from all tokens.
        generator: of the CPU.
    """
    if temperature == 0:
        return int(logits.argmax())
    p, order = torch.softmax(logits.double().cpu() / temperature, -1).sort(descending=True, stable=True)
    is_kept = p.cumsum(0) - p < top_p  # the tokens before it do not reach top_p
    return int(order[torch.multinomial(p * is_kept, 1, generator=generator)])


@torch.no_grad()
def continue_text(
    model: GPT,
    prompt: list[int],
    *,
    tokens: int,
    eod: int | None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to `tokens` ids that follow `prompt`, without `eod`, which ends the text.

    Args:
        model: on one rank, in eval mode. Its attention becomes a `CachedAttention`.
        prompt: at least one id.
        seed: of the draws.
    """
    assert prompt and not model.training
    for layer in model.layers.values():
        layer.attention.attention = CachedAttention()  # type: ignore[union-attr, assignment]
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    start, new = 0, prompt
    for _ in range(tokens):
        packed_seq, _ = build_packed_seq(np.array([len(new)]), np.array([len(new)]), layout="contiguous")
        row = replace(packed_seq, positions=torch.arange(start, start + len(new), device=device))
        last = torch.tensor([len(new) - 1], device=device)
        logits = model(torch.tensor(new, device=device), row, logits_rows=last)
        chosen = choose(logits[0], temperature=temperature, top_p=top_p, generator=generator)
        if chosen == eod:
            return
        yield chosen
        start, new = start + len(new), [chosen]


def read_run_tokenizers(file: Path) -> Iterator[Tokenizer]:
    """Yield the tokenizers to which a run's config.json leads. Paths in the file are only read: it may be a stranger's.

    Raises:
        UserError: no such file, not a run's configuration, or its tokenizer model is missing.
    """
    try:
        flags = parse_json(read_text(file))["flags"]
        kind, model, eod, cache = (
            flags[name] for name in ("tokenizer_type", "tokenizer_model", "tokenizer_eod", "data_cache_path")
        )
        corpora = [list(flags[name] or ()) for name in ("data_path", "valid_data_path")]
        if not all(isinstance(text, str) for text in (kind, model or "", eod or "", cache, *corpora[0], *corpora[1])):
            raise TypeError("a path that is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a run's configuration ({one_line(error)}); give --tokenizer-type") from error
    if model is not None and not Path(model).is_file():
        raise UserError(f"{file}: its tokenizer {model} does not exist; give its file with --tokenizer-model")
    if kind == "byte" or model is not None:
        yield TokenizerSpec(kind, model, eod).load()
    if type(vocab_size := flags.get("vocab_size")) is type(eod_id := flags.get("eod_id")) is int:  # of newer runs
        yield TokenIds(vocab_size, eod_id)
    for part in (part for words in corpora if words for part in parse_blend(words)):
        if index_file(Path(part.path)).is_file() and (own := open_prepared(Path(part.path)).tokenizer()):
            yield own
    load_sentencepiece()  # a missing library is an error of its own
    for trained in sorted(Path(cache).glob("tokenizer/*/tokenizer.model")):
        with suppress(UserError):  # a corrupted file in the cache; the next may be the run's
            if trained.is_file():
                yield SentencePieceTokenizer(trained)


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a `TokenizerSpec`."""
    add = parser.add_argument
    add("--tokenizer-type", choices=("auto", *TOKENIZER_TYPES), default="auto", help="default: the run's own tokenizer")
    add("--tokenizer-model", help="SentencePiece model or tokenizer.json; default: the run's own")
    add("--tokenizer-eod", metavar="TOKEN", help="token of a tokenizer.json that ends a document")


def find_tokenizer(checkpoint: Path, metadata: dict[str, Any], flags: TokenizerSpec) -> Tokenizer:
    """Return the tokenizer that the model was trained with: the one that flags name, else the run's.

    Args:
        metadata: of the checkpoint.

    Raises:
        UserError: no tokenizer with the checkpoint's fingerprint.
    """
    file = find_config(checkpoint)
    found: Iterable[Tokenizer] = [flags.load()] if flags.is_named else read_run_tokenizers(file)
    for tokenizer in found:
        if tokenizer.fingerprint == metadata.get("tokenizer", "unknown"):
            if metadata.get("--bos"):
                tokenizer.begin_with_bos()
            return tokenizer
    raise UserError(
        f"--load {checkpoint}: its tokenizer is not that of {'the flags' if flags.is_named else file}; "
        "give --tokenizer-model, or --tokenizer-type byte"
    )


def read_model_config(checkpoint: Path, metadata: dict[str, Any]) -> GPTConfig:
    """Return the shape of the model that a checkpoint's metadata describe.

    Raises:
        UserError: they describe none, or one of another size than the checkpoint's tensors.
    """
    values = {key.removeprefix("model "): value for key, value in metadata.items() if key.startswith("model ")}
    try:
        config = GPTConfig(**values)
        for field in fields(GPTConfig):
            value, lowest = getattr(config, field.name), 1 if field.default is MISSING else 0
            if type(value) not in KINDS[str(field.type)] or (type(value) is int and value < lowest):
                raise TypeError(f"{field.name} is {short_repr(value)}")
            if field.type == "float":  # JSON may write one as an integer of any length
                config = replace(config, **cast(dict[str, Any], {field.name: float(value)}))
        if config.rope_scaling not in ROPE_SCALINGS:
            raise TypeError(f"rope_scaling is {short_repr(config.rope_scaling)}")
    except (TypeError, OverflowError) as error:
        raise UserError(f"--load {checkpoint}: its run.json does not describe a model ({error})") from error
    stored = SafeReader(checkpoint).read_metadata().state_dict_metadata
    numbers = sum(cast(TensorStorageMetadata, x).size.numel() for name, x in stored.items() if name[:6] == "model.")
    if numbers != count_parameters(config):
        wanted = f"{count_parameters(config):,} numbers, its tensors hold {numbers:,}"
        raise UserError(f"--load {checkpoint}: its run.json describes a model of {wanted}")
    return config


def load_model(checkpoint: Path, metadata: dict[str, Any], device: torch.device, dtype: torch.dtype) -> GPT:
    """Load the whole model on this device, from a checkpoint of any layout.

    Raises:
        UserError: a corrupted checkpoint, or metadata that do not describe a model.
    """
    config = read_model_config(checkpoint, metadata)
    grid = build_grid(GridSizes())
    options = GPTOptions(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.device(device):
        model = GPT(config, attention=CachedAttention(), cp_group=grid.group("cp"), options=options)
    load_checkpoint(checkpoint, model, None, grid)
    model.compute_dtype = dtype
    return model.to(dtype).eval()


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse and check the flags."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--load", type=Path, required=True, help="a run's folder, a folder of checkpoints, or one checkpoint")
    add("--prompt", action="append", default=[], help="text to continue; may be given several times")
    add("--tokens", type=int, default=64, help="most tokens added to each prompt")
    add("--temperature", type=float, default=0.8, help="0: always the most likely token")
    add("--greedy", dest="temperature", action="store_const", const=0.0, help="the same as --temperature 0")
    add("--top-p", type=float, default=1.0, help="draw from the fewest tokens that are together so likely; 1: all")
    add("--seed", type=int, default=1234, help="seed of the draws, the same for each prompt")
    add("--dtype", choices=COMPUTE_DTYPES, default="fp32", help="dtype of the computation")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    add_tokenizer_flags(parser)
    args = parser.parse_args(argv)
    for flag, value, is_legal, legal in (
        ("--tokens", args.tokens, args.tokens >= 1, "at least 1"),
        ("--temperature", args.temperature, 0 <= args.temperature < float("inf"), "0 or more"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "above 0 and at most 1"),
    ):
        if not is_legal:
            raise UserError(f"{flag} {value}: must be {legal}")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    checkpoint = find_run_checkpoint(args.load)
    metadata = read_run_metadata(checkpoint)
    named = TokenizerSpec(args.tokenizer_type, args.tokenizer_model, args.tokenizer_eod)
    tokenizer = find_tokenizer(checkpoint, metadata, named)
    kind = ("cuda" if cuda_device_count() else "cpu") if args.device == "auto" else args.device
    device, _ = initialise_distributed(Launch(), kind, timeout=timedelta(minutes=10))
    model = load_model(checkpoint, metadata, device, COMPUTE_DTYPES[args.dtype])
    draws = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    for prompt in args.prompt or [""]:
        try:
            ids = tokenizer.encode_prompt(prompt)
        except UnencodableText as error:
            raise UserError(f"--prompt {error}") from error
        limit, length = metadata.get("--seq-length"), len(ids) + args.tokens
        if isinstance(limit, int) and length > limit:
            print(f"{length} tokens with the prompt; the model was trained on --seq-length {limit}", file=sys.stderr)
        added = continue_text(model, ids, tokens=args.tokens, eod=tokenizer.eod, **draws)
        print(tokenizer.decode([*ids, *added]), flush=True)  # decoded alone, the new ids may lose a space
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
