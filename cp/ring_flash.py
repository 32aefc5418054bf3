"""The ring-flash-attn library as a backend (`--cp-backend ring --ring-attn-func ...`), version 0.1.8.

On CUDA over flash-attn; on CPU over `cp/flash_attn_cpu.py`, so that the library's own ring logic is
run by every test. What is known of the library and refused in `cp/support.py`: gradients of zigzag, ring and
stripe are silently wrong in fp32 (a `.to(torch.float32)` that aliases a buffer which is then overwritten), and
ring's dq is rounded to bf16; no dropout, no windows.

The library takes one cu_seqlens, so padding is computed here, as the end of its document: causally that
changes no real token. A row's tail is a document of its own.
"""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cp import flash_attn_cpu
from cp.packed_seq import PackedSeq, to_device
from utils.errors import UserError


def load_library(device_type: str) -> types.ModuleType:
    """Import ring_flash_attn without its adapters for transformers, which ask for names that no current one has.

    For the duration of the import only, an empty module stands where the adapters would be, and on a CPU the
    reference kernels where flash-attn would be.

    Raises:
        ValueError: the library, or on CUDA flash-attn, is not installed.
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
    except ModuleNotFoundError as error:
        raise UserError(
            f"--cp-backend ring: the package {error.name} is not installed: pip install ring-flash-attn==0.1.8"
            + (" flash-attn" if device_type == "cuda" else "")
        ) from error
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(hidden)


@dataclass(frozen=True, eq=False)
class _Plan:
    """Arguments of the varlen functions for this row, prepared once."""

    arguments: dict[str, Any]


def _plan(
    library: types.ModuleType, function: str, packed_seq: PackedSeq, group: dist.ProcessGroup, device: torch.device
) -> _Plan:
    padded = packed_seq.padded_lengths
    cu_seqlens = torch.zeros(len(padded) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.from_numpy(padded.cumsum())
    if function == "llama3":
        # On the CPU, where its .item() calls cost nothing.
        cu_q, cu_k, max_q, max_k, k_slice = library.llama3_flash_attn_prepare_cu_seqlens(
            cu_seqlens, True, group.rank(), group.size()
        )
        return _Plan(
            dict(
                cu_seqlens_q=to_device(cu_q.numpy(), device),
                cu_seqlens_k=to_device(cu_k.numpy(), device),
                max_seqlen_q=max_q,
                max_seqlen_k=max_k,
                local_k_slice=k_slice,
            )
        )
    local = to_device((cu_seqlens // group.size()).numpy(), device)
    return _Plan(dict(cu_seqlens=local, max_seqlen=int(padded.max()) // group.size()))


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
    """Causal attention within each document by one of the library's functions.

    Args:
        q: [t, hq, d]; k, v: [t, hkv, d]; t = T / cp_size, in the layout that `function` needs.
        function: `zigzag`, `llama3`, `ring` (THD) or `zigzag`, `ring`, `stripe` (BSHD).

    Returns:
        [t, hq, d].
    """
    library = load_library(q.device.type)
    common = dict(causal=True, softmax_scale=scale, group=group)
    if packed_seq.qkv_format == "bshd":
        names = {
            "zigzag": "zigzag_ring_flash_attn_func",
            "ring": "ring_flash_attn_func",
            "stripe": "stripe_flash_attn_func",
        }
        sequences = len(packed_seq.lengths)
        q, k, v = (x.unflatten(0, (sequences, -1)).contiguous() for x in (q, k, v))  # [b, s / cp, h, d]
        return getattr(library, names[function])(q, k, v, **common).flatten(0, 1)
    key = ("ring_flash", function, q.device)
    if key not in packed_seq.cache:
        packed_seq.cache[key] = _plan(library, function, packed_seq, group, q.device)
    arguments = packed_seq.cache[key].arguments
    if function == "llama3":
        return library.llama3_flash_attn_varlen_func(q, k, v, heads_k_stride=heads_k_stride, **arguments, **common)
    names = {"zigzag": "zigzag_ring_flash_attn_varlen_func", "ring": "ring_flash_attn_varlen_func"}
    return getattr(library, names[function])(q.contiguous(), k.contiguous(), v.contiguous(), **arguments, **common)
