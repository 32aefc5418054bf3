"""Seconds of a training step from its parts: products, attention, passes over memory, transfers, the pipeline's bubble.

The attention of a layer is cp/cost.py's. No torch import. Speeds come from benchmarks/calibration.py; what they are
worth stands in docs/comparison/prediction_matrix.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cp.cost import DEVICES, Device, estimate_cost
from cp.cost import Situation as AttentionSituation
from cp.support import AttentionChoice
from model.config import GPTConfig, count_parameters
from training.flops import training_flops

GIB = 2**30
STATE_BYTES = 28  # of a parameter that an optimizer step reads and writes: weight, gradient, two moments
# Of a logit, beside the products (benchmarks/kernel_counts.py): by kernels on a GPU, by single operations in fp32.
LOGIT_BYTES = {"bf16": 6, "fp8": 6, "fp32": 20}
REDUCED_BYTES = 4  # of a gradient that FSDP reduces
# Forward passes of a layer that a step computes beyond one, and passes of its attention.
RECOMPUTED = {"none": 0.0, "selective": 0.4, "full": 1.0}
RECOMPUTED_ATTENTION = {"none": 0.0, "selective": 0.0, "full": 1.0}
LAYER_PASSES, ATTENTION_PASSES = 3.0, 3.5  # forward and backward, in forward passes


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Fitted constants of training, beside those of `cp.cost.Device`.

    Attributes:
        bf16, fp8, fp32: share of the peak that products reach.
        flash2: speed of FlashAttention 2 and FlexAttention over that of FlashAttention 3 and cuDNN.
        sdpa: speed of PyTorch's context_parallel of 2024, over FlashAttention 2, over that of FlashAttention 3.
        element: bytes that norms, rotations, activations and sums move for a token's hidden channel, a layer.
        tp: share of tensor parallelism's transfers that computation does not hide.
        threads: speed of a process of two threads over that of a rank of one thread, beside another one.
    """

    element: float
    bf16: float = 0.0
    fp8: float = 0.0
    fp32: float = 0.0
    flash2: float = 1.0
    sdpa: float = 1.0
    tp: float = 1.0
    threads: float = 1.0


# Found by `benchmarks/calibration.py --fit`.
SPEEDS = {
    "cpu": Speeds(fp32=0.674, element=291, threads=2.47),
    "cuda": Speeds(bf16=0.65, fp8=0.475, flash2=0.576, sdpa=0.376, element=179, tp=0.373),
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A kind of device and its node.

    Attributes:
        peak: FLOP/s by dtype.
        attention: of the attention kernel, links and memory.
        gib: memory of a device.
        node_ranks: devices of a node.
    """

    peak: Mapping[str, float]
    attention: Device
    speeds: Speeds
    gib: float
    node_ranks: int = 8


H100_PEAK, H100_MEMORY = 989e12, 3.35e12  # dense bf16 FLOP/s, bytes/s


def build_machines(
    devices: Mapping[str, Device] = DEVICES, speeds: Mapping[str, Speeds] = SPEEDS
) -> dict[str, Machine]:
    """Machines by name; a GPU's speeds are those of an H100, in proportion to its data sheet."""

    def gpu(*, peak: float, memory: float, gib: float, links: float = 1.0) -> Machine:
        h100 = devices["cuda"]
        scaled: dict[str, Any] = {
            "flops": h100.flops * peak / H100_PEAK,
            "memory": h100.memory * memory / H100_MEMORY,
            "ring": h100.ring * links,
            "exchange": h100.exchange * links,
        }
        rates = {"bf16": peak, "fp8": 2 * peak}
        return Machine(peak=rates, attention=replace(h100, **scaled), speeds=speeds["cuda"], gib=gib)

    # Of a GPU below its power limit: the clock, whose cube the power follows. This H100 has HBM2e.
    slow = H100_PEAK * (500 / 700) ** (1 / 3)
    return {
        "H100": gpu(peak=H100_PEAK, memory=H100_MEMORY, gib=79.6),
        "H100 500 W": gpu(peak=slow, memory=2.4e12, gib=94.5),
        "H200": gpu(peak=H100_PEAK, memory=4.8e12, gib=140.4),
        "B200": gpu(peak=2250e12, memory=8e12, gib=178.0, links=2.0),
        "cpu": Machine(peak={"fp32": 1e11}, attention=devices["cpu"], speeds=speeds["cpu"], gib=math.inf),
    }


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training step.

    Attributes:
        lengths: document lengths, each of which stands for an equal share of the tokens.
        choice: method of attention; its cp_size is the run's.
        dp: data ranks, over which (and over cp) weights are sharded.
        microbatches: of one data rank in a step, of one sequence each.
        reshard: weights are gathered for each pass of each microbatch, not once a step.
        kernel: flash3, or a slower one of `Speeds`.
        imbalance: attention of the busiest cp rank over the mean.
        threads: of a CPU rank.
    """

    architecture: GPTConfig
    seq_length: int
    lengths: tuple[float, ...]
    dtype: str
    choice: AttentionChoice
    dp: int
    microbatches: int
    tp: int = 1
    pp: int = 1
    virtual_stages: int = 1
    recompute: str = "none"
    reshard: bool = False
    kernel: str = "flash3"
    imbalance: float = 1.0
    threads: int = 1

    @property
    def ranks(self) -> int:
        return self.pp * self.tp * self.choice.cp_size * self.dp

    @property
    def tokens(self) -> int:
        """Of all ranks in a step."""
        return self.dp * self.microbatches * self.seq_length


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step of the busiest rank, by part. `tp`, `cp` and `fsdp` are what computation does not hide."""

    products: float
    attention: float
    passes: float
    tp: float
    cp: float
    fsdp: float
    bubble: float
    optimizer: float

    @property
    def exposed(self) -> float:
        return self.tp + self.cp + self.fsdp

    @property
    def total(self) -> float:
        return self.products + self.attention + self.passes + self.exposed + self.bubble + self.optimizer


def estimate_step(job: Job, machine: Machine) -> StepTime:
    """The step's time: m microbatches through a stage, the bubble, and what a step does once."""
    speeds, device, architecture = machine.speeds, machine.attention, job.architecture
    tokens, item = job.seq_length / job.choice.cp_size, 4 if job.dtype == "fp32" else 2
    layers, count = architecture.num_layers / job.pp, job.microbatches
    threads = speeds.threads if job.threads > 1 else 1.0
    again = RECOMPUTED[job.recompute]

    layer_flops, output_flops = _token_flops(architecture)
    layer_seconds = layer_flops / (machine.peak[job.dtype] * getattr(speeds, job.dtype))
    wide = "fp32" if job.dtype == "fp32" else "bf16"  # the output layer's products
    output_seconds = output_flops / (machine.peak[wide] * getattr(speeds, wide))
    products = tokens / job.tp / job.pp * (layer_seconds * (1 + again / LAYER_PASSES) + output_seconds) / threads

    elements = layers * architecture.hidden_size * speeds.element * (1 + again / LAYER_PASSES) * item / 2
    logits = architecture.padded_vocab_size * LOGIT_BYTES[job.dtype] / job.pp
    passes = tokens / job.tp * (elements + logits) / device.memory / threads

    cost = estimate_cost(_situation(job, machine, item), job.choice, device, imbalance=job.imbalance)
    again_attention = 1 + RECOMPUTED_ATTENTION[job.recompute] / ATTENTION_PASSES
    kernels = cost.kernels / (1.0 if job.kernel == "flash3" else getattr(speeds, job.kernel))
    attention = layers * (kernels + cost.passes) * again_attention / threads
    cp = layers * cost.transfers * again_attention

    channels = 4 * architecture.hidden_size * (job.tp - 1) / job.tp + architecture.shared_channels(job.tp)
    tp = tokens * channels * item * layers * (2 + again) / device.exchange * speeds.tp
    microbatch = products + passes + attention + tp + cp
    fsdp, optimizer = _once_a_step(job, machine, item, busy=count * microbatch)
    return StepTime(
        products=count * products,
        attention=count * attention,
        passes=count * passes,
        tp=count * tp,
        cp=count * cp,
        fsdp=fsdp,
        bubble=microbatch * (job.pp - 1) / job.virtual_stages,
        optimizer=optimizer,
    )


def _token_flops(architecture: GPTConfig) -> tuple[float, float]:
    """FLOPs of a token without attention: of all layers, and of the output layer."""
    output = 6.0 * architecture.hidden_size * architecture.padded_vocab_size
    return training_flops(architecture, tokens=1, squared_lengths=0) - output, output


def _situation(job: Job, machine: Machine, item: int) -> AttentionSituation:
    """Of one tp rank; where tp exceeds the key/value heads, each rank holds one."""
    return AttentionSituation(
        device="cpu" if job.dtype == "fp32" else "cuda",
        row_length=job.seq_length,
        lengths=job.lengths,
        heads=job.architecture.num_attention_heads // job.tp,
        groups=max(1, job.architecture.num_query_groups // job.tp),
        head_dim=job.architecture.kv_channels,
        item=item,
        node_ranks=max(1, machine.node_ranks // job.tp),
    )


def _once_a_step(job: Job, machine: Machine, item: int, *, busy: float) -> tuple[float, float]:
    """Exposed seconds of gathering weights and reducing gradients, and seconds of the optimizer."""
    device, shards = machine.attention, job.dp * job.choice.cp_size
    parameters = count_parameters(job.architecture) / job.tp / job.pp
    gathers, reductions = (2 * job.microbatches, job.microbatches) if job.reshard else (1, 1)
    moved = parameters * (shards - 1) / shards * (gathers * item + reductions * REDUCED_BYTES)
    crosses = job.tp * shards > machine.node_ranks
    speed = min(device.exchange, device.network * machine.node_ranks) if crosses else device.exchange
    seconds = moved / speed
    exposed = max((1 - device.hidden) * seconds, seconds - busy)
    return exposed, parameters / shards * STATE_BYTES / device.memory
