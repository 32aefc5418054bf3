"""Presets of published models: their sizes, and the plan that each states."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from planner.estimate import GIB, make_plan, pack_rows, resolve_without_devices
from tools.plan import USABLE, estimate_seconds

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
STATED = re.compile(
    r"tools/plan\.py --world-size (\d+) --gpu-memory (\d+): ([\d.]+) GiB a rank, ([\d.]+) s a step on H100"
)
# As huggingface.co counts them.
PARAMETERS = {
    "smollm2_135m": 134_515_008,
    "qwen3_0.6b": 596_049_920,
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "llama3_8b_128k": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
}


SLOW = {"llama3_70b": [pytest.mark.full]}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, [])) for name in PARAMETERS])
def test_a_preset_fits_the_machine_that_it_names(name: str) -> None:
    preset = CONFIGS / f"{name}.yaml"
    found = STATED.search(preset.read_text())
    assert found is not None
    world, memory = int(found[1]), int(found[2])
    config = resolve_without_devices(["--config", str(preset)], world, 8)
    architecture = config.model.architecture(config.data.tokenizer_vocab_size)
    rows = pack_rows(config, architecture, None)
    plan = make_plan(config, architecture, rows)
    assert plan.parameters == PARAMETERS[name]
    assert plan.memory.peak / GIB == pytest.approx(float(found[3]), abs=0.06)
    assert plan.memory.peak / GIB <= USABLE * memory
    seconds = estimate_seconds(config, architecture, rows, (float(config.data.seq_length),), 8)
    assert seconds == pytest.approx(float(found[4]), rel=0.02)
