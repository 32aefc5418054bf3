"""train.py with a fault inside: `injected.py FAULT [FAULT ...] -- flags of train.py`.

    nan:STEP:RANK       one number of a gradient becomes NaN
    flip:STEP:RANK:N    one bit of the N-th weight flips
    hang:STEP:RANK      the rank never comes out of reading its rows
    slow:RANK:SECONDS   every step of the rank takes so much longer
    slow-eval:SECONDS   so does every batch of a validation, which is said when it begins
    slow-save:SECONDS   and every save, between its files and its publication
    nodes               every rank is on a node of its own, with its own --local-save-dir
    clock:SECONDS       the clock of the wall jumps to and fro by so much at every look

Steps are counted from 1 and from the start of this process.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist

from checkpoint import saver
from data import loader
from parallel.fsdp import local_tensor
from training import evaluate as validation
from training import step as training_step

# train.py takes these names when it is run, after the faults are in place.
forward_backward, evaluate, read_batches, publish, real_time = (
    training_step.forward_backward, validation.evaluate, loader.read_batches, saver.publish, time.time
)  # fmt: skip


def nan(step: int, rank: int) -> None:
    calls = iter(range(1, 10**9))

    def with_nan(model, *args, **kwargs):
        out = forward_backward(model, *args, **kwargs)
        if next(calls) == step and dist.get_rank() == rank:
            name, parameter = list(model.named_parameters())[2]
            local_tensor(parameter.grad).view(-1)[:1] = float("nan")
            print(f"injected: NaN in the gradient of {name} on rank {rank}", flush=True)
        return out

    training_step.forward_backward = with_nan


def flip(step: int, rank: int, number: int) -> None:
    calls = iter(range(1, 10**9))

    def with_flip(model, *args, **kwargs):
        if next(calls) == step and dist.get_rank() == rank:
            name, parameter = list(model.named_parameters())[number]
            with torch.no_grad():
                local_tensor(parameter.detach()).view(torch.int32).view(-1)[:1] ^= 1
            print(f"injected: a flipped bit in {name} on rank {rank}", flush=True)
        return forward_backward(model, *args, **kwargs)

    training_step.forward_backward = with_flip


def hang(step: int, rank: int) -> None:
    def hanging(batches):
        for number, batch in enumerate(read_batches(batches)):
            if number // batches.sampler.plan.num_microbatches(0) + 1 == step and dist.get_rank() == rank:
                print(f"injected: rank {rank} hangs", flush=True)
                while True:
                    time.sleep(1)
            yield batch

    loader.read_batches = hanging


def slow(rank: int, seconds: float) -> None:
    def slowly(*args, **kwargs):
        if dist.get_rank() == rank:
            time.sleep(seconds)
        return forward_backward(*args, **kwargs)

    training_step.forward_backward = slowly


def slow_eval(seconds: float) -> None:
    def slowly(model, batches, *args, **kwargs):
        print("injected: validation begins", flush=True)

        def each():
            for batch in batches:
                time.sleep(seconds)
                yield batch

        return evaluate(model, each(), *args, **kwargs)

    validation.evaluate = slowly


def slow_save(seconds: float) -> None:
    def slowly(*args, **kwargs):
        time.sleep(seconds)
        return publish(*args, **kwargs)

    saver.publish = slowly


def nodes() -> None:
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    sys.argv[sys.argv.index("--local-save-dir") + 1] += f"/node_{os.environ['RANK']}"


def clock(seconds: float) -> None:
    looks = iter(range(10**9))
    time.time = lambda: real_time() + seconds * (next(looks) % 3 - 1)


FAULTS = {
    "nan": nan,
    "flip": flip,
    "hang": hang,
    "slow": slow,
    "slow-eval": slow_eval,
    "slow-save": slow_save,
    "nodes": nodes,
    "clock": clock,
}


if __name__ == "__main__":
    at = sys.argv.index("--")
    for word in sys.argv[1:at]:
        name, *values = word.split(":")
        FAULTS[name](*(float(v) if "." in v else int(v) for v in values))  # type: ignore[operator]
    train = Path(__file__).resolve().parent.parent.parent / "train.py"
    sys.argv[:] = [str(train), *sys.argv[at + 1 :]]
    runpy.run_path(sys.argv[0], run_name="__main__")
