"""Counts the kernels that a step on CUDA launches and the bytes that they move, on meta tensors, without a GPU.

A kernel reads each input once and writes each output once, except where `_moved` says otherwise. Views and allocations
launch nothing. A function that becomes one kernel (`one_kernel`) counts as that kernel, whatever it is written in.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
OVERWRITES = ("copy_", "zero_", "fill_", "index_copy_")  # do not read what they replace
# Operators for whose result the host waits until the device has caught up.
HOST_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim")
# PyTorch's multi-tensor kernels: elements of a chunk, chunks of a launch, tensors of a launch.
CHUNK, MAX_CHUNKS, MAX_TENSORS = 1 << 16, 320, 36


@dataclass(frozen=True)
class Launch:
    """The kernels of one operator.

    Attributes:
        kind: `gemm`, `flash` or `other`.
        kernels: number of kernels.
        bytes: read and written.
        written: of these, written.
        place: line of the project that calls the operator.
    """

    name: str
    kind: str
    kernels: int
    bytes: int
    written: int
    place: str


class KernelCounter(TorchDispatchMode):
    """Attributes: launches, in order; host_waits: operator and place of each wait of the host for the device."""

    active: KernelCounter | None = None

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.host_waits: list[str] = []
        self._pinned: set[int] = set()
        # Inside a kernel: bytes that it reads through an index, and bytes that it changes, by storage.
        self._selected: dict[int, int] = {}
        self._written: dict[int, int] | None = None

    def __enter__(self) -> KernelCounter:
        KernelCounter.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        KernelCounter.active = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        options, name = options or {}, func.overloadpacket.__name__
        if name == "_pin_memory":  # needs a driver
            self._pinned.add(_storage(inputs[0]))
            return inputs[0]
        if self._waits(name, inputs, options):
            self.host_waits.append(f"{name} at {_place()}")
        if name == "_local_scalar_dense" and inputs[0].is_meta:
            return 1  # a meta tensor has no value
        out = func(*inputs, **options)
        self._count(func, name, inputs, options, out)
        return out

    @contextmanager
    def one_kernel(self, name: str, *inputs: Any, kernels: int = 1, passes: int = 1) -> Iterator[list[Tensor]]:
        """Count all operators of this context as one kernel, or a few, that write their outputs once.

        Args:
            passes: how often the inputs are read.

        Yields:
            A list for the outputs. Inputs that are changed in place count as written too.
        """
        outputs: list[Tensor] = []
        self._selected, self._written = {}, {}
        yield outputs
        changed, self._written = self._written, None
        sizes = {_storage(x): size_of([x]) for x in tree_leaves(inputs) if isinstance(x, Tensor)}
        read = sum(self._selected.get(key, size) for key, size in sizes.items())
        written = size_of(tree_leaves(outputs)) + sum(size for key, size in changed.items() if key in sizes)
        self.launches.append(Launch(name, "other", kernels, passes * read + written, written, _place()))

    def _waits(self, name: str, inputs: Any, options: Any) -> bool:
        """Whether the host waits: for a value, a boolean index, or a copy to or from memory that is not pinned."""
        if name in ("_to_copy", "copy_"):
            source = inputs[1] if name == "copy_" else inputs[0]
            target = inputs[0].device if name == "copy_" else options.get("device") or source.device
            if source.device.type == target.type:
                return False
            return target.type == "cpu" or _storage(source) not in self._pinned
        if name in ("index", "index_put", "index_put_"):
            return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in inputs[1])
        return name in HOST_WAITS or (name == "repeat_interleave" and options.get("output_size") is None)

    def _count(self, func: Any, name: str, inputs: Any, options: Any, out: Any) -> None:
        returns, names = func._schema.returns, func._schema.arguments
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        given = dict(zip((a.name for a in names), inputs, strict=False)) | options
        changed = [given[a.name] for a in names if a.name in given and a.alias_info and a.alias_info.is_write]
        if self._written is not None:
            if name == "index_select":
                self._selected[_storage(inputs[0])] = size_of([out])
            rows = [given["source"]] if name == "index_copy_" else None
            self._written |= {_storage(x): size_of(rows or [x]) for x in tree_leaves(changed)}
        touched = [x for x in tree_leaves((inputs, options, out)) if isinstance(x, Tensor)]
        is_on_device = all(x.is_meta or not x.dim() for x in touched)  # copies from the host are no kernels
        if is_view or name in ALLOCATIONS or self._written is not None or not is_on_device:
            return
        kept = [given[a.name] for a in names if a.name in given and not (a.alias_info and a.alias_info.is_write)]
        reads = [x for x in tree_leaves(kept) if isinstance(x, Tensor)]
        writes = tree_leaves(changed) or [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not size_of(writes):
            return
        if name == "_fused_adamw_":
            reads, writes = [*reads, *writes], [x for name in ("self", "exp_avgs", "exp_avg_sqs") for x in given[name]]
        elif changed and name not in OVERWRITES and func._overloadname != "out":
            reads = [*reads, *writes]
        kind, kernels = "other", 1
        if name in PRODUCTS:
            kind = "gemm"
        elif name == "_flash_attention_forward":
            kind = "flash"
        elif name == "_flash_attention_backward":  # dot of out and dout, gradients, dq; sums over query heads
            kind, kernels = "flash", 3 + 2 * (given["query"].shape[1] != given["key"].shape[1])
        elif name.startswith(("_foreach", "_fused_adamw")):
            chunks = sum(-(-x.numel() // CHUNK) for x in writes)
            kernels = max(-(-chunks // MAX_CHUNKS), -(-len(writes) // MAX_TENSORS))
        moved = _moved(name, reads, writes, given)
        self.launches.append(Launch(name, kind, kernels, moved, size_of(writes), _place()))


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def size_of(tensors: Sequence[Any]) -> int:
    """Bytes of the elements; an expanded dimension exists once."""
    total = 0
    for x in tensors:
        if x.numel():
            strides = zip(x.shape, x.stride(), strict=True)
            total += x.element_size() * math.prod(size for size, stride in strides if stride)
    return total


def _moved(name: str, reads: list[Tensor], writes: list[Tensor], given: dict[str, Any]) -> int:
    if name in ("index_select", "gather", "embedding"):  # of the source, only what is written
        return 2 * size_of(writes) + size_of([given.get("index", given.get("indices"))])
    if name in ("index_copy_", "index_add_", "scatter_add_"):  # of the target, only the rows of the index
        source = given.get("source", given.get("src"))
        return size_of([given["index"], source]) + size_of([source]) * (1 if name == "index_copy_" else 2)
    if name == "_log_softmax":  # a row of a vocabulary fits no cache: read for its sum, and for its result
        return 2 * size_of(reads) + size_of(writes)
    return size_of(reads) + size_of(writes)


def _place() -> str:
    for frame in reversed(traceback.extract_stack(limit=40)):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "autograd"


@contextmanager
def counted_kernel(name: str, *inputs: Any, kernels: int = 1, passes: int = 1) -> Iterator[list[Tensor]]:
    """`one_kernel` of the counter that is at work, if any."""
    if KernelCounter.active is None:
        yield []
    else:
        with KernelCounter.active.one_kernel(name, *inputs, kernels=kernels, passes=passes) as outputs:
            yield outputs
