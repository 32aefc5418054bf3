"""`config.json` of a Hugging Face model and our `GPTConfig`, both ways; what either side lacks is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from model.config import GPTConfig, padded_vocab_size
from model.rope import LLAMA3_TURNS
from utils.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MAX_SIZE = 1 << 31  # of a dimension or a count: no model comes near
VOCABULARY_UNIT = 128  # the default of --make-vocab-size-divisible-by
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
NO_SAMPLING = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
UNUSED_ROPE_KEYS = {"original_max_position_embeddings"}  # of other types: transformers does not read the key there
# Model types that are refused, and what they have that our model lacks.
LACKING = {
    "qwen2": "biases in attention",
    "phi": "biases and a parallel MLP",
    "gpt2": "learned positions and biases",
    "mixtral": "a mixture of experts",
    "qwen2_moe": "a mixture of experts",
    "qwen3_moe": "a mixture of experts",
    "gemma": "scaled embeddings and norms by 1 + weight",
    "gemma2": "scaled embeddings, sliding windows and capped logits",
    "gemma3_text": "scaled embeddings and sliding windows",
    "smollm3": "layers without rotary positions",
    "deepseek_v3": "latent attention and a mixture of experts",
}
# Keys whose value must be the one here, where they are given, and what another value means.
REQUIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "an MLP other than SwiGLU"),
    "attention_bias": ((False, None), "biases in attention"),
    "mlp_bias": ((False, None), "biases in the MLP"),
    "use_sliding_window": ((False, None), "sliding windows"),
    "quantization_config": ((None,), "quantized weights"),
    "num_experts": ((None, 0), "a mixture of experts"),
    "num_local_experts": ((None, 0), "a mixture of experts"),
    "auto_map": ((None,), "code of its own"),
    "partial_rotary_factor": ((None, 1, 1.0), "rotary positions on a part of each head"),
    "is_encoder_decoder": ((None, False), "an encoder"),
}


def _show(value: Any) -> str:
    """A value of a config.json for a message: at most 100 characters. reprlib cuts no nested mapping to a length."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def write_config(config: GPTConfig, *, max_positions: int, bos: int | None, eod: int, dtype: str) -> dict[str, Any]:
    """Return config.json for our model, with keys that transformers 4 and 5 read.

    Args:
        max_positions: tokens of a sample in training.
        bos: id of the token that the tokenizer puts before a text; None: it puts none.
        eod: id of the end-of-document token, which also starts a text without prompt.
        dtype: of the weights, such as `float32`.

    Raises:
        UserError: the architecture cannot express the model.
    """
    kind = "qwen3" if config.qk_norm else "llama"
    if kind == "llama" and config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"--hidden-size {config.hidden_size}: LlamaForCausalLM takes only multiples of the "
            f"{config.num_attention_heads} query heads"
        )
    scaling: dict[str, Any] | None = None
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling, "factor": float(config.rope_scaling_factor)}
    if scaling and config.rope_scaling == "llama3":
        low, high = LLAMA3_TURNS
        scaling |= {"low_freq_factor": low, "high_freq_factor": high}
        scaling["original_max_position_embeddings"] = config.rope_original_seq_length
    said = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": float(config.norm_epsilon),
        "rope_theta": float(config.rotary_base),
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eod,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    return said | ({"use_sliding_window": False} if kind == "qwen3" else {"mlp_bias": False})


def read_config(said: Any, where: str) -> GPTConfig:
    """Return our model for the content of a config.json.

    Args:
        where: the file, for errors.

    Raises:
        UserError: not the configuration of a model, or of one that ours cannot express.
    """
    if not isinstance(said, dict) or not isinstance(said.get("model_type"), str):
        raise UserError(f"{where}: not the configuration of a Hugging Face model (no model_type)")
    kind = said["model_type"]
    if kind not in ARCHITECTURES:
        why = f" has {LACKING[kind]}, which our model lacks" if kind in LACKING else " is not supported"
        raise UserError(f"{where}: model_type {_show(kind)}{why}; supported: {', '.join(ARCHITECTURES)}")
    for key, (allowed, meaning) in REQUIRED.items():
        value = said.get(key)
        if key in said and not any(value == one and type(value) is type(one) for one in allowed):
            raise UserError(f"{where}: {key} {_show(value)}: {meaning}, which our model lacks")
    _check_windows(said, kind, where)
    named = said.get("architectures")
    if named not in (None, [], [ARCHITECTURES[kind]]):
        raise UserError(f"{where}: architectures {_show(named)}: only {ARCHITECTURES[kind]} is supported")
    hidden, heads = _count(said, "hidden_size", where), _count(said, "num_attention_heads", where)
    # What transformers takes where a key is missing; None: it differs between versions or models.
    default_groups = heads if kind == "llama" else None
    default_head = None if kind == "qwen3" or hidden % heads else hidden // heads
    groups = _count(said, "num_key_value_heads", where, default_groups)
    head = _count(said, "head_dim", where, default_head)
    vocab_size = _count(said, "vocab_size", where)
    if heads % groups:
        raise UserError(f"{where}: num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    if head % 2:
        raise UserError(f"{where}: head_dim {head} is odd; rotary positions turn pairs of channels")
    tied = said.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"{where}: tie_word_embeddings {_show(tied)}: must be true or false")
    return GPTConfig(
        num_layers=_count(said, "num_hidden_layers", where),
        hidden_size=hidden,
        ffn_hidden_size=_count(said, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head,
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size(vocab_size, VOCABULARY_UNIT),
        norm_epsilon=_positive(said, "rms_norm_eps", where, 1e-6),
        qk_norm=kind == "qwen3",
        tie_embeddings=tied,
        init_std=_positive(said, "initializer_range", where, 0.02),
        **_read_rope(said, where),
    )


def read_positions(said: Mapping[str, Any], where: str) -> int | None:
    """`max_position_embeddings`; None: not given. Raises UserError: no number of positions."""
    key = "max_position_embeddings"
    return None if said.get(key) is None else _count(said, key, where)


def list_ends(said: Mapping[str, Any]) -> list[Any]:
    """`eos_token_id` as a list, of which the first ends a document; empty: not given."""
    ends = said.get("eos_token_id")
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def describe_generation(said: Mapping[str, Any]) -> list[str]:
    """Lines for the values of a generation_config.json: what tools/generate.py has, and what it lacks."""
    given = {name: value for name, value in said.items() if value is not None and name not in NO_SAMPLING}
    samples, lines = given.pop("do_sample", False) is True, []
    flags = {"temperature": "--temperature", "top_p": "--top-p"} if samples else {}
    words = [f"{flag} {_show(given.pop(name))}" for name, flag in flags.items() if name in given]
    if samples:
        lines.append(f"generation_config.json: tools/generate.py {' '.join(words) or '--temperature 1'}")
    if given:
        others = ", ".join(f"{name} {_show(value)}" for name, value in given.items())
        lines.append(f"generation_config.json: not kept: {others}")
    return lines


def describe_lost(said: Mapping[str, Any], *, ends: list[Any], bos: int | None, eod: int) -> list[str]:
    """One line for each value of a config.json that an imported run does not have.

    Args:
        ends: ids of tokens that end a text, in config.json or generation_config.json.
        bos: id of the token that the tokenizer's template puts before a text; None: no such template.
        eod: id of the run's end-of-document token.
    """
    lines = []
    if others := [end for end in ends if end != eod]:
        lines.append(
            f"eos_token_id: {eod} ends a document; not kept: {_show(others)[1:-1]}; after an export add to "
            "eos_token_id in generation_config.json"
        )
    if (start := said.get("bos_token_id")) is not None:
        kept = "export --keep-template writes the token again" if start == bos else "not kept; the tokenizer adds none"
        lines.append(f"bos_token_id {_show(start)}: runs train without, unless --bos is given; {kept}")
    if rate := said.get("attention_dropout"):
        lines.append(f"attention_dropout {_show(rate)}: not kept; train.py has --attention-dropout, default 0")
    return lines


def model_flags(config: GPTConfig) -> dict[str, Any]:
    """Return the flags, by field name of `ModelConfig`, that make train.py build this model with any tokenizer."""
    values = {name: value for name, value in asdict(config).items() if not name.endswith("_dropout")}
    values["init_method_std"] = values.pop("init_std")
    del values["padded_vocab_size"]
    values["make_vocab_size_divisible_by"] = VOCABULARY_UNIT
    if config.rope_scaling == "none":
        del values["rope_scaling_factor"]
    if config.rope_scaling != "llama3":
        del values["rope_original_seq_length"]
    return values


def _count(said: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A size or a number of things: 1 to `MAX_SIZE`; a missing or null key is the default, without one an error."""
    value = default if said.get(key) is None else said[key]
    if value is None:
        raise UserError(f"{where}: has no {key}")
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise UserError(f"{where}: {key} {_show(value)}: must be a whole number from 1 to {MAX_SIZE}")
    return value


def _positive(said: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = default if said.get(key) is None else said[key]
    if value is None:
        raise UserError(f"{where}: has no {key}")
    if type(value) not in (int, float) or not 0 < value < 1e30 or not math.isfinite(value):
        raise UserError(f"{where}: {key} {_show(value)}: must be a number above 0")
    return float(value)


def _check_windows(said: Mapping[str, Any], kind: str, where: str) -> None:
    """Refuse attention over a window. Raises UserError."""
    window = said.get("sliding_window", 4096 if kind == "mistral" else None)  # transformers' default of Mistral
    if kind == "mistral" and window is not None:
        raise UserError(
            f"{where}: sliding_window {_show(window)}: attention over a window, which our model lacks; only null "
            "is supported"
        )
    layers = said.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise UserError(f"{where}: layer_types: sliding windows in some layers, which our model lacks")


def _read_rope(said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rotary fields of GPTConfig, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    newer, older = said.get("rope_parameters"), said.get("rope_scaling")
    for key, value in (("rope_parameters", newer), ("rope_scaling", older)):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{where}: {key} {_show(value)}: must be a mapping")
    if newer and older and newer != older:
        raise UserError(f"{where}: rope_parameters and rope_scaling differ; remove one")
    scaling: dict[str, Any] = dict(newer or older or {})
    names = {scaling.pop(key) for key in ("rope_type", "type") if isinstance(scaling.get(key), str)} or {"default"}
    base = _positive({"rope_theta": said.get("rope_theta")} | scaling, "rope_theta", where, 10000.0)
    scaling.pop("rope_theta", None)
    if scaling.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise UserError(
            f"{where}: partial_rotary_factor: rotary positions on a part of each head, which our model lacks"
        )
    read: dict[str, Any] = {"rotary_base": base}
    known: dict[str, set[str]] = {"default": set(), "linear": {"factor"}, "llama3": set(LLAMA3_KEYS)}
    name = names.pop()
    if names or name not in known:
        raise UserError(
            f"{where}: rope_type {_show(name)} is not supported; supported: {', '.join(known)} "
            "(--rope-scaling none, linear, llama3)"
        )
    if unknown := sorted(set(scaling) - known[name] - UNUSED_ROPE_KEYS):
        raise UserError(f"{where}: rope_type {name} with {_show(unknown[0])}, which our model lacks")
    if name == "default":
        return read
    read |= {"rope_scaling": name, "rope_scaling_factor": _positive(scaling, "factor", where)}
    if read["rope_scaling_factor"] < 1:
        raise UserError(f"{where}: rope_type {name} with factor {read['rope_scaling_factor']}: must be 1 or more")
    if name == "llama3":
        outer, inner = said.get(LLAMA3_KEYS[3]), scaling.get(LLAMA3_KEYS[3])
        if None not in (outer, inner) and outer != inner:  # transformers 4 takes the inner one, 5 the outer one
            raise UserError(
                f"{where}: {LLAMA3_KEYS[3]} is {_show(outer)}, and {_show(inner)} in the rotary scaling; remove one"
            )
        scaling[LLAMA3_KEYS[3]] = inner if outer is None else outer
        turns = tuple(_positive(scaling, key, where) for key in LLAMA3_KEYS[1:3])
        if turns != LLAMA3_TURNS:
            raise UserError(f"{where}: llama3 scaling with frequency factors {turns}; our model has {LLAMA3_TURNS}")
        read["rope_original_seq_length"] = _count(scaling, LLAMA3_KEYS[3], where)
    return read
