"""A step without devices, data or peers: PyTorch's fake tensors and fake process group, and a ledger of live bytes.

This file holds every private name of PyTorch that the planner uses; tests/unit/test_private_names.py checks them.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.optim import adam
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from parallel import tensor


@dataclass
class _Storage:
    """A live storage: its bytes and its label in the ledger."""

    size: int
    label: str
    alive: weakref.ref


class MemoryLedger(TorchDispatchMode):
    """Counts the bytes of live storages by label.

    Attributes:
        label: of new storages.
        ignored: type of a device whose tensors are not counted.
        peaks: moment of the step -> bytes by label at the moment's peak.
    """

    def __init__(self, *, ignored: str | None = "meta") -> None:
        super().__init__()
        self.label = self._moment = "weights"
        self._is_paused, self.ignored = False, ignored
        self.peaks: dict[str, dict[str, int]] = {}
        self._live: dict[str, int] = {}
        self._storages: dict[int, _Storage] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled; its wrappers of each call would cost as much as the call

    def __torch_dispatch__(self, func: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(inputs[0], FakeTensor):
            return inputs[0].fake_device  # most calls by far
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # a fake tensor has no value; pipeline stages vote on static shapes, and 1 is yes
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operations on the shards follow
        options = options or {}
        out = _call(func, inputs, options)
        if self._is_paused:
            return out
        self.add(out)
        if func.namespace == "fsdp":  # gathers copy in, split out; reductions concatenate the gradients
            label = "gradients" if "chunk_cat" in func.name() else "gathered weights"
            self.relabel([out, options], label)
        elif func is torch.ops.c10d._reduce_scatter_base_.default and self._label(inputs[1]) == "gradients":
            self.relabel(inputs[0], "gradients")
        return out

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count new storages."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def add(self, tensors: Any) -> None:
        """Count the storages of these tensors from now on."""
        for x in (tensors,) if isinstance(tensors, Tensor) else tree_leaves(tensors):
            if isinstance(x, Tensor):
                self._add(x)

    def enter(self, label: str, moment: str | None = None) -> None:
        """The step goes on to another moment; None: named as the label."""
        self.label, self._moment = label, moment or label

    def relabel(self, tensors: Any, label: str) -> None:
        for x in tree_leaves(tensors):
            storage = self._storages.get(x.untyped_storage()._cdata) if isinstance(x, Tensor) else None
            if storage is not None:
                self._move(storage, label)

    def relabel_all(self, old: str, new: str) -> None:
        for storage in self._storages.values():
            if storage.label == old:
                self._move(storage, new)

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Follow a storage that FSDP2 freed or allocated again."""
        known = self._storages.get(storage._cdata)
        if known is not None:
            self._live[known.label] += storage.nbytes() - known.size
            known.size = storage.nbytes()
            self._look()

    def _label(self, x: Tensor) -> str | None:
        storage = self._storages.get(x.untyped_storage()._cdata)
        return None if storage is None else storage.label

    def _move(self, storage: _Storage, label: str) -> None:
        self._live[storage.label] -= storage.size
        storage.label = label
        self._live[label] = self._live.get(label, 0) + storage.size

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._storages or getattr(x, "fake_device", storage.device).type == self.ignored:
            return
        alive = weakref.ref(storage, lambda _: self._drop(key))
        self._storages[key] = _Storage(storage.nbytes(), self.label, alive)
        self._live[self.label] = self._live.get(self.label, 0) + storage.nbytes()
        self._look()

    def _drop(self, key: int) -> None:
        storage = self._storages.pop(key)
        self._live[storage.label] -= storage.size

    def _look(self) -> None:
        if sum(self._live.values()) > sum(self.peaks.get(self._moment, {}).values()):
            self.peaks[self._moment] = {label: size for label, size in self._live.items() if size}


def _call(func: Any, inputs: Any, options: Any) -> Any:
    """`func(*inputs, **options)`; of fake tensors by the meta kernel alone.

    FakeTensorMode would look up each call in its cache, which took most of a plan's time.
    """
    parts = [x for part in inputs for x in (part if isinstance(part, (list, tuple)) else (part,))]
    devices = {getattr(x, "fake_device", None) for x in parts if isinstance(x, Tensor)}
    if func.namespace != "aten" or "device" in options or len(devices) != 1 or None in devices:
        return func(*inputs, **options)
    (device,), mode = devices, next(x.fake_mode for x in parts if isinstance(x, FakeTensor))
    try:
        with in_kernel_invocation_manager(mode):
            out = func(*inputs, **options)
    except NotImplementedError:  # no meta kernel
        return func(*inputs, **options)

    def wrap(x: Any) -> Any:
        return FakeTensor(mode, x, device) if type(x) is Tensor else x

    return wrap(out) if isinstance(out, Tensor) else tree_map(wrap, out)


@contextmanager
def fake_world(*, rank: int, world_size: int) -> Iterator[None]:
    """The default process group of one rank of a world that does not exist. Collectives return at once."""
    assert not dist.is_initialized(), "a plan is made where no process group exists"
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it keeps meshes whose groups are gone, for equal ones of the next world
        sys.excepthook = hook  # `init_process_group` puts the rank in front of each line


def fused_on_meta() -> AbstractContextManager:
    """Fused optimizers take meta tensors, which have their operators but are not on the list of devices."""
    return mock.patch.object(adam, "_device_dtype_check_for_fused")


class HostMemory(torch.autograd.graph.saved_tensors_hooks):
    """In place of `save_on_cpu`: saved tensors that take no memory of the device until they are needed."""

    def __init__(self, **_: Any) -> None:
        super().__init__(lambda x: (x.device, x.to("meta")), lambda kept: torch.empty_like(kept[1], device=kept[0]))


@contextmanager
def held_messages() -> Iterator[None]:
    """gloo frees the tensors of a collective late: those of the last two over tp stay until others follow."""
    last: deque[tuple[Tensor, Tensor]] = deque(maxlen=2)

    def hold(send: Any) -> Any:
        def sent(x: Tensor, group: dist.ProcessGroup) -> Tensor:
            out = send(x, group)
            last.append((x, out))
            return out

        return sent

    names = ("_gather", "_sum", "reduce_scatter")
    with mock.patch.multiple(tensor, **{name: hold(getattr(tensor, name)) for name in names}):
        yield


@contextmanager
def fake_step(ledger: MemoryLedger) -> Iterator[None]:
    """Tensors have shapes but no data, and the ledger counts them."""
    resize, isend = torch.UntypedStorage.resize_, dist.isend
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def counted_resize(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        ledger.resize(storage)

    def held_isend(tensor: Tensor, *where: Any, **options: Any) -> Any:
        """The returned work holds its tensor, as that of a real group does."""
        ledger.relabel(tensor, "sent messages")
        work = isend(tensor, *where, **options)
        assert work is not None, "this rank is in every group of the fake world"
        return SimpleNamespace(wait=work.wait, tensor=tensor)

    def propagate_uncounted(*arguments: Any) -> Any:
        """DTensor finds shapes on fake tensors of whole weights: PyTorch 2.11 for the optimizer's update too."""
        with ledger.pause():
            return propagate(*arguments)

    with (
        mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_uncounted),
        mock.patch.object(torch.UntypedStorage, "resize_", counted_resize),
        mock.patch.object(dist, "isend", held_isend),
        mock.patch.object(dist.distributed_c10d, "isend", held_isend),
        FakeTensorMode(allow_non_fake_inputs=True),
        ledger,
    ):
        yield
