"""Rows of weights, tokenizer, data and samples."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

from config.peers.columns import (
    ABSENT,
    Changed,
    Column,
    From,
    Known,
    NoCounterpart,
    Values,
    as_given,
    data_parallel_size,
    first_given,
    key,
    number,
    only,
    row,
    switch,
    text,
    whole,
    words,
)

# ---------------------------------------------------------------------------------------------------
# Weights, tokenizer and data


def is_hub_name(name: str) -> bool:
    """`owner/name` of a hub, and no folder here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith(".") and not os.path.lexists(name)


def _write_hf_model(value: str, known: Known) -> Any:
    if "num_layers" not in known and "folder" not in known:
        raise NoCounterpart(f"shape of {value}: give the folder with its config.json, --model DIR")
    if known.get("from_scratch") or "num_layers" not in known:
        return {}
    folder = known.get("folder", value)
    return Changed(
        {},
        f"starts from weights: tools/convert_hf.py import --input {folder} --output RUN, then --load RUN "
        "--load-weights-only",
    )


def _write_nemo_model(value: str, known: Known) -> Values:
    if known.get("from_scratch"):
        return {
            "model._target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
            "model.config._target_": "transformers.AutoConfig.from_pretrained",
            "model.config.pretrained_model_name_or_path": value,
        }
    return {
        "model._target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
        "model.pretrained_model_name_or_path": value,
    }


def _default_tokenizer(known: Known) -> Any:
    return From(known["hf_model"], f"the tokenizer of {known['hf_model']}") if "hf_model" in known else ABSENT


def _write_end(value: str, known: Known) -> Values:
    if "hf_model" in known:
        return {}  # its config.json names the end
    raise NoCounterpart("config.json names the end there: give --model DIR")


def _write_reinit(value: bool, known: Known) -> Any:
    found = {"reinit_weights": value}
    if value:
        return found
    return Changed(found, f"training starts from the weights in {known.get('hf_model')}; true starts from scratch")


def _write_nemo_from_scratch(value: bool, known: Known) -> Values:
    if "hf_model" in known:
        return {}
    return {"model._target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config"}


def _read_from_scratch(values: Values, known: Known) -> Any:
    target = text(values["model._target_"])
    if target.endswith((".from_config", ".from_pretrained")):
        if "CausalLM" not in target:
            raise NoCounterpart(f"{target.rsplit('.', 2)[-2]}: Pentagrid trains causal language models of text")
        return target.endswith(".from_config")
    raise NoCounterpart(
        f"{target}: not a model of config.json; Pentagrid's GPT has RMSNorm, SwiGLU and rotary positions"
    )


def _write_tokenizer(value: str, known: Known) -> Any:
    if value.endswith((".json", ".model")):
        return {"tokenizer_model": value}
    if value == known.get("hf_model") and known.get("folder_tokenizer"):
        return known["folder_tokenizer"]
    if is_hub_name(value):
        raise NoCounterpart(f"{value} is a name of the hub: download its tokenizer.json and give --tokenizer-model")
    return {"tokenizer_model": str(Path(value, "tokenizer.json"))}


def _write_folder_of_tokenizer(name: str, extra: Values) -> Any:
    def write(value: str, known: Known) -> Values:
        folder = str(Path(value).parent) if value.endswith("tokenizer.json") else value
        return {name: folder} | extra

    return write


def _read_megatron_tokenizer(values: Values, known: Known) -> Any:
    kind = text(values.get("tokenizer_type", ""))
    if kind in ("NullTokenizer", "NullMultimodalTokenizer"):
        raise NoCounterpart(f"{kind} of N tokens: give --vocab-size N + 1 and --eod-id N")
    file = text(values.get("vocab_file" if kind == "GPT2BPETokenizer" else "tokenizer_model", ""))
    if not file:
        raise NoCounterpart(f"{kind or 'tokenizer'}: give --tokenizer-model, a tokenizer.json or SentencePiece model")
    return file


PLAIN_TEXT = ("pretrain", "completion", "pretraining")
LOADERS = ("json", "text", "parquet", "csv", "arrow")


def _read_axolotl_data(values: Values, known: Known) -> Any:
    """Paths of plain text in `datasets` or `pretraining_dataset`."""
    entries = next(iter(values.values()))
    paths: list[str] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or "path" not in entry:
            raise NoCounterpart("entries without path")
        kind = entry.get("type", "pretrain" if "pretraining_dataset" in values else "")
        if kind not in PLAIN_TEXT:
            raise NoCounterpart(
                f"{text(entry['path'])} of type {kind or 'conversation'}: Pentagrid trains on plain text; write the "
                "rendered conversations to JSON lines"
            )
        files = entry.get("data_files")
        if files is not None and (entry["path"] in LOADERS or not is_hub_name(text(entry["path"]))):
            paths += words(files)
        elif is_hub_name(text(entry["path"])):
            raise NoCounterpart(
                f"{entry['path']} is a data set of the hub: download it and give the folder, --data-path"
            )
        else:
            paths.append(text(entry["path"]))
    extras = sorted({name for entry in entries if isinstance(entry, dict) for name in entry} - DATA_KEYS)
    return Changed(paths, f"{', '.join(extras)}: whole files are read") if extras else paths


DATA_KEYS = {"path", "type", "data_files", "field", "text_column", "ds_type"}


def _without_weights(paths: list[str]) -> tuple[list[str], bool]:
    """The paths of `W P W P`, and whether there were weights."""
    weights = len(paths) > 1 and len(paths) % 2 == 0 and all(re.fullmatch(r"[\d.eE+-]+", word) for word in paths[::2])
    return (paths[1::2], True) if weights else (paths, False)


def _axolotl_entries(value: list[str], known: Known) -> list[Values]:
    entries: list[Values] = []
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".gz": "json", ".zst": "json"}
    for path in _without_weights(value)[0]:
        loader = kinds.get(Path(path).suffix)
        source: Values = {"path": loader, "data_files": path} if loader else {"path": path}
        entries.append(source | {"type": "completion", "field": known.get("json_key", "text")})
    return entries


def _write_axolotl_data(name: str) -> Any:
    def write(value: list[str], known: Known) -> Any:
        entries = _axolotl_entries(value, known)
        if name == "test_datasets":
            entries = [entry | {"split": "train"} for entry in entries]
        notes = ["weights of the blend are left out"] if _without_weights(value)[1] else []
        if any("data_files" not in entry for entry in entries):
            notes.append("Axolotl reads text, no prepared .bin/.idx corpora")
        return Changed({name: entries}, "; ".join(notes)) if notes else {name: entries}

    return write


def _read_json_key(values: Values, known: Known) -> Any:
    entries = next(iter(values.values()))
    names = {
        text(entry[name])
        for entry in (entries if isinstance(entries, list) else [entries])
        if isinstance(entry, dict)
        for name in ("field", "text_column")
        if name in entry
    }
    if len(names) > 1:
        raise NoCounterpart(f"fields {', '.join(sorted(names))}: --json-key is one for all sources")
    return names.pop() if names else ABSENT


MEGATRON_DATA = "nemo_automodel.components.datasets.llm.megatron_dataset.MegatronPretraining"


def _expand(paths: Any) -> Any:
    """NeMo takes one pattern of `.bin` and `.idx` files; `--data-path` takes their prefixes."""
    found = words(paths)
    if len(found) != 1 or not glob.has_magic(found[0]):
        return found
    files = [Path(file) for file in glob.glob(found[0]) if file.endswith((".bin", ".idx"))]
    if not files:
        raise NoCounterpart("no such .bin or .idx file here; --data-path takes their prefixes, not a pattern")
    prefixes = sorted({str(file.with_suffix("")) for file in files})
    return Changed(prefixes, f"the prefixes that match here: {len(prefixes)}")


def _read_nemo_data(values: Values, known: Known) -> Any:
    target = text(values.get("dataset._target_", "")).rsplit(".", 1)[-1]
    if "dataset.paths" in values and target in ("MegatronPretraining", "MegatronPretrainingConfig"):
        return _expand(values["dataset.paths"])
    raise NoCounterpart(
        f"{target or 'data set'}: Pentagrid reads text, JSON lines, Parquet and .bin/.idx corpora; give --data-path"
    )


def _read_nemo_valid(values: Values, known: Known) -> Any:
    given = values.get("validation_dataset.paths")
    return ABSENT if given is None or given == values.get("dataset.paths") else _expand(given)


def _write_nemo_data(section: str, split: str) -> Any:
    def write(value: list[str], known: Known) -> Any:
        found: Values = {
            f"{section}._target_": MEGATRON_DATA,
            f"{section}.paths": value[0] if len(value) == 1 else value,
            f"{section}.splits_to_build": split,
        }
        if section == "validation_dataset":
            found |= {f"{section}.seq_length": known.get("seq_length", 2048), f"{section}.split": "0, 1, 0"}
        return Changed(found, "NeMo's MegatronPretraining reads prepared corpora only: python -m data.prepare")

    return write


def _read_split(values: Values, known: Known) -> Any:
    word = text(next(iter(values.values())))
    parts = [part.strip().strip("'\"") for part in word.split(",")]
    if len(parts) != 3:
        return ABSENT  # the name of a part of a hub's data set
    return tuple(number(part) for part in parts)


def _write_val_set_size(value: tuple[float, ...], known: Known) -> Any:
    if "valid_data_path" in known:
        return {}
    _, valid, test = (part / sum(value) for part in value)
    note = f"a test share of {test:g} is trained on there"
    return Changed({"val_set_size": round(valid, 6)}, note) if test else {"val_set_size": round(valid, 6)}


def _read_val_set_size(values: Values, known: Known) -> Any:
    share = number(values["val_set_size"])
    if share > 1:
        raise NoCounterpart(f"{share:g} samples: --data-split takes shares")
    return Changed((1.0 - share, share, 0.0), "documents are split, not samples") if share else (1.0, 0.0, 0.0)


DATA = [
    row(
        "from_scratch",
        switch,
        nemo=Column(("model._target_",), _read_from_scratch, _write_nemo_from_scratch),
        axolotl=Column(
            ("reinit_weights",), lambda values, known: switch(values["reinit_weights"]), _write_reinit, False
        ),
        pentagrid=Column((), None, lambda value, known: {}, lambda known: "hf_model" not in known),
        megatron=Column((), None, None, True),
    ),
    row(
        "hf_model",
        nemo=Column(
            (
                "model.pretrained_model_name_or_path",
                "model.config.pretrained_model_name_or_path",
                "model.config.name_or_path",
            ),
            lambda values, known: text(next(iter(values.values()))),
            _write_nemo_model,
        ),
        axolotl="base_model",
        pentagrid=Column((), None, _write_hf_model),
    ),
    row(
        "tokenizer",
        pentagrid=as_given("tokenizer_model", _write_tokenizer),
        nemo=Column(
            ("dataset.tokenizer.pretrained_model_name_or_path", "tokenizer.pretrained_model_name_or_path"),
            lambda values, known: text(next(iter(values.values()))),
            _write_folder_of_tokenizer(
                "dataset.tokenizer.pretrained_model_name_or_path",
                {"dataset.tokenizer._target_": "nemo_automodel.NeMoAutoTokenizer.from_pretrained"},
            ),
            _default_tokenizer,
        ),
        axolotl=Column(
            ("tokenizer_config",),
            lambda values, known: text(values["tokenizer_config"]),
            _write_folder_of_tokenizer("tokenizer_config", {}),
            _default_tokenizer,
        ),
        megatron=Column(("tokenizer_model", "tokenizer_type", "vocab_file", "merge_file"), _read_megatron_tokenizer),
    ),
    row(
        "tokenizer_eod",
        pentagrid="tokenizer_eod",
        nemo=Column((), None, _write_end),
        axolotl=Column((), None, _write_end),
    ),
    row(
        "json_key",
        pentagrid=key("json_key", default="text"),
        axolotl=Column(("pretraining_dataset", "datasets"), _read_json_key, lambda value, known: {}),
        nemo=only("text", "NeMo reads prepared corpora: give --json-key {} to data.prepare", softly=True),
        off="text",
    ),
    row(
        "data_path",
        words,
        pentagrid="data_path",
        nemo=Column(("dataset.paths", "dataset._target_"), _read_nemo_data, _write_nemo_data("dataset", "train")),
        axolotl=Column(("pretraining_dataset", "datasets"), _read_axolotl_data, _write_axolotl_data("datasets")),
        megatron=key("data_path", "train_data_path", parse=words),
    ),
    row(
        "valid_data_path",
        words,
        pentagrid="valid_data_path",
        nemo=Column(
            ("validation_dataset.paths", "dataset.paths"),
            _read_nemo_valid,
            _write_nemo_data("validation_dataset", "validation"),
        ),
        axolotl=Column(("test_datasets",), _read_axolotl_data, _write_axolotl_data("test_datasets")),
        megatron=key("valid_data_path", parse=words),
    ),
    row(
        "data_split",
        pentagrid=as_given(
            "data_split",
            lambda value, known: {} if "valid_data_path" in known else {"data_split": value},
            lambda known: (1.0, 0.0, 0.0) if "valid_data_path" in known else (95.0, 5.0, 0.0),
        ),
        nemo=Column(
            ("dataset.split",),
            _read_split,
            lambda value, known: {"dataset.split": ", ".join(f"{part:g}" for part in value)},
        ),
        axolotl=Column(("val_set_size",), _read_val_set_size, _write_val_set_size, (1.0, 0.0, 0.0)),
        megatron=Column(
            ("split",),
            _read_split,
            None,
            lambda known: ABSENT if "valid_data_path" in known else (969.0, 30.0, 1.0),
        ),
    ),
    row(
        "data_cache_path",
        pentagrid="data_cache_path",
        megatron="data_cache_path",
        axolotl="dataset_prepared_path",
        nemo="dataset.index_mapping_dir",
    ),
    row(
        "num_workers",
        whole,
        pentagrid="num_workers",
        nemo="dataloader.num_workers",
        axolotl="dataloader_num_workers",
        megatron=key("num_workers", parse=whole, default=2),
    ),
]


# ---------------------------------------------------------------------------------------------------
# Samples


def _write_seq_length_to_nemo(value: int, known: Known) -> Values:
    if known.get("packing") in ("packed", "greedy") and "data_path" not in known:
        return {"packed_sequence.packed_sequence_size": value}
    return {"dataset.seq_length": value}


def _read_nemo_seq_length(values: Values, known: Known) -> Any:
    packed = whole(values.get("packed_sequence.packed_sequence_size", 0))
    if packed:
        return packed
    given = first_given(values, ("dataset.seq_length", "dataset.seq_len"))
    return given if given is ABSENT else whole(given)


def _read_packing(values: Values, known: Known) -> str:
    chosen = values.get("packing", "auto")
    if values.get("qkv_format", "thd") == "bshd" or chosen == "concat":
        return "stream"
    return "greedy" if chosen == "greedy" else "packed"


_ALONE = "a row holds one document and padding there; here rows are packed, so a step has more tokens"


_STREAM = (
    "one stream, in which documents attend to earlier ones, as there; --packing best-fit --qkv-format thd keeps "
    "documents apart, which is Pentagrid's default"
)


def _write_packing(value: str, known: Known) -> Any:
    flags = {
        "packed": {"qkv_format": "thd", "packing": "best-fit"},
        "greedy": {"qkv_format": "thd", "packing": "greedy"},
        "stream": {"qkv_format": "bshd", "packing": "concat"},
        "none": {"qkv_format": "thd", "packing": "best-fit"},
    }
    notes = {"none": _ALONE, "stream": _STREAM}
    return Changed(flags[value], notes[value]) if value in notes else flags[value]


def _read_axolotl_packing(values: Values, known: Known) -> str:
    crosses = "pretrain_multipack_attn" in values and not switch(values["pretrain_multipack_attn"])
    if crosses and "pretraining_dataset" in known["keys"]:
        return "stream"
    return "packed" if switch(values.get("sample_packing", "false")) else "none"


def _write_axolotl_packing(value: str, known: Known) -> Any:
    if value == "none":
        return {"sample_packing": False}
    found = {"sample_packing": True}
    notes = {
        "stream": "one stream, attention crosses documents, there; Axolotl packs whole documents and masks them",
        "greedy": "documents are cut at a sample's end there; Axolotl packs whole documents",
    }
    return Changed(found, notes[value]) if value in notes else found


def _read_nemo_packing(values: Values, known: Known) -> Any:
    if whole(values.get("packed_sequence.packed_sequence_size", 0)):
        return "packed"
    return "stream" if "data_path" in known else "none"


def _write_nemo_packing(value: str, known: Known) -> Any:
    if "data_path" in known:
        if value == "stream":
            return {}
        return Changed(
            {},
            "documents are apart here; MegatronPretraining gives one stream, in which documents attend to earlier "
            "ones: here --packing concat --qkv-format bshd",
        )
    if value == "none":
        return {"packed_sequence.packed_sequence_size": 0}
    found = {"packed_sequence.packing_strategy": "thd"}  # the length is packed_sequence_size
    return Changed(found, f"{value} becomes whole documents, in order") if value != "packed" else found


def _write_restart(value: str, known: Known) -> Values:
    if known.get("packing") != "stream":
        return {}  # positions restart at each document here
    raise NoCounterpart("positions of one stream do not restart here: --reset-attention-mask keeps documents apart")


_MEGATRON_MASKED = ("reset_attention_mask", "dataloader_inter_document_masking")


def _read_micro(values: Values, known: Known) -> int:
    """With pipeline stages NeMo's local batch is cut into microbatches of `pp_microbatch_size`."""
    if known.get("pp_size", 1) > 1:
        return whole(values.get("distributed.pipeline.pp_microbatch_size", 1))
    return whole(values.get("step_scheduler.local_batch_size", 1))


def _write_micro(value: int, known: Known) -> Values:
    if known.get("pp_size", 1) == 1:
        return {"step_scheduler.local_batch_size": value}
    dp, samples = data_parallel_size(known), known.get("global_batch_size")
    if dp is None or samples is None:
        raise NoCounterpart("local_batch_size is the global batch / dp with pipeline stages: give --world-size")
    return {
        "step_scheduler.local_batch_size": samples // dp,  # one schedule a step, as here
        "distributed.pipeline.pp_microbatch_size": value,
    }


def _read_axolotl_micro(values: Values, known: Known) -> int:
    if "micro_batch_size" in values:
        return whole(values["micro_batch_size"])
    return whole(values["batch_size"]) // whole(values.get("gradient_accumulation_steps", 1))


def _read_axolotl_global(values: Values, known: Known) -> Any:
    micro = known.get("micro_batch_size", 1)
    if "gradient_accumulation_steps" in values:
        steps = whole(values["gradient_accumulation_steps"])
    else:
        steps = whole(values.get("batch_size", micro)) // micro
    dp = data_parallel_size(known)
    if dp is None:
        raise NoCounterpart(f"global batch = micro {micro} * accumulation {steps} * dp: give --world-size")
    return Changed(micro * steps * dp, f"micro {micro} * accumulation {steps} * dp {dp} = {micro * steps * dp} samples")


def _write_axolotl_global(value: int, known: Known) -> Any:
    dp, micro = data_parallel_size(known), known.get("micro_batch_size", 1)
    if dp is None:
        raise NoCounterpart(f"gradient_accumulation_steps = {value} samples / (micro {micro} * dp): give --world-size")
    if value % (micro * dp):
        raise NoCounterpart(f"{value} samples are not a multiple of micro {micro} * dp {dp}")
    steps = value // (micro * dp)
    return Changed(
        {"gradient_accumulation_steps": steps}, f"{value} samples / (micro {micro} * dp {dp}) = {steps} a rank"
    )


def _default_global(known: Known) -> Any:
    """Pentagrid's and Megatron-LM's global batch where none is given."""
    dp = data_parallel_size(known)
    return ABSENT if dp is None else known.get("micro_batch_size", 1) * dp


SAMPLES = [
    row(
        "packing",
        pentagrid=Column(("qkv_format", "packing"), _read_packing, _write_packing, "packed"),
        nemo=Column(
            ("packed_sequence.packed_sequence_size", "packed_sequence.packing_strategy"),
            _read_nemo_packing,
            _write_nemo_packing,
            lambda known: "stream" if "data_path" in known else "none",
        ),
        axolotl=Column(
            ("sample_packing", "pretrain_multipack_attn"), _read_axolotl_packing, _write_axolotl_packing, "none"
        ),
        megatron=Column(_MEGATRON_MASKED, lambda values, known: "greedy", None, "stream"),
    ),
    row(
        "position_restart",
        megatron=Column(("reset_position_ids",), lambda values, known: "documents"),
        pentagrid=Column((), None, _write_restart),
    ),
    row(
        "seq_length",
        whole,
        pentagrid=key("seq_length", parse=whole, default=2048),
        nemo=Column(
            ("packed_sequence.packed_sequence_size", "dataset.seq_length", "dataset.seq_len"),
            _read_nemo_seq_length,
            _write_seq_length_to_nemo,
        ),
        axolotl=key("sequence_len", parse=whole, default=512),
        megatron="seq_length",
    ),
    row(
        "pad_rows",
        pentagrid=key("pad_rows", default="full"),
        axolotl=key("pad_to_sequence_len", choices={"true": "full", "false": "dynamic"}),
        nemo=only("full", "NeMo's packs are full rows", softly=True),
        off="full",
    ),
    row(
        "micro_batch_size",
        whole,
        pentagrid=key("micro_batch_size", parse=whole, default=1),
        nemo=Column(
            ("step_scheduler.local_batch_size", "distributed.pipeline.pp_microbatch_size"),
            _read_micro,
            _write_micro,
            1,
        ),
        axolotl=Column(
            ("micro_batch_size", "batch_size"),
            _read_axolotl_micro,
            lambda value, known: {"micro_batch_size": value},
            1,
        ),
        megatron="micro_batch_size",
    ),
    row(
        "global_batch_size",
        whole,
        pentagrid=as_given(
            "global_batch_size",
            lambda value, known: {"global_batch_size": value},
            lambda known: (
                ABSENT if _default_global(known) is ABSENT else _default_global(known) * known.get("pp_size", 1)
            ),
        ),
        nemo=Column(
            ("step_scheduler.global_batch_size",),
            lambda values, known: whole(values["step_scheduler.global_batch_size"]),
            lambda value, known: {"step_scheduler.global_batch_size": value},
            32,
        ),
        axolotl=Column(
            ("gradient_accumulation_steps", "batch_size"),
            _read_axolotl_global,
            _write_axolotl_global,
            lambda known: _default_global(known),
        ),
        megatron=key("global_batch_size", parse=whole, default=_default_global),
    ),
]
