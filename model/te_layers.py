"""The layers of `torch_layers.py` on Transformer Engine modules: same names, parameters, shapes and calls. CUDA only.

Imported only for `--transformer-impl te`. Parameters are canonical: sharding, initial weights, gradient norm and
checkpoints need no knowledge of Transformer Engine. The modules take the grid's own tp group.
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

from model import torch_layers
from model.fused_weights import Fuse, FusedWeights
from model.precision import Precision
from model.torch_layers import VocabParallelEmbedding
from parallel.tensor import TensorParallel
from utils.errors import UserError

__all__ = ["VocabParallelEmbedding"]

LARGEST_OFFSET = 2**31 - 1  # the rotary kernel counts elements in 32 bits


def rotary_tables(positions: Tensor, frequencies: Tensor, *, dtype: torch.dtype) -> tuple[Tensor]:
    """Angles for the fused kernel, made once a microbatch: position * frequency modulo 2 pi, in float64.

    Transformer Engine's own table holds float32 angles by position: at position 1,000,000 the angle is off by 0.06, and
    the kernel would need the cp layout. So the kernel gets the row as one sequence with one angle a token.

    Arguments as `model.rope.rotary_tables`.

    Returns:
        One tensor [t, 1, 1, head_dim] fp32; both halves of a head have the same angles.
    """
    angle = (positions.to(torch.float64)[:, None] * frequencies).remainder(2 * math.pi).to(torch.float32)
    return (torch.cat((angle, angle), -1)[:, None, None],)


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """x [t, g, n, d] rotated by its tokens' positions; a new contiguous tensor.

    Rows beyond the kernel's 32-bit element count are rotated in parts.
    """
    most = LARGEST_OFFSET // max(x.stride(0), x[0].numel())
    if len(x) > most:
        parts = zip(x.split(most), angles.split(most), strict=True)
        return torch.cat([apply_rotary(part, part_angles) for part, part_angles in parts])
    return te_rope.apply_rotary_pos_emb(x, angles, tensor_format="sbhd", fused=True)


def _options(dtype: torch.dtype, tp: TensorParallel, device: str) -> dict:
    """Options of every Transformer Engine module with matrices."""
    own = tp if tp.size > 1 else TensorParallel()
    tp_options = {"tp_group": own.group, "tp_size": own.size, "sequence_parallel": own.sequence_parallel}
    return {"bias": False, "params_dtype": dtype, "device": device, **tp_options}


def _device() -> str:
    """The default device as a string: Transformer Engine compares with "meta", which a `torch.device` never equals."""
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
        super().__init__(in_features, out_features, parallel_mode=mode, **_options(dtype, tp, _device()))


class LayerNormLinear(te.LayerNormLinear):
    """RMSNorm, then a column-parallel linear map: the QKV projection."""

    def __init__(
        self, in_features: int, out_features: int, *, eps: float, dtype: torch.dtype, tp: TensorParallel
    ) -> None:
        tp.divide(out_features, "outputs")
        mode, norm = "column" if tp.size > 1 else None, "RMSNorm"
        super().__init__(
            in_features, out_features, eps=eps, normalization=norm, parallel_mode=mode, **_options(dtype, tp, _device())
        )


class LayerNormMLP(torch_layers.LayerNormMLP, FusedWeights):
    """RMSNorm, then SwiGLU by Transformer Engine's module, which takes one tensor, the gate's rows first.

    The parameters stay two, because a shard of the fused tensor would mix both, which no checkpoint of another layout
    could read. The tensor is fused once a step: the module's backward pass and recomputation keep their inputs, so the
    copy in the compute dtype lives for the step.
    """

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, *, eps: float, dtype: torch.dtype, tp: TensorParallel
    ) -> None:
        super().__init__(hidden_size, ffn_hidden_size, eps=eps, dtype=dtype, tp=tp)
        module = te.LayerNormMLP(
            hidden_size,
            ffn_hidden_size,
            eps=eps,
            normalization="RMSNorm",
            activation="swiglu",
            set_parallel_mode=tp.size > 1,
            **_options(dtype, tp, "meta"),
        )
        # A tuple hides the module from nn.Module: its own parameters stay on the meta device and ours replace them.
        self.hidden = (module,)

    def forward(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        x = x + delta
        fc1_weight = Fuse.apply(self.gate_weight, self.up_weight, self.fused)  # [2 * ffn / tp, h]
        if self.is_cached and self.fused is None:
            self.fused = fc1_weight.detach()
        weights = {"layer_norm_weight": self.layer_norm_weight, "fc1_weight": fc1_weight, "fc2_weight": self.fc2_weight}
        return x, functional_call(self.hidden[0], weights, (x,))


# Value of --fp8 -> its recipe, and the function that checks whether this GPU supports the recipe.
RECIPES = {
    "delayed": (te_recipe.DelayedScaling, te.is_fp8_available),
    "current": (te_recipe.Float8CurrentScaling, te.is_fp8_available),
    "block": (te_recipe.Float8BlockScaling, te.is_fp8_block_scaling_available),
}


class FP8(Precision):
    """The matrices of attention and MLP in FP8 by a Transformer Engine recipe; all else is unchanged.

    Delayed scaling reduces amax when an `autocast` exits, which must contain each module once. So one autocast
    surrounds all layers; a recomputed layer would run outside, and `--recompute` is refused. The other recipes keep no
    state, and each layer has its own autocast.

    Args:
        name: of `RECIPES`.
        group, bf16_layers: as in `model.layers.build_precision`.

    Raises:
        UserError: the GPU or its software lacks the recipe; gives Transformer Engine's reason.
    """

    def __init__(self, name: str, *, group: dist.ProcessGroup, bf16_layers: Collection[int]) -> None:
        recipe, available = RECIPES[name]
        is_available, reason = available(return_reason=True)
        if not is_available:
            raise UserError(f"--fp8 {name}: {reason}; use --fp8 none")
        self.recipe, self.group, self.bf16_layers = recipe(), group, frozenset(bf16_layers)
        self.delayed = name == "delayed"

    def model_context(self) -> AbstractContextManager:
        return self._autocast() if self.delayed else nullcontext()

    def layer_context(self, number: int) -> AbstractContextManager:
        if number in self.bf16_layers:
            return te.autocast(enabled=False)
        return nullcontext() if self.delayed else self._autocast()

    def _autocast(self) -> AbstractContextManager:
        return te.autocast(enabled=True, recipe=self.recipe, amax_reduction_group=self.group)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Delayed scaling's state per module: scales [n] and amax histories [history, n], forward and backward.

        Collective over the group. The backward pass quantises weights again after the forward amax was reduced, so the
        histories' next row differs between ranks. This takes its maximum over the group, as the next reduction would.
        """
        found: dict[str, Tensor] = {}
        for name, module, gemms in self._modules(model) if self.delayed else ():
            if "scaling_fwd" not in module.fp8_meta:  # before the first step
                module.fp8_meta["num_gemms"] = gemms
                module.init_fp8_meta_tensors(self.recipe)
            for key in ("scaling_fwd", "scaling_bwd"):
                meta = module.fp8_meta[key]
                found |= {f"{name}.{key}.scale": meta.scale, f"{name}.{key}.amax_history": meta.amax_history}
        if found and self.group.size() > 1:
            seen = [history[0] for name, history in found.items() if name.endswith("amax_history")]
            largest = torch.cat(seen)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
            torch._foreach_copy_(seen, list(largest.split([len(row) for row in seen])))
        return found

    def _modules(self, model: nn.Module) -> Iterator[tuple[str, te.Linear | te.LayerNormLinear | te.LayerNormMLP, int]]:
        """(name, module, number of matrices) of all modules that compute in FP8."""
        for name, module in model.named_modules():
            if name.startswith("layers.") and int(name.split(".")[1]) in self.bf16_layers:
                continue
            if isinstance(module, LayerNormMLP):
                yield name, module.hidden[0], 2
            elif isinstance(module, (te.Linear, te.LayerNormLinear)):
                yield name, module, 1
