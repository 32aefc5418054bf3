"""Converted configurations in the peers' own validators, and every example of their repositories: make test-migrate.

Run by a Python that can import axolotl and nemo_automodel. AXOLOTL_EXAMPLES and NEMO_EXAMPLES: folders `examples/`.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tools.migrate import convert
from utils.errors import UserError

pytestmark = pytest.mark.machine

PRESETS = {
    "plain": "",
    "cp": "cp-size: 2\nglobal-batch-size: 8\n",
    "stages": "pp-size: 2\nglobal-batch-size: 16\nmicro-batch-size: 2\n",
    "tensor": "tp-size: 2\ncp-size: 2\nrecompute: full\nglobal-batch-size: 4\nlr-decay-style: wsd\n",
    "stream": "qkv-format: bshd\npacking: concat\ndtype: fp32\nqk-norm: true\nrope-scaling: llama3\n",
}


def preset(tmp_path: Path, name: str) -> str:
    file = tmp_path / "preset.yaml"
    file.write_text(f"data-path: [corpus.jsonl]\ntokenizer-model: folder/tokenizer.json\n{PRESETS[name]}")
    return str(file)


def check_axolotl(loaded: dict[str, Any]) -> None:
    schema = pytest.importorskip("axolotl.utils.schemas.config")
    sys.modules.setdefault("ring_flash_attn", ModuleType("ring_flash_attn"))  # imports flash_attn, which needs CUDA
    schema.AxolotlInputConfig(**loaded)


def check_nemo(file: Path) -> None:
    loader = pytest.importorskip("nemo_automodel.components.config.loader")
    from nemo_automodel.recipes._dist_utils import parse_distributed_section
    from nemo_automodel.recipes._typed_config import RecipeConfig

    raw = loader.load_yaml_config(file)
    recipe = RecipeConfig(raw)
    assert recipe.step_scheduler and recipe.optimizer and recipe.checkpoint
    assert recipe.lr_scheduler is None or recipe.lr_scheduler.lr_decay_style
    parse_distributed_section(raw.distributed.to_dict())
    if "dataset" in raw:
        assert recipe.dataloader
    if raw.get("model.config") is not None:
        assert raw.model.config.instantiate().num_hidden_layers


@pytest.mark.parametrize("name", PRESETS)
def test_axolotl_accepts_a_converted_preset(tmp_path: Path, name: str) -> None:
    text, _ = convert("pentagrid", "axolotl", preset(tmp_path, name), world_size=8, model="folder")
    check_axolotl(yaml.safe_load(text))


@pytest.mark.parametrize("name", PRESETS)
def test_nemo_accepts_a_converted_preset(tmp_path: Path, name: str) -> None:
    text, _ = convert("pentagrid", "nemo", preset(tmp_path, name), world_size=8)
    (tmp_path / "recipe.yaml").write_text(text)
    check_nemo(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("target", ["pentagrid", "other"])
@pytest.mark.parametrize(("suite", "variable"), [("axolotl", "AXOLOTL_EXAMPLES"), ("nemo", "NEMO_EXAMPLES")])
def test_every_example_converts_or_says_why(
    suite: str, variable: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no folder")
    to = target if target == "pentagrid" else {"axolotl": "nemo", "nemo": "axolotl"}[suite]
    counts: Counter[str] = Counter()
    files = [file for file in sorted(Path(folder).rglob("*")) if file.suffix in (".yaml", ".yml")]
    assert files
    for file in files:
        try:
            text, report = convert(suite, to, str(file), world_size=8)
        except UserError as error:
            assert "\n" not in str(error)
            counts["refused in one line"] += 1
            continue
        assert yaml.safe_load(text)
        counts["converted"] += 1
        counts["of them with an unknown key"] += any("unknown key" in line for line in report.lost)
    with capsys.disabled():
        print(f"\n{suite} -> {to}: {len(files)} examples, {dict(counts)}")
