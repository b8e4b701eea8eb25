"""Map flags of XTuner, Hugging Face, LLaMA-Factory, torchtitan and older versions to ours."""

RENAMED = {
    "accum": "grad_accum",
    "data.overlong": "data.too_long",
    "device": "dry_run_device",
    "keep": "keep_last",
    "optim.decay": "optim.decay_ratio",
    "optim.state": "optim.moment_dtype",
    "optim.warmup": "optim.warmup_ratio",
}
"""Present names of the flags of older versions."""

SYNONYMS = {f: f"take --{name}" for f, name in RENAMED.items()} | {
    name: hint
    for hint, names in {
        "take --optim.lr": "lr learning_rate optimizer.lr max_lr peak_lr",
        "take --out": "output_dir work_dir save_dir checkpoint.folder job.dump_folder",
        "take --optim.warmup_ratio": "warmup_ratio warmup lr_warmup_ratio",
        "take --optim.warmup_ratio, a share of the steps": "warmup_steps lr_scheduler.warmup_steps",
        "take --optim.clip": "grad_clip max_norm max_grad_norm clip_grad training.max_norm",
        "take --optim.weight_decay": "weight_decay wd",
        "take --optim.betas": "betas adam_beta1 adam_beta2 beta1 beta2",
        "take --optim.name": "optim optim_type optimizer optimizer.name",
        "take --optim.schedule": "lr_scheduler lr_scheduler_type scheduler",
        "take --optim.min_lr_ratio": "min_lr min_lr_ratio lr_min",
        "take --optim.moment_dtype=int8": "adam8bit use_8bit_adam optim_8bit paged_adamw_8bit",
        "take --remat": "gradient_checkpointing use_grad_checkpoint activation_checkpoint "
        "activation_checkpoint.mode act_checkpoint selective_recompute recompute",
        "take --batch_size, rows of a step over all devices, or --rows_per_device": ""
        "per_device_train_batch_size per_device_batch_size device_batch_size "
        "train_batch_size global_batch_size micro_batch_size training.local_batch_size "
        "training.global_batch_size",
        "take --grad_accum; --batch_size counts the rows of all of them": "accumulative_counts "
        "gradient_accumulation_steps accum accumulation_steps",
        "take --epochs": "num_train_epochs num_epochs max_epochs epoch n_epochs",
        "take --steps": "max_steps num_steps train_steps training.steps max_iters",
        "take --save_every": "save_steps save_interval checkpoint_interval checkpoint.interval "
        "checkpointing_steps",
        "take --keep_last": "save_total_limit max_keep_ckpts keep_latest_k keep",
        "take --log_every": "logging_steps log_interval log_freq metrics.log_freq",
        "take --eval_every": "eval_steps eval_interval validation.freq evaluation_strategy",
        "take --sample_every with --prompts": "evaluation_freq evaluation_inputs",
        "take --log": "report_to enable_tensorboard enable_wandb metrics.enable_tensorboard "
        "metrics.enable_wandb",
        "take --dtype=bfloat16": "bf16 use_bf16 mixed_precision torch_dtype precision",
        "take --dtype; float16 is not supported": "fp16",
        "take --param_dtype=bf16": "pure_bf16 bf16_params",
        "take --attn": "attn_implementation flash_attn use_flash_attention flash_attention "
        "attention attn_impl impl",
        "take --config": "config_file cfg cfg_file yaml job.config_file",
        "take --data": "data.files dataset dataset_name_or_path train_file dataset_path data_path "
        "training.dataset dataset_dir",
        "take data.files, --data on the command line": "data.path data.paths data.file data.name "
        "data.train data.train_file data.train_files data.train_path data.data_path data.dataset "
        "dataset.path dataset.name",
        "take data.val, --data.val on the command line": "data.val_path data.val_file "
        "data.val_files data.validation data.eval data.eval_path",
        "take --export_every": "lora.export",
        "take --data.val": "val_size eval_dataset validation_file val_data",
        "take --data.packing": "packing pack_to_max_length neat_packing pack",
        "take --model": "model_name_or_path pretrained_model_name_or_path model_path",
        "take --tokenizer": "tokenizer_path tokenizer_name tokenizer_name_or_path",
        "take --seq_len": "cutoff_len max_length max_seq_length max_seq_len training.seq_len "
        "model_max_length block_size",
        "take --rope_factor": "rope_scaling rope_theta",
        "take --seed": "random_seed data_seed training.seed",
        "take --mesh.fsdp": "fsdp dp_shard sharding zero_stage deepspeed shard "
        "parallelism.data_parallel_shard_degree",
        "take --mesh.tensor": "tp tp_size tensor_parallel parallelism.tensor_parallel_degree",
        "take --mesh.data": "dp dp_size parallelism.data_parallel_replicate_degree",
        "take --dist.processes with --dist.coordinator and --dist.id": "nnodes world_size "
        "num_machines launcher nproc_per_node local_rank",
        "resuming is the default, by the same --out": "resume_from_checkpoint resume_from "
        "load_from overwrite_output_dir",
        "chats are recognized by their content, there is no template to choose": "template "
        "prompt_template dataset_map_fn template_map_fn_factory",
        "take --lora.rank": "lora lora_rank lora_r finetuning_type use_lora peft",
        "take --lora.alpha": "lora_alpha",
        "take --lora.dropout": "lora_dropout",
        "take --lora.targets": "lora_target lora_target_modules",
        "take --lora.rank with --base_dtype=nf4": "qlora load_in_4bit quantization_bit",
        "take --mesh.seq": "sp sp_size cp cp_size sequence_parallel sequence_parallel_size "
        "ulysses ulysses_size ulysses_sequence_parallel_size ulysses_degree context_parallel "
        "context_parallel_size parallelism.context_parallel_degree",
    }.items()
    for name in names.split()
}
SYNONYMS["device"] = (
    "jax finds the devices itself; to plan for a GPU that is not here take --dry_run "
    "--dry_run_device"
)
"""Hint by the name of an unknown flag, without dashes and in lower case."""
