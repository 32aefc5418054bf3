"""The c10d backend "staged": several ranks on one GPU, whose tensors go through host memory and gloo. For checks; its
timings mean nothing.

NCCL refuses two ranks on one card, and gloo cannot send CUDA tensors from rank to rank. Every call copies what it sends
to the host (after what the caller's stream has queued), lets gloo carry it, and `wait` copies what arrived to the
device on the stream that waits, which are NCCL's rules. CPU tensors take the same way, so that it can be tested without
a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NAME = "staged"
# What gloo adds up; others go as fp32.
ADDABLE = (torch.float32, torch.float64, torch.int32, torch.int64, torch.int8, torch.uint8)


def _to_host(x: Tensor) -> Tensor:
    """A contiguous copy; waits until the current stream has made x."""
    return torch.empty(x.shape, dtype=x.dtype).copy_(x.detach())


def _as_bytes(host: Tensor) -> Tensor:
    """gloo does not know every dtype; bytes it does."""
    return host.reshape(-1).view(torch.uint8)


class StagedWork(dist.Work):
    """Waits for gloo, then for each (tensor, what arrived for it) copies one into the other."""

    def __init__(
        self, works: Iterable[Any] = (), arrived: Iterable[tuple[Tensor, Tensor]] = (), sent: Sequence[Tensor] = ()
    ) -> None:
        super().__init__()
        self.works, self.sent, self.finished = list(works), sent, False
        self.arrived = [(x, host, self._here(x)) for x, host in arrived]

    @staticmethod
    def _here(x: Tensor) -> Any:
        """An event behind what the caller's stream has queued: it may still read the tensor."""
        if not x.is_cuda:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(x.device))
        return event

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self.finished:
            for work in self.works:
                work.wait()
            for x, host, event in self.arrived:
                if event is not None:
                    torch.cuda.current_stream(x.device).wait_event(event)
                with torch.no_grad():
                    x.copy_(host.to(x.dtype).reshape(x.shape))
            self.finished, self.sent = True, ()
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self.finished or all(work.is_completed() for work in self.works)

    def is_success(self) -> bool:
        return self.finished

    def result(self) -> list[Tensor]:
        return [x for x, _, _ in self.arrived]

    def get_future(self) -> torch.futures.Future:
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self.result())
        return future


class StagedGroup(dist.ProcessGroup):
    """The calls that c10d makes of a backend, over one gloo group."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.sending: list[StagedWork] = []  # outlive callers that drop their handle

    # What c10d asks of a group that it did not build itself.
    def getBackendName(self) -> str:
        return NAME

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def supports_coalescing(self) -> bool:
        return False

    def _set_default_backend(self, *_: Any) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def abort(self) -> None:
        pass

    # From rank to rank
    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> StagedWork:
        hosts = [_as_bytes(_to_host(x)) for x in tensors]
        work = StagedWork([self.gloo.send([host], peer, tag) for host in hosts], sent=hosts)
        self.sending = [w for w in self.sending if not w.is_completed()] + [work]
        return work

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> StagedWork:
        hosts = [torch.empty(x.shape, dtype=x.dtype) for x in tensors]
        return StagedWork(
            [self.gloo.recv([_as_bytes(host)], peer, tag) for host in hosts], zip(tensors, hosts, strict=True)
        )

    # Collectives
    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        """On the host; gloo knows no average."""
        host = _to_host(x)
        host = host if host.dtype in ADDABLE else host.float()
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM if operation == dist.ReduceOp.AVG else operation
        self.gloo.allreduce([host], options).wait()
        return host.div_(self.size()) if operation == dist.ReduceOp.AVG else host

    def _gathered(self, x: Tensor) -> list[Tensor]:
        mine = _as_bytes(_to_host(x))
        parts = [torch.empty_like(mine) for _ in range(self.size())]
        self.gloo.allgather([parts], [mine]).wait()
        return [part.view(x.dtype).reshape(x.shape) for part in parts]

    def _exchanged(self, sent: Sequence[Tensor], shapes: Sequence[torch.Size], dtype: torch.dtype) -> list[Tensor]:
        """Host tensors, one for each rank."""
        got = [torch.empty(shape, dtype=dtype) for shape in shapes]
        hosts, works = [_as_bytes(x.contiguous()) for x in sent], []
        for peer in range(self.size()):
            if peer == self.rank():
                got[peer].copy_(sent[peer].reshape(got[peer].shape))
                continue
            works += [self.gloo.send([hosts[peer]], peer, 7)] if hosts[peer].numel() else []
            works += [self.gloo.recv([_as_bytes(got[peer])], peer, 7)] if got[peer].numel() else []
        for work in works:
            work.wait()
        return got

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> StagedWork:
        operation = opts.reduceOp if opts else dist.ReduceOp.SUM
        return StagedWork(arrived=[(x, self._reduced(x, operation)) for x in tensors])

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> StagedWork:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        reduced = [(x, self._reduced(x, opts.reduceOp)) for x in tensors]
        return StagedWork(arrived=reduced if self.rank() == opts.rootRank else [])

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> StagedWork:
        hosts = [_to_host(x) for x in tensors]
        opts = opts or dist.BroadcastOptions()
        return StagedWork(
            [self.gloo.broadcast([_as_bytes(host)], opts) for host in hosts], zip(tensors, hosts, strict=True)
        )

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> StagedWork:
        return StagedWork(
            arrived=[
                pair
                for out, x in zip(outputs, inputs, strict=True)
                for pair in zip(out, self._gathered(x), strict=True)
            ]
        )

    def _allgather_base(self, output: Tensor, x: Tensor, opts: Any = None) -> StagedWork:
        return StagedWork(arrived=[(output, torch.cat([part.reshape(-1) for part in self._gathered(x)]))])

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> StagedWork:
        return _all([self._allgather_base(out, x) for out, x in zip(outputs, inputs, strict=True)])

    def _reduce_scatter_base(self, output: Tensor, x: Tensor, opts: Any = None) -> StagedWork:
        reduced = self._reduced(x, opts.reduceOp if opts else dist.ReduceOp.SUM)
        return StagedWork(arrived=[(output, reduced.reshape(-1).chunk(self.size())[self.rank()])])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> StagedWork:
        flat = [torch.cat([x.reshape(-1) for x in parts]) for parts in inputs]
        return _all([self._reduce_scatter_base(out, x, opts) for out, x in zip(outputs, flat, strict=True)])

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> StagedWork:
        return _all([self._reduce_scatter_base(out, x, opts) for out, x in zip(outputs, inputs, strict=True)])

    def alltoall_base(
        self, output: Tensor, x: Tensor, out_splits: list[int], in_splits: list[int], opts: Any = None
    ) -> StagedWork:
        size = self.size()
        takes, gives = (list(s) or [len(t) // size] * size for s, t in ((out_splits, output), (in_splits, x)))
        shapes = [torch.Size((n, *output.shape[1:])) for n in takes]
        return StagedWork(
            arrived=[(output, torch.cat(self._exchanged(_to_host(x).split(gives), shapes, output.dtype)))]
        )

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> StagedWork:
        got = self._exchanged([_to_host(x) for x in inputs], [out.shape for out in outputs], inputs[0].dtype)
        return StagedWork(arrived=zip(outputs, got, strict=True))

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> StagedWork:
        parts = self._gathered(inputs[0])
        return StagedWork(arrived=zip(outputs[0], parts, strict=True) if outputs else [])

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> StagedWork:
        host = _to_host(outputs[0])
        work = self.gloo.scatter(
            [host], [[_to_host(x) for x in inputs[0]]] if inputs else [], opts or dist.ScatterOptions()
        )
        return StagedWork([work], [(outputs[0], host)])

    def barrier(self, opts: Any = None) -> StagedWork:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return StagedWork([self.gloo.barrier(opts or dist.BarrierOptions())])

    # The names of PyTorch 2.13; those above are 2.11's.
    all_gather_single, reduce_scatter_single, all_to_all_single = _allgather_base, _reduce_scatter_base, alltoall_base
    all_gather_single_coalesced, reduce_scatter_single_coalesced = (
        allgather_into_tensor_coalesced,
        reduce_scatter_tensor_coalesced,
    )


def _all(works: Sequence[StagedWork]) -> StagedWork:
    return StagedWork(works)


def register() -> None:
    """Make `backend="staged"` known to torch.distributed; once a process."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, StagedGroup, devices=["cpu", "cuda"])
