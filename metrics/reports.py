"""What a run writes beside its checkpoints: status, configuration, TensorBoard, metrics; and its last lines."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.files import CONFIG_FILE, list_checkpoints
from checkpoint.resume import TrainState
from config.schema import RunConfig
from metrics.banner import describe_epochs, describe_phases
from metrics.log import APPEND_ONLY, MetricsLog
from metrics.tensorboard import TensorBoardWriter, describe_data, describe_work, open_writers
from metrics.timers import Timers
from model.config import GPTConfig, count_parameters
from parallel.collectives import WaitClock
from parallel.grid import AXES
from runtime.distributed import broadcast_object
from runtime.run import Run
from runtime.status import StatusFile
from training.build import RunData
from training.flops import attention_cost, known_peak_tflops
from utils.files import open_regular, parse_json, replace_synced
from utils.logger import log
from utils.names import redact


def open_reports(
    run: Run,
    architecture: GPTConfig,
    data: RunData,
    state: TrainState,
    timers: Timers,
    cp_clock: WaitClock | None,
) -> MetricsLog:
    """status.json, config.json, TensorBoard and metrics.jsonl of the run. --eval-only appends to the metrics only."""
    config, ranks, paths = run.config, run.ranks, run.paths
    eval_only = config.training.eval_only
    status_file = StatusFile(paths.status, attempt=broadcast_object(uuid.uuid4().hex), rank=ranks.launch.rank)
    run.status.file = None if eval_only else status_file
    settings = configuration(config, run.argv, architecture, world_size=ranks.launch.world_size)
    settings["checkpoints"] = str(paths.checkpoints.resolve())
    if ranks.is_writer:
        settings["starts"] = [
            *(read_starts(paths.run_dir / CONFIG_FILE, state.first_step) if state.is_resumed else []),
            {"step": state.first_step, "layout": settings["layout"], "changed": state.changed},
        ]
    keep_before = APPEND_ONLY if eval_only else state.first_step if state.is_resumed else None
    writers: list[TensorBoardWriter] = []
    if ranks.is_writer:
        paths.run_dir.mkdir(parents=True, exist_ok=True)
    if ranks.is_writer and not eval_only:
        status_file.write("running", step=state.first_step)
        for folder in {paths.run_dir, paths.checkpoints} if config.checkpoint.save else {paths.run_dir}:
            folder.mkdir(parents=True, exist_ok=True)
            replace_synced(folder / CONFIG_FILE, json.dumps(settings, indent=1) + "\n")
        writers = open_writers(
            paths.tensorboard,
            config.logging.wandb_project,
            run_dir=paths.run_dir,
            settings=settings,
            keep_before=keep_before,
        )
        if writers and not state.is_resumed:
            describe_data(writers, data.train, cp_size=config.parallel.cp_size, layout=config.parallel.cp_layout)
            squares = data.train.squared_lengths(0, config.training.batches.size(0))
            squares = np.pad(squares, (0, -len(squares) % config.parallel.dp_size))  # empty places
            work = config.data.seq_length + attention_cost(architecture) * squares
            describe_work(writers, work, config.parallel.dp_size)
    peak_tflops = config.logging.peak_tflops
    if peak_tflops is None and ranks.device.type == "cuda":
        peak_tflops = known_peak_tflops(torch.cuda.get_device_name(ranks.device))
    return MetricsLog(
        architecture=architecture,
        training=config.training,
        logging=config.logging,
        control_group=ranks.control_group,
        timers=timers,
        peak_tflops=peak_tflops,
        cp_clock=cp_clock,
        metrics_file=paths.metrics,
        keep_before=keep_before,
        writers=writers,
        mixtures=describe_phases(data.train, config.training.batches, config.data.skip_steps),
    )


def read_starts(config_file: Path, before: int) -> list[dict[str, Any]]:
    """Step, layout and changes of the run's starts before step `before`, from the config.json of its last start."""
    try:
        with open_regular(config_file) as file:
            settings = parse_json(file.read().decode())
        starts = settings["starts"] if "starts" in settings else [{"step": 0, "layout": settings["layout"]}]
        return [start for start in starts if start["step"] < before]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []  # no file, or none of ours: only the report misses it


def print_end(run: Run, data: RunData, done: int, stop: str, seconds: float) -> None:
    """Write the final status and print where everything is. On rank 0."""
    training, paths = run.config.training, run.paths
    if training.eval_only:
        log(f"validated in {seconds:.0f} s, step {done}")
        log(f"metrics:     {paths.metrics or 'off'}")
        return
    is_done = done >= training.train_iters
    found = list_checkpoints(paths.checkpoints)
    if run.status.file is not None:
        run.status.file.write("done" if is_done else "requeue", step=done, reason=stop)
        with suppress(OSError):
            paths.stop_file.unlink()  # the request is fulfilled
    log(f"done in {seconds:.0f} s" if is_done else f"stopped after step {done} ({stop}); --resume continues")
    log(f"data read:   {describe_epochs(data.train, training.batches.first_sample(done))}")
    log(f"checkpoint:  {found[-1] if found else 'none (--save-interval 0, --no-save-final)'}")
    log(f"TensorBoard: {paths.tensorboard or 'off'}")
    log(f"metrics:     {paths.metrics or 'off'}")
    if commands := next_commands(run, has_checkpoint=bool(found), is_done=is_done):
        log("\n".join(["next:", *(f"  {command}" for command in commands)]))


def next_commands(run: Run, *, has_checkpoint: bool, is_done: bool) -> list[str]:
    """Commands to resume, to generate text and to see the curves."""
    config, paths, launch = run.config, run.paths, run.ranks.launch
    programs, commands = Path(os.path.relpath(Path(sys.executable).parent)), []
    folder = "" if programs.parts[0] == ".." else f"{programs}/"  # an environment in this folder may not be active
    python = f"{folder}python"
    if has_checkpoint:
        chosen = (
            "" if str(programs) == ".venv/bin" else f"PENTAGRID_BIN={shlex.quote(str(Path(sys.executable).parent))} "
        )
        local = f"{chosen}launch/local.sh {launch.local_world_size}"
        start = local if launch.under_torchrun else f"{python} train.py"
        words = [word for word in run.argv if word != "--resume"] + ["--resume"]
        words += [] if config.checkpoint.run_dir else ["--run-dir", str(paths.run_dir)]
        if is_done:  # as long again
            unit = "iters" if config.training.train_tokens is None else "tokens"
            words += [f"--train-{unit}", str(2 * getattr(config.training, f"train_{unit}"))]
        if launch.world_size == launch.local_world_size:  # one node: other launchers have more flags
            commands.append(f"{start} {redact(shlex.join(words))}")
        where = paths.checkpoints if config.checkpoint.save else paths.run_dir
        prompt = shlex.quote(config.logging.sample_prompt or "The ")
        commands.append(f"{python} tools/generate.py --load {shlex.quote(str(where))} --prompt {prompt}")
    if paths.metrics == paths.run_dir / "metrics.jsonl":
        commands.append(f"{python} tools/report.py {shlex.quote(str(paths.run_dir))}")
    return commands


def configuration(
    config: RunConfig, argv: Sequence[str], architecture: GPTConfig, *, world_size: int
) -> dict[str, Any]:
    """What config.json holds: resolved flags, command line, grid, model size, versions, start time; no credentials."""
    settings = {
        "flags": config.flags(),
        "argv": list(argv),
        "layout": {axis: getattr(config.parallel, f"{axis}_size") for axis in AXES},
        "parameters": count_parameters(architecture),
        "vocab_size": architecture.vocab_size,
        "world_size": world_size,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return json.loads(redact(json.dumps(settings, default=str)))
