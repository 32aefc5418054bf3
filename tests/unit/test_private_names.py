"""PyTorch's private ring: what `--cp-backend pytorch` uses of it is there, and a move is told in one line."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

import cp.pytorch_cp as backend


def test_this_pytorch_has_what_is_used() -> None:
    assert backend.load_private() is backend.torch_cp


@pytest.mark.parametrize("gone", [*backend.PRIVATE_FUNCTIONS, "_cp_options"])
def test_a_name_that_moved_is_named(gone: str, monkeypatch) -> None:
    there = {
        name: getattr(backend.torch_cp, name) for name in (*backend.PRIVATE_FUNCTIONS, "_cp_options") if name != gone
    }
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(**there))
    wanted = "enable_load_balance" if gone == "_cp_options" else f"{gone} is gone"
    with pytest.raises(ValueError, match=rf"--cp-backend pytorch: .*{wanted}.*--cp-backend native"):
        backend.load_private()


def test_other_parameters_are_named(monkeypatch) -> None:
    there = {name: getattr(backend.torch_cp, name) for name in (*backend.PRIVATE_FUNCTIONS, "_cp_options")}
    there["_templated_ring_attention"] = lambda mesh, dim: None
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(**there))
    with pytest.raises(ValueError, match="_templated_ring_attention takes mesh, dim"):
        backend.load_private()


def test_a_module_that_moved_is_named(monkeypatch) -> None:
    monkeypatch.setattr(backend, "PRIVATE_MODULE", "torch.distributed.no_such_place")
    with pytest.raises(ValueError, match=r"torch\.distributed\.no_such_place is gone"):
        backend.load_private()
