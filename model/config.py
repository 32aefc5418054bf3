"""The model's shape and constants. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

# Activations that the backward pass recomputes (model/transformer.py).
RECOMPUTE = ("none", "selective", "full")
# How Transformer Engine scales an FP8 tensor (model/te_layers.py): delayed, by amax of earlier steps; current, by the
# tensor's own amax; block, by the amax of each block.
FP8_RECIPES = ("none", "delayed", "current", "block")
# How rotary positions extend beyond the trained length (model/rope.py).
ROPE_SCALINGS = ("none", "linear", "llama3")


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """Smallest multiple of `divisible_by` that holds the vocabulary. Independent of tp, which must divide it."""
    return -(-vocab_size // divisible_by) * divisible_by


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape and constants of the model, independent of the layout.

    Attributes:
        num_query_groups: key/value heads.
        kv_channels: channels of one head.
        padded_vocab_size: rows of the embedding; outputs from `vocab_size` on take no part in the softmax.
        rope_original_seq_length: tokens of the trained length, for `llama3` scaling.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    padded_vocab_size: int
    rotary_base: float = 10000.0
    rope_scaling: str = "none"
    rope_scaling_factor: float = 1.0
    rope_original_seq_length: int = 0
    norm_epsilon: float = 1e-5
    qk_norm: bool = False
    tie_embeddings: bool = False
    init_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    @property
    def queries_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    @property
    def query_size(self) -> int:
        """Channels of all query heads."""
        return self.num_attention_heads * self.kv_channels

    @property
    def qkv_size(self) -> int:
        """Rows of the fused QKV weight: per group its query heads, its key head, its value head."""
        return self.num_query_groups * (self.queries_per_group + 2) * self.kv_channels

    def shared_channels(self, tp_size: int) -> int:
        """Channels of QKV that a tp rank receives from the ranks with which it shares a key/value head."""
        return max(0, tp_size // self.num_query_groups - 1) * self.qkv_size // tp_size


def count_parameters(config: GPTConfig) -> int:
    """Weights of the model: with the padded vocabulary, a tied matrix once."""
    h, norm = config.hidden_size, config.kv_channels if config.qk_norm else 0
    layer = h * (config.qkv_size + config.query_size + 3 * config.ffn_hidden_size) + 2 * h + 2 * norm
    return config.num_layers * layer + config.padded_vocab_size * h * (1 if config.tie_embeddings else 2) + h
