"""Read a torch.distributed.checkpoint without running code from it, and without trust in its numbers.

The library unpickles `.metadata` without limits, and every stored entry that is no tensor: a downloaded checkpoint
could run any code. Here an allow-list unpickler returns stand-ins of the library's classes, made anew for each file,
because the opcode BUILD can set attributes of any class that a pickle can name. The library's records are then built
from fields of the expected types. Every entry must be a tensor in a data file of the checkpoint's folder, whose chunks
fill it without gap or overlap: the library leaves an element that no chunk holds as it was.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from reprlib import repr as short_repr
from types import NoneType
from typing import IO, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

from checkpoint.files import CorruptedCheckpoint, OpenedFile, describe_difference, open_file
from utils.errors import UserError
from utils.files import HASHED_BYTES, Checksum, checksum_file
from utils.logger import one_line

# Type of each field of a record that loading uses: a type, types, [type of items] or {type of keys: type of values}.
FIELDS: dict[type, dict[str, Any]] = {
    Metadata: {
        "state_dict_metadata": {str: TensorStorageMetadata},
        "storage_data": {MetadataIndex: _StorageInfo},
        "version": (str, NoneType),
    },
    TensorStorageMetadata: {"properties": TensorProperties, "size": torch.Size, "chunks": [ChunkStorageMetadata]},
    ChunkStorageMetadata: {"offsets": torch.Size, "sizes": torch.Size},
    MetadataIndex: {"fqn": str, "offset": (torch.Size, NoneType), "index": (int, NoneType)},
    _StorageInfo: {"relative_path": str, "offset": int, "length": int, "transform_descriptors": NoneType},
}
# Also in an index, but without use for loading: the folder it was written to, and deprecated properties of tensors.
UNUSED = {
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}
ALLOWED = {(kind.__module__, kind.__name__) for kind in (*FIELDS, TensorProperties)} | UNUSED
DATA_FILE = re.compile(r"__[0-9]+_[0-9]+\.distcp")
CALLS = {("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")}  # in the file of a chunk
MAX_DIMS = 64  # of a tensor, in PyTorch too
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
}
# What a pickle or a zip file of other bytes may raise.
BROKEN = (
    pickle.UnpicklingError, zipfile.BadZipFile, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError,
    RuntimeError, TypeError, ValueError, struct.error,
)  # fmt: skip


class UnsafeCheckpoint(UserError):
    """A checkpoint names a class, type or file, or has a value, that no checkpoint of train.py needs."""


class _StandIn:
    """A record whose fields are not checked yet; or the call that would build an object, with its arguments."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _StandIn:
        self = object.__new__(cls)
        self.args = args
        return self


class _SafeUnpickler(pickle._Unpickler):
    """Builds stand-ins of this unpickler's own for `allowed`, dtypes and sizes, and plain values.

    Python's own implementation: pickle's C code hashes a dictionary's key before anyone can look at it. Tuples within
    tuples, each twice in the next, take 2^depth steps to hash.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes], allowed: set[tuple[str, str]]) -> None:
        super().__init__(file)
        self.stand_ins = {key: type(key[1], (_StandIn,), {}) for key in allowed}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.stand_ins:
            return self.stand_ins[module, name]
        if module == "torch":
            value = STORAGES.get(name) or vars(torch).get(name)
            if value is torch.Size or isinstance(value, torch.dtype):
                return value
        raise UnsafeCheckpoint(f"it names {module[:80]}.{name[:80]}, which no checkpoint needs and which may run code")

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _StandIn):
            raise UnsafeCheckpoint(f"it sets attributes of {type(self.stack[-1]).__name__}")
        self.stack[-1].state = state

    def load_setitems(self) -> None:
        self._add_items(self.pop_mark())

    def load_setitem(self) -> None:
        self._add_items([self.stack.pop(-2), self.stack.pop()])

    def _add_items(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not isinstance(key, _StandIn):
                raise UnsafeCheckpoint(f"it has a key of type {type(key).__name__}")
            self.stack[-1][key] = value

    def load_set(self) -> None:
        raise UnsafeCheckpoint("it holds a set")

    dispatch: ClassVar[dict[int, Any]] = pickle._Unpickler.dispatch | {
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        **dict.fromkeys((pickle.DICT[0], pickle.ADDITEMS[0], pickle.FROZENSET[0]), load_set),
    }


def _build(value: Any, kind: Any) -> Any:
    """Return a copy of `value` in which every record is the library's and every field has its type in `FIELDS`.

    Raises:
        UnsafeCheckpoint: a value has another type.
    """
    if isinstance(kind, dict):
        ((key_kind, item_kind),) = kind.items()
        return {_build(key, key_kind): _build(item, item_kind) for key, item in _build(value, dict).items()}
    if isinstance(kind, list):
        return [_build(item, kind[0]) for item in _build(value, list)]
    if kind in FIELDS or kind is TensorProperties:
        if not isinstance(value, _StandIn) or type(value).__name__ != kind.__name__:
            raise UnsafeCheckpoint(f"it holds {type(value).__name__} where {kind.__name__} should be")
        if kind is TensorProperties:
            return TensorProperties(dtype=_build(value.state[0], torch.dtype))
        fields = _build(value.state, dict)
        return kind(**{name: _build(fields.get(name), field) for name, field in FIELDS[kind].items()})
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        raise UnsafeCheckpoint(f"it holds {type(value).__name__} where {kinds[0].__name__} should be")
    if kind is torch.Size and len(value) > MAX_DIMS:
        raise UnsafeCheckpoint(f"it has a tensor of {len(value)} dimensions")
    return value


def _fill(chunks: Sequence[ChunkStorageMetadata], size: torch.Size, dim: int = 0) -> bool:
    """Return whether the chunks fill a tensor of this size without gap or overlap.

    Only cuts along dimension 0 first, then 1, and so on, as every mesh of ranks makes them.
    """
    if dim == len(size):
        return len(chunks) == 1
    slabs: dict[tuple[int, int], list[ChunkStorageMetadata]] = {}
    for chunk in chunks:
        slabs.setdefault((chunk.offsets[dim], chunk.sizes[dim]), []).append(chunk)
    end = 0
    for offset, length in sorted(slabs):
        if offset != end or not _fill(slabs[offset, length], size, dim + 1):
            return False
        end += length
    return end == size[dim]


def check_chunks(name: str, tensor: TensorStorageMetadata, storage: dict[MetadataIndex, _StorageInfo]) -> None:
    """Check that every element of a tensor is in exactly one chunk, and every chunk in a data file.

    Raises:
        UnsafeCheckpoint: otherwise.
    """
    filled = []
    for chunk in tensor.chunks:
        if len(chunk.offsets) != len(tensor.size) or len(chunk.sizes) != len(tensor.size):
            raise UnsafeCheckpoint(f"{short_repr(name)} has a chunk of other dimensions")
        info = storage.get(MetadataIndex(name, chunk.offsets))
        size = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
        if info is None or info.offset < 0 or info.length < size or info.offset + info.length >= 2**63:
            raise UnsafeCheckpoint(f"{short_repr(name)} has a chunk at {list(chunk.offsets)} that no file holds")
        filled += [chunk] if size else []
    if not (_fill(filled, tensor.size) if filled else 0 in tensor.size):
        raise UnsafeCheckpoint(
            f"the chunks of {short_repr(name)} leave gaps in its size {list(tensor.size)}, or overlap"
        )


def read_index(path: Path, opened: set[OpenedFile]) -> Metadata:
    """Read the index of a checkpoint; `opened` as of `open_file`.

    Raises:
        OSError: the file cannot be read.
        UnsafeCheckpoint: the file is no index, or has an entry that is no whole tensor in data files of its folder.
    """
    try:
        with open_file(path, opened) as file:
            index = _build(_SafeUnpickler(file, ALLOWED).load(), Metadata)
        for name in {info.relative_path for info in index.storage_data.values()}:
            if not DATA_FILE.fullmatch(name):
                raise UnsafeCheckpoint(f"a tensor is in {short_repr(name)}, which is no data file of this folder")
        for name, tensor in index.state_dict_metadata.items():
            check_chunks(name, tensor, index.storage_data)
        return index
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{path}: not the index of a checkpoint to load: {error}") from error
    except BROKEN as error:
        raise UnsafeCheckpoint(f"{path}: not the index of a checkpoint ({type(error).__name__})") from error


class _Bytes(io.RawIOBase):
    """A tensor of bytes as a file, without a copy."""

    def __init__(self, content: Tensor) -> None:
        self.content, self.at = memoryview(cast(Any, content.numpy())), 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, len(self.content))[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        part = self.content[self.at : self.at + len(buffer)]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)


def parse_chunk(content: Tensor, sizes: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the tensor that torch.save wrote: a zip file, not compressed, of its bytes and the call that rebuilds it.

    The zip file's own checksums are not computed: that would take longer than all the rest.

    Args:
        content: uint8 [bytes of the zip file]; the tensor shares them.

    Raises:
        UnsafeCheckpoint, one of `BROKEN`: the content is something else.
    """
    with zipfile.ZipFile(cast(IO[bytes], _Bytes(content))) as archive:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise UnsafeCheckpoint("it is compressed")
        call = _SafeUnpickler(io.BytesIO(archive.read(members["data.pkl"])), CALLS).load()
        if not isinstance(call, _StandIn) or type(call).__name__ != "_rebuild_tensor_v2":
            raise UnsafeCheckpoint(f"it holds {type(call).__name__} where a tensor should be")
        (_, stored_dtype, key, *_), offset, size, stride, *_ = call.args
        if stored_dtype is not dtype or size != sizes or type(key) is not str:
            raise UnsafeCheckpoint(f"it holds {short_repr(size)} of {short_repr(stored_dtype)}")
        member = members[f"data/{key}"]
    at = member.header_offset
    name_length, extra_length = struct.unpack("<26xHH", bytes(content[at : at + 30].numpy()))
    start, nbytes = at + 30 + name_length + extra_length, sizes.numel() * dtype.itemsize
    if member.file_size != nbytes or start + nbytes > len(content):
        raise UnsafeCheckpoint(f"it holds {member.file_size} bytes, not {nbytes}")
    data = content[start : start + nbytes]
    if start % dtype.itemsize:  # torch.save aligns
        data = data.clone()
    values = data.view(dtype)
    return values.as_strided(size, stride, values.storage_offset() + offset)


def _read_bytes(file: IO[bytes], start: int, length: int) -> Tensor:
    """Return the file's bytes from `start` on, uint8 [`length`, or fewer at the file's end]."""
    length = max(0, min(length, os.fstat(file.fileno()).st_size - start))
    content = torch.empty(length, dtype=torch.uint8)
    file.seek(start)
    count = file.readinto(cast(Any, content.numpy())) if length else 0  # type: ignore[attr-defined]
    return content[:count]


class _Digest:
    """The checksum of a file, computed while its chunks are read in ascending order."""

    def __init__(self, file: IO[bytes], wanted: Sequence[Any]) -> None:
        self.file, self.wanted, self.at, self.digest = file, wanted, 0, Checksum()

    def _add_until(self, end: int) -> None:
        while self.at < end and len(part := _read_bytes(self.file, self.at, min(end - self.at, HASHED_BYTES))):
            self._add(part)

    def _add(self, content: Tensor) -> None:
        self.digest.update(content.numpy())
        self.at += len(content)

    def read(self, start: int, length: int) -> Tensor:
        """As `_read_bytes`."""
        self._add_until(start)
        content = _read_bytes(self.file, start, length)
        if start == self.at:  # else an index from elsewhere, whose chunks overlap
            self._add(content)
        return content

    def error(self) -> str:
        """Return how the file differs from what was written, or ""."""
        size = os.fstat(self.file.fileno()).st_size
        self._add_until(size)
        return describe_difference(size, self.digest.value(), self.wanted)


class SafeReader:
    """Reads tensors of a checkpoint: its index comes from `read_index`, each chunk from `parse_chunk`.

    Args:
        index: of the tensors to read; None: the checkpoint's, read when it is needed.

    Attributes:
        opened: which files were read, as `find_replaced` compares them.
    """

    def __init__(self, checkpoint: Path, index: Metadata | None = None) -> None:
        self.path, self.index = checkpoint, index
        self.opened: set[OpenedFile] = set()

    def read_metadata(self) -> Metadata:
        """Raises OSError or UnsafeCheckpoint."""
        if self.index is None:
            self.index = read_index(self.path / ".metadata", self.opened)
        return self.index

    def find(self, key: MetadataIndex) -> _StorageInfo:
        """Return where a chunk lies."""
        return self.read_metadata().storage_data[key]

    def load_file(
        self, name: str, items: Sequence[ReadItem], targets: Mapping[str, Tensor], wanted: Sequence[Any] | None = None
    ) -> None:
        """Copy a file's chunks into the tensors to load, and verify the file's checksum in the same pass.

        Args:
            items: of a load plan, those of this file.
            targets: plain tensors or DTensors by name.
            wanted: size and checksum of the file; None: another rank verifies the file.

        Raises:
            OSError: the file cannot be read.
            CorruptedCheckpoint: the file differs from its checksum.
            UnsafeCheckpoint: the file does not hold what the index says.
        """
        path, refused = self.path / name, None
        with open_file(path, self.opened) as file:
            digest = None
            if wanted is not None and ":" in wanted[1]:
                digest = _Digest(file, wanted)
            elif wanted is not None and (line := describe_difference(*checksum_file(file, like=wanted[1]), wanted)):
                raise CorruptedCheckpoint(f"{path}: {line}")
            for item in sorted(items, key=lambda item: self.find(item.storage_index).offset):
                info = self.find(item.storage_index)
                content = (digest.read if digest else partial(_read_bytes, file))(info.offset, info.length)
                try:
                    chunk = self._parse_chunk(path, content, item.storage_index)
                except UnsafeCheckpoint as error:  # the checksum may say why
                    refused = refused or error
                    continue
                target = targets[item.dest_index.fqn].detach()
                local = target.to_local() if isinstance(target, DTensor) else target
                part = narrow_tensor_by_index(local, item.dest_offsets, item.lengths)
                part.copy_(narrow_tensor_by_index(chunk, item.storage_offsets, item.lengths))
            if digest and (line := digest.error()):
                raise CorruptedCheckpoint(f"{path}: {line}")
        if refused:
            raise refused

    def read_tensor(self, name: str) -> Tensor:
        """Read one tensor, assembled from its chunks. Memory: the tensor, and one chunk if there are several.

        Raises:
            OSError, UnsafeCheckpoint: a file is missing, or does not hold what the index says.
        """
        about = cast(TensorStorageMetadata, self.read_metadata().state_dict_metadata[name])
        whole = torch.empty(about.size if len(about.chunks) != 1 else (), dtype=about.properties.dtype)
        for number, chunk in enumerate(about.chunks):
            key = MetadataIndex(name, chunk.offsets, number)
            info = self.find(key)
            path = self.path / info.relative_path
            with open_file(path, self.opened) as file:
                part = self._parse_chunk(path, _read_bytes(file, info.offset, info.length), key)
            if len(about.chunks) == 1:
                return part
            whole[tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))] = part
        return whole

    def _parse_chunk(self, path: Path, content: Tensor, key: MetadataIndex) -> Tensor:
        about = cast(TensorStorageMetadata, self.read_metadata().state_dict_metadata[key.fqn])
        assert key.index is not None
        try:
            return parse_chunk(content, about.chunks[key.index].sizes, about.properties.dtype)
        except (UnsafeCheckpoint, *BROKEN) as error:
            where = f"{path}: no chunk of {key.fqn} at byte {self.find(key).offset}"
            raise UnsafeCheckpoint(f"{where}: {one_line(error)[:200]}") from error
