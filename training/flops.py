"""Floating-point operations of a step, from real documents, and the peaks to divide by."""

from __future__ import annotations

from model.config import GPTConfig

# Dense bf16 TFLOP/s of one device, by a part of the name that CUDA reports. More special names first.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("GH200", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("B200", 2250.0),
    ("B300", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("A10G", 70.0),
    ("RTX 4090", 165.2),
)


def known_peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device, or None for one that is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS if name in device_name), None)


def attention_cost(config: GPTConfig) -> float:
    """FLOPs of attention to one squared length, in those of a token's projections, MLP and output."""
    return training_flops(config, tokens=0, squared_lengths=1) / training_flops(config, tokens=1, squared_lengths=0)


def training_flops(config: GPTConfig, *, tokens: float, squared_lengths: float) -> float:
    """Forward and backward of real tokens: Megatron-LM's count (6 = 2 a multiply-add, 3 matrix products).

    Causal attention counts half the square. Recompute, norms, softmax and padding do not count, and no layout
    changes the number.

    Args:
        tokens: real tokens.
        squared_lengths: sum over the documents of length^2.
    """
    h, q, k = config.hidden_size, config.query_size, config.num_query_groups * config.kv_channels
    projections = 6 * h * (2 * q + 2 * k)
    mlp = 6 * h * config.ffn_hidden_size * 3
    output = 6 * h * config.padded_vocab_size
    attention = 6 * q * squared_lengths
    return tokens * (config.num_layers * (projections + mlp) + output) + config.num_layers * attention
