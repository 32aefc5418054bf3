"""One training step of ours against plain PyTorch, and what context parallelism saves.

    python benchmarks/train_step.py [--only 1|2|3] [--rounds 7] [--steps-per-round 3] [--json FILE]

1. Tokens/s in one process of two threads, train.py's step against a bare loop over the same model.
2. Tokens/s of cp 2 on two gloo ranks of one thread, against our one process and against bare FSDP2 on two ranks.
3. Bytes that the forward pass saves for the backward, parameters apart, at cp 4 against cp 1.

Things that are compared take turns, round by round; a figure is a ratio of medians. Processes live as
long as their comparison, and those whose turn it is not wait on a pipe. Prints a table, then JSON.
A missed target is reported and does not fail; two models that disagree on the loss do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from config.arguments import model_config, parse_arguments, resolve
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from data.batch import build_batch
from data.dataset import PackedSample
from metrics.log import row_facts
from model.config import GPTConfig, padded_vocab_size
from model.rope import rotary_frequencies, rotary_tables
from parallel.collectives import sum_over
from parallel.fsdp import clip_grad_norm_, local_tensor
from parallel.grid import GridSizes, build_grid
from runtime.distributed import initialise_distributed, read_launch
from train import build_model
from training.optimizer import build_optimizer, set_lr
from training.step import forward_backward, get_norm_owned_names

VOCAB_SIZE, SEQ_LENGTH, MICRO_BATCH, SEED = 32000, 1024, 2, 1234
LONG_SEQ_LENGTH, LONG_CP = 8192, 4
NUM_BATCHES = 8  # of random tokens, gone through again and again
FLAGS = "--device cpu --dtype fp32 --qkv-format bshd --num-layers 4 --hidden-size 256 --ffn-hidden-size 688 --num-attention-heads 8"
FLAGS += " --num-query-groups 4 --lr 1e-3"
LOSS_TOLERANCE, WARM_UP_STEPS = 1e-4, 4  # the allocator settles in three steps
CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------------
# Ours: train.py's model and the body of its loop


class OurStep:
    """train.py's step over `cp_size` ranks, which are all there are."""

    def __init__(self, *, cp_size: int, seq_length: int, batch_size: int) -> None:
        flags = f"{FLAGS} --cp-size {cp_size} --seq-length {seq_length} --seed {SEED}"
        self.args = parse_arguments(
            [*flags.split(), f"--micro-batch-size={batch_size}", f"--global-batch-size={batch_size}"]
        )
        resolve(self.args, world_size=cp_size, local_world_size=cp_size, cuda_devices=lambda: 0)
        padded = padded_vocab_size(VOCAB_SIZE, self.args.make_vocab_size_divisible_by)
        self.config = model_config(self.args, vocab_size=VOCAB_SIZE, padded_vocab_size=padded)
        self.grid = build_grid(GridSizes(cp=cp_size))
        self.model = build_model(self.args, self.config, self.grid, CPU)
        self.adam = dict(lr=self.args.lr, betas=(self.args.adam_beta1, self.args.adam_beta2), eps=self.args.adam_eps)
        self.adam["weight_decay"] = self.args.weight_decay
        self.optimizer = build_optimizer(self.model, **self.adam)
        stream = np.random.default_rng(SEED).integers(0, VOCAB_SIZE, (NUM_BATCHES, batch_size, seq_length + 1))
        whole = np.array([seq_length])
        self.batches = [[PackedSample(row[:-1], row[1:], whole, whole) for row in batch] for batch in stream]

    def batch(self, number: int) -> Any:
        """This rank's tokens of a batch, as the loader makes them."""
        place = dict(cp_size=self.grid.size("cp"), cp_rank=self.grid.rank("cp"))
        return build_batch(
            self.batches[number % NUM_BATCHES], **place, qkv_format=self.args.qkv_format, layout=self.args.cp_layout
        )

    def step(self, number: int) -> Tensor:
        """The loss of the whole batch, before the update."""
        batches = [self.batch(number)]
        facts = sum_over(row_facts(batches), self.grid.group("batch"))
        loss_tokens = facts[0].clamp(min=1)
        reshard = self.args.reshard_after_forward == "on"
        cross_entropy = forward_backward(
            self.model, batches, loss_tokens=loss_tokens, device=CPU, reshard_between=reshard
        )
        clip_grad_norm_(
            dict(self.model.named_parameters()),
            self.grid,
            max_norm=self.args.clip_grad,
            owned=get_norm_owned_names(self.model, self.grid),
        )
        set_lr(self.optimizer, self.args.lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum_over(cross_entropy, self.grid.group("loss")) / loss_tokens


# ---------------------------------------------------------------------------------------------------
# Bare: the same model and loop as anyone would write them in one file


class BareLayer(nn.Module):
    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = c.num_attention_heads, c.num_query_groups, c.kv_channels
        self.attention_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_epsilon)
        self.qkv = nn.Linear(c.hidden_size, c.qkv_size, bias=False)
        self.output = nn.Linear(c.query_size, c.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_epsilon)
        self.gate = nn.Linear(c.hidden_size, c.ffn_hidden_size, bias=False)
        self.up = nn.Linear(c.hidden_size, c.ffn_hidden_size, bias=False)
        self.down = nn.Linear(c.ffn_hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = (
            self.qkv(self.attention_norm(x)).view(batch, length, -1, self.head_dim).transpose(1, 2)
        )  # [b, hq + 2g, s, d]
        q, k, v = heads.split((self.heads, self.groups, self.groups), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [b, hq, s, d]
        x = x + self.output(out.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, h, s, d]; cos, sin [s, d / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class BareGPT(nn.Module):
    def __init__(self, c: GPTConfig, seq_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(c.padded_vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(BareLayer(c) for _ in range(c.num_layers))
        self.final_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_epsilon)
        self.lm_head = nn.Linear(c.hidden_size, c.padded_vocab_size, bias=False)
        self.cos, self.sin = rotary_tables(
            torch.arange(seq_length),
            rotary_frequencies(head_dim=c.kv_channels, base=c.rotary_base),
            dtype=torch.float32,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)  # [b, s, h]
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.lm_head(self.final_norm(x))  # [b, s, V]


# The bare model's name of each of our parameters, within a layer or at the root.
BARE_NAMES = {
    "attention.qkv.layer_norm_weight": "attention_norm.weight",
    "attention.qkv.weight": "qkv.weight",
    "attention.output.weight": "output.weight",
    "mlp.layer_norm_weight": "mlp_norm.weight",
    "mlp.gate_weight": "gate.weight",
    "mlp.up_weight": "up.weight",
    "mlp.fc2_weight": "down.weight",
}


def bare_weights(ours: OurStep) -> dict[str, Tensor]:
    """Our weights, whole, under the bare model's names and with all queries before all keys before all values."""
    c, weights = ours.config, {}
    rows = torch.arange(c.qkv_size).view(c.num_query_groups, -1, c.kv_channels)  # a group: its queries, key, value
    rows = torch.cat([part.flatten() for part in rows.split((c.queries_per_group, 1, 1), dim=1)])
    for name, parameter in ours.model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for our_name, bare_name in BARE_NAMES.items():
            name = name.replace(our_name, bare_name)
        weights[name] = (whole[rows] if name.endswith("qkv.weight") else whole).detach().clone()
    return weights


class BareStep:
    """A plain loop; over several ranks FSDP2 with a share of the sequences on each, gathered weights kept as ours are."""

    def __init__(self, ours: OurStep) -> None:
        args, size, rank = ours.args, dist.get_world_size(), dist.get_rank()
        self.max_norm = args.clip_grad
        self.model = BareGPT(ours.config, args.seq_length)
        self.model.load_state_dict(bare_weights(ours))
        if size > 1:
            for module in (*self.model.layers, self.model):
                fully_shard(module, reshard_after_forward=args.reshard_after_forward == "on")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **ours.adam, fused=True)
        self.batches = []
        for sequences in ours.batches:
            mine = sequences[rank::size]
            self.batches.append(
                [torch.from_numpy(np.stack(rows)) for rows in ([s.tokens for s in mine], [s.labels for s in mine])]
            )

    def step(self, number: int) -> Tensor:
        """The mean loss of this rank's sequences, before the update."""
        tokens, labels = self.batches[number % NUM_BATCHES]
        loss = F.cross_entropy(self.model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


# ---------------------------------------------------------------------------------------------------
# Processes that do as they are told


class Rank:
    """What a process can be told to do. Every rank of a world is told the same."""

    def prepare(self) -> list[float]:
        """Build both steps from the same weights, and warm up; their losses must agree while they do. Returns ours."""
        ours = OurStep(cp_size=dist.get_world_size(), seq_length=SEQ_LENGTH, batch_size=MICRO_BATCH)
        bare = BareStep(ours)
        losses = []
        for number in range(WARM_UP_STEPS):
            our_loss, bare_loss = ours.step(number).item(), bare.step(number)
            dist.all_reduce(bare_loss)
            bare_mean = bare_loss.item() / dist.get_world_size()
            assert abs(our_loss - bare_mean) <= LOSS_TOLERANCE, (
                f"step {number}: our loss is {our_loss}, the bare model's {bare_mean}"
            )
            losses.append(our_loss)
        self.steps = {"ours": ours.step, "bare": bare.step}
        return losses

    def time_steps(self, names: list[str], steps: int) -> dict[str, float]:
        """Seconds of `steps` steps of each, which take turns step by step."""
        seconds = dict.fromkeys(names, 0.0)
        for number, name in itertools.product(range(steps), names):
            dist.barrier()
            start = time.perf_counter()
            self.steps[name](number)
            dist.barrier()
            seconds[name] += time.perf_counter() - start
        return seconds

    def saved_bytes(self, cp_size: int) -> dict[str, int]:
        """Bytes of the distinct storages that a forward pass saves for its backward, parameters apart."""
        ours = OurStep(cp_size=cp_size, seq_length=LONG_SEQ_LENGTH, batch_size=1)
        batch = ours.batch(0)
        saved: dict[int, tuple[Any, torch.Size]] = {}  # holding the storage keeps its address from being used again

        def pack(x: Tensor) -> Tensor:
            storage = local_tensor(x).untyped_storage()
            saved.setdefault(storage.data_ptr(), (storage, x.shape))
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ours.model(batch.tokens, batch.packed_seq, labels=batch.labels)
        # FSDP keeps its gathered weights until the backward pass: they are the module's parameters now.
        parameters = {local_tensor(p).untyped_storage().data_ptr() for p in ours.model.parameters()}
        kept = [(storage.nbytes(), shape) for at, (storage, shape) in saved.items() if at not in parameters]
        # The chunked loss forms this gradient in its forward pass: saved, and as large as the weight whatever cp is.
        weight_shape = (ours.config.padded_vocab_size, ours.config.hidden_size)
        return {
            "saved": sum(size for size, _ in kept),
            "of which the output weight's gradient": sum(size for size, shape in kept if shape == weight_shape),
            "parameters left out": sum(storage.nbytes() for at, (storage, _) in saved.items() if at in parameters),
        }


def _serve(rank: int, size: int, threads: int, port: int, pipe: Connection, what: type) -> None:
    torch.set_num_threads(threads)
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
        }
    initialise_distributed(
        read_launch(), "cpu", timeout=timedelta(minutes=10)
    )  # the allocator's settings, too, for all alike
    state = what()
    while True:
        method, arguments = pipe.recv()
        try:
            pipe.send((rank, getattr(state, method)(*arguments), None))
        except BaseException:  # the parent raises it
            pipe.send((rank, None, traceback.format_exc()))


class World:
    """`size` processes of `threads` threads each, that can be told what `what` has methods for."""

    def __init__(self, size: int, *, threads: int, what: type = Rank) -> None:
        context = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(
                context.Process(target=_serve, args=(rank, size, threads, port, theirs, what), daemon=True)
            )
            self.processes[-1].start()
            theirs.close()

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """A method on every rank; what each returned."""
        for pipe in self.pipes:
            pipe.send((method, arguments))
        results: dict[int, Any] = {}
        while len(results) < len(self.pipes):
            for pipe in wait(self.pipes):
                rank, result, error = pipe.recv()
                if error:
                    raise RuntimeError(f"rank {rank}:\n{error}")
                results[rank] = result
        return [results[rank] for rank in range(len(self.pipes))]

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()  # results are here; gloo's own teardown aborts now and then
            process.join()


# ---------------------------------------------------------------------------------------------------
# The comparisons


def figure(
    what: str, measured: float, against: float, unit: str, target: float, *, at_most: bool = False, **details: Any
) -> dict:
    """`measured` over `against`, which reaches `target` from above or, with `at_most`, from below; printed, and returned for the JSON."""
    ratio = measured / against
    passed = ratio <= target if at_most else ratio >= target
    verdict = f"{'<=' if at_most else '>='} {target:.2f} {'pass' if passed else 'miss'}"
    print(f"{what:56}{measured:>8.0f}{against:>10.0f} {unit:10}{ratio:>6.3f}   {verdict}", flush=True)
    numbers = dict(measured=measured, against=against, unit=unit, ratio=ratio, target=target, passed=passed)
    return {"what": what, **numbers, **details}


def tokens_per_second(rounds: list[float], steps: int) -> float:
    """From the seconds of each round."""
    return steps * MICRO_BATCH * SEQ_LENGTH / statistics.median(rounds)


def compare_with_bare(rounds: int, steps: int) -> list[dict]:
    with World(1, threads=2) as one:
        losses = one.call("prepare")[0]
        seconds = [one.call("time_steps", ["ours", "bare"], steps)[0] for _ in range(rounds)]
    times = {name: [s[name] for s in seconds] for name in ("ours", "bare")}
    speeds = [tokens_per_second(times[name], steps) for name in ("ours", "bare")]
    return [figure("1  one process of 2 threads: ours / bare", *speeds, "tokens/s", 0.95, seconds=times, losses=losses)]


def compare_cp2(rounds: int, steps: int) -> list[dict]:
    with World(1, threads=2) as one, World(2, threads=1) as two:
        losses = {"one process": one.call("prepare")[0], "two": two.call("prepare")[0]}
        turns = {"one process": (one, "ours"), "cp 2": (two, "ours"), "bare FSDP2": (two, "bare")}
        times: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(rounds):
            for name, (world, contestant) in turns.items():
                times[name].append(
                    max(seconds[contestant] for seconds in world.call("time_steps", [contestant], steps))
                )
    one_process, cp2, fsdp2 = (tokens_per_second(seconds, steps) for seconds in times.values())
    details = dict(seconds=times, losses=losses)
    return [
        figure("2a cp 2 on 2 x 1 thread / one process of 2 threads", cp2, one_process, "tokens/s", 0.75, **details),
        figure("2b cp 2 / bare FSDP2, both on 2 x 1 thread (2: either)", cp2, fsdp2, "tokens/s", 0.95),
    ]


def compare_memory(rounds: int, steps: int) -> list[dict]:
    """Counted, not timed: once is enough."""
    counts = []
    for cp_size in (1, LONG_CP):
        with World(cp_size, threads=max(1, 2 // cp_size)) as world:
            counts.append(max(world.call("saved_bytes", cp_size), key=lambda count: count["saved"]))
    alone, shared = (count["saved"] / 2**20 for count in counts)
    what = f"3  saved for backward, {LONG_SEQ_LENGTH} tokens: cp {LONG_CP} / cp 1"
    return [
        figure(what, shared, alone, "MiB", 0.30, at_most=True, bytes={"cp 1": counts[0], f"cp {LONG_CP}": counts[1]})
    ]


COMPARISONS = {"1": compare_with_bare, "2": compare_cp2, "3": compare_memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Our training step against plain PyTorch; memory and speed of context parallelism"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each thing compared")
    parser.add_argument("--steps-per-round", type=int, default=3, help="training steps in a turn")
    parser.add_argument("--only", choices=COMPARISONS, help="one comparison; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there, too")
    args = parser.parse_args()

    print(f"{'':56}{'measured':>8}{'against':>10} {'':10}{'ratio':>6}   target", flush=True)
    chosen = [args.only] if args.only else COMPARISONS
    figures = [f for name in chosen for f in COMPARISONS[name](args.rounds, args.steps_per_round)]
    facts = {"torch": torch.__version__, "cores": os.cpu_count(), "load average at the end": os.getloadavg()[0]}
    text = json.dumps(facts | {"rounds": args.rounds, "steps per round": args.steps_per_round, "figures": figures})
    if args.json:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
