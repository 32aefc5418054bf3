"""Rows of the model's shape: keys of a Hugging Face config.json stand in a section of other suites."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from config.peers.columns import (
    ABSENT,
    Column,
    Concept,
    From,
    Known,
    NoCounterpart,
    Values,
    as_given,
    first_given,
    key,
    must_be,
    number,
    only,
    row,
    switch,
    text,
    whole,
    words,
)

# ---------------------------------------------------------------------------------------------------
# Model


def _read_architecture(values: Values, known: Known) -> Any:
    """From model_type, architectures, or the class that a recipe names; only dense models of Llama's kind."""
    found = ABSENT
    for word in (word.rsplit(".", 1)[-1] for value in values.values() for word in words(value)):
        kind = re.sub(r"(ForCausalLM|Config)$", "", word).lower()
        if kind in ("llama", "mistral", "smollm", "qwen3"):
            found = kind == "qwen3"
        elif kind not in ("autoconfig", "from_pretrained", "automodel", "autotokenizer"):
            raise NoCounterpart(
                f"{word}: Pentagrid's GPT is dense, with RMSNorm, SwiGLU, rotary positions and no biases (Llama, Qwen3)"
            )
    return found


def _read_hf_rope(values: Values, known: Known) -> Any:
    kind = first_given(values, ("rope_scaling.rope_type", "rope_scaling.type", "rope_parameters.rope_type"))
    if kind is ABSENT or kind == "default":
        return "none"
    if kind not in ("linear", "llama3"):
        raise NoCounterpart(f"rotary scaling {kind}: Pentagrid has linear and llama3")
    if kind == "llama3":
        for name, usual in (("low_freq_factor", 1.0), ("high_freq_factor", 4.0)):
            given = first_given(values, (f"rope_scaling.{name}", f"rope_parameters.{name}"))
            if given is not ABSENT and number(given) != usual:
                raise NoCounterpart(f"{name} {given}: Pentagrid has {usual}")
    return kind


def _write_hf_rope(value: str, known: Known) -> Values:
    if value == "none":
        return {}
    found: Values = {
        "rope_parameters.rope_type": value,
        "rope_parameters.factor": known.get("rope_scaling_factor", 8.0),
        "rope_parameters.rope_theta": known.get("rotary_base", 10000.0),
    }
    if value == "llama3":
        length = known.get("rope_original_seq_length", 8192)
        return found | {
            "rope_parameters.original_max_position_embeddings": length,
            "rope_parameters.low_freq_factor": 1.0,
            "rope_parameters.high_freq_factor": 4.0,
        }
    return found


def _hf_rope_number(name: str, parse: Any) -> Column:
    return Column(
        (f"rope_scaling.{name}", f"rope_parameters.{name}"),
        lambda values, known: (
            parse(next(iter(values.values()))) if known.get("rope_scaling", "none") != "none" else ABSENT
        ),
        lambda value, known: {},  # written with the kind of scaling
    )


def _rope_number(name: str) -> Column:
    """Pentagrid's flag, written where a scaling reads it."""
    readers = ("llama3",) if name == "rope_original_seq_length" else ("linear", "llama3")
    return as_given(name, lambda value, known: {name: value} if known.get("rope_scaling", "none") in readers else {})


def _megatron_ffn(known: Known) -> Any:
    hidden = known.get("hidden_size")
    if hidden is None:
        return ABSENT
    return int((4 * hidden * 2 / 3) / 64) * 64 if "swiglu" in known["keys"] else 4 * hidden


_LLAMA = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 11008,
    "num_attention_heads": 32,
    "rotary_base": 10000.0,
    "norm_epsilon": 1e-6,
    "tie_embeddings": False,
    "init_method_std": 0.02,
    "vocab_size": 32000,
}
# What a class of transformers has for a value that a recipe leaves out.
_CLASSES = {
    "LlamaConfig": _LLAMA,
    "MistralConfig": _LLAMA | {"ffn_hidden_size": 14336, "num_query_groups": 8},
    "Qwen3Config": _LLAMA
    | {"ffn_hidden_size": 22016, "num_query_groups": 32, "kv_channels": 128, "vocab_size": 151936},
}


def _with_class(concept: Concept) -> Concept:
    """The row, with the value of the class that NeMo's `model.config._target_` names."""

    def default(known: Known) -> Any:
        config_class = known.get("config_class", "").rsplit(".", 1)[-1]
        if config_class not in _CLASSES:
            return ABSENT
        computed = {
            "num_query_groups": known.get("num_attention_heads"),
            "kv_channels": known.get("hidden_size", 0) // known.get("num_attention_heads", 1),
        }
        value = (computed | _CLASSES[config_class]).get(concept.name)
        return ABSENT if value is None else From(value, f"{config_class}'s default")

    if "hf" not in concept.columns:
        return concept
    return replace(concept, columns={**concept.columns, "nemo": replace(concept.columns["nemo"], default=default)})


_MODEL_DIFFERS = "{}: another model; Pentagrid's GPT has "

_ROWS = [
    row(
        "qk_norm",
        hf=Column(
            ("_target_", "model_type", "architectures"),
            _read_architecture,
            lambda value, known: {"_target_": "transformers.Qwen3Config" if value else "transformers.LlamaConfig"},
        ),
        axolotl=Column(
            tuple(
                f"{section}.{name}"
                for section in ("model_config", "overrides_of_model_config")
                for name in ("model_type", "architectures")
            ),
            _read_architecture,
            lambda value, known: {},  # the folder of base_model names the class
        ),
        pentagrid=key("qk_norm", parse=switch, default=False),
        megatron=key("qk_layernorm", parse=switch, default=False),
    ),
    row("num_layers", whole, pentagrid="num_layers", hf="num_hidden_layers", megatron="num_layers"),
    row("hidden_size", whole, pentagrid="hidden_size", hf="hidden_size", megatron="hidden_size"),
    row(
        "ffn_hidden_size",
        whole,
        pentagrid="ffn_hidden_size",
        hf="intermediate_size",
        megatron=key("ffn_hidden_size", parse=whole, default=_megatron_ffn),
    ),
    row(
        "num_attention_heads",
        whole,
        pentagrid="num_attention_heads",
        hf="num_attention_heads",
        megatron="num_attention_heads",
    ),
    row(
        "num_query_groups",
        whole,
        pentagrid="num_query_groups",
        hf="num_key_value_heads",
        megatron=Column(
            ("num_query_groups",),
            lambda values, known: whole(values["num_query_groups"]),
            None,
            lambda known: known.get("num_attention_heads", ABSENT),
        ),
    ),
    row("kv_channels", whole, pentagrid="kv_channels", hf="head_dim", megatron="kv_channels"),
    row(
        "rotary_base",
        number,
        pentagrid="rotary_base",
        hf=key("rope_theta", "rope_parameters.rope_theta", parse=number),
        megatron=key("rotary_base", parse=number, default=10000.0),
    ),
    row(
        "rope_scaling",
        pentagrid="rope_scaling",
        hf=Column(
            tuple(
                f"{section}.{name}"
                for section in ("rope_scaling", "rope_parameters")
                for name in ("rope_type", "type", "low_freq_factor", "high_freq_factor")
            ),
            _read_hf_rope,
            _write_hf_rope,
        ),
        megatron=Column(("use_rope_scaling",), lambda values, known: "llama3", None, "none"),
        off="none",
    ),
    row(
        "rope_scaling_factor",
        number,
        pentagrid=_rope_number("rope_scaling_factor"),
        hf=_hf_rope_number("factor", number),
        megatron=key("rope_scaling_factor", parse=number),
    ),
    row(
        "rope_original_seq_length",
        whole,
        pentagrid=_rope_number("rope_original_seq_length"),
        hf=_hf_rope_number("original_max_position_embeddings", whole),
    ),
    row(
        "norm_epsilon",
        number,
        pentagrid="norm_epsilon",
        hf="rms_norm_eps",
        megatron=key("norm_epsilon", "layernorm_epsilon", parse=number, default=1e-5),
    ),
    row(
        "tie_embeddings",
        switch,
        pentagrid="tie_embeddings",
        hf="tie_word_embeddings",
        megatron=Column(("untie_embeddings_and_output_weights",), lambda values, known: False, None, True),
    ),
    row(
        "init_method_std",
        number,
        pentagrid="init_method_std",
        hf="initializer_range",
        megatron=key("init_method_std", parse=number, default=0.02),
    ),
    row(
        "hidden_dropout",
        number,
        pentagrid="hidden_dropout",
        megatron=key("hidden_dropout", parse=number, default=0.1),
        nemo=only(0.0, "dropout {}: models of NeMo AutoModel have none after MLP and embedding"),
        axolotl=only(0.0, "dropout {}: models of transformers have none after MLP and embedding"),
        off=0.0,
    ),
    row(
        "attention_dropout",
        number,
        pentagrid="attention_dropout",
        hf="attention_dropout",
        megatron=key("attention_dropout", parse=number, default=0.1),
        off=0.0,
    ),
    row(
        "make_vocab_size_divisible_by",
        whole,
        pentagrid="make_vocab_size_divisible_by",
        megatron=key("make_vocab_size_divisible_by", parse=whole, default=128),
        nemo=only(
            1,
            "the vocabulary is padded to a multiple of {} here; set model.config.vocab_size",
            softly=True,
            reads=False,
        ),
        axolotl=only(
            1,
            "the vocabulary is padded to a multiple of {} here; there as the model folder's",
            softly=True,
            reads=False,
        ),
    ),
    row(
        "vocab_size",
        whole,
        pentagrid="vocab_size",
        hf="vocab_size",
        megatron="vocab_size",
    ),
    row(
        "max_position_embeddings",
        whole,
        hf="max_position_embeddings",
        megatron="max_position_embeddings",
        pentagrid=Column((), None, lambda value, known: {}),  # rotary positions have no table
    ),
    row(
        "activation",
        hf=must_be("hidden_act", "silu", _MODEL_DIFFERS + "SwiGLU (silu)"),
        megatron=Column(
            ("swiglu",), lambda values, known: "silu", None, lambda known: "gelu" if "num_layers" in known else ABSENT
        ),
        pentagrid=only("silu", _MODEL_DIFFERS + "SwiGLU; there --swiglu"),
        off="silu",
    ),
    row(
        "normalization",
        megatron=Column(
            ("normalization",),
            lambda values, known: text(values["normalization"]),
            None,
            lambda known: "LayerNorm" if "num_layers" in known else ABSENT,
        ),
        pentagrid=only("RMSNorm", _MODEL_DIFFERS + "RMSNorm; there --normalization RMSNorm"),
        off="RMSNorm",
    ),
    row(
        "position_embedding",
        megatron=Column(
            ("position_embedding_type", "use_rotary_position_embeddings"),
            lambda values, known: text(values.get("position_embedding_type", "rope")),
            None,
            lambda known: "learned_absolute" if "num_layers" in known else ABSENT,
        ),
        pentagrid=only("rope", _MODEL_DIFFERS + "rotary positions; there --position-embedding-type rope"),
        off="rope",
    ),
    row(
        "rotary_percent",
        number,
        megatron=key("rotary_percent", parse=number, default=1.0),
        pentagrid=only(1.0, _MODEL_DIFFERS + "rotary positions on all channels of a head"),
        off=1.0,
    ),
    row(
        "linear_biases",
        switch,
        hf=key("attention_bias", "mlp_bias", parse=switch),
        megatron=Column(
            ("disable_bias_linear",),
            lambda values, known: False,
            None,
            lambda known: True if "num_layers" in known else ABSENT,
        ),
        pentagrid=only(False, "biases in linear layers: another model; Pentagrid's GPT has none"),
        off=False,
    ),
]
MODEL = [_with_class(concept) for concept in _ROWS]
