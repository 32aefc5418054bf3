"""Run one step again from the file that a run kept of it, and say where numbers stop being finite.

torchrun --nproc-per-node 2 tools/replay.py runs/one/nonfinite/step_0000012.json
python tools/replay.py runs/one/nonfinite/step_0000012.json --cp-size 1 --device cpu

The rows come from the file beside it, the model and layout from the flags of the run, which further flags of train.py overrule. The
weights are those that the run kept of the moment before the step; else the newest checkpoint before it; or of --load.
Exit code 1: not finite again; 0: finite here.
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

import train
from checkpoint.files import checkpoints, find_checkpoint, read_run_facts
from checkpoint.saver import load_checkpoint
from config.arguments import model_config, parse_arguments, resolve
from data.batch import BatchPlan
from data.loader import build_loader
from metrics.log import row_facts
from model.config import padded_vocab_size
from model.gpt import get_chunks
from parallel.collectives import sum_over
from parallel.fsdp import clip_grad_norm_
from parallel.grid import GridSizes, build_grid
from runtime.distributed import (
    collective_timeout,
    cuda_device_count,
    group_backend,
    initialise_distributed,
    read_launch,
)
from runtime.nonfinite import StoredSequences, bad_gradients
from training.step import forward_backward, get_norm_owned_names
from utils.errors import UserError

# Flags of the run that a replay has no use for: what it would read, write or wait for.
LEFT_OUT = {
    "check_data", "config", "data_cache_path", "data_path", "data_split", "dry_run", "eval_only", "load", "load_fallback",
    "load_weights_only", "metrics_file", "profile", "resume", "run_dir", "save", "skip_steps", "tensorboard_dir", "tokenizer_eod",
    "tokenizer_model", "valid_data_path", "wandb_project",
}  # fmt: skip


def without_places(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run without those of `LEFT_OUT`; documents and their tokenizer are not needed."""
    return {name: value for name, value in flags.items() if name not in LEFT_OUT} | {"tokenizer_type": "byte"}


def read_step(path: Path) -> dict[str, Any]:
    """Raises ValueError if the file is not one that a run kept."""
    try:
        told = json.loads(path.read_text("utf-8"))
        if not isinstance(told["flags"], dict):
            raise TypeError("flags")
        return {
            key: told[key] for key in ("step", "loss", "grad_norm", "flags", "vocab_size", "checkpoints", "world_size")
        }
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the file of a step ({error!r})") from error


def newest_before(folders: list[Path], step: int) -> Path:
    """Raises ValueError if none of the folders has a checkpoint of a step before `step`."""
    found = [(int(read_run_facts(place)["step"]), place) for folder in folders for place in checkpoints(folder)]
    before = [one for one in found if one[0] < step]
    if not before:
        where = " or ".join(map(str, folders))
        raise UserError(
            f"no checkpoint before step {step} in {where}: name one with --load, or --fresh for the initial weights"
        )
    return max(before)[1]


class LayerWatch:
    """What goes into and comes out of each layer: the largest magnitude, and how many numbers are not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, tuple[float, int]] = {}
        for chunk in get_chunks(model):  # type: ignore[arg-type]
            for name, layer in chunk.layers.items():
                layer.register_forward_hook(self._hook(f"layers.{name}"))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            x = output.detach()
            bad = int((~x.isfinite()).sum())
            most, before = self.seen.get(name, (0.0, 0))
            self.seen[name] = (max(most, float(x.nan_to_num(0.0).abs().max()) if x.numel() else 0.0), before + bad)

        return hook


def main(argv: list[str]) -> int:
    with train.one_line_refusals():
        own = argparse.ArgumentParser(
            add_help=True, allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
        )
        own.add_argument("file", type=Path, help="step_*.json of a run's nonfinite folder")
        own.add_argument("--load", type=Path, help="checkpoint, or folder with some, whose weights are taken")
        own.add_argument("--fresh", action="store_true", help="take the initial weights")
        flags, more = own.parse_known_args(argv)
        launch, told = read_launch(), read_step(flags.file)
        args = parse_arguments(more, defaults=without_places(told["flags"]))
        resolve(
            args, world_size=launch.world_size, local_world_size=launch.local_world_size, cuda_devices=cuda_device_count
        )
        rows = StoredSequences(flags.file.with_suffix(".npz"))
        checkpoint = None
        folders = [flags.file.parent / "checkpoints", Path(told["checkpoints"])]
        if not flags.fresh:
            checkpoint = find_checkpoint(flags.load) if flags.load else newest_before(folders, told["step"])
    device, _ = initialise_distributed(launch, args.device, timeout=collective_timeout(args))
    sizes = GridSizes(
        pp=args.pp_size,
        dp_replicate=args.dp_replicate_size,
        dp_shard=args.dp_shard_size,
        cp=args.cp_size,
        tp=args.tp_size,
    )
    grid = build_grid(sizes, timeout=collective_timeout(args), backend=group_backend(device))
    plan = BatchPlan.from_grid(
        grid,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        qkv_format=args.qkv_format,
        layout=args.cp_layout,
        pad_rows=args.pad_rows,
    )
    vocab = padded_vocab_size(told["vocab_size"], args.make_vocab_size_divisible_by)
    config = model_config(args, vocab_size=told["vocab_size"], padded_vocab_size=vocab)
    with train.one_line_refusals():
        if args.global_batch_size != rows.samples_per_epoch:
            raise UserError(
                f"--global-batch-size {args.global_batch_size}: the file has the {rows.samples_per_epoch} rows of a step"
            )
        model = train.build_model(args, config, grid, device)
        at = load_checkpoint(checkpoint, model, None, grid) if checkpoint else 0
    watch = LayerWatch(model)
    pipeline = train.build_pipeline(args, model, config, grid, device, plan.num_microbatches)
    batches = list(build_loader(rows, plan, steps=[0], num_workers=0, pin_memory=False))
    loss_tokens = sum_over(row_facts(batches).to(device), grid.group("batch"))[0].clamp(min=1)
    cross_entropy = forward_backward(
        model,
        batches,
        loss_tokens=loss_tokens,
        device=device,
        reshard_between=args.reshard_after_forward == "on",
        pipeline=pipeline,
    )
    mine = {"layers": watch.seen, "gradients": bad_gradients(model)}
    grad_norm = float(
        clip_grad_norm_(dict(model.named_parameters()), grid, max_norm=0.0, owned=get_norm_owned_names(model, grid))
    )
    loss = float(sum_over(sum_over(cross_entropy, grid.group("loss")), grid.group("pp")) / loss_tokens)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if launch.rank == 0:
        print(f"step {told['step']} of {flags.file}, weights: {checkpoint or 'initial'}, {grid.describe()}")
        if at != told["step"] - 1:
            print(
                f"these weights are of step {at}, {told['step'] - 1 - at} updates before: what is not finite here may differ"
            )
        print(f"the run:  loss {told['loss']}, gradient norm {told['grad_norm']}")
        print(f"here:     loss {loss}, gradient norm {grad_norm}")
        _print_layers(everyone)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if math.isfinite(loss) and math.isfinite(grad_norm) else 1


def _print_layers(everyone: list[dict[str, Any]]) -> None:
    layers: dict[str, tuple[float, int]] = {}
    for told in everyone:
        for name, (most, bad) in told["layers"].items():
            layers[name] = (max(most, layers.get(name, (0.0, 0))[0]), bad + layers.get(name, (0.0, 0))[1])
    print(f"{'output of':<12} {'largest':>12} {'not finite':>12}")
    for name in sorted(layers, key=lambda n: int(n.rpartition(".")[2])):
        print(f"{name:<12} {layers[name][0]:>12.4g} {layers[name][1]:>12,}")
    for rank, told in enumerate(everyone):
        if told["gradients"]:
            print(f"rank {rank}: {len(told['gradients'])} gradients not finite: {', '.join(told['gradients'][:8])}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
