"""The files of a corpus while data.prepare writes them: resumable, and never half a corpus under the final names.

`<prefix>.part/` holds tokens, lengths and progress.json. `<prefix>.idx` appears last, by a rename: where it is, the
corpus is whole.
"""

from __future__ import annotations

import fcntl
import filecmp
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.encode import EncodedBatch, RecordBatch
from data.indexed_dataset import index_file, token_file, write_index
from data.sources import metadata_file
from utils.errors import UserError
from utils.files import (
    checksum,
    is_trusted,
    name_file,
    open_new,
    open_regular,
    parse_json,
    read_text,
    replace_synced,
    sync,
    write_synced,
)
from utils.names import redact

SHOWN = 5  # bad records that are shown


def model_copy(prefix: Path, model: Path) -> Path:
    """Where the tokenizer's model is copied to."""
    return prefix.parent / f"{prefix.name}.tokenizer{model.suffix}"


def is_written_by_prepare(prefix: Path) -> bool:
    """Whether `<prefix>.json` names data.prepare as its writer."""
    try:
        metadata = parse_json(read_text(metadata_file(prefix).resolve()))
    except (OSError, ValueError):
        return False
    return isinstance(metadata, dict) and str(metadata.get("made by", "")).startswith("data.prepare")


@dataclass(frozen=True)
class Progress:
    """How far a corpus is. Attributes: file, offset, number: where reading resumes; others: counts of the output."""

    file: int = 0
    offset: int = 0
    number: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    bad: int = 0
    shown: list[str] = field(default_factory=list)


class CorpusWriter:
    """Appends tokens to an unfinished corpus, saves the progress, and puts the finished files in their places.

    Args:
        key: hash of the inputs; an unfinished corpus of another key is refused.
        overwrite: replaces a finished corpus, and starts an unfinished one over where it cannot be resumed.

    Raises:
        UserError: the corpus exists, another process writes it, or its unfinished files are corrupted or of other
            inputs.
    """

    def __init__(self, prefix: Path, *, dtype: np.dtype, key: str, overwrite: bool) -> None:
        self.prefix, self.dtype, self.key = prefix, dtype, key
        self.folder = Path(f"{prefix}.part")
        self.files = {name: self.folder / name for name in ("tokens", "lengths", "progress.json", "lock")}
        if index_file(prefix).exists() and not overwrite:
            raise UserError(f"--output-prefix {prefix}: {index_file(prefix)} exists already; --overwrite replaces it")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder.is_symlink() or not is_trusted(self.folder.stat(), prefix.parent):
            raise UserError(f"--output-prefix {prefix}: {self.folder} is a link or another user's; remove it")
        self.lock = open_regular(self.files["lock"], "ab", permissions=0o600)  # others could hold a lock that they read
        try:
            # lockf belongs to this process alone; a lock of flock would be held by its forked workers, too.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--output-prefix {prefix}: another process is writing it") from error
        try:
            progress = self._read_progress()
        except UserError as error:
            if not overwrite:
                raise UserError(f"{error}; --overwrite starts over") from error
            progress = None
        if progress is None:
            for name in ("tokens", "lengths", "progress.json"):
                self.files[name].unlink(missing_ok=True)
        self.progress = progress or Progress()
        self.outputs: dict[str, IO[bytes]] = {}
        for name, size in self._sizes(self.progress).items():
            self.outputs[name] = open_regular(self.files[name], "ab")
            self.outputs[name].truncate(size)  # what was written after the last save

    def _sizes(self, progress: Progress) -> dict[str, int]:
        return {"tokens": progress.tokens * self.dtype.itemsize, "lengths": progress.documents * 4}

    def _read_progress(self) -> Progress | None:
        """Progress of an earlier run; None: nothing was begun, or a finished run left its folder behind.

        Raises:
            UserError: begun from other inputs, or corrupted.
        """
        file = self.files["progress.json"]
        try:
            saved = parse_json(read_text(file))
            key, progress = saved["key"], Progress(**saved["progress"])
            sizes = self._sizes(progress)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: does not say how far the run came ({type(error).__name__})") from error
        if key != self.key:
            raise UserError(
                f"--output-prefix {self.prefix}: {self.folder} was begun from other inputs or flags, or an input was "
                "copied or its mode changed since"
            )
        final = token_file(self.prefix)
        if not self.files["tokens"].exists():
            if index_file(self.prefix).exists() or not final.exists() or final.stat().st_size != sizes["tokens"]:
                return None
            os.replace(final, self.files["tokens"])  # killed between the last two renames of `finish`
        for name, size in sizes.items():
            held = self.files[name].stat().st_size if self.files[name].exists() else 0
            if held < size:
                raise UserError(f"{self.files[name]}: {held} bytes, fewer than the {size} that {file.name} says")
        return progress

    def add(self, batch: RecordBatch, encoded: EncodedBatch) -> None:
        """Writes a batch's tokens, then counts them: whatever interrupts in between, `save` counts whole batches."""
        with name_file(self.folder):
            self.outputs["tokens"].write(encoded.tokens)
            self.outputs["lengths"].write(encoded.lengths.tobytes())
        before = self.progress
        self.progress = Progress(
            file=batch.file,
            offset=batch.offset.offset,
            number=batch.offset.number,
            documents=before.documents + len(encoded.lengths),
            tokens=before.tokens + len(encoded.tokens) // self.dtype.itemsize,
            text_bytes=before.text_bytes + encoded.text_bytes,
            empty=before.empty + encoded.empty,
            bad=before.bad + len(encoded.bad),
            shown=[*before.shown, *map(str, encoded.bad)][:SHOWN],
        )

    def save(self) -> None:
        """Syncs the files, then writes the progress."""
        with name_file(self.folder):
            for out in self.outputs.values():
                out.flush()
                os.fsync(out.fileno())
        replace_synced(self.files["progress.json"], json.dumps({"key": self.key, "progress": asdict(self.progress)}))

    def finish(self, metadata: dict[str, Any], model: Path | None, content: bytes) -> None:
        """Puts the files in their places, the index last, and removes the unfinished folder.

        Args:
            metadata: of `<prefix>.json`, without the checksums.
            model, content: the tokenizer's file and what its copy holds; None: it has no file.
        """
        self.save()
        for out in self.outputs.values():
            out.close()
        index, final = self.folder / "index", index_file(self.prefix)
        lengths = np.memmap(self.files["lengths"], np.int32, "r") if self.progress.documents else np.empty(0, np.int32)
        with name_file(index), open_new(index) as out:
            write_index(out, lengths, self.dtype)
        sync(index)
        tokens = self.files["tokens"]
        metadata = metadata | {"checksums": {"bin": checksum(tokens), "idx": checksum(index)}}
        final.unlink(missing_ok=True)  # an older corpus ends here, before its tokens do
        if model is not None:
            copy = self.folder / "model"
            write_synced(copy, content)
            os.replace(copy, model_copy(self.prefix, model))
        replace_synced(metadata_file(self.prefix), redact(json.dumps(metadata, indent=1)) + "\n")
        os.replace(tokens, token_file(self.prefix))
        os.replace(index, final)
        sync(self.prefix.parent)
        self.discard()

    def discard(self) -> None:
        """Closes the writer and removes the unfinished folder."""
        self.close()
        shutil.rmtree(self.folder)

    def close(self) -> None:
        for out in self.outputs.values():
            out.close()
        self.lock.close()


def refuse_overwriting(prefix: Path, model: Path | None, inputs: Sequence[str], *, overwrite: bool) -> None:
    """Checks that the outputs replace neither inputs nor, without `overwrite`, files that data.prepare did not write.

    Raises:
        UserError: names the file.
    """
    *files, folder = output_files(prefix, model)
    named = [("--input", Path(name)) for name in inputs] + ([("--tokenizer-model", model)] if model else [])
    for flag, path in named:
        real = path.resolve()
        if {real, *real.parents}.intersection([*files, folder]):
            raise UserError(f"--output-prefix {prefix}: would write over {flag} {path}; choose another prefix")
    if overwrite or is_written_by_prepare(prefix):
        return
    for path in files:
        is_copied_model = (
            model is not None and path in files[3:] and path.exists() and filecmp.cmp(path, model, shallow=False)
        )
        if path.exists() and not is_copied_model:
            raise UserError(
                f"--output-prefix {prefix}: {path.name} exists already, and not by data.prepare; --overwrite replaces "
                "it"
            )


def output_files(prefix: Path, model: Path | None) -> list[Path]:
    """What a run writes, resolved: tokens, index, metadata, the copy of a model, and last the unfinished folder."""
    copy = [] if model is None else [model_copy(prefix, model)]
    files = [token_file(prefix), index_file(prefix), metadata_file(prefix), *copy, Path(f"{prefix}.part")]
    return [path.resolve() for path in files]
