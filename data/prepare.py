"""Tokenize text once, into a corpus that train.py reads: `<prefix>.bin` and `<prefix>.idx`, Megatron-LM's format.

    python -m data.prepare --input 'corpus/*.jsonl.zst' --output-prefix data/web --tokenizer-model spm.model --append-eod
    python -m data.prepare train-tokenizer --input 'corpus/*.jsonl.zst' --output spm.model --vocab-size 32000
    python -m data.prepare stats data/web

The main process reads records in order and writes tokens in order; workers parse and tokenize in between. So the files do not
depend on their number. What is written so far is told in `<prefix>.part/progress.json` every few seconds; the same command goes
on from there. `<prefix>.idx` appears last, by a rename: where it is, the corpus is whole.
"""

from __future__ import annotations

import argparse
import fcntl
import filecmp
import glob
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from data.corpus import Source
from data.indexed_dataset import LONGEST_DOCUMENT, index_file, token_dtype, token_file, write_index
from data.readers import FORMATS, BadRecord, Place, Record, each_once, files_under, read_records, text_of
from data.sources import facts_file, train_on
from data.tokenizer import NUM_THREADS, TOKENIZER_TYPES, Tokenizer, load_tokenizer, resolve_tokenizer_type
from utils.errors import UserError
from utils.files import cache_key, checksum, replace_synced, sync

BATCH_BYTES = 1 << 19  # what a worker is given at a time
RECORD_BYTES = 100  # what a record takes beside its content, were it empty
SHOWN = 5  # bad records that are shown
SAVE_EVERY = 5.0  # seconds


# ---------------------------------------------------------------------------------------------------
# In the workers


@dataclass(frozen=True)
class TokenizerChoice:
    """How a process loads the tokenizer."""

    type: str
    model: str | None
    eod: str | None

    def load(self) -> Tokenizer:
        return load_tokenizer(self.type, self.model, self.eod)


@dataclass(frozen=True)
class Task:
    """Records in order, and where reading goes on behind them.

    Attributes:
        records: (number of the file, record).
        bad: (number of the file, line, why) of files that could not be read to their end.
        file, place: what is read next.
        consumed: bytes of all files, as they lie on disk, up to there.
    """

    records: list[tuple[int, Record]]
    bad: list[tuple[int, int, str]]
    file: int
    place: Place
    consumed: int


@dataclass(frozen=True)
class Tokens:
    """A task's tokens. Attributes: lengths of its documents; empty, records without text; bad, as `Task`'s; text_bytes of UTF-8."""

    tokens: bytes
    lengths: np.ndarray
    empty: int
    bad: list[tuple[int, int, str]]
    text_bytes: int


class Encoder:
    """Makes tokens of records; one in each worker."""

    def __init__(
        self, choice: TokenizerChoice, files: Sequence[str], kinds: Sequence[str], json_key: str, append_eod: bool
    ) -> None:
        self.tokenizer, self.files, self.kinds, self.json_key = choice.load(), files, kinds, json_key
        self.dtype = np.dtype(token_dtype(self.tokenizer.vocab_size))
        self.end = np.array([self.tokenizer.eod] if append_eod else [], np.int32)

    def __call__(self, task: Task) -> Tokens:
        places, texts, bad, empty = [], [], list(task.bad), 0
        for file, record in task.records:
            try:
                text = text_of(self.files[file], record, kind=self.kinds[file], json_key=self.json_key)
            except BadRecord as error:
                bad.append((file, record.number, error.why))
                continue
            if text:
                places.append((file, record.number))
                texts.append(text)
            else:
                empty += 1
        parts, lengths, size = [], [], 0
        for place, text, ids in zip(places, texts, self.tokenizer.encode_batch(texts), strict=True):
            length = len(ids) + len(self.end)
            if length > LONGEST_DOCUMENT:
                bad.append((*place, f"has {length} tokens; the format ends at {LONGEST_DOCUMENT} a document"))
                continue
            parts += [ids, self.end]
            lengths.append(length)
            size += len(text.encode())
        tokens = np.concatenate(parts).astype(self.dtype).tobytes() if parts else b""
        return Tokens(tokens, np.array(lengths, np.int32), empty, sorted(bad), size)


_encoder: Encoder | None = None  # a worker's own


def _start_worker(parent: int, *options: Any) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _encoder = Encoder(*options)


def _end_with(parent: int) -> None:
    """A worker whose parent was killed waits for work for ever: nothing tells it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _encode(task: Task) -> Tokens:
    assert _encoder is not None
    return _encoder(task)


def _in_order(tasks: Iterator[Task], workers: int, options: tuple) -> Generator[tuple[Task, Tokens], None, None]:
    """Each task with its tokens, in the tasks' order; a few are under way at a time.

    Raises:
        ValueError: a worker died.
    """
    if not workers:
        encoder = Encoder(*options)
        for task in tasks:
            yield task, encoder(task)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(), *options))
    under_way: deque[tuple[Task, Future[Tokens]]] = deque()
    try:
        for task in tasks:
            under_way.append((task, pool.submit(_encode, task)))
            if len(under_way) > 2 * workers + 1:
                first, future = under_way.popleft()
                yield first, future.result()
        while under_way:
            first, future = under_way.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker died ({error}); out of memory? The same command goes on from where it was"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------
# Reading


def _tasks(source: Source, progress: Progress, on_error: str) -> Iterator[Task]:
    """The records from where `progress` stands, in pieces of about `BATCH_BYTES`."""
    records: list[tuple[int, Record]] = []
    bad: list[tuple[int, int, str]] = []
    size = consumed = 0
    for number in range(len(source.files)):
        file, place = source.files[number], Place()
        bytes_before, consumed = consumed, consumed + file.stat().st_size
        if number < progress.file:
            continue
        if number == progress.file:
            place = Place(progress.offset, progress.number)
        try:
            for record in read_records(file, kind=source.kinds[number], json_key=source.json_key, start=place):
                records.append((number, record))
                size += len(record.content or b"") + RECORD_BYTES
                if size >= BATCH_BYTES:
                    yield Task(
                        records, bad, number, Place(record.end, record.number or 1), bytes_before + record.consumed
                    )
                    records, bad, size = [], [], 0
        except BadRecord as error:  # the rest of the file cannot be had
            if on_error == "stop":
                raise
            bad.append((number, error.number, error.why))
    yield Task(records, bad, len(source.files), Place(), consumed)


@dataclass(frozen=True)
class Progress:
    """How far a corpus is. Attributes: file, offset, number: where reading goes on; the rest counts what is written."""

    file: int = 0
    offset: int = 0
    number: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    bad: int = 0
    shown: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------
# Writing


def model_copy(prefix: Path, model: Path) -> Path:
    """Where the tokenizer's model is copied to."""
    return prefix.parent / f"{prefix.name}.tokenizer{model.suffix}"


def is_ours(prefix: Path) -> bool:
    """Whether `<prefix>.json` says that data.prepare wrote it."""
    try:
        facts = json.loads(facts_file(prefix).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and str(facts.get("made by", "")).startswith("data.prepare")


class Corpus:
    """`<prefix>` on its way: tokens and lengths in `<prefix>.part/`, and how far they are.

    Raises:
        ValueError: it exists already, another process is at it, or what lies there was begun from other inputs or is broken.
    """

    def __init__(self, prefix: Path, *, dtype: np.dtype, key: str, overwrite: bool) -> None:
        self.prefix, self.dtype, self.key = prefix, dtype, key
        self.folder = Path(f"{prefix}.part")
        self.files = {name: self.folder / name for name in ("tokens", "lengths", "progress.json", "lock")}
        if index_file(prefix).exists() and not overwrite:
            raise UserError(
                f"--output-prefix {prefix}: {index_file(prefix)} is there already; --overwrite makes it anew"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = self.files["lock"].open("w")
        try:
            fcntl.lockf(
                self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # of this process alone: forked workers do not hold it
        except OSError as error:
            raise UserError(f"--output-prefix {prefix}: another process is writing it") from error
        self.progress = self._begun(overwrite)
        self.outputs: dict[str, BinaryIO] = {}
        for name, size in self._sizes(self.progress).items():
            self.outputs[name] = self.files[name].open("ab")
            self.outputs[name].truncate(size)  # what was written after the last time it was told

    def _sizes(self, progress: Progress) -> dict[str, int]:
        return {"tokens": progress.tokens * self.dtype.itemsize, "lengths": progress.documents * 4}

    def _begun(self, overwrite: bool) -> Progress:
        try:
            progress = self._told()
        except ValueError as error:
            if not overwrite:
                raise UserError(f"{error}; --overwrite starts over") from error
            progress = None
        if progress is not None:
            return progress
        for name in ("tokens", "lengths", "progress.json"):
            self.files[name].unlink(missing_ok=True)
        return Progress()

    def _told(self) -> Progress | None:
        """How far an earlier run came; None where nothing was begun, or a finished run left its folder behind.

        Raises:
            ValueError: it was begun from other inputs, or what lies there is broken.
        """
        file = self.files["progress.json"]
        try:
            said = json.loads(file.read_text("utf-8"))
            key, progress = said["key"], Progress(**said["progress"])
            sizes = self._sizes(progress)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: does not say how far the run came ({type(error).__name__})") from error
        if key != self.key:
            raise UserError(f"--output-prefix {self.prefix}: {self.folder} was begun from other inputs or flags")
        final = token_file(self.prefix)
        if not self.files["tokens"].exists():
            if index_file(self.prefix).exists() or not final.exists() or final.stat().st_size != sizes["tokens"]:
                return None
            os.replace(final, self.files["tokens"])  # it ended between its last two renames
        for name, size in sizes.items():
            held = self.files[name].stat().st_size if self.files[name].exists() else 0
            if held < size:
                raise UserError(f"{self.files[name]}: {held} bytes, fewer than the {size} that {file.name} says")
        return progress

    def add(self, task: Task, tokens: Tokens, bad: Sequence[str] = ()) -> None:
        """Write a task's tokens, then count them: whatever interrupts it in between, `save` tells of whole tasks.

        Args:
            bad: the task's bad records, in words.
        """
        self.outputs["tokens"].write(tokens.tokens)
        self.outputs["lengths"].write(tokens.lengths.tobytes())
        so_far = self.progress
        self.progress = Progress(
            file=task.file,
            offset=task.place.offset,
            number=task.place.number,
            documents=so_far.documents + len(tokens.lengths),
            tokens=so_far.tokens + len(tokens.tokens) // self.dtype.itemsize,
            text_bytes=so_far.text_bytes + tokens.text_bytes,
            empty=so_far.empty + tokens.empty,
            bad=so_far.bad + len(bad),
            shown=[*so_far.shown, *bad][:SHOWN],
        )

    def save(self) -> None:
        """Tell how far it is, after what was written is on disk."""
        for out in self.outputs.values():
            out.flush()
            os.fsync(out.fileno())
        replace_synced(self.files["progress.json"], json.dumps({"key": self.key, "progress": asdict(self.progress)}))

    def finish(self, facts: dict[str, Any], model: Path | None) -> None:
        """Put the files in their places, the index last."""
        self.save()
        for out in self.outputs.values():
            out.close()
        index, final = self.folder / "index", index_file(self.prefix)
        lengths = np.memmap(self.files["lengths"], np.int32, "r") if self.progress.documents else np.empty(0, np.int32)
        with index.open("wb") as out:
            write_index(out, lengths, self.dtype)
        sync(index)
        tokens = self.files["tokens"] if self.files["tokens"].exists() else token_file(self.prefix)
        facts = facts | {"checksums": {"bin": checksum(tokens), "idx": checksum(index)}}
        final.unlink(missing_ok=True)  # an older corpus ends here, before its tokens do
        if model is not None:
            copy = self.folder / "model"
            shutil.copyfile(model, copy)
            sync(copy)
            os.replace(copy, model_copy(self.prefix, model))
        replace_synced(facts_file(self.prefix), json.dumps(facts, indent=1) + "\n")
        os.replace(self.files["tokens"], token_file(self.prefix))
        os.replace(index, final)
        sync(self.prefix.parent)
        self.close()
        shutil.rmtree(self.folder)

    def close(self) -> None:
        for out in self.outputs.values():
            out.close()
        self.lock.close()


# ---------------------------------------------------------------------------------------------------
# The commands


class _Parser(argparse.ArgumentParser):
    """argparse without the page of usage in front of an error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATTERN",
        help="files, folders or patterns such as 'corpus/*.jsonl.gz' (quoted); read in the order of their names",
    )
    parser.add_argument(
        "--json-key", default="text", help="field of a JSONL record, or Parquet column, that holds the text"
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a record that is no document (broken JSON, no text, not UTF-8): stop and name it; or count it and go on",
    )
    parser.add_argument(
        "--format",
        choices=("auto", *FORMATS),
        default="auto",
        help="of every file; auto: by name, else by the first line",
    )


def build_parser() -> argparse.ArgumentParser:
    """Of the main command: text into a corpus."""
    parser = _Parser(
        prog="python -m data.prepare",
        allow_abbrev=False,
        description="Tokenize documents into <prefix>.bin and <prefix>.idx. One document is a JSONL record, a Parquet row or a text file, "
        "each file plain, .gz or .zst. The same command goes on where it was stopped.",
        epilog="also: python -m data.prepare train-tokenizer --help; python -m data.prepare stats --help",
    )
    _add_inputs(parser)
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="P",
        help="writes P.bin, P.idx, P.json and a copy of the tokenizer's model",
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=("auto", *TOKENIZER_TYPES),
        default="auto",
        help="byte: UTF-8 bytes, no model; auto: by the name of --tokenizer-model",
    )
    parser.add_argument("--tokenizer-model", help="SentencePiece model, or a Hugging Face tokenizer.json")
    parser.add_argument(
        "--tokenizer-eod",
        metavar="TOKEN",
        help="of a tokenizer.json: the token that ends a document; default: a usual one",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="end each document with the end-of-document token, which a model must learn to stop at",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenize; 0: none; default: all cores",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make a corpus anew that is there, or was begun from other inputs"
    )
    return parser


def find_inputs(patterns: Sequence[str], *, json_key: str, kind: str, leave_out: Collection[Path] = ()) -> Source:
    """The files that patterns match, each once, in the order of patterns and names.

    Args:
        leave_out: files and folders, resolved, that count only where they are named themselves.

    Raises:
        ValueError: a pattern without a file.
    """
    files: list[Path] = []
    for pattern in patterns:
        found = []
        if Path(pattern).is_file():
            found = [Path(pattern)]
        else:
            matched = (
                [Path(pattern)]
                if Path(pattern).exists()
                else [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
            )
            for path in matched:
                found += files_under(path) if path.is_dir() else [path]
            if leave_out:
                found = [path for path in found if not {(at := path.resolve()), *at.parents}.intersection(leave_out)]
        if not found:
            raise UserError(f"--input {pattern}: no such file, and nothing in it to read")
        files += found
    return Source(" ".join(patterns), tuple(each_once(files)), json_key, None if kind == "auto" else kind, "--input")


def _output_files(prefix: Path, model: Path | None) -> list[Path]:
    """What a run writes, resolved; the last is a folder."""
    copy = [] if model is None else [model_copy(prefix, model)]
    return [
        path.resolve()
        for path in (token_file(prefix), index_file(prefix), facts_file(prefix), *copy, Path(f"{prefix}.part"))
    ]


def _refuse_to_replace(files: Sequence[Path], model: Path | None, prefix: Path, *, overwrite: bool) -> None:
    """Raises ValueError if what is read would be written over, or, without --overwrite, files that data.prepare did not write."""
    written = _output_files(prefix, model)
    for flag, path in (*(("--input", f) for f in files), *([("--tokenizer-model", model)] if model else [])):
        real = path.resolve()
        if {real, *real.parents}.intersection(written):
            raise UserError(f"--output-prefix {prefix}: would write over {flag} {path}; choose another prefix")
    if overwrite or is_ours(prefix):
        return
    for path in written[:-1]:
        copied = (
            path not in written[:3] and model is not None and path.exists() and filecmp.cmp(path, model, shallow=False)
        )
        if path.exists() and not copied:
            raise UserError(
                f"--output-prefix {prefix}: {path.name} is there already, and not by data.prepare; --overwrite replaces it"
            )


@contextmanager
def _bar(total: int, done: int) -> Iterator[Any]:
    """A progress bar over bytes of the inputs as they lie on disk, on stderr; a line every ten seconds where that is a file."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own: workers are forked
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total, initial=done, unit="B", unit_scale=True, mininterval=interval, miniters=1, dynamic_ncols=True
    ) as bar:
        yield bar


def prepare(args: argparse.Namespace) -> Progress:
    """Run the main command.

    Raises:
        ValueError: what cannot be done, in one line.
        BadRecord: with `--on-error stop`.
    """
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: must be 0 or more")
    prefix = Path(args.output_prefix)
    if args.output_prefix.endswith((os.sep, f"{os.sep}.")) or prefix.name in ("", ".."):
        raise UserError(
            f"--output-prefix {args.output_prefix}: is a folder; say how the files' names begin, as in {prefix / 'corpus'}"
        )
    if args.tokenizer_type != "byte" and args.tokenizer_model is None:
        raise UserError(
            "--tokenizer-model is missing (data.prepare train-tokenizer makes one), or give --tokenizer-type byte"
        )
    choice = TokenizerChoice(
        resolve_tokenizer_type(args.tokenizer_type, args.tokenizer_model), args.tokenizer_model, args.tokenizer_eod
    )
    tokenizer = choice.load()
    model = Path(choice.model) if choice.model else None
    # What an earlier run wrote into a folder of inputs is none of them; a file of the user's under such a name is, and is refused.
    written = _output_files(prefix, model)
    leave_out = {*written, Path(f"{prefix}.lengths.png").resolve()} if is_ours(prefix) else set(written[3:])
    source = find_inputs(args.input, json_key=args.json_key, kind=args.format, leave_out=leave_out)
    _refuse_to_replace(source.files, model, prefix, overwrite=args.overwrite)
    # Not of --on-error: who was stopped by a bad record goes on from there with skip.
    key = cache_key(
        version=2,
        source=source.made_from(),
        kinds=source.kinds,
        tokenizer=tokenizer.fingerprint,
        append_eod=args.append_eod,
    )
    prefix.parent.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(prefix, dtype=np.dtype(token_dtype(tokenizer.vocab_size)), key=key, overwrite=args.overwrite)
    progress = corpus.progress
    sizes = [file.stat().st_size for file in source.files]
    if progress.file or progress.number:
        print(f"goes on after {progress.documents:,} documents", file=sys.stderr)
    options = (choice, [str(f) for f in source.files], source.kinds, args.json_key, args.append_eod)
    start, saved, first = time.monotonic(), time.monotonic(), progress.documents
    try:
        encoded = _in_order(_tasks(source, progress, args.on_error), args.workers, options)
        with _bar(sum(sizes), sum(sizes[: progress.file])) as bar, closing(encoded):
            for task, tokens in encoded:
                bad = [BadRecord(str(source.files[file]), number, why) for file, number, why in tokens.bad]
                if bad and args.on_error == "stop":
                    raise bad[0]
                corpus.add(task, tokens, [str(error) for error in bad])
                now, done = time.monotonic(), corpus.progress.documents
                bar.set_postfix_str(f"{done:,} docs, {(done - first) / (now - start):,.0f} docs/s", refresh=False)
                bar.update(max(0, task.consumed - bar.n))
                if now - saved > SAVE_EVERY:
                    corpus.save()
                    saved = now
    except BaseException:
        corpus.save()
        corpus.close()
        raise
    progress = corpus.progress
    if not progress.tokens:
        corpus.close()
        shutil.rmtree(corpus.folder)
        what = f"no token in its {progress.documents} documents" if progress.documents else "no document in it"
        raise UserError(f"--input {source.name}: {what} ({progress.empty} empty, {progress.bad} bad)")
    facts = {
        "made by": "data.prepare, format 1",
        "documents": progress.documents,
        "tokens": progress.tokens,
        "text_bytes": progress.text_bytes,
        "empty_records": progress.empty,
        "bad_records": progress.bad,
        "first_bad_records": progress.shown,
        "append_eod": args.append_eod,
        "inputs": [str(f) for f in source.files],
        "tokenizer": {
            "type": choice.type,
            "model": model_copy(prefix, model).name if model else None,
            "eod": choice.eod,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
    }
    corpus.finish(facts, model)
    return progress


def _main_command(argv: Sequence[str]) -> None:
    args = build_parser().parse_args(argv)
    start = time.monotonic()
    progress = prepare(args)
    seconds = time.monotonic() - start
    print(
        f"{args.output_prefix}.bin, .idx: {progress.documents:,} documents, {progress.tokens:,} tokens of {progress.text_bytes:,} bytes "
        f"of text ({progress.text_bytes / progress.tokens:.2f} bytes a token), {progress.empty:,} empty and {progress.bad:,} bad records "
        f"left out, in {seconds:.1f} s"
    )
    for line in progress.shown:
        print(f"  left out: {line}")


def _train_command(argv: Sequence[str]) -> None:
    parser = _Parser(
        prog="python -m data.prepare train-tokenizer",
        allow_abbrev=False,
        description="Train a SentencePiece BPE model with byte fallback.",
    )
    _add_inputs(parser)
    parser.add_argument("--output", required=True, metavar="M.model", help="the model file")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces of the model")
    parser.add_argument(
        "--input-sentence-size",
        type=int,
        default=500_000,
        metavar="N",
        help="parts of the text, of about 1000 characters, that are held in memory and trained on; of more, N are drawn at random, the "
        "same ones each time; 0: all; default: 500000",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=NUM_THREADS,
        metavar="N",
        help=f"of loading; they change nothing but time; default: {NUM_THREADS}",
    )
    args = parser.parse_args(argv)
    if args.input_sentence_size < 0 or 0 < args.input_sentence_size <= 100:
        raise UserError(
            f"--input-sentence-size {args.input_sentence_size}: must be 0 or above 100, SentencePiece's least; nearest 101"
        )
    if args.threads < 1:
        raise UserError(f"--threads {args.threads}: must be 1 or more")
    if Path(args.output).exists():
        raise UserError(f"--output {args.output}: is there already")
    source = find_inputs(args.input, json_key=args.json_key, kind=args.format)
    bad: list[BadRecord] = []
    model = train_on(
        source,
        vocab_size=args.vocab_size,
        flag="--vocab-size",
        skip=bad.append if args.on_error == "skip" else None,
        input_sentence_size=args.input_sentence_size,
        num_threads=args.threads,
    )
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(f"{args.output}.part")
    scratch.write_bytes(model)
    os.replace(scratch, args.output)
    print(f"{args.output}: {args.vocab_size} pieces; {len(bad)} bad records left out")
    for error in bad[:SHOWN]:
        print(f"  left out: {error}")


def main(argv: Sequence[str]) -> int:
    """Run a command; 0, or 2 and one line on stderr, or 130 after Ctrl-C."""
    try:
        if argv[:1] == ["train-tokenizer"]:
            _train_command(argv[1:])
        elif argv[:1] == ["stats"]:
            from data.statistics import stats_command

            stats_command(argv[1:], _Parser)
        else:
            _main_command(argv)
    except (BadRecord, ValueError, OSError) as error:
        print(f"data.prepare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data.prepare: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
