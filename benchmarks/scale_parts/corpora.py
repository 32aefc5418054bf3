"""Data: what a rank reads at its start and in a step, and a corpus of 20 billion documents in sparse files."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.harness import ROOT
from benchmarks.scale_parts.table import Row
from data.blend import Blend
from data.build import FORCED_WINDOW, open_dataset
from data.dataset import CorpusFacts, PackedDataset
from data.indexed_dataset import HEADER, MAGIC, IndexedDataset, index_file, token_file, write_indexed_dataset
from data.packing import PackingOptions, Windows
from metrics.log import open_metrics_file

OLD = "measured; before: at cf95e0c, on the same machine"
PACKING = PackingOptions(seq_length=8192, method="best-fit", seed=1234, alignment=2)
WHOLE = (1.0, 0.0, 0.0)


def count_resident(path: Path) -> int:
    """Bytes of a file in the page cache, by mincore(2)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages)
        return mmap.PAGESIZE * sum(page & 1 for page in pages)


def random_reads() -> list[Row]:
    """What the system reads of 512 MiB of tokens for 500 documents of 1200 bytes."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "corpus")
        document = np.arange(600)
        write_indexed_dataset(prefix, (document for _ in range(2**29 // 1200)), vocab_size=1000)
        for is_random in (False, True):
            with token_file(prefix).open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            tokens = IndexedDataset(prefix)
            numbers = np.random.default_rng(5).integers(0, len(tokens.lengths), 500).tolist()
            if is_random:
                tokens.expect_random_reads()
            for number in numbers:
                tokens.read(number, 0, 600).sum()
            found.append(count_resident(token_file(prefix)) / 2**20)
            del tokens
    return [Row("read from disk for 0.57 MiB of documents", 1, found[0], found[1], "MiB")]


def blends() -> list[Row]:
    """A checkpoint's position in a blend, every 500 steps of 4096 samples: counted then, or with each step."""
    rows = []
    for sources, before in ((50, 33.0), (200, 133.0)):
        blend = Blend(np.random.default_rng(sources).integers(10**5, 10**7, sources).tolist())
        start = time.process_time()
        blend.counts(40960)
        step = (time.process_time() - start) / 10
        what = f"longest pause to count a blend of {sources} sources (before: at a save; now: in each step)"
        rows.append(Row(what, 4096, before, step, "s", OLD))
    return rows


def starts() -> list[Row]:
    """What each rank behind the first reads of one source of ten million documents."""
    seconds, reads = [], []
    with tempfile.TemporaryDirectory() as folder:
        prefix, read = Path(folder, "corpus"), IndexedDataset.read
        write_sparse(prefix, 10**7, np.arange(0, 10**7, 100), length=64)
        options: dict[str, Any] = dict(split=WHOLE, which=0, cache_path=Path(folder, "cache"), pad_token=0)
        packing = replace(PACKING, window=FORCED_WINDOW)
        for _ in ("the first rank", "a later rank"):
            with patch.object(IndexedDataset, "read", autospec=True, side_effect=read) as counted:
                start = time.process_time()
                open_dataset(IndexedDataset(prefix), packing, **options)
                seconds.append(time.process_time() - start)
                reads.append(counted.call_count)
    return [
        Row("documents that a rank reads for a source's fingerprint", 4096, reads[0], reads[1]),
        Row("opening a source of 10 million documents on a later rank", 4096, seconds[0], seconds[1], "s"),
    ]


def stages() -> list[Row]:
    """Documents that a pipeline stage between the first and the last reads in a step of 4096 samples of 8192 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "corpus")
        lengths = np.random.default_rng(1).lognormal(np.log(600), 1.5, 20_000).astype(np.int64) + 1
        write_indexed_dataset(prefix, (np.zeros(n, np.int64) for n in lengths), vocab_size=1000)
        data, found = PackedDataset(IndexedDataset(prefix), np.arange(20_000), PACKING, pad_token=0), []
        for reads_tokens in (True, False):
            with patch.object(data.tokens, "locate", side_effect=data.tokens.locate) as located:
                for n in range(100):
                    data.sample(n, reads_tokens=reads_tokens)
                found.append(located.call_count * 40.96)
    return [Row("documents that a middle pipeline stage reads in a step", 4096, found[0], found[1])]


def metrics_files() -> list[Row]:
    """A resumed run cuts a metrics file of a million records; seconds, and memory beside the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.jsonl")
        with path.open("w") as out:
            out.writelines(json.dumps({"step": n, "loss": 1.5, "text": "x" * 300}) + "\n" for n in range(1, 10**6 + 1))
        start, before = time.perf_counter(), read_anonymous(os.getpid())
        open_metrics_file(path, 10**6 - 500).close()
        seconds, grown = time.perf_counter() - start, read_anonymous(os.getpid()) - before
    name = "cutting metrics.jsonl of a million records at a resume"
    return [Row(name, 1, 17.0, seconds, "s", OLD), Row(name, 1, 1638.0, grown, "MiB", OLD)]


# ---------------------------------------------------------------------------------------------------
# 20 billion documents


def read_anonymous(process: int) -> float:
    """MiB of a process's memory that no file backs."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


def write_sparse(prefix: Path, num_documents: int, filled: np.ndarray, *, length: int) -> None:
    """A corpus of empty documents, which take no space on the disk, but for those of the ascending numbers `filled`."""
    with index_file(prefix).open("wb") as out:
        out.write(HEADER.pack(MAGIC, 1, 8, num_documents, num_documents + 1))
        out.truncate(HEADER.size + 20 * num_documents + 8)
    index = np.memmap(index_file(prefix), np.uint8, "r+", HEADER.size, 20 * num_documents + 8).view(np.ndarray)
    index[: 4 * num_documents].view("<i4")[filled] = length
    index[4 * num_documents : 12 * num_documents].view("<i8")[filled] = np.arange(len(filled)) * 2 * length
    firsts = index[12 * num_documents :].view("<i8")
    if num_documents <= 10**8:  # more are not read: their index is said to be checked
        firsts[:] = np.arange(num_documents + 1)
    firsts[-1] = num_documents
    np.random.default_rng(0).integers(0, 250, len(filled) * length, dtype=np.uint16).tofile(token_file(prefix))


@contextmanager
def measured_by_arithmetic(filled: np.ndarray, windows_with_documents: list[int], length: int):
    """Facts and counts as a pass over all documents would find them: all other documents are empty."""
    facts = CorpusFacts("of 20 billion", "sparse", len(filled) * length, length, len(filled), 0, 0, True)

    def count(self: Windows) -> np.ndarray:
        counts = np.zeros(len(self), np.int64)
        for number in windows_with_documents:
            counts[number] = len(self.pack(number, 0))
        return counts

    with patch("data.build.measure_corpus", lambda *_: facts), patch.object(Windows, "count_samples", count):
        yield


def run_on_sparse_corpus(folder: Path, num_documents: int) -> tuple[float, float]:
    """Seconds of train.py, from start to the end of eight steps, and the most anonymous MiB that it held."""
    prefix, cache, length = folder / f"corpus{num_documents}", folder / f"cache{num_documents}", 64
    packing = replace(PACKING, seq_length=256)
    windows = Windows(lambda numbers: numbers, num_documents, replace(packing, window=FORCED_WINDOW))
    chosen = [0, len(windows) // 3, len(windows) - 1]
    spans = [windows.order(np.arange(n * FORCED_WINDOW, n * FORCED_WINDOW + 500)) for n in chosen]
    filled = np.sort(np.concatenate(spans))
    write_sparse(prefix, num_documents, filled, length=length)
    with measured_by_arithmetic(filled, chosen, length):
        tokens = IndexedDataset(prefix)
        forced = packing if num_documents > 10**8 else replace(packing, window=FORCED_WINDOW)
        open_dataset(tokens, forced, split=WHOLE, which=0, cache_path=cache, pad_token=0)
    flags = f"--data-path {prefix} --data-cache-path {cache} --data-split 1,0,0 --tokenizer-type byte --device cpu"
    flags += " --seq-length 256 --global-batch-size 8 --train-iters 8 --eval-interval 0 --num-layers 1 --hidden-size 32"
    flags += f" --num-attention-heads 2 --tensorboard-dir none --save-interval 0 --run-dir {folder}/run{num_documents}"
    if num_documents <= 10**8:
        flags += f" --packing-window {FORCED_WINDOW}"
    start, most = time.perf_counter(), 0.0
    command = [sys.executable, "train.py", *flags.split()]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        while run.poll() is None:
            try:
                most = max(most, read_anonymous(run.pid))
            except StopIteration:
                break  # it has ended
            time.sleep(0.05)
        assert run.stdout is not None
        said = run.stdout.read()
    if run.returncode or "step 8/8" not in said:
        raise RuntimeError(f"train.py over {num_documents} documents ended with {run.returncode}:\n{said}")
    return time.perf_counter() - start, most


def documents() -> list[Row]:
    """train.py over 1 million and over 20 billion documents whose facts `tools/index.py` would have left."""
    with tempfile.TemporaryDirectory() as folder:
        few, many = (run_on_sparse_corpus(Path(folder), count) for count in (10**6, 2 * 10**10))
    what = "train.py, start and 8 steps: 1 million documents, 20 billion documents"
    return [Row(what, 1, few[0], many[0], "s"), Row(f"{what}; memory", 1, few[1], many[1], "MiB")]


PARTS: dict[str, Callable[[], list[Row]]] = {
    "reads": random_reads,
    "blends": blends,
    "starts": starts,
    "stages": stages,
    "metrics": metrics_files,
    "documents": documents,
}
