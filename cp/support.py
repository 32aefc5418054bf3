"""The support table of context-parallel attention, as data. No torch import: argparse, docs and tests read it.

An entry of `SUPPORT` is one way to run attention over the `cp` axis. All entries take grouped-query attention.
The flags' choices, the refusals, the table in docs/context_parallel.md, the cells that tools/verify.py walks and
the tests' matrix are made from the entries; no other file lists a backend's name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from utils.errors import SizeError, UserError

QKV_FORMATS = ("thd", "bshd")
DTYPES = ("bf16", "fp32", "fp64")

# Backend -> the flag that chooses its method.
METHOD_FLAGS = {
    "native": "--cp-comm-type",
    "te": "--cp-comm-type",
    "ring": "--ring-attn-func",
    "pytorch": "--cp-rotate-method",
}
BACKENDS = tuple(METHOD_FLAGS)
# Backend -> devices on which attention can drop. Masks of CUDA's kernel would depend on the layout.
DROPOUT_DEVICES = {"native": ("cpu",)}
# Layouts that give ranks equal work, of which `auto` chooses.
BALANCED = ("zigzag", "hybrid", "striped")
# Backend -> fewest cp ranks; 1 if absent.
MIN_CP = {"ring": 2}
MAX_GATHERED = 1 << 30  # bytes of keys and values that a rank gathers at a time by default
# Channels of one head that the CUDA kernels take.
HEAD_DIM_MULTIPLE, HEAD_DIM_MAX = 8, 256


@dataclass(frozen=True)
class Support:
    """One way to run attention over context-parallel ranks.

    Attributes:
        method: value of the backend's method flag.
        layouts: how a row may be sharded, by `--qkv-format`; the first is the default, an absent format is refused.
        dtypes: compute dtypes by device; an absent device is refused.
        traded: heads that an all-to-all trades, whose numbers the `a2a_size` ranks must divide.
        has_stride: takes `--heads-k-stride`.
        note: for the docs.
    """

    backend: str
    method: str
    layouts: Mapping[str, tuple[str, ...]]
    dtypes: Mapping[str, tuple[str, ...]]
    traded: tuple[str, ...] = ()
    has_stride: bool = False
    note: str = ""

    @property
    def flags(self) -> str:
        """The flags that choose this entry."""
        return f"--cp-backend {self.backend} {METHOD_FLAGS[self.backend]} {self.method}"


_ZIGZAG = {"thd": ("zigzag",), "bshd": ("zigzag",)}
_ZIGZAG_OR_HYBRID = {"thd": ("zigzag", "hybrid"), "bshd": ("zigzag",)}
_ANY = {"thd": ("zigzag", "contiguous", "hybrid"), "bshd": ("zigzag", "contiguous")}
_DOC_CONTIGUOUS = {"thd": ("doc_contiguous",), "bshd": ("doc_contiguous",)}
_CONTIGUOUS, _STRIPED = {"thd": ("contiguous",)}, {"bshd": ("striped",)}
_PYTORCH = {"bshd": ("zigzag", "doc_contiguous")}
_ALL = {"cpu": ("bf16", "fp32", "fp64"), "cuda": ("bf16",)}
_BF16 = {"cpu": ("bf16",), "cuda": ("bf16",)}
_LLAMA3 = {"cpu": ("bf16", "fp32"), "cuda": ("bf16",)}
_CUDA = {"cuda": ("bf16",)}
_Q, _QKV = ("query heads",), ("query heads", "key/value heads")
_UNTESTED = "not run on a GPU yet"
_PADDED, _NO_FP32 = "padding is computed", "its fp32 gradients are silently wrong"

SUPPORT: tuple[Support, ...] = (
    Support("native", "p2p", _ZIGZAG_OR_HYBRID, _ALL, note="ring; K and V of one neighbour at a time"),
    Support("native", "all_gather", _ANY, _ALL, (), True, "needed K and V, some heads at a time"),
    Support("native", "a2a", _ZIGZAG, _ALL, _Q, note="Ulysses: trades tokens for heads; repeats K/V heads if too few"),
    Support("native", "a2a+p2p", _ZIGZAG, _ALL, _Q, note="a2a among --cp-a2a-size neighbours, a ring over the rest"),
    Support("te", "p2p", _ZIGZAG_OR_HYBRID, _CUDA, note=f"Transformer Engine's ring; {_UNTESTED}"),
    Support("te", "all_gather", _ZIGZAG, _CUDA, note=f"K and V of all heads gathered; {_UNTESTED}"),
    Support("te", "a2a", _ZIGZAG, _CUDA, _QKV, note=_UNTESTED),
    Support("te", "a2a+p2p", _ZIGZAG, _CUDA, _QKV, note=_UNTESTED),
    Support("ring", "zigzag", _ZIGZAG, _BF16, note=f"{_PADDED}; {_NO_FP32}"),
    Support("ring", "llama3", _CONTIGUOUS, _LLAMA3, (), True, f"{_PADDED}; not balanced"),
    Support("ring", "ring", _DOC_CONTIGUOUS, _BF16, note=f"{_PADDED}; not balanced; {_NO_FP32}"),
    Support("ring", "stripe", _STRIPED, _BF16, note=_NO_FP32),
    Support("pytorch", "allgather", _PYTORCH, _ALL, note="zigzag: PyTorch's load balancing; doc_contiguous: without"),
    Support("pytorch", "alltoall", _PYTORCH, _ALL, note="as allgather, but rotates K and V"),
)  # fmt: skip


def methods(backend: str) -> tuple[str, ...]:
    """Values of the backend's method flag; the first is its default."""
    return tuple(entry.method for entry in SUPPORT if entry.backend == backend)


def resolve_backend(name: str, *, has_te: bool = False) -> str:
    """The backend that `--cp-backend auto` means with or without Transformer Engine's layers; other names are kept."""
    return ("te" if has_te else "native") if name == "auto" else name


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """What a run's flags ask for.

    Attributes:
        layout: `auto` or a name.
        a2a_size, heads_k_stride: None: the flag is not given.
        kv_bytes: of the keys and values of a row, for one key/value head; None: unknown.
        heads, groups: query heads and key/value heads of one tp rank.
        dropout: probability of dropping an attention probability.
    """

    backend: str
    method: str
    qkv_format: str
    layout: str
    dtype: str
    device: str
    cp_size: int
    head_dim: int
    heads: int
    groups: int
    a2a_size: int | None = None
    heads_k_stride: int | None = None
    kv_bytes: int | None = None
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """The entry that serves a request, with its values resolved.

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


def _check_offered(flag: str, value: str, legal: Sequence[str], by: str) -> None:
    if value not in legal:
        raise _misfit(f"{flag} {value} is not offered by {by}", flag, legal)


def _check_divides(flag: str, value: int, total: int, what: str) -> None:
    if total % value:
        legal = [divisor for divisor in range(total, 0, -1) if total % divisor == 0]
        raise _misfit(f"{flag} {value} does not divide {what}", flag, legal)


def _misfit(what: str, flag: str, legal: Iterable[int | str]) -> SizeError:
    """Where none of the legal values fits the run, another backend may."""
    return SizeError(what, **{flag.removeprefix("--").replace("-", "_"): legal})


def choose(request: AttentionRequest) -> AttentionChoice:
    """Find the entry that serves a request, and resolve `auto` and None.

    Raises:
        UserError: names the flag, what was asked and what is legal.
    """
    backend, method, device = request.backend, request.method, request.device
    entry = next((entry for entry in SUPPORT if (entry.backend, entry.method) == (backend, method)), None)
    if entry is None:
        _check_offered(METHOD_FLAGS[backend], method, methods(backend), f"--cp-backend {backend}")
    assert entry is not None
    asked = entry.flags
    _check_offered("--qkv-format", request.qkv_format, tuple(entry.layouts), asked)
    layouts = entry.layouts[request.qkv_format]
    layout = layouts[0] if request.layout == "auto" else request.layout
    _check_offered("--cp-layout", layout, layouts, f"{asked} with --qkv-format {request.qkv_format}")
    if device not in entry.dtypes:
        what = f"{asked} runs on --device {' or '.join(entry.dtypes)}, not on {device}"
        raise SizeError(what, cp_backend=BACKENDS, device=entry.dtypes)
    _check_offered("--dtype", request.dtype, entry.dtypes[device], f"{asked} on {device}")
    min_cp = MIN_CP.get(backend, 1)
    if request.cp_size < min_cp:
        what = f"{asked} needs --cp-size {min_cp} or more, not {request.cp_size}"
        raise SizeError(what, cp_backend=["native"], cp_size=[min_cp])
    if request.dropout and device not in DROPOUT_DEVICES.get(backend, ()):
        able = sorted(name for name, devices in DROPOUT_DEVICES.items() if device in devices)
        what = f"--attention-dropout {request.dropout}: {asked} cannot drop attention on {device}"
        raise SizeError(what, attention_dropout=[0.0], cp_backend=able)
    if device == "cuda" and (request.head_dim % HEAD_DIM_MULTIPLE or request.head_dim > HEAD_DIM_MAX):
        legal = range(HEAD_DIM_MULTIPLE, HEAD_DIM_MAX + 1, HEAD_DIM_MULTIPLE)
        what = f"--kv-channels {request.head_dim}: {asked} on CUDA takes multiples of {HEAD_DIM_MULTIPLE} up to"
        nearest = sorted(legal, key=lambda size: abs(size - request.head_dim))
        raise SizeError(f"{what} {HEAD_DIM_MAX}", kv_channels=nearest)
    kept = {name: getattr(request, name) for name in ("backend", "method", "qkv_format", "cp_size")}
    a2a_size, stride = _resolve_a2a_size(entry, request), _resolve_stride(entry, request)
    return AttentionChoice(layout=layout, a2a_size=a2a_size, heads_k_stride=stride, **kept)


def candidates(request: AttentionRequest) -> list[AttentionChoice]:
    """The methods of a backend that serve a request without one, in the order of the table.

    Of open layouts those that are balanced; of open a2a sizes the proper divisors of cp, the largest first.
    """
    cp_size, found = request.cp_size, []
    for entry in SUPPORT:
        if entry.backend != request.backend:
            continue
        layouts = [layout for layout in entry.layouts.get(request.qkv_format, ()) if layout in BALANCED]
        sizes = [request.a2a_size]
        if entry.method == "a2a+p2p" and request.a2a_size is None:
            sizes = [size for size in range(cp_size - 1, 1, -1) if cp_size % size == 0]
        for layout, size in itertools.product(layouts if request.layout == "auto" else [request.layout], sizes):
            with suppress(UserError):
                found.append(choose(replace(request, method=entry.method, layout=layout, a2a_size=size)))
    return found


def _resolve_a2a_size(entry: Support, request: AttentionRequest) -> int:
    a2a_size, cp_size, flag = request.a2a_size, request.cp_size, "--cp-size"
    if entry.method == "a2a+p2p":
        flag = "--cp-a2a-size"
        if a2a_size is None:
            divisors = [size for size in range(1, cp_size + 1) if cp_size % size == 0]
            what = f"{entry.flags} needs --cp-a2a-size, a divisor of --cp-size {cp_size}"
            raise SizeError(what, cp_a2a_size=divisors)
        _check_divides(flag, a2a_size, cp_size, f"--cp-size {cp_size}")
    elif a2a_size is not None:
        raise UserError(f"--cp-a2a-size {a2a_size} belongs to --cp-comm-type a2a+p2p, not to {entry.flags}")
    else:
        a2a_size = cp_size if entry.traded else 1
    counts = {"query heads": request.heads, "key/value heads": request.groups}
    for what in entry.traded:
        _check_divides(flag, a2a_size, counts[what], f"the {counts[what]} {what} that {entry.flags} trades")
    return a2a_size


def _resolve_stride(entry: Support, request: AttentionRequest) -> int:
    stride, groups = request.heads_k_stride, request.groups
    if stride is None and entry.has_stride and request.backend == "native" and request.device == "cuda":
        # Few rounds launch few kernels. In two or more, transfers overlap with attention.
        most = min(groups // 2, MAX_GATHERED // (request.kv_bytes or MAX_GATHERED))
        return next((size for size in range(most, 1, -1) if groups % size == 0), 1)
    if stride is None:
        return 1
    if not entry.has_stride:
        raise UserError(f"--heads-k-stride {stride} is not taken by {entry.flags}")
    _check_divides("--heads-k-stride", stride, groups, f"the {groups} key/value heads")
    return stride


def cells(*, device: str, cp_size: int, heads: int, groups: int) -> list[tuple[AttentionChoice, str]]:
    """Every supported (choice, dtype) on a device, which the tests and `tools/verify.py --all` walk."""
    found = []
    two_level = [size for size in range(2, cp_size) if cp_size % size == 0] or [cp_size]
    run: dict[str, Any] = dict(device=device, cp_size=cp_size, head_dim=HEAD_DIM_MULTIPLE, heads=heads, groups=groups)
    for entry in SUPPORT:
        ask = partial(AttentionRequest, backend=entry.backend, method=entry.method, **run)
        a2a_sizes = two_level if entry.method == "a2a+p2p" else [None]
        for qkv_format, layouts in entry.layouts.items():
            for layout, dtype, a2a_size in itertools.product(layouts, entry.dtypes.get(device, ()), a2a_sizes):
                request = ask(qkv_format=qkv_format, layout=layout, dtype=dtype, a2a_size=a2a_size)
                with suppress(UserError):  # the table refuses the cell at this size
                    found.append((choose(request), dtype))
    return found


def markdown_table() -> str:
    """The table in docs/context_parallel.md."""
    lines = [
        "| `--cp-backend` | method | thd: layouts | bshd: layouts | CPU | CUDA | heads % cp | dropout | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in SUPPORT:
        layouts = [", ".join(entry.layouts.get(f, ())) or "-" for f in QKV_FORMATS]
        types = [", ".join(entry.dtypes.get(d, ())) or "-" for d in ("cpu", "cuda")]
        heads = "--cp-a2a-size" if entry.method == "a2a+p2p" else "cp" if entry.traded else "any"
        dropout = ", ".join(DROPOUT_DEVICES.get(entry.backend, ())) or "no"
        method = f"`{METHOD_FLAGS[entry.backend]} {entry.method}`"
        lines.append(f"| {' | '.join((entry.backend, method, *layouts, *types, heads, dropout, entry.note))} |")
    return "\n".join(lines)
