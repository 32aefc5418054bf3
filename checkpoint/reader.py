"""Reading a checkpoint without running what it says.

torch.distributed.checkpoint unpickles the index `.metadata` with no limits, and whatever it stored that is not a tensor: a checkpoint
from elsewhere could run any code. Here an index is unpickled into empty stand-ins, made anew for each, from which the library's records
are built again once every field is what it should be; every entry must be a tensor, and every tensor must lie in a file of the
checkpoint's folder. The tensors themselves are read by the library with `weights_only`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from utils.errors import UserError

T = TypeVar("T")

METADATA = "torch.distributed.checkpoint.metadata"
RECORDS = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        (METADATA, n)
        for n in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    ),
}
DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
LAYOUTS = {str(value): value for value in (torch.strided, torch.sparse_coo)}
PATHS = {
    (module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")
}  # _local: Python 3.13
DATA_FILE = re.compile(r"__\d+_\d+\.distcp")


class UnsafeCheckpoint(UserError):
    """A checkpoint that asks for what no checkpoint of ours needs."""


class _Record:
    """One of the library's records, as it stands in the index."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexUnpickler(pickle.Unpickler):
    """What an index asks for by name is either a constant or made for this index alone, so that nothing in it can change the process."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.records = {name: type(name[1], (_Record,), {}) for name in RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.records:
            return self.records[module, name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) in PATHS:
            return lambda *parts: parts  # where it was written: nothing here reads it
        if (module, name) == ("torch", "Size"):
            return lambda sizes: torch.Size(sizes)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return lambda layout: LAYOUTS[layout]
        if (module, name) == (METADATA, "_MEM_FORMAT_ENCODING"):
            return lambda number: _MEM_FORMAT_ENCODING(number)
        raise UnsafeCheckpoint(
            f"its index asks for {module}.{name}, which no checkpoint needs: it may run code, so it is not loaded"
        )


def _fields(record: Any, kind: type) -> dict[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != kind.__name__ or not isinstance(record.state, dict):
        raise UnsafeCheckpoint(f"a {kind.__name__} of it is none")
    return record.state


def _checked(value: Any, *kinds: type[T]) -> T:
    if type(value) not in kinds:
        raise UnsafeCheckpoint(f"its index holds {value!r:.60} where {kinds[0].__name__} should be")
    return value


def _properties(record: Any) -> TensorProperties:
    if not isinstance(record, _Record) or type(record).__name__ != "TensorProperties":
        raise UnsafeCheckpoint("a TensorProperties of it is none")
    dtype, layout, requires_grad, memory_format, pin_memory = record.state
    made = TensorProperties.__new__(TensorProperties)
    encoding = _checked(memory_format, _MEM_FORMAT_ENCODING)
    made.__setstate__(
        (
            _checked(dtype, torch.dtype),
            _checked(layout, torch.layout),
            _checked(requires_grad, bool),
            encoding,
            _checked(pin_memory, bool),
        )
    )
    return made


def _chunk(record: Any) -> ChunkStorageMetadata:
    fields = _fields(record, ChunkStorageMetadata)
    return ChunkStorageMetadata(
        offsets=_checked(fields["offsets"], torch.Size), sizes=_checked(fields["sizes"], torch.Size)
    )


def _tensor(name: str, record: Any) -> TensorStorageMetadata:
    if not isinstance(record, _Record) or type(record).__name__ != "TensorStorageMetadata":
        raise UnsafeCheckpoint(f"{name} is not a tensor; what else is stored would be unpickled, so it is not loaded")
    fields = _fields(record, TensorStorageMetadata)
    return TensorStorageMetadata(
        properties=_properties(fields["properties"]),
        size=_checked(fields["size"], torch.Size),
        chunks=[_chunk(chunk) for chunk in _checked(fields["chunks"], list)],
    )


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, MetadataIndex)
    offset, index = fields["offset"], fields["index"]
    return MetadataIndex(
        _checked(fields["fqn"], str),
        None if offset is None else _checked(offset, torch.Size),
        None if index is None else _checked(index, int),
    )


def _place(record: Any) -> _StorageInfo:
    fields = _fields(record, _StorageInfo)
    path = _checked(fields["relative_path"], str)
    if not DATA_FILE.fullmatch(path) or fields.get("transform_descriptors"):
        raise UnsafeCheckpoint(f"a tensor lies in {path!r}, which is no data file of this folder")
    return _StorageInfo(path, _checked(fields["offset"], int), _checked(fields["length"], int))


def _plain(value: Any) -> Any:
    """Containers of words and numbers, of which the planner's notes consist."""
    if type(value) is dict:
        return {_plain(k): _plain(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value if value is None else _checked(value, str, int)


def _each(items: Any, key: Callable[[Any], Any], value: Callable[[Any, Any], Any]) -> dict:
    return {key(k): value(k, v) for k, v in _checked(items, dict).items()}


def read_index(place: Path) -> Metadata:
    """The index of a checkpoint.

    Raises:
        UnsafeCheckpoint: not one, or one that is not made of the library's records of tensors in this folder.
    """
    try:
        with place.open("rb") as file:
            found = _IndexUnpickler(file).load()
        if not isinstance(found, _Record) or type(found).__name__ != "Metadata":
            raise UnsafeCheckpoint("not the index of a checkpoint")
        fields = _fields(found, Metadata)
        metadata = Metadata(
            _each(fields["state_dict_metadata"], lambda name: _checked(name, str), _tensor),
            planner_data=_plain(fields["planner_data"]),
            storage_data=_each(fields["storage_data"], _index, lambda _, info: _place(info)),
            storage_meta=StorageMeta(),
        )
        if fields.get("version") is not None:
            metadata.version = _checked(fields["version"], str)
        return metadata
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{place}: {error}") from error
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise UnsafeCheckpoint(f"{place}: not the index of a checkpoint ({type(error).__name__})") from error


class SafeReader(dcp.FileSystemReader):
    """`FileSystemReader` with `read_index`.

    Attributes:
        refused: why `read_metadata` last failed; `dcp.load` of PyTorch 2.11 keeps only that it did.
    """

    refused: Exception | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            metadata = read_index(Path(self.path) / ".metadata")
        except (OSError, UnsafeCheckpoint) as error:
            self.refused = error
            raise
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata
