"""Rows of checkpoints, validation, logs and adapters."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from config.peers.columns import (
    ABSENT,
    Changed,
    Column,
    Known,
    NoCounterpart,
    Values,
    as_given,
    first_given,
    key,
    number,
    only,
    row,
    switch,
    text,
    whole,
)


def _read_steps(fraction: str, strategy: str, per_epoch: str, what: str) -> Any:
    """Axolotl's interval: steps, a share of all steps, or a number of times an epoch."""

    def read(values: Values, known: Known) -> Any:
        if text(values.get(strategy, "")) in ("no", "false"):
            return 0
        if fraction in values:
            steps = number(values[fraction])
            if steps >= 1 or not steps:
                return whole(values[fraction])
            total = known.get("train_iters")
            if total is None:
                raise NoCounterpart(f"{steps:g} of all steps, which are not given: --{what}-interval")
            return Changed(max(1, int(steps * total)), f"{steps:g} * {total} steps = {max(1, int(steps * total))}")
        times = first_given(values, (per_epoch,))
        if times is not ABSENT and not number(times):
            return 0
        each = "an epoch" if times is ABSENT else f"{times} times an epoch"
        raise NoCounterpart(f"{each}: count the steps for --{what}-interval")

    return read


def _write_steps(name: str, strategy: str) -> Any:
    return lambda value, known: {name: value} if value else {strategy: "no"}


def _write_evals(value: int, known: Known) -> Values:
    has_data = known.get("valid_data_path") or any(known.get("data_split", (1.0, 0.0, 0.0))[1:])
    return {"eval_steps": value} if value and has_data else {}


def _read_run_dir(values: Values, known: Known) -> Any:
    """The folder of all outputs: other suites have no second one for checkpoints."""
    if {"run_dir", "save"} <= values.keys() and values["save"] != values["run_dir"]:
        return Changed(values["run_dir"], f"checkpoints in {values['save']} here, in {values['run_dir']} there")
    return first_given(values, ("run_dir", "save"))


def _read_nemo_saves(values: Values, known: Known) -> Any:
    if not switch(values.get("checkpoint.enabled", "true")):
        return 0
    steps = first_given(values, ("step_scheduler.ckpt_every_steps",))
    return 100 if steps is ABSENT else whole(steps)


def _write_nemo_saves(value: int, known: Known) -> Values:
    return (
        {"checkpoint.enabled": True, "step_scheduler.ckpt_every_steps": value}
        if value
        else {"checkpoint.enabled": False}
    )


def _read_restore(values: Values, known: Known) -> Any:
    word = text(values["checkpoint.restore_from"])
    return ABSENT if word.upper() == "LATEST" else word  # as without the key: NeMo takes the newest checkpoint


def _write_load(value: str, known: Known) -> Any:
    raise NoCounterpart(
        f"{value}: another suite's checkpoint; export it to a Hugging Face folder, tools/convert_hf.py import --input"
    )


def _foreign(name: str, *older: str) -> Column:
    return key(name, *older)


def _write_tensorboard(value: str, known: Known) -> Values:
    return {} if value == "default" else {"tensorboard_dir": value}


def _write_wandb(value: str, known: Known) -> Any:
    found = {"wandb_project": value}
    if find_spec("wandb"):
        return found
    return Changed(found, "needs the wandb package, which is missing here; --wandb-project none turns it off")


def _default_evals(known: Known) -> Any:
    """Axolotl validates at each end of an epoch."""
    if not known.get("data_split", (1.0, 0.0, 0.0))[1] and "valid_data_path" not in known:
        return 0
    return Changed(ABSENT, "validation after each epoch there, every 100 steps here; --eval-interval sets the steps")


def _read_iters_of_nemo(values: Values, known: Known) -> Any:
    batch = known.get("global_batch_size", 1)
    samples = whole(values["validation_dataset.num_val_samples"])
    return Changed(max(1, samples // batch), f"{samples} samples / global batch {batch} = {max(1, samples // batch)}")


def _write_iters_of_nemo(value: int, known: Known) -> Any:
    if "valid_data_path" not in known:
        return Changed({}, f"{value} batches here; no validation there without a validation_dataset")
    samples = value * known.get("global_batch_size", 1)
    return Changed({"validation_dataset.num_val_samples": samples}, f"{value} batches = {samples} samples")


_ADAPTERS = {"lora": "lora", "qlora": "qlora"}
_ALL_WEIGHTS = "adapter {}: Pentagrid trains all weights, at a lower learning rate; merge adapters before"

OUTPUT = [
    row(
        "run_dir",
        pentagrid=Column(("run_dir", "save"), _read_run_dir, lambda value, known: {"run_dir": value}),
        nemo="checkpoint.checkpoint_dir",
        axolotl="output_dir",
        megatron="save",
    ),
    row(
        "resume",
        switch,
        pentagrid="resume",
        axolotl="auto_resume_from_checkpoints",
        nemo=Column((), None, lambda value, known: {}, lambda known: "run_dir" in known),
        megatron=Column(("load",), lambda values, known: values["load"] == known.get("run_dir") or ABSENT),
        off=False,
    ),
    row(
        "save_interval",
        whole,
        pentagrid=key("save_interval", parse=whole, default=100),
        nemo=Column(
            ("step_scheduler.ckpt_every_steps", "checkpoint.enabled"), _read_nemo_saves, _write_nemo_saves, 100
        ),
        axolotl=Column(
            ("save_steps", "saves_per_epoch", "save_strategy"),
            _read_steps("save_steps", "save_strategy", "saves_per_epoch", "save"),
            _write_steps("save_steps", "save_strategy"),
        ),
        megatron=key("save_interval", "persistent_save_interval", parse=whole, default=0),
    ),
    row(
        "keep_checkpoints",
        whole,
        pentagrid=key("keep_checkpoints", parse=whole, default=0),
        nemo=Column(
            ("checkpoint.max_recent_checkpoints",),
            lambda values, known: whole(values["checkpoint.max_recent_checkpoints"]),
            lambda value, known: {"checkpoint.max_recent_checkpoints": value} if value else {},
        ),
        axolotl=Column(
            ("save_total_limit",),
            lambda values, known: whole(values["save_total_limit"]),
            lambda value, known: (
                {"save_total_limit": value}
                if value
                else Changed({}, "all checkpoints are kept here, the newest 4 there")
            ),
            4,
        ),
    ),
    row(
        "async_save",
        switch,
        pentagrid=key("async_save", parse=switch, default=False),
        nemo="checkpoint.is_async",
        megatron="async_save",
        off=False,
    ),
    row(
        "load",
        pentagrid=as_given("load", _write_load),
        nemo=Column(("checkpoint.restore_from",), _read_restore, _write_load),
        axolotl=Column(
            ("resume_from_checkpoint",), lambda values, known: text(values["resume_from_checkpoint"]), _write_load
        ),
        megatron=Column(
            ("load",),
            lambda values, known: ABSENT if values["load"] == known.get("run_dir") else text(values["load"]),
        ),
    ),
    row(
        "eval_interval",
        whole,
        pentagrid=key("eval_interval", parse=whole, default=100),
        nemo=key("step_scheduler.val_every_steps", parse=whole, default=0),
        axolotl=Column(
            ("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy"),
            _read_steps("eval_steps", "eval_strategy", "evals_per_epoch", "eval"),
            _write_evals,
            _default_evals,
        ),
        megatron=key("eval_interval", parse=whole, default=1000),
    ),
    row(
        "eval_iters",
        whole,
        pentagrid=key("eval_iters", parse=whole, default=20),
        nemo=Column(("validation_dataset.num_val_samples",), _read_iters_of_nemo, _write_iters_of_nemo),
        axolotl=Column((), None, lambda value, known: Changed({}, f"{value} batches here, all validation data there")),
        megatron=key("eval_iters", parse=whole, default=100),
    ),
    row(
        "log_interval",
        whole,
        pentagrid=key("log_interval", parse=whole, default=10),
        axolotl="logging_steps",
        megatron=key("log_interval", parse=whole, default=100),
        nemo=only(1, "NeMo logs each step, not each {}", softly=True),
    ),
    row(
        "tensorboard_dir",
        pentagrid="tensorboard_dir",
        megatron="tensorboard_dir",
        axolotl=Column(
            ("use_tensorboard",),
            lambda values, known: "default" if switch(values["use_tensorboard"]) else "none",
            lambda value, known: {"use_tensorboard": value != "none"},
        ),
    ),
    row(
        "wandb_project",
        pentagrid=as_given("wandb_project", _write_wandb),
        nemo="wandb.project",
        axolotl="wandb_project",
        megatron="wandb_project",
    ),
    row("wandb_entity", nemo="wandb.entity", axolotl="wandb_entity", megatron="wandb_entity"),
    row("wandb_name", nemo="wandb.name", axolotl="wandb_name", megatron="wandb_exp_name"),
    row("exit_interval", whole, pentagrid="exit_interval", megatron="exit_interval"),
    row("exit_duration_in_mins", number, pentagrid="exit_duration_in_mins", megatron="exit_duration_in_mins"),
    row(
        "timing_log_level",
        whole,
        pentagrid=key("timing_log_level", parse=whole, default=0),
        megatron="timing_log_level",
        off=0,
    ),
    row(
        "adapter",
        nemo=Column(
            ("peft._target_",),
            lambda values, known: "lora",
            lambda value, known: {"peft._target_": "nemo_automodel.components._peft.lora.PeftConfig"},
        ),
        axolotl=key("adapter", choices=_ADAPTERS),
        pentagrid=only("none", _ALL_WEIGHTS, reads=False),
    ),
    row("lora_rank", whole, nemo="peft.dim", axolotl="lora_r"),
    row("lora_alpha", number, nemo=key("peft.alpha", parse=whole), axolotl=key("lora_alpha", parse=whole)),
    row("lora_dropout", number, nemo="peft.dropout", axolotl="lora_dropout"),
    row("trust_remote_code", switch, nemo="model.trust_remote_code", axolotl="trust_remote_code", off=False),
    row(
        "attn_implementation",
        nemo="model.attn_implementation",
        axolotl=key("attn_implementation"),
        pentagrid=Column((), None, lambda value, known: {}),  # PyTorch's or Transformer Engine's kernels, exact alike
    ),
]
