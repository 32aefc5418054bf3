"""Parameter names as data: the dimension that tensor parallelism shards, and Transformer Engine's names.

A checkpoint holds the canonical names and shapes of `model/torch_layers.py`. Transformer Engine's modules have the same
names, except that `LayerNormMLP` fuses gate and up into one tensor, the gate's rows first. A tp rank's fused tensor is
its shard of the gate above its shard of the up; therefore the canonical tensors are two.
"""

from __future__ import annotations

# Suffix of a matrix's name -> the dimension that tensor parallelism shards. Other parameters are replicated over tp.
TP_DIMS: dict[str, int] = {
    "embedding.weight": 0,
    "lm_head.weight": 0,
    "attention.qkv.weight": 0,
    "attention.output.weight": 1,
    "mlp.gate_weight": 0,
    "mlp.up_weight": 0,
    "mlp.fc2_weight": 1,
}

# Weights replicated over tp that see only the rank's heads, with or without sequence parallelism.
HEAD_NORMS = ("attention.q_norm.weight", "attention.k_norm.weight")


def tp_dim(name: str) -> int | None:
    """The dimension of a parameter that is sharded over tp; None: replicated."""
    return next((dim for suffix, dim in TP_DIMS.items() if name.endswith(suffix)), None)


def is_tp_sharded(name: str) -> bool:
    """Whether tp ranks hold different shards of a parameter."""
    return tp_dim(name) is not None


def needs_tp_grad_sum(name: str, *, sequence_parallel: bool) -> bool:
    """Whether each tp rank computes a partial gradient of a replicated weight, to be summed over tp."""
    return tp_dim(name) is None and (sequence_parallel or name.endswith(HEAD_NORMS))


# Suffix of Transformer Engine's name -> suffixes of the canonical tensors stacked along dim 0.
TE_FUSED: dict[str, tuple[str, ...]] = {
    "mlp.fc1_weight": ("mlp.gate_weight", "mlp.up_weight"),
}


def canonical_names(te_name: str) -> tuple[str, ...]:
    """Canonical names of the tensors in a Transformer Engine parameter, in stacking order."""
    for fused, parts in TE_FUSED.items():
        if te_name.endswith(fused):
            prefix = te_name[: -len(fused)]
            return tuple(prefix + part for part in parts)
    return (te_name,)


def te_name(canonical: str) -> tuple[str, int]:
    """Transformer Engine's name of the parameter that holds a canonical tensor, and the tensor's index in the stack."""
    for fused, parts in TE_FUSED.items():
        for index, part in enumerate(parts):
            if canonical.endswith(part):
                return canonical[: -len(part)] + fused, index
    return canonical, 0
