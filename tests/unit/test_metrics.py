"""The metrics file of a run that goes on, and a loss that is not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config.schema import LoggingConfig, TrainingConfig
from metrics.log import ROW_COUNTS, MetricsLog, StepResult, open_metrics_file
from metrics.timers import Timers
from model.config import GPTConfig


def test_records_after_the_loaded_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "metrics.jsonl"
    with open_metrics_file(path, None) as out:
        out.writelines(json.dumps({"step": step, "loss": 1 / step}).encode() + b"\n" for step in range(1, 8))
        out.write(b'{"step": 8, "lo')
    with open_metrics_file(path, 5) as out:
        out.write(b'{"step": 6}\n')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[2]["loss"] == 1 / 3  # to the last bit


def test_a_fresh_start_puts_earlier_records_by(tmp_path: Path, capsys) -> None:
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2):
        with open_metrics_file(path, None) as out:
            out.write(f'{{"step": {number}}}\n'.encode())
    open_metrics_file(path, None).close()
    assert path.read_text() == "" and [(tmp_path / f"metrics.jsonl.before-{n}").read_text() for n in (1, 2)] == [
        '{"step": 1}\n',
        '{"step": 2}\n',
    ]
    assert "metrics.jsonl.before-2" in capsys.readouterr().out


def log(path: Path) -> MetricsLog:
    config = GPTConfig(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=1,
        num_query_groups=1,
        kv_channels=8,
        vocab_size=8,
        padded_vocab_size=8,
    )
    return MetricsLog(
        architecture=config,
        training=TrainingConfig(train_iters=4),
        logging=LoggingConfig(log_interval=2),
        control_group=SimpleNamespace(size=lambda: 2, rank=lambda: 0),  # type: ignore[arg-type]
        timers=Timers(0, torch.device("cpu")),
        peak_tflops=100.0,
        metrics_file=path,
    )


def step(metrics: MetricsLog, number: int, loss: float) -> None:
    counts = torch.tensor([90.0, 95.0, 95.0**2, 100.0, 1.5, 1.0, 100.0, 0.0, 150.0], dtype=torch.float64)
    assert len(counts) == len(ROW_COUNTS) + 1  # one data rank
    metrics.step(
        StepResult(
            number, torch.tensor(loss), torch.tensor(1.0), 0.1, counts, data_time=0.0, memory=5, consumed_tokens=100
        )
    )


def test_a_record_a_step_with_real_tokens(tmp_path: Path) -> None:
    metrics = log(tmp_path / "m.jsonl")
    for number in range(1, 5):
        step(metrics, number, 2.0)
    records = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    for r in records:
        assert (r["tokens"], r["loss_tokens"], r["packing_efficiency"], r["cp_balance"]) == (95, 90, 0.95, 1.5)
        assert r["mfu"] == pytest.approx(r["tflops_per_rank"] / 100)
        assert r["tokens_per_s"] == pytest.approx(95 / r["step_time_s"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_after_it_is_written(tmp_path: Path, bad: float) -> None:
    metrics = log(tmp_path / "m.jsonl")
    step(metrics, 1, 2.0)
    step(metrics, 2, 2.0)
    step(metrics, 3, bad)
    with pytest.raises(FloatingPointError, match="step 3"):
        step(metrics, 4, 2.0)
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 4
