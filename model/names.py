"""Parameter names as data: which dimension tensor parallelism shards, and which gradients it leaves partial."""

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


def needs_tp_grad_sum(name: str, *, sequence_parallel: bool) -> bool:
    """Whether each tp rank computes a partial gradient of a replicated weight, to be summed over tp."""
    return tp_dim(name) is None and (sequence_parallel or name.endswith(HEAD_NORMS))
