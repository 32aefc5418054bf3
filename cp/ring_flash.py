"""The ring-flash-attn library as a backend (`--cp-backend ring --ring-attn-func ...`), version 0.1.8.

The library runs over flash-attn on CUDA, over `cp/flash_attn_cpu.py` on CPU. `cp/support.py` refuses its known faults:
gradients of zigzag, ring and stripe are silently wrong in fp32 (a `.to(torch.float32)` aliases a buffer that is then
overwritten), and ring rounds dq to bf16. No dropout, no windows.

The library takes one cu_seqlens, so padding is computed as the end of its document: with a causal mask it changes no
real token. The row's tail is a document of its own.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cp import flash_attn_cpu
from cp.packed_seq import PackedSeq, to_device

DENSE_FUNCTIONS = {
    "zigzag": "zigzag_ring_flash_attn_func",
    "ring": "ring_flash_attn_func",
    "stripe": "stripe_flash_attn_func",
}
VARLEN_FUNCTIONS = {"zigzag": "zigzag_ring_flash_attn_varlen_func", "ring": "ring_flash_attn_varlen_func"}


def load_library(device_type: str) -> types.ModuleType:
    """Import ring_flash_attn without its adapters for transformers, which import names that current releases lack.

    During the import only, an empty module replaces the adapters, and on CPU `cp.flash_attn_cpu` replaces flash-attn.
    """
    if "ring_flash_attn" in sys.modules:
        return sys.modules["ring_flash_attn"]
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None  # type: ignore[attr-defined]
    stand_ins = {"ring_flash_attn.adapters": adapters}
    if device_type == "cpu":
        package = types.ModuleType("flash_attn")
        package.flash_attn_interface = flash_attn_cpu  # type: ignore[attr-defined]
        stand_ins |= {"flash_attn": package, "flash_attn.flash_attn_interface": flash_attn_cpu}
    hidden = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("ring_flash_attn")
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(hidden)


def _varlen_arguments(
    library: types.ModuleType, function: str, packed_seq: PackedSeq, group: dist.ProcessGroup, device: torch.device
) -> dict[str, Any]:
    """The varlen functions' arguments for this row."""
    padded = packed_seq.padded_lengths
    cu_seqlens = torch.zeros(len(padded) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.from_numpy(padded.cumsum())
    if function == "llama3":
        # On the CPU, where the function's .item() calls do not synchronise.
        cu_q, cu_k, max_q, max_k, k_slice = library.llama3_flash_attn_prepare_cu_seqlens(
            cu_seqlens, True, group.rank(), group.size()
        )
        cu_q, cu_k = (to_device(cu.numpy(), device) for cu in (cu_q, cu_k))
        lengths = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k)
        return lengths | {"local_k_slice": k_slice}
    local = to_device((cu_seqlens // group.size()).numpy(), device)
    return dict(cu_seqlens=local, max_seqlen=int(padded.max()) // group.size())


def ring_flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed_seq: PackedSeq,
    group: dist.ProcessGroup,
    *,
    scale: float,
    function: str,
    heads_k_stride: int,
) -> Tensor:
    """Causal attention within each document by one of the library's functions, [t, hq, d].

    Args:
        q: [t, hq, d]; k, v: [t, hkv, d]; t = T / cp_size, in the function's layout.
        function: `zigzag`, `llama3`, `ring` (THD) or `zigzag`, `ring`, `stripe` (BSHD).
    """
    library = load_library(q.device.type)
    common = dict(causal=True, softmax_scale=scale, group=group)
    if packed_seq.qkv_format == "bshd":
        shape = (len(packed_seq.lengths), -1)
        q, k, v = (x.unflatten(0, shape).contiguous() for x in (q, k, v))  # [b, s / cp, h, d]
        return getattr(library, DENSE_FUNCTIONS[function])(q, k, v, **common).flatten(0, 1)
    arguments = packed_seq.cached(
        ("ring_flash", function, q.device), lambda: _varlen_arguments(library, function, packed_seq, group, q.device)
    )
    if function == "llama3":
        return library.llama3_flash_attn_varlen_func(q, k, v, heads_k_stride=heads_k_stride, **arguments, **common)
    q, k, v = (x.contiguous() for x in (q, k, v))
    return getattr(library, VARLEN_FUNCTIONS[function])(q, k, v, **arguments, **common)
