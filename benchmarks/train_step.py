"""One training step of ours against plain PyTorch, and what context parallelism saves.

    python benchmarks/train_step.py [--only 1,2,3] [--rounds 7] [--steps-per-round 3] [--json FILE]

1. Tokens/s in one process of two threads: train.py's step against a bare loop over the same model.
2. Tokens/s of cp 2 on two gloo ranks of one thread: against our one process, and against bare FSDP2 on two ranks.
3. Bytes that the forward pass saves for the backward pass, without parameters: cp 4 against cp 1.

A figure is a ratio of medians. Two models that disagree on the loss fail; a missed goal does not.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.bare import build_bare_step
from benchmarks.harness import (
    CPU,
    LOSS_TOLERANCE,
    TrainStep,
    World,
    benchmark_parser,
    build_config,
    describe_goal,
    is_met,
    one_document,
    take_turns,
    time_call,
    write_figures,
)
from data.batch import Batch
from data.dataset import PackedSample
from parallel.fsdp import local_tensor

VOCAB_SIZE, SEQ_LENGTH, MICRO_BATCH, SEED = 32000, 1024, 2, 1234
LONG_SEQ_LENGTH, LONG_CP = 8192, 4
NUM_BATCHES = 8  # of random tokens, read again and again
FLAGS = f"""
    --device cpu --dtype fp32 --qkv-format bshd --num-layers 4 --hidden-size 256 --ffn-hidden-size 688
    --num-attention-heads 8 --num-query-groups 4 --lr 1e-3 --seed {SEED}
"""
WARM_UP_STEPS = 4  # the allocator settles in three steps


class RandomBatches:
    """`NUM_BATCHES` rows of random tokens, as packed samples."""

    def __init__(self, ours: TrainStep) -> None:
        shape = (NUM_BATCHES, ours.config.training.micro_batch_size, ours.config.data.seq_length + 1)
        tokens = np.random.default_rng(SEED).integers(0, VOCAB_SIZE, shape)
        self.ours, self.samples = ours, [[one_document(row) for row in batch] for batch in tokens]

    def build(self, number: int) -> Batch:
        """This rank's tokens of a row, as the loader cuts them."""
        return self.ours.build_batch(self.samples[number % NUM_BATCHES])

    def stack(self, number: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels [b, s] of the whole sequences that this rank reads in the bare loop."""
        own: list[PackedSample] = self.samples[number % NUM_BATCHES][dist.get_rank() :: dist.get_world_size()]
        tokens, labels = np.stack([s.tokens for s in own]), np.stack([s.labels for s in own])
        return torch.from_numpy(tokens), torch.from_numpy(labels)


def build_step(*, cp_size: int, seq_length: int, batch_size: int) -> TrainStep:
    """Our step over `cp_size` ranks, which are the whole world."""
    flags = f"{FLAGS} --cp-size {cp_size} --seq-length {seq_length}"
    flags += f" --micro-batch-size {batch_size} --global-batch-size {batch_size}"
    return TrainStep(build_config(flags, world_size=cp_size), vocab_size=VOCAB_SIZE, device=CPU)


class StepRank:
    """What a rank of the comparisons runs."""

    def prepare(self) -> list[float]:
        """Build both steps from the same weights and warm up; their losses must agree. Returns our losses."""
        ours = build_step(cp_size=dist.get_world_size(), seq_length=SEQ_LENGTH, batch_size=MICRO_BATCH)
        bare, batches = build_bare_step(ours), RandomBatches(ours)
        stacked = [batches.stack(number) for number in range(NUM_BATCHES)]
        self.steps: dict[str, Callable[[int], Tensor]] = {
            "ours": lambda number: ours.step([batches.build(number)]),
            "bare": lambda number: bare.step(*stacked[number % NUM_BATCHES]),
        }
        losses = []
        for number in range(WARM_UP_STEPS):
            our_loss, bare_loss = self.steps["ours"](number).item(), self.steps["bare"](number)
            dist.all_reduce(bare_loss)
            bare_mean = bare_loss.item() / dist.get_world_size()
            apart = abs(our_loss - bare_mean)
            assert apart <= LOSS_TOLERANCE, f"step {number}: our loss is {our_loss}, the bare model's {bare_mean}"
            losses.append(our_loss)
        return losses

    def time_steps(self, names: list[str], steps: int) -> dict[str, float]:
        """Seconds of `steps` steps of each, which take turns step by step."""
        seconds = dict.fromkeys(names, 0.0)
        for number, name in itertools.product(range(steps), names):
            seconds[name] += time_call(partial(self.steps[name], number), dist.barrier)
        return seconds

    def count_saved_bytes(self, cp_size: int) -> dict[str, int]:
        """Bytes of the distinct storages that a forward pass saves for the backward pass, without parameters."""
        ours = build_step(cp_size=cp_size, seq_length=LONG_SEQ_LENGTH, batch_size=1)
        batch = RandomBatches(ours).build(0)
        saved: dict[int, tuple[Any, torch.Size]] = {}  # a storage that is held keeps its address

        def pack(x: Tensor) -> Tensor:
            storage = local_tensor(x).untyped_storage()
            saved.setdefault(storage.data_ptr(), (storage, x.shape))
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ours.model(batch.tokens, batch.packed_seq, labels=batch.labels)
        # FSDP keeps gathered weights until the backward pass: they are the module's parameters here.
        parameters = {local_tensor(p).untyped_storage().data_ptr() for p in ours.model.parameters()}
        kept = [(storage.nbytes(), shape) for at, (storage, shape) in saved.items() if at not in parameters]
        # The chunked loss computes this gradient in the forward pass. Its size does not depend on cp.
        weight_shape = (ours.architecture.padded_vocab_size, ours.architecture.hidden_size)
        return {
            "saved": sum(size for size, _ in kept),
            "of which the output weight's gradient": sum(size for size, shape in kept if shape == weight_shape),
            "parameters left out": sum(storage.nbytes() for at, (storage, _) in saved.items() if at in parameters),
        }


def figure(
    what: str, measured: float, against: float, unit: str, target: float, *, at_most: bool = False, **details: Any
) -> dict:
    """`measured` over `against`: printed, and returned for the JSON."""
    ratio = measured / against
    verdict = describe_goal(ratio, target, at_most=at_most)
    print(f"{what:56}{measured:>8.0f}{against:>10.0f} {unit:10}{ratio:>6.3f}   {verdict}", flush=True)
    numbers = dict(measured=measured, against=against, unit=unit, ratio=ratio, target=target)
    return {"what": what, **numbers, "passed": is_met(ratio, target, at_most=at_most), **details}


def tokens_per_second(rounds: list[float], steps: int) -> float:
    """From the seconds of each round."""
    return steps * MICRO_BATCH * SEQ_LENGTH / statistics.median(rounds)


def compare_with_bare(rounds: int, steps: int) -> list[dict]:
    """Comparison 1. The two take turns step by step."""
    with World(1, StepRank, threads=2) as one:
        losses = one.run(StepRank.prepare)[0]
        seconds = [one.run(StepRank.time_steps, ["ours", "bare"], steps)[0] for _ in range(rounds)]
    times = {name: [s[name] for s in seconds] for name in ("ours", "bare")}
    ours, bare = (tokens_per_second(times[name], steps) for name in ("ours", "bare"))
    what = "1  one process of 2 threads: ours / bare"
    return [figure(what, ours, bare, "tokens/s", 0.95, seconds=times, losses=losses)]


def compare_cp2(rounds: int, steps: int) -> list[dict]:
    """Comparison 2. The three take turns round by round; a round takes as long as its slowest rank."""
    with World(1, StepRank, threads=2) as one, World(2, StepRank, threads=1) as two:
        losses = {"one process": one.run(StepRank.prepare)[0], "two": two.run(StepRank.prepare)[0]}

        def slowest(world: World, name: str) -> float:
            return max(seconds[name] for seconds in world.run(StepRank.time_steps, [name], steps))

        turns = {
            "one process": lambda: slowest(one, "ours"),
            "cp 2": lambda: slowest(two, "ours"),
            "bare FSDP2": lambda: slowest(two, "bare"),
        }
        times = take_turns(turns, rounds)
    one_process, cp2, fsdp2 = (tokens_per_second(seconds, steps) for seconds in times.values())
    return [
        figure(
            "2a cp 2 on 2 x 1 thread / one process of 2 threads",
            cp2,
            one_process,
            "tokens/s",
            0.75,
            seconds=times,
            losses=losses,
        ),
        figure("2b cp 2 / bare FSDP2, both on 2 x 1 thread (2: either)", cp2, fsdp2, "tokens/s", 0.95),
    ]


def compare_memory(rounds: int, steps: int) -> list[dict]:
    """Comparison 3. Bytes are counted once: they do not vary."""
    counts = []
    for cp_size in (1, LONG_CP):
        with World(cp_size, StepRank, threads=max(1, 2 // cp_size)) as world:
            counts.append(max(world.run(StepRank.count_saved_bytes, cp_size), key=lambda count: count["saved"]))
    alone, shared = (count["saved"] / 2**20 for count in counts)
    what = f"3  saved for backward, {LONG_SEQ_LENGTH} tokens: cp {LONG_CP} / cp 1"
    counted = {"cp 1": counts[0], f"cp {LONG_CP}": counts[1]}
    return [figure(what, shared, alone, "MiB", 0.30, at_most=True, bytes=counted)]


COMPARISONS = {"1": compare_with_bare, "2": compare_cp2, "3": compare_memory}


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=7, parts=COMPARISONS)
    parser.add_argument("--steps-per-round", type=int, default=3, help="training steps of a turn; default: %(default)s")
    args = parser.parse_args()
    print(f"{'':56}{'measured':>8}{'against':>10} {'':10}{'ratio':>6}   target", flush=True)
    figures = [f for name in args.only for f in COMPARISONS[name](args.rounds, args.steps_per_round)]
    rounds = {"rounds": args.rounds, "steps per round": args.steps_per_round}
    write_figures(args.json, rounds | {"figures": figures})


if __name__ == "__main__":
    main()
