"""What context-parallel attention can do, as data. No torch import: argparse, docs and tests read it.

A row of `SUPPORT` is one way to run attention over the `cp` axis. The flags' choices, the refusals, the
table in docs/context_parallel.md, the cells that tools/verify.py walks and the tests' matrix are all made from
these rows; nothing else lists a backend's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from utils.errors import UserError

QKV_FORMATS = ("thd", "bshd")
DTYPES = ("bf16", "fp32", "fp64")

# The flag that chooses among a backend's methods.
METHOD_FLAGS = {
    "native": "--cp-comm-type",
    "te": "--cp-comm-type",
    "ring": "--ring-attn-func",
    "pytorch": "--cp-rotate-method",
}


@dataclass(frozen=True, kw_only=True)
class Support:
    """One way to run attention over context-parallel ranks.

    Attributes:
        method: value of the backend's method flag.
        layouts: how tokens may be cut, by format; the first is the default. A format that is absent is refused.
        dtypes: compute types by device; a device that is absent is refused.
        gqa: fewer key/value heads than query heads.
        splits_heads: query heads must divide by the ranks that trade them (`a2a_size`).
        splits_kv_heads: so must key/value heads.
        stride: takes `--heads-k-stride`.
        min_cp: fewest cp ranks.
        dropout: devices on which it can drop attention probabilities.
        library: package that must be installed, with the line that does.
        head_dim_multiple, head_dim_max: on CUDA, of one head.
        note: for the docs.
    """

    backend: str
    method: str
    layouts: Mapping[str, tuple[str, ...]]
    dtypes: Mapping[str, tuple[str, ...]]
    gqa: bool = True
    splits_heads: bool = False
    splits_kv_heads: bool = False
    stride: bool = False
    min_cp: int = 1
    dropout: tuple[str, ...] = ()
    library: str | None = None
    head_dim_multiple: int = 8
    head_dim_max: int = 256
    note: str = ""


_NATIVE_DTYPES = {"cpu": ("bf16", "fp32", "fp64"), "cuda": ("bf16",)}
_NATIVE_DROPOUT = ("cpu",)  # by explicit scores; CUDA's kernel would draw masks that depend on the layout
_ZIGZAG = {"thd": ("zigzag",), "bshd": ("zigzag",)}
_TE = "transformer-engine[pytorch]==2.20.2"
_TE_DTYPES = {"cuda": ("bf16",)}
_RING = "ring-flash-attn==0.1.8"
_RING_FP32 = "its fp32 gradients are silently wrong"
_BF16 = {"cpu": ("bf16",), "cuda": ("bf16",)}

SUPPORT: tuple[Support, ...] = (
    Support(
        backend="native",
        method="p2p",
        layouts=_ZIGZAG,
        dtypes=_NATIVE_DTYPES,
        dropout=_NATIVE_DROPOUT,
        note="ring; K and V of one neighbour at a time",
    ),
    Support(
        backend="native",
        method="all_gather",
        layouts={"thd": ("zigzag", "contiguous"), "bshd": ("zigzag", "contiguous")},
        dtypes=_NATIVE_DTYPES,
        dropout=_NATIVE_DROPOUT,
        stride=True,
        note="K and V of some heads gathered; contiguous takes documents of any length",
    ),
    Support(
        backend="native",
        method="a2a",
        layouts=_ZIGZAG,
        dtypes=_NATIVE_DTYPES,
        dropout=_NATIVE_DROPOUT,
        splits_heads=True,
        note="Ulysses: tokens traded for heads; fewer K/V heads than ranks are repeated",
    ),
    Support(
        backend="native",
        method="a2a+p2p",
        layouts=_ZIGZAG,
        dtypes=_NATIVE_DTYPES,
        dropout=_NATIVE_DROPOUT,
        splits_heads=True,
        note="a2a among --cp-a2a-size neighbours, a ring over the rest",
    ),
    Support(
        backend="te",
        method="p2p",
        layouts=_ZIGZAG,
        dtypes=_TE_DTYPES,
        library=_TE,
        note="Transformer Engine's ring; not run on a GPU yet",
    ),
    Support(
        backend="te",
        method="all_gather",
        layouts=_ZIGZAG,
        dtypes=_TE_DTYPES,
        library=_TE,
        note="K and V of all heads gathered; not run on a GPU yet",
    ),
    Support(
        backend="te",
        method="a2a",
        layouts=_ZIGZAG,
        dtypes=_TE_DTYPES,
        splits_heads=True,
        splits_kv_heads=True,
        library=_TE,
        note="not run on a GPU yet",
    ),
    Support(
        backend="te",
        method="a2a+p2p",
        layouts=_ZIGZAG,
        dtypes=_TE_DTYPES,
        splits_heads=True,
        splits_kv_heads=True,
        library=_TE,
        note="not run on a GPU yet",
    ),
    Support(
        backend="ring",
        method="zigzag",
        layouts=_ZIGZAG,
        dtypes=_BF16,
        min_cp=2,
        library=_RING,
        note=f"padding is computed; {_RING_FP32}",
    ),
    Support(
        backend="ring",
        method="llama3",
        layouts={"thd": ("contiguous",)},
        dtypes={"cpu": ("bf16", "fp32"), "cuda": ("bf16",)},
        stride=True,
        min_cp=2,
        library=_RING,
        note="padding is computed; not balanced",
    ),
    Support(
        backend="ring",
        method="ring",
        layouts={"thd": ("doc_contiguous",), "bshd": ("doc_contiguous",)},
        dtypes=_BF16,
        min_cp=2,
        library=_RING,
        note=f"padding is computed; not balanced; {_RING_FP32}",
    ),
    Support(
        backend="ring",
        method="stripe",
        layouts={"bshd": ("striped",)},
        dtypes=_BF16,
        min_cp=2,
        library=_RING,
        note=_RING_FP32,
    ),
    Support(
        backend="pytorch",
        method="allgather",
        layouts={"bshd": ("zigzag", "doc_contiguous")},
        dtypes=_NATIVE_DTYPES,
        note="zigzag is PyTorch's load balancing, doc_contiguous its absence",
    ),
    Support(
        backend="pytorch",
        method="alltoall",
        layouts={"bshd": ("zigzag", "doc_contiguous")},
        dtypes=_NATIVE_DTYPES,
        note="the same, K and V rotated",
    ),
)

BACKENDS: tuple[str, ...] = tuple(dict.fromkeys(row.backend for row in SUPPORT))


def methods(backend: str) -> tuple[str, ...]:
    """Values of the backend's method flag; the first is its default."""
    return tuple(row.method for row in SUPPORT if row.backend == backend)


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """What a run's flags ask for: a row of the table, and the values it takes.

    Attributes:
        a2a_size: ranks that trade heads: cp for `a2a`, `--cp-a2a-size` for `a2a+p2p`, else 1.
        heads_k_stride: key/value heads gathered at a time.
    """

    backend: str
    method: str
    qkv_format: str
    layout: str
    cp_size: int
    a2a_size: int = 1
    heads_k_stride: int = 1


def resolve_backend(name: str, *, has_te: bool = False) -> str:
    """The backend that `--cp-backend auto` means; any other name is returned as it is.

    Args:
        has_te: the layers are Transformer Engine's.
    """
    return ("te" if has_te else "native") if name == "auto" else name


def _row(backend: str, method: str) -> Support:
    row = next((row for row in SUPPORT if (row.backend, row.method) == (backend, method)), None)
    if row is None:
        raise UserError(
            f"{METHOD_FLAGS[backend]} {method} is not offered by --cp-backend {backend}; choose from {', '.join(methods(backend))}"
        )
    return row


def choose(
    *,
    backend: str,
    method: str,
    qkv_format: str,
    layout: str,
    dtype: str,
    device: str,
    cp_size: int,
    a2a_size: int | None,
    heads_k_stride: int | None,
    head_dim: int,
    heads: int,
    groups: int,
    dropout: float = 0.0,
) -> AttentionChoice:
    """The table's answer to a run's flags, `auto` and None replaced.

    Args:
        layout: `auto` or a name; heads, groups: query and key/value heads of one tp rank; dropout: of attention probabilities.

    Raises:
        ValueError: one line that names the flag, what was asked and what is legal.
    """
    row = _row(backend, method)
    asked = f"--cp-backend {backend} {METHOD_FLAGS[backend]} {method}"
    if qkv_format not in row.layouts:
        raise UserError(f"--qkv-format {qkv_format} is not offered by {asked}; choose {' or '.join(row.layouts)}")
    layouts = row.layouts[qkv_format]
    layout = layouts[0] if layout == "auto" else layout
    if layout not in layouts:
        raise UserError(
            f"--cp-layout {layout} is not offered by {asked} with --qkv-format {qkv_format}; choose {' or '.join(layouts)}"
        )
    if device not in row.dtypes:
        raise UserError(f"{asked} does not run on --device {device}; it runs on {', '.join(row.dtypes)}")
    if dtype not in row.dtypes[device]:
        raise UserError(
            f"--dtype {dtype} is not offered by {asked} on {device}; choose {' or '.join(row.dtypes[device])}"
        )
    if cp_size < row.min_cp:
        raise UserError(
            f"{asked} needs --cp-size {row.min_cp} or more, not {cp_size}; use --cp-backend native for one rank"
        )
    if groups != heads and not row.gqa:
        raise UserError(f"--num-query-groups {groups} with --num-attention-heads {heads}: {asked} needs them equal")
    if dropout and device not in row.dropout:
        able = sorted({r.backend for r in SUPPORT if device in r.dropout})
        others = f"--cp-backend {' or '.join(able)} can" if able else f"none can on {device}"
        raise UserError(f"--attention-dropout {dropout}: {asked} cannot drop attention on {device}; {others}, or use 0")
    if device == "cuda" and (head_dim % row.head_dim_multiple or head_dim > row.head_dim_max):
        raise UserError(
            f"--kv-channels {head_dim}: {asked} on CUDA takes multiples of {row.head_dim_multiple} up to {row.head_dim_max}"
        )
    return AttentionChoice(
        backend=backend,
        method=method,
        qkv_format=qkv_format,
        layout=layout,
        cp_size=cp_size,
        a2a_size=_a2a_size(row, asked, cp_size, a2a_size, heads, groups),
        heads_k_stride=_heads_k_stride(row, asked, heads_k_stride, groups),
    )


def _a2a_size(row: Support, asked: str, cp_size: int, a2a_size: int | None, heads: int, groups: int) -> int:
    if row.method != "a2a+p2p":
        if a2a_size is not None:
            raise UserError(f"--cp-a2a-size {a2a_size} belongs to --cp-comm-type a2a+p2p, not to {asked}")
        a2a_size = cp_size if row.splits_heads else 1
    elif a2a_size is None:
        raise UserError(f"{asked} needs --cp-a2a-size, a divisor of --cp-size {cp_size}")
    if cp_size % a2a_size:
        legal = [a for a in range(1, cp_size + 1) if cp_size % a == 0]
        raise UserError(
            f"--cp-a2a-size {a2a_size} does not divide --cp-size {cp_size}; choose from {', '.join(map(str, legal))}"
        )
    traded = {"query heads": heads, **({"key/value heads": groups} if row.splits_kv_heads else {})}
    for what, count in traded.items():
        if count % a2a_size:
            legal = [a for a in range(1, count + 1) if count % a == 0]
            flag = "--cp-a2a-size" if row.method == "a2a+p2p" else "--cp-size"
            raise UserError(
                f"{flag} {a2a_size} does not divide the {count} {what} that {asked} trades; choose from {', '.join(map(str, legal))}"
            )
    return a2a_size


def _heads_k_stride(row: Support, asked: str, stride: int | None, groups: int) -> int:
    if stride is None:
        return 1
    if not row.stride:
        raise UserError(f"--heads-k-stride {stride} is not taken by {asked}")
    if groups % stride:
        legal = [s for s in range(1, groups + 1) if groups % s == 0]
        raise UserError(
            f"--heads-k-stride {stride} does not divide the {groups} key/value heads; choose from {', '.join(map(str, legal))}"
        )
    return stride


def cells(*, device: str, cp_size: int, heads: int, groups: int) -> Iterator[tuple[AttentionChoice, str]]:
    """Every supported (choice, dtype) on a device: what the tests and `tools/verify.py --all` walk."""
    for row in SUPPORT:
        for qkv_format, layouts in row.layouts.items():
            for layout in layouts:
                for dtype in row.dtypes.get(device, ()):
                    sizes = (
                        [a for a in range(2, cp_size) if cp_size % a == 0] or [cp_size]
                        if row.method == "a2a+p2p"
                        else [None]
                    )
                    for a2a_size in sizes:
                        try:
                            choice = choose(
                                backend=row.backend,
                                method=row.method,
                                qkv_format=qkv_format,
                                layout=layout,
                                dtype=dtype,
                                device=device,
                                cp_size=cp_size,
                                a2a_size=a2a_size,
                                heads_k_stride=None,
                                head_dim=8,
                                heads=heads,
                                groups=groups,
                            )
                        except ValueError:
                            continue  # the table refuses this cell at this size
                        yield choice, dtype


def markdown_table() -> str:
    """The table as docs/context_parallel.md shows it."""
    lines = [
        "| `--cp-backend` | method | thd: layouts | bshd: layouts | CPU | CUDA | GQA | heads % cp | dropout | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in SUPPORT:
        layouts = [", ".join(row.layouts.get(f, ())) or "-" for f in QKV_FORMATS]
        types = [", ".join(row.dtypes.get(d, ())) or "-" for d in ("cpu", "cuda")]
        heads = "--cp-a2a-size" if row.method == "a2a+p2p" else "cp" if row.splits_heads else "any"
        lines.append(
            f"| {row.backend} | `{METHOD_FLAGS[row.backend]} {row.method}` | {' | '.join(layouts)} | {' | '.join(types)} | "
            f"{'yes' if row.gqa else 'no'} | {heads} | {', '.join(row.dropout) or 'no'} | {row.note} |"
        )
    return "\n".join(lines)
