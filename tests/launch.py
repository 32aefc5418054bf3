"""Run train.py as a user does, and read what it wrote."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.forked import ROOT, run_script

SMALL = shlex.split("""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --seq-length 256 --global-batch-size 4
    --train-iters 10 --lr-warmup-iters 2 --lr 0.01 --tokenizer-type byte --document-alignment 8 --log-interval 5
    --eval-interval 0 --save-interval 0 --sample-tokens 0 --tensorboard-dir none --make-vocab-size-divisible-by 16
""")


def write_corpus(folder: Path) -> Path:
    """Forty documents of ragged lengths, some longer than a sequence of 256 bytes, in one JSONL file."""
    sentences = [
        "the ring turns once",
        "a token knows its place",
        "padding is silent",
        "five axes, one loss",
        "sum, then divide",
    ]
    path = folder / "corpus.jsonl"
    with path.open("w") as out:
        for number in range(40):
            count = 1 + (number * number) % 37
            text = ". ".join(sentences[(number + i) % 5] + f" {number * i}" for i in range(count))
            out.write(json.dumps({"text": text}) + "\n")
    return path


def environment() -> dict[str, str]:
    """This process's, without the variables that would make train.py believe it runs under torchrun."""
    dropped = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    )
    return {k: v for k, v in os.environ.items() if k not in dropped} | {"OMP_NUM_THREADS": "1"}


def run_train(ranks: int, *flags: str, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    """train.py on ranks that are forked, not started (tests/forked.py), or as one process for 0."""
    return run_script("train.py", *flags, environment=environment(), ranks=ranks, timeout=timeout)


def run_torchrun(ranks: int, *words: str, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    """torchrun with a script and its flags, or plain python for 0 ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def train(ranks: int, run_dir: Path, *flags: str) -> list[dict]:
    """The metrics of a run that must succeed."""
    result = run_train(ranks, "--run-dir", str(run_dir), *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    return read_metrics(run_dir / "metrics.jsonl")


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
