"""What context-parallel attention can do, as data. No torch import: argparse, docs and tests read it.

A row of `SUPPORT` is one way to run attention over the `cp` axis. Choices of the flags, the refusals
and the table in the docs are all made from these rows; nothing else lists a backend's name.
"""

from __future__ import annotations

from dataclasses import dataclass

QKV_FORMATS = ("thd", "bshd")
LAYOUTS = ("zigzag",)
DTYPES = ("bf16", "fp32", "fp64")


@dataclass(frozen=True, kw_only=True)
class Support:
    """One way to run attention over context-parallel ranks.

    `dtypes` maps a device to the compute types its kernels take; a device that is absent is refused.
    `head_dim_multiple` and `head_dim_max` hold on CUDA, whose kernels ask for them.
    """

    backend: str
    comm_type: str
    formats: tuple[str, ...]
    layout: str
    dtypes: dict[str, tuple[str, ...]]
    gqa: bool
    head_dim_multiple: int
    head_dim_max: int


SUPPORT: tuple[Support, ...] = (
    Support(
        backend="native",
        comm_type="p2p",
        formats=("thd", "bshd"),
        layout="zigzag",
        dtypes={"cpu": ("bf16", "fp32", "fp64"), "cuda": ("bf16",)},
        gqa=True,
        head_dim_multiple=8,
        head_dim_max=256,
    ),
)

BACKENDS: tuple[str, ...] = tuple(dict.fromkeys(row.backend for row in SUPPORT))
COMM_TYPES: tuple[str, ...] = tuple(dict.fromkeys(row.comm_type for row in SUPPORT))


def resolve_backend(name: str) -> str:
    """The backend that `--cp-backend auto` means; any other name is returned as it is."""
    return "native" if name == "auto" else name


def smallest_alignment(cp_size: int) -> int:
    """Smallest number of tokens that every document must be padded to a multiple of: zigzag cuts 2*cp chunks."""
    return 2 * cp_size


def check(*, backend: str, comm_type: str, qkv_format: str, dtype: str, device: str, head_dim: int, heads: int, groups: int) -> Support:
    """The row of the table that serves a run.

    Raises:
        ValueError: one line that names the flag, what was asked and what is legal.
    """
    rows = [row for row in SUPPORT if row.backend == backend]
    if not rows:
        raise ValueError(f"--cp-backend {backend}: unknown; choose from auto, {', '.join(BACKENDS)}")
    row = next((row for row in rows if row.comm_type == comm_type), None)
    if row is None:
        legal = ", ".join(row.comm_type for row in rows)
        raise ValueError(f"--cp-comm-type {comm_type} is not offered by --cp-backend {backend}; choose from {legal}")
    if qkv_format not in row.formats:
        raise ValueError(f"--qkv-format {qkv_format} is not offered by --cp-backend {backend}; choose from {', '.join(row.formats)}")
    if device not in row.dtypes:
        raise ValueError(f"--cp-backend {backend} does not run on --device {device}; it runs on {', '.join(row.dtypes)}")
    if dtype not in row.dtypes[device]:
        legal = ", ".join(row.dtypes[device])
        raise ValueError(f"--dtype {dtype}: --cp-backend {backend} has no attention kernel for it on {device}; choose from {legal}")
    if groups != heads and not row.gqa:
        raise ValueError(f"--num-query-groups {groups} with --num-attention-heads {heads}: --cp-backend {backend} needs them equal")
    if device == "cuda" and (head_dim % row.head_dim_multiple or head_dim > row.head_dim_max):
        raise ValueError(
            f"--kv-channels {head_dim}: --cp-backend {backend} on CUDA takes multiples of {row.head_dim_multiple} up to {row.head_dim_max}"
        )
    return row
