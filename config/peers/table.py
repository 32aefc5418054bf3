"""The table of correspondences: each setting of a run, its key in every suite, and how values are converted.

Every direction of tools/migrate.py is made from these rows: a suite's keys are read into concepts, and concepts are
written as the other suite's keys. A concept that Pentagrid has a flag for has the flag's name. Rows are walked in
order; a converter sees the concepts of the rows above. Keys and defaults were read in Axolotl 067b021c8, NeMo AutoModel
36044ad3d, Megatron-LM d98e8a64d and transformers 5.24.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from config.peers.columns import Concept
from config.peers.data import DATA, SAMPLES
from config.peers.layout import ATTENTION, RANKS
from config.peers.model import MODEL
from config.peers.output import OUTPUT
from config.peers.training import TRAINING

TABLE: tuple[Concept, ...] = (*RANKS, *MODEL, *DATA, *SAMPLES, *ATTENTION, *TRAINING, *OUTPUT)

# Keys without a row: what they are -> their names, as patterns of a shell. NOT_NEEDED: the mathematics of a run do not
# depend on them. NO_COUNTERPART: they do, unless the value is false, none or 0.
NOT_NEEDED: dict[str, dict[str, str]] = {
    "nemo": {
        "how the recipe's authors test and launch": "ci.* skypilot.* slurm.* benchmark.* dist_env.*",
        "the program that reads the recipe": "recipe recipe._target_ model._target_ model.config._target_",
        "the loop": (
            "step_scheduler.gc_every_steps step_scheduler.log_remote_every_steps step_scheduler.loss_average_* "
            "step_scheduler.save_checkpoint_every_epoch rng._target_ rng.ranked nvtx dataloader.* "
            "validation_dataloader.*"
        ),
        "cross-entropy of the next token, in each suite": "loss_fn.*",
        "format of checkpoints": "checkpoint.*",
        "AdamW with fp32 moments": (
            "optimizer.adam_w_mode optimizer.bias_correction optimizer.master_weights optimizer.store_param_remainders "
            "optimizer.exp_avg_* optimizer.fused optimizer.foreach optimizer.capturable"
        ),
        "kernels: the loss is the same up to rounding": (
            "model.backend.* model.use_liger_kernel model.use_sdpa_patching compile.* sdpa_method "
            "distributed.enable_async_tensor_parallel distributed.patch_is_packed_sequence"
        ),
        "a detail of FSDP or stages": (
            "distributed._target_ distributed.mp_policy.* distributed.defer_fsdp_grad_sync distributed.*fsdp2_* "
            "distributed.pipeline.* distributed.offload_policy.* distributed.moe* parallelizer.* autopipeline.*"
        ),
        "validation data are split, cut and tokenized as training data": (
            "dataset.splits_to_build dataset.tokenizer.* dataset.num_*_samples validation_dataset.tokenizer.* "
            "validation_dataset.seq_* validation_dataset.split* validation_dataset._target_ validation_dataset.index_*"
        ),
        "a log service": "wandb.* mlflow.* comet.*",
        "of a config.json, without effect on training": (
            "model.config.transformers_version model.config.torch_dtype model.config.dtype model.config.use_cache "
            "model.config._name_or_path model.config.???_token_id"
        ),
    },
    "axolotl": {
        "kernels: the loss is the same up to rounding": (
            "plugins liger_* cut_cross_entropy chunked_cross_entropy* flash_attn_* flash_attention flash_optimum "
            "fused_attn_kernel sdp_attention xformers_attention eager_attention use_kernels tiled_mlp* lora_*_kernel "
            "experts_implementation flex_attn_* tf32 torch_compile_* gemma4_hybrid_* unsloth_*"
        ),
        "a detail of FSDP or of the launch": (
            "fsdp_config.* ddp* accelerator_config.* low_cpu_mem_usage local_rank gpu_memory_limit device_map "
            "experimental_skip_move_to_device world_size gc_steps torch_empty_cache_steps"
        ),
        "a detail of recomputation": "gradient_checkpointing_kwargs.* activation_offloading",
        "data are tokenized and packed once, into --data-cache-path": (
            "dataset_processes dataset_num_proc dataset_keep_in_memory skip_prepare_dataset dataloader_* streaming "
            "streaming_* pretrain_multipack_buffer_size shuffle_merged_datasets sample_packing_* remove_unused_columns"
        ),
        "no loss on padding": "special_tokens.pad_token pad_to_multiple_of",
        "a log service": (
            "wandb_* use_wandb mlflow_* use_mlflow comet_* use_comet swanlab_* use_swanlab trackio_* use_trackio hub_* "
            "project_name secrets eval_table_size"
        ),
        "a causal language model of config.json": "model_type tokenizer_type tokenizer_use_fast is_*_derived_model",
        "of a config.json, without effect on training": (
            "*model_config.transformers_version *model_config.torch_dtype *model_config.dtype *model_config.use_cache "
            "*model_config._name_or_path *model_config.???_token_id"
        ),
        "checks of the configuration": "strict debug",
        "checkpoints": "save_safetensors save_only_model save_first_step",
    },
    "megatron": {
        "speed: the loss is the same up to rounding": (
            "overlap_* no_overlap_* tp_comm_* *_fusion use_mcore_models use_flash_attn attention_backend "
            "transformer_impl accumulate_allreduce_* attention_softmax_in_fp32 cross_entropy_* manual_gc* ddp_* "
            "defer_embedding_* delay_* use_cpu_initialization high_priority_* nccl_* use_sharp cuda_graph* "
            "external_cuda_* enable_cuda_* empty_unused_* distribute_saved_* recompute_* no_persist_* "
            "microbatch_group_* "
            "use_tp_pp_dp_mapping data_parallel_sharding_* init_model_with_* suggested_* keep_fp8_* align_* no_align_* "
            "deterministic_mode disable_*_memory* use_te_* te_rng_tracker apply_layernorm_1p"
        ),
        "logs": (
            "log_* tensorboard_* timing_log_option wandb_* profile* use_pytorch_profiler record_* no_one_logger "
            "one_logger_* enable_one_logger straggler* check_* no_check_* rerun_* error_injection_* flight_recorder_* "
            "logging_level"
        ),
        "the launch": (
            "master_* node_rank rdzv_* max_restarts distributed_backend exit_signal_* tee redirects log_dir local_addr "
            "lazy_mpu_init standalone monitored_barrier_*"
        ),
        "format of checkpoints": (
            "ckpt_* dist_ckpt_* no_save_* no_load_* use_dist_ckpt use_checkpoint_* auto_detect_* exit_on_* "
            "non_persistent_* async_* use_persistent_* save_retain_interval override_opt* save_*_assets"
        ),
        "how tokens are read": (
            "*mmap* create_attention_* no_create_attention_* dataloader_type dataloader_fast_* dataloader_defer_* "
            "num_dataset_builder_threads per_dataset_* trust_remote_code max_position_embeddings"
        ),
        "by the number of K and V heads": "group_query_attention",
    },
    "pentagrid": {
        "speed, checks and logs of Pentagrid": (
            "verify_steps check_* loss_chunk_size metrics_file peak_tflops sample_* profile profile_steps device "
            "fused_kernels flash_attention offload_activations balance_work distributed_startup_* max_skipped_* "
            "on_nonfinite save_final load_fallback dry_run* cp_layout document_alignment tokenizer_type "
            "transformer_impl"
        ),
    },
}
NO_COUNTERPART: dict[str, dict[str, str]] = {
    "nemo": {
        "adapters and quantised weights: Pentagrid trains all weights": "peft.* quantization.* qat.* fp8.*",
        "experts: Pentagrid's GPT is dense": "distributed.ep_size moe_metrics.*",
        "data of conversations or of the hub: write plain text and give --data-path": (
            "dataset.* validation_dataset* _validation_dataset* packed_sequence.* tokenizer.* tool_call_eval.*"
        ),
        "a detail of the model": "model.*",
        "a detail of the optimizer or schedule": "optimizer.* optim.* lr_scheduler.* neftune* step_scheduler.*",
        "a detail of the strategy": "distributed.* distributed_config.*",
    },
    "axolotl": {
        "adapters and quantised weights: Pentagrid trains all weights": (
            "lora_* peft* qlora* merge_lora load_in_4bit load_in_8bit gptq* bnb_config_kwargs.* relora* "
            "unfrozen_parameters qat.* quantization.* model_quantization_* use_onebitllms torchdistx_path"
        ),
        "conversations: render them to text": (
            "chat_template* default_system_message eot_tokens train_on_inputs roles_* conversation* processor_* "
            "freeze_mm_modules is_multimodal image_* tokenizer_use_mistral_common"
        ),
        "the tokenizer is used as its file says": (
            "special_tokens.* tokens tokens.* added_tokens_overrides* tokenizer_* resize_token_* shrink_* "
            "hf_use_auth_token"
        ),
        "reading and packing differ: docs/data.md": (
            "dataset_* shuffle_* push_dataset_to_hub preprocess_* min_sample_len excess_length_strategy "
            "group_by_length eval_sample_packing eval_sequence_len max_packed_sequence_len multipack_* "
            "batch_flattening curriculum_sampling pretraining_sample_concatenation"
        ),
        "experts: Pentagrid's GPT is dense": (
            "expert_parallel_size quantize_moe_* use_scattermoe use_sonicmoe *experts* dsv4_* use_dsv4_*"
        ),
        "validation: the loss over --eval-iters global batches": (
            "eval_* evals_* do_* early_stopping_patience load_best_model_at_end metric_for_best_model generate_* "
            "num_generation_* generation_*"
        ),
        "another optimizer or schedule": (
            "lr_* cosine_* adam_* optim_* loraplus_* embedding_lr* neftune_* loss_watchdog_* eta_min dion_* muon_* "
            "use_eaft eaft_*"
        ),
        "a detail of the model": (
            "type_of_model cls_model_config revision_of_model base_model_* model_config.* overrides_of_model_config.* "
            "fp32_norm* embeddings_skip_upcast trust_remote_code"
        ),
        "a detail of Axolotl": (
            "profiler_* include_* diffusion.* dynamic_checkpoint.* layer_offloading deepcompile trl.* vllm.* "
            "ebft.* fp8_* fp8 nvfp4_*"
        ),
    },
    "megatron": {
        "a layer that Pentagrid's GPT does not have": (
            "num_experts moe_* expert_* mtp_* mla multi_latent_attention hybrid_* mamba_* is_hybrid_* kv_lora_* "
            "q_lora_* qk_head_* qk_pos_* qk_clip* v_head_dim window_* softmax_type add_qkv_bias squared_relu "
            "openai_gelu quick_geglu no_rope_* yarn_* rope_type mrope_* no_position_embedding spec experimental_* "
            "linear_* attention_output_gate transformer_layer_* apply_residual_* heterogeneous_* engram_* mhc_* "
            "enable_mhc_*"
        ),
        "the tokenizer: give --tokenizer-model": (
            "vocab_* merge_file tokenizer_* tiktoken_* null_tokenizer_* padded_vocab_size"
        ),
        "reading and packing differ: docs/data.md": (
            "mock_data data_args_path test_data_path dataloader_* reset_* per_split_* full_validation sft sft_* "
            "packing_* multiple_validation_* fim_* phase_* iterations_to_skip train_sync_* skip_train"
        ),
        "a global batch that grows": "rampup_batch_size step_batch_size_* decrease_batch_* eval_*_batch_size",
        "another optimizer or schedule": (
            "decoupled_* start_weight_* end_weight_* weight_decay_* no_weight_decay_* apply_* init_* embedding_init_* "
            "use_precision_* main_* exp_avg_* muon_* optimizer_* sgd_* lion_* use_mup mup_* z_loss* override_*"
        ),
        "8 or 16 bits: docs/gpu.md": (
            "fp8_* fp4_* te_* first_last_* num_layers_at_* loss_scale* initial_loss_* min_loss_* hysteresis fp16_* "
            "grad_reduce_*"
        ),
        "checkpoints: docs/checkpoints.md": "finetune load_* save_* most_recent_k pretrained_checkpoint ckpt_step",
        "a detail of the layout": (
            "virtual_* pipeline_* decoder_* encoder_* account_for_* standalone_* batch_p2p* dynamic_context_* "
            "max_seqlen_* use_gloo* disable_gloo* tp_* data_parallel_* *fsdp* cpu_offload* optimizer_cpu_*"
        ),
    },
    "pentagrid": {"a setting that only Pentagrid has": "*"},
}


def find_reason(suite: str, name: str) -> tuple[str | None, bool]:
    """What a key without a row is (None: unknown), and whether the run needs a counterpart of it."""
    for table, is_needed in ((NOT_NEEDED, False), (NO_COUNTERPART, True)):
        for reason, patterns in table[suite].items():
            if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
                return reason, is_needed
    return None, True


def known_keys(suite: str) -> set[str]:
    return {name for concept in TABLE if suite in concept.columns for name in concept.columns[suite].keys}
