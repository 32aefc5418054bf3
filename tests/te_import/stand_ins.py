"""Transformer Engine's compiled kernels in plain PyTorch, so that its own Python runs on CPU tensors.

What a GPU would compute is computed here slowly, in float64 where it counts, from the same arguments; everything above
the kernels is the real package: its modules, their autograd, their tensor parallelism, its context-parallel rings and
gathers. What this cannot tell is what the compiled kernels do with the same arguments.

    with on_the_cpu(): ...       # in every rank; gloo's collectives carry CPU tensors
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
import transformer_engine_torch as tex
from torch import Tensor
from transformer_engine.pytorch import cpp_extensions, quantization
from transformer_engine.pytorch.attention.dot_product_attention import utils
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.cpp_extensions import gemm
from transformer_engine.pytorch.ops.basic import rmsnorm
from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer, Float8BlockwiseQTensor
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer, Float8Tensor
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

from model import loss

# What the attention kernels write in the rows of padding, which nothing promises.
GARBAGE = float("nan")


class NoStream:
    """A stream or an event that has nothing to wait for."""

    def __getattr__(self, name: str):
        return lambda *_, **__: None


# ---------------------------------------------------------------------------------------------------
# 8 bits. A Hopper card multiplies rows with rows: what is needed the other way round is kept transposed.

BLOCK = 128


def _in_8_bits(x: Tensor, scale: Tensor, dtype) -> Tensor:
    kind = TE_DType_To_Torch[dtype]
    most = torch.finfo(kind).max
    return (x.float() * scale).clamp(-most, most).to(kind).view(torch.uint8)


def _transposed(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous()


def bgrad_quantize(x: Tensor, quantizer):
    return x.sum(0), quantize(x, quantizer)


def fp8_transpose(x: Tensor, dtype, *, out: Tensor | None = None) -> Tensor:
    return _transposed(x) if out is None else out.copy_(_transposed(x))


def create_empty_quantized_tensor(quantizer, shape, dtype, device, pin_memory):
    assert isinstance(quantizer, (Float8Quantizer, Float8CurrentScalingQuantizer))
    empty = torch.empty(shape, dtype=torch.uint8)
    return _per_tensor(empty, torch.ones(1), quantizer, dtype)


def quantize(x: Tensor, quantizer, out=None, noop=None):
    """A tensor in 8 bits, by the quantizer's own rule."""
    assert out is None and noop is None
    if isinstance(quantizer, Float8BlockQuantizer):
        return _in_blocks(x, quantizer)
    kind = TE_DType_To_Torch[quantizer.dtype]
    largest = x.abs().amax().float().reshape(1)
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(
                largest, op=torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group
            )
        scale = torch.where(largest > 0, torch.finfo(kind).max / largest.clamp(min=quantizer.amax_epsilon), 1.0)
        if quantizer.force_pow_2_scales:
            scale = scale.log2().floor().exp2()
    else:
        assert isinstance(quantizer, Float8Quantizer)
        scale = quantizer.scale.clone()
        quantizer.amax.copy_(torch.maximum(quantizer.amax.view(1), largest).view_as(quantizer.amax))
    return _per_tensor(_in_8_bits(x, scale, quantizer.dtype), scale.reciprocal(), quantizer, x.dtype)


def _per_tensor(data: Tensor, inverse: Tensor, quantizer, dtype: torch.dtype):
    parts = dict(
        data=data if quantizer.rowwise_usage else None,
        data_transpose=_transposed(data) if quantizer.columnwise_usage else None,
        fp8_scale_inv=inverse,
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
    )
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **parts)
    return Float8Tensor(shape=data.shape, dtype=dtype, device=data.device, **parts)


def _blocks_of(x: Tensor, quantizer) -> tuple[Tensor, Tensor]:
    """x [m, k] in 8 bits, and the reciprocal scales of its blocks: of 128 x 128, or of 128 of a row."""
    kind = TE_DType_To_Torch[quantizer.dtype]
    tall = BLOCK if quantizer.block_scaling_dim == 2 else 1
    m, k = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -k % BLOCK, 0, -m % tall))
    tiles = padded.view(padded.shape[0] // tall, tall, padded.shape[1] // BLOCK, BLOCK)
    largest = tiles.abs().amax((1, 3)).clamp(min=quantizer.amax_epsilon)
    scale = torch.where(largest > 0, torch.finfo(kind).max / largest, 1.0)
    if quantizer.force_pow_2_scales:
        scale = scale.log2().floor().exp2()
    data = _in_8_bits(tiles, scale[:, None, :, None], quantizer.dtype).view(padded.shape)[:m, :k].contiguous()
    inverse = scale.reciprocal()
    return data, inverse if tall > 1 else inverse.T.contiguous()


def _in_blocks(x: Tensor, quantizer):
    flat, specs, found = x.reshape(-1, x.shape[-1]), quantizer.inner_tensor_specs(tuple(x.shape)), {}
    for name, is_there, source in (
        ("rowwise", quantizer.rowwise_usage, flat), ("columnwise", quantizer.columnwise_usage, flat.T.contiguous()),
    ):  # fmt: skip
        found |= {f"{name}_data": None, f"{name}_scale_inv": None}
        if is_there:
            data, inverse = _blocks_of(source, quantizer)
            wanted = specs[f"_{name}_scale_inv"][0]
            padded = torch.ones(wanted)
            padded[: inverse.shape[0], : inverse.shape[1]] = inverse
            found |= {f"{name}_data": data.view(specs[f"_{name}_data"][0]), f"{name}_scale_inv": padded}
    common = dict(fp8_dtype=quantizer.dtype, quantizer=quantizer, is_2D_scaled=quantizer.block_scaling_dim == 2)
    if quantizer.internal:
        return Float8BlockwiseQTensorStorage(fake_dtype=x.dtype, **found, **common)
    return Float8BlockwiseQTensor(shape=x.shape, dtype=x.dtype, device=x.device, **found, **common)


def _or_quantized(x: Tensor, quantizer):
    return x if quantizer is None else quantize(x, quantizer)


def _wide(x, by_rows: bool) -> Tensor:
    """A matrix in float64; in 8 bits it must be there the way round that the product needs it."""
    if not isinstance(x, QuantizedTensorStorage):
        return x.double()
    if isinstance(x, Float8TensorStorage):
        assert (x._data if by_rows else x._transpose) is not None, "not kept the way round that is needed"
    else:
        assert (x._rowwise_data if by_rows else x._columnwise_data) is not None, "not kept the way round that is needed"
        if not by_rows:
            x.update_usage(rowwise_usage=False, columnwise_usage=True)
    return x.dequantize(dtype=torch.float32).double()


# ---------------------------------------------------------------------------------------------------
# Layers


def rmsnorm_fwd(x: Tensor, weight: Tensor, eps, out, quantizer, otype, sm_margin, zero_centered_gamma):
    assert out is None and not zero_centered_gamma
    wide = x.double()
    rsigma = (wide.square().mean(-1) + eps).rsqrt()
    return _or_quantized((wide * rsigma[:, None] * weight.double()).to(x.dtype), quantizer), None, rsigma.float()


def rmsnorm_bwd(dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin, zero_centered_gamma):
    wide, scaled = x.double(), dz.double() * gamma.double()
    r = rsigma.double()[:, None]
    dx = r * (scaled - wide * r.square() * (scaled * wide).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz.double() * wide * r).sum(0).to(gamma.dtype)


def generic_gemm(
    a,
    transa,
    b,
    transb,
    out,
    quantizer,
    out_dtype,
    bias,
    bias_type,
    gelu,
    gelu_in,
    grad,
    workspace,
    size,
    accumulate,
    split,
    **_,
):
    """op(b) @ op(a), as cuBLAS's column-major order makes it."""
    assert bias is None and quantizer is None and not gelu and not accumulate
    wide_a, wide_b = _wide(a, transa), _wide(b, not transb).flatten(0, -2)
    product = (wide_b.T if transb else wide_b) @ (wide_a.T if transa else wide_a)
    dtype = TE_DType_To_Torch[out_dtype] if out_dtype is not None else b.dtype
    if out is None:
        return product.to(dtype), None, None, None
    out.copy_(product)
    return out, None, None, None


def swiglu(x: Tensor, quantizer):
    gate, up = x.double().chunk(2, -1)
    return _or_quantized((torch.nn.functional.silu(gate) * up).to(x.dtype), quantizer)


def dswiglu(grad: Tensor, x: Tensor, quantizer):
    wide = x.double().requires_grad_()
    with torch.enable_grad():
        gate, up = wide.chunk(2, -1)
        out = torch.nn.functional.silu(gate) * up
    (found,) = torch.autograd.grad(out, wide, grad.double())
    return _or_quantized(found.to(x.dtype), quantizer)


def _rotated(x: Tensor, angles: Tensor, sign: int) -> Tensor:
    first, second = x.double().chunk(2, -1)
    cos, sin = angles.double().cos(), sign * angles.double().sin()
    return (x.double() * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def fused_rope_forward(t, freqs, start_positions, tensor_format, interleaved, cu_seqlens, cp_size, cp_rank):
    assert (
        start_positions is None
        and cu_seqlens is None
        and not interleaved
        and freqs.shape == (len(t), 1, 1, t.shape[-1])
    )
    return _rotated(t, freqs, 1)


def fused_rope_backward(grad, freqs, start_positions, tensor_format, interleaved, cu_seqlens, cp_size, cp_rank):
    return _rotated(grad, freqs, -1)


# ---------------------------------------------------------------------------------------------------
# Attention. The rows of sequence i are from padded[i] on, as many as cu[i + 1] - cu[i].


def _sequences(x: Tensor, layout, cu: Tensor, padded: Tensor | None) -> list[slice]:
    if layout == tex.NVTE_QKV_Layout.NVTE_BSHD_BSHD_BSHD:
        return [slice(n * x.shape[1], (n + 1) * x.shape[1]) for n in range(len(x))]
    starts = (cu if padded is None else padded)[:-1].tolist()
    return [slice(start, start + n) for start, n in zip(starts, (cu[1:] - cu[:-1]).tolist(), strict=True)]


def _mask(kind, rows: int, keys: int) -> Tensor:
    """What a query may see."""
    names, every = tex.NVTE_Mask_Type, torch.ones(rows, keys, dtype=torch.bool)
    if kind in (names.NVTE_NO_MASK, names.NVTE_PADDING_MASK):
        return every
    if kind in (names.NVTE_CAUSAL_MASK, names.NVTE_PADDING_CAUSAL_MASK):
        return every.tril()
    assert kind in (names.NVTE_CAUSAL_BOTTOM_RIGHT_MASK, names.NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK)
    return every.tril(keys - rows)


def _scores(q: Tensor, k: Tensor, scale: float, seen: Tensor) -> Tensor:
    return torch.einsum("qhd,khd->hqk", q.double(), k.double()).mul(scale).masked_fill(~seen, float("-inf"))


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -3)  # [tokens, h, d]


def fused_attn_fwd(
    max_q,
    max_kv,
    is_training,
    scale,
    dropout,
    fast_zero_fill,
    layout,
    o_format,
    scale_inv_format,
    bias_type,
    mask,
    softmax_type,
    window,
    bottom_right,
    cu_q,
    cu_kv,
    q,
    k,
    v,
    fake_dtype,
    padded_q,
    padded_kv,
    *_,
):
    assert dropout == 0 and window in ((-1, -1), (-1, 0)) and softmax_type == tex.NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX
    flat_q, flat_k, flat_v = _flat(q), _flat(k), _flat(v)
    heads = flat_q.shape[1]
    out, stats = torch.full_like(flat_q, GARBAGE), torch.full((*flat_q.shape[:2], 1), GARBAGE, dtype=torch.float32)
    for rows, keys in zip(_sequences(q, layout, cu_q, padded_q), _sequences(k, layout, cu_kv, padded_kv), strict=True):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        assert n <= max_q and m <= max_kv, (n, max_q, m, max_kv)
        if not m:  # nothing to see
            out[rows], stats[rows] = 0, float("-inf")
            continue
        scores = _scores(flat_q[rows], _repeated(flat_k[keys], heads), scale, _mask(mask, n, m))
        lse = scores.logsumexp(-1)  # [h, q]
        weights = (scores - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp()
        out[rows] = torch.einsum("hqk,khd->qhd", weights, _repeated(flat_v[keys], heads).double()).to(out.dtype)
        stats[rows] = lse.T[..., None].float()
    if layout == tex.NVTE_QKV_Layout.NVTE_BSHD_BSHD_BSHD:
        stats = stats.view(*q.shape[:3], 1).transpose(1, 2).contiguous()  # [b, h, s, 1]
    return [out.view(q.shape), stats, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_q,
    max_kv,
    scale,
    dropout,
    fast_zero_fill,
    layout,
    o_format,
    do_format,
    dqkv_layout,
    scale_inv_format,
    do_scale_inv_format,
    bias_type,
    mask,
    softmax_type,
    window,
    bottom_right,
    deterministic,
    cu_q,
    cu_kv,
    q,
    k,
    v,
    out,
    dout,
    fake_dtype,
    aux,
    padded_q,
    padded_kv,
    *_,
):
    flat_q, flat_k, flat_v, flat_out, flat_dout = (_flat(x) for x in (q, k, v, out, dout))
    stats = aux[0]
    if layout == tex.NVTE_QKV_Layout.NVTE_BSHD_BSHD_BSHD:
        stats = stats.transpose(1, 2).reshape(*flat_q.shape[:2], 1)
    heads, groups = flat_q.shape[1], flat_k.shape[1]
    dq, dk, dv = (torch.full_like(x, GARBAGE) for x in (flat_q, flat_k, flat_v))
    for rows, keys in zip(_sequences(q, layout, cu_q, padded_q), _sequences(k, layout, cu_kv, padded_kv), strict=True):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        if not n or not m:
            dq[rows], dk[keys], dv[keys] = 0, 0, 0
            continue
        wide_k, wide_v = (_repeated(x[keys], heads).double() for x in (flat_k, flat_v))
        scores = _scores(flat_q[rows], wide_k, scale, _mask(mask, n, m))
        weights = (scores - stats[rows, :, 0].T.double()[..., None]).exp()
        above = flat_dout[rows].double()
        of_weights = torch.einsum("qhd,khd->hqk", above, wide_v)
        of_scores = weights * (of_weights - (above * flat_out[rows].double()).sum(-1).T[..., None]) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", of_scores, wide_k).to(dq.dtype)
        for target, found in (
            (dk, torch.einsum("hqk,qhd->khd", of_scores, flat_q[rows].double())),
            (dv, torch.einsum("hqk,qhd->khd", weights, above)),
        ):
            target[keys] = found.unflatten(1, (groups, -1)).sum(2).to(target.dtype)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), None, None


def _half_rows(padded: Tensor, half: int) -> Tensor:
    """Rows of each sequence's first or second half, by a rank's padded running sum."""
    found = []
    for start, end in zip(padded[:-1].tolist(), padded[1:].tolist(), strict=True):
        middle = (start + end) // 2
        found.append(torch.arange(*((start, middle) if half == 0 else (middle, end))))
    return torch.cat(found)


def thd_read_half_tensor(x: Tensor, padded: Tensor, half: int) -> Tensor:
    return x[_half_rows(padded, half)]


def thd_second_half_lse_correction(lse: Tensor, step: Tensor, padded: Tensor, is_packed: bool) -> None:
    assert is_packed  # [h, t], step [h, t / 2]
    rows = _half_rows(padded, 1)
    lse[:, rows] = torch.logaddexp(lse[:, rows], step[:, : len(rows)])


def thd_read_second_half_lse(lse: Tensor, padded: Tensor, is_packed: bool, length: int) -> Tensor:
    assert is_packed
    return lse[:, _half_rows(padded, 1)]


def thd_out_correction(out, step_out, old_lse, lse, step_lse, padded, only_second_half: bool, is_packed: bool) -> None:
    assert is_packed
    rows = _half_rows(padded, 1) if only_second_half else torch.arange(int(padded[-1]))
    old, new = ((x - lse[:, rows]).exp().T[..., None] for x in (old_lse[:, rows], step_lse[:, : len(rows)]))
    out[rows] = (out[rows] * old + step_out.view(-1, *out.shape[1:]) * new).to(out.dtype)


def thd_grad_correction(grad: Tensor, step: Tensor, padded: Tensor, first: str, second: str) -> None:
    halves, at = [(half, what) for half, what in enumerate((first, second)) if what != "none"], 0
    whole = len(step) == len(grad)
    for half, what in halves:
        rows = _half_rows(padded, half)
        part = step[rows] if whole else step
        at += 1
        if what == "zero":
            grad[rows] = 0
        elif what == "copy":
            grad[rows] = part
        else:
            assert what == "add"
            grad[rows] += part
    assert whole or at == 1


def _rank_order(padded: Tensor, cp_size: int) -> Tensor:
    """Rows of the whole, rank by rank, as `thd_get_partitioned_indices` documents its order: chunks r and 2 cp - 1 - r
    of each sequence.
    """
    found = []
    for rank in range(cp_size):
        for start, end in zip(padded[:-1].tolist(), padded[1:].tolist(), strict=True):
            chunk = (end - start) // (2 * cp_size)
            for number in (rank, 2 * cp_size - 1 - rank):
                found.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(found)


def thd_sequence_order_to_cp_rank_order(x: Tensor, padded: Tensor, cp_size: int, tokens: int) -> Tensor:
    return x[_rank_order(padded, cp_size)]


def thd_cp_rank_order_to_sequence_order(x: Tensor, padded: Tensor, cp_size: int, tokens: int) -> Tensor:
    out = torch.empty_like(x)
    out[_rank_order(padded, cp_size)] = x
    return out


def thd_copy_valid_tokens_from_per_split_to_rank_local(out: Tensor, part: Tensor, padded: Tensor, cu: Tensor) -> None:
    for start, length in zip(padded[:-1].tolist(), (cu[1:] - cu[:-1]).tolist(), strict=True):
        out[start : start + length] = part[start : start + length]


# ---------------------------------------------------------------------------------------------------


KERNELS = (
    quantize,
    bgrad_quantize,
    fp8_transpose,
    create_empty_quantized_tensor,
    rmsnorm_fwd,
    rmsnorm_bwd,
    generic_gemm,
    swiglu,
    dswiglu,
    fused_rope_forward,
    fused_rope_backward,
    fused_attn_fwd,
    fused_attn_bwd,
    thd_read_half_tensor,
    thd_second_half_lse_correction,
    thd_read_second_half_lse,
    thd_out_correction,
    thd_grad_correction,
    thd_sequence_order_to_cp_rank_order,
    thd_cp_rank_order_to_sequence_order,
    thd_copy_valid_tokens_from_per_split_to_rank_local,
)


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """A Hopper card that is not there: its kernels are those above, its streams have nothing to wait for."""
    fused = int(utils.FusedAttnBackend["F16_arbitrary_seqlen"])
    named = {kernel.__name__: kernel for kernel in KERNELS}
    card = dict(
        is_available=lambda: True,
        get_device_capability=lambda *_: (9, 0),
        current_device=lambda: torch.device("cpu"),  # where it makes new tensors
        is_current_stream_capturing=lambda: False,
        get_device_properties=lambda *_: SimpleNamespace(major=9, minor=0),
        current_stream=lambda *_: NoStream(),
        Stream=NoStream,
        Event=NoStream,
        stream=lambda *_: nullcontext(),
    )
    with ExitStack() as stack:
        for module in [
            m
            for name, m in sys.modules.items()
            if name.startswith("transformer_engine.") and hasattr(m, "_empty_tensor")
        ]:
            stack.enter_context(mock.patch.object(module, "_empty_tensor", torch.Tensor))
        for module in (tex, cpp_extensions, rmsnorm):  # which import some by name
            here = {name: kernel for name, kernel in named.items() if hasattr(module, name)}
            stack.enter_context(mock.patch.multiple(module, **here))
        stack.enter_context(mock.patch.multiple(torch.cuda, **card))
        stack.enter_context(
            mock.patch.dict(os.environ, {"NVTE_UNFUSED_FP8_UPDATE": "1"})
        )  # scales of delayed scaling, in its plain code
        make = quantization.DelayedScalingRecipeState.__init__
        at_home = lambda self, *a, **k: make(self, *a, **(k | {"device": torch.device("cpu")}))  # noqa: E731
        stack.enter_context(mock.patch.object(quantization.DelayedScalingRecipeState, "__init__", at_home))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
        add_product = lambda total, a, b: total.add_(a @ b)  # noqa: E731  # the CPU has no product with out_dtype
        stack.enter_context(mock.patch.object(loss, "_add_product_", add_product))
        stack.enter_context(mock.patch.object(utils, "_get_fused_attn_backend", lambda **_: (fused, "")))
        # Its filter is asked as for bf16: cuDNN's kernels know no fp32, these do, and show errors that bf16 would hide.
        ask = utils.get_attention_backend
        as_bf16 = lambda asked: ask(replace(asked, qkv_dtype=torch.bfloat16))  # noqa: E731
        stack.enter_context(mock.patch.object(utils, "get_attention_backend", as_bf16))
        stack.enter_context(
            mock.patch.object(gemm, "get_cublas_workspace", lambda *_: torch.empty(1, dtype=torch.uint8))
        )
        yield
