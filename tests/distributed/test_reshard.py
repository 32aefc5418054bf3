"""A checkpoint written under one layout, loaded under every other: the same bits, and the same run from there on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint.files import read_run_metadata
from checkpoint.resume import check_same_run
from checkpoint.saver import Saver, load_checkpoint, whole_tensors
from config.schema import TrainingConfig
from model.gpt import GPT, Stages
from parallel.fsdp import sharded_parameters
from parallel.grid import Grid
from tests.distributed.test_model_parity import ROWS, built, config_of, full, grid_of, rows_of, steps_of
from tests.world import World
from training.optimizer import build_optimizer

LAYOUTS = ["cp 4", "dp_shard 4", "dp_replicate 2 x dp_shard 2", "tp 2 x cp 2", "tp 4", "pp 2 x dp_shard 2"]
# Four groups, so that tp 4 can take part; heads of 8 make QKV and output matrices that are not square.
SHAPE = dict(num_query_groups=4, hidden_size=36, qk_norm=True, tie_embeddings=True)


@pytest.fixture(scope="module")
def world():
    with World(4) as world:
        yield world


def optimizer_of(model: GPT | Stages) -> torch.optim.AdamW:
    return build_optimizer(model, TrainingConfig(lr=1e-2))


def moments(model: GPT | Stages, optimizer: torch.optim.AdamW, grid: Grid) -> dict[str, torch.Tensor]:
    states = {name: optimizer.state[p] for name, p in sharded_parameters(model).items()}
    found = {"step": torch.stack([state["step"] for state in states.values()]).unique()}
    for key in ("exp_avg", "exp_avg_sq"):
        found |= {f"{name} {key}": x for name, x in whole_tensors({n: s[key] for n, s in states.items()}, grid).items()}
    return found


def written(rank: int, layout: str, folder: str) -> tuple[dict, list[float]]:
    """Two steps, a checkpoint, and the losses of two more."""
    grid = grid_of(layout)
    model = built(grid, config_of(**SHAPE), "fp64")
    optimizer = optimizer_of(model)
    rows = rows_of("thd")
    steps_of(model, optimizer, grid, rows, 2)
    Saver(Path(folder), model, optimizer, grid).save(2, {"layout": layout})
    saved = full(model, grid) | moments(model, optimizer, grid)
    return saved, steps_of(model, optimizer, grid, rows, 2)


def read(rank: int, layout: str, folder: str) -> tuple[dict, list[float]]:
    """From other weights and other moments: load, and two more steps."""
    grid = grid_of(layout)
    model = built(grid, config_of(**SHAPE), "fp64")
    optimizer = optimizer_of(model)
    steps_of(model, optimizer, grid, rows_of("bshd"), 1)
    step = load_checkpoint(Path(folder) / "step_0000002", model, optimizer, grid)
    assert step == 2
    loaded = full(model, grid) | moments(model, optimizer, grid)
    return loaded, steps_of(model, optimizer, grid, rows_of("thd"), 2)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(
            x,
            marks=[pytest.mark.full]
            if x in ("cp 4", "dp_shard 4", "tp 4", "dp_replicate 2 x dp_shard 2", "pp 2 x dp_shard 2")
            else [],
        )
        for x in LAYOUTS
    ],
)
def test_a_checkpoint_loads_under_every_layout(world: World, tmp_path: Path, source: str) -> None:
    assert ROWS % 4 == 0
    wanted, losses = world.run(written, source, str(tmp_path))[0]
    assert wanted["embedding.weight"].shape == (64, 36) and wanted["step"].tolist() == [2]
    for target in LAYOUTS:
        for loaded, others in world.run(read, target, str(tmp_path)):
            assert loaded.keys() == wanted.keys()
            assert all(torch.equal(loaded[n], wanted[n]) for n in wanted), target
            assert others == pytest.approx(losses, rel=1e-9), target


def test_facts_say_what_may_change() -> None:
    facts = {"lr": 1.0, "seed": 3, "step": 2}
    assert check_same_run(facts, {"lr": 1.0, "seed": 3}, ("lr",), Path("c")) == []
    assert check_same_run(facts, {"lr": 2.0, "seed": 3}, ("lr",), Path("c")) == ["lr 2.0 (the checkpoint: 1.0)"]
    for wanted, words in (
        ({"seed": 4}, "seed 4: the checkpoint c was made with 3"),
        ({"new": 1}, "does not say with what"),
    ):
        with pytest.raises(ValueError, match=words):
            check_same_run(facts, wanted, ("lr",), Path("c"))


def test_a_step_saved_again_replaces_the_old_one(world: World, tmp_path: Path) -> None:
    world.run(written, "cp 4", str(tmp_path))
    world.run(written, "tp 2 x cp 2", str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000002"]
    assert read_run_metadata(tmp_path / "step_0000002")["layout"] == "tp 2 x cp 2"
