"""Speed on one GPU: each figure beside a floor that runs in the same process, in turns with it.

    python benchmarks/gpu.py [--only step,fp8,packed,ring,memory,length] [--rounds 7] [--seconds 400] [--json FILE]
    python benchmarks/gpu.py --tiny          # the same code in small on the CPU, to see that it runs; its figures mean nothing

step    MFU of a model of about 1B, 8192 tokens a sequence, packed documents and one document a sequence: our layers, compiled, those of
        Transformer Engine in bf16 and in 8 bits; against a bare loop over te.TransformerLayer and a plain PyTorch one, in one file each.
fp8     8 bits against bf16 in layers of the size of an 8B model.
packed  real tokens/s of packed rows against one document a row, padded.
ring    what a rank of cp 2, 4 and 8 computes, rank after rank on this card, against the flash kernel over everything, divided by cp.
memory  the most that a step holds, beside what tools/plan.py says of it.
length  the longest row whose step fits, with everything recomputed: of documents of 131072 tokens, and of one document while there is time.

A figure is a ratio of medians, of what runs in turns; only what is compared is on the card at a time, for which 78 GiB are enough. What
cannot run here (no Transformer Engine, say) is said and left out. Goals that are missed are told, not hidden. Prints tables, then JSON,
which is written after every comparison. Documents have the lengths of the standard library's files, four bytes a token.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import platform
import shlex
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from config.arguments import model_config, parse_arguments, resolve
from torch import Tensor, nn

from benchmarks.train_step import BareGPT
from cp.native_p2p import build_ring_blocks, ring_attention_blocks
from cp.packed_seq import build_packed_seq
from data.batch import build_batch
from data.dataset import PackedSample
from model.config import GPTConfig, padded_vocab_size
from parallel.fsdp import clip_grad_norm_
from parallel.grid import GridSizes, build_grid
from planner.memory import rank_memory
from runtime.distributed import Launch, initialise_distributed
from train import build_model
from training.flops import known_peak_tflops, training_flops
from training.optimizer import build_optimizer
from training.step import forward_backward, get_norm_owned_names

ONE_B = "--num-layers 16 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 16 --num-query-groups 8 --seq-length 8192"
EIGHT_B = "--num-layers 4 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --num-query-groups 8 --seq-length 8192"
TINY = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2 --seq-length 256"
)
ROOT = Path(__file__).resolve().parents[1]
VOCAB, SEED = 32000, 1234
GOALS = {"te / bare te": 0.97, "MFU, te bf16 bshd": 0.5, "fp8 / bf16": 1.25, "ring, batch": 0.93, "ring, packed": 0.85}
TORCH, TE = "--transformer-impl torch --cp-backend native", "--transformer-impl te --cp-backend te"
DOCUMENT = 131072  # tokens of each document in the longest rows


class Machine:
    """The device, its peak, how to time on it, and where figures are kept."""

    def __init__(self, tiny: bool, place: Path | None = None, seconds: float = 400.0) -> None:
        self.tiny, self.place, self.ends = tiny, place, time.monotonic() + seconds
        self.facts: dict[str, Any] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.device, _ = initialise_distributed(Launch(), "cpu" if tiny else "cuda", timeout=timedelta(minutes=30))
        self.grid = build_grid(GridSizes())
        self.name = platform.processor() or "CPU" if tiny else torch.cuda.get_device_name(self.device)
        self.peak = None if tiny else known_peak_tflops(self.name)
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.has_te = not tiny and importlib.util.find_spec("transformer_engine") is not None

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call, the device's work included."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def take_turns(
        self, work: dict[str, Callable[[], Any]], rounds: int, *, warm_up: int = 3
    ) -> dict[str, list[float]]:
        """Seconds of each in each round."""
        for function in work.values():
            for _ in range(warm_up):
                function()
        found: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(rounds):
            for name, function in work.items():
                found[name].append(self.seconds(function))
        return found

    def free(self) -> None:
        gc.collect()
        if self.has_te:
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            FP8GlobalStateManager.reset()  # scales of a model that is gone are updated in every step of the next
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def keep(self, part: str, figures: dict[str, Any]) -> None:
        """What is measured is kept, whatever comes after."""
        self.results.setdefault(part, {}).update(figures)
        if self.place is not None:
            self.place.write_text(json.dumps(self.facts | self.results, indent=1))


def document_lengths(seq_length: int, rows: int) -> list[np.ndarray]:
    """For each row the lengths of documents that fill it, the last one cut."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    lengths = [max(1, path.stat().st_size // 4) for path in files]
    order, found, at = np.random.default_rng(SEED).permutation(len(lengths)), [], 0
    for _ in range(rows):
        row: list[int] = []
        while sum(row) < seq_length:
            row.append(min(lengths[order[at % len(order)]], seq_length - sum(row)))
            at += 1
        found.append(np.array(row))
    return found


def row_of(lengths: np.ndarray, alignment: int, seq_length: int) -> PackedSample:
    """Random tokens in documents of these lengths, each padded to the alignment; the row's unused end is a document of length 0."""
    padded = -(-lengths // alignment) * alignment
    while padded.sum() > seq_length:  # alignment made the row too long: the longest document gives way
        longest = int(padded.argmax())
        padded[longest] -= alignment
        lengths = np.minimum(lengths, padded)
    if padded.sum() < seq_length:
        lengths, padded = np.append(lengths, 0), np.append(padded, seq_length - padded.sum())
    tokens, labels = np.random.default_rng(SEED).integers(0, VOCAB, (2, seq_length))
    real = np.concatenate([np.arange(p) < n for n, p in zip(lengths, padded, strict=True)])
    return PackedSample(tokens, np.where(real, labels, -100), lengths, padded)


class OurStep:
    """train.py's step over one row."""

    def __init__(self, machine: Machine, shape: str, flags: str, row: PackedSample | None = None) -> None:
        common = f"--device {machine.device.type} --dtype {'fp32' if machine.tiny else 'bf16'} --make-vocab-size-divisible-by 128 --lr 1e-4"
        self.args = parse_arguments(
            [*shlex.split(shape), *shlex.split(common), "--global-batch-size", "1", *shlex.split(flags)]
        )
        resolve(self.args, world_size=1, local_world_size=1, cuda_devices=lambda: 1)
        self.config = model_config(self.args, vocab_size=VOCAB, padded_vocab_size=padded_vocab_size(VOCAB, 128))
        self.machine = machine
        self.model = build_model(self.args, self.config, machine.grid, machine.device)
        self.optimizer = build_optimizer(self.model, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        self.read(row)

    def read(self, row: PackedSample | None = None) -> None:
        """Take this packed row from now on; None: one sequence of the sequence length, as BSHD."""
        qkv_format = "bshd" if row is None else "thd"
        row = row or row_of(np.array([self.args.seq_length]), 1, self.args.seq_length)
        self.batch = build_batch([row], cp_size=1, cp_rank=0, qkv_format=qkv_format, layout=self.args.cp_layout)
        self.tokens = float(row.lengths.sum())
        self.flops = training_flops(
            self.config, tokens=self.tokens, squared_lengths=float((row.lengths.astype(float) ** 2).sum())
        )

    def __call__(self) -> Tensor:
        loss_tokens = torch.tensor(float(self.batch.loss_tokens), dtype=torch.float64, device=self.machine.device)
        loss = forward_backward(
            self.model, [self.batch], loss_tokens=loss_tokens, device=self.machine.device, reshard_between=False
        )
        clip_grad_norm_(
            dict(self.model.named_parameters()),
            self.machine.grid,
            max_norm=1.0,
            owned=get_norm_owned_names(self.model, self.machine.grid),
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss / loss_tokens


class BareTE(nn.Module):
    """te.TransformerLayer as its documentation stacks it, one causal mask a sequence."""

    def __init__(self, c: GPTConfig, seq_length: int) -> None:
        super().__init__()
        import transformer_engine.pytorch as te

        self.embedding = nn.Embedding(c.padded_vocab_size, c.hidden_size)
        options = dict(
            num_gqa_groups=c.num_query_groups,
            bias=False,
            normalization="RMSNorm",
            activation="swiglu",
            attn_input_format="bshd",
        )
        options |= dict(hidden_dropout=0.0, attention_dropout=0.0, self_attn_mask_type="causal", fuse_qkv_params=True)
        self.layers = nn.ModuleList(
            te.TransformerLayer(c.hidden_size, c.ffn_hidden_size, c.num_attention_heads, **options)
            for _ in range(c.num_layers)
        )
        self.final_norm = te.RMSNorm(c.hidden_size)
        self.lm_head = nn.Linear(c.hidden_size, c.padded_vocab_size, bias=False)
        self.rotary = te.RotaryPositionEmbedding(c.kv_channels)(seq_length)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, rotary_pos_emb=self.rotary)
        return self.lm_head(self.final_norm(x))


class BareStep:
    """A loop as anyone writes it: fp32 weights under autocast, whole logits, AdamW."""

    def __init__(self, machine: Machine, model: Callable[[GPTConfig, int], nn.Module], like: OurStep) -> None:
        self.machine = machine
        with machine.device:
            self.model = model(like.config, like.args.seq_length)
        for name in ("cos", "sin"):
            if hasattr(self.model, name):
                setattr(self.model, name, getattr(self.model, name).to(machine.dtype))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.tokens, self.labels = (x.to(machine.device)[None] for x in (like.batch.tokens, like.batch.labels))

    def __call__(self) -> Tensor:
        with torch.autocast(self.machine.device.type, dtype=torch.bfloat16, enabled=not self.machine.tiny):
            logits = self.model(self.tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), self.labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def median_ratio(over: list[float], under: list[float]) -> float:
    """How many times as fast the second is."""
    return statistics.median(over) / statistics.median(under)


def compared(
    machine: Machine, ours: dict[str, OurStep], bare: dict[str, BareStep], row: PackedSample | None, rounds: int
) -> dict[str, Any]:
    """Figures of each over a row, and each over the bare loops, in turns."""
    for one in ours.values():
        one.read(row)
    like, kind = next(iter(ours.values())), "bshd" if row is None else "thd"
    work: dict[str, Callable[[], Any]] = {**ours, **(bare if row is None else {})}
    seconds = machine.take_turns(work, rounds)
    found: dict[str, Any] = {}
    for name, measured in seconds.items():
        typical = statistics.median(measured)
        figures = {"ms": 1000 * typical, "tokens/s": like.tokens / typical, "TFLOP/s": like.flops / typical / 1e12}
        figures |= {"MFU": like.flops / typical / 1e12 / machine.peak} if machine.peak else {}
        found[f"{name} {kind}"] = figures
    for floor in (*bare, next(iter(ours))):
        for name in ours:
            if floor in seconds and name != floor:
                found[f"{name} / {floor}, {kind}"] = median_ratio(seconds[floor], seconds[name])
    return found


def step(machine: Machine, rounds: int) -> None:
    shape = TINY if machine.tiny else ONE_B
    length = parse_arguments(shlex.split(shape)).seq_length
    packed_row = row_of(document_lengths(length, 1)[0], 16, length)
    groups: list[tuple[dict[str, str], dict[str, Callable]]] = [
        ({"torch": TORCH, "torch compiled": f"{TORCH} --compile"}, {"bare PyTorch": BareGPT}),
    ]
    if machine.has_te:
        groups.append(({"te bf16": TE}, {"bare te": BareTE}))
        groups += [
            ({"te bf16": TE, f"te fp8 {name}": f"{TE} --fp8 {name}"}, {}) for name in ("delayed", "current", "block")
        ]
    for flags, floors in groups:
        ours = {name: OurStep(machine, shape, own) for name, own in flags.items()}
        bare = {name: BareStep(machine, model, next(iter(ours.values()))) for name, model in floors.items()}
        for row in (None, packed_row):
            machine.keep("step", compared(machine, ours, bare, row, rounds))
        del ours, bare
        machine.free()
    found = machine.results["step"]
    if "te bf16 / bare te, bshd" in found:
        summary = {
            "te / bare te": found["te bf16 / bare te, bshd"],
            "MFU, te bf16 bshd": found["te bf16 bshd"].get("MFU"),
        }
        machine.keep("step", summary)


def fp8(machine: Machine, rounds: int) -> None:
    if not machine.has_te:
        machine.keep("fp8", {"left out": "no Transformer Engine here"})
        return
    best = 0.0
    for name in ("delayed", "current", "block"):
        both = {
            recipe: OurStep(machine, EIGHT_B, f"--qkv-format bshd {TE} --fp8 {recipe}") for recipe in ("none", name)
        }
        seconds = machine.take_turns(dict(both), rounds)
        del both
        machine.free()
        ratio = median_ratio(seconds["none"], seconds[name])
        best = max(best, ratio)
        machine.keep("fp8", {f"{name} / bf16": ratio, "fp8 / bf16": best})


def packed(machine: Machine, rounds: int) -> None:
    """The same documents: packed in full rows, or each alone in a row of the sequence length."""
    shape, own = (TINY if machine.tiny else ONE_B), TE if machine.has_te else TORCH
    length = parse_arguments(shlex.split(shape)).seq_length
    documents = document_lengths(length, 1)[0]
    together = OurStep(machine, shape, own, row_of(documents, 16, length))
    alone = OurStep(machine, shape, own)
    seconds = machine.take_turns({"packed": together, "padded": alone}, rounds)
    # A padded row costs the same whatever document is in it.
    padded_rate = documents.mean() / statistics.median(seconds["padded"])
    packed_rate = together.tokens / statistics.median(seconds["packed"])
    del together, alone
    machine.free()
    machine.keep(
        "packed",
        {"packed tokens/s": packed_rate, "padded tokens/s": padded_rate, "packed / padded": packed_rate / padded_rate},
    )


def ring(machine: Machine, rounds: int) -> None:
    """Every rank's blocks in turn, forward and backward; what travels is there at once, so this is computation alone."""
    length, heads, groups, dim = (512, 4, 2, 16) if machine.tiny else (65536, 16, 8, 128)
    here = lambda x, group, tag: SimpleNamespace(wait=lambda clock=None: x)  # noqa: E731
    found: dict[str, Any] = {}
    for kind, lengths in (("batch", np.array([length])), ("packed", document_lengths(length, 1)[0])):
        row = row_of(lengths, 16, length)
        generator = torch.Generator(machine.device).manual_seed(SEED)
        make = lambda n, h, g=generator: torch.randn(n, h, dim, device=machine.device, dtype=machine.dtype, generator=g)  # noqa: E731

        def one(cp_size: int, rank: int, row: PackedSample = row, make: Callable = make) -> Callable[[], None]:
            part = length // cp_size
            q, k, v = (make(part, h).requires_grad_() for h in (heads, groups, groups))
            dout = make(part, heads)
            packed_seq, _ = build_packed_seq(row.lengths, row.padded_lengths, cp_size=cp_size, cp_rank=rank)
            blocks = build_ring_blocks(packed_seq, cp_size=cp_size, cp_rank=rank, device=machine.device)

            def run() -> None:
                q.grad = k.grad = v.grad = None
                with mock.patch("cp.native_p2p.start_ring_shift", here):
                    ring_attention_blocks(q, k, v, blocks, machine.grid.group("cp"), scale=dim**-0.5).backward(dout)

            return run

        for cp_size in (2, 4, 8):
            work: dict[str, Callable[[], Any]] = {"whole": one(1, 0)} | {
                f"rank {r}": one(cp_size, r) for r in range(cp_size)
            }
            seconds = machine.take_turns(work, rounds)
            each = [statistics.median(seconds[f"rank {r}"]) for r in range(cp_size)]
            ideal = statistics.median(seconds["whole"]) / cp_size
            found[f"{kind}, cp {cp_size}"] = {"slowest rank": ideal / max(each), "mean": ideal * cp_size / sum(each)}
            del work
            machine.free()
        found[f"ring, {kind}"] = min(
            figures["slowest rank"] for name, figures in found.items() if name.startswith(f"{kind}, cp")
        )
        machine.keep("ring", found)


def memory(machine: Machine, rounds: int) -> None:
    """PyTorch's count of what is allocated over two steps; a plan may be 10 % off."""
    shape = TINY if machine.tiny else ONE_B
    configurations = {"torch": TORCH, "torch, recompute selective": f"{TORCH} --recompute selective"}
    configurations |= {
        "torch, recompute full": f"{TORCH} --recompute full --seq-length {512 if machine.tiny else 32768}"
    }
    if machine.has_te:
        configurations |= {"te": TE, "te, recompute selective": f"{TE} --recompute selective"}
        configurations |= {
            "te, recompute full": f"{TE} --recompute full --seq-length 32768",
            "te, fp8": f"{TE} --fp8 current",
        }
    for name, flags in configurations.items():
        machine.free()
        on_cuda = machine.device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_cuda else 0
        ours = OurStep(machine, shape, flags)
        planned = rank_memory(ours.args, ours.config).peak
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        ours()
        ours()
        figures = {"planned GiB": planned / 2**30}
        if on_cuda:
            got = torch.cuda.max_memory_allocated() - before
            figures |= {"measured GiB": got / 2**30, "planned / measured": planned / got}
        machine.keep("memory", {name: figures})
        del ours


def length(machine: Machine, rounds: int) -> None:
    """Rows are doubled until a step no longer fits; one document's attention grows with the square, and ends where time does."""
    at, most, document = (512, 1024, 256) if machine.tiny else (DOCUMENT, 8 * DOCUMENT, DOCUMENT)
    ours = OurStep(machine, TINY if machine.tiny else ONE_B, f"--recompute full {TE if machine.has_te else TORCH}")
    ours()  # kernels are chosen, moments made
    latest, predicted = 0.0, 0.0
    while at <= most:
        figures: dict[str, Any] = {}
        for name, lengths in (("documents", np.full(at // document, document)), ("one document", np.array([at]))):
            if name == "one document" and predicted > machine.seconds_left():
                figures[f"{name}"] = f"left out: a step of about {predicted:.0f} s"
                continue
            if machine.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            ours.read(row_of(lengths, 16, at))
            try:
                took = machine.seconds(ours)
            except RuntimeError as error:  # torch's own, or what a library says that asked the driver
                machine.keep("length", {f"{at}": f"does not fit ({str(error).splitlines()[0]})"})
                return
            figures |= {f"{name}, s": took, f"{name}, tokens/s": at / took}
            if machine.device.type == "cuda":
                figures[f"{name}, GiB"] = torch.cuda.max_memory_allocated() / 2**30
            if name == "one document":
                latest = took
        predicted = 4.3 * latest if latest else predicted * 4
        machine.keep("length", {f"{at}": figures, "longest": at})
        at *= 2


PARTS = {"step": step, "fp8": fp8, "packed": packed, "ring": ring, "memory": memory, "length": length}


def tell(part: str, figures: dict[str, Any]) -> None:
    print(f"\n{part}")
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in value.items())
        elif isinstance(value, float):
            goal = GOALS.get(name)
            value = f"{value:.3f}" + ("" if goal is None else f" (goal {goal}: {'met' if value >= goal else 'MISSED'})")
        print(f"  {name:<36} {value}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=400.0, help="of the whole; length begins no step that would end later"
    )
    parser.add_argument("--json")
    options = parser.parse_args()
    machine = Machine(options.tiny, Path(options.json) if options.json else None, options.seconds)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "command": f"python benchmarks/gpu.py {shlex.join(sys.argv[1:])}".strip(),
        "commit": commit,
        "device": machine.name,
    }
    facts |= {"torch": torch.__version__, "peak TFLOP/s": machine.peak}
    if machine.has_te:
        facts["transformer-engine"] = importlib.metadata.version("transformer-engine")
    machine.facts = facts
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    for part in options.only.split(","):
        PARTS[part](machine, options.rounds)
        tell(part, machine.results[part])
    print(json.dumps(facts | machine.results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
