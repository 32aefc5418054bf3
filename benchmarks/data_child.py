"""Measurements of benchmarks/data.py that need a fresh interpreter: one is printed as JSON.

    python benchmarks/data_child.py index DOCUMENTS SEQ_LENGTH ALIGNMENT FOLDER
    python benchmarks/data_child.py memory PREFIX DOCUMENTS.npy CACHE

Each measurement imports only what it measures: imports take memory.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

MEDIAN_LENGTH, SIGMA = 600, 1.5  # of documents, in tokens
NUM_SAMPLES = 200  # read by `measure_memory`


def draw_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Log-normal lengths of documents, in tokens."""
    lengths = np.random.default_rng(seed).lognormal(np.log(MEDIAN_LENGTH), SIGMA, count)
    return np.maximum(1, lengths).astype(np.int64)


def measure_index(documents: int, seq_length: int, alignment: int, folder: Path) -> dict[str, float]:
    """Seconds to build and store a best-fit index, and the peak memory of the whole process in GB."""
    from data.packing import pack_epoch, save_epoch

    lengths = draw_lengths(documents).astype(np.int32)
    start = time.perf_counter()
    index = pack_epoch(lengths, seed=1, epoch=0, seq_length=seq_length, alignment=alignment)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        save_epoch(index, Path(place))
    seconds = time.perf_counter() - start
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "GB": peak_kib / 1e6, "rows": len(index)}


def anonymous_mb() -> float:
    """Anonymous resident memory of this process, in MB: without pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def measure_memory(prefix: Path, documents_file: Path, cache: Path) -> dict[str, float]:
    """Anonymous memory of opening a corpus, and of reading samples from it."""
    from data.dataset import PackedDataset
    from data.indexed_dataset import IndexedDataset
    from data.packing import PackingOptions

    before = anonymous_mb()
    start = time.perf_counter()
    tokens = IndexedDataset(prefix)
    opening_us = (time.perf_counter() - start) * 1e6
    opening_mb = anonymous_mb() - before
    documents = np.load(documents_file, mmap_mode="r").view(np.ndarray)
    packing = PackingOptions(seq_length=8192, method="best-fit", seed=1, alignment=2)
    samples = PackedDataset(tokens, documents, packing, pad_token=0, cache_path=cache)
    for n in range(NUM_SAMPLES):
        samples.sample(n)
    return {"opening_us": opening_us, "opening_MB": opening_mb, "reading_MB": anonymous_mb() - before}


def main() -> None:
    kind, *words = sys.argv[1:]
    if kind == "index":
        documents, seq_length, alignment = map(int, words[:3])
        figures = measure_index(documents, seq_length, alignment, Path(words[3]))
    else:
        figures = measure_memory(*map(Path, words))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
