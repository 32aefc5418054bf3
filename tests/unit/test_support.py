"""The support table: every entry is served, every cell is chosen as asked, every absent cell is refused by flag."""

from __future__ import annotations

import itertools

import pytest

from cp.attention import build_attention
from cp.layout import LAYOUTS
from cp.support import BACKENDS, DTYPES, METHOD_FLAGS, QKV_FORMATS, SUPPORT, AttentionRequest, cells, choose, methods


def ask(**changes):
    asked = dict(
        backend="native",
        method="p2p",
        qkv_format="thd",
        layout="auto",
        dtype="bf16",
        device="cpu",
        cp_size=2,
        a2a_size=None,
        heads_k_stride=None,
        head_dim=64,
        heads=8,
        groups=4,
    )
    return choose(AttentionRequest(**(asked | changes)))


@pytest.mark.parametrize(
    ("changes", "stride"),
    [
        (dict(groups=8, kv_bytes=2**26), 4),  # two rounds, so that transfers overlap
        (dict(groups=8, kv_bytes=2**29), 2),  # two heads are 1 GiB
        (dict(groups=8, kv_bytes=2**30 + 1), 1),
        (dict(groups=6, heads=12, kv_bytes=2**28), 3),
        (dict(groups=10, heads=10, kv_bytes=2**28), 2),  # 4 heads fit; 2 divides 10
        (dict(groups=1, kv_bytes=2**20), 1),
        (dict(groups=8), 1),
        (dict(groups=8, kv_bytes=2**26, heads_k_stride=8), 8),
        (dict(groups=8, kv_bytes=2**26, heads_k_stride=1), 1),
        (dict(groups=8, kv_bytes=2**26, device="cpu"), 1),
        (dict(groups=8, kv_bytes=2**26, method="p2p"), 1),
        (dict(groups=8, kv_bytes=2**26, backend="ring", method="llama3", qkv_format="thd"), 1),
    ],
)
def test_heads_of_a_round_fit_the_memory(changes: dict, stride: int) -> None:
    assert ask(**(dict(device="cuda", method="all_gather") | changes)).heads_k_stride == stride


def test_every_backend_has_a_method_flag() -> None:
    assert set(METHOD_FLAGS) == set(BACKENDS)
    assert len({(entry.backend, entry.method) for entry in SUPPORT}) == len(SUPPORT)


def test_every_cell_is_served() -> None:
    found = list(cells(device="cpu", cp_size=4, heads=8, groups=4))
    assert {(c.backend, c.method) for c, _ in found} == {
        (entry.backend, entry.method) for entry in SUPPORT if "cpu" in entry.dtypes
    }
    for choice, _ in found:
        assert callable(build_attention(choice, head_dim=8, a2a_groups=(None, None), degree_groups={}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entry", "qkv_format", "layout", "dtype", "device"),
    [(entry, *rest) for entry in SUPPORT for rest in itertools.product(QKV_FORMATS, LAYOUTS, DTYPES, ("cpu", "cuda"))],
    ids=lambda x: getattr(x, "method", x),
)
def test_cells_outside_the_table_are_refused_by_flag(
    entry, qkv_format: str, layout: str, dtype: str, device: str
) -> None:
    a2a_size = 2 if entry.method == "a2a+p2p" else None
    asked = dict(
        backend=entry.backend,
        method=entry.method,
        qkv_format=qkv_format,
        layout=layout,
        dtype=dtype,
        device=device,
        a2a_size=a2a_size,
    )
    wrong = {
        "--qkv-format": qkv_format not in entry.layouts,
        "--cp-layout": layout not in entry.layouts.get(qkv_format, LAYOUTS),
        "--dtype": dtype not in entry.dtypes.get(device, ()),
        "--cp-backend": device not in entry.dtypes,
    }
    if not any(wrong.values()):
        assert ask(**asked).layout == layout
        return
    with pytest.raises(ValueError) as refused:
        ask(**asked)
    message = str(refused.value)
    assert "\n" not in message and any(message.startswith(flag) for flag, bad in wrong.items() if bad), message


def test_methods_of_another_backend_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--cp-rotate-method p2p is not offered .* choose from allgather, alltoall"):
        ask(backend="pytorch")
    assert methods("ring") == ("zigzag", "llama3", "ring", "stripe")


def test_transformer_engines_entries() -> None:
    """CUDA and bf16 only; its a2a trades key/value heads too; nothing drops attention there yet."""
    on = dict(backend="te", device="cuda")
    for method in methods("te"):
        a2a_size = 2 if method == "a2a+p2p" else None
        choice = ask(**on, method=method, cp_size=4, a2a_size=a2a_size)
        assert (choice.layout, choice.a2a_size) == ("zigzag", {"a2a": 4, "a2a+p2p": 2}.get(method, 1))
    for changes, words in (
        ({"dtype": "fp32"}, "--dtype fp32"),
        ({"method": "a2a", "cp_size": 8, "heads": 8, "groups": 4}, "--cp-size 8 does not divide the 4 key/value heads"),
        ({"dropout": 0.1}, "--attention-dropout 0.1"),
        ({"layout": "contiguous"}, "--cp-layout contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            ask(**on, **changes)
    assert ask(backend="native", method="a2a", cp_size=8, heads=8, groups=4).a2a_size == 8  # ours repeats them instead
