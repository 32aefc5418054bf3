"""Read the index of a torch.distributed.checkpoint without running code from it.

The library unpickles `.metadata` without limits, and every stored entry that is no tensor: a downloaded checkpoint
could run any code. Here an allow-list unpickler returns stand-ins of the library's classes, made anew for each index,
because the opcode BUILD can set attributes of any class that a pickle can name. The library's records are then built
from fields of the expected types. Every entry must be a tensor in a data file of the checkpoint's folder. The library
reads the tensors with `weights_only`.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from types import NoneType
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from utils.errors import UserError

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
DATA_FILE = re.compile(r"__\d+_\d+\.distcp")


class UnsafeCheckpoint(UserError):
    """The index of a checkpoint names a class, type or file that no checkpoint of train.py needs."""


class _StandIn:
    """A record of an index whose fields are not checked yet."""

    def __new__(cls, *_: Any) -> _StandIn:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexUnpickler(pickle.Unpickler):
    """Return dtypes and sizes, which are immutable, and stand-ins of this unpickler's own for the allowed classes."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.stand_ins = {key: type(key[1], (_StandIn,), {}) for key in ALLOWED}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.stand_ins:
            return self.stand_ins[module, name]
        value = vars(torch).get(name) if module == "torch" else None
        if value is torch.Size or isinstance(value, torch.dtype):
            return value
        raise UnsafeCheckpoint(f"it names {module}.{name}, which no checkpoint needs and which may run code")


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
    return value


def read_index(path: Path) -> Metadata:
    """Read the index of a checkpoint.

    Raises:
        UnsafeCheckpoint: the file is no index, or has an entry that is no tensor in a data file of its folder.
    """
    try:
        with path.open("rb") as file:
            metadata = _build(_IndexUnpickler(file).load(), Metadata)
        for info in metadata.storage_data.values():
            if not DATA_FILE.fullmatch(info.relative_path):
                raise UnsafeCheckpoint(f"a tensor is in {info.relative_path!r}, which is no data file of this folder")
        return metadata
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{path}: not the index of a checkpoint to load: {error}") from error
    except (
        pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError,
        TypeError, ValueError,
    ) as error:  # fmt: skip
        raise UnsafeCheckpoint(f"{path}: not the index of a checkpoint ({type(error).__name__})") from error


class SafeReader(dcp.FileSystemReader):
    """`FileSystemReader` that reads its index with `read_index`.

    Attributes:
        refused: why `read_metadata` failed; the error of `dcp.load` in PyTorch 2.11 does not say.
    """

    refused: Exception | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises OSError or UnsafeCheckpoint."""
        try:
            metadata = read_index(Path(self.path) / ".metadata")
        except (OSError, UnsafeCheckpoint) as error:
            self.refused = error
            raise
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata
