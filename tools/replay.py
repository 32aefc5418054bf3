"""Run a recorded step again and say where its numbers stop being finite.

    torchrun --nproc-per-node 2 tools/replay.py runs/one/nonfinite/step_0000012.json
    python tools/replay.py runs/one/nonfinite/step_0000012.json --cp-size 1 --device cpu

Model, layout and data follow from the flags in the record; further flags of train.py overrule them. The weights are
those of --load, else of the newest checkpoint before the step, among them those that the run saved when the step
failed. Exit code 1: not finite again; 0: finite here.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from checkpoint.files import find_checkpoint, list_checkpoints, read_run_metadata
from checkpoint.saver import load_checkpoint
from config.cli import parse_arguments
from data.batch_schedule import BatchSchedule
from data.loader import build_loader
from data.mixture import resume_samples
from model.gpt import GPT, Stages, get_chunks
from runtime.distributed import read_launch, read_ranks, run_on_rank_zero_first
from runtime.nonfinite import find_nonfinite_gradients
from tools.one_step import compute_gradients, start_grid
from training.build import RunData, build_batch_plan, build_data, build_model
from utils.errors import OneLineParser, UserError, run_tool
from utils.files import parse_json, read_text
from utils.logger import one_line

# Flags that a replay does not take from the run: what the run loaded, wrote or skipped.
LEFT_OUT = {
    "check_data", "dry_run", "dry_run_ranks", "eval_only", "load", "load_fallback", "load_weights_only",
    "metrics_file", "profile", "resume", "run_dir", "save", "skip_steps", "tensorboard_dir", "wandb_project",
}  # fmt: skip


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of a step.

    Raises:
        UserError: the file is not one that a run wrote.
    """
    kinds = {"step": int, "loss": object, "grad_norm": object, "flags": dict, "fingerprints": dict, "checkpoints": str}
    try:
        record = parse_json(read_text(path.resolve()))
        if wrong := [name for name, kind in kinds.items() if not isinstance(record[name], kind)]:
            raise TypeError(f"another type of {wrong[0]}")
        return {name: record[name] for name in kinds} | {"data": record.get("data", {})}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the record of a step ({one_line(error)})") from error


def newest_before(folders: list[Path], step: int) -> Path:
    """Return the newest checkpoint of a step before `step`.

    Raises:
        UserError: there is none in these folders.
    """
    found = [(int(read_run_metadata(place)["step"]), place) for folder in folders for place in list_checkpoints(folder)]
    before = [each for each in found if each[0] < step]
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


def watch_layers(model: GPT | Stages) -> dict[int, tuple[float, int]]:
    """Return a dict that forward passes fill: layer -> largest magnitude of its output, count of non-finite values."""
    seen: dict[int, tuple[float, int]] = {}

    def watch(number: int, output: torch.Tensor) -> None:
        x = output.detach()
        largest, count = seen.get(number, (0.0, 0))
        seen[number] = max(largest, float(x.nan_to_num(0.0).abs().max())), count + int((~x.isfinite()).sum())

    for chunk in get_chunks(model):
        for name, layer in chunk.layers.items():
            layer.register_forward_hook(lambda module, inputs, output, number=int(name): watch(number, output))
    return seen


def print_reports(reports: list[tuple[dict[int, tuple[float, int]], list[str]]]) -> None:
    """Print a table of the layers over all ranks, and the gradients that are not finite."""
    print(f"{'output of':<12} {'largest':>12} {'not finite':>12}")
    for number in sorted({number for layers, _ in reports for number in layers}):
        found = [layers[number] for layers, _ in reports if number in layers]
        largest, count = max(x for x, _ in found), sum(n for _, n in found)
        print(f"{f'layers.{number}':<12} {largest:>12.4g} {count:>12,}")
    for rank, (_, names) in enumerate(reports):
        if names:
            print(f"rank {rank}: {len(names)} gradients not finite: {', '.join(names[:8])}")


def main(argv: list[str]) -> int:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("file", type=Path, help="step_*.json in a run's nonfinite folder")
    parser.add_argument("--load", type=Path, help="checkpoint, or folder of checkpoints, whose weights are taken")
    parser.add_argument("--fresh", action="store_true", help="take the initial weights")
    own, more = parser.parse_known_args(argv)
    launch, record = read_launch(), read_record(own.file)
    step, flags = record["step"], {name: value for name, value in record["flags"].items() if name not in LEFT_OUT}
    config = parse_arguments(more, defaults=flags, source=str(own.file))
    checkpoint = None
    if not own.fresh:
        folders = [own.file.parent / "checkpoints", Path(record["checkpoints"])]
        checkpoint = find_checkpoint(own.load) if own.load else newest_before(folders, step)
    grid, device = start_grid(config, launch)
    if record["data"]:  # not in an old record
        config.training.batches = BatchSchedule.parse(record["data"].get("batches"))
    data = run_on_rank_zero_first(lambda: build_data(config))
    check_same_data(data, record["fingerprints"])
    architecture = config.model.architecture(data.tokenizer.vocab_size)
    model = build_model(config, architecture, grid, device)
    loaded_step = load_checkpoint(checkpoint, model, None, grid) if checkpoint else 0
    layers = watch_layers(model)
    plan, samples = build_batch_plan(config, architecture, grid), resume_samples(data.train, record["data"])
    batches = list(build_loader(samples, plan, steps=[step - 1], num_workers=0, pin_memory=False))
    loss, grad_norm = compute_gradients(config, model, batches, grid, device)
    reports: list[Any] = [None] * launch.world_size
    dist.all_gather_object(reports, (layers, find_nonfinite_gradients(model)))
    if launch.rank == 0:
        print(f"step {step} of {own.file}, weights: {checkpoint or 'initial'}, {grid.describe()}")
        if missing := step - 1 - loaded_step:
            print(f"these weights are of step {loaded_step}, {missing} updates before: other values may be finite here")
        print(f"the run:  loss {record['loss']}, gradient norm {record['grad_norm']}")
        print(f"here:     loss {loss}, gradient norm {grad_norm}")
        print_reports(reports)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if math.isfinite(loss) and math.isfinite(grad_norm) else 1


if __name__ == "__main__":
    sys.exit(run_tool(main, prints=read_ranks()[1] == 0))
