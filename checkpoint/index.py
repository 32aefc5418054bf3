"""The index of a checkpoint, `.metadata`: made from what each rank wrote, and packed for all ranks to read.

At 4096 ranks an index has a million chunks. Python objects of them take gigabytes, so only rank 0 builds or parses the
whole index; the others send and receive text and arrays.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, WriteResult, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from checkpoint.reader import check_chunks


def data_file(rank: int) -> str:
    """Name of the file into which a rank writes its chunks."""
    return f"__{rank}_0.distcp"


def describe_chunks(plan: SavePlan, results: Iterable[WriteResult]) -> str:
    """Return the chunks that this rank wrote, as JSON: equal where an equal state is saved again."""
    places = {result.index: result.storage_data for result in results}
    chunks = []
    for item in plan.items:
        tensor, place = item.tensor_data, places[item.index]
        assert tensor is not None
        box = list(tensor.chunk.offsets), list(tensor.chunk.sizes)
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        chunks.append([item.index.fqn, dtype, list(tensor.size), *box, place.offset, place.length])
    return json.dumps(chunks)


def build_index(written: Iterable[str]) -> bytes:
    """Return the content of `.metadata`, from each rank's `describe_chunks` in the order of ranks.

    Equal sizes, offsets and chunks are one object: half the bytes and half the time to read. Of copies the first rank's
    counts.
    """
    shared: dict[Any, Any] = {}
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}

    def share(value: Any) -> Any:
        return shared.setdefault(value, value)

    for rank, text in enumerate(written):
        file = data_file(rank)
        for name, dtype, size, offsets, sizes, place, length in json.loads(text):
            box = share(torch.Size(offsets)), share(torch.Size(sizes))
            index = MetadataIndex(name, box[0])
            if index in storage:
                continue
            storage[index] = _StorageInfo(file, place, length)
            if name not in tensors:
                properties = TensorProperties(dtype=getattr(torch, dtype))
                tensors[name] = TensorStorageMetadata(properties, share(torch.Size(size)), [])
            tensors[name].chunks.append(shared.setdefault(box, ChunkStorageMetadata(*box)))
    for name, tensor in tensors.items():
        check_chunks(name, tensor, storage)
    paths = {name: _path(name) for name in tensors}
    return pickle.dumps(Metadata(cast(Any, tensors), paths, storage, version=CURRENT_DCP_VERSION))


def _path(name: str) -> tuple[str, ...]:
    """Return where the tensor stands in nested dictionaries: `dcp_to_torch_save` makes them."""
    part, _, rest = name.partition(".")
    return (part, *rest.rsplit(".", 1)) if part == "optimizer" else (part, rest)


@dataclass(frozen=True)
class PackedTensor:
    """A stored tensor.

    Attributes:
        chunks: int64 [number of chunks, 2 * dimensions + 3]: offsets, sizes, number of the file, first byte, bytes.
    """

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: np.ndarray


@dataclass(frozen=True)
class PackedIndex:
    """An index whose chunks are arrays: a tenth of its size as Python objects.

    Attributes:
        files: names of the data files.
        tensors: by name.
    """

    files: Sequence[str]
    tensors: dict[str, PackedTensor]

    @classmethod
    def pack(cls, index: Metadata) -> PackedIndex:
        storage = cast(dict[MetadataIndex, _StorageInfo], index.storage_data)
        files = sorted({info.relative_path for info in storage.values()})
        numbers = {file: number for number, file in enumerate(files)}
        tensors = {}
        for name, about in cast(dict[str, TensorStorageMetadata], index.state_dict_metadata).items():
            infos = [storage[MetadataIndex(name, chunk.offsets)] for chunk in about.chunks]
            rows = [
                (*chunk.offsets, *chunk.sizes, numbers[info.relative_path], info.offset, info.length)
                for chunk, info in zip(about.chunks, infos, strict=True)
            ]
            width = 2 * len(about.size) + 3
            chunks = np.array(rows, dtype=np.int64).reshape(len(rows), width)
            tensors[name] = PackedTensor(about.properties.dtype, tuple(about.size), chunks)
        return cls(files, tensors)

    def select(self, names: Collection[str]) -> Metadata:
        """Return the index of some tensors; a name without a stored tensor is left out."""
        tensors: dict[str, Any] = {}
        storage = {}
        for name in self.tensors.keys() & set(names):
            packed = self.tensors[name]
            dims, chunks = len(packed.size), []
            for row in packed.chunks.tolist():
                chunk = ChunkStorageMetadata(torch.Size(row[:dims]), torch.Size(row[dims : 2 * dims]))
                file, place, length = row[2 * dims :]
                storage[MetadataIndex(name, chunk.offsets)] = _StorageInfo(self.files[file], place, length)
                chunks.append(chunk)
            tensors[name] = TensorStorageMetadata(TensorProperties(packed.dtype), torch.Size(packed.size), chunks)
        return Metadata(tensors, storage_data=storage)
