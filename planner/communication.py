"""Bytes that a rank sends in a step, by axis: formulas, which benchmarks/cp_attention.py holds against counted bytes for cp."""

from __future__ import annotations

from config.schema import RunConfig
from cp.native_a2a import kv_copies
from cp.support import AttentionChoice
from model.config import GPTConfig

ITEM = {"bf16": 2, "fp32": 4, "fp64": 8}


def cp_bytes(
    choice: AttentionChoice, *, tokens: int, heads: int, groups: int, head_dim: int, item: int
) -> tuple[int, int]:
    """Of one layer and microbatch, forward and backward.

    K and V of a rank, kv = 2 * t * hkv * d elements, reach cp-1 other ranks in either pass, in the inputs' dtype;
    their gradients travel in fp32. A ring sends a shard's gradient in every one of cp steps, the last one home;
    a reduce-scatter sends each rank cp-1 parts. An exchange over A ranks keeps 1/A of q, k, v and out, with hkv raised to
    a multiple of A, and the same of their gradients; the ring that is left has cp/A ranks of A times the
    tokens and 1/A of the heads, so kv is as above, with hkv raised. llama3 reduce-scatters in the inputs' dtype.

    Args:
        tokens: t, of this rank.
        heads, groups: of this rank's tp part.
        item: bytes of an input number.
    """
    trade = choice.a2a_size
    kv_heads = groups * (kv_copies(groups, trade) if trade > 1 else 1)
    kv = 2 * tokens * kv_heads * head_dim
    traded = tokens * (2 * heads + 2 * kv_heads) * head_dim * item * (trade - 1) // trade
    ring = choice.cp_size // trade
    forward = (ring - 1) * kv * item
    if choice.method == "all_gather":
        gradients = (ring - 1) * kv * 4
    elif choice.method == "llama3":
        gradients = (ring - 1) * kv * item
    else:
        gradients = ring * kv * 4 if ring > 1 else 0
    return traded + forward, traded + forward + gradients


def step_bytes(config: RunConfig, architecture: GPTConfig, *, parameters: int, layers: int) -> dict[str, int]:
    """Of one rank in one step, by axis; scalars (norm, loss, agreement) left out.

    Args:
        config: resolved flags.
        parameters: of this rank's pipeline stage and tp part, before sharding.
        layers: of this rank.
    """
    item, stored = ITEM[config.training.dtype], 8 if config.training.dtype == "fp64" else 4
    microbatches = config.num_microbatches
    tokens = config.training.micro_batch_size * config.data.seq_length // config.parallel.cp_size
    forwards = {"none": 1, "selective": 1, "full": 2}[config.training.recompute]
    heads, groups = (
        architecture.num_attention_heads // config.parallel.tp_size,
        architecture.num_query_groups // config.parallel.tp_size,
    )
    forward, backward = (
        cp_bytes(
            config.parallel.attention,
            tokens=tokens,
            heads=heads,
            groups=groups,
            head_dim=architecture.kv_channels,
            item=item,
        )
        if config.parallel.cp_size > 1
        else (0, 0)
    )
    sent = {"cp": microbatches * layers * (forwards * forward + backward)}

    fsdp, replicas = config.parallel.dp_shard_size * config.parallel.cp_size, config.parallel.dp_replicate_size
    gathers = 2 * microbatches if config.parallel.reshard_after_forward == "on" else 1
    # A gather sends a rank's shard to all others; a reduce-scatter sends each other rank its part.
    sent["fsdp"] = (fsdp - 1) * parameters // fsdp * (gathers * item + stored)
    sent["dp_replicate"] = 2 * (replicas - 1) * (parameters // fsdp) * stored // replicas

    n, stream = config.parallel.tp_size, tokens * architecture.hidden_size * item
    # Two entries and two exits a layer, each an all-gather or a reduce-scatter, or half as many all-reduces of twice the bytes.
    per_pass = 4 * stream * (n - 1) // n
    again = {"none": 0, "selective": per_pass // 2, "full": per_pass}[config.training.recompute]
    sent["tp"] = microbatches * layers * (2 * per_pass + again)
    boundary = stream // (n if config.parallel.sequence_parallel else 1)
    sent["pp"] = 2 * microbatches * config.parallel.virtual_stages * boundary if config.parallel.pp_size > 1 else 0
    return {axis: amount for axis, amount in sent.items() if amount}
