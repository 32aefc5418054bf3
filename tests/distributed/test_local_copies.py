"""Copies on the nodes' own disks: the bits of the step that was saved, while each rank's copy is on some node."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import local
from checkpoint.files import SUMS_FILE, step_folder
from checkpoint.local import COPY, LocalCopies
from checkpoint.resume import LoadPlan
from config.schema import RunConfig
from data.batch_schedule import BatchSchedule
from tests.distributed.test_model_parity import built, config_of, full, grid_of, rows_of, steps_of
from tests.distributed.test_reshard import SHAPE, moments, optimizer_of
from tests.world import World
from utils.errors import UserError

METADATA = {"model hidden_size": 36, "--global-batch-size": 4}
BATCHES = BatchSchedule.constant(4)


@pytest.fixture(scope="module")
def world():
    with World(4) as world:
        yield world


def copies_of(
    rank: int,
    folder: str,
    layout: str,
    node_size: int,
    rows: str,
    steps: int,
    *,
    start: LoadPlan | None = None,
    batch: int = 4,
    skip: tuple[range, ...] = (),
    **options: Any,
) -> tuple:
    """Ranks of a node share a folder; nodes do not."""
    config = RunConfig()
    config.training.batches, config.data.skip_steps = BatchSchedule.constant(batch), skip
    config.training.new_batch = True
    grid = grid_of(layout)
    model = built(grid, config_of(**SHAPE), "fp64")
    optimizer = optimizer_of(model)
    steps_of(model, optimizer, grid, rows_of(rows), steps)
    node = Path(folder) / f"node_{rank // node_size}"
    save = Path(folder) / "run" / "checkpoints"
    options |= {"config": config, "start": start, "save": save, "node_size": node_size}
    return LocalCopies(node, model, optimizer, grid, **options), model, optimizer, grid


def written(
    rank: int, folder: str, layout: str, node_size: int, asynchronous: bool, **options: Any
) -> tuple[dict, list[float]]:
    options["asynchronous"] = asynchronous
    copies, model, optimizer, grid = copies_of(rank, folder, layout, node_size, "thd", 1, **options)
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
    rank: int,
    folder: str,
    layout: str,
    node_size: int,
    start: LoadPlan | None = None,
    *,
    wanted: dict[str, Any] | None = None,
    is_transfer_corrupted: bool = False,
    **options: Any,
) -> tuple | None:
    """From other weights and moments: load, and two more steps."""
    copies, model, optimizer, grid = copies_of(rank, folder, layout, node_size, "bshd", 1, start=start, **options)
    if is_transfer_corrupted:
        exchange, corrupted = copies._exchange, []

        def corrupt_first(sent: Any, to: int, source: int | None) -> Any:
            errors = exchange(sent, to, source)
            if source is not None and not corrupted:
                corrupted.extend(step_folder(copies.folder, 2).glob(f"rank_{rank}.*"))
                content = bytearray(corrupted[0].read_bytes())
                middle = slice(len(content) // 4, len(content) // 2)
                content[middle] = bytes(len(content[middle]))
                corrupted[0].write_bytes(content)
            return errors

        copies._exchange = corrupt_first
    state = copies.load(METADATA | (wanted or {}))
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


def make_unreadable(root: Path) -> None:
    (path,) = copy_files(root, 0, 1)
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("damage", "notes"),
    [
        (lambda root: None, {}),
        (lose_node(1), {2: 0, 3: 1}),
        (lose_node(0), {0: 2, 1: 3}),
        (flip, {1: 3}),
        (make_unreadable, {1: 3}),
    ],
    ids=["nothing", "node 1 is lost", "node 0 is lost", "a flipped bit", "an unreadable copy"],
)
def test_the_step_comes_back_while_a_copy_of_each_rank_is_left(
    world: World, tmp_path: Path, damage: Callable[[Path], None], notes: dict[int, int]
) -> None:
    layout = "tp 2 x dp_shard 2"
    before = world.run(written, str(tmp_path), layout, 2, damage is flip)
    damage(tmp_path)
    expect_the_same(before, world.run(read, str(tmp_path), layout, 2), notes)
    assert world.run(read, str(tmp_path), "dp_shard 4", 2) == [None] * 4, "another layout"


def test_a_copy_that_a_transfer_corrupts_is_sent_again(world: World, tmp_path: Path) -> None:
    before = world.run(written, str(tmp_path), "dp_shard 4", 2, False)
    lose_node(1)(tmp_path)
    after = world.run(read, str(tmp_path), "dp_shard 4", 2, is_transfer_corrupted=True)
    expect_the_same(before, after, {2: 0, 3: 1})


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

    for node in (0, 1):  # as if the removal of the earlier step had not come to its end
        shutil.copytree(tmp_path / f"old_{2 * node}", step_folder(folders(tmp_path, node), 1))
    assert loaded() == {2}
    for node in (0, 1):  # what the step before was written after is what this start has
        for path in (*copy_files(tmp_path, node, 0), *copy_files(tmp_path, node, 1)):
            words = path.name.split(".")
            path.rename(path.with_name(".".join([*words[:2], "1" * 32, *words[3:]])))
    assert loaded() == {1}
    stop_while_writing(tmp_path)
    assert loaded() == {1}
    for node in (0, 1):
        for path in copy_files(tmp_path, node, 3, step=1):
            words = path.name.split(".")
            path.rename(path.with_name(".".join([words[0], "0" * 12, *words[2:]])))
            assert COPY.fullmatch(path.with_name(".".join([words[0], "0" * 12, *words[2:]])).name)
    assert loaded() == {None}, "rank 3's copy is of another start"


def checkpoint_of(path: Path, content: str, step: int, weights_only: bool = False) -> LoadPlan:
    path.mkdir(parents=True, exist_ok=True)
    (path / SUMS_FILE).write_text(content)
    return LoadPlan(path, {"step": step}, weights_only)


def test_copies_follow_the_checkpoint_of_their_start_whatever_its_name(world: World, tmp_path: Path) -> None:
    layout = "tp 2 x dp_shard 2"
    plan = checkpoint_of(tmp_path / "other" / "final", "sums", 1)
    before = world.run(written, str(tmp_path), layout, 2, False, start=plan)
    expect_the_same(before, world.run(read, str(tmp_path), layout, 2, plan))
    weights = LoadPlan(plan.checkpoint, {"step": 9}, weights_only=True)
    expect_the_same(before, world.run(read, str(tmp_path), layout, 2, weights))
    assert world.run(read, str(tmp_path), layout, 2) == [None] * 4, "a fresh start"
    newer = LoadPlan(plan.checkpoint, {"step": 2}, weights_only=False)
    assert world.run(read, str(tmp_path), layout, 2, newer) == [None] * 4
    for node in (0, 1):
        assert not list(folders(tmp_path, node).iterdir()), "copies that are not newer were not removed"


def test_copies_whose_steps_were_skipped_otherwise_are_not_loaded(world: World, tmp_path: Path) -> None:
    layout = "tp 2 x dp_shard 2"
    plan = checkpoint_of(tmp_path / "run" / "checkpoints" / "step_0000001", "sums", 1)
    before = world.run(written, str(tmp_path), layout, 2, False, skip=(range(2, 4),))
    assert world.run(read, str(tmp_path), layout, 2, plan) == [None] * 4
    assert world.run(read, str(tmp_path), layout, 2, plan, skip=(range(3, 9),)) == [None] * 4
    same_from_there = (range(1, 2), range(2, 3), range(7, 9))
    expect_the_same(before, world.run(read, str(tmp_path), layout, 2, plan, skip=same_from_there))


def test_a_copied_run_has_other_copies(tmp_path: Path) -> None:
    found = local._read_id(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "run", tmp_path / "copied" / "run")
    assert local._read_id(tmp_path / "run" / "checkpoints") == found
    assert local._read_id(tmp_path / "copied" / "run" / "checkpoints") != found


def saved_on_bad_disks(rank: int, folder: str) -> list[list[str]]:
    """Steps whose copies are there: after a full disk at a rank's own copy; at the next node's; after a good save."""
    copies, *_ = copies_of(rank, folder, "dp_shard 4", 2, "thd", 1)
    metadata, save, steps = METADATA | {"data": {}}, torch.save, []

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    copies.save(1, metadata)
    torch.save = fail if rank == 1 else save
    try:
        copies.save(2, metadata)
    finally:
        torch.save = save
    steps.append(sorted(path.name for path in copies.folder.iterdir()))
    if rank == 2:
        (step_folder(copies.folder, 3) / ".rank_0.part").mkdir(parents=True)
    copies.save(3, metadata)
    torch.distributed.barrier()
    steps.append(sorted(path.name for path in copies.folder.iterdir()))
    torch.distributed.barrier()
    copies.save(4, metadata)
    torch.distributed.barrier()
    return [*steps, sorted(path.name for path in copies.folder.iterdir())]


def test_a_full_disk_costs_the_copies_of_a_step_and_not_the_run(world: World, tmp_path: Path) -> None:
    for steps in world.run(saved_on_bad_disks, str(tmp_path)):
        assert "step_0000001" in steps[0], "the earlier copies were removed"
        assert steps[1:] == [["step_0000001"], ["step_0000004"]]


def saved_beside_a_quick_rank(rank: int, folder: str) -> list[str]:
    copies, *_ = copies_of(rank, folder, "dp_shard 4", 2, "thd", 1)
    copies.save(1, METADATA | {"data": {}})
    following = step_folder(copies.folder, 3)
    gather, barrier = copies._gather, torch.distributed.barrier

    def gather_and_be_late(item: Any) -> list[Any]:
        gathered = gather(item)
        if item is None and rank % 2 == 0:  # the last one of a save
            deadline = time.monotonic() + 10.0
            while not following.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        return gathered

    copies._gather = gather_and_be_late
    copies.save(2, METADATA | {"data": {}})
    if rank % 2:
        following.mkdir()
    barrier()
    return sorted(path.name for path in copies.folder.iterdir())


def test_a_rank_that_already_writes_the_next_step_keeps_its_folder(world: World, tmp_path: Path) -> None:
    assert world.run(saved_beside_a_quick_rank, str(tmp_path)) == [["step_0000002", "step_0000003"]] * 4


def refused(rank: int, folder: str, layout: str, start: LoadPlan) -> str:
    copies, *_ = copies_of(rank, folder, layout, 2, "bshd", 1, start=start)
    try:
        copies.load({"model hidden_size": 40})
    except UserError as error:
        return str(error)
    return ""


def test_another_model_is_refused_and_a_run_that_went_back_stays_back(world: World, tmp_path: Path) -> None:
    layout = "tp 2 x dp_shard 2"
    later = step_folder(tmp_path / "run" / "checkpoints", 1)
    plan = checkpoint_of(later, "sums", 1)
    before = world.run(written, str(tmp_path), layout, 2, False)
    refusals = world.run(refused, str(tmp_path), layout, plan)
    assert all("model hidden_size 40: the checkpoint" in line for line in refusals)
    expect_the_same(before, world.run(read, str(tmp_path), layout, 2, plan))
    assert world.run(read, str(tmp_path), layout, 2, plan, batch=8) == [None] * 4, "other batches since the checkpoint"
    (changed,) = {
        tuple(state.changed)
        for state, *_ in world.run(read, str(tmp_path), layout, 2, plan, wanted={"--global-batch-size": 8})
        if state.changed
    }
    assert "--global-batch-size 8 (the checkpoint: 4)" in changed, "--new-batch allows another batch after the step"
    checkpoint_of(later, "other sums", 1)  # the user goes back, and the run comes to step 1 again
    assert world.run(read, str(tmp_path), layout, 2, plan) == [None] * 4, "an abandoned branch of the run"
    checkpoint_of(later, "sums", 1)
    expect_the_same(before, world.run(read, str(tmp_path), layout, 2, plan))
    shutil.rmtree(later)  # the user goes back behind step 1
    assert world.run(read, str(tmp_path), layout, 2) == [None] * 4
    shutil.rmtree(tmp_path / "run")  # another run takes the name
    checkpoint_of(later, "sums", 1)
    assert world.run(read, str(tmp_path), layout, 2, plan) == [None] * 4
