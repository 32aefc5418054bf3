"""The layers of `torch_layers.py` on Transformer Engine modules: the same names, parameters, shapes and call. CUDA only.

Imported where `--transformer-impl te` asks for it. Parameters are the canonical ones, so that sharding, initial weights, the gradient
norm and checkpoints know nothing of Transformer Engine. What it is told of tensor parallelism are the grid's own groups.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from torch import Tensor, nn
from torch.func import functional_call
from transformer_engine.common import recipe as te_recipe
from transformer_engine.pytorch.attention import rope as te_rope

from model.fused_weights import FusedWeights
from model.names import TE_FUSED
from model.precision import Precision
from model.torch_layers import ColumnParallelLinear, VocabParallelEmbedding
from parallel.tensor import TensorParallel
from utils.errors import UserError

__all__ = [
    "ColumnParallelLinear",
    "LayerNormLinear",
    "LayerNormMLP",
    "RMSNorm",
    "RowParallelLinear",
    "VocabParallelEmbedding",
]


LARGEST_OFFSET = 2**31 - 1  # elements that the rotary kernel can count


def rotary_tables(positions: Tensor, frequencies: Tensor, *, dtype: torch.dtype) -> tuple[Tensor]:
    """Angles for the fused kernel, once a microbatch: position * frequency, taken in float64 and turned back below 2 pi.

    Its own table is of float32 angles by position, of which that of position 1,000,000 is off by 0.06; and it would need to know which
    tokens a rank holds. So the whole row is told as one sequence, with an angle for each token.

    Args:
        positions: [t] int64, restarting at each document.
        frequencies: [head_dim / 2] float64.

    Returns:
        One tensor [t, 1, 1, head_dim] fp32; both halves of a head turn by the same angles.
    """
    angle = (positions.to(torch.float64)[:, None] * frequencies).remainder(2 * math.pi).to(torch.float32)
    return (torch.cat((angle, angle), -1)[:, None, None],)


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """x [t, g, n, d] rotated by its token's position; a new contiguous tensor.

    The kernel counts elements from the first token's in 32 bits, so a longer row is given to it in parts.
    """
    most = LARGEST_OFFSET // max(x.stride(0), x[0].numel())
    if len(x) > most:
        return torch.cat(
            [
                apply_rotary(part, part_angles)
                for part, part_angles in zip(x.split(most), angles.split(most), strict=True)
            ]
        )
    return te_rope.apply_rotary_pos_emb(x, angles, tensor_format="sbhd", fused=True)


def _parallel(tp: TensorParallel) -> dict:
    """What every module of Transformer Engine is told of the ranks that share it."""
    if tp.size == 1:
        return {"tp_group": None, "tp_size": 1, "sequence_parallel": False}
    return {"tp_group": tp.group, "tp_size": tp.size, "sequence_parallel": tp.sequence_parallel}


def _device() -> str:
    """Where parameters are made, as Transformer Engine compares it: a `torch.device` is never its "meta"."""
    return str(torch.get_default_device())


class RMSNorm(te.RMSNorm):
    """x / rms(x) * weight over the last axis (arXiv:1910.07467)."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__(size, eps=eps, params_dtype=dtype, device=_device())


class RowParallelLinear(te.Linear):
    """x @ weight.T without bias; this rank holds 1/tp of the inputs: x [t, in / tp], weight [out, in / tp]."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, tp: TensorParallel) -> None:
        tp.divide(in_features, "inputs")
        mode = "row" if tp.size > 1 else None
        super().__init__(
            in_features,
            out_features,
            bias=False,
            params_dtype=dtype,
            parallel_mode=mode,
            device=_device(),
            **_parallel(tp),
        )


class LayerNormLinear(te.LayerNormLinear):
    """RMSNorm, then a column-parallel linear map: the block in front of attention."""

    def __init__(
        self, in_features: int, out_features: int, *, eps: float, dtype: torch.dtype, tp: TensorParallel
    ) -> None:
        tp.divide(out_features, "outputs")
        super().__init__(
            in_features,
            out_features,
            eps=eps,
            bias=False,
            normalization="RMSNorm",
            params_dtype=dtype,
            parallel_mode="column" if tp.size > 1 else None,
            device=_device(),
            **_parallel(tp),
        )


class _Joined(torch.autograd.Function):
    """Rows of the first weight above those of the second, as a tensor that is there already or as a new one."""

    @staticmethod
    def forward(ctx, first: Tensor, second: Tensor, joined: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.rows = len(first), len(second)
        return torch.cat((first, second)) if joined is None else joined.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return *grad.split(ctx.rows), None


class LayerNormMLP(FusedWeights):
    """RMSNorm, then SwiGLU: fc2(silu(gate(x)) * up(x)) (arXiv:2002.05202). Gate and up are two tensors.

    Transformer Engine's module wants them as one, the gate's rows above the up's. They are joined once a step: a shard of the joined
    tensor would be a piece of both, which no checkpoint of another layout could read. Its backward pass holds on to what it was given, also
    where it is computed again; so the copy, of the weights' bytes in the compute dtype, stays for the step.
    """

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, *, eps: float, dtype: torch.dtype, tp: TensorParallel
    ) -> None:
        super().__init__()
        ffn = tp.divide(ffn_hidden_size, "ffn channels")
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.gate_weight = nn.Parameter(torch.empty(ffn, hidden_size, dtype=dtype))
        self.up_weight = nn.Parameter(torch.empty(ffn, hidden_size, dtype=dtype))
        self.fc2_weight = nn.Parameter(torch.empty(hidden_size, ffn, dtype=dtype))
        module = te.LayerNormMLP(
            hidden_size,
            ffn_hidden_size,
            eps=eps,
            bias=False,
            normalization="RMSNorm",
            activation="swiglu",
            params_dtype=dtype,
            set_parallel_mode=tp.size > 1,
            device="meta",
            **_parallel(tp),
        )
        self.hidden = (
            module,
        )  # from nn.Module, in a tuple: its own parameters stay on the meta device, ours stand in for them

    def forward(self, x: Tensor) -> Tensor:
        weights: dict[str, Tensor] = dict(self.named_parameters())
        for fused, parts in TE_FUSED.items():  # fc1_weight [2 * ffn / tp, h]
            joined = _Joined.apply(*(weights.pop(part.removeprefix("mlp.")) for part in parts), self.fused)
            weights[fused.removeprefix("mlp.")] = joined
            if self.is_cached and self.fused is None:
                self.fused = joined.detach()
        return functional_call(self.hidden[0], weights, (x,))


# Value of --fp8 -> its recipe, and the function that says whether it can run here.
RECIPES = {
    "delayed": (te_recipe.DelayedScaling, te.is_fp8_available),
    "current": (te_recipe.Float8CurrentScaling, te.is_fp8_available),
    "block": (te_recipe.Float8BlockScaling, te.is_fp8_block_scaling_available),
}


class FP8(Precision):
    """The matrices of attention and MLP in 8 bits, by Transformer Engine's recipes; all else stays as it is.

    With delayed scaling the largest values are reduced at the end of an `autocast` that holds each module once. So there is one around all
    layers, and a layer that is computed again would be outside it: refused with `--recompute`. The others keep nothing, and each
    layer has its own.

    Args:
        name: of `RECIPES`.
        group, bf16_layers: as `model.layers.build_precision`.

    Raises:
        ValueError: one line, with Transformer Engine's reason.
    """

    def __init__(self, name: str, *, group: dist.ProcessGroup, bf16_layers: Collection[int]) -> None:
        recipe, available = RECIPES[name]
        can, reason = available(return_reason=True)
        if not can:
            raise UserError(f"--fp8 {name}: {reason}; use --fp8 none")
        self.recipe, self.group, self.bf16_layers = recipe(), group, frozenset(bf16_layers)
        self.delayed = name == "delayed"

    def model_context(self) -> AbstractContextManager:
        return self._on() if self.delayed else nullcontext()

    def layer_context(self, number: int) -> AbstractContextManager:
        if number in self.bf16_layers:
            return te.autocast(enabled=False)
        return nullcontext() if self.delayed else self._on()

    def _on(self) -> AbstractContextManager:
        return te.autocast(enabled=True, recipe=self.recipe, amax_reduction_group=self.group)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Of delayed scaling: for each module its scales [n] and the largest values of steps before [history, n], forward and backward.

        Collective over the group. A weight is put in 8 bits again in the backward pass, after the forward pass's values were reduced, so
        the row of the step to come holds what each rank alone has seen; the next reduction would take the largest, and so does this.
        """
        found: dict[str, Tensor] = {}
        for name, module, gemms in self._modules(model) if self.delayed else ():
            if "scaling_fwd" not in module.fp8_meta:  # before the first step
                module.fp8_meta["num_gemms"] = gemms
                module.init_fp8_meta_tensors(self.recipe)
            for key in ("scaling_fwd", "scaling_bwd"):
                of_key = module.fp8_meta[key]
                found |= {f"{name}.{key}.scale": of_key.scale, f"{name}.{key}.amax_history": of_key.amax_history}
        if found and self.group.size() > 1:
            seen = [history[0] for name, history in found.items() if name.endswith("amax_history")]
            largest = torch.cat(seen)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
            torch._foreach_copy_(seen, list(largest.split([len(row) for row in seen])))
        return found

    def _modules(self, model: nn.Module) -> Iterator[tuple[str, te.Linear | te.LayerNormLinear | te.LayerNormMLP, int]]:
        """(name, module, how many matrices it has) of all that compute in 8 bits."""
        for name, module in model.named_modules():
            if name.startswith("layers.") and int(name.split(".")[1]) in self.bf16_layers:
                continue
            if isinstance(module, LayerNormMLP):
                yield name, module.hidden[0], 2
            elif isinstance(module, (te.Linear, te.LayerNormLinear)):
                yield name, module, 1
