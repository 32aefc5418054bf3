"""A step's samples dealt by work (--balance-work) against their order, on two data ranks of one thread.

    python benchmarks/work_balance.py [--only simulation,8192] [--rounds 5] [--json FILE]

Whole training steps of a small model (`SHAPES`) in fp32, dp_shard 2, four sequences a rank, documents with log-normal
lengths. The predicted ratio comes from the estimated work alone (data/balance.py): a step waits for the rank
with the most. Runs that disagree on the loss fail; a missed goal does not. The simulation deals the samples of a 1B
model to many data ranks; `pools` places the documents of such steps in one cp group of all ranks (--cp-layout hybrid).
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch.distributed as dist

from benchmarks.harness import (
    CPU,
    LOSS_TOLERANCE,
    TrainStep,
    World,
    benchmark_parser,
    build_config,
    describe_goal,
    is_met,
    median_ratio,
    round_ratios,
    take_turns,
    time_call,
    write_figures,
)
from cp.layout import attention_pairs
from cp.placement import place
from data.balance import deal, deal_step
from data.batch import Batch
from data.dataset import PackedSample
from data.packing import pack_epoch
from training.build import build_batch_plan
from training.flops import attention_cost

VOCAB_SIZE, RANKS, SAMPLES, SIGMA, SEED = 4096, 2, 8, 1.5, 1234
MEDIANS = {"8192": 600, "32768": 2000}  # median length of a document for each sequence length
STEPS = {"8192": 3, "32768": 1}  # of a call
# Attention of 32768 takes ten minutes a step in the model of 8192.
SHAPES = {
    "8192": "--num-layers 2 --hidden-size 256 --num-attention-heads 4",
    "32768": "--num-layers 1 --hidden-size 64 --num-attention-heads 1 --num-query-groups 1",
}
GOAL = 0.9  # of the predicted gain
# sequence length, median length of a document, data ranks, samples of each
SIMULATED = [(8192, 600, 64, 4), (32768, 2000, 8, 4), (32768, 2000, 64, 4), (131072, 6000, 8, 4), (131072, 6000, 64, 4)]
# sequence length, median length of a document, its sigma, cp size and data ranks of the grid, samples of a data rank,
# alignment of documents (the default)
POOLS = [
    (32768, 600, 1.5, 4, 16, 1, 64),
    (32768, 2000, 1.5, 4, 16, 1, 64),
    (32768, 2000, 1.5, 1, 64, 1, 16),
    (131072, 600, 1.8, 8, 8, 1, 64),
    (131072, 6000, 1.5, 8, 8, 1, 64),
    (131072, 6000, 1.5, 8, 8, 1, 128),
    (131072, 6000, 1.5, 8, 8, 4, 64),
    (131072, 6000, 1.5, 8, 128, 1, 64),
]
POOL_ROWS = 8
FLAGS = "--device cpu --dtype fp32 --dp-shard-size 2"


def draw_lengths(rng: np.random.Generator, seq_length: int, median: int) -> np.ndarray:
    """Log-normal lengths of the documents of a sample; the last one is cut at the end of the sample."""
    lengths, left = [], seq_length
    while left:
        length = min(left, int(rng.lognormal(np.log(median), SIGMA)) + 1)
        lengths.append(length)
        left -= length
    return np.array(lengths)


def packed_sample(rng: np.random.Generator, seq_length: int) -> PackedSample:
    lengths = draw_lengths(rng, seq_length, MEDIANS[str(seq_length)])
    tokens = rng.integers(0, VOCAB_SIZE, seq_length + 1)
    return PackedSample(tokens[:-1], tokens[1:], lengths, lengths)


def simulate(seq_length: int, median: int, ranks: int, samples: int) -> tuple[float, float]:
    """Mean over 20 steps of a step's largest work over the mean, in order and dealt.

    Args:
        samples: of each rank.
    """
    cost = attention_cost_of_1b()
    rng = np.random.default_rng(SEED)
    found = []
    for _ in range(20):
        squares = [(draw_lengths(rng, seq_length, median) ** 2).sum() for _ in range(ranks * samples)]
        work = seq_length + cost * np.array(squares, float)
        orders = np.arange(len(work)).reshape(ranks, samples), np.array(deal(work, ranks))
        found.append([work[order].sum(1).max() / work[order].sum(1).mean() for order in orders])
    in_order, dealt = np.mean(found, 0).tolist()
    return in_order, dealt


def attention_cost_of_1b() -> float:
    """Of `data.batch.BatchPlan`."""
    flags = "--device cpu --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5504"
    architecture = build_config(flags).model.architecture(32000)
    return attention_cost(architecture)


@dataclass
class PoolFigures:
    """Means over rows.

    Attributes:
        grid, pool: largest work of a rank over the mean: samples dealt to data ranks in zigzag order, documents placed.
        traffic: K and V tokens that the pool's busiest rank receives, over the grid's (of cp 1: nan).
        fallbacks: share of rows without an even placement.
        seconds: of processor time to place a row.
    """

    grid: float
    pool: float
    traffic: float
    fallbacks: float
    seconds: float


def simulate_pool(
    seq_length: int, median: int, sigma: float, cp: int, data_ranks: int, samples: int, alignment: int
) -> PoolFigures:
    """Rows of best-fit packed samples on a grid and in a pool of the same ranks."""
    cost, ranks, count = attention_cost_of_1b(), cp * data_ranks, data_ranks * samples
    rng, mean_length = np.random.default_rng(SEED), median * np.exp(sigma**2 / 2)
    lengths = rng.lognormal(np.log(median), sigma, int(1.5 * POOL_ROWS * count * seq_length / mean_length) + 100)
    lengths = np.maximum(1, lengths.astype(np.int64))
    epoch = pack_epoch(lengths, seed=SEED, epoch=0, seq_length=seq_length, alignment=alignment)
    found = []
    for row in range(min(POOL_ROWS, len(epoch) // count)):
        documents = [epoch.sample_pieces(row * count + n)[:, 2] for n in range(count)]
        work = np.array([seq_length + cost * float((own**2).sum()) for own in documents])
        dealt = work[np.array(deal(work, data_ranks))].sum(1)
        started = time.process_time()
        placed = place(
            np.concatenate(documents),
            row_length=count * seq_length,
            cp_size=ranks,
            attention_cost=cost,
            sample_numbers=np.repeat(np.arange(count), [len(own) for own in documents]),
            num_samples=count,
        )
        seconds = time.process_time() - started
        assert placed is not None
        place_of: dict[str, Any] = dict(cp_size=ranks, layout="hybrid", placement=placed.placement)
        pairs = attention_pairs(placed.lengths, placed.padded_lengths, **place_of)
        loads = count * seq_length / ranks + 2 * cost * pairs
        degrees, first = placed.placement.degrees, placed.placement.first_ranks
        received = np.zeros(ranks + 1)
        np.add.at(received, first, placed.padded_lengths / degrees * (degrees - 1))
        np.subtract.at(received, first + degrees, placed.padded_lengths / degrees * (degrees - 1))
        grid_traffic = (cp - 1) * samples * seq_length / cp
        traffic = received.cumsum()[:-1].max() / grid_traffic if cp > 1 else np.nan
        even = dealt.max() / dealt.mean(), loads.max() / loads.mean()
        found.append((*even, traffic, placed.placement.is_fallback, seconds))
    return PoolFigures(*np.mean(found, 0).tolist())


@dataclass
class Work:
    """Attributes: largest: of the two ranks in each step, dealt and in order."""

    losses: list[float]
    largest: dict[bool, list[float]]


class Rank:
    """What a data rank runs."""

    def prepare(self, seq_length: int) -> Work:
        """Build the model and the batches of both orders. Returns the losses of both on the initial weights."""
        flags = f"{FLAGS} {SHAPES[str(seq_length)]} --seq-length {seq_length} --global-batch-size {SAMPLES}"
        flags += " --document-alignment 1 --lr 0 --min-lr 0"
        flags += " --cp-backend native --cp-comm-type all_gather --cp-layout contiguous"
        config = build_config(flags, world_size=dist.get_world_size())
        self.ours = TrainStep(config, vocab_size=VOCAB_SIZE, device=CPU)
        rng, steps = np.random.default_rng(SEED), STEPS[str(seq_length)]
        samples = [packed_sample(rng, seq_length) for _ in range(steps * SAMPLES)]
        self.batches: dict[bool, list[list[Batch]]] = {}
        largest: dict[bool, list[float]] = {}
        plan = build_batch_plan(config, self.ours.architecture, self.ours.grid)
        for is_dealt in (True, False):
            own = replace(plan, balance_work=is_dealt)
            self.batches[is_dealt], largest[is_dealt] = [], []
            for step in range(steps):
                squares = [float((s.lengths**2).sum()) for s in samples[step * SAMPLES : (step + 1) * SAMPLES]]
                work = seq_length + plan.attention_cost * np.array(squares)
                rows = own.assign_samples(step, work)
                self.batches[is_dealt].append([own.build_batch([samples[n] for n in row], step=step) for row in rows])
                everyone = [replace(own, batch_rank=rank).assign_samples(step, work) for rank in range(RANKS)]
                largest[is_dealt].append(max(sum(work[n % SAMPLES] for row in r for n in row) for r in everyone))
        losses = [self.ours.step(self.batches[is_dealt][0]).item() for is_dealt in (True, False)]
        return Work(losses, largest)

    def time_steps(self, is_dealt: bool) -> float:
        """Seconds of all steps."""
        return time_call(lambda: [self.ours.step(batches) for batches in self.batches[is_dealt]], dist.barrier)


def time_slowest(world: World, is_dealt: bool) -> float:
    return max(world.run(Rank.time_steps, is_dealt))


def seconds_of_dealing() -> float:
    """Seconds to deal 1024 samples to 256 data ranks: the least of 20 tries."""
    work = 1.0 + np.random.default_rng(SEED).lognormal(0.0, 1.0, 1024)
    return min(time_call(lambda: deal_step(work, data_rank=0, data_ranks=256, num_microbatches=4)) for _ in range(20))


def main() -> None:
    args = benchmark_parser(__doc__, rounds=5, parts=["simulation", "pools", *MEDIANS]).parse_args()
    figures: list[dict[str, Any]] = []
    print(f"dealing 1024 samples to 256 data ranks: {1000 * seconds_of_dealing():.2f} ms\n")
    if "simulation" in args.only:
        print("largest work over the mean: sequence, median length, data ranks, samples of each: in order, dealt")
        for case in SIMULATED:
            in_order, dealt = simulate(*case)
            print(f"{case[0]:>8} {case[1]:>6} {case[2]:>6} {case[3]:>4} {in_order:>9.3f} {dealt:>7.3f}")
            figures.append({"simulated": case, "in order": in_order, "dealt": dealt})
        print()
    if "pools" in args.only:
        print(
            "largest work over the mean: sequence, median, cp x data ranks, samples of each: grid, pool; traffic of the"
        )
        print("busiest rank over the grid's; rows without an even placement; ms to place a row")
        for pool in POOLS:
            seq_length, median, _, cp, data_ranks, samples, alignment = pool
            f = simulate_pool(*pool)
            shape = f"{seq_length:>8} {median:>6} {cp:>4} x {data_ranks:<4} {samples:>4} {alignment:>4}"
            numbers = f"{f.grid:>9.3f} {f.pool:>7.3f} {f.traffic:>7.2f} {f.fallbacks:>6.0%} {1000 * f.seconds:>7.0f}"
            print(f"{shape} {numbers}", flush=True)
            figures.append({"pool": pool, **asdict(f)})
        print()
    print(f"{'sequence':>8} {'predicted':>10} {'measured':>9} {'quartiles':>14}   share of the predicted gain")
    for name in (name for name in args.only if name in MEDIANS):
        with World(RANKS, Rank) as world:
            prepared = world.run(Rank.prepare, int(name))[0]
            assert abs(prepared.losses[0] / prepared.losses[1] - 1) <= LOSS_TOLERANCE, prepared.losses
            turns = {is_dealt: partial(time_slowest, world, is_dealt) for is_dealt in (True, False)}
            times = take_turns(turns, args.rounds)
        predicted = sum(prepared.largest[False]) / sum(prepared.largest[True])
        measured = median_ratio(times[False], times[True])
        low, high = round_ratios(times[False], times[True])["quartiles"]
        share = (measured - 1) / (predicted - 1)
        verdict = describe_goal(share, GOAL)
        print(
            f"{name:>8} {predicted:>10.3f} {measured:>9.3f} {low:>7.3f}-{high:.3f}   {share:.2f} {verdict}", flush=True
        )
        figures.append(
            dict(seq_length=int(name), predicted=predicted, ratio=measured, share=share, is_met=is_met(share, GOAL))
            | {"seconds in order": times[False], "seconds dealt": times[True]}
        )
    write_figures(args.json, {"rounds": args.rounds, "dealing, seconds": seconds_of_dealing(), "figures": figures})


if __name__ == "__main__":
    main()
