"""Checkpoints and prepared corpora that an older version wrote stay usable: resumed, the run gives the older version's
losses.

`tests/assets/checkpoint_part6` holds a corpus, the checkpoint of step 3 and the losses of steps 4 and 5, all made by
commit cf95e0c.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests.launch import ROOT, run_train, train

ASSET = ROOT / "tests" / "assets" / "checkpoint_part6"
EXPECTED = json.loads((ASSET / "expected.json").read_text())
LAYOUTS = {
    "cp 2, as saved": (2, "--cp-size 2", 1e-12),  # not 0: another CPU's vector units may round differently
    "one rank": (0, "", 1e-9),
    "dp_shard 2": (2, "--dp-shard-size 2", 1e-9),
    "pp 2": (2, "--pp-size 2", 1e-9),
}
EVERY_PUSH = list(LAYOUTS)[:2]


@pytest.fixture()
def run_dir(tmp_path: Path) -> Path:
    """A run's folder with a copy of the old checkpoint."""
    shutil.copytree(ASSET / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def flags_of(run_dir: Path) -> list[str]:
    return [*shlex.split(EXPECTED["flags"]), "--data-cache-path", str(run_dir.parent / "cache"), "--train-iters", "5"]


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=[] if x in EVERY_PUSH else [pytest.mark.full]) for x in LAYOUTS]
)
def test_an_old_checkpoint_resumes_with_the_old_losses(run_dir: Path, layout: str) -> None:
    ranks, grid, limit = LAYOUTS[layout]
    flags = [*flags_of(run_dir), *shlex.split(grid), "--resume", "--check-data"]
    got = train(ranks, run_dir, *flags)
    assert [record["step"] for record in got] == [4, 5]
    for record, want in zip(got, EXPECTED["steps"], strict=True):
        for name, value in want.items():
            tolerance = limit if name in ("loss", "grad_norm") else 0.0
            assert record[name] == pytest.approx(value, rel=tolerance, abs=0.0), (name, record[name], value)


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata"])
def test_a_flipped_byte_in_an_old_checkpoint_is_refused(run_dir: Path, name: str) -> None:
    path = run_dir / "checkpoints" / "step_0000003" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = run_train(0, *flags_of(run_dir), "--run-dir", str(run_dir), "--resume")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert f"step_0000003/{name}" in result.stderr, result.stderr


def test_a_flipped_byte_in_an_old_corpus_is_refused(run_dir: Path) -> None:
    prefix = run_dir / "corpus"
    for suffix in ("bin", "idx", "json"):
        shutil.copy(ASSET / f"corpus.{suffix}", f"{prefix}.{suffix}")
    tokens = bytearray(Path(f"{prefix}.bin").read_bytes())
    tokens[100] ^= 1
    Path(f"{prefix}.bin").write_bytes(tokens)
    flags = flags_of(run_dir)
    flags[flags.index("--data-path") + 1] = str(prefix)
    result = run_train(0, *flags, "--run-dir", str(run_dir), "--resume", "--check-data")
    assert result.returncode == 2 and "corpus.bin" in result.stderr and "checksum" in result.stderr, result.stderr
