"""What a rank of `make test-peers` runs: a peer's step, and what it shows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.peers import mechanisms, stand_ins
from tests.peers.rows import Row, build_model


@dataclass
class Shown:
    """Of one rank. Places are positions in the row."""

    loss: float
    grads: dict[str, Tensor]  # averaged over the cp ranks
    logits: dict[int, Tensor]  # by place
    trained: dict[int, int]  # place -> the target that its logits are trained to
    divisor: float | None  # of the row's summed cross-entropy, in the averaged gradients; None: no target


@functools.cache
def install_stand_ins() -> None:
    stand_ins.install()
    stand_ins.pretend_gpu()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["blockdiag"] = mechanisms.blockdiag_attention


def axolotl_function(_: int, **keys: Any) -> str:
    """The ring function that axolotl's validator takes for a run of two cp ranks with these keys."""
    install_stand_ins()
    return mechanisms.validate_axolotl(2, **keys).ring_attn_func.value


def build_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))


def find_places(row: Row, tokens: Tensor, layout: str) -> Tensor:
    """The places of this rank's tokens [t]: one part of the row, or a head-tail pair of parts. Padding follows the row.

    Raises:
        AssertionError: the rank holds other tokens.
    """
    rank, ranks, size = dist.get_rank(), dist.get_world_size(), len(tokens)
    order = torch.arange(size * ranks)
    if layout == "zigzag":
        parts = order.chunk(2 * ranks)
        places = torch.cat((parts[rank], parts[2 * ranks - 1 - rank]))
    else:
        places = order.chunk(ranks)[rank] if layout == "contiguous" else order[:size]
    real = places < len(row.tokens)
    assert torch.equal(row.tokens[places[real]], tokens[real]), f"the rank's tokens are not {layout}"
    return places


def average_gradients(model: Any) -> dict[str, Tensor]:
    """What FSDP2 or DDP leave on each rank."""
    found = {}
    for name, weight in model.named_parameters():
        total = weight.grad.double() if weight.grad is not None else torch.zeros_like(weight, dtype=torch.float64)
        dist.all_reduce(total)
        found[name] = total / dist.get_world_size()
    return found


def step(
    _: int, mechanism: str, weights: dict[str, Tensor], row: Row, *,
    attention: str, layout: str, dtype: torch.dtype = torch.float32, **options: Any,
) -> Shown:  # fmt: skip
    install_stand_ins()
    import transformers.modeling_flash_attention_utils as flash

    model = build_model(attention, dtype)
    model.load_state_dict(weights)
    seen: dict[str, Tensor] = {}
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.update(tokens=inputs[0][0].clone()))

    def keep(_: Any, __: Any, logits: Tensor) -> None:
        logits.retain_grad()
        seen["logits"] = logits

    model.lm_head.register_forward_hook(keep)
    before = flash._flash_attention_forward
    try:
        loss = getattr(mechanisms, mechanism)(model, row, build_mesh(), **options)
    finally:
        flash._flash_attention_forward = before  # axolotl leaves its patch, and fails on it the next time
    logits = seen["logits"]
    assert logits.grad is not None
    of_logits, probabilities = logits.grad[0].double(), logits[0].detach().double().softmax(-1)
    places = find_places(row, seen["tokens"], layout).tolist()
    trained, divisors = {}, []
    for at in of_logits.abs().sum(-1).nonzero().flatten().tolist():
        target = int(of_logits[at].argmin())  # the one logit that is to rise
        trained[places[at]] = target
        divisors.append((1 - probabilities[at, target]) / -of_logits[at, target])
    divisor = float(torch.stack(divisors).median()) if divisors else None
    if divisor and layout != "whole":
        divisor *= dist.get_world_size()
    by_place = {
        place: x.float() for place, x in zip(places, logits.detach()[0], strict=True) if place < len(row.tokens)
    }
    grads = getattr(model, "averaged", None) or average_gradients(model)
    return Shown(loss, grads, by_place, trained, divisor)


def evaluate_axolotl(_: int, weights: dict[str, Tensor], row: Row) -> float:
    """The loss of axolotl's evaluation, which its hook averages over the cp ranks."""
    install_stand_ins()
    import transformers.modeling_flash_attention_utils as flash

    model = build_model("flash_attention_2")
    model.load_state_dict(weights)
    before = flash._flash_attention_forward
    try:
        return mechanisms.axolotl(model, row, build_mesh(), sample_packing=True, train=False)
    finally:
        flash._flash_attention_forward = before


def gather_gradient(rank: int) -> float:
    """Gradient through axolotl's gather of outputs, averaged over the ranks, over the true one: a loss of the whole
    gathered row on every rank, as its reinforcement learning computes.
    """
    install_stand_ins()
    from axolotl.utils.ctx_managers.sequence_parallel import AllGatherWithGrad

    weight = torch.ones((), requires_grad=True)
    AllGatherWithGrad.apply(weight * torch.ones(1, 4, 2), dist.group.WORLD).sum().backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    return weight.grad.item() / dist.get_world_size() / (8 * dist.get_world_size())
