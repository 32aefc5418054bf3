"""Data: packing, loading, preparing, indexing, memory, and the way from text to training.

    python benchmarks/data.py --json data.json [--only pack,loader,prepare,index,memory,end-to-end] [--megatron DIR]

Each part has a floor or a peer in the same run, in turns. `--megatron DIR` is a folder with megatron-core (pip install
--no-deps --target DIR megatron-core==0.16.1); without it the loader is compared with the raw memory map alone. Corpora
are random tokens, each document ended by token 0 as --append-eod does, or words of a made-up vocabulary; lengths are
log-normal with median 600 and sigma 1.5. `load` is the machine's load average when a part began: above 0, others used
its cores.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.data_child import draw_lengths
from benchmarks.harness import ROOT, benchmark_parser, describe_goal, round_ratios, take_turns, write_figures
from data.batch import BatchPlan
from data.batch_schedule import BatchSchedule
from data.dataset import PackedDataset
from data.indexed_dataset import IndexedDataset, index_file, write_indexed_dataset
from data.loader import MicrobatchDataset
from data.packing import PackingOptions, cut_documents, pack_epoch
from data.sources import TextSource, train_model

VOCAB_SIZE = 32001
FLOOR_BATCH = 256  # texts that SentencePiece encodes at a time
# Figure -> (goal, whether the goal is an upper bound).
GOALS = {
    "rows over the fewest possible": (1.0, True),
    "real tokens / T": (0.99, False),
    "of megatron-core": (2.0, False),
    "of batched SentencePiece": (0.95, False),
    "seconds": (60.0, True),
    "GB": (2.0, True),
    "MB of growth": (11.0, True),
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the parts.

    Attributes:
        work: folder of corpora and caches.
        documents: of the corpus that is packed and loaded.
        tokens: read in a round of the loader.
        text_documents: that are prepared.
        megatron: folder with megatron-core.
    """

    work: Path
    rounds: int
    documents: int
    tokens: int
    text_documents: int
    index_documents: int
    megatron: str | None


def measure_packing(settings: Settings) -> dict[str, Any]:
    """Best-fit over a whole epoch: rows over the fewest that the padded tokens can fill."""
    lengths = draw_lengths(settings.documents)
    found: dict[str, Any] = {}
    for seq_length in (8192, 32768, 131072):
        for cp in (1, 4, 8):
            alignment = 2 * cp
            rows = len(pack_epoch(lengths, seed=1, epoch=0, seq_length=seq_length, alignment=alignment))
            stored = (-(-cut_documents(lengths, seq_length).length // alignment) * alignment).sum()
            found[f"T {seq_length}, cp {cp}"] = {
                "rows over the fewest possible": rows / -(-int(stored) // seq_length),
                "real tokens / T": int(lengths.sum()) / (rows * seq_length),
            }
    return found


# ---------------------------------------------------------------------------------------------------
# Loader


def build_corpus(work: Path, documents: int) -> Path:
    """Prefix of a corpus of random tokens; written once."""
    prefix = work / f"ended_tokens_{documents}"
    if not index_file(prefix).exists():
        rng = np.random.default_rng(0)
        tokens = (rng.integers(1, VOCAB_SIZE, n - 1, dtype=np.uint16) for n in draw_lengths(documents))
        ended = (np.append(document, np.uint16(0)) for document in tokens)
        write_indexed_dataset(prefix, ended, vocab_size=VOCAB_SIZE)
    return prefix


def measure_loader(settings: Settings) -> dict[str, Any]:
    """Rows of one process, tokens/s: ours, packed; megatron-core's GPTDataset; a copy of the memory map."""
    prefix = build_corpus(settings.work, settings.documents)
    tokens = IndexedDataset(prefix)
    found: dict[str, Any] = {"Mtok in the corpus": len(tokens.tokens) / 1e6}
    for seq_length in (4096, 8192, 32768):
        found[f"T {seq_length}"] = _measure_loader_at(settings, prefix, tokens, seq_length)
    return found


def _measure_loader_at(settings: Settings, prefix: Path, tokens: IndexedDataset, seq_length: int) -> dict[str, Any]:
    count = min(len(tokens.tokens), settings.tokens) // seq_length
    samples = PackedDataset(
        tokens,
        np.arange(len(tokens)),
        PackingOptions(seq_length=seq_length, method="best-fit", seed=1, alignment=2),
        pad_token=0,
        cache_path=settings.work / "cache",
        vocab_size=VOCAB_SIZE,
    )
    plan = BatchPlan(
        batches=BatchSchedule.constant(1),
        micro_batch_size=1,
        batch_size=1,
        batch_rank=0,
        cp_size=1,
        cp_rank=0,
        qkv_format="thd",
        layout="zigzag",
    )
    rows = MicrobatchDataset(samples, plan)
    order = (np.random.default_rng(1).permutation(count) * seq_length).tolist()

    def speed(read: Callable[[int], Any]) -> float:
        """Mtok/s."""
        start = time.perf_counter()
        for n in range(count):
            read(n)
        return count * seq_length / (time.perf_counter() - start) / 1e6

    turns = {
        "ours": lambda: speed(lambda n: rows[(n, 0)]),
        "raw map": lambda: speed(lambda n: tokens.tokens[order[n] : order[n] + seq_length].astype(np.int64)),
    }
    if settings.megatron:
        theirs = build_megatron_dataset(settings.megatron, settings.work, prefix, seq_length)
        turns["megatron-core"] = lambda: speed(theirs.__getitem__)
    speeds = take_turns(turns, settings.rounds)
    found: dict[str, Any] = {f"{name}, Mtok/s": float(np.median(values)) for name, values in speeds.items()}
    if settings.megatron:
        found["of megatron-core"] = round_ratios(speeds["ours"], speeds["megatron-core"])
    return found


def build_megatron_dataset(megatron: str, work: Path, prefix: Path, seq_length: int) -> Any:
    """megatron-core's GPTDataset over the same files: positions reset and loss masked at the end of each document."""
    sys.path.insert(0, megatron)
    warnings.simplefilter("ignore")
    gpt = importlib.import_module("megatron.core.datasets.gpt_dataset")
    indexed = importlib.import_module("megatron.core.datasets.indexed_dataset")
    split = importlib.import_module("megatron.core.datasets.utils").Split.train

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = VOCAB_SIZE, 0, 1, {"made": "up"}

    config = gpt.GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        blend=None,
        split="1,0,0",
        path_to_cache=str(work / "megatron"),
        tokenizer=Tokenizer(),
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
        mmap_bin_files=True,
    )
    theirs = indexed.IndexedDataset(str(prefix), multimodal=False, mmap=True)
    samples = gpt.GPTDataset(theirs, str(prefix), np.arange(len(theirs), dtype=np.int32), None, split, config)
    restarts = sum(int((samples[n]["position_ids"] == 0).sum()) for n in range(20))
    assert restarts > 20, "megatron-core resets no positions: it found no end of a document"
    return samples


# ---------------------------------------------------------------------------------------------------
# Preparing


def write_words(folder: Path, documents: int, seed: int) -> Path:
    """JSON lines of made-up words with frequencies of 1 / rank; written once."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    vocabulary = np.array(["".join(rng.choice(letters[:20], rng.integers(2, 10))) for _ in range(20000)])
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    file = folder / f"words_{documents}_{seed}.jsonl"
    if not file.exists():
        with file.open("w") as out:
            for length in draw_lengths(documents, seed):
                chosen = rng.choice(vocabulary, max(1, int(length * 0.6)), p=weights / weights.sum())
                out.write(json.dumps({"text": " ".join(chosen.tolist())}) + "\n")
    return file


def build_tokenizer_model(work: Path) -> Path:
    """A SentencePiece model of 8000 pieces of the made-up words; trained once."""
    model = work / "words.model"
    if not model.exists():
        source = TextSource("words", (str(write_words(work, 2000, 6)),))
        model.write_bytes(train_model(source, vocab_size=8000, flag="--vocab-size"))
    return model


def list_prepare_words(file: Path, prefix: Path, model: Path, workers: int) -> list[str]:
    """data.prepare as words of a command line, without the interpreter."""
    words = ["-m", "data.prepare", "--input", str(file), "--output-prefix", str(prefix), "--append-eod"]
    return [*words, "--tokenizer-model", str(model), "--workers", str(workers)]


def measure_prepare(settings: Settings) -> dict[str, Any]:
    """MB of text a second: data.prepare, start-up included; SentencePiece alone on the parsed texts, in its threads."""
    import sentencepiece

    work = settings.work
    file, model = write_words(work, settings.text_documents, 5), build_tokenizer_model(work)
    size = file.stat().st_size
    texts = [json.loads(line)["text"] for line in file.open()]

    def prepare(workers: int) -> float:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            command = [sys.executable, *list_prepare_words(file, Path(folder) / "p", model, workers)]
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            return size / (time.perf_counter() - start) / 1e6

    def encode(workers: int) -> float:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        start = time.perf_counter()
        for at in range(0, len(texts), FLOOR_BATCH):
            processor.encode(texts[at : at + FLOOR_BATCH], num_threads=workers)
        return size / (time.perf_counter() - start) / 1e6

    found: dict[str, Any] = {"MB of text": size / 1e6}
    for workers in (1, 2):
        speeds = take_turns({"ours": partial(prepare, workers), "floor": partial(encode, workers)}, settings.rounds)
        found[f"{workers} workers"] = {
            "ours, MB/s": float(np.median(speeds["ours"])),
            "batched SentencePiece, MB/s": float(np.median(speeds["floor"])),
            "of batched SentencePiece": round_ratios(speeds["ours"], speeds["floor"]),
        }
    return found


# ---------------------------------------------------------------------------------------------------
# Index, memory, end to end


def run_child(*words: object) -> dict[str, float]:
    """The figures of benchmarks/data_child.py with these arguments."""
    command = [sys.executable, "benchmarks/data_child.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_index(settings: Settings) -> dict[str, Any]:
    """Best-fit over many documents: seconds to build and store, and the peak memory of the whole process."""
    documents = settings.index_documents
    return {
        f"T {seq_length}, {documents:,} documents": run_child("index", documents, seq_length, 8, settings.work)
        for seq_length in (8192, 131072)
    }


def measure_memory(settings: Settings) -> dict[str, Any]:
    """Anonymous memory of opening a corpus and reading 200 samples, at one size and at four times that size."""
    found: dict[str, Any] = {}
    for documents in (settings.documents // 4, settings.documents):
        prefix = build_corpus(settings.work, documents)
        split = settings.work / f"split_{documents}.npy"
        np.save(split, np.arange(documents))
        words = ("memory", prefix, split, settings.work / "cache")
        run_child(*words)  # builds the index
        found[f"{documents:,} documents"] = run_child(*words)
    small, large = (figures["reading_MB"] for figures in found.values())
    return found | {"MB of growth": large - small}


def measure_end_to_end(settings: Settings) -> dict[str, Any]:
    """200 MB of text to a corpus, then two training steps on the corpus, each under /usr/bin/time -v."""
    work = settings.work
    out = Path(tempfile.mkdtemp(prefix="end_to_end.", dir=work))
    file, model, prefix = write_words(work, 26_600, 7), build_tokenizer_model(work), out / "corpus"

    def run(*command: str) -> dict[str, Any]:
        start = time.perf_counter()
        words = ["/usr/bin/time", "-v", sys.executable, *command]
        done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
        peak = next(line for line in done.stderr.splitlines() if "Maximum resident set size" in line)
        found = {"s": time.perf_counter() - start, "MB in the largest process": int(peak.split()[-1]) / 1024}
        return found | {"last line": done.stdout.strip().splitlines()[-1].replace(str(out), "DIR")}

    train_words = shlex.split(f"""
        train.py --data-path {prefix} --data-cache-path {out / "cache"} --run-dir {out / "run"} --num-layers 2
        --hidden-size 64 --num-attention-heads 4 --seq-length 8192 --global-batch-size 1 --train-iters 2
        --eval-interval 0 --save-interval 0 --sample-tokens 0 --tensorboard-dir none --device cpu
    """)
    return {
        "MB of JSON lines": file.stat().st_size / 1e6,
        "prepare": run(*list_prepare_words(file, prefix, model, workers=2)),
        "train.py, two steps": run(*train_words),
    }


PARTS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "pack": measure_packing,
    "loader": measure_loader,
    "prepare": measure_prepare,
    "index": measure_index,
    "memory": measure_memory,
    "end-to-end": measure_end_to_end,
}


def print_figure(name: str, value: Any, indent: int = 2) -> None:
    """A number with its spread and goal, a text, or a dictionary of both, indented."""
    margin = " " * indent
    if isinstance(value, dict) and "median" not in value:
        print(margin + name)
        for key, inner in value.items():
            print_figure(key, inner, indent + 2)
        return
    if isinstance(value, str):
        print(f"{margin}{name}: {value}")
        return
    number = value["median"] if isinstance(value, dict) else value
    spread = f" ({value['quartiles'][0]:.3f} - {value['quartiles'][1]:.3f})" if isinstance(value, dict) else ""
    goal, at_most = GOALS.get(name, (None, False))
    print(f"{margin}{name:<34} {number:,.4g}{spread}   {describe_goal(number, goal, at_most=at_most)}", flush=True)


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=5, parts=PARTS)
    parser.add_argument("--megatron", metavar="DIR", help="folder with megatron-core; default: no comparison with it")
    documents_help = "documents of the corpus that is packed and loaded; default: %(default)s"
    parser.add_argument("--documents", type=int, default=130_000, help=documents_help)
    tokens_help = "tokens read in a round of the loader; default: %(default)s"
    parser.add_argument("--tokens", type=int, default=40_000_000, help=tokens_help)
    text_help = "documents that are prepared; default: %(default)s"
    parser.add_argument("--text-documents", type=int, default=20_000, help=text_help)
    index_help = "documents that are indexed; default: %(default)s"
    parser.add_argument("--index-documents", type=int, default=10_000_000, help=index_help)
    parser.add_argument("--work", metavar="DIR", help="folder of corpora and caches; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        settings = Settings(
            work, args.rounds, args.documents, args.tokens, args.text_documents, args.index_documents, args.megatron
        )
        figures = {}
        for part in args.only:
            load = os.getloadavg()[0]
            figures[part] = {"load": load} | PARTS[part](settings)
            print_figure(part, figures[part])
    write_figures(args.json, figures)


if __name__ == "__main__":
    main()
