"""Resolves the flags of attention: backend, exchange and layout over --cp-size, packing and alignment of documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from config.advice import multiples
from config.schema import DataConfig, ParallelConfig, RunConfig
from cp import cost, support
from cp.cost import Lengths
from cp.layout import document_unit
from data.packing import PACKINGS, resolve_packing
from utils.errors import SizeError, UserError

# Alignment of documents by default, at most, where each sample can have ranks of its own, and where it cannot.
HYBRID_ALIGNMENTS = (16, 64)
ITEM_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


def resolve_attention(
    config: RunConfig, local_world_size: int, read_lengths: Callable[[], Lengths], chosen: list[str]
) -> None:
    """Choose backend, method and layout, in place; each choice is added to `chosen`.

    Args:
        read_lengths: the corpora's documents, called only for --cp-comm-type auto.

    Raises:
        UserError: flags of another backend, or a combination that is not supported (cp/support.py).
    """
    parallel, model = config.parallel, config.model
    if parallel.cp_backend == "auto":
        parallel.cp_backend = support.resolve_backend("auto", has_te=model.transformer_impl == "te")
        chosen.append(f"--cp-backend {parallel.cp_backend}")
    item = ITEM_BYTES[config.training.dtype]
    request = support.AttentionRequest(
        backend=parallel.cp_backend,
        method=_resolve_method(parallel, chosen),
        qkv_format=config.data.qkv_format,
        layout=parallel.cp_layout,
        dtype=config.training.dtype,
        device=parallel.device,
        cp_size=parallel.cp_size,
        a2a_size=parallel.cp_a2a_size,
        heads_k_stride=parallel.heads_k_stride,
        kv_bytes=2 * config.training.micro_batch_size * config.data.seq_length * model.kv_channels * item,
        head_dim=model.kv_channels,
        heads=model.num_attention_heads // parallel.tp_size,
        groups=max(1, model.num_query_groups // parallel.tp_size),
        dropout=model.attention_dropout,
    )
    if request.method == "auto":
        request = _choose_method(config, request, local_world_size, read_lengths, chosen)
    parallel.attention = support.choose(request)
    stride = parallel.attention.heads_k_stride
    if parallel.heads_k_stride is None and stride > 1 and parallel.cp_size > 1:
        parallel.heads_k_stride = stride
        chosen.append(f"--heads-k-stride {stride}")
    if (parallel.device, parallel.cp_backend) != ("cuda", "native"):
        if parallel.flash_attention in ("3", "4"):
            what = f"--flash-attention {parallel.flash_attention} is for --cp-backend native and --device cuda"
            raise SizeError(what, flash_attention=["auto"])
        if parallel.flash_attention == "auto":
            parallel.flash_attention = "2"
            chosen.append("--flash-attention 2")
    if parallel.cp_layout == "auto":
        parallel.cp_layout = parallel.attention.layout
        chosen.append(f"--cp-layout {parallel.cp_layout}")


def _resolve_method(parallel: ParallelConfig, chosen: list[str]) -> str:
    """The backend's method, from its own flag; the flags of other backends must be open."""
    own_flag = support.METHOD_FLAGS[parallel.cp_backend]
    for flag in dict.fromkeys(support.METHOD_FLAGS.values()):
        value = getattr(parallel, flag.removeprefix("--").replace("-", "_"))
        if flag != own_flag and value not in (None, "auto"):
            owners = " or ".join(backend for backend, theirs in support.METHOD_FLAGS.items() if theirs == flag)
            raise UserError(
                f"{flag} {value} belongs to --cp-backend {owners}, not to {parallel.cp_backend}: leave it out, of the "
                "--config file too"
            )
    name = own_flag.removeprefix("--").replace("-", "_")
    if getattr(parallel, name) is None:
        setattr(parallel, name, support.methods(parallel.cp_backend)[0])
        chosen.append(f"{own_flag} {getattr(parallel, name)}")
    return getattr(parallel, name)


def _choose_method(
    config: RunConfig,
    request: support.AttentionRequest,
    local_world_size: int,
    read_lengths: Callable[[], Lengths],
    chosen: list[str],
) -> support.AttentionRequest:
    """The request with the method of --cp-comm-type auto: by the cost model, of those that the other flags allow."""
    parallel, data, training = config.parallel, config.data, config.training
    first = replace(request, method=support.methods(request.backend)[0])
    legal = support.candidates(request)
    if data.document_alignment is not None:  # a checkpoint's, or the user's
        units = [document_unit(choice.layout, choice.cp_size, training.micro_batch_size) for choice in legal]
        legal = [choice for choice, unit in zip(legal, units, strict=True) if data.document_alignment % unit == 0]
    if not legal:  # the default's refusal says why
        parallel.cp_comm_type = first.method
        return first
    best, reason = legal[0], ""
    if request.cp_size > 1 and len(legal) > 1:
        is_packed = data.qkv_format == "thd" and data.packing != "concat"
        situation = cost.Situation(
            device=parallel.device,
            row_length=training.micro_batch_size * data.seq_length,
            lengths=cost.length_quantiles(read_lengths(), data.seq_length) if is_packed else (data.seq_length,),
            heads=request.heads,
            groups=request.groups,
            head_dim=request.head_dim,
            item=ITEM_BYTES[training.dtype],
            node_ranks=max(1, local_world_size // parallel.tp_size),
        )
        best, reason = cost.choose_method(situation, legal)
    parallel.cp_comm_type = best.method
    chosen.append(f"--cp-comm-type {best.method}" + (f" ({reason})" if reason else ""))
    a2a_size = request.a2a_size
    if best.method == "a2a+p2p" and a2a_size is None:
        a2a_size = parallel.cp_a2a_size = best.a2a_size
        chosen.append(f"--cp-a2a-size {a2a_size}")
    if parallel.cp_layout == "auto":
        parallel.cp_layout = best.layout
        chosen.append(f"--cp-layout {best.layout}")
    return replace(request, method=best.method, a2a_size=a2a_size, layout=best.layout)


def resolve_data_packing(data: DataConfig, chosen: list[str]) -> None:
    if data.packing == "auto":
        data.packing = resolve_packing("auto", data.qkv_format)
        chosen.append(f"--packing {data.packing}")
    legal = PACKINGS[data.qkv_format]
    if data.packing not in legal:
        what = f"--packing {data.packing} is not offered for --qkv-format {data.qkv_format}"
        raise SizeError(what, packing=legal)
    if data.packing_window is not None and data.packing != "best-fit":
        what = f"--packing-window {data.packing_window} is for --packing best-fit, not for {data.packing}"
        raise SizeError(what, packing=["best-fit"])


def resolve_alignment(data: DataConfig, parallel: ParallelConfig, num_samples: int, chosen: list[str]) -> None:
    """Choose --document-alignment, in place; check it and --seq-length against the ranks. `num_samples`: of a row."""
    smallest = document_unit(parallel.cp_layout, parallel.cp_size, num_samples)
    if data.document_alignment is None:
        data.document_alignment = smallest
        if parallel.cp_size == 1 and parallel.cp_layout in ("zigzag", "hybrid"):
            # So that samples do not depend on the cp size more than needed.
            data.document_alignment = 2
        elif parallel.cp_layout == "hybrid":
            # Documents on one rank need no padding, which leaves room to place them.
            most = HYBRID_ALIGNMENTS[smallest > 1]
            wanted = range(min(2 * parallel.cp_size, most), smallest, -1)
            fits = (n for n in wanted if n % smallest == 0 and data.seq_length % n == 0)
            data.document_alignment = next(fits, smallest)
        chosen.append(f"--document-alignment {data.document_alignment}")
    if data.document_alignment % smallest:
        raise SizeError(
            f"--document-alignment {data.document_alignment} is not a multiple of {smallest}, which layout "
            f"{parallel.cp_layout} over --cp-size {parallel.cp_size} needs",
            document_alignment=multiples(data.document_alignment, smallest),
        )
    ranks = parallel.cp_size * parallel.tp_size
    legal = multiples(data.seq_length, math.lcm(data.document_alignment, ranks))
    for unit, name in ((data.document_alignment, "--document-alignment"), (ranks, "cp * tp =")):
        if data.seq_length % unit:
            raise SizeError(f"--seq-length {data.seq_length} is not a multiple of {name} {unit}", seq_length=legal)
