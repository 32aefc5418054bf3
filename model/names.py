"""What a parameter's name says, as data: where tensor parallelism cuts it, and how Transformer Engine calls it.

A checkpoint holds the canonical names and shapes of `model/torch_layers.py`. Transformer Engine's modules
carry the same names, except that `LayerNormMLP` fuses gate and up in one tensor; its rows are the gate's,
then the up's. A tp rank's fused tensor is its slice of the gate above its slice of the up, which is why
the canonical ones are two.
"""

from __future__ import annotations

# Suffix of a matrix's name -> the dimension that tensor parallelism cuts. Every other parameter is whole on each tp rank.
TP_DIMS: dict[str, int] = {
    "embedding.weight": 0,
    "lm_head.weight": 0,
    "attention.qkv.weight": 0,
    "attention.output.weight": 1,
    "mlp.gate_weight": 0,
    "mlp.up_weight": 0,
    "mlp.fc2_weight": 1,
}

# Weights that are whole on each tp rank and see only its heads, with or without sequence parallelism.
HEAD_NORMS = ("attention.q_norm.weight", "attention.k_norm.weight")


def tp_dim(name: str) -> int | None:
    """The dimension of a parameter that is cut over tp ranks; None where each holds it whole."""
    return next((dim for suffix, dim in TP_DIMS.items() if name.endswith(suffix)), None)


def is_tp_sharded(name: str) -> bool:
    """Whether tp ranks hold different parts of a parameter."""
    return tp_dim(name) is not None


def needs_tp_grad_sum(name: str, *, sequence_parallel: bool) -> bool:
    """Whether a weight that each tp rank holds whole gets only a part of its gradient there, to be summed over tp."""
    return tp_dim(name) is None and (sequence_parallel or name.endswith(HEAD_NORMS))


# Suffix of Transformer Engine's name -> suffixes of the canonical tensors that it stacks along dim 0.
TE_FUSED: dict[str, tuple[str, ...]] = {
    "mlp.fc1_weight": ("mlp.gate_weight", "mlp.up_weight"),
}


def canonical_names(te_name: str) -> tuple[str, ...]:
    """Canonical names of the tensors that make up a Transformer Engine parameter, in stacking order."""
    for fused, parts in TE_FUSED.items():
        if te_name.endswith(fused):
            prefix = te_name[: -len(fused)]
            return tuple(prefix + part for part in parts)
    return (te_name,)


def te_name(canonical: str) -> tuple[str, int]:
    """Transformer Engine's name of the parameter that holds a canonical tensor, and its place in the stack."""
    for fused, parts in TE_FUSED.items():
        for index, part in enumerate(parts):
            if canonical.endswith(part):
                return canonical[: -len(part)] + fused, index
    return canonical, 0
