"""A quick part of the numerics under the kernels of other processors: limits that hold only on one CPU fail here."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.launch import ROOT, environment

QUICK = ["tests/unit/test_loss.py", "tests/unit/test_rope.py", "tests/unit/test_bf16_sums.py"]


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_numerics_hold_under_other_kernels(capability: str) -> None:
    kernels = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-m", "pytest", "-q", *QUICK, "-k", "not micro_batch and not verify"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment() | kernels, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
