"""`--compile` loads code from a folder that no other user can write."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from runtime.distributed import own_temporary_folder

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILE = """
import torch
import train  # PyTorch's modules set the variable of the folder
from runtime.distributed import own_temporary_folder
own_temporary_folder()
own_temporary_folder()  # a second model of this process
print(torch.compile(lambda x: (2 * x + 1).sin())(torch.ones(8))[0].item())
"""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_compiled_code_lies_in_the_users_own_folder(shared: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("0.14"), done.stderr
    own = shared / f"pentagrid-{os.getuid()}"
    assert own.stat().st_mode & 0o777 == 0o700 and list(own.rglob("*.so"))
    # At its import PyTorch makes its folder, and loads nothing from there.
    assert not [p for p in shared.rglob("*") if p.is_file() and own not in p.parents]


@pytest.mark.parametrize("planted", ["folder", "link", "file"])
def test_a_folder_that_others_can_write_is_refused(shared: Path, planted: str) -> None:
    own = shared / f"pentagrid-{os.getuid()}"
    if planted == "folder":
        own.mkdir()
        own.chmod(0o777)
    elif planted == "link":
        (shared / "theirs").mkdir(mode=0o700)
        own.symlink_to(shared / "theirs")
    else:
        own.touch()
    with pytest.raises(ValueError, match=r"--compile, --fused-kernels\): .* is no folder of this user alone"):
        own_temporary_folder()
    assert tempfile.gettempdir() == str(shared)


def test_an_idle_pool_of_threads_does_not_keep_a_run_from_its_end() -> None:
    """`torch.compile` leaves one behind."""
    code = """
from concurrent.futures import ThreadPoolExecutor
from utils.errors import run_and_exit
pool = ThreadPoolExecutor(1)
run_and_exit(lambda argv: print(pool.submit(lambda: "ran").result()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
