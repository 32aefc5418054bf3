"""Models go to transformers and back: logits, weights to the bit, tokens, text, loss and training step; refusals."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

from benchmarks import convert_hf as benchmark
from checkpoint.files import find_checkpoint, find_run_checkpoint, read_run_metadata
from checkpoint.saver import Saver
from cp.attention import build_attention
from data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, train_sentencepiece
from model.config import GPTConfig
from parallel.grid import Grid, GridSizes, build_grid
from tests.distributed.test_model_parity import P2P, built, config_of
from tests.distributed.test_reshard import optimizer_of
from tests.flags import resolve_config
from tests.forked import run_script
from tests.launch import ROOT, SMALL, environment, train, write_corpus
from tests.unit.test_generate import training_logits
from tests.wide_transformers import load_wide
from tools import checkpoint as checkpoint_tool
from tools import convert_hf
from tools.generate import load_model
from tools.hf import weights
from tools.hf.config import describe_lost, list_ends, model_flags, read_config, read_positions
from tools.hf.tokenizer import find_end_token, find_start, write_tokenizer
from training.build import build_data
from utils.errors import UserError

SHAPE = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=256,
    bos_token_id=None,
    initializer_range=0.2,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}
# Kinds of models that are imported: (model_type, changes of SHAPE).
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama 3": ("llama", dict(rope_parameters=LLAMA3, head_dim=16)),
    "linear": ("llama", dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})),
    "smollm": ("llama", dict(tie_word_embeddings=True, num_attention_heads=8, rms_norm_eps=1e-5, vocab_size=384)),
    "tinyllama": ("llama", dict(num_hidden_layers=3, num_key_value_heads=1)),
    # As wide as the padded vocabulary: a matrix that could be taken for a table.
    "wide mlp": ("llama", dict(intermediate_size=384)),
    "mistral": ("mistral", dict(sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen3": ("qwen3", dict(head_dim=24, rms_norm_eps=1e-6)),
    "qwen3 tied": ("qwen3", dict(head_dim=8, tie_word_embeddings=True)),
}
# Our models that are exported; vocabulary 261 padded to 272.
OURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all heads": dict(num_query_groups=4),
    "wide heads": dict(kv_channels=20),
    "qk norm, tied": dict(qk_norm=True, tie_embeddings=True),
    "qk norm, odd width": dict(qk_norm=True, hidden_size=36, num_attention_heads=8),
    "tied": dict(tie_embeddings=True),
    "linear": dict(rope_scaling="linear", rope_scaling_factor=2.5),
    "llama3": dict(rope_scaling="llama3", rope_scaling_factor=8.0, rope_original_seq_length=16, rotary_base=5e5),
    "qk norm, llama3": dict(qk_norm=True, rope_scaling="llama3", rope_scaling_factor=4.0, rope_original_seq_length=8),
    "constants": dict(norm_epsilon=1e-3, rotary_base=123.0),
}
IDS = np.random.default_rng(5).integers(0, 257, 50).tolist()


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_grid(GridSizes())
    dist.destroy_process_group()


def byte_files() -> dict[str, str]:
    return write_tokenizer(ByteTokenizer(), max_positions=64, keep_template=False)


def make_hf(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, tokenizer: bool = True) -> Path:
    """A random model of the kind, saved by transformers in several shards, with norms that are not 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = KINDS[kind]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SHAPE | changes))).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size="40KB")
    for name, content in byte_files().items() if tokenizer else ():
        (folder / name).write_text(content)
    return folder


def convert(*words: Any) -> int:
    return convert_hf.main([str(word) for word in words])


def hf_logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    wide = dtype == torch.float64
    model = load_wide(folder) if wide else AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def our_logits(checkpoint: Path, dtype: torch.dtype) -> torch.Tensor:
    model = load_model(checkpoint, read_run_metadata(checkpoint), torch.device("cpu"), dtype)
    for layer in model.layers.values():  # the attention that trains, on several documents
        layer.attention.attention = build_attention(P2P["thd"], head_dim=model.config.kv_channels)  # type: ignore[union-attr, assignment]
    return training_logits(model, IDS)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def make_ours(folder: Path, grid: Grid, tokenizer: Tokenizer | None = None, **changes: Any) -> Path:
    """The folder of a run with a checkpoint of random weights and moments."""
    config = config_of(**(dict(vocab_size=261, padded_vocab_size=272) | changes))
    model = built(grid, config, "fp64")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    tokenizer = tokenizer or ByteTokenizer()
    metadata = {f"model {name}": value for name, value in asdict(config).items() if not name.endswith("_dropout")}
    metadata |= {"tokenizer": tokenizer.fingerprint, "--seq-length": 64}
    Saver(folder / "checkpoints", model, optimizer_of(model), grid).save(7, metadata)
    flags = dict(tokenizer_type="byte", tokenizer_model=None, tokenizer_eod=None, data_cache_path=str(folder))
    flags |= dict(data_path=None, valid_data_path=None)
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    return folder


# ---------------------------------------------------------------------------------------------------
# Logits and weights


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_model_has_the_same_logits_and_comes_back_to_the_bit(grid: Grid, tmp_path: Path, kind: str) -> None:
    source = make_hf(tmp_path / "hf", kind)
    assert len(list(source.glob("*.safetensors"))) > 1
    assert convert("import", "--input", source, "--output", tmp_path / "run") == 0
    checkpoint = find_run_checkpoint(tmp_path / "run")
    assert checkpoint_tool.main(["verify", str(checkpoint)]) == 0
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        wanted = hf_logits(source, dtype)
        got = our_logits(checkpoint, dtype)
        assert wanted.abs().max() > 1, "logits that show a difference"
        torch.testing.assert_close(got, wanted, rtol=close, atol=close)

    assert convert("export", "--load", tmp_path / "run", "--output", tmp_path / "back", "--shard-size", 4e-5) == 0
    before, after = read_all(source), read_all(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    from transformers import AutoConfig

    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "back")]
    own = (
        "architectures",
        "model_type",
        "_name_or_path",
        "sliding_window",
        "mlp_bias",
        "pretraining_tp",
        "layer_types",
    )
    first, second = ({k: v for k, v in config.items() if k not in own} for config in configs)
    assert {k: v for k, v in first.items() if v != second.get(k)} == {}


@pytest.mark.parametrize("name", OURS)
def test_an_exported_model_has_the_same_logits(grid: Grid, tmp_path: Path, name: str) -> None:
    run = make_ours(tmp_path / "run", grid, **OURS[name])
    assert convert("export", "--load", run, "--output", tmp_path / "hf") == 0
    assert len({file.stat().st_mode for file in (tmp_path / "hf").iterdir()}) == 1, "who reads one file reads all"
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = hf_logits(tmp_path / "hf", dtype)
        assert got.shape == (len(IDS), 261) and got.abs().max() > 1
        torch.testing.assert_close(got, our_logits(find_run_checkpoint(run), dtype), rtol=close, atol=close)
    assert convert("import", "--input", tmp_path / "hf", "--output", tmp_path / "back") == 0
    first, second = (find_run_checkpoint(tmp_path / folder) for folder in ("run", "back"))
    readers = [checkpoint_tool.SafeReader(first), checkpoint_tool.SafeReader(second)]
    for tensor in checkpoint_tool.read_tensor_index(readers[1]):
        a, b = (reader.read_tensor(tensor) for reader in readers)
        rows = 261 if a.shape[0] == 272 else a.shape[0]  # padded rows are 0 after an import
        assert torch.equal(a[:rows], b[:rows]), tensor
    config, back = (read_run_metadata(place) for place in (first, second))
    wanted = {key: value for key, value in config.items() if key.startswith("model ") and "padded" not in key}
    assert {key: back[key] for key in wanted} == wanted


def test_bf16_weights_stay_bf16_and_a_dtype_is_rounded_once(grid: Grid, tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", "llama 3", dtype=torch.bfloat16)
    convert("import", "--input", source, "--output", tmp_path / "run")
    convert("export", "--load", tmp_path / "run", "--output", tmp_path / "back")
    convert("export", "--load", tmp_path / "run", "--output", tmp_path / "wide", "--dtype", "fp32")
    before, after, wide = read_all(source), read_all(tmp_path / "back"), read_all(tmp_path / "wide")
    assert all(torch.equal(before[n], after[n]) and after[n].dtype == torch.bfloat16 for n in before)
    assert all(torch.equal(before[n].float(), wide[n]) for n in before)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    run = make_ours(tmp_path / "ours", grid)
    convert("export", "--load", run, "--output", tmp_path / "rounded", "--dtype", "bf16")
    convert("export", "--load", run, "--output", tmp_path / "whole")
    rounded, whole = read_all(tmp_path / "rounded"), read_all(tmp_path / "whole")
    assert all(torch.equal(rounded[n], whole[n].bfloat16()) and whole[n].dtype == torch.float64 for n in whole)


# ---------------------------------------------------------------------------------------------------
# Tokens and text

TEXTS = (
    "def f(x):\n    return x",
    "",
    " a  b ",
    "Füße \u4e2d\u6587 \U0001f600 e\u0301",
    "tab\t\r\n0123",
    "the the  the",
)


def pieces_model(folder: Path, *, prefix: bool = False) -> SentencePieceTokenizer:
    """A SentencePiece model of the corpus, as a run trains it, or with the space that Llama 2's puts before a text."""
    lines = write_corpus(folder).read_text().splitlines()
    content = train_sentencepiece((json.loads(line)["text"] for line in lines), vocab_size=340)
    if prefix:
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(content)
        model.normalizer_spec.add_dummy_prefix = True
        content = model.SerializeToString()
    (folder / "own.model").write_bytes(content)
    return SentencePieceTokenizer(folder / "own.model")


def words_file(folder: Path) -> Path:
    """A tokenizer.json with byte-level merges and a template that puts a BOS before each text, as Llama 3's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    own = tokenizers.Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator(["the ring turns once and the ring turns"] * 4, trainer)
    template = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    own.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    own.save(str(folder / "words.json"))
    return folder / "words.json"


def own_tokenizer(kind: str, folder: Path) -> Tokenizer:
    if kind == "byte":
        return ByteTokenizer()
    if kind == "huggingface":
        return HuggingFaceTokenizer(words_file(folder))
    return pieces_model(folder, prefix=kind == "prefix")


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])  # transformers chooses a class by it
@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "prefix", "huggingface"])
def test_transformers_reads_the_same_ids(tmp_path: Path, kind: str, model_type: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = own_tokenizer(kind, tmp_path)
    for name, content in write_tokenizer(tokenizer, max_positions=64, keep_template=False).items():
        (tmp_path / name).write_text(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    there = AutoTokenizer.from_pretrained(tmp_path)
    corpus = write_corpus(tmp_path).read_text().splitlines()
    for text in (*TEXTS, *corpus):
        ids = tokenizer.encode(text).tolist()
        assert there(text)["input_ids"] == ids, text
        assert there.decode(ids) == tokenizer.decode(ids) == text
    assert there.eos_token_id == tokenizer.eod and there.bos_token_id is None


def test_a_template_is_kept_where_asked(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, content in write_tokenizer(
        HuggingFaceTokenizer(words_file(tmp_path)), max_positions=64, keep_template=True
    ).items():
        (tmp_path / name).write_text(content)
    ids = AutoTokenizer.from_pretrained(tmp_path)("the ring")["input_ids"]
    assert ids[0] == 0 and ids[1:] == HuggingFaceTokenizer(tmp_path / "words.json").encode("the ring").tolist()


def test_a_tokenizer_that_would_give_other_ids_is_refused(tmp_path: Path, monkeypatch) -> None:
    tokenizer = pieces_model(tmp_path)
    from tools.hf import tokenizer as module

    monkeypatch.setattr(module, "_find_merges", lambda scores, vocab: [])
    with pytest.raises(UserError, match="would become"):
        write_tokenizer(tokenizer, max_positions=64, keep_template=False)


def trained_run(folder: Path, kind: str, *flags: str) -> Path:
    """A run of a few steps at a high learning rate: its greedy text is no constant."""
    words = ["--data-path", str(write_corpus(folder)), "--data-cache-path", str(folder / "cache"), "--device", "cpu"]
    if kind == "huggingface":
        words += ["--tokenizer-type", "huggingface", "--tokenizer-model", str(words_file(folder))]
    if kind == "sentencepiece":
        words += ["--tokenizer-type", "auto", "--tokenizer-vocab-size", "320"]
    train(0, folder / "run", *SMALL, *words, "--train-iters", "12", "--save-interval", "12", *flags)
    return folder / "run"


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("byte", ["--qk-norm", "--tie-embeddings"]),
        ("sentencepiece", ["--rope-scaling", "llama3", "--rope-original-seq-length", "64"]),
        ("huggingface", []),
    ],
)
def test_greedy_text_is_that_of_the_tool(tmp_path: Path, kind: str, flags: list[str]) -> None:
    from transformers import AutoTokenizer

    run = trained_run(tmp_path, kind, *flags)
    assert convert("export", "--load", run, "--output", tmp_path / "hf") == 0
    model, tokenizer = load_wide(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")  # no ties in float64
    prompt = tokenizer("the ring ", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    ids = ids[: int((ids == tokenizer.eos_token_id).nonzero()[:1].sum()) or None]
    arguments = ["--load", str(run), "--prompt", "the ring ", "--tokens", "40", "--greedy", "--dtype", "fp64"]
    said = run_script("tools/generate.py", *arguments, "--device", "cpu", environment=environment(), timeout=120)
    assert said.returncode == 0, said.stderr
    assert said.stdout == tokenizer.decode(ids) + "\n" and len(ids) > prompt["input_ids"].shape[1] + 3


# ---------------------------------------------------------------------------------------------------
# Training


def test_the_loss_and_a_training_step_are_those_of_train(tmp_path: Path) -> None:
    """A run from the imported weights, and the exported model with PyTorch's AdamW on the same documents."""
    first = trained_run(tmp_path, "byte", "--qk-norm", "--kv-channels", "12")
    convert("export", "--load", first, "--output", tmp_path / "hf")
    convert("import", "--input", tmp_path / "hf", "--output", tmp_path / "imported")
    flags = ["--config", str(tmp_path / "imported" / "model.yaml"), "--data-path", str(tmp_path / "corpus.jsonl")]
    flags += ["--data-cache-path", str(tmp_path / "cache"), "--seq-length", "128", "--global-batch-size", "2"]
    flags += ["--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--lr", "0.003", "--min-lr", "0.003"]
    flags += ["--clip-grad", "0", "--dtype", "fp64", "--device", "cpu", "--train-iters", "3", "--eval-interval", "0"]
    flags += ["--save-interval", "0", "--sample-tokens", "0", "--tensorboard-dir", "none", "--no-balance-work"]
    load = ["--load", str(tmp_path / "imported"), "--load-weights-only"]
    losses = [line["loss"] for line in train(0, tmp_path / "further", *flags, *load)]

    data = build_data(resolve_config(*flags)).train
    model = load_wide(tmp_path / "hf")
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.003, betas=(0.9, 0.95), eps=1e-8)
    found = []
    for step in range(3):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for sample in (data.sample(2 * step), data.sample(2 * step + 1)):
            at = 0
            for length, padded in zip(sample.lengths.tolist(), sample.padded_lengths.tolist(), strict=True):
                tokens, labels = (torch.as_tensor(x[at : at + length]).long() for x in (sample.tokens, sample.labels))
                if length:
                    logits = model(tokens[None]).logits[0]
                    total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
                count += int((labels != -100).sum())
                at += padded
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        found.append((total / count).item())
    assert len(losses) == 3 and losses == pytest.approx(found, rel=0, abs=1e-9)
    assert abs(losses[0] - losses[1]) > 1e-6


# ---------------------------------------------------------------------------------------------------
# Refusals


def edited(folder: Path, **changes: Any) -> None:
    """Change config.json; generation_config.json would contradict it."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    said = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value != "REMOVED"}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """One safetensors file of changed tensors instead of the shards."""
    tensors = read_all(folder)
    change(tensors)
    for path in (*folder.glob("*.safetensors"), folder / weights.INDEX_FILE):
        path.unlink()
    save_file(tensors, folder / weights.ONE_FILE)


def pickled(folder: Path) -> None:
    rewrite(folder, dict)
    (folder / weights.ONE_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def reindexed(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / weights.INDEX_FILE).read_text())
        index["weight_map"]["model.norm.weight"] = name if name != "" else min(index["weight_map"].values())
        (folder / weights.INDEX_FILE).write_text(json.dumps(index))

    return change


def linked(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        place = next(iter(folder.glob(name)))
        outside = folder.parent / "outside"
        place.rename(outside)
        place.symlink_to(outside)

    return change


def piped(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def both_weights(folder: Path) -> None:
    save_file({name: 1.5 * x for name, x in read_all(folder).items()}, folder / weights.ONE_FILE)


def truncated(folder: Path) -> None:
    path = next(iter(folder.glob("*.safetensors")))
    path.write_bytes(path.read_bytes()[:-8])


def set_tensor(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: value}))


Q = "model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "qwen2": (lambda f: edited(f, model_type="qwen2"), "model_type 'qwen2' has biases in attention"),
    "mixtral": (lambda f: edited(f, model_type="mixtral"), "mixture of experts"),
    "unknown type": (
        lambda f: edited(f, model_type="mamba"),
        "'mamba' is not supported; supported: llama, mistral, qwen3",
    ),
    "no type": (lambda f: edited(f, model_type="REMOVED"), "no model_type"),
    "bias": (lambda f: edited(f, attention_bias=True), "attention_bias True: biases in attention"),
    "mlp bias": (lambda f: edited(f, mlp_bias=True), "biases in the MLP"),
    "experts": (lambda f: edited(f, num_experts=8), "mixture of experts"),
    "gelu": (lambda f: edited(f, hidden_act="gelu"), "hidden_act 'gelu'"),
    "quantized": (lambda f: edited(f, quantization_config={"bits": 4}), "quantized weights"),
    "own code": (lambda f: edited(f, auto_map={"AutoModel": "x.Y"}), "code of its own"),
    "window": (lambda f: edited(f, model_type="mistral", sliding_window=4096), "sliding_window 4096"),
    "window by default": (lambda f: edited(f, model_type="mistral", sliding_window="REMOVED"), "sliding_window 4096"),
    "window in qwen3": (lambda f: edited(f, model_type="qwen3", use_sliding_window=True), "sliding windows"),
    "window in layers": (lambda f: edited(f, layer_types=["sliding_attention"]), "layer_types"),
    "layers of another kind": (lambda f: edited(f, layer_types=7), "layer_types"),
    "yarn": (lambda f: edited(f, rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_type 'yarn'"),
    "dynamic": (lambda f: edited(f, rope_parameters="REMOVED", rope_scaling={"type": "dynamic"}), "'dynamic'"),
    "rope by layer": (lambda f: edited(f, rope_parameters={"full_attention": {}}), "'full_attention'"),
    "two ropes": (lambda f: edited(f, rope_scaling={"rope_type": "linear", "factor": 2.0}), "differ"),
    "other turns": (
        lambda f: edited(f, rope_parameters=LLAMA3 | {"low_freq_factor": 2.0}),
        "frequency factors (2.0, 4.0)",
    ),
    "two original lengths": (
        lambda f: edited(f, original_max_position_embeddings=32),
        "original_max_position_embeddings is 32, and 16 in the rotary scaling",
    ),
    "small linear factor": (
        lambda f: edited(f, rope_parameters={"rope_type": "linear", "factor": 0.5}),
        "rope_type linear with factor 0.5: must be 1 or more",
    ),
    "small llama3 factor": (lambda f: edited(f, rope_parameters=LLAMA3 | {"factor": 0.5}), "must be 1 or more"),
    "another head": (
        lambda f: edited(f, architectures=["LlamaForSequenceClassification"]),
        "architectures ['LlamaForSequenceClassification']: only LlamaForCausalLM is supported",
    ),
    "another model's head": (lambda f: edited(f, model_type="qwen3"), "only Qwen3ForCausalLM is supported"),
    "text for positions": (lambda f: edited(f, max_position_embeddings="64"), "max_position_embeddings '64': must be"),
    "no factor": (lambda f: edited(f, rope_parameters={"rope_type": "linear"}), "has no factor"),
    "rope of another kind": (lambda f: edited(f, rope_parameters=[1]), "must be a mapping"),
    "a part of each head": (lambda f: edited(f, partial_rotary_factor=0.5), "part of each head"),
    "infinite base": (lambda f: edited(f, rope_parameters={"rope_theta": 1e400}), "rope_theta inf"),
    "huge width": (lambda f: edited(f, hidden_size=2**40), "hidden_size 1099511627776: must be a whole number"),
    "wide": (lambda f: edited(f, hidden_size=2**30, head_dim=8), "is [300, 32]; config.json says [300, 1073741824]"),
    "many layers": (lambda f: edited(f, num_hidden_layers=2**30), "has no tensor model.layers.2."),
    "fewer layers": (lambda f: edited(f, num_hidden_layers=1), "has no place in our model"),
    "text for a number": (lambda f: edited(f, hidden_size="32"), "hidden_size '32'"),
    "true for a number": (lambda f: edited(f, num_hidden_layers=True), "num_hidden_layers True"),
    "heads and groups": (lambda f: edited(f, num_key_value_heads=3), "num_key_value_heads 3 does not divide"),
    "odd head": (lambda f: edited(f, head_dim=7), "head_dim 7 is odd"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 100000), "config.json: not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "No such file"),
    "linked config": (linked("config.json"), "is a link, which is not followed; copy the folder with cp -rL"),
    "linked shard": (linked("*-00001-*"), "is a link, which is not followed"),
    "linked index": (linked("*.index.json"), "is a link, which is not followed"),
    "linked tokenizer": (linked("tokenizer.json"), "is a link, which is not followed"),
    "piped tokenizer": (piped, "tokenizer.json: is no regular file"),
    "stale weights": (both_weights, "model.safetensors: model.safetensors.index.json is there too"),
    "path in the index": (reindexed("../outside.safetensors"), "is no safetensors file of this folder"),
    "absolute path in the index": (reindexed("/etc/passwd"), "is no safetensors file of this folder"),
    "shard of another type": (reindexed(7), "is no safetensors file of this folder"),  # type: ignore[arg-type]
    "missing shard": (reindexed("model-9.safetensors"), "No such file"),
    "wrong shard": (reindexed(""), "holds no 'model.norm.weight'"),
    "empty index": (lambda f: (f / weights.INDEX_FILE).write_text("{}"), "has no weight_map"),
    "cut": (truncated, "not a safetensors file"),
    "pickle": (pickled, "pytorch_model.bin: pickled weights, which may run code"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "neither model.safetensors nor"),
    "bias tensor": (set_tensor(f"{Q}.bias", torch.zeros(32)), "q_proj.bias' has no place in our model"),
    "shape": (set_tensor(f"{Q}.weight", torch.zeros(32, 64)), "is [32, 64]; config.json says [64, 32]"),
    "integers": (set_tensor(f"{Q}.weight", torch.zeros(64, 32, dtype=torch.int8)), "q_proj.weight is I8; supported"),
    "two dtypes": (set_tensor(f"{Q}.weight", torch.zeros(64, 32).bfloat16()), "must have one dtype"),
    "NaN": (set_tensor("model.norm.weight", torch.tensor([1.0] * 31 + [float("nan")])), "norm.weight: has values that"),
    "infinite": (set_tensor(f"{Q}.weight", torch.full((64, 32), -float("inf"))), "q_proj.weight: has values that are"),
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), "has no tensor model.norm.weight"),
    "tied but different": (
        lambda f: edited(f, tie_word_embeddings=True),
        "lm_head.weight differs from the embedding, but config.json ties them",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "neither tokenizer.json nor tokenizer.model"),
    "small vocabulary": (
        lambda f: (edited(f, vocab_size=200), rewrite(f, lambda t: t.update({n: t[n][:200].clone() for n in TABLES}))),
        "257 tokens; config.json has vocab_size 200",
    ),
    "no such end": (lambda f: edited(f, eos_token_id=299), "no token with the id 299"),
    "end of another kind": (lambda f: edited(f, eos_token_id={"a": 1}), "give --tokenizer-eod"),
}
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return make_hf(tmp_path_factory.mktemp("good") / "hf", "llama 3")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_imported_is_refused_by_name(good: Path, tmp_path: Path, name: str) -> None:
    change, words = REFUSED[name]
    shutil.copytree(good, tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(UserError) as refused:
        convert("import", "--input", tmp_path / "hf", "--output", tmp_path / "run")
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".*"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["llama", "qwen3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*LLAMA3, "type"]), inner, max_size=4),
    max_leaves=6,
)
CONFIG_KEYS = [
    "rope_theta",
    "auto_map",
    "sliding_window",
    "model_type",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "head_dim",
    "original_max_position_embeddings",
    "attention_dropout",
    "architectures",
    *SHAPE,
]


@example({"num_hidden_layers": [{"rope_type": [], "factor": dict.fromkeys(LLAMA3, 1.2446625619401422e137)}] * 2})
@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(CONFIG_KEYS), VALUES, max_size=3))
def test_a_config_of_any_values_is_a_model_or_refused(changes: dict[str, Any]) -> None:
    try:
        said = {"model_type": "llama", **SHAPE, **changes}
        config = read_config(said, "config.json")
        read_positions(said, "config.json")
    except UserError as error:
        assert str(error).startswith("config.json") and "\n" not in str(error) and len(str(error)) < 400
    else:
        assert resolve_config("--tokenizer-type", "byte", *as_flags(config)).model.architecture(1) == config
        assert isinstance(list_ends(said), list)
        assert all(
            "\n" not in line and len(line) < 400
            for line in describe_lost(said, ends=list_ends(said), bos=None, eod=256)
        )


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["added_tokens", "model"]), VALUES | st.dictionaries(st.just("vocab"), VALUES)),
    VALUES,
)
def test_an_end_of_any_value_is_a_token_or_refused(said: dict[str, Any], eos: Any) -> None:
    with mock.patch("tools.hf.tokenizer.read_json_file", lambda path: said):
        try:
            assert isinstance(find_end_token(Path("tokenizer.json"), eos), str)
        except UserError as error:
            assert "\n" not in str(error)


def test_an_original_length_beside_the_scaling_counts(grid: Grid, good: Path, tmp_path: Path) -> None:
    """transformers 5 takes it; 16 differs from max_position_embeddings, 64, which it takes where there is none."""
    shutil.copytree(good, tmp_path / "hf")
    scaling = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    edited(tmp_path / "hf", rope_parameters=scaling, original_max_position_embeddings=16)
    assert convert("import", "--input", tmp_path / "hf", "--output", tmp_path / "run") == 0
    got = our_logits(find_run_checkpoint(tmp_path / "run"), torch.float32)
    torch.testing.assert_close(got, hf_logits(tmp_path / "hf", torch.float32), rtol=1e-5, atol=1e-5)


def test_an_end_that_a_sentencepiece_model_does_not_have_is_refused(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", "smollm", tokenizer=False)
    tokenizer = pieces_model(tmp_path, prefix=True)
    shutil.copy(tmp_path / "own.model", source / "tokenizer.model")
    for end in (77, [77, 78]):
        edited(source, eos_token_id=end)
        with pytest.raises(UserError) as refused:
            convert("import", "--input", source, "--output", tmp_path / "run")
        assert f"eos_token_id {end}; " in str(refused.value)
        assert f"set eos_token_id to {tokenizer.eod}" in str(refused.value)
    for place, end in (("one", tokenizer.eod), ("several", [77, tokenizer.eod]), ("none", None)):
        edited(source, eos_token_id=end)
        assert convert("import", "--input", source, "--output", tmp_path / place) == 0


def test_what_a_run_lacks_is_printed_and_a_kept_template_brings_its_bos_back(tmp_path: Path, capsys) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source = make_hf(tmp_path / "hf", "smollm", tokenizer=False)
    words_file(tmp_path).rename(source / "tokenizer.json")
    edited(source, eos_token_id=[1, 5, 7], bos_token_id=0, attention_dropout=0.1)
    convert("import", "--input", source, "--output", tmp_path / "run")
    said = capsys.readouterr().out
    assert "eos_token_id: 1 ends a document; not kept: 5, 7; after an export add" in said
    assert (
        "bos_token_id 0: runs train without, unless --bos is given; export --keep-template writes the token again"
        in said
    )
    assert "attention_dropout 0.1: not kept; train.py has --attention-dropout" in said
    for name, flags, bos in (("plain", [], None), ("kept", ["--keep-template"], 0)):
        convert("export", "--load", tmp_path / "run", "--output", tmp_path / name, *flags)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        described = [of.from_pretrained(tmp_path / name).bos_token_id for of in (AutoConfig, GenerationConfig)]
        assert [*described, tokenizer.bos_token_id] == [bos] * 3
        assert (tokenizer("the ring")["input_ids"][0] == 0) == (bos == 0)

    edited(source, bos_token_id=3, eos_token_id=1, attention_dropout=0.0)
    capsys.readouterr()
    convert("import", "--input", source, "--output", tmp_path / "other")
    said = capsys.readouterr().out
    assert "bos_token_id 3: runs train without, unless --bos is given; not kept" in said
    assert "eos_token_id" not in said and "dropout" not in said


def test_sampling_and_ends_of_generation_config(tmp_path: Path, capsys) -> None:
    source = make_hf(tmp_path / "hf", "smollm", tokenizer=False)
    words_file(tmp_path).rename(source / "tokenizer.json")
    edited(source, eos_token_id=1)
    file = source / "generation_config.json"
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "pad_token_id": 5}
    file.write_text(json.dumps(sampling | {"eos_token_id": [1, 7]}))
    convert("import", "--input", source, "--output", tmp_path / "run")
    said = capsys.readouterr().out
    assert "eos_token_id: 1 ends a document; not kept: 7; " in said
    assert "generation_config.json: tools/generate.py --temperature 0.6 --top-p 0.9\n" in said
    assert "generation_config.json: not kept: top_k 20\n" in said

    edited(source, eos_token_id=None)  # named by the other file only; without do_sample transformers is greedy
    file.write_text(json.dumps({"temperature": 0.6, "eos_token_id": 1}))
    convert("import", "--input", source, "--output", tmp_path / "other")
    said = capsys.readouterr().out
    assert "not kept: temperature 0.6" in said and "tools/generate.py" not in said and "eos_token_id" not in said
    assert "tokenizer-eod: <|end_of_text|>" in (tmp_path / "other" / "model.yaml").read_text()
    for hostile in ("[1]", "[" * 100_000, "no"):
        file.write_text(hostile)
        with pytest.raises(UserError) as refused:
            convert("import", "--input", source, "--output", tmp_path / "none")
        assert "generation_config.json" in str(refused.value) and "\n" not in str(refused.value)


def test_the_start_of_every_kind_of_template_is_found(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = HuggingFaceTokenizer(words_file(tmp_path))
    first, last = ("<|begin_of_text|>", 0), ("<|end_of_text|>", 1)
    special = [first, last]
    cases = {
        "end only": (processors.TemplateProcessing(single=f"$A {last[0]}", special_tokens=special), None),
        "both": (
            processors.TemplateProcessing(single=f"{first[0]} $A {last[0]}", special_tokens=special),
            (0, first[0]),
        ),
        "roberta": (processors.RobertaProcessing(last, first), (0, first[0])),
        "bytes": (processors.ByteLevel(), None),
    }
    for name, (processor, wanted) in cases.items():
        own = type(tokenizer.processor).from_buffer(tokenizer.content)
        own.post_processor = processor
        tokenizer.content = own.to_str().encode()
        assert find_start(tokenizer) == wanted, name
    assert find_start(ByteTokenizer()) is None


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-0000*.safetensors"])
def test_load_of_a_file_of_hugging_face_names_the_tool(good: Path, name: str) -> None:
    file = next(good.glob(name))
    with pytest.raises(UserError) as refused:
        find_checkpoint(file)
    assert f"--load {file}: a Hugging Face model; python tools/convert_hf.py import --input {good} " in str(
        refused.value
    )


def test_load_of_a_name_of_the_hub_names_the_tool(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such folder; download .* tools/convert_hf.py import"):
        find_checkpoint(Path("meta-llama/Llama-3.1-8B"))
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no checkpoint there"):
        find_checkpoint(Path("runs/none"))


def test_a_head_beside_a_tied_embedding_may_be_equal(grid: Grid, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "hf")
    edited(tmp_path / "hf", tie_word_embeddings=True)
    rewrite(tmp_path / "hf", lambda t: t.update({TABLES[1]: t[TABLES[0]].clone()}))
    assert convert("import", "--input", tmp_path / "hf", "--output", tmp_path / "run") == 0
    assert read_run_metadata(find_run_checkpoint(tmp_path / "run"))["model tie_embeddings"] is True


def test_what_cannot_be_exported_is_refused_by_name(grid: Grid, tmp_path: Path) -> None:
    run = make_ours(tmp_path / "run", grid, hidden_size=36, num_attention_heads=8)
    with pytest.raises(UserError, match="--hidden-size 36: LlamaForCausalLM takes only multiples of the 8"):
        convert("export", "--load", run, "--output", tmp_path / "hf")
    metadata = next(run.glob("checkpoints/*/run.json"))
    said = json.loads(metadata.read_text())
    metadata.write_text(json.dumps(said | {"model num_experts": 8}))
    with pytest.raises(UserError, match="num_experts"):
        convert("export", "--load", run, "--output", tmp_path / "hf")


def test_a_corrupted_checkpoint_is_not_exported(grid: Grid, tmp_path: Path) -> None:
    run = make_ours(tmp_path / "run", grid)
    data = max(run.glob("checkpoints/*/*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match="corrupted"):
        convert("export", "--load", run, "--output", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(grid: Grid, good: Path, tmp_path: Path, monkeypatch, error) -> None:
    run = make_ours(tmp_path / "run", grid)
    before = sorted(path.name for path in tmp_path.iterdir())
    count = 0

    def fails(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 9:
            raise error

    read, read_tensor = weights.ShardReader.read, convert_hf.SafeReader.read_tensor
    monkeypatch.setattr(weights.ShardReader, "read", lambda self, name: fails() or read(self, name))
    monkeypatch.setattr(convert_hf.SafeReader, "read_tensor", lambda self, name: fails() or read_tensor(self, name))
    for words in (("import", "--input", good), ("export", "--load", run)):
        count = 0
        with pytest.raises((KeyboardInterrupt, OSError)):
            convert(*words, "--output", tmp_path / "out")
        assert count == 9 and sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_output_that_exists_is_left_alone(grid: Grid, good: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("text")
    for words in (("import", "--input", good), ("export", "--load", make_ours(tmp_path / "run", grid))):
        with pytest.raises(UserError, match="exists already"):
            convert(*words, "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_train_says_what_a_folder_of_hugging_face_is(good: Path, tmp_path: Path) -> None:
    result = run_script("train.py", "--load", str(good), "--device", "cpu", environment=environment(), timeout=120)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "a Hugging Face model; python tools/convert_hf.py import" in result.stderr
    convert("import", "--input", good, "--output", tmp_path / "run")
    flags = ["--config", str(tmp_path / "run" / "model.yaml"), "--load", str(tmp_path / "run"), "--device", "cpu"]
    result = run_script("train.py", *flags, environment=environment(), timeout=120)
    assert result.returncode == 2 and "add --load-weights-only" in result.stderr
    flags += ["--load-weights-only", "--data-path", str(write_corpus(tmp_path)), "--data-cache-path", str(tmp_path)]
    flags += ["--seq-length", "128", "--eval-only", "--eval-iters", "1", "--run-dir", str(tmp_path / "eval")]
    result = run_script("train.py", *flags, environment=environment(), timeout=120)
    assert result.returncode == 0 and "valid" in result.stdout and "(the checkpoint: unknown)" not in result.stdout


def as_flags(config: GPTConfig) -> list[str]:
    flags = {f"--{key.replace('_', '-')}": value for key, value in model_flags(config).items()}
    return [key if value is True else f"{key}={value}" for key, value in flags.items() if value is not False]


def test_flags_of_every_imported_model_build_that_model(tmp_path: Path) -> None:
    """Also a vocabulary larger than the tokenizer's, and rotary flags that are left out."""
    for changes in OURS.values():
        config = replace(config_of(**changes), vocab_size=300, padded_vocab_size=384)
        assert resolve_config("--tokenizer-type", "byte", *as_flags(config)).model.architecture(257) == config
    with pytest.raises(UserError, match="--vocab-size 256: the tokenizer has 257 tokens"):
        resolve_config("--tokenizer-type", "byte", "--vocab-size", "256").model.architecture(257)


def test_ids_that_no_tokenizer_has_are_left_out_of_text(tmp_path: Path) -> None:
    for kind in ("byte", "sentencepiece", "huggingface"):
        tokenizer = own_tokenizer(kind, tmp_path)
        ids = tokenizer.encode("the ring").tolist()
        assert tokenizer.decode([*ids, tokenizer.vocab_size + 3]) == "the ring"


def test_a_conversion_takes_little_memory(tmp_path: Path) -> None:
    """A model of 320 MiB in files of 80 MB; benchmarks/convert_hf.py measures 2 GiB. Malloc keeps smaller tensors."""
    shape = dict(hidden=2048, layers=1, vocabulary=8192)
    tensor = benchmark.write_model(tmp_path / "hf", **shape, shard_bytes=80_000_000)
    peaks = benchmark.measure(tmp_path, shard_size=0.08, tensor=tensor)
    assert tensor == 64 << 20 and {name: peak.ratio for name, peak in peaks.items() if not 0.1 < peak.ratio < 1} == {}


def test_a_checksum_counts_little_of_a_file_as_memory(tmp_path: Path) -> None:
    """Checkpoints of a run have one file a rank, as large as its weights and moments."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(512 << 20)
    code = """
import pathlib, re, sys
from utils.files import checksum
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before = peak()
checksum(pathlib.Path(sys.argv[1]))
print(peak() - before)
"""
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large")], cwd=ROOT, check=True, capture_output=True
    )
    assert int(child.stdout) < 100 << 10  # KiB
