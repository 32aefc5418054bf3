"""Fills in the flags that are still open and refuses what cannot be done, before any process group exists.

Each function takes the groups it reads. A refusal names the flag, the numbers that clash and the nearest legal value.
What was chosen for `auto` or an open flag is collected in `chosen`, one text a flag, for the banner. No torch import.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from config.advice import NPROC, Change, divisors, find_advice, flags_of, multiples, nearest
from config.attention import ITEM_BYTES, resolve_alignment, resolve_attention, resolve_data_packing
from config.outputs import resolve_outputs
from config.progress import resolve_batches, resolve_lr_schedule, resolve_phases
from config.schema import (
    BATCH_FLAGS,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    fields_of_flags,
    format_skip_steps,
    format_split,
    option,
)
from cp.cost import Lengths
from data.sources import document_lengths, find_tokenizer, list_opened, open_sources
from data.tokenizer import load_sentencepiece
from model.config import count_parameters
from parallel.stages import check_schedule, split_layers
from utils.errors import MissingPackageError, SizeError, UserError, is_installed

MAX_WHOLE_GRADIENTS = 8 << 30  # bytes that may live between microbatches
MAX_WHOLE_WEIGHTS = 8 << 30  # bytes that may stay gathered from the forward to the backward pass
FP8_UNIT = 16  # sizes of an 8-bit matrix are multiples of this number


def resolve(
    config: RunConfig,
    *,
    world_size: int,
    local_world_size: int,
    cuda_devices: Callable[[], int],
    resumed: Mapping[str, Any] | None = None,
    lengths: Lengths = None,
) -> list[str]:
    """Give every open flag of `config` its value, in place, and check all flags.

    Args:
        local_world_size: ranks on this node.
        cuda_devices: called only if a CUDA device can be meant.
        resumed: metadata of the checkpoint that the run resumes, whose weights and data order are kept.
        lengths: [documents] lengths for which --cp-comm-type auto chooses; None: those of the prepared corpora.

    Returns:
        What was chosen, one text a flag.

    Raises:
        UserError: the first flag that cannot be used.
    """
    given = copy.deepcopy(config)
    saved, nodes = resumed or {}, max(1, world_size // local_world_size)
    count_devices = functools.cache(cuda_devices)

    @functools.cache
    def read_lengths() -> Lengths:
        if lengths is not None:
            return lengths
        return document_lengths(list_opened(open_sources(given.data.data_path, given.data.json_key)))

    def attempt(change: Change) -> UserError | None:
        trial = copy.deepcopy(given)
        for group, name, flag in fields_of_flags():
            if name in change:
                setattr(getattr(trial, group), name, flag.parse(change[name]) if flag.parse else change[name])
        ranks = change.get(NPROC, local_world_size)
        try:
            _resolve_sizes(trial, ranks * nodes, ranks, count_devices, saved, read_lengths)
            _check_packages(trial)
        except UserError as error:
            return error
        return None

    try:
        chosen = _resolve_sizes(config, world_size, local_world_size, count_devices, saved, read_lengths)
        _check_packages(config)
    except SizeError as error:
        advice = find_advice(error, attempt, config=given, ranks=local_world_size, nodes=nodes, is_resumed=bool(saved))
        kept = " (a resumed run keeps the checkpoint's weights and data order)" if saved else ""
        raise UserError(f"{error.what}{kept}: {advice}") from None
    _resolve_data(config.data, config.training, chosen, is_resumed=bool(saved))
    _resolve_tokenizer(config, chosen)
    resolve_phases(config.data, config.training.batches)
    resolve_outputs(config)
    return chosen


def check_sizes(config: RunConfig, *, world_size: int, local_world_size: int) -> None:
    """Refuse sizes that do not fit `world_size` CUDA ranks, in place, without reading data.

    Raises:
        UserError: the first flag that cannot be used.
    """
    _resolve_sizes(config, world_size, local_world_size, lambda: local_world_size, {}, lambda: None)


def _resolve_sizes(
    config: RunConfig,
    world_size: int,
    local_world_size: int,
    cuda_devices: Callable[[], int],
    saved: Mapping[str, Any],
    read_lengths: Callable[[], Lengths],
) -> list[str]:
    """The part of `resolve` that reads no file but the corpora's indices: sizes, choices, and what `saved` fixes.

    Args:
        saved: the checkpoint's metadata.

    Raises:
        SizeError: other values may mend the refusal.
    """
    chosen: list[str] = []
    parallel, model, data = config.parallel, config.model, config.data
    _resolve_device(config, local_world_size, cuda_devices, chosen)
    _check_bounds(config)
    if saved:
        _keep_checkpoint(config, saved, chosen)
        _check_bounds(config)
    _resolve_grid(parallel, world_size, local_world_size, chosen)
    resolve_model(model, parallel.tp_size, saved.get("model padded_vocab_size"))
    _resolve_implementation(config, chosen)
    resolve_attention(config, local_world_size, read_lengths, chosen)
    resolve_data_packing(data, chosen)
    resolve_alignment(data, parallel, config.training.micro_batch_size, chosen)
    resolve_batches(config.training, parallel, saved, chosen)
    resolve_lr_schedule(config.training, data.seq_length)
    _resolve_resharding(config, chosen)
    _resolve_reduction(config, chosen)
    _check_stages(config)
    return chosen


def _keep_checkpoint(config: RunConfig, saved: Mapping[str, Any], chosen: list[str]) -> None:
    """Give open flags the checkpoint's values; refuse other values than the checkpoint's, all at once.

    `--eval-only --valid-data-path` trains nothing, so data flags may differ there.
    """
    model, training = config.model, config.training
    differing: dict[str, tuple[Any, Any]] = {}  # field -> (its value, the checkpoint's)
    for group, name, flag in fields_of_flags():
        key = {"fixed": option(name), "model": f"model {name}"}.get(flag.on_resume, "")
        if key not in saved:
            continue
        value, kept = getattr(getattr(config, group), name), saved[key]
        if value in (None, "auto") and kept is not None:
            _check_kept(name, kept, "" if flag.parse or flag.choices else 1)
            setattr(getattr(config, group), name, flag.parse(kept) if flag.parse else kept)
            chosen.append(f"{option(name)} {kept} (the checkpoint's)")
        elif flag.on_resume == "fixed" and config.keeps_data_order and name not in config.changeable:
            text = flag.text(value) if flag.parse else value
            _check_kept(name, kept, text)
            if text != kept:
                differing[name] = text, kept
    if type(saved.get("model vocab_size")) is int:
        architecture = dataclasses.asdict(model.architecture(saved["model vocab_size"]))
        for name, value in architecture.items():
            kept = saved.get(f"model {name}", value)
            _check_kept(name, kept, value)
            if name == "padded_vocab_size" and kept != value:
                differing["make_vocab_size_divisible_by"] = model.make_vocab_size_divisible_by, kept
            elif name == "rope_original_seq_length" and not kept:
                continue  # --rope-scaling differs, and the checkpoint's does not read the length
            elif not name.endswith("_dropout") and kept != value:
                differing["init_method_std" if name == "init_std" else name] = value, kept
    dtype = saved.get("weights' dtype", training.parameter_dtype)
    if dtype != training.parameter_dtype:
        differing["dtype"] = training.dtype, dtype if dtype == "fp64" else "auto"
    if differing:
        what = flags_of({name: value for name, (value, _) in differing.items()})
        allowed = "; --new-batch allows another batch" if differing.keys() & BATCH_FLAGS else ""
        error = SizeError(f"{what}: the checkpoint was made with other values{allowed}")
        error.together = {name: kept for name, (_, kept) in differing.items()}
        raise error


def _check_kept(name: str, kept: Any, like: Any) -> None:
    """A value of the checkpoint's metadata is of the flag's type; None: the flag was open."""
    kinds = (int, float) if isinstance(like, (int, float)) else type(like)
    if kept is not None and like is not None and not isinstance(kept, kinds):
        raise UserError(f"{option(name)} {kept!r}: run.json of the checkpoint is corrupted")


def _check_bounds(config: RunConfig) -> None:
    for group, name, flag in fields_of_flags():
        value = getattr(getattr(config, group), name)
        if flag.bound is not None and value is not None and not flag.bound.allows(value):
            raise UserError(f"{option(name)} {value}: must be {flag.bound.words}")


def _resolve_device(
    config: RunConfig, local_world_size: int, cuda_devices: Callable[[], int], chosen: list[str]
) -> None:
    parallel, training = config.parallel, config.training
    if parallel.device != "cpu":
        found = cuda_devices()
        if parallel.device == "cuda" and not found:
            raise SizeError("--device cuda: no CUDA device (or a PyTorch without CUDA)", device=["cpu"])
        if found and local_world_size > found:
            raise SizeError(
                f"{local_world_size} ranks on this node but {found} CUDA devices",
                nproc_per_node=range(found, 0, -1),
                device=["cpu"],
            )
        if parallel.device == "auto":
            parallel.device = "cuda" if found else "cpu"
            chosen.append(f"--device {parallel.device}")
    if training.dtype == "auto":
        training.dtype = "bf16" if parallel.device == "cuda" else "fp32"
        chosen.append(f"--dtype {training.dtype}")
    if config.data.num_workers is None:
        config.data.num_workers = 2 if parallel.device == "cuda" else 0
        chosen.append(f"--num-workers {config.data.num_workers}")
    if training.loss_chunk_size is None:  # each chunk reads and writes the gradient of the whole output matrix
        training.loss_chunk_size = 2048 if parallel.device == "cuda" else 512
        chosen.append(f"--loss-chunk-size {training.loss_chunk_size}")


def _resolve_grid(parallel: ParallelConfig, world_size: int, local_world_size: int, chosen: list[str]) -> None:
    for name in ("pp_size", "dp_replicate_size", "cp_size", "tp_size"):
        if getattr(parallel, name) < 1:
            raise UserError(f"{option(name)} {getattr(parallel, name)}: must be at least 1")
    if parallel.sequence_parallel and parallel.tp_size == 1:
        raise UserError("--sequence-parallel needs --tp-size above 1, which is 1")
    if parallel.sequence_parallel is None:
        parallel.sequence_parallel = parallel.tp_size > 1
        if parallel.tp_size > 1:
            chosen.append("--sequence-parallel")
    _resolve_shards(parallel, world_size, local_world_size, chosen)


def _resolve_shards(parallel: ParallelConfig, world_size: int, local_world_size: int, chosen: list[str]) -> None:
    others = parallel.pp_size * parallel.dp_replicate_size * parallel.cp_size * parallel.tp_size
    if parallel.dp_shard_size == -1:
        if world_size % others:
            raise SizeError(
                f"{world_size} ranks are not a multiple of pp * dp_replicate * cp * tp = {others}",
                nproc_per_node=nearest(range(1, local_world_size + others + 1), local_world_size),
            )
        parallel.dp_shard_size = world_size // others
        chosen.append(f"--dp-shard-size {parallel.dp_shard_size}")
    if parallel.dp_shard_size < 1:
        raise SizeError(f"--dp-shard-size {parallel.dp_shard_size}: must be at least 1, or -1", dp_shard_size=[-1])
    if parallel.world_size != world_size:
        raise SizeError(
            f"the sizes ask for {parallel.world_size} ranks (pp {parallel.pp_size} * dp_replicate "
            f"{parallel.dp_replicate_size} * dp_shard {parallel.dp_shard_size} * cp {parallel.cp_size} * tp "
            f"{parallel.tp_size}) but there are {world_size}",
            nproc_per_node=[-(-parallel.world_size * local_world_size // world_size)],
            dp_shard_size=[-1],
        )


def _resolve_resharding(config: RunConfig, chosen: list[str]) -> None:
    """--reshard-after-forward auto: off under pp, else by the weights of one tp rank, not sharded.

    Under pp each stage would gather its weights for every microbatch and pass.
    """
    parallel, model = config.parallel, config.model
    if parallel.reshard_after_forward != "auto":
        return
    whole = ITEM_BYTES[config.training.dtype] * count_parameters(model.architecture(1)) // parallel.tp_size
    size = f"{whole / 2**30:.3g} GiB of gathered weights a rank"
    if parallel.pp_size > 1:
        value, reason = "off", "--pp-size above 1: weights are gathered once a step"
    elif parallel.dp_shard_size * parallel.cp_size == 1:
        value, reason = "off", "no weight is sharded"
    elif whole <= MAX_WHOLE_WEIGHTS:
        value, reason = "off", size
    else:
        value, reason = "on", f"{size}, above {MAX_WHOLE_WEIGHTS >> 30} GiB"
    parallel.reshard_after_forward = value
    chosen.append(f"--reshard-after-forward {value} ({reason})")


def _resolve_reduction(config: RunConfig, chosen: list[str]) -> None:
    """--reduce-every-microbatch auto: by the gradients of one tp rank's layers, in fp32 and not sharded."""
    parallel, model = config.parallel, config.model
    if parallel.reduce_every_microbatch == "on" and parallel.pp_size > 1:
        raise SizeError(
            f"--reduce-every-microbatch on needs --pp-size 1, not {parallel.pp_size}, whose schedule reduces once",
            reduce_every_microbatch=["off"],
        )
    if parallel.reduce_every_microbatch == "auto":
        whole = 4 * count_parameters(model.architecture(1)) // parallel.tp_size
        is_large = parallel.device == "cuda" and whole > MAX_WHOLE_GRADIENTS and config.num_microbatches > 1
        parallel.reduce_every_microbatch = "on" if is_large and parallel.pp_size == 1 else "off"
        chosen.append(f"--reduce-every-microbatch {parallel.reduce_every_microbatch}")


def _check_stages(config: RunConfig) -> None:
    parallel = config.parallel
    split_layers(
        config.model.num_layers,
        parallel.pp_size * parallel.virtual_stages,
        first=parallel.first_stage_layers,
        last=parallel.last_stage_layers,
    )
    check_schedule(parallel.pp_schedule, parallel.pp_size, parallel.virtual_stages)
    if parallel.pp_size > 1 and config.data.pad_rows == "dynamic":
        raise SizeError(
            f"--pad-rows dynamic needs --pp-size 1, not {parallel.pp_size}, whose stages exchange tensors of one shape",
            pad_rows=["full"],
        )


def resolve_model(model: ModelConfig, tp_size: int, saved_vocab_size: int | None) -> None:
    """Fill in open sizes, in place.

    Args:
        saved_vocab_size: padded vocabulary of the resumed checkpoint, which other multiples may give too.

    Raises:
        SizeError: sizes that do not fit each other.
    """
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        raise SizeError(
            f"--num-attention-heads {heads} is not a multiple of --num-query-groups {groups}",
            num_query_groups=nearest(divisors(heads), groups),
        )
    even = multiples(model.hidden_size, 2 * heads)  # heads have an even number of channels
    if model.kv_channels is None:
        if model.hidden_size % heads:
            raise SizeError(
                f"--hidden-size {model.hidden_size} is not a multiple of --num-attention-heads {heads}",
                hidden_size=even,
                kv_channels=multiples(model.hidden_size // heads, 2),
            )
        model.kv_channels = model.hidden_size // heads
    if model.kv_channels % 2:
        raise SizeError(
            f"--kv-channels {model.kv_channels}: rotary positions need an even number",
            kv_channels=multiples(model.kv_channels, 2),
        )
    if model.ffn_hidden_size is None:
        unit = math.lcm(16, tp_size)
        model.ffn_hidden_size = -(-model.hidden_size * 8 // 3 // unit) * unit
    kv = 2 * groups * model.kv_channels  # ranks that share a key/value head compute an equal part of its channels
    sizes = [size for size in divisors(heads) if groups % size == 0 or (size % groups == 0 and kv % size == 0)]
    if tp_size not in sizes:
        raise SizeError(
            f"--tp-size {tp_size} must divide --num-query-groups {groups}, or be a multiple of it that divides "
            f"--num-attention-heads {heads} and their {kv} key and value channels",
            tp_size=nearest(sizes, tp_size),
        )
    for name in ("ffn_hidden_size", "make_vocab_size_divisible_by"):
        value = getattr(model, name)
        if value % tp_size:
            saved = [saved_vocab_size] if saved_vocab_size and name == "make_vocab_size_divisible_by" else []
            raise SizeError(
                f"{option(name)} {value} is not a multiple of --tp-size {tp_size}",
                **{name: [*multiples(value, tp_size), *saved]},
            )


def _check_packages(config: RunConfig) -> None:
    """Refuse what needs a package that is not installed here. Raises MissingPackageError."""
    parallel, te = config.parallel, "needs Transformer Engine: pip install -r requirements-gpu.txt, or use"
    for what, instead, is_chosen in (
        ("--transformer-impl te", "--transformer-impl torch", config.model.transformer_impl == "te"),
        ("--cp-backend te", "--cp-backend native", parallel.cp_backend == "te"),
    ):
        if is_chosen and not is_installed("transformer_engine"):
            raise MissingPackageError(f"{what} {te} {instead}")
    if parallel.cp_backend == "ring":
        for package in ("ring_flash_attn", *(["flash_attn"] if parallel.device == "cuda" else [])):
            if not is_installed(package):
                name = package.replace("_", "-")
                raise MissingPackageError(
                    f"--cp-backend ring needs the package {name}: pip install it, or use --cp-backend native"
                )


def _resolve_implementation(config: RunConfig, chosen: list[str]) -> None:
    model, device, dtype = config.model, config.parallel.device, config.training.dtype
    if model.transformer_impl == "auto":
        can_run_te = device == "cuda" and dtype == "bf16" and is_installed("transformer_engine")
        model.transformer_impl = "te" if can_run_te else "torch"
        chosen.append(f"--transformer-impl {model.transformer_impl}")
    if model.transformer_impl == "te":
        if device != "cuda":
            what = f"--transformer-impl te runs on --device cuda, not on {device}"
            raise SizeError(what, transformer_impl=["torch"])
        if dtype != "bf16":
            what = f"--transformer-impl te takes --dtype bf16, not {dtype}"
            raise SizeError(what, transformer_impl=["torch"], dtype=["bf16"])
        if model.compile:
            what = "--compile is for --transformer-impl torch, not for te, whose kernels are fused already"
            raise SizeError(what, compile=[False], transformer_impl=["torch"])
    if config.training.offload_activations and config.training.recompute != "full":
        what = f"--offload-activations needs --recompute full, not {config.training.recompute}"
        raise SizeError(what, recompute=["full"], offload_activations=[False])
    if model.fused_kernels is None:
        model.fused_kernels = device == "cuda"
        chosen.append("--fused-kernels" if model.fused_kernels else "--no-fused-kernels")
    if model.fused_kernels and device != "cuda":
        raise SizeError("--fused-kernels needs --device cuda; the CPU has one way to compute", fused_kernels=[False])
    if model.fp8_first_last_bf16 and model.fp8 == "none":
        raise SizeError("--fp8-first-last-bf16 needs --fp8", fp8=["delayed", "current", "block"])
    if model.fp8 != "none":
        _check_fp8(config)


def _check_fp8(config: RunConfig) -> None:
    model, training, parallel = config.model, config.training, config.parallel
    fp8 = f"--fp8 {model.fp8}"
    if model.transformer_impl != "te":
        raise SizeError(
            f"{fp8} needs --transformer-impl te (CUDA, bf16, Transformer Engine), not {model.transformer_impl}",
            transformer_impl=["te"],
            fp8=["none"],
        )
    if model.fp8 == "delayed" and training.recompute != "none":
        what = f"{fp8} cannot go with --recompute {training.recompute}"
        raise SizeError(what, fp8=["current"], recompute=["none"])
    if config.data.pad_rows == "dynamic":
        what = f"{fp8} needs rows of a multiple of {FP8_UNIT} tokens on each rank, not --pad-rows dynamic"
        raise SizeError(what, pad_rows=["full"])
    tp = parallel.tp_size
    query = model.num_attention_heads * model.kv_channels
    key_value = 2 * model.num_query_groups * model.kv_channels
    tokens = training.micro_batch_size * config.data.seq_length
    unit = parallel.cp_size * tp
    channels = multiples(model.kv_channels, FP8_UNIT)
    sizes: list[tuple[str, int, dict[str, list[int]]]] = [
        (
            f"--hidden-size {model.hidden_size}",
            model.hidden_size,
            {"hidden_size": multiples(model.hidden_size, math.lcm(FP8_UNIT, 2 * model.num_attention_heads))},
        ),
        (
            f"--ffn-hidden-size {model.ffn_hidden_size} / --tp-size {tp}",
            model.ffn_hidden_size // tp,
            {"ffn_hidden_size": multiples(model.ffn_hidden_size, FP8_UNIT * tp)},
        ),
        (f"query channels / --tp-size {tp}", query // tp, {"kv_channels": channels}),
        (f"query, key and value channels / --tp-size {tp}", (query + key_value) // tp, {"kv_channels": channels}),
        (
            f"--micro-batch-size {training.micro_batch_size} * --seq-length {config.data.seq_length} / (cp "
            f"{parallel.cp_size} * tp {tp})",
            tokens // unit,
            {"seq_length": multiples(config.data.seq_length, FP8_UNIT * unit)},
        ),
    ]
    for what, size, options in sizes:
        if size % FP8_UNIT:
            raise SizeError(f"{fp8}: {what} = {size} is not a multiple of {FP8_UNIT}", **options)


def _resolve_data(data: DataConfig, training: TrainingConfig, chosen: list[str], *, is_resumed: bool) -> None:
    if training.eval_only and data.data_path is None:
        data.data_path = data.valid_data_path  # nothing is trained
    if not is_resumed and data.valid_data_path and data.data_split is not None and any(data.data_split[1:]):
        raise UserError(
            f"--data-split {format_split(data.data_split)} and --valid-data-path: give one; both name validation data"
        )
    if data.data_split is None:
        data.data_split = (1.0, 0.0, 0.0) if data.valid_data_path else (95.0, 5.0, 0.0)
    if not data.data_split[1] and training.eval_interval and not data.valid_data_path:
        way = "give --valid-data-path" if is_resumed else "give VALID a weight"
        raise UserError(
            f"--data-split {format_split(data.data_split)} leaves nothing to validate on: {way} or use "
            "--eval-interval 0"
        )
    if data.valid_data_path and not training.eval_interval:
        raise UserError("--valid-data-path with --eval-interval 0: nothing would be read from it")
    if any(steps.stop > training.train_iters for steps in data.skip_steps):
        skips = format_skip_steps(data.skip_steps)
        raise UserError(f"--skip-steps {skips}: must end before the last step, --train-iters {training.train_iters}")
    if data.tokenizer_eod is not None and data.tokenizer_model is None:
        raise UserError(f"--tokenizer-eod {data.tokenizer_eod} needs --tokenizer-model, a tokenizer.json")


def _resolve_tokenizer(config: RunConfig, chosen: list[str]) -> None:
    data, model_vocab_size = config.data, config.model.vocab_size
    parts = open_sources(data.data_path, data.json_key)
    valid = open_sources(data.valid_data_path, data.json_key, "--valid-data-path") if data.valid_data_path else []
    found = find_tokenizer(parts, valid, config.tokenizer)
    if found is None:
        load_sentencepiece()
        if model_vocab_size is not None and model_vocab_size < data.tokenizer_vocab_size:
            raise UserError(
                f"--vocab-size {model_vocab_size}: no --tokenizer-model is given, so a tokenizer of "
                f"--tokenizer-vocab-size {data.tokenizer_vocab_size} tokens would be trained; give the model's own"
            )
    begins_with_bos = found is not None and found.bos is not None
    if data.bos is None and begins_with_bos:
        chosen.append("--bos (documents of the prepared corpora begin with BOS)")
    data.bos = begins_with_bos
    if data.eod_id is not None:
        chosen.append("no tokenizer (--eod-id): samples of text and bits per byte are off")
    elif data.tokenizer_type == "auto":
        data.tokenizer_type = found.kind if found else "sentencepiece"
        chosen.append(f"--tokenizer-type {data.tokenizer_type}")
