"""What a rank will need, before there is one: the model's own code runs on tensors without data, and every byte is counted.

A step of a stage with its microbatches, activations, recomputing, chunked loss and gradients is run on PyTorch's meta device
under a ledger of live storages. What needs other ranks is stood in for: tensor parallelism's gathers and sums, attention's
exchange, and what FSDP2 gathers, reduces and keeps (`fully_shard` of PyTorch 2.13, as its profiler shows it). Repeated layers
are counted on few and continued.

Not counted: the allocator's own rounding and fragmentation, NCCL's and the CUDA context's buffers, and kernels' workspaces.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config.schema import RunConfig
from cp.blocks import accumulator_dtype
from cp.packed_seq import PackedSeq, build_packed_seq
from model.config import GPTConfig
from model.gpt import GPT
from model.torch_layers import LayerNormMLP
from model.transformer import GPTOptions
from parallel.stages import split_layers

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
# As many are run; what one more adds is the difference to one less.
FEW_LAYERS = 3
FEW_IN_FLIGHT = 3
META = torch.device("meta")


class Ledger(TorchDispatchMode):
    """Bytes of live storages by what they are for. Operations under it run as ever.

    `label` says for what new storages are; `peak` is the most at any moment, `parts` what it was made of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = "activations"
        self.live: dict[str, int] = {}
        self.peak, self.parts = 0, {}  # type: ignore[var-annotated]
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.count(x)
        return out

    def count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return
        label, size = self.label, storage.nbytes()

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self.live[label] -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live[label] = self.live.get(label, 0) + size
        self._look()

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """Room for both, one above the other."""
        with self.for_("joined weights"):
            return gate.new_empty(len(gate) + len(up), gate.shape[1])

    def ignore(self, tensors: Any) -> None:
        """These were there before."""
        for x in tensors:
            storage = x.untyped_storage()
            self._seen[id(storage)] = weakref.ref(storage, lambda _: None)

    @contextmanager
    def for_(self, label: str) -> Iterator[None]:
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def _look(self) -> None:
        total = sum(self.live.values())
        if total > self.peak:
            self.peak, self.parts = total, {k: v for k, v in self.live.items() if v}


@dataclass
class _Size:
    """A process group of which only the size is asked."""

    ranks: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 0


class _Widen(torch.autograd.Function):
    """[t / n, ...] -> [t, ...]; backward the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:  # type: ignore[override]
        ctx.n = n
        return x.new_empty(len(x) * n, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad.contiguous().new_empty(len(grad) // ctx.n, *grad.shape[1:]), None


class _Narrow(torch.autograd.Function):
    """[t, ...] -> [t / n, ...]; backward the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:  # type: ignore[override]
        ctx.n = n
        return x.contiguous().new_empty(len(x) // n, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad.contiguous().new_empty(len(grad) * ctx.n, *grad.shape[1:]), None


class PlannedTP:
    """`parallel.tensor.TensorParallel` without ranks: the same shapes. The last messages stay until others follow, as gloo keeps them."""

    def __init__(self, size: int, sequence_parallel: bool) -> None:
        self.size, self.rank, self.sequence_parallel = size, 0, sequence_parallel
        self.group = _Size(size) if size > 1 else None
        self.messages: deque[tuple[Tensor, Tensor]] = deque(maxlen=2)

    def divide(self, size: int, what: str) -> int:
        return size // self.size

    def enter_parallel_region(self, x: Tensor) -> Tensor:
        return self._sent(x, _Widen.apply(x, self.size)) if self.sequence_parallel and self.size > 1 else x

    def exit_parallel_region(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        return self._sent(x, _Narrow.apply(x, self.size if self.sequence_parallel else 1))

    def _sent(self, x: Tensor, out: Tensor) -> Tensor:
        self.messages.append((x.detach(), out.detach()))
        return out

    def gather_columns(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), x.shape[1] * self.size)


class _PlannedAttention(torch.autograd.Function):
    """What the native methods save, and hold at the same time: for p2p as cp/native_p2p.py allocates it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: PlannedAttention) -> Tensor:  # type: ignore[override]
        wide = accumulator_dtype(q.dtype)
        result, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)
        with plan.buffers():
            held = plan.exchanged(k)
            sums = [q.new_empty(q.shape, dtype=wide) for _ in range((2 if plan.cp_size > 1 else 0) + (wide != q.dtype))]
            del sums, held
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.plan = plan
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        q, k, v, _, _ = ctx.saved_tensors
        accumulate = accumulator_dtype(q.dtype)
        with ctx.plan.buffers():
            dout = dout.contiguous()
            held = ctx.plan.exchanged(k)
            dq = q.new_empty(q.shape, dtype=accumulate)
            dkv = [k.new_empty((2, *k.shape), dtype=accumulate) for _ in range(3 if ctx.plan.cp_size > 1 else 1)]
            block = [x.new_empty(x.shape) for x in (q, k, v)]
            del block
            out = dq.to(q.dtype), dkv[0][0].to(k.dtype), dkv[0][1].to(v.dtype)
            del held
        return *out, None


class PlannedAttention:
    """The `attention` of a GPT on the meta device.

    Args:
        gathered: shards of K and V that are held at once beside the rank's own.
    """

    def __init__(self, ledger: Ledger, cp_size: int, gathered: float) -> None:
        self.ledger, self.cp_size, self.gathered = ledger, cp_size, gathered

    def buffers(self) -> Any:
        return self.ledger.for_("cp buffers")

    def exchanged(self, k: Tensor) -> Tensor | None:
        return k.new_empty(int(2 * self.gathered * k.numel())) if self.cp_size > 1 else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, packed_seq: PackedSeq, group: Any, **options: Any) -> Tensor:
        return _PlannedAttention.apply(q, k, v, self)


class _FusedNorm(torch.autograd.Function):
    """RMSNorm in one kernel, as CUDA has it and Transformer Engine: its input stays, and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x, memory_format=torch.contiguous_format), weight.new_empty(weight.shape)


@contextmanager
def fused_norms() -> Iterator[None]:
    """The meta device runs the many operations of a CPU's RMSNorm, which keep more."""

    def fused(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        return _FusedNorm.apply(x, weight)

    plain = functional.rms_norm
    functional.rms_norm = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.rms_norm = plain


class _PlannedTEMLP(torch.autograd.Function):
    """What Transformer Engine's LayerNormMLP saves, and holds at the same time (2.20.2, module/layernorm_mlp.py)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, joined: Tensor, gate: Tensor, up: Tensor, fc2: Tensor, spread: int
    ) -> Tensor:  # type: ignore[override]
        ln_out, rsigma = x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32)
        whole = (
            x.new_empty(len(x) * spread, x.shape[1]) if spread > 1 else ln_out
        )  # sequence parallelism gathers the tokens
        fc1_out = x.new_empty(len(whole), len(joined))
        act_out = x.new_empty(len(whole), len(joined) // 2)
        out = x.new_empty(len(whole), x.shape[1])
        ctx.save_for_backward(x, norm, ln_out, rsigma, joined, fc1_out, act_out, fc2)
        ctx.spread = spread
        return out.new_empty(x.shape) if spread > 1 else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, norm, _, _, joined, fc1_out, act_out, fc2 = ctx.saved_tensors
        if ctx.spread > 1:
            grad = grad.new_empty(len(grad) * ctx.spread, grad.shape[1])
        of_fc2, of_act = fc2.new_empty(fc2.shape), act_out.new_empty(act_out.shape)
        of_fc1_out = fc1_out.new_empty(fc1_out.shape)
        del of_act
        whole = grad.new_empty(grad.shape)
        of_joined, of_norm = joined.new_empty(joined.shape), norm.new_empty(norm.shape)
        del of_fc1_out, whole
        of_gate, of_up = of_joined.chunk(2)
        return x.new_empty(x.shape), of_norm, None, of_gate, of_up, of_fc2, None


class PlannedTEMLP(LayerNormMLP):
    """The MLP of `model.te_layers`: gate and up are joined once a step, in a copy that stays."""

    ledger: Ledger
    joined: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.joined is None:
            self.joined = self.ledger.joined(self.gate_weight, self.up_weight)
        spread = self.tp.size if self.tp.sequence_parallel else 1
        weights = (self.gate_weight, self.up_weight, self.fc2_weight)
        return _PlannedTEMLP.apply(x, self.layer_norm_weight, self.joined, *weights, spread)


@dataclass(frozen=True)
class Memory:
    """Of one rank, in bytes. `parts` adds up to `peak`."""

    peak: int
    parts: dict[str, int]
    stage: int


def _gathered_shards(config: RunConfig) -> float:
    """Shards of K and V in flight and at hand, by method."""
    method = config.parallel.attention.method
    if method == "p2p":
        return 2.0
    if method == "all_gather":
        return (
            config.parallel.cp_size
            * (config.parallel.heads_k_stride or 1)
            / (config.model.num_query_groups // config.parallel.tp_size)
        )
    return 2.0


class _Unit:
    """What FSDP2 gathers and reduces together: the parameters of a layer, or of the rest."""

    def __init__(self, parameters: list[nn.Parameter], sim: _Simulation) -> None:
        self.parameters, self.sim = parameters, sim
        self.numel = sum(p.numel() for p in parameters)
        self.gathered: list[Tensor] = []
        self.waiting = 0
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._accumulated)

    def gather(self) -> None:
        sim = self.sim
        if not sim.sharded or self.gathered:
            return
        with sim.ledger.for_("gathered weights"):
            sim.last_gather = torch.empty(
                self.numel, dtype=sim.compute, device=META
            )  # the message, kept until the next one
            self.gathered = [torch.empty(p.shape, dtype=sim.compute, device=META) for p in self.parameters]

    def free(self) -> None:
        self.gathered = []

    def _accumulated(self, parameter: Tensor) -> None:
        self.waiting -= 1
        if self.waiting > 0 or not self.sim.sharded:
            return
        self.finish()

    def finish(self) -> None:
        """After the unit's backward pass."""
        sim = self.sim
        if not sim.is_last:
            if sim.compute != sim.stored:
                with sim.ledger.for_("gradients"):
                    for p in self.parameters:
                        if p.grad is not None and not hasattr(p, "kept"):
                            p.kept = torch.empty(p.shape, dtype=sim.stored, device=META)  # type: ignore[attr-defined]
                        p.grad = None
            if sim.config.parallel.reshard_after_forward == "on":
                self.free()
            return
        self.free()
        with sim.ledger.for_("gradient reduction"):
            message = torch.empty(self.numel, dtype=sim.stored, device=META)
        for p in self.parameters:
            p.grad = None
            if hasattr(p, "kept"):
                del p.kept
        sim.last_message = message  # kept until the next one
        with sim.ledger.for_("gradients"):
            sim.shards.append(torch.empty(-(-self.numel // sim.fsdp), dtype=sim.stored, device=META))


class _Simulation:
    """One step of one pipeline rank on the meta device."""

    def __init__(
        self, config: RunConfig, architecture: GPTConfig, layers: list[range], stage: int, in_flight: list[int]
    ) -> None:
        self.config, self.architecture, self.in_flight = config, architecture, in_flight
        self.ledger, self.fsdp = Ledger(), config.parallel.dp_shard_size * config.parallel.cp_size
        self.compute, self.stored = (
            DTYPES[config.training.dtype],
            torch.float64 if config.training.dtype == "fp64" else torch.float32,
        )
        self.sharded = config.parallel.dp_replicate_size * self.fsdp > 1 or self.compute != self.stored
        self.tp = PlannedTP(config.parallel.tp_size, bool(config.parallel.sequence_parallel))
        self.shards: list[Tensor] = []
        self.last_gather: Tensor | None = None
        self.last_message: Tensor | None = None
        self.is_last = True
        self.microbatches = config.num_microbatches
        self.sent: list[Tensor] = []
        self.arrived: dict[GPT, Tensor] = {}
        self.grads: dict[GPT, Tensor] = {}
        self.is_split, self.lag = (
            config.parallel.pp_size > 1 and config.parallel.pp_schedule == "zero_bubble",
            stage,
        )  # how many weights' passes lie behind
        self.later: deque[tuple[GPT, Tensor, list[Any] | None]] = deque()
        attention = PlannedAttention(self.ledger, config.parallel.cp_size, _gathered_shards(config))
        self.tokens = config.training.micro_batch_size * config.data.seq_length // config.parallel.cp_size
        self.chunks: list[GPT] = []
        self.units: list[list[_Unit]] = []
        for part in layers:
            with META:
                chunk = GPT(
                    architecture,
                    attention=attention,
                    cp_group=_Size(config.parallel.cp_size),  # type: ignore[arg-type]
                    options=GPTOptions(
                        dtype=self.compute,
                        recompute=config.training.recompute,
                        loss_chunk_size=config.training.loss_chunk_size,
                        z_loss=config.training.z_loss,
                    ),
                    tp=self.tp,  # type: ignore[arg-type]
                    layers=part,
                )
            if config.model.transformer_impl == "te":
                for layer in chunk.layers.values():
                    layer.mlp.__class__ = PlannedTEMLP
                    layer.mlp.ledger = self.ledger  # type: ignore[union-attr]
            self.chunks.append(chunk)
            inside = [_Unit(list(layer.parameters()), self) for layer in chunk.layers.values()]
            owned = {id(p) for unit in inside for p in unit.parameters}
            rest = _Unit([p for p in chunk.parameters() if id(p) not in owned], self)
            self.units.append([*inside, rest])
            for layer, unit in zip(chunk.layers.values(), inside, strict=True):
                self._hook(layer, unit)
        self.parameters = sum(p.numel() for chunk in self.chunks for p in chunk.parameters())

    def _hook(self, layer: nn.Module, unit: _Unit) -> None:
        layer.register_forward_pre_hook(lambda module, inputs: unit.gather())
        layer.register_full_backward_pre_hook(lambda module, grads: unit.gather())
        if self.config.parallel.reshard_after_forward == "on":
            layer.register_forward_hook(lambda module, inputs, out: unit.free())

    def run(self) -> None:
        with (
            fused_norms()
            if self.config.parallel.device == "cuda" or self.config.model.transformer_impl == "te"
            else nullcontext()
        ):
            self._run()

    def _run(self) -> None:
        rows = [self._row() for _ in range(2)]
        for chunk in self.chunks:
            self.ledger.ignore(chunk.parameters())
        hidden = self.tokens // (self.tp.size if self.tp.sequence_parallel else 1), self.architecture.hidden_size
        microbatches, earlier = self.microbatches, None
        with self.ledger:
            self.ledger.label = "pipeline buffers"
            # Kept from step to step: PyTorch's stages receive each microbatch of a step in a buffer of its own.
            for chunk in self.chunks:
                if not chunk.is_first:
                    self.arrived[chunk] = torch.empty(microbatches, *hidden, dtype=self.compute, device=META)
                if not chunk.is_last:
                    self.grads[chunk] = torch.empty(microbatches, *hidden, dtype=self.compute, device=META)
            if (
                len(self.chunks) > 1
            ):  # and what these schedules sent they keep until the step's end, of microbatches long finished too
                finished = [self._turn(k) for k in range(microbatches * len(self.chunks) - sum(self.in_flight))]
                outputs = sum(not self.chunks[-1 - n].is_last for n in finished)
                grads = sum(not self.chunks[-1 - n].is_first for n in finished)
                earlier = torch.empty(outputs + grads, *hidden, dtype=self.compute, device=META)
            self.ledger.label = "activations"
            # The first microbatches whose gradients are not reduced yet, then the last: more of them add nothing.
            for last in (False, True) if microbatches > max(self.in_flight) else (True,):
                self.is_last = last
                self.sent.clear()
                started = [
                    self._forward(chunk, rows[0])
                    for n, chunk in zip(self.in_flight, self.chunks, strict=True)
                    for _ in range(n)
                ]
                while started:
                    self._backward(*started.pop(0))
                while self.later:
                    self._weights()
            del earlier
        self.ledger.label = ""

    def _turn(self, number: int) -> int:
        """The chunk of the number-th forward pass; counted from the last chunk, of the number-th backward pass."""
        return number // in_a_row(self.config, self.microbatches) % len(self.chunks)

    def _row(self) -> tuple[Tensor, Tensor, PackedSeq]:
        length = self.config.training.micro_batch_size * self.config.data.seq_length
        packed_seq, _ = build_packed_seq(
            np.array([length]), np.array([length]), cp_size=self.config.parallel.cp_size, layout="zigzag"
        )
        tokens = torch.empty(self.tokens, dtype=torch.int64, device=META)
        return tokens, tokens, packed_seq.move(lambda x: x.to(META))

    def _forward(self, chunk: GPT, row: tuple[Tensor, Tensor, PackedSeq]) -> tuple[GPT, Tensor, Tensor | None]:
        units = self.units[self.chunks.index(chunk)]
        units[-1].gather()
        x = row[0] if chunk.is_first else self.arrived[chunk][0].detach().requires_grad_()
        out = self._with_loss(chunk)(x, row[2], labels=row[1]) if chunk.is_last else chunk(x, row[2])
        if len(self.chunks) > 1 and not chunk.is_last:
            self.sent.append(out.detach())
        return chunk, out[0] if chunk.is_last else out, None if chunk.is_first else x

    def _with_loss(self, chunk: GPT) -> Callable[..., Any]:
        real = GPT._loss

        def counted(x: Tensor, labels: Tensor) -> Any:
            with self.ledger.for_("logits and loss"):
                return real(chunk, x, labels)

        chunk._loss = counted  # type: ignore[method-assign]
        return chunk

    def _backward(self, chunk: GPT, out: Tensor, x: Tensor | None) -> None:
        if not self.is_split:
            self._run_backward(chunk, out)
            if len(self.chunks) > 1 and x is not None and x.grad is not None:
                self.sent.append(x.grad)
            return
        # Zero-bubble: the inputs' gradients first, and with what was saved the gradients of what each weight made, until its turn comes.
        # The first stage has nobody to send gradients to and does all of it in that turn.
        kept = None
        if not chunk.is_first:
            kept = self._keep_gradients(out)
            self._run_backward(chunk, out, retain_graph=True)
            assert x is not None and x.grad is not None
            self.sent.append(x.grad)
        self.later.append((chunk, out, kept))
        if len(self.later) > self.lag:
            self._weights()

    def _weights(self) -> None:
        chunk, out, _ = self.later.popleft()
        if chunk.is_first:
            self._run_backward(chunk, out)

    def _run_backward(self, chunk: GPT, out: Tensor, retain_graph: bool = False) -> None:
        units = self.units[self.chunks.index(chunk)]
        for unit in units:
            unit.waiting = len(unit.parameters)
        grad = torch.empty(out.shape, dtype=out.dtype, device=META) if chunk.is_last else self.grads[chunk][0]
        with self.ledger.for_("backward pass"):
            out.backward(grad, retain_graph=retain_graph)
        if self.sharded and units[-1].waiting > 0:  # a weight without a gradient of its own, such as a tied copy
            units[-1].finish()
        self.last_message = None

    def _keep_gradients(self, out: Tensor) -> list[Any]:
        """A list that a backward pass fills with the gradients of what each weight made: what the weight's own gradient needs."""
        kept: list[Any] = []
        only_weights: dict[Any, bool] = {}

        def visit(node: Any) -> bool:
            if node not in only_weights:
                below = [visit(n) for n, _ in node.next_functions if n is not None]
                variable = getattr(node, "variable", None)
                only_weights[node] = (
                    bool(below) and all(below) if variable is None else isinstance(variable, nn.Parameter)
                )
                if any(below) and not only_weights[node]:
                    node.register_prehook(kept.append)
            return only_weights[node]

        visit(out.grad_fn)
        return kept


def in_a_row(config: RunConfig, microbatches: int) -> int:
    """Microbatches of one chunk that a schedule with several takes before the next chunk's."""
    return microbatches // max(1, microbatches // config.parallel.pp_size)


def _in_flight(config: RunConfig, stage: int, microbatches: int) -> list[int]:
    """Forward passes whose activations a pipeline rank holds at once, of each of its chunks: as PyTorch's schedules order them."""
    pp, chunks = config.parallel.pp_size, config.parallel.virtual_stages
    if pp == 1:
        return [1]
    if config.parallel.pp_schedule in ("gpipe", "1f1b"):
        return [microbatches if config.parallel.pp_schedule == "gpipe" else min(microbatches, pp - stage)]
    row = in_a_row(config, microbatches)
    # Zero-bubble warms up less, and computes the weights' gradients of as many microbatches later.
    more = 2 * (pp - 1 - stage) if config.parallel.pp_schedule == "interleaved" else pp - 1
    held = min((chunks - 1) * row + more + 1, microbatches * chunks)
    return [sum(number // row % chunks == chunk for number in range(held)) for chunk in range(chunks)]


def _simulated(
    config: RunConfig, architecture: GPTConfig, stage: int, layers: list[int], in_flight: list[int]
) -> tuple[dict[str, int], int]:
    """Parts of the peak and the parameters of a rank whose chunks have so many layers."""
    v = len(layers)
    total = config.parallel.pp_size * v
    ranges, at = [], 0
    for chunk, count in enumerate(layers):
        number = chunk * config.parallel.pp_size + stage
        start = 0 if number == 0 else 1 + at
        ranges.append((start, count, number == total - 1))
        at += count
    depth = at + 2
    parts = []
    for start, count, is_last in ranges:
        first = depth - count if is_last else start
        parts.append(range(first, first + count))
    if total == 1:
        depth, parts = layers[0], [range(layers[0])]
    sim = _Simulation(config, replace(architecture, num_layers=depth), parts, stage, in_flight)
    sim.run()
    return sim.ledger.parts, sim.parameters


def stage_parameters(config: RunConfig, architecture: GPTConfig, stage: int) -> int:
    """Parameters of a rank's chunks and tp part, before FSDP cuts them."""
    stages = split_layers(
        architecture.num_layers,
        config.parallel.pp_size * config.parallel.virtual_stages,
        first=config.parallel.first_stage_layers,
        last=config.parallel.last_stage_layers,
    )
    own = stages[stage :: config.parallel.pp_size]
    h, d, tp = (
        architecture.hidden_size,
        architecture.kv_channels if architecture.qk_norm else 0,
        config.parallel.tp_size,
    )
    layer = (
        h * (architecture.qkv_size + architecture.query_size + 3 * architecture.ffn_hidden_size) // tp + 2 * h + 2 * d
    )
    table = architecture.padded_vocab_size * h // tp
    is_first, is_last = any(part.start == 0 for part in own), any(part.stop == architecture.num_layers for part in own)
    tables = (
        is_first + is_last
        if not architecture.tie_embeddings
        else (1 if config.parallel.pp_size == 1 else is_first + is_last)
    )
    return sum(len(part) for part in own) * layer + tables * table + is_last * h


def _continued(parts: dict[str, int], before: dict[str, int], more: int) -> dict[str, int]:
    """What grew from `before` to `parts` grows on by as much, `more` times."""
    return {k: v + more * (v - before.get(k, 0)) for k, v in parts.items()}


def rank_memory(config: RunConfig, architecture: GPTConfig, stage: int = 0) -> Memory:
    """The peak of a rank of a pipeline stage, and what it is made of.

    Args:
        config: resolved flags.
        stage: pp rank.
    """
    chunks = config.parallel.virtual_stages
    stages = split_layers(
        architecture.num_layers,
        config.parallel.pp_size * chunks,
        first=config.parallel.first_stage_layers,
        last=config.parallel.last_stage_layers,
    )
    counts = [len(part) for part in stages[stage :: config.parallel.pp_size]]
    microbatches = config.num_microbatches
    in_flight = _in_flight(config, stage, microbatches)
    few = [min(count, FEW_LAYERS) for count in counts]
    less = [count - (count == FEW_LAYERS and few != counts) for count in few]
    more = max(count - short for count, short in zip(counts, few, strict=True))  # layers, in each chunk that has more

    def deep(flying: list[int]) -> tuple[dict[str, int], int]:
        parts, parameters = _simulated(config, architecture, stage, few, flying)
        if not more:
            return parts, parameters
        fewer, fewer_parameters = _simulated(config, architecture, stage, less, flying)
        return _continued(parts, fewer, more), parameters + more * (parameters - fewer_parameters)

    if len(in_flight) > 1 or in_flight[0] <= FEW_IN_FLIGHT:
        parts, parameters = deep(in_flight)
    else:
        parts, parameters = deep([FEW_IN_FLIGHT])
        parts = _continued(parts, deep([FEW_IN_FLIGHT - 1])[0], in_flight[0] - FEW_IN_FLIGHT)
    assert parameters == stage_parameters(config, architecture, stage)
    stored = 8 if config.training.dtype == "fp64" else 4
    fsdp = config.parallel.dp_shard_size * config.parallel.cp_size
    own = -(-parameters // fsdp)
    parts = {"weights": own * stored, "optimiser": 2 * own * stored, **parts}
    at_update = parts["weights"] + parts["optimiser"] + own * stored + parts.get("pipeline buffers", 0)
    if at_update > sum(parts.values()):
        kept = {"gradients": own * stored, **{k: v for k, v in parts.items() if k == "pipeline buffers"}}
        parts = {"weights": parts["weights"], "optimiser": parts["optimiser"], **kept}
    return Memory(sum(parts.values()), parts, stage)
