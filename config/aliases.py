"""Flag names of other suites and what Pentagrid has instead: one-line hints for refusals."""

from __future__ import annotations

from config.peers.columns import SUITES
from config.peers.table import TABLE
from config.schema import fields_of_flags, option

TORCHTITAN = "torchtitan"
# Names that are no other spelling of one flag: (suite, what Pentagrid has).
OTHERS: dict[str, tuple[str, str]] = {
    "bf16": (SUITES["megatron"], "--dtype bf16"),
    "fp16": (SUITES["megatron"], "--dtype bf16"),
    "untie_embeddings_and_output_weights": (SUITES["megatron"], "--no-tie-embeddings, the default"),
    "qk_layernorm": (SUITES["megatron"], "--qk-norm"),
    "use_rope_scaling": (SUITES["megatron"], "--rope-scaling llama3"),
    "recompute_activations": (SUITES["megatron"], "--recompute selective"),
    "recompute_granularity": (SUITES["megatron"], "--recompute"),
    "fp8_format": (SUITES["megatron"], "--fp8 and --transformer-impl te"),
    "fp8_recipe": (SUITES["megatron"], "--fp8"),
    "split": (SUITES["megatron"], "--data-split"),
    "reset_attention_mask": (SUITES["megatron"], "--qkv-format thd, the default"),
    "train_samples": (SUITES["megatron"], "--train-iters, in steps"),
    "swiglu": (SUITES["megatron"], "SwiGLU always"),
    "normalization": (SUITES["megatron"], "RMSNorm always"),
    "position_embedding_type": (SUITES["megatron"], "rotary positions always"),
    "disable_bias_linear": (SUITES["megatron"], "no biases, always"),
    "group_query_attention": (SUITES["megatron"], "--num-query-groups"),
    "calculate_per_token_loss": (SUITES["megatron"], "the loss divided by all labels of the step, always"),
    "use_distributed_optimizer": (SUITES["megatron"], "FSDP2 always; --dp-replicate-size makes replicas"),
    "virtual_pipeline_model_parallel_size": (SUITES["megatron"], "--virtual-stages"),
    "exit_signal_handler": (SUITES["megatron"], "a checkpoint at SIGTERM, always"),
    "sample_packing": (SUITES["axolotl"], "--packing best-fit, the default"),
    "gradient_accumulation_steps": (SUITES["axolotl"], "--global-batch-size, over all ranks"),
    "gradient_checkpointing": (SUITES["axolotl"], "--recompute full"),
    "num_epochs": (SUITES["axolotl"], "--train-iters, in steps"),
    "local_batch_size": (TORCHTITAN, "--micro-batch-size"),
    "training.local_batch_size": (TORCHTITAN, "--micro-batch-size"),
    "training.global_batch_size": (TORCHTITAN, "--global-batch-size"),
    "training.seq_len": (TORCHTITAN, "--seq-length"),
    "training.steps": (TORCHTITAN, "--train-iters"),
    "training.dataset_path": (TORCHTITAN, "--data-path"),
    "training.max_norm": (TORCHTITAN, "--clip-grad"),
    "optimizer.lr": (TORCHTITAN, "--lr"),
    "lr_scheduler.warmup_steps": (TORCHTITAN, "--lr-warmup-iters"),
    "parallelism.context_parallel_degree": (TORCHTITAN, "--cp-size"),
    "parallelism.context_parallel_rotate_method": (TORCHTITAN, "--cp-rotate-method"),
    "parallelism.tensor_parallel_degree": (TORCHTITAN, "--tp-size"),
    "parallelism.pipeline_parallel_degree": (TORCHTITAN, "--pp-size"),
    "parallelism.data_parallel_shard_degree": (TORCHTITAN, "--dp-shard-size"),
    "parallelism.data_parallel_replicate_degree": (TORCHTITAN, "--dp-replicate-size"),
    "activation_checkpoint.mode": (TORCHTITAN, "--recompute"),
    "checkpoint.interval": (TORCHTITAN, "--save-interval"),
    "metrics.log_freq": (TORCHTITAN, "--log-interval"),
}


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
