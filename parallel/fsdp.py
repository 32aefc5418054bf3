"""Sharded data parallelism on the grid: FSDP2 over `fsdp` = dp_shard x cp, replicated over dp_replicate.

Gradients are sums over both axes: the loss is divided by the step's global token count before the backward pass.
So FSDP2's averaging is off (divide factor 1, plain sums on the wire).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from parallel.grid import Grid, device_mesh

NORM_PART = 1 << 16  # elements whose norm the CPU sums in one go


def shard_model(
    model: nn.Module,
    layers: Iterable[nn.Module],
    grid: Grid,
    *,
    device_type: str,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool,
    lookup: nn.Module | None = None,
    head: Sequence[nn.Module] = (),
) -> None:
    """Shard `model` in place: each of `layers`, `lookup` and `head` is an FSDP unit, the root that of all the rest.

    Args:
        lookup: a table of which the backward pass needs no weights; gathered for forward passes only.
        head: modules whose forwards end the model's forward; gathered once for forward and backward, whose gradients
            are reduced while the layers' backward passes run.

    Parameters keep their dtype; forward and backward see `compute_dtype`; gradients are reduced and accumulated in the
    parameters' dtype. With one data-parallel rank and no cast this does nothing, because FSDP2 would still copy every
    weight and gradient once a step.
    """
    parameter_dtype = next(model.parameters()).dtype
    if grid.size("loss") == 1 and compute_dtype == parameter_dtype:
        return
    axes = ("dp_replicate", "fsdp") if grid.size("dp_replicate") > 1 else ("fsdp",)
    mesh = device_mesh(grid, axes, device_type)
    mixed = compute_dtype != parameter_dtype
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if mixed else None,
        reduce_dtype=parameter_dtype if mixed else None,
        cast_forward_inputs=False,  # the rotary tables stay in fp32
    )
    options: dict[str, Any] = dict(mesh=mesh, mp_policy=policy)
    for unit in (*layers, *([] if lookup is None else [lookup])):
        fully_shard(unit, **options, reshard_after_forward=reshard_after_forward)
    if isinstance(lookup, FSDPModule):
        lookup.set_unshard_in_backward(False)
        # Else its backward pass, the last one, would gather the head of the microbatch before.
        lookup.set_modules_to_backward_prefetch([lookup])
    if head:
        fully_shard(list(head), **options, reshard_after_forward=False)
    fully_shard(model, **options, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@dataclass(frozen=True)
class Accumulation:
    """What FSDP does between the microbatches of a step, for memory at the price of communication.

    Attributes:
        reshards: frees gathered weights.
        reduces: sums each microbatch's gradients over `fsdp`, so that only this rank's shards accumulate; False: the
            gradients of whole weights accumulate, and are summed over the ranks once.
    """

    reshards: bool = False
    reduces: bool = False


def set_last_microbatch(model: nn.Module, is_last: bool, accumulation: Accumulation) -> None:
    """Prepare the next backward pass. Replicas are summed over only in that of the step's last microbatch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last or accumulation.reduces)
        model.set_requires_all_reduce(is_last)
        model.set_is_last_backward(is_last)
        model.set_reshard_after_backward(is_last or accumulation.reshards)


def reshard_model(model: nn.Module) -> None:
    """Free gathered weights after a forward pass without backward.

    Before this call `model.parameters()` yields the gathered weights instead of the optimizer's shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name, as the optimizer holds them."""
    parameters = dict(model.named_parameters())
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        assert all(isinstance(p, DTensor) for p in parameters.values()), "weights are gathered: reshard_model first"
    return parameters


def local_tensor(x: Tensor) -> Tensor:
    """This rank's shard of a parameter or gradient."""
    return x.to_local() if isinstance(x, DTensor) else x


def local_grads(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    """This rank's shard of every gradient that exists."""
    for parameter in parameters:
        if parameter.grad is not None:
            yield local_tensor(parameter.grad)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Mapping[str, nn.Parameter], grid: Grid, *, max_norm: float, owned: Collection[str]
) -> Tensor:
    """Scale gradients to `max_norm` by the L2 norm of the whole model's gradient, in which every weight counts once.

    Squares are summed over `loss` (shards and their replicas) and `model` (pp x tp), and divided by the replicas: all
    ranks get the same bits, also where nodes round their own sums differently.

    Args:
        parameters: by canonical name.
        max_norm: 0: no clipping, the norm is still returned. A non-finite norm leaves gradients unchanged.
        owned: names of the weights that this rank counts; other ranks of `model` may hold copies.

    Returns:
        The norm before clipping, a float64 scalar on the gradients' device. No host synchronisation.
    """
    device = next(iter(parameters.values())).device
    grads = [g for g in local_grads(parameters.values()) if g.numel()]
    owned_grads = [g for g in local_grads(p for name, p in parameters.items() if name in owned) if g.numel()]
    if device.type == "cpu":  # PyTorch's CPU norm of 10^8 equal fp32 elements is 4 % too small
        owned_grads = [part for grad in owned_grads for part in grad.reshape(-1).split(NORM_PART)]
    norms = torch._foreach_norm(owned_grads) if owned_grads else []
    squares = torch.zeros((), dtype=torch.float64, device=device)
    if norms:
        squares = torch.stack(list(norms)).to(torch.float64).square().sum()
    for axis in ("loss", "model"):
        if grid.size(axis) > 1:
            dist.all_reduce(squares, group=grid.group(axis))
    norm = (squares / grid.size("dp_replicate")).sqrt()
    if max_norm > 0 and grads:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).where(norm.isfinite(), 1.0)
        torch._foreach_mul_(grads, scale.to(grads[0].dtype))
    return norm
