"""Copies on the nodes' own disks: the bits of the step that was saved, while each rank's copy is on some node."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.files import step_folder
from checkpoint.local import COPY, LocalCopies
from checkpoint.resume import LoadPlan
from data.batch_schedule import BatchSchedule
from tests.distributed.test_model_parity import built, config_of, full, grid_of, rows_of, steps_of
from tests.distributed.test_reshard import SHAPE, moments, optimizer_of
from tests.world import World
from utils.errors import UserError

METADATA = {"model hidden_size": 36}
BATCHES = BatchSchedule.constant(4)


@pytest.fixture(scope="module")
def world():
    with World(4) as world:
        yield world


def copies_of(rank: int, folder: str, layout: str, node_size: int, rows: str, steps: int, **options: Any) -> tuple:
    """Ranks of a node share a folder; nodes do not."""
    grid = grid_of(layout)
    model = built(grid, config_of(**SHAPE), "fp64")
    optimizer = optimizer_of(model)
    steps_of(model, optimizer, grid, rows_of(rows), steps)
    node = Path(folder) / f"node_{rank // node_size}"
    save = Path(folder) / "run" / "checkpoints"
    return LocalCopies(node, model, optimizer, grid, save=save, node_size=node_size, **options), model, optimizer, grid


def written(rank: int, folder: str, layout: str, node_size: int, asynchronous: bool) -> tuple[dict, list[float]]:
    copies, model, optimizer, grid = copies_of(rank, folder, layout, node_size, "thd", 1, asynchronous=asynchronous)
    copies.save(1, METADATA | {"data": {"batches": BATCHES.to_json(1)}})
    steps_of(model, optimizer, grid, rows_of("thd"), 1)
    copies.wait()
    shutil.copytree(step_folder(copies.folder, 1), Path(folder) / f"old_{rank}")
    copies.save(2, METADATA | {"data": {"batches": BATCHES.to_json(2)}})
    saved = full(model, grid) | moments(model, optimizer, grid)
    losses = steps_of(model, optimizer, grid, rows_of("thd"), 2)
    copies.wait()
    assert [path.name for path in copies.folder.iterdir()] == ["step_0000002"], "the step before was not removed"
    return saved, losses


def read(
    rank: int, folder: str, layout: str, node_size: int, start: LoadPlan | None = None, batch: int = 4
) -> tuple | None:
    """From other weights and moments: load, and two more steps."""
    copies, model, optimizer, grid = copies_of(rank, folder, layout, node_size, "bshd", 1)
    state = copies.load(METADATA, BatchSchedule.constant(batch), start)
    if state is None:
        return None
    loaded = full(model, grid) | moments(model, optimizer, grid)
    return state, loaded, steps_of(model, optimizer, grid, rows_of("thd"), 2)


def expect_the_same(before: list[tuple], after: list[tuple], notes: dict[int, str] | None = None) -> None:
    for (saved, losses), (state, loaded, next_losses) in zip(before, after, strict=True):
        assert state.first_step == 2 and state.data == {"batches": BATCHES.to_json(2)}
        assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
        assert next_losses == losses
        if notes is not None:
            assert state.notes == [f"rank {rank}: copy from rank {source}'s node" for rank, source in notes.items()]


def folders(root: Path, node: int) -> Path:
    (run,) = (root / f"node_{node}").iterdir()
    return run


def copy_files(root: Path, node: int, rank: int, step: int = 2) -> list[Path]:
    return list(step_folder(folders(root, node), step).glob(f"rank_{rank}.*"))


def lose_node(node: int) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / f"node_{node}")


def flip(root: Path) -> None:
    (path,) = copy_files(root, 0, 1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def stop_while_writing(root: Path) -> None:
    """Rank 3 did not come to write its copy; a part of another one is left."""
    for node in (0, 1):
        for path in copy_files(root, node, 3):
            path.rename(path.with_name(".rank_3.part"))


@pytest.mark.parametrize(
    ("damage", "notes"),
    [
        (lambda root: None, {}),
        (lose_node(1), {2: 0, 3: 1}),
        (lose_node(0), {0: 2, 1: 3}),
        (flip, {1: 3}),
    ],
    ids=["nothing", "node 1 is lost", "node 0 is lost", "a flipped bit"],
)
def test_the_step_comes_back_while_a_copy_of_each_rank_is_left(
    world: World, tmp_path: Path, damage: Callable[[Path], None], notes: dict[int, int]
) -> None:
    layout = "tp 2 x dp_shard 2"
    before = world.run(written, str(tmp_path), layout, 2, damage is flip)
    damage(tmp_path)
    expect_the_same(before, world.run(read, str(tmp_path), layout, 2), notes)
    assert world.run(read, str(tmp_path), "dp_shard 4", 2) == [None] * 4, "another layout"


def test_nodes_that_come_back_in_another_order_exchange_their_copies(world: World, tmp_path: Path) -> None:
    before = world.run(written, str(tmp_path), "pp 2 x dp_shard 2", 1, True)
    for node in range(4):
        (tmp_path / f"node_{node}").rename(tmp_path / f"old node {node}")
    for node in range(4):
        (tmp_path / f"old node {node}").rename(tmp_path / f"node_{(node + 2) % 4}")
    # Node k had its own copy and that of node k - 1.
    sources = {0: {2: 0, 3: 0}, 1: {3: 1, 0: 1}, 2: {0: 2, 1: 2}, 3: {1: 3, 2: 3}}
    after = world.run(read, str(tmp_path), "pp 2 x dp_shard 2", 1)
    expect_the_same(before, after)
    for note in after[0][0].notes:
        rank, source = (int(word.strip(":'s")) for word in note.split() if word.strip(":'s").isdecimal())
        assert source in sources[rank]


def test_what_is_not_complete_newer_and_of_one_start_is_not_loaded(world: World, tmp_path: Path) -> None:
    layout = "tp 2 x dp_shard 2"
    world.run(written, str(tmp_path), layout, 2, False)

    def loaded(start: LoadPlan | None = None) -> set[int | None]:
        return {
            None if result is None else result[0].first_step
            for result in world.run(read, str(tmp_path), layout, 2, start)
        }

    plan = LoadPlan(Path("step_0000002"), {}, weights_only=False)
    assert loaded(plan) == {None}, "the checkpoint has the same step"
    assert loaded(LoadPlan(Path("step_0000009"), {}, weights_only=True)) == {2}, "another run's weights"
    for node in (0, 1):  # as if the removal of the earlier step had not come to its end
        shutil.copytree(tmp_path / f"old_{2 * node}", step_folder(folders(tmp_path, node), 1))
    assert loaded() == {2}
    stop_while_writing(tmp_path)
    assert loaded() == {1}
    for node in (0, 1):
        for path in copy_files(tmp_path, node, 3, step=1):
            words = path.name.split(".")
            path.rename(path.with_name(".".join([words[0], "0" * 12, *words[2:]])))
            assert COPY.fullmatch(path.with_name(".".join([words[0], "0" * 12, *words[2:]])).name)
    assert loaded() == {None}, "rank 3's copy is of another start"


def refused(rank: int, folder: str, layout: str, start: LoadPlan) -> str:
    copies, *_ = copies_of(rank, folder, layout, 2, "bshd", 1)
    try:
        copies.load({"model hidden_size": 40}, BATCHES, start)
    except UserError as error:
        return str(error)
    return ""


def test_another_model_is_refused_and_a_run_that_went_back_stays_back(world: World, tmp_path: Path) -> None:
    layout = "tp 2 x dp_shard 2"
    later = step_folder(tmp_path / "run" / "checkpoints", 1)
    later.mkdir(parents=True)
    before = world.run(written, str(tmp_path), layout, 2, False)
    plan = LoadPlan(later, {}, weights_only=False)
    refusals = world.run(refused, str(tmp_path), layout, plan)
    assert all("model hidden_size 40: the checkpoint" in line for line in refusals)
    expect_the_same(before, world.run(read, str(tmp_path), layout, 2, plan))
    assert world.run(read, str(tmp_path), layout, 2, plan, batch=8) == [None] * 4, "other batches since the checkpoint"
    later.rmdir()  # the user goes back behind step 1
    assert world.run(read, str(tmp_path), layout, 2) == [None] * 4
    shutil.rmtree(tmp_path / "run")  # another run takes the name
    later.mkdir(parents=True)
    assert world.run(read, str(tmp_path), layout, 2, plan) == [None] * 4
