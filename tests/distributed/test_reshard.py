"""A checkpoint written under one layout, loaded under every other: the same bits, and the same run from there on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint.files import read_run_metadata
from checkpoint.resume import OPTIMIZER, check_same_run
from checkpoint.saver import Saver, load_checkpoint
from checkpoint.state import whole_tensors
from config.schema import TrainingConfig
from model.gpt import GPT, Stages
from parallel.fsdp import sharded_parameters
from parallel.grid import Grid
from tests.distributed.test_model_parity import ROWS, built, config_of, full, grid_of, rows_of, steps_of
from tests.world import RankError, World
from training.optimizer import build_optimizer, skip_update_if

LAYOUTS = ["cp 4", "dp_shard 4", "dp_replicate 2 x dp_shard 2", "tp 2 x cp 2", "tp 4", "pp 2 x dp_shard 2"]
# Under tp 4 two ranks share a group; heads of 8 make QKV and output matrices that are not square.
SHAPE = dict(num_query_groups=2, hidden_size=36, qk_norm=True, tie_embeddings=True)


@pytest.fixture(scope="module")
def world():
    with World(4) as world:
        yield world


def optimizer_of(model: GPT | Stages, optimizer: str = "adamw") -> torch.optim.Optimizer:
    return build_optimizer(model, TrainingConfig(lr=1e-2, optimizer=optimizer))


def moments(model: GPT | Stages, optimizer: torch.optim.Optimizer, grid: Grid) -> dict[str, torch.Tensor]:
    states = {name: optimizer.state[p] for name, p in sharded_parameters(model).items()}
    found = {"step": torch.stack([state["step"] for state in states.values() if "step" in state]).unique()}
    for key in ("exp_avg", "exp_avg_sq", "momentum"):
        parts = {name: state[key] for name, state in states.items() if key in state}
        found |= {f"{name} {key}": x for name, x in whole_tensors(parts, grid).items()}
    return found


def written(rank: int, layout: str, folder: str, chosen: str = "adamw") -> tuple[dict, list[float]]:
    """Two steps, a checkpoint, and the losses of two more."""
    grid = grid_of(layout)
    model = built(grid, config_of(**SHAPE), "fp64")
    optimizer = optimizer_of(model, chosen)
    rows = rows_of("thd")
    steps_of(model, optimizer, grid, rows, 2)
    Saver(Path(folder), model, optimizer, grid).save(2, {"layout": layout})
    saved = full(model, grid) | moments(model, optimizer, grid)
    return saved, steps_of(model, optimizer, grid, rows, 2)


def read(rank: int, layout: str, folder: str, chosen: str = "adamw") -> tuple[dict, list[float]]:
    """From other weights and other moments: load, and two more steps."""
    grid = grid_of(layout)
    model = built(grid, config_of(**SHAPE), "fp64")
    optimizer = optimizer_of(model, chosen)
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


def test_a_checkpoint_of_muon_loads_under_every_layout(world: World, tmp_path: Path) -> None:
    wanted, losses = world.run(written, "tp 2 x cp 2", str(tmp_path), "muon")[0]
    assert "layers.0.mlp.fc2_weight momentum" in wanted and "embedding.weight exp_avg_sq" in wanted
    for target in LAYOUTS:
        for loaded, others in world.run(read, target, str(tmp_path), "muon"):
            assert loaded.keys() == wanted.keys()
            assert all(torch.equal(loaded[n], wanted[n]) for n in wanted), target
            assert others == pytest.approx(losses, rel=1e-9), target
    with pytest.raises(RankError, match="momentum"):
        world.run(written, "cp 4", str(tmp_path / "adamw"))
        world.run(read, "cp 4", str(tmp_path / "adamw"), "muon")


def muon_step(rank: int, layout: str) -> tuple[dict, dict, dict]:
    """Weights before, gradients, weights after a step, all whole; then a skipped step, which changes nothing."""
    grid = grid_of(layout)
    model = built(grid, config_of(num_query_groups=4, hidden_size=34), "fp64")  # 34 rows over four ranks: 9, 9, 9, 7
    optimizer = optimizer_of(model, "muon")
    before = full(model, grid)
    steps_of(model, optimizer, grid, rows_of("thd"), 1, keeps_gradients=True)
    found = before, full(model, grid, "grad"), full(model, grid)
    state = moments(model, optimizer, grid)
    for parameter in model.parameters():
        parameter.grad.fill_(float("nan"))
    skip_update_if(optimizer, torch.tensor(True))
    optimizer.step()
    after = full(model, grid) | moments(model, optimizer, grid)
    assert all(torch.equal(after[name], x) for name, x in (found[2] | state).items())
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_muon_orthogonalizes_whole_matrices(world: World, layout: str) -> None:
    """Against the singular values: each Newton-Schulz iteration maps s to a s + b s^3 + c s^5."""
    for before, grads, after in world.run(muon_step, layout):
        matrices = [name for name in before if name.startswith("layers.") and before[name].dim() == 2]
        assert len(matrices) == 10
        for name in matrices:
            u, s, v = torch.linalg.svd(grads[name], full_matrices=False)
            s = s / s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            update = 0.2 * max(before[name].shape) ** 0.5 * (u * s) @ v
            wanted = before[name] * (1 - 1e-2 * 0.1) - 1e-2 * update
            assert torch.allclose(after[name], wanted, rtol=0, atol=1e-9), name
        own = after["embedding.weight"] - before["embedding.weight"] * (1 - 1e-2 * 0.1)
        assert own.abs().max().item() == pytest.approx(1e-2, rel=1e-3)  # AdamW's first step


def test_facts_say_what_may_change() -> None:
    facts = {"lr": 1.0, "seed": 3, "step": 2}
    assert check_same_run(facts, {"lr": 1.0, "seed": 3}, ("lr",), Path("c")) == []
    assert check_same_run(facts, {"lr": 2.0, "seed": 3}, ("lr",), Path("c")) == ["lr 2.0 (the checkpoint: 1.0)"]
    assert check_same_run(facts, {OPTIMIZER: "adamw"}, (), Path("c")) == []  # a checkpoint from before the flag
    for wanted, words in (
        ({OPTIMIZER: "muon"}, "--optimizer muon: the checkpoint c was made with adamw"),
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
