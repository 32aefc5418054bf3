"""Token files in Megatron-LM's `.bin/.idx` format: tokens end to end, and an index of documents.

`.idx`, little-endian: magic (9 bytes), version u64 = 1, dtype u8, sequences u64, document entries u64, lengths i32
[sequences], byte offsets i64 [sequences], document indices i64 [entries], the first 0, the last the number of
sequences; then, in multimodal files only, modes i8 [sequences]. We write one sequence a document; a document of
Megatron-LM's may have several, end to end. Both files are memory-mapped.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.errors import UserError
from utils.files import open_new

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
FLOATS = {6: "float64", 7: "float32"}
MAX_DOCUMENT_TOKENS = 2**31 - 1  # the index holds a document's length as i32
CHUNK = 1 << 20  # entries that are checked or written at a time
PREFETCHED_BYTES = 1 << 14  # below, the call costs more of a cached read than it spares of a read from the disk


def token_dtype(vocab_size: int) -> type:
    """uint16 below 65500 tokens, as in Megatron-LM, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def index_file(prefix: Path) -> Path:
    """`<prefix>.idx`; a prefix may hold dots."""
    return Path(f"{prefix}.idx")


def token_file(prefix: Path) -> Path:
    """`<prefix>.bin`."""
    return Path(f"{prefix}.bin")


def write_index(out: BinaryIO, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Writes an index of documents that lie end to end, a sequence each, in constant memory.

    Args:
        lengths: [documents] int32 tokens of each; may be a memory map.
        dtype: of the tokens.
    """
    code = next(c for c, d in DTYPES.items() if d == dtype.type)
    count = len(lengths)
    out.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
    for at in range(0, count, CHUNK):
        out.write(lengths[at : at + CHUNK].astype("<i4").tobytes())
    offset = 0
    for at in range(0, count, CHUNK):
        ends = np.cumsum(lengths[at : at + CHUNK], dtype=np.int64)
        starts = ends - lengths[at : at + CHUNK]
        out.write((offset + starts * dtype.itemsize).astype("<i8").tobytes())
        offset += int(ends[-1]) * dtype.itemsize
    for at in range(0, count + 1, CHUNK):
        out.write(np.arange(at, min(at + CHUNK, count + 1), dtype="<i8").tobytes())


def write_indexed_dataset(prefix: Path, documents: Iterable[np.ndarray], *, vocab_size: int) -> None:
    """Writes `<prefix>.bin` and `<prefix>.idx`."""
    dtype = np.dtype(token_dtype(vocab_size))
    lengths = []
    with open_new(token_file(prefix)) as out:
        for tokens in documents:
            out.write(tokens.astype(dtype).tobytes())
            lengths.append(len(tokens))
    with open_new(index_file(prefix)) as out:
        write_index(out, np.array(lengths, np.int32), dtype)


def _map(path: Path) -> mmap.mmap | None:
    """A file's memory map; None: the file is empty."""
    with path.open("rb") as file:
        is_empty = not file.seek(0, 2)
        return None if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class IndexedDataset:
    """Documents of a `.bin/.idx` pair, read through memory maps.

    Opening checks the header, the sizes and the last entries: constant cost. `lengths` checks all sequences once.

    Attributes:
        tokens: all tokens of the `.bin` file, a view of the map.
        dtype: of the tokens.
        is_checked: `lengths` found every sequence valid, and one sequence a document; then it checks no more, also in
            a worker process.

    Raises:
        UserError: a file is missing or contradicts its header.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix, self.is_checked, self._is_random = prefix, False, False
        self._open()

    def _open(self) -> None:
        file, self._token_file = index_file(self.prefix), token_file(self.prefix)
        for path in (file, self._token_file):
            if not path.is_file():
                raise UserError(f"{path}: no such file; a prepared corpus is a .bin and an .idx of one prefix")
        size = file.stat().st_size
        if size < HEADER.size:
            raise UserError(f"{file}: {size} bytes is less than a header")
        index = self._index_map = _map(file)
        assert index is not None
        magic, version, code, sequences, entries = HEADER.unpack(index[: HEADER.size])
        if magic != MAGIC or version != 1:
            raise UserError(
                f"{file}: not a Megatron-LM index of version 1 (its first bytes are {magic!r}, its version {version})"
            )
        if code not in DTYPES:
            raise UserError(
                f"{file}: its tokens are {FLOATS.get(code, f'of the unknown type {code}')}; a token is a whole number"
            )
        expected = HEADER.size + sequences * (4 + 8) + entries * 8
        if size not in (expected, expected + sequences):
            raise UserError(
                f"{file}: {size} bytes, but its header promises {expected} ({sequences} sequences, {entries} document "
                "entries)"
            )
        at = HEADER.size
        self._sequence_lengths = np.frombuffer(index, "<i4", sequences, at)
        self._offsets = np.frombuffer(index, "<i8", sequences, at + 4 * sequences)
        firsts = np.frombuffer(index, "<i8", entries, at + 12 * sequences)
        if not entries or firsts[0] != 0 or firsts[-1] != sequences:
            ends = f"run from {firsts[0]} to {firsts[-1]}" if entries else "are none"
            raise UserError(f"{file}: its document entries {ends}, not from 0 to its {sequences} sequences")
        self.dtype = np.dtype(DTYPES[code])
        size = self._token_file.stat().st_size
        if size % self.dtype.itemsize:
            raise UserError(
                f"{self._token_file}: {size} bytes, not a multiple of {self.dtype.itemsize}, the bytes of a token"
            )
        if sequences:
            end = int(self._offsets[-1]) + int(self._sequence_lengths[-1]) * self.dtype.itemsize
            if end > size:
                raise UserError(f"{self._token_file}: {size} bytes, but its index points past the end, to byte {end}")
        self._token_map = _map(self._token_file)
        self.tokens: np.ndarray = np.frombuffer(b"" if self._token_map is None else self._token_map, self.dtype)
        if self._is_random:
            self.expect_random_reads()
        self._firsts: np.ndarray | None = firsts
        self._documents = entries - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """[documents] tokens of each: the map itself, int32; sums, int64, where documents have several sequences.

        Raises:
            UserError: sequences that overlap or lie outside the token file, document entries that run backwards, or a
                document whose sequences do not lie end to end.
        """
        firsts = self._firsts
        assert firsts is not None
        if self.is_checked:
            self._firsts = None
            return self._sequence_lengths
        self._check_sequences()
        pieces = range(0, len(firsts), CHUNK)
        if len(firsts) == len(self._sequence_lengths) + 1 and all(
            (firsts[at : at + CHUNK] == np.arange(at, min(at + CHUNK, len(firsts)))).all() for at in pieces
        ):
            self._firsts, self.is_checked = None, True  # one sequence a document
            return self._sequence_lengths
        if (np.diff(firsts) < 0).any():
            raise UserError(f"{index_file(self.prefix)}: its document entries run backwards")
        ends = self._offsets + self._sequence_lengths.astype(np.int64) * self.dtype.itemsize
        apart = np.append(ends[:-1] != self._offsets[1:], False)
        apart[firsts[1:] - 1] = False  # the last sequence of a document
        if apart.any():
            document = int(np.searchsorted(firsts, apart.argmax(), side="right")) - 1
            raise UserError(f"{index_file(self.prefix)}: the sequences of document {document} do not lie end to end")
        sums = np.concatenate(([0], np.cumsum(self._sequence_lengths, dtype=np.int64)))
        return np.diff(sums[firsts])

    def first_lengths(self, count: int) -> np.ndarray:
        """[count] tokens of the first documents, without a check of all sequences where each document has one."""
        if self._firsts is not None and len(self._firsts) != len(self._sequence_lengths) + 1:
            return self.lengths[:count]
        return np.maximum(self._sequence_lengths[:count], 0)

    def _check_sequences(self) -> None:
        """Checks that all sequences lie inside the token file, and apart: then no length asks for more than it holds.

        Raises:
            UserError: names the first sequence, or says that some overlap.
        """
        size, held, last_end, is_in_order = self.dtype.itemsize, self.tokens.nbytes, 0, True
        for at in range(0, len(self._offsets), CHUNK):
            lengths = self._sequence_lengths[at : at + CHUNK]
            starts = self._offsets[at : at + CHUNK]
            ends = np.multiply(lengths, size, dtype=np.int64)
            ends += starts
            if starts[0] == last_end and ends[-1] <= held and lengths.min() >= 0 and (ends[:-1] == starts[1:]).all():
                last_end = int(ends[-1])  # end to end, as data.prepare and Megatron-LM write them
                continue
            outside = (starts < 0) | (starts > held - (ends - starts)) | (starts % size != 0)
            bad = (lengths < 0) | ((lengths > 0) & outside)  # an empty one may be anywhere
            if bad.any():
                number = int(bad.argmax())
                raise UserError(
                    f"{index_file(self.prefix)}: sequence {at + number} of {lengths[number]} tokens of {size} bytes at "
                    f"byte {starts[number]}, but {self._token_file.name} holds {held} bytes"
                )
            starts, ends = starts[lengths > 0], ends[lengths > 0]
            is_in_order &= bool((starts >= np.append(last_end, ends)[:-1]).all())
            last_end = int(ends[-1]) if len(ends) else last_end
        if not is_in_order:
            full = self._sequence_lengths > 0
            starts = self._offsets[full]
            ends = starts + size * self._sequence_lengths[full].astype(np.int64)
            order = np.argsort(starts)
            if (starts[order[1:]] < ends[order[:-1]]).any():
                raise UserError(f"{index_file(self.prefix)}: sequences overlap in {self._token_file.name}")

    def expect_random_reads(self) -> None:
        """Read no more of the files than is asked for: the system's readahead reads 128 KiB for a short document.

        From now on `prefetch` what is read: without readahead a long document comes page by page.
        """
        self._is_random = True
        for mapped in (self._index_map, self._token_map):
            if mapped is not None:
                mapped.madvise(mmap.MADV_RANDOM)

    def prefetch(self, begin: int, count: int) -> None:
        """Start to read `count` items of `tokens` from the disk, where they are many; returns at once."""
        size = count * self.dtype.itemsize
        if size > PREFETCHED_BYTES and self._is_random and self._token_map is not None:
            first = begin * self.dtype.itemsize
            page = first - first % mmap.PAGESIZE
            self._token_map.madvise(mmap.MADV_WILLNEED, page, first + size - page)

    # Pickled without its maps: a worker process opens its own.
    def __getstate__(self) -> dict:
        return {name: getattr(self, name) for name in ("prefix", "is_checked", "_is_random")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._documents

    def locate(self, document: int, start: int, length: int) -> int:
        """Index into `tokens` of a document's token `start`. Raises UserError: as `lengths`."""
        assert start >= 0 and length >= 0 and start + length <= self.lengths.item(document)
        if not length:
            return 0
        first = document if self._firsts is None else self._firsts.item(document)
        return self._offsets.item(first) // self.dtype.itemsize + start

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """[length] tokens of a document from token `start` on; a view of the map. Raises UserError: as `locate`."""
        begin = self.locate(document, start, length)
        return self.tokens[begin : begin + length]
