"""Resolved flags for tests that ask for single values."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from config.cli import parse_arguments
from config.schema import RunConfig
from config.validate import resolve


def resolve_config(
    *flags: str, world: int = 1, local: int | None = None, cuda: int = 0, resumed: Mapping[str, Any] | None = None
) -> RunConfig:
    """The configuration of these flags on `world` ranks, `local` of them on this node, with `cuda` devices."""
    config = parse_arguments(flags)
    resolve(config, world_size=world, local_world_size=local or world, cuda_devices=lambda: cuda, resumed=resumed)
    return config


def flatten(config: RunConfig) -> SimpleNamespace:
    """Every flag by its own name, and the attention that they mean together."""
    return SimpleNamespace(**config.flags(), attention=config.parallel.attention)


def resolved(*flags: str, world: int = 1, local: int | None = None, cuda: int = 0) -> SimpleNamespace:
    """`resolve_config`, flattened."""
    return flatten(resolve_config(*flags, world=world, local=local, cuda=cuda))
