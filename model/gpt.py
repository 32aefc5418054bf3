"""The GPT: embedding, layers, final norm, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cp.attention import Attention
from cp.packed_seq import PackedSeq, to_device
from model.config import GPTConfig
from model.dropout import HiddenDropout
from model.layers import get_layers
from model.loss import chunked_cross_entropy
from model.rope import rotary_frequencies
from model.transformer import GPTOptions, RowContext, TransformerLayer
from parallel.tensor import TensorParallel


@dataclass
class PipelineInputs:
    """One step's microbatches, which a pipeline stage indexes by microbatch number.

    Attributes:
        loss_tokens: labelled tokens of the whole step, the divisor of the loss.
        cross_entropy: sum that the last stage adds to.
    """

    tokens: Sequence[Tensor]
    labels: Sequence[Tensor]
    packed_seqs: Sequence[PackedSeq]
    loss_tokens: Tensor
    cross_entropy: Tensor


class OutputLayer(nn.Module):
    """The head of untied embeddings: [padded vocabulary / tp, h]. FSDP gathers the weight around `forward`."""

    def __init__(self, padded_vocab_size: int, hidden_size: int, *, dtype: torch.dtype, tp: TensorParallel) -> None:
        super().__init__()
        rows = tp.divide(padded_vocab_size, "padded vocabulary")
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=dtype))

    def forward(self, x: Tensor, use: Callable[[Tensor, Tensor], Any]) -> Any:
        """use(x, weight): the loss, or logits."""
        return use(x, self.weight)


class GPT(nn.Module):
    """A decoder over this rank's tokens of one row, or one pipeline stage of the decoder.

    Args:
        attention: from `cp.attention.build_attention`.
        cp_group: the ranks that hold the other shards of the row.
        tp: the ranks that share each matrix; None: this rank alone.
        layers: numbers of this stage's layers; None: all. The first stage holds the embedding, the last the output.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        attention: Attention,
        cp_group: dist.ProcessGroup,
        options: GPTOptions,
        tp: TensorParallel | None = None,
        layers: range | None = None,
    ) -> None:
        super().__init__()
        self.config, self.options, self.cp_group = config, options, cp_group
        self.tp = tp = tp or TensorParallel()
        layers = range(config.num_layers) if layers is None else layers
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.num_layers
        self.compute_dtype, self.precision = options.compute_dtype or options.dtype, options.precision
        self.pipeline_inputs: PipelineInputs | None = None  # set for a step under a pipeline schedule
        self.microbatch = 0  # set by the schedule before each forward
        impl, dtype, hidden_size = get_layers(options.implementation), options.dtype, config.hidden_size
        self.rotary_tables = impl.rotary_tables
        self.embedding = self.final_norm = self.lm_head = None
        if self.is_first or (self.is_last and config.tie_embeddings):  # tied: the last stage holds a copy
            self.embedding = impl.VocabParallelEmbedding(config.padded_vocab_size, hidden_size, dtype=dtype, tp=tp)
        self.layers = nn.ModuleDict(  # keyed by number in the whole model: names do not depend on the stage
            {str(n): TransformerLayer(config, n, attention=attention, tp=tp, options=options) for n in layers}
        )
        self.after_embedding = HiddenDropout(config.hidden_dropout, seed=options.dropout_seed, name="embedding")
        if self.is_last:
            self.final_norm = impl.RMSNorm(hidden_size, eps=config.norm_epsilon, dtype=dtype)
            if not config.tie_embeddings:
                self.lm_head = OutputLayer(config.padded_vocab_size, hidden_size, dtype=dtype, tp=tp)

    def edge_units(self) -> dict[str, Any]:
        """What `shard_model` gathers apart from the layers. A tied table stays with the root: both ends need it."""
        if self.config.tie_embeddings:
            return {}
        return {"lookup": self.embedding, "head": (self.final_norm, self.lm_head) if self.is_last else ()}

    def compile_layers(self) -> None:
        """torch.compile each layer except its attention."""
        for layer in self.layers.values():
            layer.compile_parts()  # type: ignore[operator]

    def is_copy(self, name: str) -> bool:
        """Whether the parameter is this stage's copy of a weight that another stage owns."""
        return name == "embedding.weight" and not self.is_first

    def forward(
        self,
        x: Tensor,
        packed_seq: PackedSeq | None = None,
        labels: Tensor | None = None,
        logits_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """The loss of this rank's tokens, logits, or the hidden state for the next stage.

        Args:
            x: [t] int64 tokens on the first stage, else the previous stage's hidden state.
            labels: [t] int64, already shifted; `IGNORE_LABEL` where no loss is wanted.
            logits_rows: [n] indices into this rank's tokens; their logits replace the loss.

        Returns:
            Before the last stage: the hidden state [t, h], or [t / tp, h] with sequence parallelism.
            With `labels`: (loss sum to differentiate, cross-entropy sum without gradient).
            With `logits_rows`: logits [n, vocab_size].
            With `pipeline_inputs` set: this microbatch's part of the step's mean loss, [1].
        """
        if self.pipeline_inputs is not None:
            return self._forward_microbatch(x, self.pipeline_inputs, self.microbatch)
        assert packed_seq is not None
        x = self._hidden(x, packed_seq)
        if not self.is_last:
            return x
        assert (labels is None) != (logits_rows is None), "labels or logits_rows, not both"
        if logits_rows is not None:
            logits = self._output(x, lambda x, weight: self.tp.gather_columns(x[logits_rows] @ weight.T))
            return logits[:, : self.config.vocab_size]
        assert labels is not None
        return self._loss(x, labels)

    def _forward_microbatch(self, x: Tensor, inputs: PipelineInputs, number: int) -> Tensor:
        x = self._hidden(inputs.tokens[number] if self.is_first else x, inputs.packed_seqs[number])
        if not self.is_last:
            return x
        loss_sum, cross_entropy = self._loss(x, inputs.labels[number])
        inputs.cross_entropy += cross_entropy
        return torch.stack([loss_sum / inputs.loss_tokens.to(loss_sum.dtype)])  # a view would lose FSDP's hook

    def _hidden(self, x: Tensor, packed_seq: PackedSeq) -> Tensor:
        """This stage's output; on the last stage after the final norm, [t, h] with all tokens on every tp rank."""
        token_ids = self._token_ids(packed_seq, x.device) if self.config.hidden_dropout and self.training else None
        if self.is_first:
            assert self.embedding is not None
            x = self.embedding(x)  # [t, h], or [t / tp, h] with sequence parallelism
            x = self.after_embedding(x, token_ids)
        table_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        positions = packed_seq.positions
        frequencies = rotary_frequencies(self.config, positions.device)
        rotary = self.rotary_tables(positions, frequencies, dtype=table_dtype)
        row = RowContext(packed_seq, self.cp_group, rotary, token_ids)
        with self.precision.model_context() if self.training else nullcontext():
            for layer in self.layers.values():
                x = layer(x, row)
        return self.tp.enter_parallel_region(self.final_norm(x)) if self.final_norm is not None else x

    def _token_ids(self, packed_seq: PackedSeq, device: torch.device) -> Tensor:
        """Ids of the tokens in this rank's residual stream, [t] or [t / tp]; cached per row and device."""

        def build() -> Tensor:
            ids, _ = packed_seq.token_ids_and_positions(cp_size=self.cp_group.size(), cp_rank=self.cp_group.rank())
            return to_device(ids.reshape(self.tp.size, -1)[self.tp.rank] if self.tp.sequence_parallel else ids, device)

        return packed_seq.cached(("token ids", device), build)

    def _loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = dict(chunk_size=self.options.loss_chunk_size, z_loss=self.options.z_loss, tp=self.tp)

        def loss(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return chunked_cross_entropy(x, weight, labels, vocab_size=self.config.vocab_size, **options)

        return self._output(x, loss)

    def _output(self, x: Tensor, use: Callable[[Tensor, Tensor], Any]) -> Any:
        """use(x, weight [padded vocabulary / tp, h] of the output layer), where FSDP has gathered the weight."""
        if self.lm_head is not None:
            return self.lm_head(x, use)
        assert self.embedding is not None
        return use(x, self.embedding.weight)


class Stages(nn.Module):
    """The stages that one rank holds in an interleaved pipeline. Parameters have their names in the whole model."""

    def __init__(self, chunks: Sequence[GPT]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for chunk in self.chunks:
            yield from chunk.named_parameters(prefix, recurse, remove_duplicate)


def get_chunks(model: GPT | Stages) -> list[GPT]:
    """This rank's stages: the chunks of `Stages`, or the one model."""
    return list(model.chunks) if isinstance(model, Stages) else [model]  # type: ignore[arg-type]
