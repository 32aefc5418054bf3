"""Data: packing, loading, preparing, indexing, memory; each against a floor or a peer in the same run, in turns. And from text to training.

    python benchmarks/data.py --json data.json [--only pack,loader,prepare,index,memory,end-to-end] [--megatron DIR]

`--megatron DIR` is a folder that megatron-core was installed in (pip install --no-deps --target DIR megatron-core==0.16.1); without it
the loader is compared with the raw memory map alone. Corpora are random tokens, each document ended by token 0 as --append-eod does, or
words of a made-up vocabulary, log-normal in length with median 600 and sigma 1.5, written under --work. `load` is the machine's load
average when a part began: above 0, others shared its cores.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.batch import BatchPlan  # noqa: E402
from data.dataset import PackedDataset  # noqa: E402
from data.indexed_dataset import IndexedDataset, index_file, write_indexed_dataset  # noqa: E402
from data.loader import MicrobatchDataset  # noqa: E402
from data.packing import PackingOptions, cut_documents, pack_epoch  # noqa: E402
from data.sources import TextSource, train_model  # noqa: E402

VOCAB_SIZE = 32001
GOALS = {
    "rows over the fewest possible": 1.0, "real tokens / T": 0.99, "of megatron-core": 2.0, "of batched SentencePiece": 0.95,
    "seconds": 60.0, "GB": 2.0, "MB of growth": 11.0,
}  # fmt: skip


def log_normal(count: int, seed: int = 0) -> np.ndarray:
    """Lengths of documents, in tokens."""
    return np.maximum(1, np.random.default_rng(seed).lognormal(np.log(600), 1.5, count)).astype(np.int64)


def in_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each run returns, `rounds` times, one after the other so that a noisy machine is noisy for all."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return found


def ratio(of: list[float], to: list[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios."""
    low, middle, high = np.percentile(np.array(of) / np.array(to), [25, 50, 75]).tolist()
    return {"median": middle, "quartiles": [low, high]}


# ---------------------------------------------------------------------------------------------------


def pack(args: argparse.Namespace) -> dict[str, Any]:
    """Best-fit over a whole epoch: rows against the fewest that the padded tokens could fill."""
    lengths = log_normal(args.documents)
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


def corpus(args: argparse.Namespace, documents: int) -> Path:
    prefix = Path(args.work) / f"ended_tokens_{documents}"
    if not index_file(prefix).exists():
        rng = np.random.default_rng(0)
        write_indexed_dataset(
            prefix,
            (
                np.append(rng.integers(1, VOCAB_SIZE, n - 1, dtype=np.uint16), np.uint16(0))
                for n in log_normal(documents)
            ),
            vocab_size=VOCAB_SIZE,
        )
    return prefix


def loader(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of one process, tokens/s: ours packed, with positions and document borders; megatron-core's GPTDataset; a copy of the map."""
    prefix = corpus(args, args.documents)
    tokens = IndexedDataset(prefix)
    found: dict[str, Any] = {"Mtok in the corpus": len(tokens.tokens) / 1e6}
    return found | {f"T {seq_length}": loading(args, prefix, tokens, seq_length) for seq_length in (4096, 8192, 32768)}


def loading(args: argparse.Namespace, prefix: Path, tokens: IndexedDataset, seq_length: int) -> dict[str, Any]:
    """`loader` at one length."""
    count = min(len(tokens.tokens), args.tokens) // seq_length
    sequences = PackedDataset(
        tokens,
        np.arange(len(tokens)),
        PackingOptions(seq_length=seq_length, method="best-fit", seed=1, alignment=2),
        pad_token=0,
        cache_path=Path(args.work) / "cache",
        vocab_size=VOCAB_SIZE,
    )
    place = dict(micro_batch_size=1, batch_size=1, batch_rank=0, cp_size=1, cp_rank=0)
    rows = MicrobatchDataset(sequences, BatchPlan(global_batch_size=1, qkv_format="thd", layout="zigzag", **place))
    order = (np.random.default_rng(1).permutation(count) * seq_length).tolist()

    def timed(read: Callable[[int], Any]) -> float:
        start = time.perf_counter()
        for n in range(count):
            read(n)
        return count * seq_length / (time.perf_counter() - start) / 1e6

    runs = {
        "ours": lambda: timed(lambda n: rows[(n, 0)]),
        "raw map": lambda: timed(lambda n: tokens.tokens[order[n] : order[n] + seq_length].astype(np.int64)),
    }
    if args.megatron:
        theirs = megatron_dataset(args, prefix, seq_length)
        runs["megatron-core"] = lambda: timed(theirs.__getitem__)
    speeds = in_turns(runs, args.rounds)
    found: dict[str, Any] = {f"{name}, Mtok/s": float(np.median(values)) for name, values in speeds.items()}
    if args.megatron:
        found["of megatron-core"] = ratio(speeds["ours"], speeds["megatron-core"])
    return found


def megatron_dataset(args: argparse.Namespace, prefix: Path, seq_length: int) -> Any:
    """Their GPTDataset over the same files, positions reset and loss masked at the end of each document."""
    sys.path.insert(0, args.megatron)
    warnings.simplefilter("ignore")
    gpt = importlib.import_module("megatron.core.datasets.gpt_dataset")
    indexed = importlib.import_module("megatron.core.datasets.indexed_dataset")
    split = importlib.import_module("megatron.core.datasets.utils").Split.train

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = VOCAB_SIZE, 0, 1, {"made": "up"}

    config = gpt.GPTDatasetConfig(
        random_seed=1, sequence_length=seq_length, blend=None, split="1,0,0", path_to_cache=str(Path(args.work) / "megatron"),
        tokenizer=Tokenizer(), reset_position_ids=True, reset_attention_mask=False, eod_mask_loss=True, create_attention_mask=False,
        mmap_bin_files=True,
    )  # fmt: skip
    theirs = indexed.IndexedDataset(str(prefix), multimodal=False, mmap=True)
    data = gpt.GPTDataset(theirs, str(prefix), np.arange(len(theirs), dtype=np.int32), None, split, config)
    restarts = sum(int((data[n]["position_ids"] == 0).sum()) for n in range(20))
    assert restarts > 20, "positions are not reset: no end of a document found"
    return data


def words(folder: Path, documents: int, seed: int) -> Path:
    """JSON lines of made-up words, frequencies as 1 / rank."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    vocabulary = np.array(["".join(rng.choice(letters[:20], rng.integers(2, 10))) for _ in range(20000)])
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    file = folder / f"words_{documents}_{seed}.jsonl"
    if not file.exists():
        with file.open("w") as out:
            for length in log_normal(documents, seed):
                chosen = rng.choice(vocabulary, max(1, int(length * 0.6)), p=weights / weights.sum())
                out.write(json.dumps({"text": " ".join(chosen.tolist())}) + "\n")
    return file


def prepare_speed(args: argparse.Namespace) -> dict[str, Any]:
    """JSON lines to files, start-up included, against SentencePiece alone on the parsed texts in its own threads, tokens/s of wall time."""
    import sentencepiece

    work = Path(args.work)
    file = words(work, args.text_documents, 5)
    model = work / "words.model"
    if not model.exists():
        model.write_bytes(
            train_model(TextSource("words", (str(words(work, 2000, 6)),)), vocab_size=8000, flag="--vocab-size")
        )
    size = file.stat().st_size
    texts = [json.loads(line)["text"] for line in file.open()]
    found: dict[str, Any] = {"MB of text": size / 1e6}
    for workers in (1, 2):

        def ours(workers: int = workers) -> float:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                command = [
                    sys.executable,
                    "-m",
                    "data.prepare",
                    "--input",
                    str(file),
                    "--output-prefix",
                    f"{folder}/p",
                    "--append-eod",
                ]
                start = time.perf_counter()
                subprocess.run(
                    [*command, "--tokenizer-model", str(model), "--workers", str(workers)],
                    cwd=ROOT,
                    check=True,
                    capture_output=True,
                )
                return size / (time.perf_counter() - start) / 1e6

        def floor(workers: int = workers) -> float:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
            start = time.perf_counter()
            for at in range(0, len(texts), 256):
                processor.encode(texts[at : at + 256], num_threads=workers)
            return size / (time.perf_counter() - start) / 1e6

        speeds = in_turns({"ours": ours, "floor": floor}, args.rounds)
        found[f"{workers} workers"] = {
            "ours, MB/s": float(np.median(speeds["ours"])),
            "batched SentencePiece, MB/s": float(np.median(speeds["floor"])),
            "of batched SentencePiece": ratio(speeds["ours"], speeds["floor"]),
        }
    return found


def in_child(code: str) -> dict[str, float]:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


INDEX = """
import json, resource, time, numpy as np, tempfile
from pathlib import Path
from data.packing import pack_epoch, store_epoch
lengths = np.maximum(1, np.random.default_rng(0).lognormal(np.log(600), 1.5, {documents})).astype(np.int32)
start = time.perf_counter()
index = pack_epoch(lengths, seed=1, epoch=0, seq_length={seq_length}, alignment={alignment})
with tempfile.TemporaryDirectory(dir={work!r}) as folder:
    store_epoch(index, Path(folder))
print(json.dumps(dict(seconds=time.perf_counter() - start, GB=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, rows=len(index))))
"""


def index(args: argparse.Namespace) -> dict[str, Any]:
    """Best-fit over many documents: seconds to build and store, and the peak memory of the whole process."""
    return {
        f"T {seq_length}, {args.index_documents:,} documents": in_child(
            INDEX.format(documents=args.index_documents, seq_length=seq_length, alignment=8, work=args.work)
        )
        for seq_length in (8192, 131072)
    }


MEMORY = """
import json, sys, time, numpy as np
from pathlib import Path
from data.indexed_dataset import IndexedDataset
from data.dataset import PackedDataset
from data.packing import PackingOptions
def anonymous():
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')) / 1024
before = anonymous()
start = time.perf_counter()
tokens = IndexedDataset(Path({prefix!r}))
opened = time.perf_counter() - start
after_open = anonymous()
documents = np.load({documents!r}, mmap_mode='r').view(np.ndarray)
data = PackedDataset(tokens, documents, PackingOptions(seq_length=8192, method='best-fit', seed=1, alignment=2), pad_token=0, cache_path=Path({cache!r}))
for n in range(200):
    data.sample(n)
print(json.dumps(dict(opening_us=opened * 1e6, opening_MB=after_open - before, reading_MB=anonymous() - before)))
"""


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Anonymous memory that opening a corpus and reading 200 sequences takes, of one size and of four times that."""
    found: dict[str, Any] = {}
    for documents in (args.documents // 4, args.documents):
        prefix = corpus(args, documents)
        split = Path(args.work) / f"split_{documents}.npy"
        np.save(split, np.arange(documents))
        code = MEMORY.format(prefix=str(prefix), documents=str(split), cache=str(Path(args.work) / "cache"))
        in_child(code)  # builds the index
        found[f"{documents:,} documents"] = in_child(code)
    small, large = (found[name]["reading_MB"] for name in found)
    found["MB of growth"] = large - small
    return found


def end_to_end(args: argparse.Namespace) -> dict[str, Any]:
    """200 MB of text to a corpus, and two steps of training on it, each under /usr/bin/time -v."""
    work = Path(args.work)
    file, model, out = (
        words(work, 26_600, 7),
        work / "words.model",
        Path(tempfile.mkdtemp(prefix="end_to_end.", dir=work)),
    )
    prefix = out / "corpus"
    if not model.exists():
        model.write_bytes(
            train_model(TextSource("words", (str(words(work, 2000, 6)),)), vocab_size=8000, flag="--vocab-size")
        )

    def timed(*command: str) -> dict[str, Any]:
        start = time.perf_counter()
        done = subprocess.run(
            ["/usr/bin/time", "-v", sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True
        )
        peak = next(line for line in done.stderr.splitlines() if "Maximum resident set size" in line)
        found = {"s": time.perf_counter() - start, "MB in the largest process": int(peak.split()[-1]) / 1024}
        return found | {"last line": done.stdout.strip().splitlines()[-1].replace(str(out), "DIR")}

    prepare = [
        "-m",
        "data.prepare",
        "--input",
        str(file),
        "--output-prefix",
        str(prefix),
        "--append-eod",
        "--workers",
        "2",
    ]
    train = [
        "train.py",
        "--data-path",
        str(prefix),
        "--data-cache-path",
        str(out / "cache"),
        "--run-dir",
        str(out / "run"),
    ]
    train += shlex.split("""
        --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 8192 --global-batch-size 1 --train-iters 2
        --eval-interval 0 --save-interval 0 --sample-tokens 0 --tensorboard-dir none --device cpu
    """)
    return {
        "MB of JSON lines": file.stat().st_size / 1e6,
        "prepare": timed(*prepare, "--tokenizer-model", str(model)),
        "train.py, two steps": timed(*train),
    }


PARTS = {
    "pack": pack,
    "loader": loader,
    "prepare": prepare_speed,
    "index": index,
    "memory": memory,
    "end-to-end": end_to_end,
}


def tell(name: str, value: Any, indent: int = 2) -> None:
    if isinstance(value, dict) and "median" not in value:
        print(" " * indent + name)
        for key, inner in value.items():
            tell(key, inner, indent + 2)
        return
    if isinstance(value, str):
        print(" " * indent + f"{name}: {value}")
        return
    number = value["median"] if isinstance(value, dict) else value
    spread = f" ({value['quartiles'][0]:.3f} - {value['quartiles'][1]:.3f})" if isinstance(value, dict) else ""
    goal = GOALS.get(name)
    at_most = name in ("seconds", "GB", "MB of growth", "rows over the fewest possible")
    better = goal is not None and (number <= goal if at_most else number >= goal)
    verdict = "" if goal is None else f"   asked {goal}: {'met' if better else 'MISSED'}"
    print(" " * indent + f"{name:<34} {number:,.4g}{spread}{verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--megatron", help="folder with megatron-core")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=130_000, help="of the corpus that is packed and loaded")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="read in a round of the loader")
    parser.add_argument("--text-documents", type=int, default=20_000, help="that are prepared")
    parser.add_argument("--index-documents", type=int, default=10_000_000)
    parser.add_argument("--work", help="folder for corpora; default: a temporary one")
    parser.add_argument("--json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or folder
        Path(args.work).mkdir(parents=True, exist_ok=True)
        found = {}
        for part in args.only.split(","):
            load = os.getloadavg()[0]
            found[part] = {"load": load} | PARTS[part](args)
            tell(part, found[part])
    if args.json:
        asked = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        short = {args.work: "DIR", args.megatron: "DIR", args.json: Path(args.json).name}  # no places of this machine
        command = [short.get(word, word) for word in ["python", *sys.argv]]
        facts = {"command": " ".join(command), "commit": commit, "cores": len(os.sched_getaffinity(0))}
        Path(args.json).write_text(json.dumps(facts | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
