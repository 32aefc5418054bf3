"""Rows of ranks, FSDP, attention over cp ranks, and pipeline stages."""

from __future__ import annotations

import math
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
    is_null,
    key,
    number,
    only,
    row,
    switch,
    text,
    whole,
    words,
)
from cp import support

# ---------------------------------------------------------------------------------------------------
# Ranks


def _read_world_size(values: Values, known: Known) -> int:
    return math.prod(whole(value) for value in values.values())


def _read_dp_shard(values: Values, known: Known) -> int:
    """NeMo's dp_size counts replicas and shards."""
    word = text(next(iter(values.values()))).lower()
    if word == "none" or int(word) <= 0:
        return -1
    replicas = known.get("dp_replicate_size", 1)
    if whole(word) % replicas:
        raise NoCounterpart(f"dp_size {word} is not a multiple of dp_replicate_size {replicas}")
    return whole(word) // replicas


def _write_dp_shard(value: int, known: Known) -> Values:
    return {} if value == -1 else {"distributed.dp_size": value * known.get("dp_replicate_size", 1)}


def _read_replicas(values: Values, known: Known) -> int:
    word = text(next(iter(values.values())))
    return 1 if word.lower() == "none" else whole(word)


def _write_sequence_parallel(value: bool, known: Known) -> Any:
    tp = known.get("tp_size", 1)
    return {} if value and tp == 1 else {"sequence_parallel": value}


def _write_strategy(value: str, known: Known) -> Any:
    notes = {
        "ddp": "DDP keeps a whole replica a rank; Pentagrid shards with FSDP2: --dp-replicate-size makes replicas",
        "fsdp1": "FSDP1; Pentagrid shards with FSDP2: the same sums in another order",
        "megatron_fsdp": "Megatron-FSDP; Pentagrid shards with FSDP2: the same sums in another order",
        "distributed_optimizer": "shards the optimizer only; FSDP2 shards weights too: the same sums in another order",
        "deepspeed": "DeepSpeed's file is not read; Pentagrid shards with FSDP2, as ZeRO 3",
    }
    return Changed({}, notes[value]) if value in notes else {}


def _read_axolotl_strategy(values: Values, known: Known) -> Any:
    if not is_null(values.get("deepspeed")):
        return "deepspeed"
    version = first_given(values, ("fsdp_version", "fsdp_config.fsdp_version", "fsdp_config.version"))
    if version is not ABSENT:
        return f"fsdp{whole(version)}"
    return "fsdp1" if has_section(known, "fsdp_config") or "fsdp" in values else "ddp"


def _write_axolotl_strategy(value: str, known: Known) -> Any:
    fsdp: Values = {
        "fsdp_version": 2,
        "fsdp_config.state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_config.auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_config.transformer_layer_cls_to_wrap": "Qwen3DecoderLayer"
        if known.get("qk_norm")
        else "LlamaDecoderLayer",
    }
    if value == "ddp":
        return {}
    return fsdp if value == "fsdp2" else Changed(fsdp, f"{value} becomes FSDP2")


def _read_megatron_strategy(values: Values, known: Known) -> str:
    names = {"use_torch_fsdp2": "fsdp2", "use_megatron_fsdp": "megatron_fsdp"}
    return next((name for flag, name in names.items() if flag in values), "distributed_optimizer")


RANKS = [
    row(
        "world_size",
        megatron=Column(("nproc_per_node", "nnodes"), _read_world_size),
        pentagrid=Column(()),
        nemo=Column(()),
        axolotl=Column(()),
    ),
    row(
        "pp_size",
        whole,
        default=1,
        pentagrid="pp_size",
        nemo="distributed.pp_size",
        axolotl=only(1, "Axolotl has no pipeline parallelism: {} stages do not fit"),
        megatron="pipeline_model_parallel_size",
    ),
    row(
        "tp_size",
        whole,
        default=1,
        pentagrid="tp_size",
        nemo="distributed.tp_size",
        axolotl="tensor_parallel_size",
        megatron="tensor_model_parallel_size",
    ),
    row(
        "cp_size",
        whole,
        default=1,
        pentagrid="cp_size",
        nemo="distributed.cp_size",
        axolotl=key("context_parallel_size", "sequence_parallel_degree", parse=whole, default=1),
        megatron="context_parallel_size",
    ),
    row(
        "dp_replicate_size",
        whole,
        default=1,
        pentagrid="dp_replicate_size",
        nemo=Column(
            ("distributed.dp_replicate_size",),
            _read_replicas,
            lambda value, known: {} if value == 1 else {"distributed.dp_replicate_size": value},
            1,
        ),
        axolotl="dp_replicate_size",
        megatron="num_distributed_optimizer_instances",
    ),
    row(
        "dp_shard_size",
        whole,
        pentagrid=key("dp_shard_size", parse=whole, default=-1),
        nemo=Column(("distributed.dp_size",), _read_dp_shard, _write_dp_shard, -1),
        axolotl=Column(
            ("dp_shard_size",),
            lambda values, known: whole(values["dp_shard_size"]),
            lambda value, known: {} if value == -1 else {"dp_shard_size": value},
            -1,
        ),
        megatron=only(-1, "{} shards"),
    ),
    row(
        "sequence_parallel",
        switch,
        pentagrid=as_given(
            "sequence_parallel",
            _write_sequence_parallel,
            lambda known: known.get("tp_size", 1) > 1,
        ),
        nemo=key("distributed.sequence_parallel", parse=switch, default=False),
        axolotl=only(False, "Axolotl has no switch for sequence parallelism of norms", softly=True),
        megatron=key("sequence_parallel", parse=switch, default=False),
    ),
    row(
        "strategy",
        pentagrid=Column((), None, _write_strategy, "fsdp2"),
        nemo=Column(
            ("distributed.strategy",),
            lambda values, known: text(values["distributed.strategy"]).lower(),
            lambda value, known: {"distributed.strategy": value if value in ("ddp", "megatron_fsdp") else "fsdp2"},
            "fsdp2",
        ),
        axolotl=Column(
            ("fsdp_version", "fsdp_config.fsdp_version", "fsdp_config.version", "fsdp", "deepspeed"),
            _read_axolotl_strategy,
            _write_axolotl_strategy,
            lambda known: "fsdp1" if has_section(known, "fsdp_config") else "ddp",
        ),
        megatron=Column(
            ("use_torch_fsdp2", "use_megatron_fsdp", "use_distributed_optimizer"), _read_megatron_strategy, None, "ddp"
        ),
    ),
    row(
        "reshard_after_forward",
        pentagrid=key("reshard_after_forward", default="auto"),
        nemo=key("distributed.reshard_after_forward", choices={"true": "on", "false": "off"}),
        axolotl=key(
            "fsdp_config.reshard_after_forward",
            "fsdp_config.fsdp_reshard_after_forward",
            choices={"true": "on", "false": "off"},
        ),
        megatron=key("torch_fsdp2_no_reshard_after_forward", choices={"true": "off"}),
        off="auto",
    ),
    row(
        "offload_params",
        switch,
        nemo=Column(
            ("distributed.offload_policy._target_",),
            lambda values, known: True,
            lambda value, known: (
                {"distributed.offload_policy._target_": "torch.distributed.fsdp.CPUOffloadPolicy"} if value else {}
            ),
        ),
        axolotl=key("fsdp_config.offload_params", "fsdp_config.fsdp_offload_params", parse=switch),
        pentagrid=only(False, "weights are not offloaded to host memory: more ranks, or --recompute full"),
        off=False,
    ),
    row(
        "distributed_timeout_minutes",
        number,
        pentagrid=key("distributed_timeout_minutes", parse=number, default=30.0),
        nemo=key("dist_env.timeout_minutes", parse=number),
        axolotl=key("ddp_timeout", parse=lambda value: int(number(value)), scale=60),
        megatron=key("distributed_timeout_minutes", parse=number, default=10.0),
    ),
]


# ---------------------------------------------------------------------------------------------------
# Attention over cp ranks, and stages: they need the sizes and the packing


def _read_pentagrid_cp(values: Values, known: Known) -> tuple[str, str]:
    backend = values.get("cp_backend", "auto")
    method = first_given(values, ("cp_comm_type", "ring_attn_func", "cp_rotate_method"))
    usual = {"ring": "zigzag", "pytorch": "allgather"}.get(backend, "p2p")
    return backend, usual if method is ABSENT else method


def _write_pentagrid_cp(value: tuple[str, str], known: Known) -> Any:
    backend, method = value
    if known.get("cp_size", 1) == 1 or value == ("auto", "p2p"):
        return {}
    if backend == "pytorch" and not _is_stream(known):
        return Changed(
            {"cp_backend": "native"},
            "PyTorch's context parallelism takes one stream only, and NeMo refuses packed rows with it; native keeps "
            "documents apart",
        )
    if method == support.methods(backend)[0]:
        return {"cp_backend": backend}  # so that --cp-backend on the command line is enough
    return {"cp_backend": backend, support.METHOD_FLAGS[backend].removeprefix("--").replace("-", "_"): method}


def _is_stream(known: Known) -> bool:
    return known.get("packing") == "stream"


def _write_axolotl_cp(value: tuple[str, str], known: Known) -> Any:
    if known.get("cp_size", 1) == 1:
        return {}
    target = "batch_ring" if _is_stream(known) else "varlen_llama3"
    meant = {"batch_ring": ("ring", "ring"), "varlen_llama3": ("ring", "llama3")}[target]
    found = {"ring_attn_func": target, "attn_implementation": "flash_attention_2"}
    if value == meant:
        return found
    return Changed(found, f"{' '.join(value)} becomes {target}: contiguous shards, not balanced")


def _write_nemo_cp(value: tuple[str, str], known: Known) -> Any:
    if known.get("cp_size", 1) == 1:
        return {}
    target = ("pytorch", "allgather") if _is_stream(known) else ("te", "p2p")
    found = {
        "model.backend._target_": "nemo_automodel.components.models.common.BackendConfig",
        "model.backend.attn": "sdpa" if _is_stream(known) else "te",
    }
    if value in (target, ("auto", "p2p")):
        return found
    return Changed(found, f"{' '.join(value)} becomes {' '.join(target)}, which NeMo chooses by the data's format")


def _read_nemo_cp(values: Values, known: Known) -> Any:
    if known.get("cp_size", 1) == 1:
        return ABSENT
    kind = text(first_given(values, ("model.backend.attn", "model.attn_implementation")) or "sdpa")
    if kind == "magi":
        raise NoCounterpart("magi: Pentagrid has native, te, ring and pytorch")
    return ("te", "p2p") if kind == "te" else ("pytorch", "allgather")


def _read_axolotl_cp(values: Values, known: Known) -> Any:
    if known.get("cp_size", 1) == 1:
        return ABSENT
    word = text(values.get("ring_attn_func", "batch_ring" if known.get("packing") == "none" else "varlen_llama3"))
    known_names = {
        "varlen_llama3": "llama3",
        "batch_ring": "ring",
        "varlen_ring": "ring",
        "varlen_zigzag": "zigzag",
        "batch_zigzag": "zigzag",
        "batch_stripe": "stripe",
    }
    if word not in known_names:
        raise NoCounterpart(f"{word} is none of {', '.join(known_names)}")
    return "ring", known_names[word]


def _read_megatron_cp(values: Values, known: Known) -> Any:
    kinds = {*words(values["cp_comm_type"])}
    if len(kinds) > 1:
        raise NoCounterpart(f"{' '.join(sorted(kinds))}: one kind for all layers here")
    return "te", {"allgather": "all_gather"}.get(kind := kinds.pop(), kind)


def _read_a2a_size(values: Values, known: Known) -> int:
    return whole(words(values["hierarchical_context_parallel_sizes"])[0])


_SCHEDULES = {"1f1b": "1f1b", "gpipe": "gpipe", "interleaved1f1b": "interleaved", "interleaved_1f1b": "interleaved"}


def _with_stages(column: Column) -> Column:
    """A key that means something only with pipeline stages."""

    def read(values: Values, known: Known) -> Any:
        assert column.read is not None
        return column.read(values, known) if known.get("pp_size", 1) > 1 else ABSENT

    def write(value: Any, known: Known) -> Any:
        assert column.write is not None
        return column.write(value, known) if known.get("pp_size", 1) > 1 else {}

    return Column(column.keys, read, write, column.default)


def _read_layers_per_stage(values: Values, known: Known) -> Any:
    layers, per_stage = known.get("num_layers"), whole(next(iter(values.values())))
    if layers is None:
        raise NoCounterpart(f"{per_stage} layers a stage: --virtual-stages needs the number of layers, --model DIR")
    stages = max(1, round(layers / (known["pp_size"] * per_stage)))
    if stages * known["pp_size"] * per_stage == layers:
        return stages
    return Changed(stages, f"{layers} layers / (pp {known['pp_size']} * {per_stage} a stage) is rounded to {stages}")


def _write_layers_per_stage(value: int, known: Known) -> Values:
    layers = known.get("num_layers", 0)
    return {"distributed.pipeline.layers_per_stage": -(-layers // (known["pp_size"] * value))} if layers else {}


def _read_virtual(values: Values, known: Known) -> Any:
    if "num_virtual_stages_per_pipeline_rank" in values:
        return whole(values["num_virtual_stages_per_pipeline_rank"])
    return _read_layers_per_stage(values, known)


ATTENTION = [
    row(
        "cp_method",
        pentagrid=Column(
            ("cp_backend", "cp_comm_type", "ring_attn_func", "cp_rotate_method"),
            _read_pentagrid_cp,
            _write_pentagrid_cp,
            ("auto", "p2p"),
        ),
        nemo=Column(
            ("model.backend.attn", "model.attn_implementation"),
            _read_nemo_cp,
            _write_nemo_cp,
            lambda known: _read_nemo_cp({}, known),
        ),
        axolotl=Column(
            ("ring_attn_func",), _read_axolotl_cp, _write_axolotl_cp, lambda known: _read_axolotl_cp({}, known)
        ),
        megatron=Column(
            ("cp_comm_type",),
            _read_megatron_cp,
            None,
            lambda known: ("te", "p2p") if known.get("cp_size", 1) > 1 else ABSENT,
        ),
    ),
    row(
        "heads_k_stride",
        whole,
        pentagrid="heads_k_stride",
        axolotl="heads_k_stride",
    ),
    row(
        "cp_a2a_size",
        whole,
        pentagrid="cp_a2a_size",
        megatron=Column(("hierarchical_context_parallel_sizes",), _read_a2a_size),
    ),
    row(
        "pp_schedule",
        pentagrid=_with_stages(key("pp_schedule", default="1f1b")),
        nemo=_with_stages(key("distributed.pipeline.pp_schedule", choices=_SCHEDULES, default="1f1b")),
        megatron=Column(
            (),
            None,
            None,
            lambda known: (
                "interleaved"
                if {"num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"} & known["keys"]
                else ABSENT
            ),
        ),
        off="1f1b",
    ),
    row(
        "virtual_stages",
        whole,
        pentagrid=_with_stages(key("virtual_stages", parse=whole, default=1)),
        nemo=_with_stages(
            Column(("distributed.pipeline.layers_per_stage",), _read_layers_per_stage, _write_layers_per_stage)
        ),
        megatron=Column(
            ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"), _read_virtual
        ),
        off=1,
    ),
    row("first_stage_layers", whole, pentagrid="first_stage_layers", megatron="decoder_first_pipeline_num_layers"),
    row("last_stage_layers", whole, pentagrid="last_stage_layers", megatron="decoder_last_pipeline_num_layers"),
]
