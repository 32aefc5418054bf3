"""One training step of each peer's context parallelism over this rank's shard, by the peer's own code.

Each function takes (model, row, mesh) and returns what its trainer would report as the loss, after leaving in the
model's gradients what its trainer's backward pass leaves, before FSDP2 or DDP average them over the cp ranks.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tests.peers.rows import IGNORED, VOCAB, Row


def mean_over_ranks(x: Tensor) -> float:
    """What Hugging Face's Trainer logs: the mean of the ranks' losses."""
    x = x.detach().double().clone()
    dist.all_reduce(x, dist.ReduceOp.SUM)
    return x.item() / dist.get_world_size()


# ---------------------------------------------------------------------------------------------------
# Axolotl: its context manager around the model, as axolotl/train.py enters it; the loss is the model's own


def validate_axolotl(cp_size: int, **keys: Any) -> Any:
    """A configuration that passed axolotl's validator, which also adds names to transformers for ring_flash_attn."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    return AxolotlInputConfig(
        base_model="none", datasets=[{"path": "none", "type": "alpaca"}], attn_implementation="flash_attention_2",
        micro_batch_size=1, learning_rate=1e-4, context_parallel_size=cp_size,
        **{"gradient_accumulation_steps": 1} | keys,
    )  # fmt: skip


def axolotl(model: Any, row: Row, mesh: DeviceMesh, *, train: bool = True, **keys: Any) -> float:
    config = validate_axolotl(mesh.size(), **keys)
    from axolotl.utils.ctx_managers.sequence_parallel import SequenceParallelContextManager

    manager = SequenceParallelContextManager(
        models=[model], context_parallel_size=mesh.size(), ring_attn_func=config.ring_attn_func,
        gradient_accumulation_steps=config.gradient_accumulation_steps, heads_k_stride=config.heads_k_stride,
        gather_outputs=False, device_mesh=mesh,
    )  # fmt: skip
    model.train(train)
    with manager, torch.set_grad_enabled(train):
        batch = dict(input_ids=row.tokens, labels=row.labels, position_ids=row.positions)
        # Trainer counts the labels of the batch; axolotl's hook replaces the count.
        count = (row.labels != IGNORED).sum()
        loss = model(**{name: x[None].clone() for name, x in batch.items()}, num_items_in_batch=count).loss
        if train:
            loss.backward()
    return mean_over_ranks(loss)


# ---------------------------------------------------------------------------------------------------
# NeMo AutoModel: its sharder, its loss and the scaling of recipes/llm/train_ft.py; labels come shifted from its data


def _nemo_loss(model: Any, labels: Tensor, count: int, ranks: int, **batch: Any) -> float:
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

    loss = MaskedCrossEntropy()(model(**batch).logits, labels, num_label_tokens=count)
    (loss * ranks).backward()
    return mean_over_ranks(loss) * ranks  # the recipe sums over the data and cp ranks


def nemo_torch(model: Any, row: Row, mesh: DeviceMesh) -> float:
    from nemo_automodel.components.distributed.context_parallel.sharder import ContextParallelSharder
    from nemo_automodel.components.distributed.context_parallel.utils import attach_context_parallel_hooks

    attach_context_parallel_hooks(model)
    batch = dict(input_ids=row.tokens, labels=row.targets, position_ids=row.positions)
    batch = {name: x[None].clone() for name, x in batch.items()}
    context, batch = ContextParallelSharder(model, mesh, batch).shard(batch)
    with context():
        labels = batch.pop("labels")
        return _nemo_loss(model, labels, int((row.targets != IGNORED).sum()), mesh.size(), use_cache=False, **batch)


def one_rank(model: Any, row: Row, mesh: DeviceMesh) -> float:
    """No context parallelism: every rank computes the whole row under an explicit mask. The table's noise floor."""
    seen = (row.documents[:, None] == row.documents[None, :]).tril()
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, float("-inf"))[None, None]
    batch = dict(input_ids=row.tokens[None], position_ids=row.positions[None], attention_mask=mask)
    logits = model(**batch, use_cache=False).logits[0]
    loss = torch.nn.functional.cross_entropy(logits.float(), row.targets, ignore_index=IGNORED)
    loss.backward()
    return loss.item()


def nemo_blockdiag(model: Any, row: Row, mesh: DeviceMesh, *, exchange: str, kernel: str) -> float:
    from nemo_automodel.components.distributed.blockdiag_cp import (
        configure_cp_varlen,
        make_cp_blockdiag_batch_and_ctx,
        state,
    )

    os.environ["LOCAL_WORLD_SIZE"] = str(mesh.size())  # one node, where its needed-only exchanges are allowed
    configure_cp_varlen(attn_backend=kernel, kv_exchange=exchange)
    batch = dict(input_ids=row.tokens, labels=row.targets, position_ids=row.positions, _packed_seq_ids=row.documents)
    batch = {name: x[None].clone() for name, x in batch.items()}
    context, batch, _ = make_cp_blockdiag_batch_and_ctx(mesh, None, batch)
    count, inputs = int((row.targets != IGNORED).sum()), {name: batch[name] for name in ("input_ids", "position_ids")}
    with context():
        loss = _nemo_loss(model, batch["labels"], count, mesh.size(), use_cache=False, **inputs)
        metadata = state._CP_BLOCKDIAG_STATE.get()["varlen_meta"]
    taken = metadata.get("_needed_only_diagnostic", {"path": "allgather"})["path"]
    assert taken == exchange or (exchange, taken) == ("halo", "a2a"), f"{taken} instead of {exchange}"
    return loss


def blockdiag_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **_: Any) -> Any:
    """The call that a model of NeMo's makes: local q, k, v [b, h, s / cp, d] to its exchange."""
    from nemo_automodel.components.distributed.blockdiag_cp import cp_blockdiag_sdpa

    out = cp_blockdiag_sdpa(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


# ---------------------------------------------------------------------------------------------------
# Hugging Face: accelerate's hooks and context, with the inputs that transformers' Trainer prepares


def accelerate(model: Any, row: Row, mesh: DeviceMesh) -> float:
    """accelerate's hooks and PyTorch's context_parallel, as TRL's report 6843 ran them."""
    from accelerate.big_modeling import _attach_context_parallel_hooks
    from torch.distributed.tensor.experimental import context_parallel

    _attach_context_parallel_hooks(model)
    batch = dict(input_ids=row.tokens, labels=row.labels, shift_labels=row.targets, position_ids=row.positions)
    batch = {name: x[None].clone() for name, x in batch.items()}
    buffers = list(batch.values())
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * 4, no_restore_buffers=set(buffers)):
        count = (row.targets != IGNORED).sum()
        loss = model(**batch, num_items_in_batch=count, use_cache=False).loss * mesh.size()
        loss.backward()
    return mean_over_ranks(loss)


def _launch_variables() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def _trainer_arguments(folder: str, size: int) -> dict[str, Any]:
    """One step without an update; FSDP2 averages the gradients."""
    from accelerate import ParallelismConfig

    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return dict(
        output_dir=folder, use_cpu=True, max_steps=1, per_device_train_batch_size=1, max_grad_norm=0.0, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, learning_rate=0.0, fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        parallelism_config=ParallelismConfig(cp_size=size),
    )  # fmt: skip


def _run_trainer(trainer: Any) -> float:
    from transformers import TrainerCallback

    class KeepGradients(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            model.averaged = {name: x.grad.full_tensor() for name, x in model.named_parameters()}

    trainer.add_callback(KeepGradients())
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def trainer(model: Any, row: Row, mesh: DeviceMesh) -> float:
    """A step of transformers' Trainer with accelerate's ParallelismConfig."""
    from transformers import Trainer, TrainingArguments

    batch = dict(input_ids=row.tokens, labels=row.labels, position_ids=row.positions)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**_trainer_arguments(folder, mesh.size()))
        collator = lambda samples: {name: x[None].clone() for name, x in samples[0].items()}  # noqa: E731
        return _run_trainer(Trainer(model, arguments, collator, [batch]))


def sft_trainer(model: Any, row: Row, mesh: DeviceMesh) -> float:
    """A step of TRL's SFTTrainer, which packs the documents itself, longest first."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {str(token): token for token in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), pad_token="0", eos_token="1"
    )
    documents = [{"input_ids": document.tolist()} for document in row.tokens.split(row.lengths)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            **_trainer_arguments(folder, mesh.size()), packing=True, max_length=len(row.tokens), shuffle_dataset=False,
            bf16=False, gradient_checkpointing=False, loss_type="nll",
        )  # fmt: skip
        data = Dataset.from_list(documents)
        return _run_trainer(SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer))
