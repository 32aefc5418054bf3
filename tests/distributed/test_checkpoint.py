"""Saving beside training, damage, full disks, and writers that are killed: what is left always loads."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from checkpoint import files
from checkpoint import reader as reader_module
from checkpoint import saver as saver_module
from checkpoint.files import CorruptedCheckpoint, list_checkpoints, read_checksums
from checkpoint.reader import SafeReader
from checkpoint.saver import Saver, load_checkpoint
from model.precision import Precision
from tests.distributed.test_model_parity import built, config_of, full, grid_of, rows_of, steps_of
from tests.distributed.test_reshard import moments, optimizer_of
from tests.launch import ROOT, environment
from tests.world import World
from tools import checkpoint as tool

LAYOUT = "tp 2 x dp_shard 2"


@pytest.fixture(scope="module")
def world():
    with World(4) as world:
        yield world


def trained(layout: str = LAYOUT, dtype: str = "fp64", steps: int = 1):
    grid = grid_of(layout)
    model = built(grid, config_of(), dtype)
    optimizer = optimizer_of(model)
    steps_of(model, optimizer, grid, rows_of("thd"), steps)
    return grid, model, optimizer


def saved_beside_training(rank: int, folder: str) -> dict:
    """Save in the background, held up before it writes, and train on: the save holds the state from before."""
    grid, model, optimizer = trained()
    held, go_on = Saver._write_file, threading.Event()
    told: list[str] = []
    group = dist.new_group(backend="gloo")
    saver = Saver(
        Path(folder),
        model,
        optimizer,
        grid,
        group=group,
        asynchronous=True,
        on_saved=lambda place: told.append(place.name),
    )
    before = full(model, grid) | moments(model, optimizer, grid)

    def late(*args, **kwargs):
        assert threading.current_thread().name.startswith("checkpoint") and go_on.wait(60)
        return held(*args, **kwargs)

    Saver._write_file = late
    try:
        saver.save(1, {})
        steps_of(model, optimizer, grid, rows_of("thd"), 2)
        unfinished = list_checkpoints(Path(folder)) == [] and not told
        dist.barrier()
        go_on.set()
        saver.save(3, {})  # waits for the first
        first_is_there = (Path(folder) / "step_0000001").is_dir()
        at_three = full(model, grid)
        saver.wait()
    finally:
        Saver._write_file = held
    names = [p.name for p in list_checkpoints(Path(folder))]
    after = {}
    for step in (1, 3):
        load_checkpoint(Path(folder) / f"step_000000{step}", model, optimizer, grid)
        after[step] = full(model, grid) | moments(model, optimizer, grid)
    return {
        "unfinished": unfinished,
        "first is there": first_is_there,
        "names": names,
        "told": told,
        "first": all(torch.equal(after[1][n], before[n]) for n in before),
        "third": all(torch.equal(after[3][n], at_three[n]) for n in at_three),
        "moved": not torch.equal(before["embedding.weight"], at_three["embedding.weight"]),
    }


def test_a_background_save_holds_what_was_there_when_it_began(world: World, tmp_path: Path) -> None:
    for rank, result in enumerate(world.run(saved_beside_training, str(tmp_path))):
        names = ["step_0000001", "step_0000003"]
        assert result.pop("names") == names and result.pop("told") == (names if rank == 0 else [])
        assert all(result.values()), result


def kept(rank: int, folder: str) -> list[str]:
    grid, model, optimizer = trained(steps=0)
    saver = Saver(Path(folder), model, optimizer, grid, keep=2)
    for step in range(1, 5):
        saver.save(step, {})
    saver.wait()
    dist.barrier()
    return [p.name for p in Path(folder).iterdir()]


def removes_slowly(rank: int, folder: str) -> tuple[bool, list[str], list[str]]:
    """Three saves, of which one stays; the first removal waits until the third save has begun."""
    grid, model, optimizer = trained(steps=0)
    saver, may_go = Saver(Path(folder), model, optimizer, grid, keep=1), threading.Event()
    remove = files._remove

    def slow(path: Path) -> None:
        assert threading.current_thread().name.startswith("checkpoint") and may_go.wait(60)
        remove(path)

    with mock.patch.object(files, "_remove", slow):
        saver.save(1, {})
        saver.save(2, {})
        dist.barrier()
        between = sorted(p.name for p in Path(folder).iterdir())
        dist.barrier()
        may_go.set()
        saver.save(3, {})
        saver.wait()
    dist.barrier()
    return not saver._doomed or rank == 0, between, sorted(p.name for p in Path(folder).iterdir())


def test_old_checkpoints_are_removed_while_the_run_goes_on(world: World, tmp_path: Path) -> None:
    for is_rank_zero_only, between, left in world.run(removes_slowly, str(tmp_path)):
        assert between == [".step_0000001.gone", "latest", "step_0000002"] and is_rank_zero_only
        assert left == ["latest", "step_0000003"]


def saves_often(rank: int, folder: str) -> tuple[list[int], bool]:
    """Number of built indices after saves of the same tensors twice, of fewer, and of the first again."""
    grid, model, optimizer = trained()
    saver, counts = Saver(Path(folder), model, optimizer, grid, keep=0), []
    with mock.patch.object(saver_module, "build_index", wraps=saver_module.build_index) as build:
        for step, state in enumerate((optimizer, optimizer, None, optimizer), 1):
            saver.optimizer = state  # type: ignore[assignment]
            saver.save(step, {})
            counts.append(build.call_count)
    saver.wait()
    saved = full(model, grid) | moments(model, optimizer, grid)
    is_equal = True
    for step in (1, 2, 4):
        grid, other, other_optimizer = trained(steps=2)
        assert load_checkpoint(Path(folder) / f"step_000000{step}", other, other_optimizer, grid) == step
        loaded = full(other, grid) | moments(other, other_optimizer, grid)
        is_equal = is_equal and all(torch.equal(loaded[name], saved[name]) for name in saved)
    return counts, is_equal


def test_the_index_is_built_where_the_tensors_change(world: World, tmp_path: Path) -> None:
    for rank, (counts, is_equal) in enumerate(world.run(saves_often, str(tmp_path))):
        assert counts == ([1, 1, 2, 3] if rank == 0 else [0, 0, 0, 0]) and is_equal
    first, second, weights, again = (SafeReader(p).read_metadata() for p in list_checkpoints(tmp_path))
    assert first == second == again and len(weights.state_dict_metadata) * 4 == len(first.state_dict_metadata)
    assert tool.main(["verify", str(tmp_path)]) == 0


def reads(rank: int, folder: str, layout: str) -> tuple[int, dict]:
    """Bytes that this rank reads of data files, and what it holds then."""
    grid, model, optimizer = trained(layout, steps=2)
    count, read = 0, reader_module._read_bytes

    def counted(*args):
        nonlocal count
        content = read(*args)
        count += len(content)
        return content

    with mock.patch.object(reader_module, "_read_bytes", counted):
        load_checkpoint(Path(folder) / "step_0000001", model, optimizer, grid)
    return count, full(model, grid) | moments(model, optimizer, grid)


def saved_as(rank: int, folder: str, layout: str) -> dict:
    grid, model, optimizer = trained(layout)
    Saver(Path(folder), model, optimizer, grid).save(1, {})
    return full(model, grid) | moments(model, optimizer, grid)


@pytest.mark.parametrize("layout", ["dp_replicate 2 x dp_shard 2", "tp 2 x dp_replicate 2"])
def test_replicas_write_and_read_each_byte_once(world: World, tmp_path: Path, layout: str) -> None:
    """Beside the optimizer's step counts and norms, of a kilobyte each, which one file holds for a stage."""
    wanted = world.run(saved_as, str(tmp_path), layout)[0]
    place = tmp_path / "step_0000001"
    index = SafeReader(place).read_metadata()
    data = {name: size for name, (size, _) in read_checksums(place).items() if name.startswith("__")}
    assert sum(info.length for info in index.storage_data.values()) == sum(data.values())
    assert max(data.values()) < 1.5 * min(data.values()), "the replicas share the writing"
    small = sum(info.length for key, info in index.storage_data.items() if ".step" in key.fqn or "norm" in key.fqn)
    results = world.run(reads, str(tmp_path), layout)
    counts = [count for count, _ in results]
    assert counts[2:] == [0, 0], "ranks of the second replica"
    assert sum(data.values()) <= sum(counts) <= sum(data.values()) + small
    for _, loaded in results:
        assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def written_uneven(rank: int, layout: str, folder: str) -> dict[str, torch.Tensor]:
    """A checkpoint of matrices whose rows divide by no number of ranks; every tensor, whole, by names as the files have
    them.
    """
    grid = grid_of(layout)
    config = config_of(
        hidden_size=33, ffn_hidden_size=52, kv_channels=6, num_query_groups=4, num_layers=4, qk_norm=True
    )
    model = built(grid, config, "fp64")
    optimizer = optimizer_of(model)
    steps_of(model, optimizer, grid, rows_of("thd"), 1)
    Saver(Path(folder), model, optimizer, grid).save(1, {})
    whole = {f"model.{name}": x for name, x in full(model, grid).items()}
    for place, x in moments(model, optimizer, grid).items():
        if place != "step":
            name, key = place.split()
            whole[f"optimizer.{name}.{key}"] = x
    return whole


PLACED = [
    "tp 4",
    "tp 2 x dp_shard 2",
    "pp 2 x tp 2",
    "tp 2 x dp_replicate 2",
    "dp_shard 4",
    "pp 4",
    "pp 2 x dp_shard 2",
]


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=[] if x in PLACED[:3] else [pytest.mark.full]) for x in PLACED]
)
def test_every_shard_lies_at_its_place_in_the_whole(world: World, tmp_path: Path, layout: str) -> None:
    """Read by one process that knows no layout: each tensor of the file is the canonical one, whatever the ranks held
    of it.
    """
    wanted = world.run(written_uneven, layout, str(tmp_path))[0]
    place = tmp_path / "step_0000001"
    reader = SafeReader(place)
    stored = [name for name in tool.read_tensor_index(reader) if not name.endswith(".step")]
    assert set(stored) == set(wanted) and len(wanted) == 3 * (3 + 4 * 9)
    for name in stored:
        assert torch.equal(reader.read_tensor(name), wanted[name]), name


def test_keep_list_checkpoints(world: World, tmp_path: Path) -> None:
    assert sorted(world.run(kept, str(tmp_path))[0]) == ["latest", "step_0000003", "step_0000004"]


class Scales(Precision):
    """As `te_layers.FP8`: two tensors a layer, beside the parameters."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        for layer in model.layers:  # type: ignore[union-attr]
            self.kept.setdefault(f"layers.{layer}.mlp.scaling_fwd.scale", torch.ones(6))
            self.kept.setdefault(f"layers.{layer}.mlp.scaling_fwd.amax_history", torch.zeros(4, 6))
        return {n: x for n, x in self.kept.items() if n.split(".")[1] in model.layers}  # type: ignore[operator]


def scales_move(rank: int, folder: str) -> list[dict[str, torch.Tensor]]:
    """Saved with tp 2, loaded with pp 2; then from a checkpoint that has none, then from one that has the second
    layer's.
    """
    grid, model, optimizer = trained()
    model.precision = Scales()
    for number, x in enumerate(model.precision.state(model).values()):
        x.copy_(torch.arange(x.numel()).view_as(x) + number)
    Saver(Path(folder) / "with", model, optimizer, grid).save(1, {})
    model.precision = Precision()
    Saver(Path(folder) / "without", model, optimizer, grid).save(1, {})
    some = Scales()
    some.kept = {"layers.1.mlp.scaling_fwd.scale": torch.full((6,), 7.0)}
    model.precision = mock.Mock(wraps=some, state=lambda model: some.kept)
    Saver(Path(folder) / "some", model, optimizer, grid).save(1, {})
    found = []
    for place in ("with", "without", "some"):
        grid, model, optimizer = trained("pp 2 x cp 2", steps=0)
        model.precision = Scales()
        load_checkpoint(Path(folder) / place / "step_0000001", model, optimizer, grid)
        found.append(model.precision.state(model))
    return found


def test_scales_of_8_bits_move_with_the_weights(world: World, tmp_path: Path) -> None:
    for rank, (with_scales, without, some) in enumerate(world.run(scales_move, str(tmp_path))):
        layer = rank // 2  # of two, a stage each
        first, second = (f"layers.{layer}.mlp.scaling_fwd.{what}" for what in ("scale", "amax_history"))
        assert with_scales.keys() == without.keys() == some.keys() == {first, second}
        assert torch.equal(some[first], torch.full((6,), 7.0) if layer else torch.ones(6)) and not some[second].any()
        assert torch.equal(with_scales[first], torch.arange(6.0) + 2 * layer)
        assert torch.equal(with_scales[second], torch.arange(24.0).view(4, 6) + 2 * layer + 1)
        assert torch.equal(without[first], torch.ones(6)) and not without[second].any()


def wants(rank: int, folder: str, error: type[Exception]) -> str:
    """The words with which loading is refused."""
    grid, model, optimizer = trained(steps=0)
    with pytest.raises(error) as caught:
        load_checkpoint(Path(folder), model, optimizer, grid)
    return str(caught.value)


def saved(rank: int, folder: str, dtype: str = "fp64") -> None:
    grid, model, optimizer = trained(dtype=dtype)
    Saver(Path(folder), model, optimizer, grid).save(1, {})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    # A changed checksum is another file's corruption.
    content[0 if path.name == "checksums.json" else len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damage_is_found_on_every_rank_and_names_the_file(world: World, tmp_path: Path) -> None:
    world.run(saved, str(tmp_path))
    place = tmp_path / "step_0000001"
    names = sorted(read_checksums(place))
    assert [n for n in names if n.startswith("__")] == [
        f"__{rank}_0.distcp" for rank in range(4)
    ] and ".metadata" in names
    for name in [*names, "checksums.json"]:
        content = (place / name).read_bytes()
        for do in (flip, Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:-1])):
            do(place / name)
            for words in world.run(wants, str(place), CorruptedCheckpoint):
                assert f"{place.name}/{name}:" in words, words
            assert tool.main(["verify", str(place)]) == 1
            (place / name).write_bytes(content)
    assert tool.main(["verify", str(place)]) == 0


def full_disk(rank: int, folder: str, asynchronous: bool) -> tuple[str, list[str], bool]:
    """Rank 1 may write no file beyond a size: what it says, what is left, and that the next save goes well."""
    grid, model, optimizer = trained(steps=0)
    saver = Saver(Path(folder), model, optimizer, grid, asynchronous=asynchronous, group=dist.new_group(backend="gloo"))
    saver.save(1, {})
    saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError) as caught:
        try:
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
            saver.save(2, {})
            saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    left = sorted(p.name for p in Path(folder).iterdir())
    dist.barrier()
    saver.save(3, {})
    saver.wait()
    return str(caught.value), left, (Path(folder) / "step_0000003" / "run.json").is_file()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_cannot_be_written_names_the_file_and_leaves_the_previous_one(
    world: World, tmp_path: Path, asynchronous: bool
) -> None:
    for words, left, goes_on in world.run(full_disk, str(tmp_path), asynchronous):
        assert "cannot write" in words and "__1_" in words and "File too large" in words and "\n" not in words, words
        assert left == ["latest", "step_0000001"] and goes_on


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 1 MiB there; skips where this user may not mount one."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode:
        pytest.skip(
            "this user may not mount a small disk; test_what_cannot_be_written covers the error by a file size limit"
        )
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(rank: int, folder: str) -> tuple[str, list[str], list[str]]:
    grid, model, optimizer = trained(steps=0)
    saver = Saver(Path(folder), model, optimizer, grid)
    try:
        for step in range(1, 50):
            saver.save(step, {})
    except OSError as error:
        dist.barrier()
        return str(error), [p.name for p in list_checkpoints(Path(folder))], [p.name for p in Path(folder).iterdir()]
    raise AssertionError("a disk of 1 MiB held 49 checkpoints")


def test_a_full_disk(world: World, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk"):
        for words, found, left in world.run(fill, str(tmp_path / "disk")):
            assert "No space left on device" in words and "disk/" in words, words
            assert found and sorted(left) == ["latest", *found]
        assert tool.main(["verify", str(tmp_path / "disk")]) == 0


def test_the_tool_tells_where_two_checkpoints_differ(world: World, tmp_path: Path, capsys) -> None:
    for name in ("a", "b"):
        world.run(saved, str(tmp_path / name))
    assert tool.main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "no difference" in capsys.readouterr().out
    world.run(saved, str(tmp_path / "c"), "fp32")
    world.run(changed, str(tmp_path / "d"))
    assert tool.main(["diff", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    shown = capsys.readouterr().out
    assert "model.embedding.weight:" in shown and "'dtype' do not match: torch.float32 != torch.float64" in shown
    assert tool.main(["diff", str(tmp_path / "a"), str(tmp_path / "d")]) == 1
    metadata, tensor, end = capsys.readouterr().out.splitlines()
    assert metadata == "lr: missing | 0.5" and end == "2 differences"
    assert tensor.startswith("model.final_norm.weight: ") and "Mismatched elements: 1 / 32" in tensor
    (largest,) = re.findall(r"Greatest absolute difference: (\S+) at", tensor)
    assert float(largest) == pytest.approx(0.5)
    assert tool.main(["inspect", str(tmp_path / "d")]) == 0
    shown = capsys.readouterr().out
    assert "step 1" in shown and "lr " in shown and "model.lm_head.weight" in shown and "[64, 32] in 4 parts" in shown
    assert tool.main(["inspect", str(tmp_path)]) == 1


def changed(rank: int, folder: str) -> None:
    grid, model, optimizer = trained()
    with torch.no_grad():
        norm = dict(model.named_parameters())["final_norm.weight"].to_local()
        if grid.rank("fsdp") == 0:
            norm[0] += 0.5
    Saver(Path(folder), model, optimizer, grid).save(1, {"lr": 0.5})


@pytest.mark.parametrize("trials", [6, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_any_moment_a_checkpoint_loads(tmp_path: Path, trials: int) -> None:
    """Two ranks that save without pause are killed, both or one, at random moments (tests/killed_writers.py)."""
    command = [sys.executable, "-m", "tests.killed_writers", str(tmp_path), str(trials)]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("killed ")]
    assert len(lines) == trials and all("loads" in line for line in lines), done.stdout
    assert sum(".part" in line for line in lines) >= trials // 4, "hardly one was killed in the middle of a save"
    assert time.monotonic() - start < 280
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".step") and os.path.isfile(p)]


def test_the_systems_own_words_come_first() -> None:
    """On a full disk one rank gets the system's error, another only that of PyTorch's writer."""
    from checkpoint.saver import first_cause

    full, writer = (
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"),
    )
    assert first_cause({0: writer, 1: full}) == (1, full)
    rank, cause = first_cause({0: writer})
    assert rank == 0 and isinstance(cause, OSError) and "PytorchStreamWriter" in str(cause)
