"""Rotary positions against complex numbers."""

from __future__ import annotations

import math

import torch

from model.rope import apply_rotary, rotary_tables
from tests.reference import relative_error


def rotated(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """The same by complex multiplication in float64. x [t, h, d]."""
    d = x.shape[-1]
    frequency = torch.tensor([base ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
    turn = torch.exp(1j * positions.double()[:, None] * frequency)[:, None]
    z = torch.complex(x[..., : d // 2].contiguous(), x[..., d // 2 :].contiguous()) * turn
    return torch.cat((z.real, z.imag), -1)


def test_equals_complex_rotation_and_its_gradient() -> None:
    x = torch.randn(6, 3, 8, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([0, 1, 2, 0, 1, 50])
    cos, sin = rotary_tables(positions, head_dim=8, base=100.0, dtype=torch.float64)
    assert relative_error(apply_rotary(x, cos, sin), rotated(x, positions, 100.0)) < 1e-14
    assert torch.autograd.gradcheck(lambda y: apply_rotary(y, cos, sin), x)


def test_strided_and_low_precision_inputs() -> None:
    x = torch.randn(5, 2, 4, 16)[:, :, 1:3]  # [5, 2, 2, 16], as queries are sliced from QKV
    cos, sin = rotary_tables(torch.arange(5), head_dim=16, base=10000.0, dtype=torch.float32)
    whole = apply_rotary(x.contiguous(), cos, sin)
    assert torch.equal(apply_rotary(x, cos, sin), whole)
    low = apply_rotary(x.bfloat16(), cos, sin)
    assert low.dtype == torch.bfloat16 and relative_error(low, whole) < 0.01


def test_far_positions_are_exact() -> None:
    position = 1_000_003
    cos, sin = rotary_tables(torch.tensor([position]), head_dim=2, base=10000.0, dtype=torch.float32)
    assert abs(cos.item() - math.cos(position)) < 1e-6 and abs(sin.item() - math.sin(position)) < 1e-6


def test_products_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 32, dtype=torch.float64)

    def product(at_q: int, at_k: int) -> float:
        tables = [rotary_tables(torch.tensor([at]), head_dim=32, base=10000.0, dtype=torch.float64) for at in (at_q, at_k)]
        return (apply_rotary(q, *tables[0]) * apply_rotary(k, *tables[1])).sum().item()

    assert abs(product(5, 2) - product(105, 102)) < 1e-12
    assert abs(product(5, 2) - product(5, 3)) > 1e-6
