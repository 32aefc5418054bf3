"""Checkpoints: what rank 0 plans at a save, what each rank reads at a load, how a save beside training slows the steps.

Before: torch.distributed.checkpoint plans every save on rank 0, and every rank parses the whole index.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import WriteResult, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from benchmarks.scale_parts.table import Row
from checkpoint.files import INDEX_FILE, compute_checksums
from checkpoint.index import PackedIndex, build_index, data_file, describe_chunks
from checkpoint.reader import read_index
from utils.files import write_synced

LAYOUTS = {64: (8, 2, 4), 128: (8, 4, 20), 4096: (8, 8, 16)}  # ranks: (tp, pp, layers of a stage)
MEASURED, ASKED = 128, 4096
HIDDEN, FFN = 8192, 28672
# Matrices and norms of a layer: name, shape, the dimension that tp cuts.
TENSORS: list[tuple[str, tuple[int, ...], int | None]] = [
    ("attention.norm.weight", (HIDDEN,), None),
    ("attention.qkv.weight", (HIDDEN + 2048, HIDDEN), 0),
    ("attention.output.weight", (HIDDEN, HIDDEN), 1),
    ("mlp.norm.weight", (HIDDEN,), None),
    ("mlp.gate_weight", (FFN, HIDDEN), 0),
    ("mlp.up_weight", (FFN, HIDDEN), 0),
    ("mlp.fc2_weight", (HIDDEN, FFN), 1),
]
CHUNK_BYTES = 123456


def write_item(name: str, size: tuple[int, ...], offsets: list[int], sizes: list[int]) -> WriteItem:
    box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk=box, properties=TensorProperties(dtype=torch.float32), size=torch.Size(size))
    kind = WriteItemType.SHARD if size else WriteItemType.TENSOR
    return WriteItem(index=MetadataIndex(name, box.offsets), type=kind, tensor_data=data)


def plan_rank(rank: int, ranks: int, *, own: bool) -> SavePlan:
    """What a rank holds; with `own` only what the rank writes of equal copies."""
    tp, pp, layers = LAYOUTS[ranks]
    fsdp = ranks // tp // pp
    stage, shard, slice_ = rank // (tp * fsdp), rank // tp % fsdp, rank % tp
    items = []
    for layer in range(stage * layers, (stage + 1) * layers):
        for number, (tensor, size, dim) in enumerate(TENSORS):
            sizes, offsets, name = list(size), [0] * len(size), f"layers.{layer}.{tensor}"
            if dim is not None:
                sizes[dim] //= tp
                offsets[dim] = sizes[dim] * slice_
            rows = -(-sizes[0] // fsdp)
            start, end = min(rows * shard, sizes[0]), min(rows * (shard + 1), sizes[0])
            offsets[0], sizes[0] = offsets[0] + start, end - start
            names = (f"model.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq")
            if sizes[0] and not (own and dim is None and number % tp != slice_):
                items += [write_item(name, size, offsets, sizes) for name in names]
            if not own or shard == slice_ == 0:
                items.append(write_item(f"optimizer.{name}.step", (), [], []))
    return SavePlan(items, planner_data={})


def results_of(plan: SavePlan, rank: int) -> list[WriteResult]:
    infos = [_StorageInfo(data_file(rank), number * CHUNK_BYTES, 10**9) for number in range(len(plan.items))]
    return [WriteResult(item.index, 10**9, info) for item, info in zip(plan.items, infos, strict=True)]


def plan_with_library(ranks: int, folder: Path) -> None:
    """Rank 0's work at each save, between the gathering and the broadcast."""
    sent = [pickle.dumps(plan_rank(rank, ranks, own=False)) for rank in range(ranks)]
    start = time.process_time()
    plans, metadata = dcp.DefaultSavePlanner().create_global_plan([pickle.loads(plan) for plan in sent])
    received = [pickle.dumps(plan) for plan in plans]
    results = [pickle.dumps(results_of(plan, rank)) for rank, plan in enumerate(plans)]
    dcp.FileSystemWriter(folder).finish(metadata, [pickle.loads(result) for result in results])
    assert len(received) == ranks
    _report(start)


def build_first(ranks: int, folder: Path) -> None:
    """Rank 0's work at the first save of a process."""
    plans = ((rank, plan_rank(rank, ranks, own=True)) for rank in range(ranks))
    texts = [describe_chunks(plan, results_of(plan, rank)) for rank, plan in plans]
    start = time.process_time()
    write_synced(folder / INDEX_FILE, build_index(texts))
    _report(start)


def save_again(ranks: int, folder: Path) -> None:
    """Rank 0's work at each later save."""
    content, digests = (folder / INDEX_FILE).read_bytes(), ["0" * 32] * ranks
    sent = [pickle.dumps(("0" * 32, {data_file(rank): [10**9, "xxh3_128:" + "0" * 32]})) for rank in range(ranks)]
    start = time.process_time()
    written = [pickle.loads(outcome) for outcome in sent]
    assert [digest for digest, _ in written] == digests
    write_synced(folder / INDEX_FILE, content)
    sums = {name: value for _, own in written for name, value in own.items()}
    write_synced(folder / "checksums.json", json.dumps(sums | compute_checksums([folder / INDEX_FILE]), indent=1))
    _report(start)


def parse_index(ranks: int, folder: Path) -> None:
    """What every rank did at a load, and rank 0 does now; the packed index for the others."""
    start = time.process_time()
    packed = PackedIndex.pack(read_index(folder / INDEX_FILE, set()))
    _report(start)
    (folder / "packed").write_bytes(pickle.dumps(packed))


def receive_index(ranks: int, folder: Path) -> None:
    names = [item.index.fqn for item in plan_rank(ranks - 1, ranks, own=False).items]
    content = (folder / "packed").read_bytes()
    start = time.process_time()
    pickle.loads(content).select(names)
    _report(start)


figures: dict[str, float] = {}


def _report(start: float) -> None:
    figures["seconds"] = time.process_time() - start
    figures["GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - figures["imports"]


def _run(work: Callable[[int, Path], None], ranks: int, folder: Path) -> dict[str, float]:
    figures["imports"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    work(ranks, folder)
    return figures


def measure(work: Callable[[int, Path], None], ranks: int, folder: Path) -> dict[str, float]:
    """CPU seconds, and peak memory of a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (work, ranks, folder))


def plans_and_index() -> list[Row]:
    """Planning and index of the model in `LAYOUTS`, fp32 weights and AdamW state."""
    by = ASKED * LAYOUTS[ASKED][2] / (MEASURED * LAYOUTS[MEASURED][2])  # chunks, and so everything but later saves
    how = f"extrapolated from {MEASURED} ranks: by the number of chunks"
    with tempfile.TemporaryDirectory() as temporary:
        old, new = Path(temporary, "old"), Path(temporary, "new")
        old.mkdir()
        new.mkdir()
        plan, parse = (measure(work, MEASURED, old) for work in (plan_with_library, parse_index))
        steps = (build_first, save_again, parse_index, receive_index)
        first, again, parsed, received = (measure(work, MEASURED, new) for work in steps)
        old_size, size = ((folder / INDEX_FILE).stat().st_size / 2**20 for folder in (old, new))
        (new / INDEX_FILE).write_bytes(bytes(int(size * by * 2**20)))
        again_asked = measure(save_again, ASKED, new)
    rows = []
    for what, before, after, unit in [
        ("first save: work of rank 0", plan["seconds"], first["seconds"], "CPU s"),
        ("each later save: work of rank 0", plan["seconds"], again["seconds"], "CPU s"),
        ("memory of rank 0 that plans", plan["GiB"], first["GiB"], "GiB"),
        ("index file", old_size, size, "MiB"),
        ("load: index on rank 0", parse["seconds"], parsed["seconds"], "CPU s"),
        ("load: index on another rank", parse["seconds"], received["seconds"], "CPU s"),
        ("load: memory of the index on another rank", parse["GiB"], received["GiB"], "GiB"),
    ]:
        rows.append(Row(what, MEASURED, before, after, unit))
        if what.startswith("each later"):
            rows.append(Row(what, ASKED, before * by, again_asked["seconds"], unit, f"before: {how}"))
        else:
            rows.append(Row(what, ASKED, before * by, after * by, unit, how))
    return rows


# ---------------------------------------------------------------------------------------------------
# Steps beside a save


def time_steps(beside: Callable[[], object] | None, seconds: float = 2.0) -> float:
    """Median seconds of a step of small operations, as a thread that launches kernels runs them."""
    matrix, small = torch.randn(256, 256), torch.randn(64)
    done = threading.Event()

    def work() -> None:
        while beside is not None and not done.is_set():
            beside()

    thread = threading.Thread(target=work)
    thread.start()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(200):
            small = small + 1
        matrix @ matrix
        times.append(time.perf_counter() - start)
    done.set()
    thread.join()
    return statistics.median(times)


def writes(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """What the background thread of rank 0 does: planning as before, and writing a file as before and now."""
    plans = [plan_rank(rank, 64, own=False) for rank in range(64)]
    state = {f"x{number}": torch.randn(1 << 21) for number in range(16)}

    def write() -> None:
        writer, planner = dcp.FileSystemWriter(folder), dcp.DefaultSavePlanner()
        writer.set_up_storage_writer(False, rank=0, use_collectives=False)
        planner.set_up_planner(state)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        describe_chunks(plan, writer.write_data(plan, planner).value())
        compute_checksums([folder / data_file(0)])

    yield "planning", lambda: dcp.DefaultSavePlanner().create_global_plan(plans)
    yield "writing", write


def steps_beside_a_save() -> list[Row]:
    """One process: the main thread runs steps, a thread does rank 0's part of an asynchronous save."""
    torch.set_num_threads(1)
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for _ in range(5):
            for name, work in writes(Path(temporary)):
                alone = time_steps(None)
                ratios.setdefault(name, []).append(time_steps(work) / alone)
    planning, writing = (statistics.median(ratios[name]) for name in ("planning", "writing"))
    return [
        Row("step time while rank 0 plans an asynchronous save / alone", 64, planning, "no planning"),
        Row("step time while a rank writes its file / alone", 1, None, writing),
    ]


PARTS: dict[str, Callable[[], list[Row]]] = {"checkpoint-index": plans_and_index, "async-save": steps_beside_a_save}
