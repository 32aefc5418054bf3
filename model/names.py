"""How our parameter names and Transformer Engine's correspond, as data.

A checkpoint holds the canonical names and shapes of `model/torch_layers.py`. Transformer Engine's modules
carry the same names, except that `LayerNormMLP` fuses gate and up in one tensor; its rows are the gate's,
then the up's. A tp rank's fused tensor is its slice of the gate above its slice of the up, which is why
the canonical ones are two.
"""

from __future__ import annotations

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
