"""Process groups, device and allocator: everything that reads the environment."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import shutil
import stat
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from config.schema import ParallelConfig
from cp.flash_version import installed_versions
from parallel.grid import Grid, GridSizes, build_grid
from runtime.status import RunStatus
from runtime.watchdog import Watchdog
from utils.errors import MissingPackageError, UserError, is_installed

T = TypeVar("T")

# Flags whose value may differ between nodes: paths.
LOCAL_FLAGS = {"data_path", "valid_data_path", "data_cache_path", "tokenizer_model", "local_save_dir"}


@dataclass(frozen=True)
class Launch:
    """This process as torchrun started it; the defaults are those of a plain `python train.py`.

    Attributes:
        restarts: how often torchrun has restarted this job's ranks.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    under_torchrun: bool = False
    restarts: int = 0


def read_ranks() -> tuple[int, int]:
    """(rank, local rank) of this process, without checks: for an error that comes before `read_launch`."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))


def read_launch() -> Launch:
    """Read the variables that torchrun sets; without RANK the process runs alone.

    Raises:
        UserError: some variables are missing, or `srun` started several copies without torchrun.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in os.environ:
        copies = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if copies > 1 and "SLURM_PROCID" in os.environ:
            raise UserError(
                f"srun started {copies} copies without torchrun, each alone: start torchrun as launch/slurm.sbatch does"
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
    """Tell glibc to keep large freed blocks: by default it maps, zeroes and unmaps every big tensor anew.

    Costs address space that the next step uses again. Measured in benchmarks/train_step.py.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return  # not glibc
    m_trim_threshold, m_mmap_threshold = -1, -3
    for option in (m_mmap_threshold, m_trim_threshold):
        if not mallopt(option, 2**31 - 1):
            print(f"glibc refused mallopt({option}): steps on this CPU will be slower", file=sys.stderr)


def raise_file_limit() -> None:
    """Let this process open as many files as the system allows: a gather on rank 0 has a connection to each rank."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def connect_on_demand() -> Iterator[None]:
    """gloo groups made inside connect to a rank at the first message, not to all ranks at once.

    A group over N ranks then costs each rank a few requests to the store and a few files instead of 2N and N. For
    collectives only: the first message waits until the other rank sends or receives too, so that other patterns of
    sends, such as those of pipeline stages, may wait for each other in a circle.
    """
    name = "TORCH_GLOO_LAZY_INIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def initialise_distributed(launch: Launch, device_type: str, *, timeout: timedelta) -> tuple[torch.device, dist.Store]:
    """Make the default process group: gloo on the CPU; on CUDA NCCL, and gloo for CPU tensors.

    Returns:
        This rank's device, and a connection of its own to the store that the ranks of this start share.
    """
    if device_type == "cuda":
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
        # Split-K matrix products are summed in fp32, whatever the row's length.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        backend = "cpu:gloo,cuda:nccl"
        # Without fused kernels Transformer Engine would silently compute whole scores: slow, and out of memory at long
        # sequences. With this variable it raises an error that says how to see the reason.
        os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
    else:
        device = torch.device("cpu")
        backend = "gloo"
        keep_freed_memory()
    raise_file_limit()
    store: dist.Store = dist.HashStore()
    if launch.under_torchrun:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        # After a restart torchrun's store still holds the addresses of dead ranks; PyTorch 2.13 does not separate
        # attempts.
        store = dist.PrefixStore(f"attempt {launch.restarts}", store)
    with connect_on_demand():
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    return device, store.clone()  # type: ignore[attr-defined]


def own_temporary_folder() -> None:
    """Make a temporary folder that only this user can open; before the first compilation.

    `torch.compile` loads code from a folder with a known name in the temporary folder, which another user may make
    first. TORCHINDUCTOR_CACHE_DIR names all of that folder but the precompiled headers, which follow TMPDIR.

    Raises:
        UserError: another user has made the folder.
    """
    shared = Path(tempfile.gettempdir())
    folder = shared / f"pentagrid-{os.getuid()}"
    if shared.name == folder.name:
        return
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(
            f"torch.compile (--compile, --fused-kernels): {folder} is no folder of this user alone (mode 0700): "
            "remove it, or set TMPDIR"
        )
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", folder))
    if cache.parent == shared:  # PyTorch sets the variable when it is imported
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / cache.name)


def check_compiler() -> None:
    """Raise MissingPackageError where torch.compile cannot make kernels for a GPU."""
    given = os.environ.get("CC", "").split()[:1]
    compiler = next(filter(None, map(shutil.which, given or ("gcc", "clang"))), None)
    header = Path(sysconfig.get_path("include"), "Python.h")
    if compiler is None or not header.is_file() or not is_installed("triton"):
        raise MissingPackageError(
            f"--fused-kernels needs Triton, a C compiler ($CC, gcc or clang) and {header} (Debian: python3-dev): "
            "install them, or use --no-fused-kernels"
        )


def collective_timeout(parallel: ParallelConfig) -> timedelta:
    """Timeout of the process groups: later than the watchdog's, which names the rank (runtime/watchdog.py)."""
    minutes = max(parallel.distributed_timeout_minutes, parallel.distributed_startup_timeout_minutes)
    return timedelta(minutes=1 + 1.5 * minutes)


def build_run_grid(parallel: ParallelConfig, device: torch.device) -> Grid:
    """The grid of resolved flags. Its groups carry tensors of `device` only. Collective."""
    sizes = GridSizes(
        pp=parallel.pp_size,
        dp_replicate=parallel.dp_replicate_size,
        dp_shard=parallel.dp_shard_size,
        cp=parallel.cp_size,
        tp=parallel.tp_size,
    )
    backend = "nccl" if device.type == "cuda" else "gloo"
    return build_grid(sizes, timeout=collective_timeout(parallel), backend=backend)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, as this rank sees them.

    Attributes:
        checkpoint_group: gloo, over all ranks, for checkpoints alone: a thread may save while the main thread trains.
        control_group: that of all ranks, for agreement between steps. For CPU tensors: gloo.
    """

    launch: Launch
    device: torch.device
    grid: Grid
    watchdog: Watchdog
    checkpoint_group: dist.ProcessGroup
    control_group: dist.ProcessGroup

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes log, metrics and status."""
        return self.launch.rank == 0


def start_ranks(parallel: ParallelConfig, launch: Launch, flags: dict[str, Any], status: RunStatus) -> Ranks:
    """Make process groups, watchdog and grid. Collective.

    Args:
        flags: of the run, which all ranks must share.
        status: gets the watchdog, and is told of a hang.

    Raises:
        UserError: ranks were started with different flags, or with other versions of PyTorch or FlashAttention.
    """
    timeout = collective_timeout(parallel)
    device, store = initialise_distributed(launch, parallel.device, timeout=timeout)
    watchdog = status.watchdog = Watchdog(
        dist.PrefixStore("watchdog", store),
        rank=launch.rank,
        world_size=launch.world_size,
        startup_minutes=parallel.distributed_startup_timeout_minutes,
        minutes=parallel.distributed_timeout_minutes,
        on_hang=status.on_hang,
        parent=os.getppid() if launch.under_torchrun else None,
    )
    shared = {name: value for name, value in flags.items() if name not in LOCAL_FLAGS}
    packages = {"torch": torch.__version__, "FlashAttention": installed_versions()}
    check_ranks_agree(shared | packages, "flags")
    grid = build_run_grid(parallel, device)
    with connect_on_demand():
        checkpoint_group = dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoint")
    assert dist.group.WORLD is not None
    return Ranks(launch, device, grid, watchdog, checkpoint_group, control_group=dist.group.WORLD)


def run_on_rank_zero_first(build: Callable[[], T], *, waiting: AbstractContextManager[None] | None = None) -> T:
    """`build()` on rank 0, then on the others, which find what rank 0 cached. The others wait without limit.
    Collective.

    Args:
        waiting: entered for rank 0's part; the other ranks' part has the watchdog's limit, so that one that hangs is
            named.

    Raises:
        UserError: on every rank, with rank 0's message, if rank 0 raised it or an OSError.
    """
    broadcast_object(None)  # connects the ranks, which has a time limit
    with waiting or nullcontext():
        result = run_on_rank_zero(build, has_time_limit=False)
    return result if result is not None else build()


def _wait_for_rank_zero() -> None:
    """Wait until rank 0 calls this too, however long it takes to tokenize a corpus. Collective."""
    options = dist.BroadcastOptions()
    options.timeout = timedelta(days=365)
    assert dist.group.WORLD is not None
    dist.group.WORLD.broadcast([torch.zeros(1)], options).wait()


def run_on_rank_zero(action: Callable[[], T], *, has_time_limit: bool = True) -> T | None:
    """`action()` on rank 0; None on the others, which wait for it. Collective.

    Args:
        has_time_limit: they wait as long as for any collective, else without limit.

    Raises:
        UserError: on every rank, with rank 0's message, if rank 0 raised it or an OSError.
    """
    failure: list[str | None] = [None]
    result = None
    if dist.get_rank() == 0:
        try:
            result = action()
        except (UserError, OSError) as error:
            failure = [str(error)]
    if not has_time_limit:
        _wait_for_rank_zero()
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise UserError(failure[0])
    return result


def check_ranks_agree(values: dict[str, Any], what: str) -> None:
    """Every rank must hold the same values. Collective over the world; one small exchange where they agree.

    Args:
        values: by name; anything with a stable repr.
        what: what is compared, for the message.

    Raises:
        UserError: on every rank, naming the values that differ and the ranks that differ from rank 0.
    """
    own = {name: repr(value) for name, value in values.items()}
    digest = int.from_bytes(hashlib.sha256(json.dumps(own, sort_keys=True).encode()).digest()[:7], "big")
    extremes = torch.tensor([digest, -digest])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if extremes[0] == -extremes[1]:
        return
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    ranks = [rank for rank, other in enumerate(everyones) if other != everyones[0]]
    first, other = everyones[0], everyones[ranks[0]]
    differing = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    name = differing[0]
    example = f"{name} is {first.get(name)} on rank 0 but {other.get(name)} on rank {ranks[0]}"
    listed = ", ".join(map(str, ranks[:16])) + (" ..." if len(ranks) > 16 else "")
    raise UserError(
        f"{what} differ between ranks: {', '.join(differing)} ({example}); ranks that differ from rank 0: {listed}"
    )


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
