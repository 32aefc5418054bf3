"""Device, process group and allocator: everything that reads the environment."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from utils.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """What torchrun told this process; the defaults are those of a plain `python train.py`."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    under_torchrun: bool = False
    restarts: int = 0  # of this job's ranks by torchrun, so far


def read_launch() -> Launch:
    """This process's place, from the variables that torchrun sets; without RANK it is alone.

    Raises:
        ValueError: some of them but not all, or one of several copies that `srun` started without torchrun.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in os.environ:
        copies = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if copies > 1 and "SLURM_PROCID" in os.environ:
            raise UserError(
                f"srun started {copies} copies without torchrun, each alone: start torchrun, as launch/slurm.sbatch does"
            )
        return Launch()
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(f"the environment has RANK but not {', '.join(missing)}: start with torchrun, or unset RANK")
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return Launch(**{name.lower(): int(os.environ[name]) for name in names[:4]}, under_torchrun=True, restarts=restarts)


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
    for option in (m_mmap_threshold, m_trim_threshold):
        if not mallopt(option, 2**31 - 1):
            print(f"glibc refused mallopt({option}): steps on this CPU will be slower", file=sys.stderr)


def initialise_distributed(launch: Launch, device_type: str, *, timeout: timedelta) -> tuple[torch.device, dist.Store]:
    """Make the default process group.

    NCCL on CUDA with gloo beside it for CPU tensors, gloo alone on the CPU.

    Returns:
        This rank's device, and a connection of its own to the store that the ranks of this start share.
    """
    if device_type == "cuda":
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
        # A matrix product over a row's tokens may be cut into parts; they are added up in fp32, whatever the row's length.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        backend = "cpu:gloo,cuda:nccl"
        # Where Transformer Engine's fused kernels cannot, it would take products with whole scores, without a word: slow, and at long
        # sequences out of memory. It listens to this variable only; then it raises an error that says how to see the reason.
        os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
    else:
        device = torch.device("cpu")
        backend = "gloo"
        keep_freed_memory()
    store: dist.Store = dist.HashStore()
    if launch.under_torchrun:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        # After a restart torchrun's store still holds where the dead ranks listened; PyTorch 2.13 tells attempts no longer apart.
        store = dist.PrefixStore(f"attempt {launch.restarts}", store)
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    return device, store.clone()  # type: ignore[attr-defined]


def collective_timeout(args: Namespace) -> timedelta:
    """Of the process groups themselves: later than the watchdog, which can say more (runtime/watchdog.py)."""
    return timedelta(minutes=1 + 1.5 * max(args.distributed_timeout_minutes, args.distributed_startup_timeout_minutes))


def group_backend(device: torch.device) -> str:
    """Of the grid's groups, which carry tensors of the run's device only."""
    return "nccl" if device.type == "cuda" else "gloo"


def on_rank_zero_first(build: Callable[[], T]) -> T:
    """`build()` on rank 0, then on the others, which find what it cached. They wait as long as it takes.

    Raises:
        ValueError: on every rank, with rank 0's words, if it raised one there.
    """
    patient = dist.new_group(
        backend="gloo", timeout=timedelta(days=365)
    )  # tokenizing a corpus is no collective that hangs
    failure: list[str | None] = [None]
    result = None
    if dist.get_rank() == 0:
        try:
            result = build()
        except (ValueError, OSError) as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0, group=patient)
    dist.destroy_process_group(patient)
    if failure[0] is not None:
        raise UserError(failure[0])
    return result if result is not None else build()


def check_ranks_agree(facts: dict[str, Any], what: str) -> None:
    """Every rank must hold the same facts. Collective over the world; costs one small exchange where they do.

    Args:
        facts: by name; anything with a stable text form.
        what: of what, for the message.

    Raises:
        ValueError: on every rank, naming the facts that differ and the ranks that differ from rank 0.
    """
    own = {name: repr(value) for name, value in facts.items()}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    ranks = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if not ranks:
        return
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    first, other = everyones[0], everyones[ranks[0]]
    differing = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    name = differing[0]
    raise UserError(
        f"{what} differ between ranks: {', '.join(differing)} ({name} is {first.get(name)} on rank 0 but {other.get(name)} on rank "
        f"{ranks[0]}); ranks that differ from rank 0: {', '.join(map(str, ranks[:16]))}{' ...' if len(ranks) > 16 else ''}"
    )


def on_one_rank(action: Callable[[], T]) -> T | None:
    """`action()` on rank 0 alone; None on the others. Collective.

    Raises:
        ValueError: on every rank, with rank 0's words, if it raised one there.
    """
    failure: list[str | None] = [None]
    result = None
    if dist.get_rank() == 0:
        try:
            result = action()
        except ValueError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise UserError(failure[0])
    return result


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def max_memory_bytes(device: torch.device) -> int:
    """Peak so far: of CUDA's allocator, or on the CPU this process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
