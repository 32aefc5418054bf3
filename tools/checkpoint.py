"""Inspect, verify and compare checkpoints: one process, no GPU, none of the run's flags.

    python tools/checkpoint.py inspect DIR     step, metadata, tensors, files
    python tools/checkpoint.py verify DIR      every file's checksum, and that no part of a tensor is missing
    python tools/checkpoint.py diff DIR DIR    metadata and tensors that differ

DIR is a checkpoint (step_*), or a folder of checkpoints or of a run: verify takes all of these, the others the newest.
Exit code 1: corrupted (verify), different (diff), or not readable.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoint.files import (
    Checksums,
    find_corrupted,
    find_run_checkpoint,
    find_run_checkpoints,
    find_unlisted,
    read_checksums,
    read_run_metadata,
)
from checkpoint.reader import SafeReader
from data.batch_schedule import BatchSchedule
from utils.errors import OneLineParser, UserError, run_tool


def read_tensor_index(reader: SafeReader) -> dict[str, TensorStorageMetadata]:
    """Return size, dtype and shards of every stored tensor, by name. Raises OSError or UnsafeCheckpoint."""
    return cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)  # without other entries


def describe_course(step: int, data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and text of what the run has read, of its batch and of its mixtures. Raises UserError: corrupted."""
    if not data:
        return  # imported weights
    try:
        yield "samples read", f"{data['sequences']:,}"
        if "batches" in data:
            yield "samples a step", BatchSchedule.parse(data["batches"]).describe()
        for first, rows in data.get("mixtures", ()):
            yield f"from sample {first:,} on", ", ".join(f"{share:.4%} {name}" for name, _, share in rows)
        for place in data["sources"]:
            yield f"epoch {place['epoch']}, sample {place['position']:,}", f"of {place['name']}"
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"step {step}: the checkpoint's position in the data is corrupted ({error})") from error


def inspect(checkpoint: Path) -> int:
    """Print step, metadata, tensors and files of a checkpoint."""
    metadata, tensors = read_run_metadata(checkpoint), read_tensor_index(SafeReader(checkpoint))
    print(f"{checkpoint}: step {(step := metadata.pop('step'))}")
    print(*(f"  {name:<32} {text}" for name, text in describe_course(step, metadata.pop("data", {}))), sep="\n")
    for name, value in metadata.items():
        print(f"  {name:<32} {value}")
    for part in sorted({name.split(".")[0] for name in tensors}):
        stored = {name: tensor for name, tensor in sorted(tensors.items()) if name.split(".")[0] == part}
        elements = sum(tensor.size.numel() for tensor in stored.values())
        size = sum(tensor.size.numel() * tensor.properties.dtype.itemsize for tensor in stored.values())
        print(f"{part}: {len(stored)} tensors, {elements:,} numbers, {size / 2**20:,.1f} MiB")
        for name, tensor in stored.items() if part == "model" else ():
            print(f"  {name:<56} {tensor.properties.dtype} {list(tensor.size)} in {len(tensor.chunks)} parts")
    sizes = [path.lstat().st_size for path in checkpoint.iterdir()]
    print(f"files: {len(sizes)}, {sum(sizes) / 2**20:,.1f} MiB")
    return 0


def verify(folder: Path) -> int:
    """Print a line for each corrupted file of each checkpoint. Return 1 if there is one."""
    is_corrupted = False
    for checkpoint in find_run_checkpoints(folder):
        sums: Checksums = {}
        try:
            sums = read_checksums(checkpoint)
            errors = find_corrupted(checkpoint, sorted(sums), sums) + find_unlisted(checkpoint, sums)
            if not errors:
                read_run_metadata(checkpoint)
                read_tensor_index(SafeReader(checkpoint))
        except UserError as error:
            errors = [str(error)]
        size = sum(size for size, _ in sums.values())
        verdict = f"{checkpoint}: {'CORRUPTED' if errors else 'whole'}, {len(sums)} files, {size:,} bytes"
        print(*errors, verdict, sep="\n")
        is_corrupted = is_corrupted or bool(errors)
    return int(is_corrupted)


def find_differences(first: Path, second: Path) -> Iterator[str]:
    """Yield a line for each name of the metadata, and each tensor, that differs."""
    run, other_run = read_run_metadata(first), read_run_metadata(second)
    for name in {**run, **other_run}:
        value, other = run.get(name, "missing"), other_run.get(name, "missing")
        if value != other:
            yield f"{name}: {value} | {other}"
    reader, other_reader = SafeReader(first), SafeReader(second)
    index, other_index = read_tensor_index(reader), read_tensor_index(other_reader)
    for name in sorted({*index, *other_index}):
        if name not in index or name not in other_index:
            yield f"{name}: only in {first if name in index else second}"
            continue
        a, b = reader.read_tensor(name), other_reader.read_tensor(name)
        try:
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
        except AssertionError as error:
            yield f"{name}: {' '.join(str(error).split())}"


def diff(first: Path, second: Path) -> int:
    """Print every difference. Return 1 if there is one."""
    lines = list(find_differences(first, second))
    print(*lines, f"{len(lines)} differences" if lines else "no difference: the same metadata and bits", sep="\n")
    return 1 if lines else 0


def main(argv: list[str]) -> int:
    parser = OneLineParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for run, folders in ((inspect, 1), (verify, 1), (diff, 2)):
        command = commands.add_parser(run.__name__)
        command.add_argument("folders", metavar="DIR", nargs=folders, type=Path)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    try:
        return args.run(*(args.folders if args.run is verify else map(find_run_checkpoint, args.folders)))
    except (UserError, OSError) as error:
        print(f"tools/checkpoint.py: {str(error).removeprefix('--load ')}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run_tool(main))
