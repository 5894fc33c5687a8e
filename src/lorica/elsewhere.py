"""What is ours under the names that it has in transformers, PEFT, TRL, Lightning, Axolotl and LLaMA-Factory; told to who types those.
Tables alone, no torch."""

# Their key -> our key, which takes the same value; key=... where the values are others; or the choice that does it.
KEYS = {
    "adapter": "model=...",
    "base_model": "model.base",
    "bf16": "trainer.precision=...",
    "ckpt_path": "resume=...",
    "cutoff_len": "model.max_length",
    "data_path": "data.path",
    "default_root_dir": "run_dir",
    "device": "trainer.accelerator",
    "epochs": "trainer.max_epochs",
    "eval_steps": "trainer.val_check_interval=...",
    "eval_strategy": "trainer.val_check_interval=...",
    "evaluation_strategy": "trainer.val_check_interval=...",
    "fast_dev_run": "debug=fast",
    "finetuning_type": "model=...",
    "flash_attention": "model.attn_implementation=...",
    "flash_attn": "model.attn_implementation=...",
    "fp16": "trainer.precision=...",
    "freeze_layers": "model.train_layers=...",
    "gpus": "trainer.devices",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "layers_to_transform": "model.train_layers=...",
    "learning_rate": "optimizer.lr",
    "limit_test_batches": "data.max_test_examples=...",
    "limit_train_batches": "data.max_train_examples=...",
    "limit_val_batches": "data.max_validation_examples=...",
    "logging_steps": "trainer.log_every_n_steps",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "lora_target": "model.lora.target_modules=...",
    "lora_target_linear": "model.lora.target_modules=all-linear",
    "lora_target_modules": "model.lora.target_modules",
    "max_grad_norm": "trainer.gradient_clip_val",
    "max_samples": "data.max_train_examples",
    "max_seq_length": "model.max_length",
    "max_seq_len": "model.max_length",
    "micro_batch_size": "trainer.batch_size",
    "model_name": "model.base",
    "model_name_or_path": "model.base",
    "num_epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "optim": "optimizer.name=...",
    "output_dir": "run_dir",
    "overfit_batches": "debug=overfit",
    "per_device_train_batch_size": "trainer.batch_size",
    "quantization_bit": "model.quantization={load_in_4bit:true}",
    "rank": "model.lora.r",
    "report_to": "logger=wandb",
    "resume_from_checkpoint": "resume=...",
    "save_steps": "trainer.checkpoint_every_n_steps",
    "save_total_limit": "trainer.keep_checkpoints",
    "sequence_len": "model.max_length",
    "train_file": "data.path",
    "use_wandb": "logger=wandb",
    "val_set_size": "data.validation_fraction=...",
    "val_size": "data.validation_fraction=...",
    "wandb_project": "logger=wandb logger.project=...",
    "wandb_run_name": "logger=wandb logger.run_name=...",
}

# Their key -> (what is so here, what to type).
INSTEAD = {
    "deepspeed": ("weights are not divided among GPUs: each has its own, by DDP", "trainer.devices=..."),
    "fsdp": ("weights are not divided among GPUs: each has its own, by DDP", "trainer.devices=..."),
    "neftune_noise_alpha": ("there is no noise on embeddings here", "leave it out"),
    "packing": ("rows are laid end to end by themselves where the GPU can", "trainer.tokens_per_batch=4096"),
    "push_to_hub": ("a finished run is pushed by a command of its own", "lorica push run=... repo=..."),
    "sample_packing": ("rows are laid end to end by themselves where the GPU can", "trainer.tokens_per_batch=4096"),
    "template": ("prompts are written with the tokenizer's own chat template", "model.use_chat_template=true"),
    "train_on_inputs": ("answers alone are learnt, never the prompts", "leave it out"),
    "trust_remote_code": ("code that comes with weights is never run", "leave it out"),
}

# A group's name, given what is no option of it -> the key that takes it, and what stands beside that.
OF_A_GROUP = {
    "data": ("data.path", "data=classification, data=instruction or data=chat"),
    "model": ("model.base", "model=mistral_qlora (a causal model) or model=roberta_lora (an encoder)"),
}

# Our key -> their value -> ours.
VALUES = {
    "trainer.precision": {
        **dict.fromkeys(("fp16", "float16", "half", "16-true"), "16-mixed"),
        **dict.fromkeys(("bfloat16", "bf16-true"), "bf16-mixed"),
        **dict.fromkeys(("fp32", "float32", "full"), "32-true"),
    },
    "optimizer.name": {
        **dict.fromkeys(("adam", "adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
        **dict.fromkeys(("adamw_bnb_8bit", "adamw8bit"), "adamw_8bit"),
        **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged_adamw_8bit"),
    },
    "model.attn_implementation": {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "fa4": "flash_attention_4", "flash": "auto"},
}
