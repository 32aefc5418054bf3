"""Folders that are built once, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_key(**made_from: Any) -> str:
    """A short hash of everything that a cached thing depends on."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()[:16]


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """`path`, made by `build(empty folder)` if it is not there yet.

    The folder is built beside its place and renamed into it, so it is never seen half made. Whoever comes
    second, in this job or another, uses the first one's.
    """
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        build(scratch)
        scratch.chmod(0o755)
        try:
            os.rename(scratch, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path
