"""References of docs/comparison to source lines: the checker fails where it should, and what is at hand is right."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.references import HEADER, PAGES, ROOT, check

GIT = ("git", "-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false")


@pytest.fixture
def clone(tmp_path: Path) -> str:
    """A clone of owner/peer under `tmp_path`, with src/ring.py; its commit."""
    (tmp_path / "peer" / "src").mkdir(parents=True)
    (tmp_path / "peer" / "src" / "ring.py").write_text("import torch\n\n\ndef ring(k, v): ...\n")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "x")):
        subprocess.run([*GIT, *command], cwd=tmp_path / "peer", check=True)
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path / "peer", text=True).strip()


def page(commit: str, prose: str) -> dict[str, str]:
    rows = [
        f"| Q | owner/peer | `{commit}` | src |",
        '| QR | " | " | src/ring.py |',
        "| K | pytest | ==0.1 | pytest |",
        "| O | this repository | | cp |",
    ]
    return {PAGES[0]: "\n".join([HEADER, "|---|---|---|---|", *rows, "", prose])}


def test_right_references_are_counted(clone: str, tmp_path: Path) -> None:
    prose = "`Q/ring.py:4 def ring` `QR:1 import torch` `O/support.py SUPPORT` `other/x.py:1 y`"
    faults, checked, _ = check(page(clone, prose), tmp_path)
    assert (faults, dict(checked)) == ([], {"owner/peer": 2, "this repository": 1})


@pytest.mark.parametrize(
    ("reference", "fault"),
    [
        ("Q/ring.py:3 def ring", "stands on line 4"),
        ("Q/ring.py:99 def ring", "stands on line 4"),
        ("Q/ring.py:4 def rung", "no such words"),
        ("Q/rung.py:4 def ring", "no such file"),
        ("QR:2 import", "stands on line 1"),
        ("QR:4 k, v", "is not KEY/PATH:LINE ANCHOR"),
        ("QR:1", "is not KEY/PATH:LINE ANCHOR"),
        ("Q/ring.py:4", "is not KEY/PATH:LINE ANCHOR"),
        ("Q/ring.py def ring", "is not KEY/PATH:LINE ANCHOR"),
        ("O/support.py:1 SUPPORT", "is not KEY/PATH:LINE ANCHOR"),
        ("O/support.py SUPPORTED_BY_NOBODY", "no such words"),
    ],
)
def test_wrong_references_are_faults(clone: str, tmp_path: Path, reference: str, fault: str) -> None:
    faults, _, skipped = check(page(clone, f"As `{reference}` shows."), tmp_path)
    assert len(faults) == 1 and fault in faults[0] and not skipped


def test_what_is_not_at_hand_is_skipped_with_its_reason(clone: str, tmp_path: Path) -> None:
    prose = "`Q/ring.py:9 nothing` `K/__init__.py:1 nothing`"
    for commit, mirror in ((clone, None), (clone, tmp_path / "empty"), ("0" * 40, tmp_path)):
        faults, checked, skipped = check(page(commit, prose), mirror)
        assert not faults and not checked and sum(skipped.values()) == 2
        assert any("owner/peer" in reason for reason in skipped) and any("not ==0.1" in reason for reason in skipped)


def test_references_to_this_repository_and_installed_packages() -> None:
    pages = {name: (ROOT / name).read_text() for name in PAGES if (ROOT / name).exists()}
    faults, checked, _ = check(pages, None)
    assert faults == [] and checked["this repository"] > 20
