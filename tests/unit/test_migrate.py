"""Configurations of other suites: arithmetic against numbers by hand, round trips, reports, hostile files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.aliases import OTHERS, find_counterpart
from config.cli import build_parser, parse_arguments
from config.peers.columns import SUITES
from config.peers.data import MEGATRON_DATA
from config.peers.megatron import read_megatron
from config.peers.table import NO_COUNTERPART, NOT_NEEDED, TABLE
from config.schema import fields_of_flags
from model.config import GPTConfig, padded_vocab_size
from tests.flags import resolve_config
from tools.hf.config import model_flags, read_config, write_config
from tools.migrate import Report, convert, main
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
FIELDS = {name for _, name, _ in fields_of_flags()}

AXOLOTL = """
base_model: org/model
datasets: [{path: json, data_files: corpus.jsonl, type: completion, field: body}]
val_set_size: 0.1
sequence_len: 4_096
sample_packing: true
context_parallel_size: 2
dp_shard_size: 4
micro_batch_size: 1
gradient_accumulation_steps: 3
max_steps: 1000
learning_rate: 2e-4
warmup_ratio: 0.05
cosine_min_lr_ratio: 0.1
bf16: auto
gradient_checkpointing: true
wandb_project:
load_in_8bit: false
"""
NEMO = """
recipe: TrainFinetuneRecipeForNextTokenPrediction
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_config
  torch_dtype: float32
  config: {_target_: transformers.LlamaConfig, num_hidden_layers: 12, hidden_size: 256, num_attention_heads: 8,
    rope_theta: 5.0e+5}
step_scheduler: {global_batch_size: 48, local_batch_size: 6, max_steps: 100}
distributed: {tp_size: 1, cp_size: 1, pp_size: 2, dp_size: 4, dp_replicate_size: 2,
  pipeline: {pp_schedule: interleaved1f1b, pp_microbatch_size: 2, layers_per_stage: 3}}
dataset:
  _target_: nemo_automodel.components.datasets.llm.megatron_dataset.MegatronPretraining
  paths: ["30", data/a, "70", data/b]
  seq_length: 1024
  split: "0.98, 0.02, 0.00"
optimizer: {_target_: torch.optim.AdamW, lr: 3.0e-4, betas: [0.9, 0.95], weight_decay: 0.1}
lr_scheduler: {lr_decay_style: cosine, min_lr: 3.0e-5}
"""
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "transformers_version": "5.0.0",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "eos_token_id": [7, 8],
}
SCRIPT = r"""#!/bin/bash
TP=${TP:-2}; SEQ=8192
touch RAN; $(touch RAN)
DIST=( --nproc_per_node 8 --nnodes 4 )
MODEL_ARGS=(
    --num-layers 32   # layers
    --hidden-size 4096 --num-attention-heads 32
    --group-query-attention --num-query-groups 8
    --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type rope --rotary-base 500000
    --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0
    "--seq-length $SEQ"
)
OPTIONS=" \
    --micro-batch-size 2 --train-samples 1_000_000 \
    --lr-warmup-fraction 0.01 --lr 3e-4 --bf16"
torchrun "${DIST[@]}" pretrain_gpt.py ${MODEL_ARGS[@]} $OPTIONS --tensor-model-parallel-size ${TP} \
    --context-parallel-size 4 --cp-comm-type allgather --sequence-parallel --global-batch-size 128 \
    --data-path 0.3 a 0.7 b --save $1 --lr-decay-style cosine --eod-mask-loss
"""


def run(tmp_path: Path, text: str, source: str, target: str = "pentagrid", **options: Any) -> tuple[dict, Report]:
    """The converted keys, as their suite reads them, and the report."""
    file = tmp_path / ("run.sh" if source == "megatron" else "run.yaml")
    file.write_text(text)
    made, report = convert(source, target, str(file), **options)
    loaded = yaml.safe_load(made) or {}
    return (
        ({name.replace("-", "_"): value for name, value in loaded.items()}, report)
        if target == "pentagrid"
        else (loaded, report)
    )


def has(lines: list[str], *words: str) -> bool:
    return any(all(word in line for word in words) for line in lines)


# ---------------------------------------------------------------------------------------------------
# Arithmetic and values, by hand


def test_axolotl_to_pentagrid(tmp_path: Path) -> None:
    flags, report = run(tmp_path, AXOLOTL, "axolotl", world_size=8)
    wanted = {
        "cp_size": 2,
        "dp_shard_size": 4,
        "global_batch_size": 1 * 3 * 4,  # 8 ranks / cp 2 = 4 with distinct data
        "seq_length": 4096,
        "train_iters": 1000,
        "lr": 2e-4,
        "min_lr": 2e-5,  # 0.1 * 2e-4 is 2.0000000000000002e-05
        "lr_warmup_iters": 50,
        "adam_beta2": 0.999,  # transformers', not ours
        "weight_decay": 0.0,
        "seed": 42,
        "data_path": ["corpus.jsonl"],
        "json_key": "body",
        "data_split": "0.9,0.1,0",
        "cp_backend": "ring",
        "ring_attn_func": "llama3",
        "dtype": "bf16",
        "recompute": "full",
        "qkv_format": "thd",
        "packing": "best-fit",
    }
    assert {name: flags.get(name) for name in wanted} == wanted
    assert has(report.changed, "micro 1 * accumulation 3 * dp 4 = 12 samples")
    assert report.folded["off in both"] == ["load_in_8bit false"]
    assert report.folded["empty, as if left out"] == ["wandb_project"]
    assert has(report.lost, "base_model org/model", "--model DIR")
    assert has(report.changed, "eval_interval", "after each epoch there")  # val_set_size without eval_steps


@pytest.mark.parametrize(
    ("world", "sizes", "samples"),
    [
        (8, "", 2 * 4 * 8),
        (8, "context_parallel_size: 2", 2 * 4 * 4),
        (8, "context_parallel_size: 2\ntensor_parallel_size: 2", 2 * 4 * 2),
        (None, "dp_shard_size: 2\ndp_replicate_size: 3\ncontext_parallel_size: 4", 2 * 4 * 6),
        (16, "dp_replicate_size: 2\ntensor_parallel_size: 4", 2 * 4 * 4),
    ],
)
def test_global_batch_of_axolotl(tmp_path: Path, world: int | None, sizes: str, samples: int) -> None:
    text = f"base_model: a\nmicro_batch_size: 2\ngradient_accumulation_steps: 4\nlearning_rate: 1\n{sizes}\n"
    assert run(tmp_path, text, "axolotl", world_size=world)[0]["global_batch_size"] == samples


def test_a_global_batch_that_depends_on_open_sizes_is_not_guessed(tmp_path: Path) -> None:
    text = "base_model: a\nmicro_batch_size: 2\ngradient_accumulation_steps: 4\nlearning_rate: 1\n"
    flags, report = run(tmp_path, text, "axolotl")
    assert "global_batch_size" not in flags
    assert has(report.lost, "gradient_accumulation_steps 4", "micro 2 * accumulation 4 * dp", "--world-size")
    with pytest.raises(UserError, match=r"8 ranks are not a multiple of pp \* cp \* tp = 3"):
        run(tmp_path, f"{text}context_parallel_size: 3\n", "axolotl", world_size=8)


def test_nemo_to_pentagrid(tmp_path: Path) -> None:
    flags, report = run(tmp_path, NEMO, "nemo", world_size=8)
    wanted = {
        "pp_size": 2,
        "dp_replicate_size": 2,
        "dp_shard_size": 2,  # dp_size 4 / 2 replicas
        "pp_schedule": "interleaved",
        "virtual_stages": 2,  # 12 layers / (pp 2 * 3 a stage)
        "micro_batch_size": 2,  # pp_microbatch_size, not local_batch_size
        "global_batch_size": 48,
        "num_layers": 12,
        "rotary_base": 5e5,
        "norm_epsilon": 1e-6,  # LlamaConfig's, not ours
        "ffn_hidden_size": 11008,
        "num_query_groups": 8,  # as many as heads
        "kv_channels": 256 // 8,
        "vocab_size": 32000,
        "tie_embeddings": False,
        "init_method_std": 0.02,
        "data_path": ["30", "data/a", "70", "data/b"],
        "data_split": "0.98,0.02,0",
        "qkv_format": "bshd",
        "packing": "concat",
        "adam_beta2": 0.95,
        "lr_warmup_iters": 10,  # NeMo's default: a tenth, at most 1000
        "seed": 42,
        "save_interval": 100,
    }
    assert {name: flags.get(name) for name in wanted} == wanted
    assert has(report.changed, "lr_warmup_init 3e-05, ", "the warm-up starts at 3e-05 there")
    assert has(report.changed, "documents attend to earlier ones", "packing concat", "Pentagrid's default")


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Qwen3Config"])
def test_values_that_a_recipe_leaves_to_its_class(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "a.yaml").write_text(
        f"model: {{_target_: CausalLM.from_config, config: {{_target_: transformers.{name}}}}}"
    )
    text, _ = convert("nemo", "pentagrid", str(tmp_path / "a.yaml"))
    flags = {key.replace("-", "_"): value for key, value in yaml.safe_load(text).items()}
    said = getattr(transformers, name)(sliding_window=None).to_dict()
    wanted = model_flags(read_config(said, name))
    del wanted["make_vocab_size_divisible_by"], wanted["rope_scaling"]  # as without a flag
    assert {name: flags.get(name) for name in wanted} == wanted
    assert f"norm-epsilon: {yaml.safe_dump(1e-6).split()[0]}  # {name}'s default" in text


@pytest.mark.parametrize("attention", ["", "attn_implementation: sdpa\n  "])
def test_packed_rows_of_nemo_over_cp_ranks(tmp_path: Path, attention: str) -> None:
    """PyTorch's context parallelism has no thd: train.py would refuse the preset."""
    start, end = NEMO.index("dataset:"), NEMO.index("optimizer:")
    text = NEMO[:start] + "packed_sequence: {packed_sequence_size: 1024}\n" + NEMO[end:]
    text = text.replace("cp_size: 1", "cp_size: 2").replace("dp_size: 4", "dp_size: 2")
    text = text.replace("torch_dtype: float32", f"{attention}torch_dtype: float32")
    flags, report = run(tmp_path, text, "nemo", world_size=8)
    assert flags["cp_backend"] == "native" and "cp_rotate_method" not in flags and flags["qkv_format"] == "thd"
    assert has(report.changed, "cp_backend native", "NeMo refuses packed rows")
    assert not has(report.lost, "train.py refuses"), report.lost
    te, _ = run(tmp_path, text.replace("torch_dtype", "backend: {attn: te}\n  torch_dtype"), "nemo", world_size=8)
    assert te["cp_backend"] == "te" and "cp_comm_type" not in te  # so that --cp-backend alone changes it
    stream, _ = run(tmp_path, NEMO.replace("cp_size: 1", "cp_size: 2"), "nemo", world_size=16)
    assert stream["cp_backend"] == "pytorch" and "cp_rotate_method" not in stream


def test_a_pattern_of_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo takes a pattern of files, --data-path prefixes."""
    monkeypatch.chdir(tmp_path)
    text = NEMO.replace('["30", data/a, "70", data/b]', "corpora/tiny*")
    text += f"validation_dataset: {{_target_: {MEGATRON_DATA}, paths: corpora/tiny*}}\n"
    flags, report = run(tmp_path, text, "nemo", world_size=8)
    assert "data_path" not in flags and has(report.lost, "dataset.paths corpora/tiny*", "no such .bin or .idx file")
    assert sum("corpora/tiny*" in line for line in report.lost) == 1
    (tmp_path / "corpora").mkdir()
    for name in ("tiny_b.bin", "tiny_b.idx", "tiny_a.idx", "tiny_a.bin", "tiny_a.json"):
        (tmp_path / "corpora" / name).touch()
    flags, report = run(tmp_path, text, "nemo", world_size=8)
    assert flags["data_path"] == ["corpora/tiny_a", "corpora/tiny_b"] and "valid_data_path" not in flags
    assert has(report.changed, "corpora/tiny*", "match here: 2")


def test_a_run_that_counts_epochs(tmp_path: Path) -> None:
    """Without steps train.py's default holds: the preset and the report say so."""
    (tmp_path / "a.yaml").write_text(AXOLOTL.replace("max_steps: 1000", "num_epochs: 3"))
    text, report = convert("axolotl", "pentagrid", str(tmp_path / "a.yaml"), world_size=8)
    assert "train-iters" not in yaml.safe_load(text) and "\n# train-iters:" in text
    assert "num-layers" not in yaml.safe_load(text) and "\n# num-layers," in text
    assert has(report.changed, "num_epochs 3", "train-iters is not set", "200", "samples of an epoch")
    assert not has(report.lost, "num_epochs") and not has(run(tmp_path, AXOLOTL, "axolotl")[1].changed, "is not set")


def test_pentagrid_to_axolotl_and_nemo(tmp_path: Path) -> None:
    preset = "cp-size: 2\nmicro-batch-size: 2\nglobal-batch-size: 24\npp-size: 1\nlr: 4.0e-4\nmin-lr: 1.0e-4\n"
    preset += "seq-length: 512\n"
    made, report = run(tmp_path, preset, "pentagrid", "axolotl", world_size=8, model="folder")
    assert made["gradient_accumulation_steps"] == 24 / (2 * 4) and made["micro_batch_size"] == 2
    assert made["base_model"] == "folder" and made["reinit_weights"] is False
    assert has(report.changed, "reinit_weights", "starts from the weights in folder")
    assert made["cosine_min_lr_ratio"] == 0.25 and made["ring_attn_func"] == "varlen_llama3"
    assert has(report.changed, "24 samples / (micro 2 * dp 4) = 3 a rank")
    preset = preset.replace("pp-size: 1", "pp-size: 2").replace("cp-size: 2", "cp-size: 1")
    made, _ = run(tmp_path, preset, "pentagrid", "nemo", world_size=8)
    assert made["step_scheduler"]["local_batch_size"] == 24 / 4 and made["step_scheduler"]["global_batch_size"] == 24
    assert made["distributed"]["pipeline"]["pp_microbatch_size"] == 2
    assert made["lr_scheduler"]["init_lr"] == 0.0 and made["optimizer"]["betas"] == [0.9, 0.95]
    assert made["packed_sequence"]["packed_sequence_size"] == 512
    with_stages, report = run(tmp_path, preset, "pentagrid", "axolotl", world_size=8, model="folder")
    assert "pp_size" not in with_stages and has(report.lost, "pp_size 2", "no pipeline parallelism")


def test_a_preset_without_a_shape_has_train_pys_default(tmp_path: Path) -> None:
    """A recipe without sizes would be transformers' default model."""
    made, report = run(tmp_path, "hidden-size: 192\n", "pentagrid", "nemo", world_size=8)
    model = resolve_config("--hidden-size", "192").model
    section = made["model"]["config"]
    assert (section["num_hidden_layers"], section["hidden_size"]) == (model.num_layers, 192)
    assert (section["intermediate_size"], section["head_dim"]) == (model.ffn_hidden_size, model.kv_channels)
    assert has(report.changed, "set model.config.vocab_size")
    made, _ = run(tmp_path, "hidden-size: 192\n", "pentagrid", "nemo", world_size=8, model="folder")
    assert "num_hidden_layers" not in made["model"].get("config", {})


def test_megatron_script(tmp_path: Path) -> None:
    flags, report = run(tmp_path, SCRIPT, "megatron")
    wanted = {
        "num_layers": 32,
        "ffn_hidden_size": 10880,  # of SwiGLU without the flag: int(4 * 4096 * 2/3 / 64) * 64
        "num_query_groups": 8,
        "rotary_base": 500000.0,
        "tie_embeddings": False,
        "tp_size": 2,
        "cp_size": 4,
        "cp_backend": "te",
        "cp_comm_type": "all_gather",
        "sequence_parallel": True,
        "seq_length": 8192,
        "micro_batch_size": 2,
        "global_batch_size": 128,
        "train_iters": 1_000_000 // 128,
        "lr_warmup_iters": int(0.01 * (1_000_000 // 128)),
        "weight_decay": 0.01,  # Megatron-LM's default
        "adam_beta2": 0.999,
        "min_lr": 0.0,
        "lr_decay_style": "cosine",
        "data_path": ["0.3", "a", "0.7", "b"],
        "data_split": "969,30,1",
        "qkv_format": "bshd",
        "dtype": "bf16",
        "eval_interval": 1000,
    }
    assert {name: flags.get(name) for name in wanted} == wanted
    assert "hidden_dropout 0" in report.folded["nothing to set there"]
    assert has(report.lost, "--save $1", "does not say") and "run_dir" not in flags
    assert has(report.changed, "1_000_000 samples / global batch 128 = 7812 steps")
    assert has(report.changed, "means of microbatches") and has(report.changed, "eod_mask_loss")
    assert not list(tmp_path.glob("RAN")) and not Path("RAN").exists()


WORDS = r"""# it's read as a shell reads words
DATA_PATH="0.7 data/a 0.3 data/b"; RUN="my run"; LATER="/x"; LATER+="/y"
SHAPE=(--num-layers 2 --hidden-size 64 --num-attention-heads 4) # don't
BLEND=(0.5 c 0.5 d)
LOOSE=(--tokenizer-model "$RUN")
TIGHT=(--wandb-project "$RUN" --data-cache-path '$RUN')
VALID="--valid-data-path $DATA_PATH --seed 5 "
torchrun pretrain_gpt.py ${SHAPE[@]} ${LOOSE[@]} "${TIGHT[@]}" --data-path $DATA_PATH --bf16 $VALID \
    --save "$LATER" --split pre$RUN --train-data-path "${BLEND[@]}" ${UNSET[@]} stray --tensorboard-dir="$RUN"
"""


def test_words_of_a_script_are_a_shells(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text(WORDS)
    values, notes = read_megatron(tmp_path / "a.sh")
    script = WORDS.replace("torchrun pretrain_gpt.py", "printf '%s\\n'").replace("'$RUN'", "x")
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    wanted: dict[str, Any] = {}
    for word in words:
        flag, has_value, value = word.partition("=")
        if word.startswith("--"):
            name = flag.removeprefix("--").replace("-", "_")
            wanted[name] = [value] if has_value else []
        elif word != "stray":
            wanted[name] = [*wanted[name], word]
    wanted = {name: (found or [True])[0] if len(found) < 2 else found for name, found in wanted.items()}
    assert wanted.pop("data_cache_path") == "x" and notes == [
        "--data-cache-path $RUN: the script does not say what it stands for"
    ]
    assert values == wanted and values["data_path"] == ["0.7", "data/a", "0.3", "data/b"]


def test_megatrons_defaults_that_make_another_model_are_listed(tmp_path: Path) -> None:
    flags, report = run(tmp_path, "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64", "megatron")
    assert flags["ffn_hidden_size"] == 256 and flags["hidden_dropout"] == 0.1 and flags["tie_embeddings"] is True
    assert flags["num_query_groups"] == 4
    for name in ("LayerNorm", "gelu", "learned_absolute", "biases"):
        assert has(report.lost, name)


def test_megatrons_tokenizers(tmp_path: Path) -> None:
    shape = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --tokenizer-type "
    files = "--vocab-file a/gpt2-vocab.json --merge-file a/gpt2-merges.txt"
    flags, _ = run(tmp_path, f"{shape} GPT2BPETokenizer {files}", "megatron")
    assert flags["tokenizer_model"] == "a/gpt2-vocab.json"
    flags, report = run(tmp_path, f"{shape} NullTokenizer --vocab-size 99", "megatron")
    assert "tokenizer_model" not in flags and has(report.lost, "--vocab-size N + 1 and --eod-id N")


@pytest.mark.parametrize(
    ("source", "text", "resumes"),
    [
        ("axolotl", "base_model: a\noutput_dir: out/x\n", None),
        ("axolotl", "base_model: a\noutput_dir: out/x\nauto_resume_from_checkpoints: true\n", True),
        ("nemo", "model: {_target_: CausalLM.from_config}\ncheckpoint: {checkpoint_dir: out/x}\n", True),
        ("megatron", "--num-layers 1 --save out/x --load out/x", True),
        ("megatron", "--num-layers 1 --save out/x --load out/y", None),
    ],
)
def test_the_folder_of_outputs_becomes_the_run_dir(tmp_path: Path, source: str, text: str, resumes: bool) -> None:
    """train.py saves under it, so that --load, tools/generate.py and convert_hf.py find the run there."""
    flags, report = run(tmp_path, text, source, world_size=8)
    assert flags["run_dir"] == "out/x" and "save" not in flags and flags.get("resume") is resumes
    assert has(report.lost, "load out/y") == ("out/y" in text)
    made, report = run(tmp_path, "run-dir: out/x\nsave: far\n", "pentagrid", "nemo", world_size=8)
    assert made["checkpoint"]["checkpoint_dir"] == "out/x"
    assert has(report.changed, "checkpoints in far here, in out/x there")


def test_a_flag_of_megatron_that_is_given_twice(tmp_path: Path) -> None:
    text = "if [ x ]; then\n A=(--num-layers 4 --lr 1 --bf16)\nelse\n A=(--num-layers 6 --lr 1 --bf16)\nfi\n"
    flags, report = run(tmp_path, text, "megatron")
    assert flags["num_layers"] == 6 and has(report.lost, "--num-layers is given as 4 and 6")
    assert not has(report.lost, "--lr ") and not has(report.lost, "--bf16")


def test_shape_from_the_folder_of_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shape = {
        "model_type": "qwen3",
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e6,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "vocab_size": 1000,
        "sliding_window": None,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    text = f"base_model: {folder}\nmicro_batch_size: 1\nlearning_rate: 1.0e-5\nsequence_len: 64\nmax_steps: 10\n"
    flags, report = run(tmp_path, text, "axolotl")
    wanted = {
        "qk_norm": True, "num_layers": 3, "ffn_hidden_size": 128, "kv_channels": 32, "rotary_base": 1e6,
        "rope_scaling": "llama3", "rope_scaling_factor": 4.0, "rope_original_seq_length": 1024, "norm_epsilon": 1e-6,
        "tokenizer_model": f"{folder}/tokenizer.json", "vocab_size": 1000,
    }  # fmt: skip
    assert {name: flags.get(name) for name in wanted} == wanted
    assert has(report.changed, "starts from weights", "convert_hf.py")
    made, _ = run(tmp_path, text, "axolotl", "nemo")
    assert made["model"]["pretrained_model_name_or_path"] == str(folder) and "config" not in made["model"]
    mistral = shape | {"model_type": "mistral", "sliding_window": 4096}
    bad_dropout = shape | {"attention_dropout": "many"}
    for bad, words in (
        (shape | {"model_type": "mixtral"}, "mixtral"),
        (shape | {"hidden_act": "gelu"}, "gelu"),
        (shape | {"auto_map": {"AutoModel": "own.Model"}}, "code of its own"),
        (mistral, "sliding_window 4096"),
        (bad_dropout, "many"),
        (shape | {"hidden_size": "many"}, "hidden_size 'many'"),
        ([1], "not the configuration of a Hugging Face model"),
    ):
        (folder / "config.json").write_text(json.dumps(bad))
        flags, report = run(tmp_path, text, "axolotl")
        assert has(report.lost, "model's shape", words) and ("num_layers" not in flags or bad is bad_dropout)
        assert len(report.lost) == 1 and "\n" not in report.lost[0] and len(report.lost[0]) < 500
    for hostile in ("[" * 100_000, "\0"):
        (folder / "config.json").write_text(hostile)
        with pytest.raises(UserError) as refused:
            run(tmp_path, text, "axolotl")
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_tokenizer_of_the_models_folder(tmp_path: Path, name: str) -> None:
    """A name of the hub in the file, and its folder here."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "model" / name).write_text(json.dumps({"model": {"vocab": {"<end>": 7}}}))
    flags, report = run(tmp_path, AXOLOTL, "axolotl", world_size=8, model=str(tmp_path / "model"))
    assert flags["tokenizer_model"] == str(tmp_path / "model" / name)
    text = convert("axolotl", "pentagrid", str(tmp_path / "run.yaml"), model=str(tmp_path / "model"))[0]
    assert f"{name}  # the tokenizer of org/model" in text
    assert flags.get("tokenizer_eod") == ("<end>" if name == "tokenizer.json" else None)
    assert not report.lost, report.lost  # so that --strict takes a plain Llama
    other = f"{AXOLOTL}\ntokenizer_config: other/tokenizer\n"
    flags, report = run(tmp_path, other, "axolotl", world_size=8, model=str(tmp_path / "model"))
    assert "tokenizer_model" not in flags and has(report.lost, "other/tokenizer is a name of the hub")


@pytest.mark.parametrize("peer", ["nemo", "axolotl"])
def test_strict_takes_pentagrids_defaults(tmp_path: Path, peer: str) -> None:
    """The target's model has RMSNorm and rotary positions, the folder names the end of documents."""
    preset = "lr: 1.0e-3\ntokenizer-model: hf/tokenizer.json\ntokenizer-eod: '</s>'\ndata-path: [corpora/a]\n"
    made, report = run(tmp_path, preset, "pentagrid", peer, world_size=8, model="hf")
    assert not report.lost, report.lost
    if peer == "nemo":
        assert made["model"]["_target_"].endswith("from_pretrained")
        assert has(report.changed, "packing packed", "documents are apart here", "--packing concat")
        _, report = run(tmp_path, preset, "pentagrid", peer, world_size=8)
        assert has(report.lost, "tokenizer_eod </s>", "--model DIR")
    _, report = run(tmp_path, f"{SCRIPT.strip()} --calculate-per-token-loss", "megatron", peer, model=None)
    for name in ("normalization", "position_embedding", "calculate_per_token_loss"):
        assert not has(report.lost, name), report.lost


def test_positions_restart_with_documents(tmp_path: Path) -> None:
    flags, report = run(tmp_path, f"{SCRIPT.strip()} --reset-position-ids --reset-attention-mask", "megatron")
    assert flags["packing"] == "greedy" and not has(report.lost, "reset_position_ids")
    assert has(run(tmp_path, f"{SCRIPT.strip()} --reset-position-ids", "megatron")[1].lost, "reset_position_ids")


def test_a_package_that_the_preset_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("config.peers.output.find_spec", lambda name: None)
    flags, report = run(tmp_path, f"{AXOLOTL.replace('wandb_project:', 'wandb_project: team')}", "axolotl")
    assert flags["wandb_project"] == "team" and has(report.changed, "wandb_project team", "needs the wandb package")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "preset.yaml").write_text("wandb-project: team\n")
    for off in ("none", ""):
        assert resolve_config("--config", "preset.yaml", "--wandb-project", off).logging.wandb_project is None


def test_the_report_begins_with_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))
    text = AXOLOTL.replace("field: body", "field: text")
    _, report = run(tmp_path, text, "axolotl", world_size=8, model=str(tmp_path / "model"))
    lines = str(report).splitlines()
    end = next(n for n, line in enumerate(lines) if line.startswith("changed in meaning"))
    assert lines[1].startswith("  context_parallel_size 2 -> cp_size 2") and end < 25
    (folded,) = (line for line in lines[:end] if "config.json" in line)
    assert all(f"{name} {value}" in folded for name, value in (("num_layers", 3), ("vocab_size", 1000)))
    assert not any(line.startswith("  nothing to set there: datasets") for line in lines)


@st.composite
def models(draw: st.DrawFn) -> GPTConfig:
    heads, groups = draw(st.sampled_from([(4, 4), (4, 2), (6, 3), (1, 1)]))
    scaling = draw(st.sampled_from(["none", "linear", "llama3"]))
    vocab = draw(st.integers(100, 1000))
    return GPTConfig(
        num_layers=draw(st.integers(1, 9)),
        hidden_size=heads * draw(st.sampled_from([16, 24])),
        ffn_hidden_size=draw(st.integers(1, 500)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=draw(st.sampled_from([16, 24, 64])),
        vocab_size=vocab,
        padded_vocab_size=padded_vocab_size(vocab, 128),
        norm_epsilon=draw(st.sampled_from([1e-5, 1e-6])),
        qk_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        init_std=draw(st.sampled_from([0.02, 0.006])),
        rotary_base=draw(st.sampled_from([1e4, 5e5])),
        rope_scaling=scaling,
        rope_scaling_factor=1.0 if scaling == "none" else draw(st.sampled_from([2.0, 8.0])),
        rope_original_seq_length=8192 if scaling == "llama3" else 0,
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=models(), newer=st.booleans())
def test_rows_of_the_shape_agree_with_convert_hf(tmp_path: Path, config: GPTConfig, newer: bool) -> None:
    """A recipe's `model.config` goes through the rows, a folder's config.json through tools/hf/config.py."""
    said = write_config(config, max_positions=64, bos=None, eod=0, dtype="float32")
    if newer and said["rope_scaling"]:  # as transformers 5 writes it
        said["rope_parameters"] = said.pop("rope_scaling") | {"rope_theta": said.pop("rope_theta")}
    text = yaml.safe_dump({"model": {"_target_": "a.CausalLM.from_config", "config": said}})
    flags, report = run(tmp_path, text, "nemo")
    wanted = model_flags(read_config(said, "config.json"))
    del wanted["make_vocab_size_divisible_by"]  # of convert_hf.py only
    if config.rope_scaling == "none":
        del wanted["rope_scaling"]
    assert {name: flags.get(name) for name in wanted} == wanted
    assert not has(report.lost, "model.config"), report.lost
    made, _ = run(
        tmp_path, yaml.safe_dump({name.replace("_", "-"): value for name, value in wanted.items()}), "pentagrid", "nemo"
    )
    kind = made["model"]["config"].pop("_target_").removeprefix("transformers.").removesuffix("Config").lower()
    assert read_config(made["model"]["config"] | {"model_type": kind}, "recipe") == config


# ---------------------------------------------------------------------------------------------------
# Report, output and refusals


def test_unknown_keys_name_the_nearest_one(tmp_path: Path) -> None:
    _, report = run(tmp_path, f"{AXOLOTL}\ncontext_parapllel_size: 2\nzzz: 1\n", "axolotl")
    assert has(report.lost, "context_parapllel_size 2: unknown key; did you mean context_parallel_size?")
    assert has(report.lost, "zzz 1: unknown key")


def test_every_line_says_where_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(AXOLOTL)
    text, _ = convert("axolotl", "pentagrid", str(tmp_path / "a.yaml"), world_size=8)
    lines = text.splitlines()
    assert all("  # " in line for line in lines[1:])
    assert "seq-length: 4096  # sequence_len 4_096" in lines and "adam-beta2: 0.999  # Axolotl's default" in lines


@pytest.mark.parametrize("source", ["axolotl", "nemo"])
def test_no_key_is_dropped_silently(tmp_path: Path, source: str) -> None:
    text = {"axolotl": AXOLOTL, "nemo": NEMO}[source]
    _, report = run(tmp_path, text, source, world_size=8)
    said = str(report)
    for name in yaml.safe_load(text):
        assert name in said, name


def test_files_strict_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out, report = tmp_path / "a.yaml", tmp_path / "out.yaml", tmp_path / "report.txt"
    file.write_text(AXOLOTL)
    command = ["--from", "axolotl", "--to", "pentagrid", str(file), "--world-size", "8"]
    with pytest.raises(UserError, match=r"--strict: \d+ settings of .*a.yaml have no counterpart"):
        main([*command, "--strict", "--output", str(out)])
    assert not out.exists() and "without counterpart: " in capsys.readouterr().err
    assert main([*command, "--output", str(out), "--report", str(report)]) == 0
    assert out.read_text().startswith("# Pentagrid, from Axolotl's a.yaml") and "carried over: " in report.read_text()
    with pytest.raises(UserError, match=r"out.yaml: is there already"):
        main([*command, "--output", str(out)])
    with pytest.raises(UserError, match="nothing to convert"):
        main(["--from", "nemo", "--to", "nemo", str(file)])


@pytest.mark.parametrize("source", ["axolotl", "nemo", "pentagrid", "megatron"])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "a: " * 2000,
        "- a",
        "a: 1\na: 2",
        "? [a]\n: 1",
        "a: &a [*a]",
        "base_model: !!python/object/apply:os.system ['true']",
        "x: [" + ", ".join(["&y0 [1]", *(f"&y{n} [*y{n - 1}, *y{n - 1}]" for n in range(1, 60))]) + "]",
        "'",
        "",
        "base_model: a\nmicro_batch_size: many\n--num-layers two",
    ],
)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, source: str, text: str) -> None:
    file = tmp_path / ("a.sh" if source == "megatron" else "a.yaml")
    file.write_text(text)
    if source == "pentagrid" and text == "":
        return  # a preset of no flag
    with pytest.raises(UserError) as refused:
        convert(source, "axolotl" if source == "pentagrid" else "pentagrid", str(file))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


@pytest.mark.parametrize(
    ("source", "text", "words"),
    [
        ("nemo", "recipe: FinetuneRecipeForVLM\nmodel: {_target_: a.b}", "FinetuneRecipeForVLM"),
        ("nemo", "a: 1", "without a name"),
        ("axolotl", "base_model: a\nrl: dpo", "rl dpo"),
        ("axolotl", "a: 1", "no base_model"),
        ("megatron", "echo --lr 1", "no --num-layers"),
    ],
)
def test_other_trainings_are_refused(tmp_path: Path, source: str, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(tmp_path, text, source)


def test_adapters_go_to_the_suite_that_has_them(tmp_path: Path) -> None:
    text = f"{AXOLOTL}\nadapter: lora\nlora_r: 16\nlora_alpha: 32\n"
    made, _ = run(tmp_path, text, "axolotl", "nemo", world_size=8)
    assert made["peft"]["dim"] == 16 and made["peft"]["alpha"] == 32
    _, report = run(tmp_path, text, "axolotl")
    assert has(report.lost, "adapter lora", "trains all weights") and has(report.lost, "lora_r 16")


# ---------------------------------------------------------------------------------------------------
# What train.py says


@pytest.mark.parametrize("text", [AXOLOTL, NEMO], ids=["axolotl", "nemo"])
def test_train_accepts_the_preset(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jsonl").write_text('{"body": "some text"}\n' * 200)
    source = "axolotl" if text is AXOLOTL else "nemo"
    (tmp_path / "a.yaml").write_text(text)
    made, _ = convert(source, "pentagrid", str(tmp_path / "a.yaml"), world_size=8)
    (tmp_path / "preset.yaml").write_text(made)
    more = ["--device", "cpu", "--tokenizer-type", "byte", "--data-path", "corpus.jsonl", "--json-key", "body"]
    config = resolve_config("--config", str(tmp_path / "preset.yaml"), *more, "--num-query-groups", "4", world=8)
    assert config.num_microbatches == (3 if source == "axolotl" else 6)


def test_dry_run_of_a_converted_preset(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"body": "some text"}\n' * 200)
    text = AXOLOTL.replace("context_parallel_size: 2", "").replace("dp_shard_size: 4", "").replace("4_096", "64")
    (tmp_path / "a.yaml").write_text(text)
    made, _ = convert("axolotl", "pentagrid", str(tmp_path / "a.yaml"), world_size=1)
    (tmp_path / "preset.yaml").write_text(made)
    command = ["train.py", "--config", str(tmp_path / "preset.yaml"), "--dry-run", "--tokenizer-type", "byte"]
    data = ["--data-path", str(tmp_path / "corpus.jsonl"), "--data-cache-path", str(tmp_path / "cache")]
    done = subprocess.run([sys.executable, *command, *data], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_preset_that_train_refuses_is_listed(tmp_path: Path) -> None:
    text = AXOLOTL.replace("4_096", "4_097")
    assert has(run(tmp_path, text, "axolotl", world_size=8)[1].lost, "train.py refuses the preset", "--seq-length 4097")


# ---------------------------------------------------------------------------------------------------
# Round trips


@st.composite
def presets(draw: st.DrawFn) -> dict[str, Any]:
    """Flags that all three suites have, and the ranks that they need."""
    size = st.sampled_from([1, 2, 4])
    cp, tp, shard, replicas = draw(size), draw(st.sampled_from([1, 2])), draw(size), draw(st.sampled_from([1, 2]))
    micro, accumulate = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    steps, peak = draw(st.integers(20, 10_000)), draw(st.sampled_from([1e-3, 3e-4, 2.5e-5]))
    flags: dict[str, Any] = {
        "cp_size": cp,
        "tp_size": tp,
        "dp_shard_size": shard,
        "dp_replicate_size": replicas,
        "micro_batch_size": micro,
        "global_batch_size": micro * accumulate * shard * replicas,
        "seq_length": draw(st.sampled_from([512, 4096])),
        "num_layers": draw(st.integers(1, 8)),
        "hidden_size": 256,
        "ffn_hidden_size": draw(st.sampled_from([512, 768])),
        "num_attention_heads": 8,
        "num_query_groups": draw(st.sampled_from([4, 8])),
        "kv_channels": draw(st.sampled_from([32, 64])),
        "rotary_base": draw(st.sampled_from([10000.0, 500000.0])),
        "norm_epsilon": draw(st.sampled_from([1e-5, 1e-6])),
        "tie_embeddings": draw(st.booleans()),
        "init_method_std": draw(st.sampled_from([0.02, 0.006])),
        "train_iters": steps,
        "lr": peak,
        "lr_warmup_iters": draw(st.integers(2, 19)),
        "lr_decay_style": draw(st.sampled_from(["cosine", "constant"])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "adam_beta1": draw(st.sampled_from([0.9, 0.8])),
        "adam_beta2": draw(st.sampled_from([0.95, 0.999])),
        "adam_eps": draw(st.sampled_from([1e-8, 1e-6])),
        "clip_grad": draw(st.sampled_from([1.0, 0.5])),
        "seed": draw(st.integers(0, 2**31)),
        "dtype": draw(st.sampled_from(["bf16", "fp32"])),
        "recompute": draw(st.sampled_from(["none", "selective", "full"])),
        "reshard_after_forward": draw(st.sampled_from(["on", "off"])),
        "save_interval": draw(st.integers(1, 500)),
        "eval_interval": draw(st.integers(1, 500)),
        "run_dir": "checkpoints/run",
    }
    if flags["lr_decay_style"] == "cosine":
        flags["min_lr"] = draw(st.sampled_from([0.1, 0.25, 1.0])) * peak
    return flags


def flags_of(text: str) -> dict[str, Any]:
    return parse_arguments([], {name.replace("-", "_"): value for name, value in yaml.safe_load(text).items()}).flags()


@pytest.mark.parametrize("peer", ["nemo", "axolotl"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flags=presets())
def test_round_trips_keep_what_both_suites_have(tmp_path: Path, peer: str, flags: dict[str, Any]) -> None:
    world = flags["cp_size"] * flags["tp_size"] * flags["dp_shard_size"] * flags["dp_replicate_size"]
    first, other = tmp_path / "first.yaml", tmp_path / "other.yaml"
    first.write_text(yaml.safe_dump({name.replace("_", "-"): value for name, value in flags.items()}))
    made, _ = convert("pentagrid", peer, str(first), world_size=world, model="folder" if peer == "axolotl" else None)
    other.write_text(made)
    back = flags_of(convert(peer, "pentagrid", str(other), world_size=world)[0])
    same = {
        name: pytest.approx(value, rel=1e-9) if isinstance(value, float) else value for name, value in flags.items()
    }
    assert {name: back[name] for name in flags} == same
    assert back["packing"] == "best-fit" and back["qkv_format"] == "thd"


# ---------------------------------------------------------------------------------------------------
# The table and the hints


def test_the_table_is_whole() -> None:
    names = [concept.name for concept in TABLE]
    assert len(names) == len(set(names))
    flags = {action.dest for action in build_parser()._actions}
    for concept in TABLE:
        assert set(concept.columns) <= set(SUITES)
        for suite, column in concept.columns.items():
            assert not column.keys or column.read is not None or concept.name == "world_size", (concept.name, suite)
        ours = concept.columns.get("pentagrid")
        assert ours is None or set(ours.keys) <= flags
    assert set(NOT_NEEDED) == set(NO_COUNTERPART) == set(SUITES) - {"hf"}


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--context-parallel-size=2", "--cp-size"),
        ("--tensor-model-parallel-size", "--tp-size"),
        ("--learning-rate", "--lr"),
        ("--max-grad-norm", "--clip-grad"),
        ("--bf16", "--dtype bf16"),
        ("--parallelism.context-parallel-degree", "--cp-size"),
    ],
)
def test_a_foreign_flag_answers_with_its_counterpart(word: str, hint: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_arguments([word, "4"])
    name = word.split("=")[0]
    assert str(refused.value).startswith(f"unknown flag {word}, a name of ") and str(refused.value).endswith(
        f"has {hint}"
    )
    assert find_counterpart(name) is not None and find_counterpart("--cp-sise") is None


def test_hints_name_flags_that_exist() -> None:
    known = set(build_parser()._option_string_actions)
    said = {word.rstrip(",;") for _, hint in OTHERS.values() for word in hint.split() if word.startswith("--")}
    assert said <= known
    assert not FIELDS & set(OTHERS)
