"""Rows of steps, optimizer, schedule, dtype and recomputation."""

from __future__ import annotations

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
    has_section,
    key,
    number,
    only,
    rounded,
    row,
    switch,
    text,
    whole,
    words,
)

# ---------------------------------------------------------------------------------------------------
# Steps


def _read_megatron_iters(values: Values, known: Known) -> Any:
    if "train_iters" in values:
        return whole(values["train_iters"])
    return _steps(values["train_samples"], known)


def _steps(samples: Any, known: Known) -> Any:
    batch = known.get("global_batch_size")
    if batch is None:
        raise NoCounterpart(f"{samples} samples / global batch: give --world-size")
    steps = whole(samples) // batch
    return Changed(steps, f"{samples} samples / global batch {batch} = {steps} steps")


def _write_epochs(value: int, known: Known) -> Any:
    if "train_iters" in known:
        return Changed({}, f"{known['train_iters']} steps decide here, whatever their number of epochs")
    return {}  # tools/migrate.py says how to count the steps


# ---------------------------------------------------------------------------------------------------
# Optimizer


_MUON = "momentum, matrices and the size of an update may differ: --lr needs another search"
_EXACT_ADAMW = {"adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "AdamW", "FusedAdam", "adamw_apex_fused"}


def _read_optimizer(values: Values, known: Known) -> str:
    return text(next(iter(values.values()))).rsplit(".", 1)[-1]


def _write_optimizer(value: str, known: Known) -> Any:
    """AdamW with fp32 moments, or Muon."""
    if value.lower() == "muon":
        return Changed({"optimizer": "muon"}, _MUON)
    decay = known.get("weight_decay", 0.0)
    if value in _EXACT_ADAMW:
        return {}
    if value == "Adam":
        note = f"Adam adds weight decay {decay} to the gradient, AdamW shrinks weights"
        return Changed({}, note) if decay else {}
    if "adamw" in value.lower() or value.lower() == "adam":
        return Changed({}, f"{value}: AdamW with fp32 moments here")
    raise NoCounterpart(f"{value}: AdamW here; --lr and betas need another search")


def _write_other_optimizer(name: str, adamw: str) -> Any:
    def write(value: str, known: Known) -> Any:
        if value in _EXACT_ADAMW or (value == "Adam" and not known.get("weight_decay", 0.0)):
            return {name: adamw}
        if "adamw" in value.lower():
            return Changed({name: adamw}, f"{value} becomes {adamw}")
        raise NoCounterpart(f"{value}: no such optimizer there")

    return write


def _read_megatron_optimizer(values: Values, known: Known) -> str:
    kind = text(values.get("optimizer", "adam"))
    return "AdamW" if kind == "adam" else kind


def _write_axolotl_optimizer(value: str, known: Known) -> Any:
    if value in _EXACT_ADAMW or value == "Adam":
        return _write_other_optimizer("optimizer", "adamw_torch_fused")(value, known)
    return Changed({"optimizer": value}, _MUON) if value == "muon" else {"optimizer": value}


def _beta(index: int) -> Column:
    def write(value: float, known: Known) -> Values:
        return {"optimizer.betas": [known.get("adam_beta1", 0.9), value]} if index else {}

    return Column(
        ("optimizer.betas",),
        lambda values, known: number(words(values["optimizer.betas"])[index]),
        write,
        (0.9, 0.999)[index],
    )


def _write_decay(target: str, note: str) -> Any:
    def write(value: float, known: Known) -> Any:
        found = {target: value}
        return Changed(found, f"{value:g}: {note}") if value else found

    return write


# ---------------------------------------------------------------------------------------------------
# Schedule


def _nemo_schedules(known: Known) -> bool:
    return has_section(known, "lr_scheduler")


_STYLES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant_with_warmup": "constant",
    "constant": "constant",
    "warmup_stable_decay": "wsd",
}


def _write_axolotl_style(value: str, known: Known) -> Any:
    word = {style: name for name, style in reversed(_STYLES.items())}[value]
    if value != "wsd":
        return {"lr_scheduler": word}
    peak = known.get("lr", 0.0)
    steps = known.get("lr_wsd_decay_iters", max(1, known.get("train_iters", 10) // 10))
    return {
        "lr_scheduler": word,
        "lr_scheduler_kwargs.num_decay_steps": steps,
        "lr_scheduler_kwargs.decay_type": "linear",
        "lr_scheduler_kwargs.min_lr_ratio": rounded(known.get("min_lr", 0.0) / peak) if peak else 0.0,
    }


def _read_wsd_style(values: Values, known: Known) -> Any:
    """The shape of the decay of WSD: Pentagrid's is linear."""
    return text(next(iter(values.values()))) if known.get("lr_decay_style") == "wsd" else ABSENT


def _read_axolotl_min_lr(values: Values, known: Known) -> Any:
    ratio = first_given(values, ("cosine_min_lr_ratio", "lr_scheduler_kwargs.min_lr_ratio"))
    if "lr" not in known:
        raise NoCounterpart(f"{ratio} * learning rate, which is not given")
    peak = known["lr"]
    return Changed(rounded(number(ratio) * peak), f"{ratio} * peak {peak:g} = {number(ratio) * peak:g}")


def _write_axolotl_min_lr(value: float, known: Known) -> Any:
    style, peak = known.get("lr_decay_style"), known.get("lr", 0.0)
    if style in ("constant", "wsd") or not value:
        return {}
    if style == "cosine" and peak:
        return Changed({"cosine_min_lr_ratio": rounded(value / peak)}, f"{value:g} / peak {peak:g} = {value / peak:g}")
    return Changed({}, f"{value:g}: linear decays to 0 there")


def _read_axolotl_warmup(values: Values, known: Known) -> Any:
    steps = known.get("train_iters")
    if text(values.get("lr_scheduler", "")) == "constant":
        return 0  # transformers' schedule of that name has no warm-up
    given = first_given(values, ("warmup_steps", "warmup_ratio"))
    if given is ABSENT:
        if steps is None:
            raise NoCounterpart("warm-up of 3 % of the steps, which are not given: --lr-warmup-iters")
        return min(int(0.03 * steps), 100)
    share = number(given)
    if "warmup_steps" in values and share >= 1:
        return 2 if share == 1 else whole(given)
    if not share:
        return 0
    if steps is None:
        raise NoCounterpart(f"warm-up of {share:g} of the steps, which are not given: --lr-warmup-iters")
    return Changed(int(share * steps), f"{share:g} * {steps} steps = {int(share * steps)}")


def _nemo_default_warmup(known: Known) -> Any:
    if not _nemo_schedules(known):
        return 0
    steps = known.get("train_iters")
    return ABSENT if steps is None else min(1000, steps // 10)


def _read_megatron_warmup(values: Values, known: Known) -> Any:
    if "lr_warmup_iters" in values:
        return whole(values["lr_warmup_iters"])
    if "lr_warmup_fraction" in values:
        decay = known.get("lr_decay_iters", known.get("train_iters"))
        if decay is None:
            raise NoCounterpart("a fraction of --lr-decay-iters, which is not given: --lr-warmup-iters")
        steps = int(number(values["lr_warmup_fraction"]) * decay)
        return Changed(steps, f"{values['lr_warmup_fraction']} * {decay} steps = {steps}")
    return _steps(values["lr_warmup_samples"], known)


def _read_megatron_decay(name: str) -> Any:
    def read(values: Values, known: Known) -> Any:
        return whole(values[f"{name}_iters"]) if f"{name}_iters" in values else _steps(values[f"{name}_samples"], known)

    return read


def _write_peak_share(value: float, known: Known) -> Any:
    """The learning rate before the first step of the warm-up."""
    if not value or not known.get("lr_warmup_iters"):
        return {}
    return Changed({}, f"the warm-up starts at {value:g} there, at 0 here")


# ---------------------------------------------------------------------------------------------------
# Dtype


def _read_axolotl_dtype(values: Values, known: Known) -> str:
    def is_on(name: str) -> bool:
        return text(values.get(name, "false")).lower() not in ("false", "no", "off")

    if is_on("bf16") or is_on("bfloat16"):
        return "bf16"
    return "fp16" if is_on("fp16") or is_on("float16") else "fp32"


_DTYPES = {
    "bfloat16": "bf16",
    "torch.bfloat16": "bf16",
    "bf16": "bf16",
    "float32": "fp32",
    "torch.float32": "fp32",
    "fp32": "fp32",
    "float16": "fp16",
    "torch.float16": "fp16",
    "float64": "fp64",
}


def _write_axolotl_dtype(value: str, known: Known) -> Values:
    if value not in ("bf16", "fp16", "fp32"):
        raise NoCounterpart(f"{value}: Axolotl has bf16, fp16 and fp32")
    return {"bf16": value == "bf16", "fp16": value == "fp16"} | ({"float32": True} if value == "fp32" else {})


def _write_dtype(value: str, known: Known) -> Values:
    if value == "fp16":
        raise NoCounterpart("fp16 with a loss scale: use --dtype bf16")
    return {"dtype": value}


def _write_nemo_dtype(value: str, known: Known) -> Values:
    word = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16", "fp64": "float64"}[value]
    return {
        "distributed.mp_policy._target_": "torch.distributed.fsdp.MixedPrecisionPolicy",
        "distributed.mp_policy.param_dtype": word,
        "distributed.mp_policy.reduce_dtype": "float64" if value == "fp64" else "float32",
        "distributed.mp_policy.output_dtype": word,
    }


def _write_weights_dtype(value: str, known: Known) -> Any:
    if value in ("fp32", "fp64"):
        return {}
    return Changed({}, f"weights and moments in {value} there; fp32 weights and moments here")


# ---------------------------------------------------------------------------------------------------
# Recomputation and 8 bits


def _selective(write_full: Values, write_selective: Values, off: Values) -> Any:
    def write(value: str, known: Known) -> Any:
        if value == "selective":
            return Changed(write_selective, "selective: other activations are kept; the loss is the same")
        return write_full if value == "full" else off

    return write


def _read_nemo_recompute(values: Values, known: Known) -> str:
    word = text(values["distributed.activation_checkpointing"]).lower()
    if word == "selective":
        return "selective"
    return "full" if word in ("full", "true", "on", "yes", "enabled") else "none"


_OFFLOADS = ("offload", "offload_disk")


def _read_axolotl_recompute(values: Values, known: Known) -> Any:
    given = [text(value).lower() for name, value in values.items() if name != "selective_checkpointing"]
    if "selective_checkpointing" in values and text(values["selective_checkpointing"]).lower() != "false":
        return "selective"
    if any(word in _OFFLOADS for word in given):
        return Changed("full", "activations are computed again, not offloaded")
    return "full" if any(switch(word) for word in given) else "none"


def _read_megatron_recompute(values: Values, known: Known) -> Any:
    return text(values["recompute_granularity"]) if "recompute_granularity" in values else "selective"


def _read_megatron_fp8(values: Values, known: Known) -> Any:
    recipe = text(values.get("fp8_recipe", "delayed"))
    names = {"delayed": "delayed", "tensorwise": "current", "blockwise": "block"}
    if recipe not in names:
        raise NoCounterpart(f"recipe {recipe}: Pentagrid has delayed, current and block")
    return names[recipe]


def _write_document_ends(value: str, known: Known) -> Any:
    if known.get("packing") != "stream":
        return {}
    return Changed({}, "no label at an end of document there; one stream counts every label here")


_AXOLOTL_RECOMPUTE = _selective(
    {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "selective_checkpointing": True}, {}
)

TRAINING = [
    row(
        "lr",
        number,
        pentagrid=key("lr", parse=number, default=1e-3),
        nemo=key("optimizer.lr", "lr_scheduler.max_lr", parse=number, default=1e-3),
        axolotl="learning_rate",
        megatron="lr",
    ),
    row(
        "train_iters",
        whole,
        pentagrid=key("train_iters", parse=whole, default=200),
        nemo="step_scheduler.max_steps",
        axolotl="max_steps",
        megatron=Column(("train_iters", "train_samples"), _read_megatron_iters),
    ),
    row(
        "epochs",
        whole,
        nemo="step_scheduler.num_epochs",
        axolotl="num_epochs",
        pentagrid=Column((), None, _write_epochs),
    ),
    row(
        "seed",
        whole,
        pentagrid=key("seed", parse=whole, default=1234),
        nemo=key("seed", "rng.seed", parse=whole, default=42),
        axolotl=key("seed", parse=whole, default=42),
        megatron=key("seed", parse=whole, default=1234),
    ),
    row(
        "weight_decay",
        number,
        pentagrid=key("weight_decay", parse=number, default=0.1),
        nemo=Column(
            ("optimizer.weight_decay",),
            lambda values, known: number(values["optimizer.weight_decay"]),
            _write_decay("optimizer.weight_decay", "norms decay too there, matrices only here"),
            lambda known: 0.0 if text(known.get("optimizer_class", "AdamW")) == "Adam" else 0.01,
        ),
        axolotl=key("weight_decay", parse=number, default=0.0),
        megatron=key("weight_decay", parse=number, default=0.01),
    ),
    row(
        "optimizer",
        pentagrid=Column(("optimizer",), _read_optimizer, _write_optimizer, "AdamW"),
        nemo=Column(
            ("optimizer._target_",),
            _read_optimizer,
            _write_other_optimizer("optimizer._target_", "torch.optim.AdamW"),
        ),
        axolotl=Column(("optimizer",), _read_optimizer, _write_axolotl_optimizer, "adamw_torch_fused"),
        megatron=Column(("optimizer",), _read_megatron_optimizer, None, "AdamW"),
    ),
    row(
        "adam_beta1",
        number,
        pentagrid=key("adam_beta1", parse=number, default=0.9),
        nemo=_beta(0),
        axolotl=key("adam_beta1", parse=number, default=0.9),
        megatron=key("adam_beta1", parse=number, default=0.9),
    ),
    row(
        "adam_beta2",
        number,
        pentagrid=key("adam_beta2", parse=number, default=0.95),
        nemo=_beta(1),
        axolotl=key("adam_beta2", parse=number, default=0.999),
        megatron=key("adam_beta2", parse=number, default=0.999),
    ),
    row(
        "adam_eps",
        number,
        pentagrid=key("adam_eps", parse=number, default=1e-8),
        nemo=key("optimizer.eps", parse=number, default=1e-8),
        axolotl=key("adam_epsilon", parse=number, default=1e-8),
        megatron=key("adam_eps", parse=number, default=1e-8),
    ),
    row(
        "clip_grad",
        number,
        default=1.0,
        pentagrid="clip_grad",
        nemo="clip_grad_norm.max_norm",
        axolotl="max_grad_norm",
        megatron="clip_grad",
    ),
    row(
        "lr_decay_style",
        pentagrid=key("lr_decay_style", default="cosine"),
        nemo=key(
            "lr_scheduler.lr_decay_style",
            choices={"cosine": "cosine", "linear": "linear", "constant": "constant", "WSD": "wsd"},
            default=lambda known: "cosine" if _nemo_schedules(known) else "constant",
        ),
        axolotl=Column(("lr_scheduler",), key("lr_scheduler", choices=_STYLES).read, _write_axolotl_style, "cosine"),
        megatron=key(
            "lr_decay_style",
            choices={"cosine": "cosine", "linear": "linear", "constant": "constant", "WSD": "wsd"},
            default="linear",
        ),
    ),
    row(
        "min_lr",
        number,
        pentagrid=key("min_lr", parse=number, default=1e-4),
        nemo=key(
            "lr_scheduler.min_lr",
            parse=number,
            default=lambda known: rounded(known.get("lr", 1e-3) * 0.01) if _nemo_schedules(known) else ABSENT,
        ),
        axolotl=Column(
            ("cosine_min_lr_ratio", "lr_scheduler_kwargs.min_lr_ratio"),
            _read_axolotl_min_lr,
            _write_axolotl_min_lr,
            0.0,
        ),
        megatron=key("min_lr", parse=number, default=0.0),
    ),
    row(
        "lr_decay_iters",
        whole,
        pentagrid="lr_decay_iters",
        nemo="lr_scheduler.lr_decay_steps",
        axolotl=Column(
            (),
            None,
            lambda value, known: (
                {}
                if value == known.get("train_iters") or known.get("lr_decay_style") == "constant"
                else Changed({}, f"the decay ends at step {value} here, with the run there")
            ),
        ),
        megatron=Column(("lr_decay_iters", "lr_decay_samples"), _read_megatron_decay("lr_decay")),
    ),
    row(
        "lr_warmup_iters",
        whole,
        pentagrid=as_given(
            "lr_warmup_iters",
            lambda value, known: {"lr_warmup_iters": value},
            lambda known: min(20, known.get("lr_decay_iters", known.get("train_iters", 200)) // 10),
        ),
        nemo=key("lr_scheduler.lr_warmup_steps", parse=whole, default=_nemo_default_warmup),
        axolotl=Column(
            ("warmup_steps", "warmup_ratio", "lr_scheduler"),
            _read_axolotl_warmup,
            lambda value, known: {"warmup_steps": value},
            lambda known: _read_axolotl_warmup({}, known),
        ),
        megatron=Column(("lr_warmup_iters", "lr_warmup_fraction", "lr_warmup_samples"), _read_megatron_warmup, None, 0),
    ),
    row(
        "lr_warmup_init",
        number,
        pentagrid=Column((), None, _write_peak_share, 0.0),
        axolotl=Column((), None, _write_peak_share, 0.0),
        nemo=key(
            "lr_scheduler.init_lr",
            parse=number,
            default=lambda known: rounded(known.get("lr", 1e-3) * 0.1) if _nemo_schedules(known) else ABSENT,
        ),
        megatron=key("lr_warmup_init", parse=number, default=0.0),
    ),
    row(
        "lr_wsd_decay_iters",
        whole,
        pentagrid="lr_wsd_decay_iters",
        nemo="lr_scheduler.wsd_decay_steps",
        axolotl=Column(
            ("lr_scheduler_kwargs.num_decay_steps",),
            lambda values, known: whole(values["lr_scheduler_kwargs.num_decay_steps"]),
            lambda value, known: {},  # written with the schedule
        ),
        megatron=Column(("lr_wsd_decay_iters", "lr_wsd_decay_samples"), _read_megatron_decay("lr_wsd_decay")),
    ),
    row(
        "lr_wsd_decay_style",
        pentagrid=Column(
            (),
            None,
            only("linear", "{}: the decay of wsd is linear here", softly=True).write,
            lambda known: "linear" if known.get("lr_decay_style") == "wsd" else ABSENT,
        ),
        nemo=Column(
            ("lr_scheduler.lr_wsd_decay_style",),
            _read_wsd_style,
            lambda value, known: {"lr_scheduler.lr_wsd_decay_style": value},
        ),
        axolotl=Column(
            ("lr_scheduler_kwargs.decay_type",),
            _read_wsd_style,
            lambda value, known: {},  # written with the schedule
            lambda known: "cosine" if known.get("lr_decay_style") == "wsd" else ABSENT,
        ),
        megatron=Column(
            ("lr_wsd_decay_style",),
            _read_wsd_style,
            None,
            lambda known: "exponential" if known.get("lr_decay_style") == "wsd" else ABSENT,
        ),
    ),
    row(
        "dtype",
        pentagrid=Column(
            ("dtype",),
            lambda values, known: "bf16" if values["dtype"] == "auto" else values["dtype"],
            _write_dtype,
            "bf16",
        ),
        nemo=Column(
            ("distributed.mp_policy.param_dtype",),
            key("distributed.mp_policy.param_dtype", choices=_DTYPES).read,
            _write_nemo_dtype,
            "bf16",
        ),
        axolotl=Column(
            ("bf16", "bfloat16", "fp16", "float16", "float32"), _read_axolotl_dtype, _write_axolotl_dtype, "fp32"
        ),
        megatron=Column(("bf16", "fp16"), lambda values, known: "bf16" if "bf16" in values else "fp16", None, "fp32"),
    ),
    row(
        "weights_dtype",
        nemo=key(
            "model.torch_dtype",
            "model.dtype",
            choices={"float32": "fp32", **_DTYPES, "auto": "the checkpoint's dtype"},
            default="bf16",
        ),
        axolotl=Column((), None, lambda value, known: {}, lambda known: known.get("dtype", ABSENT)),
        megatron=Column((), None, None, "fp32"),
        pentagrid=Column(
            (), None, _write_weights_dtype, lambda known: "fp64" if known.get("dtype") == "fp64" else "fp32"
        ),
    ),
    row(
        "recompute",
        pentagrid=as_given(
            "recompute",
            _selective({"recompute": "full"}, {"recompute": "selective"}, {"recompute": "none"}),
            "none",
        ),
        nemo=Column(
            ("distributed.activation_checkpointing",),
            _read_nemo_recompute,
            _selective(
                {"distributed.activation_checkpointing": "full"},
                {"distributed.activation_checkpointing": "selective"},
                {"distributed.activation_checkpointing": False},
            ),
            "none",
        ),
        axolotl=Column(
            (
                "gradient_checkpointing",
                "selective_checkpointing",
                "fsdp_config.activation_checkpointing",
                "fsdp_config.fsdp_activation_checkpointing",
            ),
            _read_axolotl_recompute,
            _AXOLOTL_RECOMPUTE,
            "none",
        ),
        megatron=Column(("recompute_granularity", "recompute_activations"), _read_megatron_recompute, None, "none"),
    ),
    row(
        "fp8",
        pentagrid=as_given(
            "fp8",
            lambda value, known: {"fp8": value, "transformer_impl": "te"},
            "none",
        ),
        nemo=key("model.backend.te_fp8.recipe", choices={"current": "current", "block": "block"}),
        megatron=Column(("fp8_format", "fp8", "fp8_recipe"), _read_megatron_fp8),
        off="none",
    ),
    row(
        "compile",
        switch,
        pentagrid=key("compile", parse=switch, default=False),
        nemo=key("compile.enabled", "distributed.enable_compile", parse=switch),
        axolotl=key("torch_compile", parse=switch),
        off=False,
    ),
    row(
        "z_loss",
        number,
        pentagrid=key("z_loss", parse=number, default=0.0),
        off=0.0,
    ),
    row(
        "token_divisor",
        megatron=Column(("calculate_per_token_loss",), lambda values, known: "tokens", None, "means of microbatches"),
        pentagrid=only(
            "tokens",
            "{}: rows with fewer labels weigh more there; here every label of a step weighs the same",
            softly=True,
        ),
        off="tokens",
    ),
    row(
        "document_ends",
        megatron=Column(("eod_mask_loss",), lambda values, known: "masked"),
        pentagrid=Column((), None, _write_document_ends),
    ),
]
