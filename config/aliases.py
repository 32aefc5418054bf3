"""Flag names of other suites and what Pentagrid has instead: one-line hints for refusals."""

from __future__ import annotations

from config.peers.columns import SUITES
from config.peers.table import TABLE
from config.schema import fields_of_flags, option

TORCHTITAN = "torchtitan"
# Names that are no other spelling of one flag -> what Pentagrid has. They were looked up in Megatron-LM d98e8a64d,
# Axolotl 067b021c8 and torchtitan b5bcd76c6; torchtitan's last six are of its earlier releases.
HINTS: dict[str, dict[str, str]] = {
    SUITES["megatron"]: {
        "bf16": "--dtype bf16",
        "fp16": "--dtype bf16",
        "untie_embeddings_and_output_weights": "--no-tie-embeddings, the default",
        "qk_layernorm": "--qk-norm",
        "use_rope_scaling": "--rope-scaling llama3",
        "recompute_activations": "--recompute selective",
        "recompute_granularity": "--recompute",
        "fp8_format": "--fp8 and --transformer-impl te",
        "fp8_recipe": "--fp8",
        "split": "--data-split",
        "reset_attention_mask": "--qkv-format thd, the default",
        "train_samples": "--train-iters, in steps",
        "swiglu": "SwiGLU always",
        "normalization": "RMSNorm always",
        "position_embedding_type": "rotary positions always",
        "disable_bias_linear": "no biases, always",
        "group_query_attention": "--num-query-groups",
        "calculate_per_token_loss": "the loss divided by all labels of the step, always",
        "use_distributed_optimizer": "FSDP2 always; --dp-replicate-size makes replicas",
        "virtual_pipeline_model_parallel_size": "--virtual-stages",
        "exit_signal_handler": "a checkpoint at SIGTERM, always",
    },
    SUITES["axolotl"]: {
        "sample_packing": "--packing best-fit, the default",
        "gradient_accumulation_steps": "--global-batch-size, over all ranks",
        "gradient_checkpointing": "--recompute full",
        "num_epochs": "--train-iters, in steps",
    },
    TORCHTITAN: {
        "training.num_tokens_per_microbatch_per_dp_rank": "--micro-batch-size, in samples of --seq-length tokens",
        "training.num_tokens_per_train_step": "--global-batch-size, in samples of --seq-length tokens",
        "training.max_context_length": "--seq-length",
        "training.steps": "--train-iters",
        "training.max_norm": "--clip-grad",
        "training.mixed_precision_param": "--dtype",
        "lr_scheduler.warmup_steps": "--lr-warmup-iters",
        "lr_scheduler.decay_type": "--lr-decay-style",
        "lr_scheduler.min_lr_factor": "--min-lr, not a share of --lr",
        "parallelism.context_parallel_degree": "--cp-size",
        "parallelism.tensor_parallel_degree": "--tp-size",
        "parallelism.enable_sequence_parallel": "--sequence-parallel",
        "parallelism.pipeline_parallel_degree": "--pp-size",
        "parallelism.pipeline_parallel_schedule": "--pp-schedule",
        "parallelism.data_parallel_shard_degree": "--dp-shard-size",
        "parallelism.data_parallel_replicate_degree": "--dp-replicate-size",
        "parallelism.fsdp_reshard_after_forward": "--reshard-after-forward",
        "compile.enable": "--compile",
        "checkpoint.interval": "--save-interval",
        "checkpoint.folder": "--save",
        "checkpoint.keep_latest_k": "--keep-checkpoints",
        "checkpoint.async_mode": "--async-save",
        "metrics.log_freq": "--log-interval",
        "validator.freq": "--eval-interval",
        "validator.steps": "--eval-iters",
        "debug.seed": "--seed",
        "dump_folder": "--run-dir",
        "hf_assets_path": "--tokenizer-model, a file",
        "training.local_batch_size": "--micro-batch-size",
        "training.global_batch_size": "--global-batch-size",
        "training.seq_len": "--seq-length",
        "training.dataset_path": "--data-path",
        "parallelism.context_parallel_rotate_method": "--cp-rotate-method",
        "activation_checkpoint.mode": "--recompute",
    },
}
OTHERS = {name: (suite, hint) for suite, hints in HINTS.items() for name, hint in hints.items()}


def find_counterpart(word: str) -> tuple[str, str] | None:
    """(suite, what Pentagrid has instead) of another suite's flag or key; None: no suite's.

    Args:
        word: with or without leading dashes, with dashes or underscores.
    """
    name = word.lstrip("-").replace("-", "_")
    if name in OTHERS:
        return OTHERS[name]
    flags = {field for _, field, _ in fields_of_flags()}
    for suite in ("megatron", "axolotl", "nemo"):
        for concept in TABLE:
            column = concept.columns.get(suite)
            if concept.name in flags and column is not None and name in column.keys:
                return SUITES[suite], option(concept.name)
    return None
