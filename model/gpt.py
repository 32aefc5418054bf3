"""The GPT: embedding, layers, final norm, loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cp.attention import Attention
from cp.kernels import to_device
from cp.packed_seq import PackedSeq
from model.config import GPTConfig
from model.dropout import HiddenDropout
from model.layers import Precision, layers_of
from model.loss import chunked_cross_entropy
from model.rope import rotary_frequencies
from model.transformer import RowContext, TransformerLayer
from parallel.tensor import TensorParallel


@dataclass
class StageRows:
    """What a pipeline stage looks up by a microbatch's number, and where the last stage leaves its cross-entropy.

    loss_tokens: labelled tokens of the whole step, which the loss is divided by.
    """

    tokens: Sequence[Tensor]
    labels: Sequence[Tensor]
    packed_seqs: Sequence[PackedSeq]
    loss_tokens: Tensor
    cross_entropy: Tensor


class GPT(nn.Module):
    """A decoder over this rank's tokens of one row, or one pipeline stage of it.

    Args:
        attention: from `cp.attention.build_attention`.
        cp_group: the ranks that hold the rest of the row.
        dtype: of the parameters.
        tp: the ranks that share each matrix.
        loss_chunk_size: tokens whose logits exist at a time.
        z_loss: weight of log(Z)^2; 0 turns it off.
        compute_dtype: what FSDP casts parameters to, and so the hidden states'; None: `dtype`.
        recompute: of `TransformerLayer`.
        dropout_seed: of the masks of `config`'s dropout.
        implementation: whose layers, as `model.layers.layers_of`.
        precision: of `TransformerLayer`; None: the compute dtype.
        layers: those of this stage; None: all. The stage with the first one embeds, that with the last one has the output.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        attention: Attention,
        cp_group: dist.ProcessGroup,
        dtype: torch.dtype,
        tp: TensorParallel | None = None,
        loss_chunk_size: int = 512,
        z_loss: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        layers: range | None = None,
        recompute: str = "none",
        dropout_seed: int = 0,
        implementation: str = "torch",
        precision: Precision | None = None,
    ) -> None:
        super().__init__()
        impl = layers_of(implementation)
        self.rotary_tables, self.precision = impl.rotary_tables, precision or Precision()
        layers = range(config.num_layers) if layers is None else layers
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.num_layers
        self.compute_dtype = compute_dtype or dtype
        self.rows: StageRows | None = None  # of the step that a pipeline schedule runs, which says before each forward:
        self.microbatch = 0
        self.config, self.loss_chunk_size, self.z_loss = config, loss_chunk_size, z_loss
        self.tp = tp = tp or TensorParallel()
        self.embedding = self.final_norm = self.lm_head = None
        if self.is_first or (self.is_last and config.tie_embeddings):  # the last stage of several holds a copy
            self.embedding = impl.VocabParallelEmbedding(
                config.padded_vocab_size, config.hidden_size, dtype=dtype, tp=tp
            )
        # By their number in the whole model, so that names do not depend on the stage.
        options: dict[str, Any] = dict(seed=dropout_seed, impl=impl, precision=self.precision)
        self.layers = nn.ModuleDict(
            {
                str(i): TransformerLayer(config, attention, cp_group, dtype, tp, recompute, number=i, **options)
                for i in layers
            }
        )
        self.cp_group = cp_group
        self.after_embedding = HiddenDropout(config.hidden_dropout, seed=dropout_seed, name="embedding")
        if self.is_last:
            self.final_norm = impl.RMSNorm(config.hidden_size, eps=config.norm_epsilon, dtype=dtype)
            if not config.tie_embeddings:
                self.lm_head = impl.ColumnParallelLinear(
                    config.hidden_size, config.padded_vocab_size, dtype=dtype, tp=tp
                )

    @property
    def output_weight(self) -> Tensor:
        """[padded vocabulary / tp, h]; the embedding itself when tied."""
        head = self.embedding if self.lm_head is None else self.lm_head
        assert head is not None
        return head.weight

    def compile_layers(self) -> None:
        """torch.compile the layers, but for attention."""
        for layer in self.layers.values():
            layer.compile_parts()  # type: ignore[operator]

    def is_copy(self, name: str) -> bool:
        """Whether another stage holds the same weight, which counts there."""
        return name == "embedding.weight" and not self.is_first

    def forward(
        self,
        x: Tensor,
        packed_seq: PackedSeq | None = None,
        labels: Tensor | None = None,
        logits_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """The sum of the labelled tokens' losses, the logits of some rows, or what goes to the next stage.

        The output layer runs inside this forward, where FSDP holds the root's weights whole.

        Args:
            x: [t] int64 tokens on the first stage, else the hidden state from the stage before.
            labels: [t] int64, already shifted; -100 where no loss is wanted.
            logits_rows: [n] rows whose logits are wanted instead of a loss.

        Returns:
            Before the last stage: the hidden state [t, h], or [t / tp, h] with sequence parallelism.
            With `labels`: (loss sum to differentiate, cross-entropy sum without gradient).
            With `logits_rows`: logits [n, vocab_size].
            Under a pipeline schedule, which gives `rows` and `microbatch` instead: the row's part of the step's mean loss, [1].
        """
        if self.rows is not None:
            return self._scheduled(x, self.rows, self.microbatch)
        assert packed_seq is not None
        x = self._hidden(x, packed_seq)
        if not self.is_last:
            return x
        assert (labels is None) != (logits_rows is None), "labels or logits_rows, not both"
        if logits_rows is not None:
            return self.tp.gather_columns(x[logits_rows] @ self.output_weight.T)[:, : self.config.vocab_size]
        assert labels is not None
        return self._loss(x, labels)

    def _scheduled(self, x: Tensor, rows: StageRows, number: int) -> Tensor:
        x = self._hidden(rows.tokens[number] if self.is_first else x, rows.packed_seqs[number])
        if not self.is_last:
            return x
        loss_sum, cross_entropy = self._loss(x, rows.labels[number])
        rows.cross_entropy += cross_entropy
        return torch.stack([loss_sum / rows.loss_tokens.to(loss_sum.dtype)])  # a view would lose FSDP's hook

    def _hidden(self, x: Tensor, packed_seq: PackedSeq) -> Tensor:
        """Through this stage's layers, and on the last stage the final norm with all tokens on every tp rank."""
        token_ids = self._token_ids(packed_seq, x.device) if self.config.hidden_dropout and self.training else None
        if self.is_first:
            assert self.embedding is not None
            x = self.embedding(x)  # [t, h], or [t / tp, h] with sequence parallelism
            x = self.after_embedding(x, token_ids)
        table_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        frequencies = rotary_frequencies(
            head_dim=self.config.kv_channels,
            base=self.config.rotary_base,
            scaling=self.config.rope_scaling,
            factor=self.config.rope_scaling_factor,
            original_seq_length=self.config.rope_original_seq_length,
            device=packed_seq.positions.device,
        )
        row = RowContext(
            packed_seq, self.rotary_tables(packed_seq.positions, frequencies, dtype=table_dtype), token_ids
        )
        with self.precision.of_model() if self.training else nullcontext():
            for layer in self.layers.values():
                x = layer(x, row)
        return self.tp.enter(self.final_norm(x)) if self.final_norm is not None else x

    def _token_ids(self, packed_seq: PackedSeq, device: torch.device) -> Tensor:
        """Of the tokens of this rank's residual stream, made once a microbatch and device."""
        key = ("token ids", device)
        if key not in packed_seq.plans:
            ids, _ = packed_seq.places(cp_size=self.cp_group.size(), cp_rank=self.cp_group.rank())
            if self.tp.sequence_parallel:
                ids = ids.reshape(self.tp.size, -1)[self.tp.rank]
            packed_seq.plans[key] = to_device(ids, device)
        return packed_seq.plans[key]

    def _loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return chunked_cross_entropy(
            x,
            self.output_weight,
            labels,
            vocab_size=self.config.vocab_size,
            chunk_size=self.loss_chunk_size,
            z_loss=self.z_loss,
            tp=self.tp,
        )


class Stages(nn.Module):
    """The stages that one rank holds in an interleaved pipeline; parameters have the names of the whole model."""

    def __init__(self, chunks: Sequence[GPT]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for chunk in self.chunks:
            yield from chunk.named_parameters(prefix, recurse, remove_duplicate)


def chunks_of(model: GPT | Stages) -> list[GPT]:
    """The stages of a rank: the model itself, unless it holds several."""
    return list(model.chunks) if isinstance(model, Stages) else [model]  # type: ignore[arg-type]
