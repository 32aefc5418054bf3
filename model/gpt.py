"""The GPT: embedding, layers, final norm, loss."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cp.attention import Attention
from cp.packed_seq import PackedSeq
from model.config import GPTConfig
from model.loss import chunked_cross_entropy
from model.rope import rotary_tables
from model.torch_layers import Linear, RMSNorm, VocabEmbedding
from model.transformer import RowContext, TransformerLayer


class GPT(nn.Module):
    """A decoder over this rank's tokens of one row.

    Args:
        attention: from `cp.attention.build_attention`.
        cp_group: the ranks that hold the rest of the row.
        dtype: of the parameters.
        loss_chunk_size: tokens whose logits exist at a time.
        z_loss: weight of log(Z)^2; 0 turns it off.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        attention: Attention,
        cp_group: dist.ProcessGroup,
        dtype: torch.dtype,
        loss_chunk_size: int = 512,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.config, self.loss_chunk_size, self.z_loss = config, loss_chunk_size, z_loss
        self.embedding = VocabEmbedding(config.padded_vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(TransformerLayer(config, attention, cp_group, dtype) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, eps=config.norm_epsilon, dtype=dtype)
        self.lm_head = None if config.tie_embeddings else Linear(config.hidden_size, config.padded_vocab_size, dtype=dtype)

    @property
    def output_weight(self) -> Tensor:
        """[padded vocabulary, h]; the embedding itself when tied."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        tokens: Tensor,
        packed_seq: PackedSeq,
        labels: Tensor | None = None,
        logits_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """The sum of the labelled tokens' losses, or the logits of some rows.

        The output layer runs inside this forward, where FSDP holds the root's weights whole.

        Args:
            tokens: [t] int64.
            labels: [t] int64, already shifted; -100 where no loss is wanted.
            logits_rows: [n] rows whose logits are wanted instead of a loss.

        Returns:
            With `labels`: (loss sum to differentiate, cross-entropy sum without gradient).
            With `logits_rows`: logits [n, vocab_size].
        """
        assert (labels is None) != (logits_rows is None), "labels or logits_rows, not both"
        x = self.embedding(tokens)  # [t, h]
        table_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = rotary_tables(packed_seq.positions, head_dim=self.config.kv_channels, base=self.config.rotary_base, dtype=table_dtype)
        row = RowContext(packed_seq, cos, sin)
        for layer in self.layers:
            x = layer(x, row)
        x = self.final_norm(x)
        if logits_rows is not None:
            return x[logits_rows] @ self.output_weight[: self.config.vocab_size].T
        assert labels is not None
        return chunked_cross_entropy(
            x,
            self.output_weight,
            labels,
            vocab_size=self.config.vocab_size,
            chunk_size=self.loss_chunk_size,
            z_loss=self.z_loss,
        )
