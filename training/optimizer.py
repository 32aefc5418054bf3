"""AdamW (arXiv:1711.05101) with weight decay on matrices only, and Muon for the matrices of the layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config.schema import TrainingConfig
from model.gpt import GPT, Stages, get_chunks
from model.names import tp_dim
from parallel.collectives import all_to_all, start_all_gather
from parallel.fsdp import local_tensor
from parallel.tensor import TensorParallel

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of x, x^3, x^5
NEWTON_SCHULZ_STEPS = 5
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # of an update at --lr 1, about AdamW's (arXiv:2502.16982)


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """--optimizer over this rank's shards. AdamW is PyTorch's fused kernel. Norm weights (vectors) are not decayed."""
    own, is_muon = dict(model.named_parameters()), training.optimizer == "muon"
    by_muon = {n: p for n, p in own.items() if is_muon and n.startswith("layers.") and p.dim() == 2}
    others = [p for n, p in own.items() if n not in by_muon]
    matrices, vectors = [p for p in others if p.dim() >= 2], [p for p in others if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (training.adam_beta1, training.adam_beta2)
    adamw = torch.optim.AdamW(groups, lr=training.lr, betas=betas, eps=training.adam_eps, fused=True)
    if not by_muon:
        return adamw
    assert isinstance(model, (GPT, Stages))
    return Muon(by_muon, adamw, get_chunks(model)[0].tp)


def orthogonalize(matrices: Tensor) -> Tensor:
    """[n, rows, columns] with the singular vectors kept and nearly all singular values between 0.7 and 1.2.

    Quintic Newton-Schulz iterations of Keller Jordan's Muon (kellerjordan.github.io/posts/muon), in bf16 on CUDA.
    """
    x = matrices.to(torch.bfloat16) if matrices.is_cuda and matrices.dtype == torch.float32 else matrices
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    linear, cubic, quintic = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = linear * x + (cubic * gram + quintic * (gram @ gram)) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, and `adamw` for the weights that it holds, behind the interface of one optimizer.

    The update of a matrix is its Nesterov momentum, orthogonalized and scaled to AdamW's size: --lr and --weight-decay
    mean the same for both. It is a function of the whole matrix as a checkpoint holds it (QKV is one matrix): every
    layout gives the same update. `torch.optim.Muon` would take a tp shard for a whole matrix, and computes in bf16.

    Args:
        matrices: this rank's shards by canonical name.
    """

    def __init__(self, matrices: dict[str, nn.Parameter], adamw: torch.optim.AdamW, tp: TensorParallel) -> None:
        same = {name: adamw.param_groups[0][name] for name in ("lr", "weight_decay")}
        super().__init__([{"params": list(matrices.values())}], same)
        self.adamw, self.tp = adamw, tp
        self.param_groups += adamw.param_groups  # the same objects: a learning rate set here is set there
        self.state = adamw.state
        self.kinds: dict[str, list[nn.Parameter]] = defaultdict(list)  # matrices of one shape: one of each layer
        for name, parameter in matrices.items():
            self.kinds[name.split(".", 2)[2]].append(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight and moment, or none where `found_inf` is 1. Collective over fsdp and tp."""
        is_skipped = getattr(self, "found_inf", None)
        if is_skipped is not None:
            self.adamw.found_inf = is_skipped  # type: ignore[attr-defined]
        self.adamw.step()
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        share = 1.0 if is_skipped is None else 1.0 - is_skipped.double()
        for kind, parameters in self.kinds.items():
            directions = []
            for parameter in parameters:
                assert parameter.grad is not None
                if not self.state[parameter]:
                    self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
                grad, momentum = local_tensor(parameter.grad), local_tensor(self.state[parameter]["momentum"])
                if is_skipped is not None:  # lerp between equal numbers changes none
                    grad = grad.where(is_skipped == 0, momentum)
                momentum.lerp_(grad, 1 - MUON_MOMENTUM)
                directions.append(grad.lerp(momentum, MUON_MOMENTUM))
            shape, dim, first = list(parameters[0].shape), tp_dim(kind), parameters[0]
            fsdp = first.device_mesh.get_group("fsdp") if isinstance(first, DTensor) else None
            updates = self._orthogonalize_shards(directions, shape[0], fsdp, dim)
            if dim is not None:
                shape[dim] *= self.tp.size
            scale = lr * MUON_RMS * max(shape) ** 0.5
            for parameter, update in zip(parameters, updates, strict=True):
                weight = local_tensor(parameter)
                weight.mul_(1 - lr * decay * share).sub_(update * (scale * share))

    def _orthogonalize_shards(
        self, shards: Sequence[Tensor], rows: int, fsdp: dist.ProcessGroup | None, dim: int | None
    ) -> Sequence[Tensor]:
        """This rank's shards of the orthogonalized matrices. Each rank of fsdp gathers and computes some matrices.

        Args:
            shards: [about rows / fsdp, columns] of each matrix; FSDP shards the rows.
            rows: of the tp rank's part of a matrix.
            dim: that tp shards.
        """
        size = 1 if fsdp is None else fsdp.size()
        count, height = -(-len(shards) // size), -(-rows // size)  # matrices of a rank, rows of a shard
        padded = shards[0].new_zeros(size * count, height, shards[0].shape[1])
        for place, shard in zip(padded, shards, strict=False):
            place[: len(shard)] = shard
        parts = padded.unflatten(0, (size, count))
        parts = parts if fsdp is None else all_to_all(parts, fsdp)  # [shards, count, height, c]
        matrices = parts.transpose(0, 1).flatten(1, 2)[:, :rows]  # [count, rows, c]
        if dim is not None and self.tp.group is not None:
            gathered = start_all_gather(matrices.contiguous(), self.tp.group).wait().chunk(self.tp.size)
            found = orthogonalize(torch.cat(gathered, dim + 1)).chunk(self.tp.size, dim + 1)[self.tp.rank]
        else:
            found = orthogonalize(matrices)
        found = nn.functional.pad(found, (0, 0, 0, size * height - rows))
        parts = found.unflatten(1, (size, height)).transpose(0, 1)
        parts = parts if fsdp is None else all_to_all(parts, fsdp)
        return [part[: len(shard)] for part, shard in zip(parts.flatten(0, 1), shards, strict=False)]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def skip_update_if(optimizer: torch.optim.Optimizer, is_skipped: Tensor) -> None:
    """The next step changes no weight, moment or step count where the scalar is True. The host does not wait for it.

    `found_inf` is how `torch.amp.GradScaler` tells a fused optimizer to skip.
    """
    optimizer.found_inf = is_skipped.to(torch.float32)  # type: ignore[attr-defined]
