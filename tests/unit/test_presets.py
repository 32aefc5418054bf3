"""Presets of published models: their sizes, and the plan that each states."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import pytest

from planner.estimate import GIB
from tools.docs import STATED, plan_preset, state_plan
from tools.plan import USABLE

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
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
    """`python tools/docs.py --presets` writes the stated figures."""
    preset = CONFIGS / f"{name}.yaml"
    found = STATED.search(preset.read_text())
    assert found is not None
    plan, seconds = plan_preset(preset, int(found[2]))
    assert plan.parameters == PARAMETERS[name]
    assert plan.memory.peak / GIB == pytest.approx(float(found[4]), abs=0.06)
    assert plan.memory.peak / GIB <= USABLE * int(found[3])
    assert seconds == pytest.approx(float(found[5]), rel=0.02)
    stated = dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, peak=round(12.34 * GIB)))
    with mock.patch("tools.docs.plan_preset", return_value=(stated, 5.678)):
        assert state_plan(preset).count(": 12.3 GiB a rank, 5.68 s a step on H100, estimated") == 1
