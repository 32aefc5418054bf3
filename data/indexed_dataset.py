"""Token files in Megatron-LM's `.bin/.idx` format: tokens end to end, and an index of documents.

`.idx`, little-endian: magic (9 bytes), version u64 = 1, dtype u8, sequences u64, document entries u64,
lengths i32 [sequences], byte offsets i64 [sequences], document indices i64 [entries], the first 0.
We write one sequence a document. Both files are memory-mapped when read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def token_dtype(vocab_size: int) -> type:
    """uint16 where the vocabulary fits, as Megatron-LM decides it, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def _files(prefix: Path) -> tuple[Path, Path]:
    """`<prefix>.idx` and `<prefix>.bin`; a prefix may hold dots."""
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin")


def write_indexed_dataset(prefix: Path, documents: Iterable[np.ndarray], *, vocab_size: int) -> None:
    """Write `<prefix>.bin` and `<prefix>.idx`."""
    dtype = np.dtype(token_dtype(vocab_size))
    lengths = []
    index_file, token_file = _files(prefix)
    with token_file.open("wb") as out:
        for tokens in documents:
            out.write(tokens.astype(dtype).tobytes())
            lengths.append(len(tokens))
    counts = np.array(lengths, np.int32)
    offsets = (np.cumsum(counts, dtype=np.int64) - counts) * dtype.itemsize
    code = next(c for c, d in DTYPES.items() if d == dtype.type)
    with index_file.open("wb") as out:
        out.write(HEADER.pack(MAGIC, 1, code, len(counts), len(counts) + 1))
        out.write(counts.tobytes())
        out.write(offsets.tobytes())
        out.write(np.arange(len(counts) + 1, dtype=np.int64).tobytes())


class IndexedDataset:
    """Documents of a `.bin/.idx` pair, read through memory maps.

    Attributes:
        lengths: [documents] int32 tokens.

    Raises:
        ValueError: a file that is not what its header says.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._open()

    def _open(self) -> None:
        index_file, self._token_file = _files(self.prefix)
        if index_file.stat().st_size < HEADER.size:
            raise ValueError(f"{index_file}: {index_file.stat().st_size} bytes is less than a header")
        index = np.memmap(index_file, np.uint8, "r")
        magic, version, code, sequences, entries = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC or version != 1 or code not in DTYPES:
            raise ValueError(f"{index_file}: not a Megatron-LM index of version 1")
        expected = HEADER.size + sequences * (4 + 8) + entries * 8
        if len(index) < expected:
            raise ValueError(f"{index_file}: {len(index)} bytes, but its header promises {expected}")
        at = HEADER.size
        self.lengths = np.frombuffer(index, np.int32, sequences, at)
        self._offsets = np.frombuffer(index, np.int64, sequences, at + 4 * sequences)
        dtype = np.dtype(DTYPES[code])
        size = self._token_file.stat().st_size
        if size % dtype.itemsize:
            raise ValueError(f"{self._token_file}: {size} bytes, not a multiple of {dtype.itemsize}, the bytes of a token")
        if sequences and int(self._offsets[-1]) + int(self.lengths[-1]) * dtype.itemsize > size:
            raise ValueError(f"{self._token_file}: {size} bytes, but its index points past the end")
        self._tokens = np.memmap(self._token_file, dtype, "r") if size else np.empty(0, dtype)

    # A worker process gets the name and opens its own maps.
    def __getstate__(self) -> dict:
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict) -> None:
        self.prefix = state["prefix"]
        self._open()

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """`length` tokens of a document from token `start` on; a view of the map.

        Raises:
            ValueError: the index points outside the token file; a read past the end of a map is cut short without a word.
        """
        assert start >= 0 and start + length <= self.lengths[document]
        offset = int(self._offsets[document])
        first = offset // self._tokens.itemsize + start
        if offset < 0 or offset % self._tokens.itemsize or first + length > len(self._tokens):
            raise ValueError(
                f"{self._token_file}: its index places document {document} at byte {offset}, {self.lengths[document]} tokens, "
                f"but the file holds {len(self._tokens)} tokens of {self._tokens.itemsize} bytes"
            )
        return self._tokens[first : first + length]
