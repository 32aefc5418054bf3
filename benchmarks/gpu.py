"""Speed on one GPU: each figure beside a floor that runs in the same process, in turns with it.

    python benchmarks/gpu.py [--only step,kernels,ring,fp8,packed,memory,length] [--rounds 5] [--seconds 300]
                             [--json FILE]
    python benchmarks/gpu.py --tiny          # the same code in small on the CPU; its figures mean nothing

step    MFU of a model of about 1B, 8192 tokens a sequence, packed documents and one document a sequence: torch layers,
        also compiled; te layers in bf16 and in 8 bits; against bare loops over te.TransformerLayer and plain PyTorch.
        Beside the MFU that benchmarks/kernel_counts.py predicts for an H100.
kernels functions of --fused-kernels, forward and backward: time of separate operations over theirs, and the share of
        a copy's bandwidth that they reach if they read and write everything once.
fp8     8 bits against bf16 in layers of the size of an 8B model.
packed  real tokens/s of packed rows against one document a row, padded.
ring    what a rank of cp 2, 4 and 8 computes, rank after rank on this card, against the flash kernel over the whole
        row, divided by cp.
memory  peak memory of a step, beside what tools/plan.py predicts.
length  longest row whose step fits with everything recomputed: of documents of 131072 tokens, and of one document while
        there is time.

The most valuable parts come first. A part, or a group of steps, that would begin after --seconds is left out and named,
so that `make test-gpu` and this fit ten minutes. A figure is a ratio of medians. Only what is compared is on the card
at a time; 78 GiB are enough. A part that cannot run here (without Transformer Engine, for example) is left out and
named. A missed goal does not fail. Prints tables, then JSON; the file is written after every comparison. Documents have
the lengths of the standard library's files, four bytes a token.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.bare import BareGPT, BareStep
from benchmarks.harness import (
    TIMEOUT,
    TrainStep,
    benchmark_parser,
    build_config,
    describe_goal,
    describe_machine,
    median_ratio,
    take_turns,
    time_call,
    write_figures,
)
from cp.cost import length_quantiles
from cp.dropout_attention import AttentionOptions
from cp.native_p2p import build_ring_blocks, merge_, ring_attention
from cp.packed_seq import IGNORE_LABEL, build_packed_seq
from cp.support import AttentionChoice
from data.dataset import PackedSample
from model.config import GPTConfig
from model.loss import chunked_cross_entropy
from model.rope import apply_rotary, rotary_tables
from model.torch_layers import swiglu
from parallel.fusion import compile_kernel, kernels
from parallel.grid import GridSizes, build_grid
from planner.memory import rank_memory
from planner.step_time import H100_PEAK, Job, build_machines, estimate_step
from runtime.distributed import Launch, initialise_distributed
from training.flops import known_peak_tflops, training_flops

ONE_B = """
    --num-layers 16 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 16 --num-query-groups 8
    --seq-length 8192
"""
EIGHT_B = """
    --num-layers 4 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --num-query-groups 8
    --seq-length 8192
"""
TINY = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2 --seq-length 256
"""
VOCAB_SIZE, SEED, ALIGNMENT = 32000, 1234, 16
GOALS = {"te / bare te": 0.97, "MFU, te bf16 bshd": 0.5, "fp8 / bf16": 1.25, "ring, batch": 0.93, "ring, packed": 0.85}
TORCH, TE = "--transformer-impl torch --cp-backend native", "--transformer-impl te --cp-backend te"
FP8_RECIPES = ("delayed", "current", "block")
DOCUMENT = 131072  # tokens of each document in the longest rows
STEP_GROWTH = 4.3  # of one document's step time, at twice the length


class Machine:
    """The device, its peak, its clock, and the file of the figures.

    Args:
        seconds: of the whole benchmark.
    """

    def __init__(self, tiny: bool, path: Path | None, seconds: float) -> None:
        self.tiny, self.path, self.end = tiny, path, time.monotonic() + seconds
        self.facts: dict[str, Any] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.device, _ = initialise_distributed(Launch(), "cpu" if tiny else "cuda", timeout=TIMEOUT)
        self.is_cuda = self.device.type == "cuda"
        self.grid = build_grid(GridSizes())
        self.name = platform.processor() or "CPU" if tiny else torch.cuda.get_device_name(self.device)
        self.peak_tflops = None if tiny else known_peak_tflops(self.name)
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.has_te = not tiny and importlib.util.find_spec("transformer_engine") is not None

    @property
    def shape(self) -> str:
        """Flags of the model of about 1B."""
        return TINY if self.tiny else ONE_B

    @property
    def layers(self) -> str:
        """Flags of the fastest layers here."""
        return TE if self.has_te else TORCH

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call, the device's work included."""
        return time_call(work, self.synchronize)

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def has_time(self, part: str, what: str) -> bool:
        """Whether the time of the benchmark is not over; else says so among the figures."""
        if self.seconds_left() > 0:
            return True
        self.keep(part, {f"{what}, left out": "--seconds is over"})
        return False

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def time_turns(
        self, work: dict[str, Callable[[], Any]], rounds: int, *, warm_up: int = 3
    ) -> dict[str, list[float]]:
        """Seconds of each in each round."""
        for call in work.values():
            for _ in range(warm_up):
                call()
        return take_turns({name: partial(self.seconds, call) for name, call in work.items()}, rounds)

    def free(self) -> None:
        """Return the memory of models that no longer exist."""
        gc.collect()
        if self.has_te:
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            FP8GlobalStateManager.reset()  # else each step of the next model updates the scales of the last one
        if self.is_cuda:
            torch.cuda.empty_cache()

    def keep(self, part: str, figures: dict[str, Any]) -> None:
        """Add figures to a part and write the file, so that a later failure loses nothing."""
        self.results.setdefault(part, {}).update(figures)
        write_figures(self.path, self.facts | self.results)


# ---------------------------------------------------------------------------------------------------
# Rows and steps


def draw_documents(seq_length: int) -> np.ndarray:
    """Lengths of documents that fill a row, the last one cut."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    lengths = [max(1, path.stat().st_size // 4) for path in files]
    order = np.random.default_rng(SEED).permutation(len(lengths))
    row: list[int] = []
    while sum(row) < seq_length:
        row.append(min(lengths[order[len(row) % len(order)]], seq_length - sum(row)))
    return np.array(row)


def build_sample(lengths: np.ndarray, alignment: int, seq_length: int) -> PackedSample:
    """Random tokens in documents of these lengths, each padded to the alignment; the tail is a document of length 0."""
    padded = -(-lengths // alignment) * alignment
    while padded.sum() > seq_length:  # the padding made the row too long: cut the longest document
        longest = int(padded.argmax())
        padded[longest] -= alignment
        lengths = np.minimum(lengths, padded)
    if padded.sum() < seq_length:
        lengths, padded = np.append(lengths, 0), np.append(padded, seq_length - padded.sum())
    tokens, labels = np.random.default_rng(SEED).integers(0, VOCAB_SIZE, (2, seq_length))
    is_real = np.concatenate([np.arange(p) < n for n, p in zip(lengths, padded, strict=True)])
    return PackedSample(tokens, np.where(is_real, labels, IGNORE_LABEL), lengths, padded)


class OurStep:
    """train.py's step over one row, again and again."""

    def __init__(self, machine: Machine, shape: str, flags: str, sample: PackedSample | None = None) -> None:
        dtype = "fp32" if machine.tiny else "bf16"
        common = f"--device {machine.device.type} --dtype {dtype} --lr 1e-4 --global-batch-size 1"
        config = build_config(f"{shape} {common} --make-vocab-size-divisible-by 128 {flags}", cuda_devices=1)
        self.ours = TrainStep(config, vocab_size=VOCAB_SIZE, device=machine.device, grid=machine.grid)
        self.read(sample)

    @property
    def seq_length(self) -> int:
        return self.ours.config.data.seq_length

    def read(self, sample: PackedSample | None = None) -> None:
        """Take this packed row from now on; None: one sequence of the sequence length, as BSHD."""
        qkv_format = "bshd" if sample is None else "thd"
        sample = sample or build_sample(np.array([self.seq_length]), 1, self.seq_length)
        self.batch = self.ours.build_batch([sample], qkv_format=qkv_format)
        self.tokens = float(sample.lengths.sum())
        squared_lengths = float((sample.lengths.astype(float) ** 2).sum())
        self.flops = training_flops(self.ours.architecture, tokens=self.tokens, squared_lengths=squared_lengths)

    def __call__(self) -> Tensor:
        return self.ours.step([self.batch])


class BareTE(nn.Module):
    """te.TransformerLayer as its documentation stacks it, one causal mask a sequence."""

    def __init__(self, c: GPTConfig, seq_length: int) -> None:
        super().__init__()
        import transformer_engine.pytorch as te

        self.embedding = nn.Embedding(c.padded_vocab_size, c.hidden_size)
        layers = (
            te.TransformerLayer(
                c.hidden_size,
                c.ffn_hidden_size,
                c.num_attention_heads,
                num_gqa_groups=c.num_query_groups,
                bias=False,
                normalization="RMSNorm",
                activation="swiglu",
                attn_input_format="bshd",
                hidden_dropout=0.0,
                attention_dropout=0.0,
                self_attn_mask_type="causal",
                fuse_qkv_params=True,
            )
            for _ in range(c.num_layers)
        )
        self.layers = nn.ModuleList(layers)
        self.final_norm = te.RMSNorm(c.hidden_size)
        self.lm_head = nn.Linear(c.hidden_size, c.padded_vocab_size, bias=False)
        self.rotary = te.RotaryPositionEmbedding(c.kv_channels)(seq_length)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] -> logits [b, s, V]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, rotary_pos_emb=self.rotary)
        return self.lm_head(self.final_norm(x))


def build_bare(
    machine: Machine, model_type: Callable[[GPTConfig, int], nn.Module], like: OurStep
) -> Callable[[], Tensor]:
    """The step of a bare loop over the sequence that `like` reads: fp32 weights, computed in bf16 under autocast."""
    with machine.device:
        model = model_type(like.ours.architecture, like.seq_length)
    for name in ("cos", "sin"):
        if hasattr(model, name):
            setattr(model, name, getattr(model, name).to(machine.dtype))
    bare = BareStep(model, like.ours.config.training, autocast=not machine.tiny)
    tokens, labels = (x.to(machine.device)[None] for x in (like.batch.tokens, like.batch.labels))
    return lambda: bare.step(tokens, labels)


# ---------------------------------------------------------------------------------------------------
# Parts


def compare_steps(
    machine: Machine,
    ours: dict[str, OurStep],
    bare: dict[str, Callable[[], Tensor]],
    sample: PackedSample | None,
    rounds: int,
) -> dict[str, Any]:
    """Figures of each step over a row, and ratios to the bare loops, in turns. Bare loops read no packed row."""
    for step in ours.values():
        step.read(sample)
    like, kind = next(iter(ours.values())), "bshd" if sample is None else "thd"
    work: dict[str, Callable[[], Any]] = {**ours, **(bare if sample is None else {})}
    seconds = machine.time_turns(work, rounds)
    found: dict[str, Any] = {}
    for name, measured in seconds.items():
        typical = statistics.median(measured)
        tflops = like.flops / typical / 1e12
        found[f"{name} {kind}"] = {"ms": 1000 * typical, "tokens/s": like.tokens / typical, "TFLOP/s": tflops}
        if machine.peak_tflops:
            found[f"{name} {kind}"]["MFU"] = tflops / machine.peak_tflops
    for floor in (*bare, next(iter(ours))):
        for name in ours:
            if floor in seconds and name != floor:
                found[f"{name} / {floor}, {kind}"] = median_ratio(seconds[floor], seconds[name])
    return found


def predict_mfu(step: OurStep, sample: PackedSample | None, kernel: str) -> float:
    """MFU of the step on an H100, by planner/step_time.py. `kernel` as `Job.kernel`."""
    lengths = np.array([step.seq_length]) if sample is None else sample.lengths[sample.lengths > 0]
    architecture = step.ours.architecture
    job = Job(
        architecture=architecture,
        seq_length=step.seq_length,
        lengths=length_quantiles(lengths, step.seq_length),
        dtype="bf16",
        choice=AttentionChoice(backend="native", method="p2p", qkv_format="thd", layout="zigzag", cp_size=1),
        dp=1,
        microbatches=1,
        kernel=kernel,
    )
    squares = float((lengths.astype(float) ** 2).sum())
    flops = training_flops(architecture, tokens=float(lengths.sum()), squared_lengths=squares)
    return flops / estimate_step(job, build_machines()["H100"]).total / H100_PEAK


def measure_step(machine: Machine, rounds: int) -> None:
    """Part step."""
    groups: list[tuple[dict[str, str], dict[str, Callable[[GPTConfig, int], nn.Module]]]] = [
        ({"torch": TORCH, "torch compiled": f"{TORCH} --compile"}, {"bare PyTorch": BareGPT}),
    ]
    if machine.has_te:
        groups.append(({"te bf16": TE}, {"bare te": BareTE}))
        groups += [({"te bf16": TE, f"te fp8 {recipe}": f"{TE} --fp8 {recipe}"}, {}) for recipe in FP8_RECIPES]
    predicted: dict[str, float] = {}
    for flags, floors in groups:
        if not machine.has_time("step", ", ".join(flags)):
            continue
        ours = {name: OurStep(machine, machine.shape, own) for name, own in flags.items()}
        first = next(iter(ours.values()))
        bare = {name: build_bare(machine, model_type, first) for name, model_type in floors.items()}
        packed = build_sample(draw_documents(first.seq_length), ALIGNMENT, first.seq_length)
        for sample in (None, packed):
            machine.keep("step", compare_steps(machine, ours, bare, sample, rounds))
        for name, kind, sample in ((n, k, s) for n in ours for k, s in (("bshd", None), ("thd", packed))):
            if name in ("torch", "te bf16") and f"{name} {kind}" not in predicted and not machine.tiny:
                predicted[f"{name} {kind}"] = predict_mfu(ours[name], sample, "flash2" if name == "torch" else "flash3")
        del ours, bare, first
        machine.free()
    found = machine.results["step"]
    for name, mfu in predicted.items():
        machine.keep("step", {name: found[name] | {"MFU predicted for an H100": mfu}})
    if "te bf16 / bare te, bshd" in found:
        ratio, measured = found["te bf16 / bare te, bshd"], found["te bf16 bshd"].get("MFU")
        machine.keep("step", {"te / bare te": ratio, "MFU, te bf16 bshd": measured})


def measure_fp8(machine: Machine, rounds: int) -> None:
    """Part fp8."""
    if not machine.has_te:
        machine.keep("fp8", {"left out": "Transformer Engine is not installed"})
        return
    best = 0.0
    for name in FP8_RECIPES:
        if not machine.has_time("fp8", name):
            continue
        work: dict[str, Callable[[], Any]] = {
            recipe: OurStep(machine, EIGHT_B, f"--qkv-format bshd {TE} --fp8 {recipe}") for recipe in ("none", name)
        }
        seconds = machine.time_turns(work, rounds)
        del work
        machine.free()
        ratio = median_ratio(seconds["none"], seconds[name])
        best = max(best, ratio)
        machine.keep("fp8", {f"{name} / bf16": ratio, "fp8 / bf16": best})


def measure_packed(machine: Machine, rounds: int) -> None:
    """Part packed: the same documents packed in full rows, or each alone in a row of the sequence length."""
    alone = OurStep(machine, machine.shape, machine.layers)
    documents = draw_documents(alone.seq_length)
    sample = build_sample(documents, ALIGNMENT, alone.seq_length)
    together = OurStep(machine, machine.shape, machine.layers, sample)
    seconds = machine.time_turns({"packed": together, "padded": alone}, rounds)
    # A padded row costs the same, whatever document it holds.
    padded = documents.mean() / statistics.median(seconds["padded"])
    packed = together.tokens / statistics.median(seconds["packed"])
    del together, alone
    machine.free()
    rates = {"packed tokens/s": packed, "padded tokens/s": padded, "packed / padded": packed / padded}
    machine.keep("packed", rates)


def arrive_at_once(x: Tensor, group: dist.ProcessGroup, tag: int) -> SimpleNamespace:
    """Stands for `start_ring_shift`: what is sent is received at once, so that computation alone is timed."""
    return SimpleNamespace(wait=lambda clock=None: x)


def build_ring_rank(
    machine: Machine,
    sample: PackedSample,
    heads: tuple[int, int, int],
    generator: torch.Generator,
    *,
    cp_size: int,
    cp_rank: int,
) -> Callable[[], None]:
    """Forward and backward over the blocks of a rank.

    Args:
        heads: query heads, key/value heads, channels of a head.
    """
    query_heads, groups, head_dim = heads
    tokens = len(sample.tokens) // cp_size

    def draw(num_heads: int) -> Tensor:
        shape = (tokens, num_heads, head_dim)
        return torch.randn(shape, device=machine.device, dtype=machine.dtype, generator=generator)

    q, k, v = (draw(number).requires_grad_() for number in (query_heads, groups, groups))
    dout = draw(query_heads)
    packed_seq, _ = build_packed_seq(sample.lengths, sample.padded_lengths, cp_size=cp_size, cp_rank=cp_rank)
    blocks = build_ring_blocks(packed_seq, cp_size=cp_size, cp_rank=cp_rank, device=machine.device)
    group, options = machine.grid.group("cp"), AttentionOptions(head_dim**-0.5)

    def run() -> None:
        q.grad = k.grad = v.grad = None
        with mock.patch("cp.native_p2p.start_ring_shift", arrive_at_once):
            ring_attention(q, k, v, blocks, group, options).backward(dout)

    return run


def build_kernels(machine: Machine) -> dict[str, tuple[Callable[[], Any], float]]:
    """Work of each function of --fused-kernels on a row of a layer of 8B, and the bytes that it must read and write."""
    tokens, heads, dim, ffn, hidden, vocab_size = (
        (64, 4, 16, 96, 64, 256) if machine.tiny else (8192, 32, 128, 14336, 4096, 128256)
    )

    def draw(*shape: int, dtype: torch.dtype = machine.dtype, requires_grad: bool = False) -> Tensor:
        return torch.randn(shape, device=machine.device, dtype=dtype, requires_grad=requires_grad)

    def size(*tensors: Tensor) -> int:
        return sum(x.nbytes for x in tensors)

    out, lse = draw(tokens, heads, dim, dtype=torch.float32), draw(tokens, heads, dtype=torch.float32)
    block_out, block_lse = draw(tokens, heads, dim), draw(tokens, heads, dtype=torch.float32)
    q, dq = draw(tokens, heads, dim, requires_grad=True), draw(tokens, heads, dim)
    frequencies = torch.rand(dim // 2, dtype=torch.float64, device=machine.device)
    cos, sin = rotary_tables(torch.arange(tokens, device=machine.device), frequencies, dtype=torch.float32)
    gate, up = draw(tokens, ffn, requires_grad=True), draw(tokens, ffn, requires_grad=True)
    dx = draw(tokens, ffn)
    x, weight = draw(tokens, hidden, requires_grad=True), draw(vocab_size, hidden, requires_grad=True)
    labels = torch.randint(0, vocab_size, (tokens,), device=machine.device)

    def run_loss() -> None:
        chunk_size = min(tokens, 2048)
        chunked_cross_entropy(x, weight, labels, vocab_size=vocab_size, chunk_size=chunk_size)[0].backward()

    logits = tokens * vocab_size * x.itemsize
    return {
        "merge of the ring": (
            lambda: merge_(out, lse, block_out, block_lse),
            2 * size(out, lse) + size(block_out, block_lse),
        ),
        "rotary positions": (lambda: apply_rotary(q, cos, sin).backward(dq), 4 * size(q) + 2 * size(cos, sin)),
        "SwiGLU": (lambda: swiglu(gate, up).backward(dx), 8 * size(gate)),
        "loss with its products": (run_loss, 2 * logits + 4 * size(x)),
    }


def measure_kernels(machine: Machine, rounds: int) -> None:
    """Part kernels."""
    source = torch.empty(2**20 if machine.tiny else 2**30, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copies = machine.time_turns({"copy": partial(target.copy_, source)}, rounds)["copy"]
    bandwidth = 2 * source.nbytes / statistics.median(copies)
    machine.keep("kernels", {"copy, GB/s": bandwidth / 1e9})
    del source, target
    for name, (work, least) in build_kernels(machine).items():
        if not machine.has_time("kernels", name):
            continue

        def run(build: Any, work: Callable[[], Any] = work) -> None:
            with kernels(build):
                work()

        seconds = machine.time_turns({"fused": partial(run, compile_kernel), "apart": partial(run, None)}, rounds)
        fused = statistics.median(seconds["fused"])
        ratio = median_ratio(seconds["apart"], seconds["fused"])
        machine.keep("kernels", {name: {"apart / fused": ratio, "share of a copy": least / fused / bandwidth}})
    machine.free()


def measure_ring(machine: Machine, rounds: int) -> None:
    """Part ring."""
    seq_length, heads = (512, (4, 2, 16)) if machine.tiny else (65536, (16, 8, 128))
    found: dict[str, Any] = {}
    for kind, lengths in (("batch", np.array([seq_length])), ("packed", draw_documents(seq_length))):
        sample = build_sample(lengths, ALIGNMENT, seq_length)
        build = partial(build_ring_rank, machine, sample, heads, torch.Generator(machine.device).manual_seed(SEED))
        slowest = []
        for cp_size in (2, 4, 8):
            if not machine.has_time("ring", f"{kind}, cp {cp_size}"):
                continue
            work = {"whole": build(cp_size=1, cp_rank=0)}
            work |= {f"rank {rank}": build(cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)}
            seconds = {name: statistics.median(times) for name, times in machine.time_turns(work, rounds).items()}
            ideal = seconds.pop("whole") / cp_size
            slowest.append(ideal / max(seconds.values()))
            mean = ideal / statistics.mean(seconds.values())
            found[f"{kind}, cp {cp_size}"] = {"slowest rank": slowest[-1], "mean": mean}
            del work
            machine.free()
        if slowest:
            found[f"ring, {kind}"] = min(slowest)
        machine.keep("ring", found)


def plan_memory(step: OurStep) -> int:
    """Planned peak of the step in bytes. A plan is made where no process group exists: in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(rank_memory, step.ours.config, step.ours.architecture).result().peak


def measure_memory(machine: Machine, rounds: int) -> None:
    """Part memory: what PyTorch's allocator counts over two steps. A plan may be 10 % off."""
    long = "" if machine.tiny else "--seq-length 32768"
    configurations = {
        "torch": TORCH,
        "torch, recompute selective": f"{TORCH} --recompute selective",
        "torch, recompute full": f"{TORCH} --recompute full {long or '--seq-length 512'}",
    }
    if machine.has_te:
        configurations |= {
            "te": TE,
            "te, recompute selective": f"{TE} --recompute selective",
            "te, recompute full": f"{TE} --recompute full {long}",
            "te, fp8": f"{TE} --fp8 current",
        }
    for name, flags in configurations.items():
        if not machine.has_time("memory", name):
            continue
        machine.free()
        before = torch.cuda.memory_allocated() if machine.is_cuda else 0
        step = OurStep(machine, machine.shape, flags)
        planned = plan_memory(step)
        if machine.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        step()
        step()
        figures = {"planned GiB": planned / 2**30}
        if machine.is_cuda:
            measured = torch.cuda.max_memory_allocated() - before
            figures |= {"measured GiB": measured / 2**30, "planned / measured": planned / measured}
        machine.keep("memory", {name: figures})
        del step


def measure_length(machine: Machine, rounds: int) -> None:
    """Part length: rows double until a step does not fit.

    One document's attention grows with the square of its length: those rows end where time does.
    """
    tokens, most, document = (512, 1024, 256) if machine.tiny else (DOCUMENT, 8 * DOCUMENT, DOCUMENT)
    step = OurStep(machine, machine.shape, f"--recompute full {machine.layers}")
    step()  # selects kernels and makes the optimizer's moments
    latest, predicted = 0.0, 0.0
    while tokens <= most:
        figures: dict[str, Any] = {}
        rows = {"documents": np.full(tokens // document, document), "one document": np.array([tokens])}
        for name, lengths in rows.items():
            if name == "one document" and predicted > machine.seconds_left():
                figures[name] = f"left out: a step of about {predicted:.0f} s"
                continue
            if machine.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            step.read(build_sample(lengths, ALIGNMENT, tokens))
            try:
                seconds = machine.seconds(step)
            except RuntimeError as error:  # out of memory, of PyTorch or of a library
                machine.keep("length", {f"{tokens}": f"does not fit ({str(error).splitlines()[0]})"})
                return
            figures |= {f"{name}, s": seconds, f"{name}, tokens/s": tokens / seconds}
            if machine.is_cuda:
                figures[f"{name}, GiB"] = torch.cuda.max_memory_allocated() / 2**30
            if name == "one document":
                latest = seconds
        predicted = STEP_GROWTH * latest if latest else predicted * 4
        machine.keep("length", {f"{tokens}": figures, "longest": tokens})
        tokens *= 2


PARTS: dict[str, Callable[[Machine, int], None]] = {
    "step": measure_step,
    "kernels": measure_kernels,
    "ring": measure_ring,
    "fp8": measure_fp8,
    "packed": measure_packed,
    "memory": measure_memory,
    "length": measure_length,
}


def print_part(part: str, figures: dict[str, Any]) -> None:
    print(f"\n{part}")
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in value.items())
        elif isinstance(value, float):
            value = f"{value:.3f} {describe_goal(value, GOALS.get(name))}"
        print(f"  {name:<36} {value}")
    sys.stdout.flush()


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=5, parts=PARTS)
    parser.add_argument("--tiny", action="store_true", help="the same code in small on the CPU; figures mean nothing")
    seconds_help = "time of the whole: what would begin later is left out; default: %(default)s"
    parser.add_argument("--seconds", type=float, default=300.0, help=seconds_help)
    args = parser.parse_args()
    machine = Machine(args.tiny, args.json, args.seconds)
    machine.facts = {"device": machine.name, "peak TFLOP/s": machine.peak_tflops}
    if machine.has_te:
        machine.facts["transformer-engine"] = importlib.metadata.version("transformer-engine")
    facts = describe_machine() | machine.facts
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    for part in args.only:
        if machine.has_time(part, part):
            PARTS[part](machine, args.rounds)
        print_part(part, machine.results[part])
    print(json.dumps(facts | machine.results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
