"""Imported weights under other layouts, and a longer context from them (docs/huggingface.md)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from checkpoint.files import find_run_checkpoint, read_run_metadata
from data.tokenizer import ByteTokenizer
from parallel.grid import Grid, GridSizes, build_grid
from tests.launch import SMALL, train, write_corpus
from tests.unit.test_generate import training_logits
from tools import convert_hf
from tools.generate import CachedAttention, load_model

QUIET = ["--eval-interval", "0", "--save-interval", "0", "--sample-tokens", "0", "--tensorboard-dir", "none"]
QUIET += ["--device", "cpu", "--lr-warmup-iters", "2", "--log-interval", "50"]


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_grid(GridSizes())
    dist.destroy_process_group()


def imported(folder: Path, *flags: str) -> Path:
    """A run that went to Hugging Face and back."""
    train(0, folder / "first", *SMALL, "--device", "cpu", "--data-cache-path", str(folder / "cache"), *flags)
    for words in (["export", "--load", folder / "first"], ["import", "--input", folder / "export"]):
        assert convert_hf.main([*map(str, words), "--output", str(folder / words[0])]) == 0
    return folder / "import"


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    metadata = read_run_metadata(checkpoint)
    return load_model(checkpoint, metadata, torch.device("cpu"), torch.float64).state_dict()


def test_imported_weights_load_under_every_layout(grid: Grid, tmp_path: Path) -> None:
    data = ["--data-path", str(write_corpus(tmp_path))]
    run = imported(tmp_path, *data, "--train-iters", "4", "--save-interval", "4", "--tie-embeddings", "--qk-norm")
    flags = ["--config", str(run / "model.yaml"), "--load", str(run), "--load-weights-only", *data, *QUIET]
    flags += ["--data-cache-path", str(tmp_path / "cache"), "--dtype", "fp64", "--train-iters", "2", "--lr", "0.01"]
    flags += ["--seq-length", "256", "--global-batch-size", "4", "--document-alignment", "8"]
    tp_and_cp = ["--tp-size", "2", "--cp-size", "2", "--save-interval", "2"]
    layouts = {"one": (0, []), "tp2cp2": (4, tp_and_cp), "pp2": (2, ["--pp-size", "2"])}
    losses = {
        name: [line["loss"] for line in train(ranks, tmp_path / name, *flags, *layout)]
        for name, (ranks, layout) in layouts.items()
    }
    assert len(losses["one"]) == 2 and losses["one"][0] < 5  # a fresh model has 5.5
    for name in ("tp2cp2", "pp2"):
        assert losses[name] == pytest.approx(losses["one"], rel=0, abs=1e-9)

    # The checkpoint of four ranks, whose tensors lie in several files, goes out whole.
    checkpoint = find_run_checkpoint(tmp_path / "tp2cp2")
    for words in (["export", "--load", checkpoint], ["import", "--input", tmp_path / "out"]):
        place = tmp_path / ("out" if words[0] == "export" else "back")
        assert convert_hf.main([*map(str, words), "--output", str(place)]) == 0
    models = [load_weights(place) for place in (checkpoint, find_run_checkpoint(tmp_path / "back"))]
    assert all(torch.equal(x[:257], models[1][name][:257]) for name, x in models[0].items())  # padded rows are 0


def write_long_documents(path: Path, seed: int) -> list[str]:
    """Documents of 256 bytes: words in a random order, so that no position tells the text."""
    random.seed(seed)
    texts = []
    for _ in range(200):
        words = random.choices(
            ["ring", "token", "place", "padding", "silent", "axes", "loss", "divide", "sum", "five", "one", "turns"],
            k=60,
        )
        texts.append(" ".join(words)[:255])
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@torch.no_grad()
def loss_by_position(run: Path, texts: list[str]) -> torch.Tensor:
    """[255] mean loss of each position's next token."""
    checkpoint = find_run_checkpoint(run)
    model = load_model(checkpoint, read_run_metadata(checkpoint), torch.device("cpu"), torch.float32)
    losses = []
    for text in texts:
        for layer in model.layers.values():
            layer.attention.attention = CachedAttention()  # type: ignore[union-attr, assignment]
        ids = ByteTokenizer().encode(text).tolist()
        losses.append(F.cross_entropy(training_logits(model, ids)[:-1], torch.tensor(ids[1:]), reduction="none"))
    return torch.stack(losses).mean(0)


def test_a_longer_context_lowers_the_loss_at_far_positions(grid: Grid, tmp_path: Path) -> None:
    """The recipe of docs/huggingface.md at small size: samples of 64 tokens, then of 256 under cp 2."""
    write_long_documents(tmp_path / "long.jsonl", seed=1)
    held_out = write_long_documents(tmp_path / "other.jsonl", seed=2)[:20]
    data = ["--data-path", str(tmp_path / "long.jsonl")]
    short = [
        "--seq-length",
        "64",
        "--global-batch-size",
        "16",
        "--micro-batch-size",
        "16",
        "--train-iters",
        "120",
        "--save-interval",
        "120",
    ]
    run = imported(tmp_path, *data, *short)
    before = loss_by_position(run, held_out)
    flags = ["--config", str(run / "model.yaml"), "--config", "configs/long_context_extension.yaml", *data, *QUIET]
    flags += ["--load", str(run), "--load-weights-only", "--data-cache-path", str(tmp_path / "cache")]
    flags += ["--seq-length", "256", "--rope-original-seq-length", "64", "--global-batch-size", "8", "--dtype", "fp32"]
    flags += ["--train-iters", "30", "--save-interval", "30", "--lr", "0.003", "--min-lr", "0.003"]
    train(2, tmp_path / "long", *flags, "--micro-batch-size", "8")
    after = loss_by_position(tmp_path / "long", held_out)
    near, far = slice(8, 64), slice(128, 255)
    gaps = [float(losses[far].mean() - losses[near].mean()) for losses in (before, after)]
    for name, part in (("near", near), ("far", far)):
        print(f"{name} {before[part].mean():.3f} -> {after[part].mean():.3f}")
    assert before[far].mean() - after[far].mean() > 0.2
    assert gaps[1] < gaps[0] / 2
