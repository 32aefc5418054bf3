"""One step of a run, outside its loop: ranks from resolved flags, and the gradients of given microbatches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from config.schema import RunConfig
from config.validate import resolve
from data.batch import Batch
from model.gpt import GPT, Stages
from parallel.collectives import sum_over
from parallel.fsdp import clip_grad_norm_
from parallel.grid import Grid
from runtime.distributed import Launch, build_run_grid, collective_timeout, cuda_device_count, initialise_distributed
from training.build import build_accumulation, build_pipeline
from training.step import forward_backward, get_norm_owned_names


def start_grid(config: RunConfig, launch: Launch) -> tuple[Grid, torch.device]:
    """Resolve the flags in place and make the process groups. Collective."""
    world, local_world = launch.world_size, launch.local_world_size
    resolve(config, world_size=world, local_world_size=local_world, cuda_devices=cuda_device_count)
    timeout = collective_timeout(config.parallel)
    device, _ = initialise_distributed(launch, config.parallel.device, timeout=timeout)
    return build_run_grid(config.parallel, device), device


def compute_gradients(
    config: RunConfig, model: GPT | Stages, batches: Sequence[Batch], grid: Grid, device: torch.device
) -> tuple[float, float]:
    """Forward and backward of one step as in train.py, without clipping. Collective. Returns loss and gradient norm."""
    own_tokens = torch.tensor(float(sum(batch.loss_tokens for batch in batches)), dtype=torch.float64, device=device)
    loss_tokens = sum_over(own_tokens, grid.group("batch")).clamp(min=1)
    cross_entropy = forward_backward(
        model,
        batches,
        loss_tokens=loss_tokens,
        device=device,
        accumulation=build_accumulation(config.parallel),
        pipeline=build_pipeline(config, model, grid, device),
    )
    loss = sum_over(sum_over(cross_entropy, grid.group("loss")), grid.group("pp")) / loss_tokens
    owned = get_norm_owned_names(model, grid)
    return float(loss), float(clip_grad_norm_(dict(model.named_parameters()), grid, max_norm=0.0, owned=owned))
