"""What a run writes and prints: facts of rows, times, TensorBoard, validation, and a file that goes on."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shlex
import sys
from dataclasses import replace
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from config.cli import parse_arguments
from config.schema import LoggingConfig, TrainingConfig
from data.batch import BatchPlan, build_batch
from data.batch_schedule import BatchSchedule
from data.dataset import BlendedDataset, Mixture, PackedSample
from data.tokenizer import ByteTokenizer
from metrics import banner
from metrics import log as metrics_module
from metrics.banner import describe_sequences, gzip_bits_per_byte, warn_of_missing_ends
from metrics.log import APPEND_ONLY, LEGEND, ROW_COUNTS, HeldOut, MetricsLog, StepResult, count_rows, open_metrics_file
from metrics.reports import next_commands
from metrics.tensorboard import TensorBoardWriter
from metrics.timers import Timers
from model.config import GPTConfig
from runtime.distributed import Launch
from runtime.run import RunPaths
from tests.unit.test_packed_rows import dataset
from training.flops import PEAK_TFLOPS, known_peak_tflops, training_flops
from utils.logger import join_parts

CONFIG = GPTConfig(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=24,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=4,
    vocab_size=50,
    padded_vocab_size=64,
)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture()
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics_module, "time", clock)
    return clock


def log(
    path: Path | None,
    *,
    rank: int = 0,
    train_iters: int = 10,
    log_interval: int = 4,
    on_nonfinite: str = "stop",
    **more,
) -> MetricsLog:
    """The log of rank `rank` of four."""
    return MetricsLog(
        architecture=CONFIG,
        training=TrainingConfig(train_iters=train_iters, on_nonfinite=on_nonfinite),
        logging=LoggingConfig(log_interval=log_interval),
        control_group=SimpleNamespace(size=lambda: 4, rank=lambda: rank),  # type: ignore[arg-type]
        timers=Timers(0, torch.device("cpu")),
        metrics_file=path,
        **more,
    )


COUNTS = dict(
    loss_tokens=90.0, real_tokens=95.0, squared_lengths=1000.0, row_tokens=200.0, cp_balance=3.0, rows=2.0, work=400.0,
    fallback_rows=1.0,
)  # fmt: skip
BUSIEST = [250.0, 150.0]  # of two data ranks


def step(
    log: MetricsLog,
    number: int,
    *,
    loss: float = 2.0,
    data_time: float = 0.0,
    memory: int = 3 * 2**30,
    skipped: int = 0,
) -> None:
    counts = torch.tensor([*(COUNTS[name] for name in ROW_COUNTS), *BUSIEST], dtype=torch.float64)
    loss_, norm = torch.tensor(loss), torch.tensor(0.5)
    log.step(StepResult(number, loss_, norm, 0.25, counts, data_time, memory, 256 * number, skipped_steps=skipped))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_facts_of_rows() -> None:
    def batch(lengths: list[int], padded: list[int]):
        total = sum(padded)
        labels = np.full(total, -100)
        labels[: lengths[0] - 1] = 1
        row = PackedSample(np.zeros(total, int), labels, np.array(lengths), np.array(padded))
        return build_batch([row], cp_size=1, cp_rank=0, qkv_format="thd", layout="zigzag")

    plan = BatchPlan(
        batches=BatchSchedule.constant(6), micro_batch_size=1, batch_size=3, batch_rank=1, cp_size=2, cp_rank=0,
        qkv_format="thd", layout="zigzag", attention_cost=0.5,
    )  # fmt: skip
    got = count_rows([replace(batch([3, 5, 0], [4, 6, 2]), cp_balance=1.25), batch([8], [8])], plan)
    wanted = dict(
        loss_tokens=2 + 7, real_tokens=8 + 8, squared_lengths=9 + 25 + 64, row_tokens=12 + 8, cp_balance=2.25, rows=2,
        work=(12 + 0.5 * 34) / 2 + (8 + 0.5 * 64) / 2, fallback_rows=0,
    )  # fmt: skip
    assert dict(zip(ROW_COUNTS, got.tolist(), strict=False)) == wanted and got.dtype == torch.float64
    assert got[len(ROW_COUNTS) :].tolist() == [0.0, (12 + 0.5 * 34 * 1.25) / 2 + (8 + 0.5 * 64) / 2, 0.0]


def test_one_steps_record_by_hand(tmp_path: Path, clock: Clock) -> None:
    out = log(tmp_path / "new" / "er" / "m.jsonl", peak_tflops=0.5)
    clock.now += 2.0
    step(out, 1, data_time=0.5)
    (record,) = read(tmp_path / "new" / "er" / "m.jsonl")
    tflops = training_flops(CONFIG, tokens=95, squared_lengths=1000) / 2.0 / 1e12 / 4  # four ranks share the work
    assert record == {
        "step": 1,
        "loss": 2.0,
        "grad_norm": 0.5,
        "lr": 0.25,
        "tokens": 95,
        "loss_tokens": 90,
        "consumed_tokens": 256,
        "step_time_s": 2.0,
        "tokens_per_s": 47.5,
        "tflops_per_rank": pytest.approx(tflops),
        "mfu": pytest.approx(tflops / 0.5),
        "packing_efficiency": 0.475,
        "cp_balance": 1.5,
        "work_balance": 1.25,
        "cp_fallback_rows": 1,
        "data_share": 0.25,
        "cp_wait_share": None,
        "max_memory_bytes": 3 * 2**30,
        "skipped_steps": 0,
    }
    assert all(isinstance(record[name], int) for name in ("step", "tokens", "loss_tokens", "max_memory_bytes"))


def test_times_are_of_the_step_alone(tmp_path: Path, clock: Clock) -> None:
    out = log(tmp_path / "m.jsonl", log_interval=1)
    for number, seconds in enumerate((1.0, 3.0), 1):
        clock.now += seconds
        step(out, number)
    clock.now += 50.0  # a validation, a checkpoint
    out.restart_clock()
    clock.now += 2.0
    step(out, 3)
    assert [r["step_time_s"] for r in read(tmp_path / "m.jsonl")] == [1.0, 3.0, 2.0]


def test_lines_come_when_they_are_due(tmp_path: Path, clock: Clock, capsys) -> None:
    out = log(tmp_path / "m.jsonl")
    written = []
    for number in range(1, 11):
        clock.now += 1.0
        step(out, number)
        written.append(len(read(tmp_path / "m.jsonl")))
    assert written == [1, 1, 1, 4, 4, 4, 4, 8, 8, 10]  # the first, every fourth, the last
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.search(r"step +(\d+)/10", line)[1]) for line in lines] == [1, 4, 8, 10]  # type: ignore[index]
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1, "columns are aligned"


def test_a_line_says_what_the_interval_was(clock: Clock, capsys) -> None:
    out = log(None, peak_tflops=1e-6, log_interval=2, train_iters=100)
    clock.now += 7.0
    step(out, 1)
    capsys.readouterr()
    for number, seconds in ((2, 4.0), (3, 1.0), (4, 3.0)):
        clock.now += seconds
        step(out, number, loss=1.0 + number, data_time=0.25)
    line = capsys.readouterr().out.splitlines()[-1]
    flops = training_flops(CONFIG, tokens=95, squared_lengths=1000)
    for words in (
        "step   4/100",
        "loss  5.00000",
        "grad norm   0.500",
        "lr 2.50e-01",
        " 48 tok/s (12 a rank)",
        "packing 47.50%",
        "cp balance 1.500",
        "work balance 1.250",
        "data 12.5%",
        "mem   3.00 GiB",
        f"MFU {2 * flops / 4.0 / 1e12 / 4 / 1e-6:6.1%}",
        "0:03:12 left",
    ):
        assert words in line, (words, line)


def test_the_bar_tells_the_time_left(clock: Clock, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = log(None, train_iters=100)
    for number in (1, 2):
        clock.now += 40.0
        step(out, number)
    assert capsys.readouterr().out.splitlines()[-1].endswith("] step 2/100, 1:05:20 left")


def test_the_bar_of_a_validation(clock: Clock, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    out = log(None)
    assert list(out.show_progress([1, 2], total=2)) == [1, 2] and capsys.readouterr().out == ""
    out.show_bar = True
    assert list(out.show_progress([1, 2], total=2)) == [1, 2]
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"[{'#' * 15}{'.' * 15}] validation: batch 1/2")


def test_a_line_breaks_between_its_parts_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["step 4/100", "loss  5.00000", "lr 2.5e-01"]
    assert join_parts(parts, " | ", indent=2) == "step 4/100 | loss  5.00000 | lr 2.5e-01"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "26")
    assert join_parts(parts, " | ", indent=2) == "step 4/100 | loss  5.00000\n  lr 2.5e-01"
    monkeypatch.setenv("COLUMNS", "5")
    assert join_parts(parts, " | ", indent=2) == "step 4/100\n  loss  5.00000\n  lr 2.5e-01"


def test_waits_of_attention_are_shared_out(tmp_path: Path, clock: Clock, capsys) -> None:
    waits = iter((0.0, 0.5, 1.0, 0.25))
    out = log(tmp_path / "m.jsonl", cp_clock=SimpleNamespace(read=lambda: next(waits)), log_interval=2)
    out.restart_clock()  # reads once: what was waited for before the first step does not count
    for number in (1, 2, 3):
        clock.now += 2.0
        step(out, number)
    assert [r["cp_wait_share"] for r in read(tmp_path / "m.jsonl")] == [0.25, 0.5]
    assert "cp wait 50.0%" in capsys.readouterr().out


def test_the_legend_names_each_part_of_a_line(clock: Clock, capsys) -> None:
    out = log(None, log_interval=1, cp_clock=SimpleNamespace(read=lambda: 0.1), on_nonfinite="skip", peak_tflops=1.0)
    clock.now += 1.0
    step(out, 1, loss=math.nan, skipped=1)
    parts = capsys.readouterr().out.splitlines()[0].split(" | ")
    names = [name for name, _, _ in LEGEND]
    assert len(parts) == len(names)
    for part, name in zip(parts, names, strict=True):
        assert name in part, (name, part)


@pytest.mark.parametrize(
    ("argv", "is_done", "wanted"),
    [
        (
            "--cp-size 4",
            True,
            "local.sh 4 --cp-size 4 --resume --run-dir runs/x --train-iters 200"
            "|generate.py --load runs/x --prompt 'The '|report.py runs/x",
        ),
        ("--run-dir runs/x --resume", False, "local.sh 4 --run-dir runs/x --resume|generate.py|report.py runs/x"),
        ("--metrics-file none --save elsewhere", False, "--save elsewhere --resume --run-dir|--load elsewhere"),
        ("--data-path s3://me:secret@there/a", False, "://***@there/a --resume|generate.py|report.py"),
    ],
)
def test_the_next_commands(argv: str, is_done: bool, wanted: str) -> None:
    config = parse_arguments([*argv.split(), "--train-iters", "100"])
    launch = Launch(world_size=4, local_world_size=4, under_torchrun=True)
    paths = RunPaths.of(config, "runs/x")
    run = SimpleNamespace(config=config, argv=argv.split(), paths=paths, ranks=SimpleNamespace(launch=launch))
    commands = next_commands(run, has_checkpoint=True, is_done=is_done)  # type: ignore[arg-type]
    assert len(commands) == len(wanted.split("|"))
    assert all(words in command for words, command in zip(wanted.split("|"), commands, strict=True)), commands
    program, words = commands[0].split(" 4 ", 1)
    assert program.split()[-1] == "launch/local.sh"
    parse_arguments(shlex.split(words))
    without = next_commands(run, has_checkpoint=False, is_done=is_done)  # type: ignore[arg-type]
    assert without == commands[2:]


def test_only_the_writer_writes(tmp_path: Path, clock: Clock, capsys) -> None:
    out = log(tmp_path / "folder" / "m.jsonl", rank=1)
    clock.now += 1.0
    step(out, 1)
    out.validation(1, HeldOut(2.0, 10, 30))
    out.close()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_a_rank_that_does_not_write_stops_too(clock: Clock) -> None:
    out = log(None, rank=1)
    clock.now += 1.0
    with pytest.raises(FloatingPointError, match="step 1"):
        step(out, 1, loss=float("nan"))


def test_validation_is_printed_and_written(tmp_path: Path, clock: Clock, capsys) -> None:
    out = log(tmp_path / "m.jsonl")
    out.validation(4, HeldOut(1 / 3, 12345, 24690))
    assert (
        "after step 4: loss 0.33333, 0.2404 bits a byte, perplexity 1.40, over 12,345 held-out tokens"
        in capsys.readouterr().out
    )
    (record,) = read(tmp_path / "m.jsonl")  # at once, in full
    assert record.pop("bits_per_byte") == pytest.approx(1 / 6 / math.log(2), rel=1e-14)
    assert record == {"step": 4, "validation_loss": 1 / 3, "validation_tokens": 12345}
    out.close()
    assert out.file is not None and out.file.closed


def test_gzip_of_the_validation_text(monkeypatch) -> None:
    texts = ["a ring of ranks " * 40, "and a row of tokens" * 30]
    ids = [[*text.encode(), 256] for text in texts]
    tokens = SimpleNamespace(
        lengths=np.array([len(row) for row in ids]), read=lambda n, start, length: np.array(ids[n][start:][:length])
    )
    source: Any = SimpleNamespace(documents=[0, 1], tokens=tokens)
    whole = "".join(texts).encode()
    bits = gzip_bits_per_byte(source, ByteTokenizer())
    assert bits == 8 * len(gzip.compress(whole, 9)) / len(whole)
    monkeypatch.setattr(banner, "MAX_GZIP_TOKENS", 100)
    assert gzip_bits_per_byte(source, ByteTokenizer()) == 8 * len(gzip.compress(whole[:100], 9)) / 100


def test_each_source_of_a_blend_is_told_by_itself(tmp_path: Path, clock: Clock, capsys) -> None:
    out = log(tmp_path / "m.jsonl")
    out.validation(4, HeldOut(2.0, 30, 0), {"web": HeldOut(1.0, 10, 20), "code": HeldOut(2.5, 20, 20)})
    assert "web: loss 1.00000, 0.7213 bits a byte, perplexity 2.72, over 10\n" in capsys.readouterr().out
    (record,) = read(tmp_path / "m.jsonl")
    assert record["bits_per_byte"] is None  # ids of no text
    bits = 1 / math.log(2)
    assert record["validation"] == {
        "web": {"loss": 1.0, "tokens": 10, "bits_per_byte": pytest.approx(bits / 2)},
        "code": {"loss": 2.5, "tokens": 20, "bits_per_byte": pytest.approx(2.5 * bits)},
    }


def test_steps_that_are_passed_over_do_not_end_a_run_that_takes_them(clock: Clock, capsys) -> None:
    out = log(None, on_nonfinite="skip", log_interval=1)
    clock.now += 1.0
    step(out, 1, loss=math.nan, skipped=1)
    assert "skipped 1" in capsys.readouterr().out


def test_tensorboard_gets_every_number(tmp_path: Path, clock: Clock, monkeypatch) -> None:
    calls: list = []

    class Writer:
        def __init__(self, folder: str, purge_step=None) -> None:
            calls.append(("open", folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append(("close",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    out = log(tmp_path / "m.jsonl", writers=[TensorBoardWriter(tmp_path / "tb", 3)], keep_before=3, train_iters=4)
    clock.now += 1.0
    step(out, 4)
    sources = {"en/corpus": HeldOut(1.0, 4, 4), "de/corpus": HeldOut(1.2, 4, 4), "loss": HeldOut(1.7, 2, 4)}
    out.validation(4, HeldOut(math.log(2), 10, 40), sources)
    out.close()
    assert calls[0] == ("open", str(tmp_path / "tb"), 4) and calls[-1] == ("close",)  # step 3 was done and stays
    (record, _) = read(tmp_path / "m.jsonl")
    wanted = {(f"train/{k}", v, 4) for k, v in record.items() if k != "step" and v is not None}
    wanted |= {("validation/loss", math.log(2), 4), ("validation/perplexity", 2.0, 4), ("validation/./loss", 1.7, 4)}
    wanted |= {("validation/bits_per_byte", 0.25, 4)}
    assert wanted | {("validation/en/corpus", 1.0, 4), ("validation/de/corpus", 1.2, 4)} == set(calls[1:-1])


# ---------------------------------------------------------------------------------------------------
# The file of a run that goes on


@pytest.mark.parametrize(
    "half",
    [
        b"",
        b'{"step": 6, "lo',
        b'{"step": 6, "loss": 1.5}',
        b"{",
        b"\0\0",
        b'\xff\xfe{"st',
        b"7",
        b'{"loss": 1}',
        b'{"step": "x"}',
    ],
)
def test_a_run_that_goes_on_keeps_what_it_does_not_repeat(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "m.jsonl"
    records = [{"step": n, "loss": 1 / n} for n in range(1, 6)]
    records.insert(4, {"step": 4, "validation_loss": 0.1})
    lines = [json.dumps(r) + "\n" for r in records]
    path.write_bytes("".join(lines).encode() + half)
    with open_metrics_file(path, 4) as out:
        out.write(b'{"step": 5}\n')
    assert path.read_text() == "".join(lines[:5]) + '{"step": 5}\n'  # byte for byte, a validation after step 4 too


def test_a_run_that_goes_on_without_a_file_starts_one(tmp_path: Path) -> None:
    open_metrics_file(tmp_path / "new" / "m.jsonl", 5).close()
    assert (tmp_path / "new" / "m.jsonl").read_text() == ""


def test_a_long_file_is_read_from_its_end(tmp_path: Path, monkeypatch) -> None:
    """The records behind the checkpoint are read, not the 2000 before."""
    path, read_lines = tmp_path / "m.jsonl", []
    records = [f'{{"step": {n}, "loss": 1.5}}\n' for n in range(1, 2006)]
    path.write_text("".join(records))
    monkeypatch.setattr("metrics.log.parse_json", lambda line: read_lines.append(line) or json.loads(line))
    monkeypatch.setattr("metrics.log.COPIED_BYTES", 1000)
    open_metrics_file(path, 2000).close()
    assert path.read_text() == "".join(records[:2000]) and len(read_lines) == 6
    before = path.stat().st_ino
    open_metrics_file(path, 2000).close()
    assert path.stat().st_ino == before  # nothing to drop: nothing is copied


def test_a_full_disk_leaves_the_records(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        open_metrics_file(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and len(list(tmp_path.iterdir())) == 1


class SmallDisk:
    """A file whose disk takes `room` bytes."""

    def __init__(self, file: FileIO, room: int) -> None:
        self.file, self.room, self.name, self.fileno = file, room, file.name, file.fileno

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def close(self) -> None:
        self.file.close()


def test_records_wait_while_the_disk_is_full(tmp_path: Path, clock: Clock, capsys) -> None:
    """Half a record is on the disk: with room again, its other half comes first. The fault is said once."""
    out = log(tmp_path / "m.jsonl", log_interval=1)
    assert out.file is not None
    out.file = disk = SmallDisk(out.file, 700)  # type: ignore[assignment]
    for number in range(1, 5):
        clock.now += 1.0
        step(out, number)
    said = capsys.readouterr()
    assert said.err.count("No space left on device; training goes on, and records wait in memory") == 1
    assert said.err.count("\n") == 1
    disk.room = 10**6
    clock.now += 1.0
    step(out, 5)
    assert "m.jsonl can be written again: no record is missing" in capsys.readouterr().out
    assert [record["step"] for record in read(tmp_path / "m.jsonl")] == [1, 2, 3, 4, 5]
    disk.room = 10
    clock.now += 1.0
    step(out, 6)
    out.close()
    assert "1 records could not be written" in capsys.readouterr().err


def test_a_record_stands_on_its_own_line_behind_a_dead_writers_half(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"ste')
    out = log(tmp_path / "m.jsonl", keep_before=APPEND_ONLY)
    out.validation(1, HeldOut(2.0, 100, 300))
    out.validation(1, HeldOut(3.0, 100, 300))
    first, half, *validations = (tmp_path / "m.jsonl").read_text().splitlines()
    assert (first, half) == ('{"step": 1}', '{"ste')
    assert [json.loads(line)["validation_loss"] for line in validations] == [2.0, 3.0]


def test_a_file_that_another_run_writes_is_only_added_to(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"ste')  # it is in the middle of a line
    before = path.stat().st_ino
    with open_metrics_file(path, APPEND_ONLY) as out, path.open("a") as its:
        its.write('p": 2}\n')
        its.flush()
        out.write(b'{"step": 2, "validation_loss": 1.5}\n')
    assert (
        path.stat().st_ino == before
        and path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "validation_loss": 1.5}\n'
    )


def test_a_fresh_run_starts_a_fresh_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')
    open_metrics_file(path, 0).close()
    assert path.read_text() == ""


# ---------------------------------------------------------------------------------------------------
# What the banner says of the data; peaks


def test_what_became_of_the_documents() -> None:
    packed = describe_sequences(dataset([8, 17, 16, 3], seq_length=16, alignment=4))[0]
    assert "4 documents, 44 tokens -> 3 samples of 16" in packed
    assert "91.67% full" in packed and "1 documents longer than a sample cut" in packed  # 16 is not longer than 16
    stream = describe_sequences(dataset([8, 17, 16, 3], seq_length=16, alignment=4, packing="concat"))[0]
    assert "2 samples of 16; 12 tokens" in stream and "unused" in stream


@pytest.mark.parametrize(
    ("eod", "wanted"),
    [
        ([], "0.0% of documents end with"),
        ([7, 24], "50.0% of documents end with"),
        ([7, 24, 40, 43], "each document ends"),
    ],
)
def test_whether_documents_end_and_with_which_token(eod: list[int], wanted: str) -> None:
    data = dataset([8, 17, 16, 3, 0], seq_length=16, alignment=4)
    data.tokens.tokens[eod] = data.pad_token
    for sequences in (data, BlendedDataset([data, data], [Mixture(0, [1, 2], [0, 1])])):
        assert all(
            f"; {wanted}" in line and f"token {data.pad_token}" in line for line in describe_sequences(sequences)
        )
        warnings = warn_of_missing_ends(sequences)
        assert len(warnings) == (0 if len(eod) == 4 else len(describe_sequences(sequences)))
        assert all(line.startswith("warning: ") and wanted in line for line in warnings)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H800", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H200", 989),
        ("NVIDIA A10", None),
        ("NVIDIA L4", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_of_devices(device: str, peak: float | None) -> None:
    assert known_peak_tflops(device) == peak


def test_every_peak_can_be_found() -> None:
    """A general name above a special one would hide it."""
    for name, peak in PEAK_TFLOPS:
        assert known_peak_tflops(f"NVIDIA {name}") == peak
