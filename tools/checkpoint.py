"""Look into checkpoints: what they hold, whether they are whole, where two differ. One process, no GPU, no flags of the run.

    python tools/checkpoint.py inspect DIR
    python tools/checkpoint.py verify DIR
    python tools/checkpoint.py diff DIR DIR

DIR is a step_* folder, or a folder of some, whose newest is meant. Exit code 1: damaged (verify), different (diff).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoint.files import damage, find_checkpoint, read_checksums, read_run_facts, unlisted
from checkpoint.reader import SafeReader
from utils.errors import UserError


def tensors_of(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Name -> size and dtype of everything that is stored, without reading it."""
    stored = SafeReader(checkpoint).read_metadata().state_dict_metadata
    other = [name for name, what in stored.items() if not isinstance(what, TensorStorageMetadata)]
    if other:
        raise UserError(f"{checkpoint}: {other[0]} is not a tensor; no checkpoint of train.py")
    return {name: what for name, what in stored.items() if isinstance(what, TensorStorageMetadata)}


def read_tensor(checkpoint: Path, name: str, like: TensorStorageMetadata) -> Tensor:
    """One whole tensor, put together from its shards."""
    state = {name: torch.empty(like.size, dtype=like.properties.dtype)}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled", category=UserWarning
        )  # which is what no_dist asks for
        dcp.load(state, storage_reader=SafeReader(checkpoint), no_dist=True)
    return state[name]


def inspect(checkpoint: Path) -> int:
    facts, tensors = read_run_facts(checkpoint), tensors_of(checkpoint)
    print(f"{checkpoint}: step {facts['step']}")
    for name, value in facts.items():
        if name != "step":
            print(f"  {name:<32} {value}")
    for part in sorted({name.split(".")[0] for name in tensors}):
        mine = {name: what for name, what in tensors.items() if name.split(".")[0] == part}
        elements = sum(what.size.numel() for what in mine.values())
        size = sum(what.size.numel() * what.properties.dtype.itemsize for what in mine.values())
        print(f"{part}: {len(mine)} tensors, {elements:,} numbers, {size / 2**20:,.1f} MiB")
        for name, what in sorted(mine.items()):
            if part == "model":
                print(
                    f"  {name:<56} {str(what.properties.dtype).removeprefix('torch.'):<9} {list(what.size)} in {len(what.chunks)} parts"
                )
    files = {p.name: p.stat().st_size for p in sorted(checkpoint.iterdir())}
    print(f"files: {len(files)}, {sum(files.values()) / 2**20:,.1f} MiB")
    for name, size in files.items():
        print(f"  {name:<56} {size:,} bytes")
    return 0


def verify(checkpoint: Path) -> int:
    sums = read_checksums(checkpoint)
    found = damage(checkpoint, sorted(sums), sums) + unlisted(checkpoint, sums)
    for line in found:
        print(line)
    print(
        f"{checkpoint}: {'DAMAGED' if found else 'whole'}, {len(sums)} files, {sum(size for size, _ in sums.values()):,} bytes"
    )
    return 1 if found else 0


@dataclass(frozen=True)
class Difference:
    """Of one tensor: elements that differ, the largest absolute difference, and the Frobenius norm's over that of the first."""

    count: int
    largest: float
    relative: float


def difference(a: Tensor, b: Tensor) -> Difference | None:
    """None: the same bits."""
    same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
    if bool(same.all()):
        return None
    a, b = a.double(), b.double()
    size = a.norm().item()
    return Difference(int((~same).sum()), (a - b).abs().max().item(), (a - b).norm().item() / (size or 1.0))


def differences(first: Path, second: Path) -> Iterator[str]:
    """A line for each fact or tensor that differs."""
    facts: list[dict[str, Any]] = [read_run_facts(p) for p in (first, second)]
    for name in dict.fromkeys([*facts[0], *facts[1]]):
        values = [f.get(name, "missing") for f in facts]
        if values[0] != values[1]:
            yield f"{name}: {values[0]} | {values[1]}"
    ours, theirs = tensors_of(first), tensors_of(second)
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs:
            yield f"{name}: only in {first if name in ours else second}"
            continue
        shapes = [(list(t[name].size), t[name].properties.dtype) for t in (ours, theirs)]
        if shapes[0] != shapes[1]:
            yield f"{name}: {shapes[0]} | {shapes[1]}"
            continue
        found = difference(read_tensor(first, name, ours[name]), read_tensor(second, name, theirs[name]))
        if found is not None:
            total = ours[name].size.numel()
            yield f"{name}: {found.count:,} of {total:,} differ, at most by {found.largest:.3e}, relative {found.relative:.3e}"


def diff(first: Path, second: Path) -> int:
    count = 0
    for count, line in enumerate(differences(first, second), 1):  # noqa: B007 (counted for the summary)
        print(line)
    print(f"{count} differences" if count else "no difference: the same facts and the same bits")
    return 1 if count else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, folders in (("inspect", 1), ("verify", 1), ("diff", 2)):
        commands.add_parser(name).add_argument("folders", metavar="DIR", nargs=folders, type=Path)
    args = parser.parse_args(argv)
    try:
        found = [find_checkpoint(folder) for folder in args.folders]
        if args.command == "diff":
            return diff(*found)
        return inspect(*found) if args.command == "inspect" else verify(*found)
    except ValueError as error:
        print(f"tools/checkpoint.py: {str(error).removeprefix('--load ')}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
