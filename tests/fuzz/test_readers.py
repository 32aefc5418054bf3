"""Mutated files for every reader: content, or one line for the user. Never a traceback, a hang or gigabytes.

`make fuzz` runs for FUZZ_SECONDS; the suite leaves this file out, so that CI's time is bounded.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import itertools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st

from checkpoint.files import compute_checksums, find_corrupted, find_unlisted, read_checksums
from checkpoint.saver import Saver
from config.cli import parse_arguments
from config.validate import resolve
from data.blend import parse_blend
from data.corpus_writer import is_written_by_prepare
from data.indexed_dataset import write_indexed_dataset
from data.readers import BadRecord, decode_text, detect_format, read_records
from data.sources import metadata_file, open_prepared
from data.tokenizer import ByteTokenizer, TokenizerSpec
from metrics.log import open_metrics_file
from parallel.grid import GridSizes, build_grid
from planner.estimate import parse_lengths
from runtime.status import StatusFile
from tests.distributed.test_model_parity import built, config_of
from tools import checkpoint as checkpoint_tool
from tools import convert_hf, generate, replay, report
from utils.errors import UserError
from utils.logger import one_line

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
SEED = os.environ.get("FUZZ_SEED")  # first of the seeds, one after the other; without: random ones
HANG_SECONDS = 20.0  # of one file, on a busy machine
GIBIBYTES = 8  # that one file may take beside what is mapped

JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "0",
    "\x1b]52;c;eA==\x07", "../../etc/passwd", "\ud800", "é" * 300, [], {}, [[]], [None], ["x", "--lr"], {"": {}},
    {"x": [1, {"y": None}]}, "1" * 5000,
]  # fmt: skip
DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b"- " * 20_000, b"9" * 20_000, b"\0" * 5000, b"\xff\xfe", b"&a [*a]", b"\n"]


# ---------------------------------------------------------------------------------------------------
# Mutations


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or insert, a few times."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(out))
        end = min(len(out), at + rng.choice((1, 1, 2, 4, 8, 64, 4096)))
        match rng.randint(0, 5):
            case 0 if out[at:end]:
                out[at] ^= 1 << rng.randint(0, 7)
            case 1:
                del out[at:]
            case 2:
                del out[at:end]
            case 3:
                out[at:at] = out[at:end]
            case 4:
                out[at:end] = rng.choice((0, 1, 2**31 - 1, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
            case _:
                out[at:at] = rng.choice(DEEP)
    return bytes(out)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Another value at some place of a JSON document."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, copy = rng.choice(keys), value.copy()
        if rng.random() < 0.1:
            del copy[key]
        else:
            copy[key] = mutate_value(value[key], rng)
        return copy
    return rng.choice(JUNK)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """JSON keeps its form two times in three, or line by line in a file of records."""
    if rng.random() < 0.66:
        with contextlib.suppress(ValueError, UnicodeDecodeError):
            if b"\n{" in content:
                lines = content.splitlines()
                at = rng.randrange(len(lines))
                lines[at] = json.dumps(mutate_value(json.loads(lines[at]), rng)).encode()
                return b"\n".join(lines) + b"\n"
            return json.dumps(mutate_value(json.loads(content), rng)).encode()
    return mutate_bytes(content, rng)


# ---------------------------------------------------------------------------------------------------
# Readers


def make_run(folder: Path) -> None:
    """A run's folder: a checkpoint of a small model, and what a run writes beside it."""
    config = config_of(vocab_size=257, padded_vocab_size=272)
    place = folder / "run" / "checkpoints" / "step_0000003"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    grid = build_grid(GridSizes())
    model = built(grid, config, "fp32")
    shape = {f"model {name}": value for name, value in vars(config).items() if not name.endswith("_dropout")}
    metadata = {**shape, "--seq-length": 64, "tokenizer": ByteTokenizer().fingerprint, "data": {}}
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    Saver(place.parent, model, optimizer, grid).save(3, metadata)
    dist.destroy_process_group()
    flags = parse_arguments(["--tokenizer-type", "byte"]).flags()
    write_json(folder / "run" / "config.json", {"flags": flags, "argv": ["--lr", "1"], "parameters": 5})
    write_json(
        folder / "run" / "status.json",
        {"status": "failed", "step": 3, "attempt": "a", "rank": 0, "host": "h", "reason": "x"},
    )
    step = {"loss": 5.0, "grad_norm": 1.0, "lr": 0.1, "tokens": 64, "tokens_per_s": 3.0, "step_time_s": 1.0}
    records: list[dict] = [{"step": number, **step} for number in range(1, 6)]
    records += [{"step": 5, "validation_loss": 4.0, "validation": {"a/b": {"loss": 4.0, "tokens": 3}}}]
    records += [{"step": 5, "timed_steps": 5, "timers": {"forward-backward": [0.1, 0.2, 0.3]}}]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    record = {"step": 4, "loss": "nan", "grad_norm": 1.0, "flags": flags, "fingerprints": {"tokenizer": "x"}}
    write_json(folder / "step_0000004.json", record | {"checkpoints": str(place.parent), "world_size": 1, "ranks": []})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def run_generate(path: Path) -> None:
    """The whole tool; checksums follow the mutation."""
    run = next(parent for parent in path.parents if parent.name == "run")
    place = run / "checkpoints" / "step_0000003"
    sums = json.loads((place / "checksums.json").read_text())
    if path.name in sums and path.is_file() and not path.is_symlink():
        write_json(place / "checksums.json", sums | compute_checksums([path]))
    try:
        generate.main(["--load", str(run), "--tokens", "1", "--device", "cpu", "--prompt", "a", "--greedy"])
    finally:
        write_json(place / "checksums.json", sums)
        if dist.is_initialized():
            dist.destroy_process_group()


def run_report(path: Path) -> None:
    report.build_report([report.read_run(path.parent, "run")], now="now")


def run_replay(path: Path) -> None:
    """Up to the process groups."""
    with mock.patch.object(replay, "start_grid", side_effect=lambda config, launch: resolve_on_one_rank(config)):
        replay.main([str(path), "--device", "cpu"])


class Done(Exception):
    """A reader came as far as it is run here."""


def resolve_on_one_rank(config: Any) -> None:
    resolve(config, world_size=1, local_world_size=1, cuda_devices=lambda: 0)
    raise Done


def verify_checkpoint(path: Path) -> None:
    sums = read_checksums(path.parent)
    assert find_corrupted(path.parent, sorted(sums), sums) is not find_unlisted(path.parent, sums)


def inspect_checkpoint(path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # a process writes to a SafeOutput
        checkpoint_tool.inspect(path.parent)


def read_preset(path: Path) -> None:
    resolve(parse_arguments(["--config", str(path)]), world_size=1, local_world_size=1, cuda_devices=lambda: 0)


def read_text_file(path: Path) -> None:
    kind = detect_format(str(path))
    for record in read_records(str(path), kind=kind, json_key="text"):
        with contextlib.suppress(BadRecord):  # one record, which --on-error skips
            decode_text(str(path), record, kind=kind, json_key="text")


def read_corpus(path: Path) -> None:
    corpus = open_prepared(path.with_suffix(""))
    for number in range(min(5, len(corpus.tokens))):
        corpus.tokens.read(number, 0, int(corpus.tokens.lengths[number]))
    corpus.tokenizer()
    is_written_by_prepare(path.with_suffix(""))
    with contextlib.suppress(UserError):
        corpus.verify()


def read_status(path: Path) -> None:
    status = StatusFile(path, "a", 0)
    assert status.is_ended() in (True, False)
    if failure := status.failure():
        assert f"rank {failure['rank']} on {failure['host']} failed: {failure['reason']}"


def make_corpus(folder: Path) -> None:
    write_indexed_dataset(folder / "corpus", [np.arange(5), np.arange(7)], vocab_size=100)
    sums = {kind: [1, "xxh3_128:0"] for kind in ("bin", "idx")}
    tokenizer = {
        "type": "byte",
        "model": None,
        "eod": None,
        "fingerprint": ByteTokenizer().fingerprint,
        "vocab_size": 257,
    }
    metadata = {"made by": "data.prepare", "documents": 2, "tokens": 12, "tokenizer": tokenizer, "checksums": sums}
    write_json(metadata_file(folder / "corpus"), metadata)


def make_texts(folder: Path) -> None:
    lines = "".join(json.dumps({"text": f"text {n}", "id": n}) + "\n" for n in range(20))
    (folder / "texts.jsonl").write_text(lines)
    (folder / "texts").write_text(lines)
    import gzip

    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pa.table({"text": [f"text {n}" for n in range(20)]}), folder / "texts.parquet")


PRESET = """
lr: 0.01
num-layers: 2
data_path: [0.5, TEXT]
skip-steps: 3-5
qk-norm: true
tokenizer-type: byte
"""


def make_settings(folder: Path) -> None:
    (folder / "text.txt").write_text("text")
    (folder / "preset.yaml").write_text(PRESET.replace("TEXT", str(folder / "text.txt")))
    (folder / "blend.yaml").write_text("sources:\n- {path: a, weight: 0.5}\n- path: b\n  weight: 2\n")
    (folder / "lengths.txt").write_text("5\n17\n200\n")


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eod>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some text, some more"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def make_hugging_face(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        convert_hf.main(
            ["export", "--load", str(folder / "run"), "--output", str(folder / "hf"), "--shard-size", "8e-5"]
        )


def import_hugging_face(path: Path) -> None:
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        convert_hf.main(["import", "--input", str(path.parent), "--output", f"{place}/run"])


MAKERS = (make_run, make_corpus, make_texts, make_settings, make_tokenizer, make_hugging_face)
STEP = "run/checkpoints/step_0000003"
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "preset": ("preset.yaml", read_preset),
    "blend": ("blend.yaml", lambda path: parse_blend([str(path)])),
    "lengths": ("lengths.txt", lambda path: parse_lengths(str(path), np.random.default_rng(0))),
    "run.json": (f"{STEP}/run.json", run_generate),
    "config.json": ("run/config.json", run_generate),
    "index": (f"{STEP}/.metadata", run_generate),
    "chunks": (f"{STEP}/__0_0.distcp", run_generate),
    "checksums": (f"{STEP}/checksums.json", verify_checkpoint),
    "inspect": (f"{STEP}/.metadata", inspect_checkpoint),
    "inspect run.json": (f"{STEP}/run.json", inspect_checkpoint),
    "report config": ("run/config.json", run_report),
    "report status": ("run/status.json", run_report),
    "report metrics": ("run/metrics.jsonl", run_report),
    "metrics": ("run/metrics.jsonl", lambda path: open_metrics_file(path, 3).close()),
    "status": ("run/status.json", read_status),
    "replay": ("step_0000004.json", run_replay),
    "corpus index": ("corpus.idx", read_corpus),
    "corpus metadata": ("corpus.json", read_corpus),
    "JSON lines": ("texts.jsonl", read_text_file),
    "unnamed": ("texts", read_text_file),
    "gzip": ("texts.jsonl.gz", read_text_file),
    "Parquet": ("texts.parquet", read_text_file),
    "HF config": ("hf/config.json", import_hugging_face),
    "HF index": ("hf/model.safetensors.index.json", import_hugging_face),
    "HF weights": ("hf/model-00001-of-00002.safetensors", import_hugging_face),
    "HF tokenizer": ("hf/tokenizer.json", import_hugging_face),
    "tokenizer.json": ("tokenizer.json", lambda path: TokenizerSpec("huggingface", str(path), "<eod>").load()),
}


pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    for make in MAKERS:
        make(folder)
    return folder


class Hang(BaseException):
    """A reader took `HANG_SECONDS`. No Exception, so that no reader catches it."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limit time and memory of one file. C code that never returns ends the process, with its traceback."""

    def stop(*_: Any) -> None:
        raise Hang

    limits = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + GIBIBYTES * 2**30, limits[1]))
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    faulthandler.dump_traceback_later(2 * HANG_SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("name", READERS)
def test_mutated_files(honest: Path, name: str, capsys) -> None:
    file, read = READERS[name]
    path = honest / file
    content = path.read_bytes()
    with contextlib.suppress(Done):
        read(path)  # the honest file is read

    def check(rng: random.Random) -> None:
        path.write_bytes(mutate(content, rng))
        try:
            with bounded():
                read(path)
        except (Done, BadRecord):
            pass
        except (UserError, OSError) as error:
            text = one_line(error)
            assert len(text) < 2000 and "weights_only" not in text, text
        except BaseException:
            kept = Path(os.environ.get("FUZZ_KEEP", honest)) / f"{name}.{hash(content) % 1000}"
            kept.write_bytes(path.read_bytes())
            print(f"the file is kept as {kept}")
            raise
        finally:
            path.write_bytes(content)

    end = time.monotonic() + SECONDS / len(READERS)
    for seed in itertools.count(int(SEED)) if SEED else iter(lambda: random.randrange(2**32), None):
        if time.monotonic() >= end:
            break
        settings = hypothesis.settings(
            max_examples=10,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        strategy = st.randoms(use_true_random=True)
        hypothesis.seed(seed)(settings(hypothesis.given(strategy)(check)))()
        capsys.readouterr()


@pytest.mark.parametrize("name", [name for name, (_, read) in READERS.items() if read is not read_text_file])
def test_a_fifo_does_not_hang(honest: Path, name: str) -> None:
    """Nor a link to an endless device. Texts may come through a pipe."""
    file, read = READERS[name]
    path = honest / file
    content = path.read_bytes()
    for make in (os.mkfifo, lambda place: place.symlink_to("/dev/zero")):
        path.unlink()
        make(path)
        try:
            with bounded(), contextlib.suppress(UserError, OSError, BadRecord, Done):
                read(path)
        finally:
            path.unlink()
            path.write_bytes(content)
