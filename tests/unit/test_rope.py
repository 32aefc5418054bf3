"""Rotary positions against complex numbers."""

from __future__ import annotations

import math

import torch

from model.config import GPTConfig
from model.rope import apply_rotary, rotary_frequencies, rotary_tables
from tests.reference import relative_error


def frequencies_of(head_dim: int, base: float, **scaling) -> torch.Tensor:
    config = GPTConfig(
        num_layers=1, hidden_size=head_dim, ffn_hidden_size=1, num_attention_heads=1, num_query_groups=1, vocab_size=1,
        padded_vocab_size=1, kv_channels=head_dim, rotary_base=base, **scaling,
    )  # fmt: skip
    return rotary_frequencies(config)


def tables(
    positions: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_tables(positions, frequencies_of(head_dim, base), dtype=dtype)


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
    cos, sin = tables(positions, 8, 100.0, torch.float64)
    assert relative_error(apply_rotary(x, cos, sin), rotated(x, positions, 100.0)) < 1e-14
    assert torch.autograd.gradcheck(lambda y: apply_rotary(y, cos, sin), x)


def test_strided_and_low_precision_inputs() -> None:
    x = torch.randn(5, 2, 4, 16)[:, :, 1:3]  # [5, 2, 2, 16], as queries are sliced from QKV
    cos, sin = tables(torch.arange(5), 16, 10000.0, torch.float32)
    whole = apply_rotary(x.contiguous(), cos, sin)
    assert torch.equal(apply_rotary(x, cos, sin), whole)
    low = apply_rotary(x.bfloat16(), cos, sin)
    assert low.dtype == torch.bfloat16 and relative_error(low, whole) < 0.01


def test_far_positions_are_exact() -> None:
    position = 1_000_003
    cos, sin = tables(torch.tensor([position]), 2, 10000.0, torch.float32)
    assert abs(cos.item() - math.cos(position)) < 1e-6 and abs(sin.item() - math.sin(position)) < 1e-6


def test_products_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 32, dtype=torch.float64)

    def product(at_q: int, at_k: int) -> float:
        at = [tables(torch.tensor([place]), 32, 10000.0, torch.float64) for place in (at_q, at_k)]
        return (apply_rotary(q, *at[0]) * apply_rotary(k, *at[1])).sum().item()

    assert abs(product(5, 2) - product(105, 102)) < 1e-12
    assert abs(product(5, 2) - product(5, 3)) > 1e-6


def test_linear_scaling_is_the_position_divided() -> None:
    scaled = frequencies_of(8, 100.0, rope_scaling="linear", rope_scaling_factor=4.0)
    got = rotary_tables(torch.tensor([40, 7]), scaled, dtype=torch.float64)
    want = rotated(torch.ones(2, 1, 8, dtype=torch.float64), torch.tensor([10.0, 1.75]), 100.0)
    assert relative_error(apply_rotary(torch.ones(2, 1, 8, dtype=torch.float64), *got), want) < 1e-14


def test_llama3_scaling_slows_what_turns_slowly() -> None:
    """By the wavelengths of Llama 3.1's configuration: below 8192/4 kept, above 8192/1 divided by 8, interpolated
    between.
    """
    plain = frequencies_of(128, 500000.0)
    llama3 = dict(rope_scaling="llama3", rope_scaling_factor=8.0, rope_original_seq_length=8192)
    scaled = frequencies_of(128, 500000.0, **llama3)
    seen = set()
    for frequency, got in zip(plain.tolist(), scaled.tolist(), strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 2048:
            want, kind = frequency, "kept"
        elif wavelength > 8192:
            want, kind = frequency / 8, "slowed"
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            want, kind = (1 - smooth) * frequency / 8 + smooth * frequency, "mixed"
        seen.add(kind)
        assert abs(got / want - 1) < 1e-14
    assert seen == {"kept", "slowed", "mixed"}
