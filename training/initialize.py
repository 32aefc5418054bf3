"""Device, process group and allocator: everything that reads the environment."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """What torchrun told this process; the defaults are those of a plain `python train.py`."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def under_torchrun(self) -> bool:
        return "TORCHELASTIC_RUN_ID" in os.environ or "MASTER_ADDR" in os.environ


def read_launch() -> Launch:
    """This process's place, from the variables that torchrun sets."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    given = {name.lower(): int(os.environ[name]) for name in names if name in os.environ}
    return Launch(**given)


def cuda_device_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: by default every big tensor is mapped, zeroed and unmapped anew.

    Costs nothing but address space that the next step uses again. Measured in benchmarks/train_step.py.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return  # not glibc: its allocator is left as it is
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 2**31 - 1)
    mallopt(m_trim_threshold, 2**31 - 1)


def initialise_distributed(launch: Launch, device_type: str, *, timeout_minutes: float) -> torch.device:
    """Make the default process group and return this rank's device.

    NCCL on CUDA with gloo beside it for CPU tensors, gloo alone on the CPU.
    """
    if device_type == "cuda":
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        keep_freed_memory()
    timeout = timedelta(minutes=timeout_minutes)
    if launch.under_torchrun:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def on_rank_zero_first(build: Callable[[], T]) -> T:
    """`build()` on rank 0, then on the others, which find what it cached.

    Raises:
        ValueError: on every rank, with rank 0's words, if it raised one there.
    """
    failure: list[str | None] = [None]
    result = None
    if dist.get_rank() == 0:
        try:
            result = build()
        except (ValueError, OSError) as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise ValueError(failure[0])
    return result if result is not None else build()


def broadcast_string(value: str) -> str:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def max_memory_bytes(device: torch.device) -> int:
    """Peak so far: of CUDA's allocator, or on the CPU this process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
