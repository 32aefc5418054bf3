"""What the benchmarks share: flags, a run's step, worlds of ranks, turns, goals, the JSON of figures.

Things that are compared take turns, round by round, so that a busy machine slows all of them alike. A missed goal is
printed and does not fail.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from config.cli import parse_arguments
from config.schema import RunConfig
from config.validate import resolve
from data.batch import Batch, build_batch
from data.dataset import PackedSample
from parallel.collectives import sum_over
from parallel.fsdp import clip_grad_norm_
from parallel.grid import Grid
from runtime.distributed import build_run_grid, initialise_distributed, read_launch
from training.build import build_accumulation, build_model, build_pipeline
from training.optimizer import build_optimizer, set_lr
from training.step import forward_backward, get_norm_owned_names

T = TypeVar("T")
K = TypeVar("K")

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
CORES = len(os.sched_getaffinity(0))
TIMEOUT = timedelta(minutes=30)  # of a collective
LOSS_TOLERANCE = 1e-4  # between models that must be the same

# ---------------------------------------------------------------------------------------------------
# The step of a run


def build_config(flags: str, *, world_size: int = 1, cuda_devices: int = 0) -> RunConfig:
    """The resolved configuration of train.py with these flags, all ranks on one node."""
    config = parse_arguments(shlex.split(flags))
    resolve(config, world_size=world_size, local_world_size=world_size, cuda_devices=lambda: cuda_devices)
    return config


class TrainStep:
    """Model and optimizer of a run, and the training step of train.py.

    Args:
        grid: None: built from the configuration. Collective.
    """

    def __init__(self, config: RunConfig, *, vocab_size: int, device: torch.device, grid: Grid | None = None) -> None:
        self.config, self.device = config, device
        self.architecture = config.model.architecture(vocab_size)
        self.grid = grid or build_run_grid(config.parallel, device)
        self.model = build_model(config, self.architecture, self.grid, device)
        self.pipeline = build_pipeline(config, self.model, self.grid, device)
        self.optimizer = build_optimizer(self.model, config.training)
        self.norm_owned = get_norm_owned_names(self.model, self.grid)

    def build_batch(self, samples: list[PackedSample], *, qkv_format: str | None = None) -> Batch:
        """The row of these samples, cut to this rank's tokens; `qkv_format` replaces the configuration's."""
        return build_batch(
            samples,
            cp_size=self.grid.size("cp"),
            cp_rank=self.grid.rank("cp"),
            qkv_format=qkv_format or self.config.data.qkv_format,
            layout=self.config.parallel.cp_layout,
        )

    def step(self, batches: list[Batch]) -> Tensor:
        """Forward and backward over the microbatches, clip, update. Returns the mean loss before the update."""
        training, grid = self.config.training, self.grid
        own_tokens = torch.tensor(float(sum(b.loss_tokens for b in batches)), dtype=torch.float64, device=self.device)
        loss_tokens = sum_over(own_tokens, grid.group("batch")).clamp(min=1)
        cross_entropy = forward_backward(
            self.model,
            batches,
            loss_tokens=loss_tokens,
            device=self.device,
            accumulation=build_accumulation(self.config.parallel),
            pipeline=self.pipeline,
        )
        parameters = dict(self.model.named_parameters())
        clip_grad_norm_(parameters, grid, max_norm=training.clip_grad, owned=self.norm_owned)
        set_lr(self.optimizer, training.lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum_over(sum_over(cross_entropy, grid.group("loss")), grid.group("pp")) / loss_tokens


def one_document(stream: np.ndarray) -> PackedSample:
    """A sample of one document; stream: [seq_length + 1], whose last token is only a label."""
    length = np.array([len(stream) - 1])
    return PackedSample(stream[:-1], stream[1:], length, length)


# ---------------------------------------------------------------------------------------------------
# Worlds of ranks


def _serve(rank: int, size: int, threads: int, port: int, pipe: Connection, state_type: type) -> None:
    """A rank: runs what the parent sends, until the parent kills this process."""
    torch.set_num_threads(threads)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    initialise_distributed(read_launch(), "cpu", timeout=TIMEOUT)  # with the allocator's settings of train.py
    state = state_type()
    while True:
        method, arguments = pipe.recv()
        try:
            pipe.send((method(state, *arguments), None))
        except BaseException:  # the parent raises the error
            pipe.send((None, traceback.format_exc()))


class World:
    """`size` gloo ranks, each a process of `threads` threads that holds a `state_type()` and runs its methods.

    The processes live as long as the comparison; those whose turn it is not wait on a pipe.
    """

    def __init__(self, size: int, state_type: type, *, threads: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            own, others = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, threads, port, others, state_type), daemon=True)
            process.start()
            others.close()
            self.pipes.append(own)
            self.processes.append(process)

    def run(self, method: Callable[..., T], *arguments: Any) -> list[T]:
        """`method(state, *arguments)` on every rank. Returns the results by rank.

        Raises:
            RuntimeError: a rank raised an error or died.
        """
        for pipe in self.pipes:
            pipe.send((method, arguments))
        results: dict[int, Any] = {}
        while len(results) < len(self.pipes):
            ready = wait(self.pipes)
            for rank, pipe in enumerate(self.pipes):
                if pipe not in ready:
                    continue
                try:
                    results[rank], error = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} died") from None
                if error:
                    raise RuntimeError(f"rank {rank}:\n{error}")
        return [results[rank] for rank in range(len(self.pipes))]

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()  # the results are here; gloo's teardown sometimes aborts
            process.join()


# ---------------------------------------------------------------------------------------------------
# Turns and figures


def take_turns(work: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """What each call returns in each round; in a round one call follows the other."""
    found: dict[K, list[T]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            found[name].append(call())
    return found


def time_call(call: Callable[[], object], synchronize: Callable[[], object] = lambda: None) -> float:
    """Seconds of one call; `synchronize` waits for the device or for other ranks, before and after."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def median_ratio(over: Iterable[float], under: Iterable[float]) -> float:
    """The ratio of the medians."""
    return statistics.median(over) / statistics.median(under)


def round_ratios(over: Iterable[float], under: Iterable[float]) -> dict[str, Any]:
    """Median and quartiles of the rounds' ratios: both parts of a round ran under the same load."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, middle, high = np.percentile(ratios, [25, 50, 75]).tolist()
    return {"median": middle, "quartiles": [low, high]}


def is_met(value: float, goal: float, *, at_most: bool = False) -> bool:
    """Whether `value` reaches the goal from above or, with `at_most`, from below."""
    return bool(value <= goal if at_most else value >= goal)


def describe_goal(value: float, goal: float | None, *, at_most: bool = False) -> str:
    """Like `>= 0.95 pass`; empty without a goal."""
    if goal is None:
        return ""
    return f"{'<=' if at_most else '>='} {goal:.2f} {'pass' if is_met(value, goal, at_most=at_most) else 'miss'}"


# ---------------------------------------------------------------------------------------------------
# Command line and JSON


def benchmark_parser(
    description: str | None, *, rounds: int | None = None, parts: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """--json; with `rounds`, its default, also --rounds; with `parts` also --only, a list of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        rounds_help = "turns of each thing compared; default: %(default)s"
        parser.add_argument("--rounds", type=int, default=rounds, help=rounds_help)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there; default: no file")
    names = list(parts)
    if names:
        parts_type = _list_of(names)
        names_help = f"parts to run, of {', '.join(names)}; default: all"
        parser.add_argument("--only", type=parts_type, default=names, metavar="NAME,NAME", help=names_help)
    return parser


def _list_of(names: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        wanted = text.split(",")
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]}: must be of {', '.join(names)}")
        return wanted

    return parse


def describe_machine() -> dict[str, Any]:
    """Command, commit, PyTorch, cores and load: what makes figures comparable."""
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": _command_line(),
        "commit": commit,
        "torch": torch.__version__,
        "cores": CORES,
        "load average at the end": os.getloadavg()[0],
    }


def _command_line() -> str:
    """The command of this process from the repository's root; of absolute paths only the last part."""
    launcher = "python"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
    words = [re.sub(r"^(--[\w-]+=)?/.*/", r"\1", word) for word in sys.argv[1:]]
    return shlex.join([*launcher.split(), f"benchmarks/{Path(sys.argv[0]).name}", *words])


def write_figures(path: Path | None, figures: Mapping[str, Any]) -> None:
    """The figures and the machine as JSON, into the file of --json if there is one."""
    if path is not None:
        path.write_text(json.dumps(describe_machine() | dict(figures), indent=1, default=str) + "\n")
