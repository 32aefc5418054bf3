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
from collections.abc import Callable, Sequence
from pathlib import Path
from reprlib import repr as short_repr
from types import NoneType
from typing import IO, Any, ClassVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from checkpoint.files import OpenedFile, open_file
from utils.errors import UserError
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


def _check_chunks(name: str, tensor: TensorStorageMetadata, storage: dict[MetadataIndex, _StorageInfo]) -> None:
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
        if info is None or info.offset < 0 or info.length < size:
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
            _check_chunks(name, tensor, index.storage_data)
        return index
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{path}: not the index of a checkpoint to load: {error}") from error
    except BROKEN as error:
        raise UnsafeCheckpoint(f"{path}: not the index of a checkpoint ({type(error).__name__})") from error


class _Slice(io.RawIOBase):
    """The `length` bytes of a file from `start` on, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.length)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.at)])  # type: ignore[attr-defined]
        self.at += count
        return count


def read_chunk(file: io.RawIOBase, sizes: torch.Size, dtype: torch.dtype) -> Tensor:
    """Read a chunk that torch.save wrote: a zip file, not compressed, of its bytes and of the call that rebuilds it.

    The zip file's own checksums are not computed: that would take longer than all the rest.

    Raises:
        UnsafeCheckpoint, one of `BROKEN`: the file is something else.
    """
    with zipfile.ZipFile(cast(IO[bytes], file)) as archive:
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
    content = torch.empty(sizes.numel() * dtype.itemsize, dtype=torch.uint8)
    file.seek(member.header_offset)
    name_length, extra_length = struct.unpack("<26xHH", file.read(30) or b"")
    file.seek(member.header_offset + 30 + name_length + extra_length)
    if member.file_size != len(content) or file.readinto(cast(Any, content.numpy())) != len(content):
        raise UnsafeCheckpoint(f"it holds {member.file_size} bytes, not {len(content)}")
    return content.view(dtype).as_strided(size, stride, offset)


class SafeReader(dcp.FileSystemReader):
    """`FileSystemReader` whose index comes from `read_index`, once, and each chunk from `read_chunk`.

    Call `read_metadata` before `dcp.load`, which would print a traceback of its errors.

    Attributes:
        opened: which files were read, as `find_replaced` compares them.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.opened: set[OpenedFile] = set()
        self.index: Metadata | None = None
        self.chunks: dict[MetadataIndex, tuple[torch.Size, torch.dtype]] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises OSError or UnsafeCheckpoint."""
        if self.index is None:
            index = read_index(Path(self.path) / ".metadata", self.opened)
            tensors = cast(dict[str, TensorStorageMetadata], index.state_dict_metadata)
            self.chunks = {
                MetadataIndex(name, chunk.offsets): (chunk.sizes, tensor.properties.dtype)
                for name, tensor in tensors.items()
                for chunk in tensor.chunks
            }
            self.index = index
        self.index.storage_meta = StorageMeta(load_id=self.load_id)
        return self.index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the chunks of a plan into the tensors to load. Raises OSError or UnsafeCheckpoint."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            path = Path(self.path) / name
            with open_file(path, self.opened) as file:
                for item in items:
                    chunk = self._read_chunk(file, item.storage_index)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(narrow_tensor_by_index(chunk, item.storage_offsets, item.lengths))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_tensor(self, name: str) -> Tensor:
        """Read one tensor, assembled from its chunks. Memory: the tensor, and one chunk if there are several.

        Raises:
            OSError, UnsafeCheckpoint: a file is missing, or does not hold what the index says.
        """
        index = self.read_metadata()
        about = cast(TensorStorageMetadata, index.state_dict_metadata[name])
        whole = torch.empty(about.size if len(about.chunks) != 1 else (), dtype=about.properties.dtype)
        for chunk in about.chunks:
            key = MetadataIndex(name, chunk.offsets)
            with open_file(Path(self.path) / index.storage_data[key].relative_path, self.opened) as file:
                part = self._read_chunk(file, key)
            if len(about.chunks) == 1:
                return part
            whole[tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))] = part
        return whole

    def _read_chunk(self, file: IO[bytes], key: MetadataIndex) -> Tensor:
        info = self.read_metadata().storage_data[key]
        try:
            return read_chunk(_Slice(file, info.offset, info.length), *self.chunks[key])
        except (UnsafeCheckpoint, *BROKEN) as error:
            where = f"{file.name}: no chunk of {key.fqn} at byte {info.offset}"
            raise UnsafeCheckpoint(f"{where}: {one_line(error)[:200]}") from error
