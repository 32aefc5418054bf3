"""What another PyTorch cannot do is refused by train.py (tests/unit/test_arguments.py), and skipped here."""

from __future__ import annotations

import pytest

from config.arguments import ZERO_BUBBLE_TORCH, installed_torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if installed_torch() >= ZERO_BUBBLE_TORCH:
        return
    for item in items:
        if "zero_bubble" in item.nodeid or "zero bubble" in item.nodeid or "lost_gradient" in item.nodeid:
            item.add_marker(
                pytest.mark.skip(reason="this PyTorch cannot split the backward pass of functions of our own")
            )
