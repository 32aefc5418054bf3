"""Run a recorded step again and say where its numbers stop being finite.

torchrun --nproc-per-node 2 tools/replay.py runs/one/nonfinite/step_0000012.json
python tools/replay.py runs/one/nonfinite/step_0000012.json --cp-size 1 --device cpu

Model, layout and data follow from the flags in the file, which further flags of train.py overrule: the samples of a step are
a function of the seed and the step. The weights are those that the run kept before the step; else the newest checkpoint
before the step; or of --load. Exit code 1: not finite again; 0: finite here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import nn

from checkpoint.files import find_checkpoint, list_checkpoints, read_run_metadata
from checkpoint.saver import load_checkpoint
from config.cli import parse_arguments
from config.schema import RunConfig
from config.validate import resolve
from data.loader import build_loader
from metrics.log import count_rows
from model.gpt import GPT, Stages, get_chunks
from parallel.collectives import sum_over
from parallel.fsdp import clip_grad_norm_
from parallel.grid import Grid
from runtime.distributed import (
    build_run_grid,
    collective_timeout,
    cuda_device_count,
    initialise_distributed,
    read_launch,
    read_ranks,
    run_on_rank_zero_first,
)
from runtime.nonfinite import find_nonfinite_gradients
from training.build import RunData, build_batch_plan, build_data, build_model, build_pipeline
from training.step import forward_backward, get_norm_owned_names
from utils.errors import UserError, run_tool

# Flags that a replay does not take from the run: what the run loaded, wrote or skipped.
LEFT_OUT = {
    "check_data", "dry_run", "eval_only", "load", "load_fallback", "load_weights_only", "metrics_file", "profile", "resume",
    "run_dir", "save", "skip_steps", "tensorboard_dir", "wandb_project",
}  # fmt: skip


def read_record(path: Path) -> dict[str, Any]:
    """The record of a step.

    Raises:
        UserError: the file is not one that a run wrote.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
        if not isinstance(record["flags"], dict) or not isinstance(record["fingerprints"], dict):
            raise TypeError("flags or fingerprints")
        return {name: record[name] for name in ("step", "loss", "grad_norm", "flags", "fingerprints", "checkpoints")}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not the record of a step ({error!r})") from error


def newest_before(folders: list[Path], step: int) -> Path:
    """The newest checkpoint of a step before `step`.

    Raises:
        UserError: there is none in these folders.
    """
    found = [(int(read_run_metadata(place)["step"]), place) for folder in folders for place in list_checkpoints(folder)]
    before = [one for one in found if one[0] < step]
    if not before:
        where = " or ".join(map(str, folders))
        raise UserError(
            f"no checkpoint before step {step} in {where}: name one with --load, or --fresh for the initial weights"
        )
    return max(before)[1]


def check_same_data(data: RunData, recorded: dict[str, Any]) -> None:
    """Refuse data other than the run's.

    Raises:
        UserError: names what differs.
    """
    for name, value in data.fingerprints().items():
        if name != "validation documents" and value != recorded.get(name):
            raise UserError(f"the {name} differ from the run's: {value}, the run had {recorded.get(name)}")


class LayerWatch:
    """Largest magnitude, and count of values that are not finite, of each layer's output."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, tuple[float, int]] = {}
        for chunk in get_chunks(model):  # type: ignore[arg-type]
            for name, layer in chunk.layers.items():
                layer.register_forward_hook(self._hook(f"layers.{name}"))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            x = output.detach()
            nonfinite = int((~x.isfinite()).sum())
            largest, before = self.seen.get(name, (0.0, 0))
            own = float(x.nan_to_num(0.0).abs().max()) if x.numel() else 0.0
            self.seen[name] = (max(largest, own), before + nonfinite)

        return hook


def run_step(
    config: RunConfig, step: int, data: RunData, model: GPT | Stages, grid: Grid, device: torch.device
) -> tuple[float, float, list[dict[str, Any]]]:
    """Forward and backward of step `step`, counted from 1. Collective.

    Returns:
        loss, gradient norm, and for each rank {"layers": as `LayerWatch.seen`, "gradients": names that are not finite}.
    """
    watch = LayerWatch(model)
    plan = build_batch_plan(config, grid)
    pipeline = build_pipeline(config, model, grid, device, plan.num_microbatches)
    batches = list(build_loader(data.train, plan, steps=[step - 1], num_workers=0, pin_memory=False))
    loss_tokens = sum_over(count_rows(batches).to(device), grid.group("batch"))[0].clamp(min=1)
    cross_entropy = forward_backward(
        model,
        batches,
        loss_tokens=loss_tokens,
        device=device,
        reshard_between=config.parallel.reshard_after_forward == "on",
        pipeline=pipeline,
    )
    own = {"layers": watch.seen, "gradients": find_nonfinite_gradients(model)}
    parameters = dict(model.named_parameters())
    grad_norm = float(clip_grad_norm_(parameters, grid, max_norm=0.0, owned=get_norm_owned_names(model, grid)))
    loss = float(sum_over(sum_over(cross_entropy, grid.group("loss")), grid.group("pp")) / loss_tokens)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, own)
    return loss, grad_norm, reports


def print_layers(reports: list[dict[str, Any]]) -> None:
    """A table of the layers over all ranks, and the gradients that are not finite."""
    layers: dict[str, tuple[float, int]] = {}
    for report in reports:
        for name, (largest, nonfinite) in report["layers"].items():
            before = layers.get(name, (0.0, 0))
            layers[name] = (max(largest, before[0]), nonfinite + before[1])
    print(f"{'output of':<12} {'largest':>12} {'not finite':>12}")
    for name in sorted(layers, key=lambda n: int(n.rpartition(".")[2])):
        print(f"{name:<12} {layers[name][0]:>12.4g} {layers[name][1]:>12,}")
    for rank, report in enumerate(reports):
        names = report["gradients"]
        if names:
            print(f"rank {rank}: {len(names)} gradients not finite: {', '.join(names[:8])}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path, help="step_*.json of a run's nonfinite folder")
    parser.add_argument("--load", type=Path, help="checkpoint, or folder of checkpoints, whose weights are taken")
    parser.add_argument("--fresh", action="store_true", help="take the initial weights")
    return parser


def main(argv: list[str]) -> int:
    own, more = build_parser().parse_known_args(argv)
    launch, record = read_launch(), read_record(own.file)
    flags = {name: value for name, value in record["flags"].items() if name not in LEFT_OUT}
    config = parse_arguments(more, defaults=flags)
    resolve(
        config,
        world_size=launch.world_size,
        local_world_size=launch.local_world_size,
        cuda_devices=cuda_device_count,
    )
    checkpoint = None
    if not own.fresh:
        folders = [own.file.parent / "checkpoints", Path(record["checkpoints"])]
        checkpoint = find_checkpoint(own.load) if own.load else newest_before(folders, record["step"])
    device, _ = initialise_distributed(launch, config.parallel.device, timeout=collective_timeout(config.parallel))
    grid = build_run_grid(config.parallel, device)
    data = run_on_rank_zero_first(lambda: build_data(config))
    check_same_data(data, record["fingerprints"])
    model = build_model(config, config.model.architecture(data.tokenizer.vocab_size), grid, device)
    loaded_step = load_checkpoint(checkpoint, model, None, grid) if checkpoint else 0
    loss, grad_norm, reports = run_step(config, record["step"], data, model, grid, device)
    if launch.rank == 0:
        print(f"step {record['step']} of {own.file}, weights: {checkpoint or 'initial'}, {grid.describe()}")
        missing = record["step"] - 1 - loaded_step
        if missing:
            print(f"these weights are of step {loaded_step}, {missing} updates before: other values may be finite here")
        print(f"the run:  loss {record['loss']}, gradient norm {record['grad_norm']}")
        print(f"here:     loss {loss}, gradient norm {grad_norm}")
        print_layers(reports)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if math.isfinite(loss) and math.isfinite(grad_norm) else 1


if __name__ == "__main__":
    sys.exit(run_tool(main, prints=read_ranks()[1] == 0))
