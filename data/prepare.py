"""Tokenize text once, into a corpus that train.py reads: `<prefix>.bin` and `<prefix>.idx`, Megatron-LM's format.

    python -m data.prepare --input 'corpus/*.jsonl.zst' --output-prefix data/web --tokenizer-model spm.model
    python -m data.prepare train-tokenizer --input 'corpus/*.jsonl.zst' --output spm.model --vocab-size 32000
    python -m data.prepare stats data/web

The main process reads records and writes tokens in order; workers decode and tokenize (data/encode.py), so the files do
not depend on their number. Progress is saved every few seconds (data/corpus_writer.py); the same command resumes from
there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.corpus_writer import (
    SHOWN,
    CorpusWriter,
    Progress,
    is_written_by_prepare,
    model_copy,
    output_files,
    refuse_overwriting,
)
from data.encode import encode_in_order, read_record_batches
from data.files import LeftOut, describe_left_out, drop_empty, file_size, is_remote, match_files, unique_files
from data.indexed_dataset import token_dtype
from data.readers import FORMATS, BadRecord, FileOffset
from data.sources import BOS, EOD, TextSource, metadata_file, train_model
from data.tokenizer import TOKENIZER_TYPES, Tokenizer, TokenizerSpec
from utils.errors import OneLineParser, UserError, run_tool
from utils.files import cache_key, replace_synced

SAVE_EVERY = 5.0  # seconds
Options = TypeVar("Options")


# ---------------------------------------------------------------------------------------------------
# Options


def new_parser(description: str, command: str = "", epilog: str = "") -> OneLineParser:
    prog = f"python -m data.prepare {command}".rstrip()
    return OneLineParser(prog=prog, allow_abbrev=False, description=description, epilog=epilog)


def option(help: str, default: Any = MISSING, **argument: Any) -> Any:
    """A dataclass field that is a flag. Args: argument, of `add_argument`; without a default the flag is required."""
    return field(default=default, metadata={"help": help, **argument})


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds the flag of each field: `--json-key` for `json_key`."""
    for f in fields(options):
        default = {"required": True} if f.default is MISSING else {"default": f.default}
        parser.add_argument(f"--{f.name.replace('_', '-')}", **default, **f.metadata)


def parse_options(options: type[Options], parser: OneLineParser, words: Sequence[str]) -> Options:
    parser.refuse_repeated_lists(words)
    values = vars(parser.parse_args(words))
    return options(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Which files are read, and how."""

    input: tuple[str, ...] = option(
        "files, folders, patterns such as 'corpus/*.jsonl.gz' (quoted) or URLs such as s3://bucket/web; read in the "
        "order of their names",
        nargs="+",
        metavar="PATTERN",
    )
    json_key: str = option(
        "field of a JSONL record, or Parquet column, that holds the text; meta.text: text within meta; default: text",
        "text",
    )
    on_error: str = option(
        "at a bad record (broken JSON, no text, not UTF-8): stop and name it (default); or count it and continue",
        "stop",
        choices=("stop", "skip"),
    )
    format: str = option(
        "of every file; auto (default): by name, else by the first line", "auto", choices=("auto", *FORMATS)
    )


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(InputOptions):
    """Options of the main command."""

    output_prefix: str = option("writes P.bin, P.idx, P.json and a copy of the tokenizer's model", metavar="P")
    tokenizer_type: str = option(
        "byte: UTF-8 bytes, no model; auto (default): by the name of --tokenizer-model",
        "auto",
        choices=("auto", *TOKENIZER_TYPES),
    )
    tokenizer_model: str | None = option("SentencePiece model, tokenizer.json, or GPT-2's vocab.json", None)
    tokenizer_eod: str | None = option(
        "of a tokenizer.json: the token that ends a document; default: a usual one", None, metavar="TOKEN"
    )
    bos: bool = option(
        "begin each document with the tokenizer's BOS token; default: off", False, action=argparse.BooleanOptionalAction
    )
    append_eod: bool = option(
        "end each document with the end-of-document token, which a model must learn to stop at; default: on, as for "
        "text that train.py reads",
        True,
        action=argparse.BooleanOptionalAction,
    )
    workers: int = option(
        "processes that tokenize; 0: the main process does; default: all cores", len(os.sched_getaffinity(0)), type=int
    )
    overwrite: bool = option(
        "replace a finished corpus, or an unfinished one of other inputs; default: refuse", False, action="store_true"
    )


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerOptions(InputOptions):
    """Options of `train-tokenizer`."""

    output: str = option("the model file", metavar="M.model")
    vocab_size: int = option("pieces of the model", type=int)
    bos: bool = option("give the model a BOS piece, for documents with --bos; default: off", False, action="store_true")
    input_sentence_size: int = option(
        "parts of the text, of about 1000 characters, to hold in memory and train on; of more, N are drawn at random, "
        "the same ones each time; 0: all; default: 500000",
        500_000,
        type=int,
        metavar="N",
    )


def build_parser() -> OneLineParser:
    """The main command's parser, which makes `PrepareOptions`."""
    parser = new_parser(
        "Tokenize documents into <prefix>.bin and <prefix>.idx. One document is a JSONL record, a Parquet row or a "
        "text file, each file plain, .gz, .zst, .bz2 or .xz. The same command resumes where it was stopped.",
        epilog="also: python -m data.prepare train-tokenizer --help; python -m data.prepare stats --help",
    )
    add_options(parser, PrepareOptions)
    return parser


# ---------------------------------------------------------------------------------------------------
# The main command


def find_inputs(options: InputOptions, outputs: Collection[Path] = ()) -> TextSource:
    """The files that `--input` names, once each, in the order of patterns and names.

    Args:
        outputs: resolved files and folders that folders and patterns do not stand for.

    Raises:
        UserError: a pattern matches no file.
    """

    def without_outputs(names: list[str]) -> list[str]:
        return [name for name in names if not {(at := Path(name).resolve()), *at.parents}.intersection(outputs)]

    files: list[str] = []
    left_out: LeftOut = {}
    for pattern in options.input:
        found = match_files(pattern, left_out)
        if outputs and not os.path.isfile(pattern):
            found = without_outputs(found)
        if not found:
            beside = f"; left out: {describe_left_out(left_out)}" if left_out else ""
            raise UserError(f"--input {pattern}: no such file, and nothing in it to read{beside}")
        files += found
    files = drop_empty(unique_files(files), left_out)
    left_out = {kind: kept for kind, names in left_out.items() if (kept := without_outputs(names))}
    kind = None if options.format == "auto" else options.format
    return TextSource(" ".join(options.input), tuple(files), options.json_key, kind, "--input", left_out)


def _check_options(options: PrepareOptions) -> None:
    prefix = Path(options.output_prefix)
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: must be 0 or more")
    if is_remote(options.output_prefix):
        raise UserError(f"--output-prefix {prefix}: must be a local path; train.py maps the files into memory")
    if options.output_prefix.endswith((os.sep, f"{os.sep}.")) or prefix.name in ("", ".."):
        raise UserError(
            f"--output-prefix {options.output_prefix}: is a folder; say how the files' names begin, as in "
            f"{prefix / 'corpus'}"
        )


@contextmanager
def _progress_bar(total: int, done: int) -> Iterator[Any]:
    """A bar over stored bytes of the inputs, on stderr; a line every ten seconds where stderr is a file."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own: workers are forked
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total, initial=done, unit="B", unit_scale=True, mininterval=interval, miniters=1, dynamic_ncols=True
    ) as bar:
        yield bar


def prepare(options: PrepareOptions) -> Progress:
    """Tokenizes the inputs into the corpus of the output prefix, or resumes an unfinished one.

    Raises:
        UserError: a refusal in one line.
        BadRecord: with `--on-error stop`.
    """
    _check_options(options)
    prefix = Path(options.output_prefix)
    spec = TokenizerSpec(options.tokenizer_type, options.tokenizer_model, options.tokenizer_eod, options.bos)
    tokenizer = spec.load()
    if tokenizer.change:
        print(f"--tokenizer-model {spec.model} changes text: {tokenizer.change}", file=sys.stderr)
    model = Path(spec.model) if spec.model else None
    # Outputs of an earlier run in a folder of inputs are no inputs; a user's file under such a name is one, and is
    # refused.
    outputs = set(output_files(prefix, model)[3:])
    if is_written_by_prepare(prefix):
        outputs = {*output_files(prefix, model), Path(f"{prefix}.lengths.png").resolve()}
    source = find_inputs(options, outputs)
    refuse_overwriting(prefix, model, source.files, overwrite=options.overwrite)
    # Without --on-error: a run that a bad record stopped resumes with skip.
    key = cache_key(
        version=2,
        source=source.cache_facts(),
        kinds=source.kinds,
        tokenizer=tokenizer.fingerprint,
        append_eod=options.append_eod,
        **({"bos": True} if options.bos else {}),
    )
    prefix.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    writer = CorpusWriter(prefix, dtype=dtype, key=key, overwrite=options.overwrite)
    if writer.progress.file or writer.progress.number:
        print(f"resuming after {writer.progress.documents:,} documents", file=sys.stderr)
    write_tokens(writer, source, spec, options)
    progress = writer.progress
    if progress.tokens == progress.documents * (options.append_eod + options.bos):
        writer.discard()
        what = f"no token in its {progress.documents} documents" if progress.documents else "no document in it"
        raise UserError(f"--input {source.name}: {what} ({progress.empty} empty, {progress.bad} bad)")
    metadata = _describe_corpus(progress, source, spec, tokenizer, prefix, options.append_eod)
    writer.finish(metadata, model, tokenizer.content)
    return progress


def write_tokens(writer: CorpusWriter, source: TextSource, tokenizer: TokenizerSpec, options: PrepareOptions) -> None:
    """Adds the tokens of all records from the writer's progress on; whatever ends it, the progress is saved.

    Raises:
        BadRecord: with `--on-error stop`.
    """
    progress, is_strict = writer.progress, options.on_error == "stop"
    start = saved = time.monotonic()
    sizes = [file_size(file) for file in source.files]
    try:
        offset = FileOffset(progress.offset, progress.number)
        batches = read_record_batches(source, progress.file, offset, skip_bad=not is_strict)
        encoded = encode_in_order(batches, tokenizer, source, append_eod=options.append_eod, workers=options.workers)
        with _progress_bar(sum(sizes), sum(sizes[: progress.file])) as bar, closing(encoded):
            for batch, tokens in encoded:
                if tokens.bad and is_strict:
                    raise tokens.bad[0]
                writer.add(batch, tokens)
                now, done = time.monotonic(), writer.progress.documents
                speed = (done - progress.documents) / (now - start)
                bar.set_postfix_str(f"{done:,} docs, {speed:,.0f} docs/s", refresh=False)
                bar.update(max(0, batch.consumed - bar.n))
                if now - saved > SAVE_EVERY:
                    writer.save()
                    saved = now
    except BaseException:
        writer.save()
        writer.close()
        raise


def _describe_corpus(
    progress: Progress, source: TextSource, spec: TokenizerSpec, tokenizer: Tokenizer, prefix: Path, append_eod: bool
) -> dict[str, Any]:
    """The metadata of `<prefix>.json`, without the checksums."""
    return {
        "made by": "data.prepare, format 1",
        "documents": progress.documents,
        "tokens": progress.tokens,
        "text_bytes": progress.text_bytes,
        "empty_records": progress.empty,
        "bad_records": progress.bad,
        "first_bad_records": progress.shown,
        "append_eod": append_eod,
        BOS: tokenizer.bos,
        EOD: tokenizer.eod if append_eod else None,
        "inputs": list(source.files),
        "left_out": {kind: {"count": len(names), "first": names[:100]} for kind, names in source.left_out.items()},
        "tokenizer": {
            "type": tokenizer.kind,
            "model": model_copy(prefix, Path(spec.model)).name if spec.model else None,
            "eod": spec.eod,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
    }


# ---------------------------------------------------------------------------------------------------
# The command line


def _prepare_command(words: Sequence[str]) -> None:
    options = parse_options(PrepareOptions, build_parser(), words)
    start = time.monotonic()
    progress = prepare(options)
    seconds = time.monotonic() - start
    metadata = json.loads(metadata_file(Path(options.output_prefix)).read_text("utf-8"))
    bos, eod = metadata[BOS], metadata[EOD]
    ends = "without an end-of-document token" if eod is None else f"each ends with end-of-document token {eod}"
    ends = ends if bos is None else f"each begins with BOS token {bos}, {ends}"
    print(
        f"{options.output_prefix}.bin, .idx: {progress.documents:,} documents ({ends}), {progress.tokens:,} tokens of "
        f"{progress.text_bytes:,} bytes of text ({progress.text_bytes / progress.tokens:.2f} bytes a token), "
        f"{progress.empty:,} empty and {progress.bad:,} bad records left out, in {seconds:.1f} s"
    )
    for line in progress.shown:
        print(f"  left out: {line}")
    for kind, names in metadata["left_out"].items():
        print(f"  left out: {names['count']:,} {kind}, first {names['first'][0]}")


def _train_tokenizer_command(words: Sequence[str]) -> None:
    parser = new_parser("Train a SentencePiece BPE model with byte fallback.", "train-tokenizer")
    add_options(parser, TrainTokenizerOptions)
    options = parse_options(TrainTokenizerOptions, parser, words)
    if options.input_sentence_size < 0 or 0 < options.input_sentence_size <= 100:
        raise UserError(
            f"--input-sentence-size {options.input_sentence_size}: must be 0 or above 100, SentencePiece's least; "
            "nearest 101"
        )
    output = Path(options.output)
    if output.exists():
        raise UserError(f"--output {output}: exists already")
    bad: list[BadRecord] = []
    source = find_inputs(options)
    model = train_model(
        source,
        vocab_size=options.vocab_size,
        flag="--vocab-size",
        skip=bad.append if options.on_error == "skip" else None,
        input_sentence_size=options.input_sentence_size,
        has_bos=options.bos,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_synced(output, model)
    print(f"{output}: {options.vocab_size} pieces; {len(bad)} bad records left out")
    for error in bad[:SHOWN]:
        print(f"  left out: {error}")
    if source.left_out:
        print(f"  left out: {describe_left_out(source.left_out)}")


def main(words: Sequence[str]) -> int:
    """Runs a command. Returns 0; 2 after a refusal, one line on stderr; 130 after Ctrl-C."""
    try:
        if words[:1] == ["train-tokenizer"]:
            _train_tokenizer_command(words[1:])
        elif words[:1] == ["stats"]:
            from data.statistics import stats_command

            stats_command(words[1:], new_parser("What is in a corpus, and what packing makes of it.", "stats"))
        else:
            _prepare_command(words)
    except (BadRecord, ValueError, OSError) as error:
        print(f"data.prepare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data.prepare: stopped; the same command resumes from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
