"""What other programs call our options: words of timm's, transformers', Lightning's, mmpretrain's and torchtitan's."""

# Word -> our key, and what it means where that is not the same thing. Keys exist: tests/commands/test_usage.py.
WORDS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("batch_size", "batch", "bs", "b", "train_batch_size", "global_batch_size", "per_device_train_batch_size"),
        ("data.global_batch", "images of a step over all ranks"),
    ),
    **dict.fromkeys(("micro_batch_size", "local_batch_size"), ("data.micro_batch", "images of a rank and forward")),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum_steps", "accumulation_steps"),
        ("data.micro_batch", "accumulation follows from it and data.global_batch"),
    ),
    **dict.fromkeys(
        ("validation_batch_size", "val_batch_size", "per_device_eval_batch_size"),
        ("data.eval_batch", "images of a rank and forward of evaluation"),
    ),
    **dict.fromkeys(("learning_rate", "lr", "base_lr", "lr_base"), ("optim.lr", "")),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "max_epochs", "epochs"), ("optim.epochs", "")),
    **dict.fromkeys(("max_steps", "steps", "iterations"), ("optim.epochs", "may be a fraction of one")),
    **dict.fromkeys(("wd", "weight_decay"), ("optim.weight_decay", "")),
    **dict.fromkeys(("optimizer", "opt"), ("optim.name", "")),
    **dict.fromkeys(("scheduler", "sched", "lr_scheduler", "lr_scheduler_type"), ("optim.schedule", "")),
    **dict.fromkeys(("warmup", "warmup_epochs", "warmup_steps"), ("optim.warmup_epochs", "in epochs")),
    **dict.fromkeys(
        ("clip_grad", "grad_clip", "max_grad_norm", "gradient_clip_val", "max_norm"), ("optim.clip_norm", "")
    ),
    **dict.fromkeys(("model_ema", "ema_decay", "model_ema_decay"), ("optim.ema", "decay of the average per step")),
    **dict.fromkeys(("freeze_backbone", "linear_probe"), ("optim.freeze", "backbone leaves the class head to learn")),
    **dict.fromkeys(("num_workers", "workers", "j", "dataloader_num_workers"), ("data.workers", "")),
    **dict.fromkeys(("data_dir", "data_path", "data_root", "dataset", "root", "train_dir"), ("data.path", "")),
    **dict.fromkeys(("image_size", "img_size", "input_size", "resolution"), ("model.img_size", "")),
    **dict.fromkeys(("classes", "n_classes", "nb_classes", "num_labels"), ("model.num_classes", "")),
    **dict.fromkeys(("drop_path", "drop_path_rate", "stochastic_depth"), ("model.drop_path_rate", "")),
    **dict.fromkeys(("experts", "num_experts", "n_experts"), ("model.moe.num_experts", "over all ranks")),
    **dict.fromkeys(("top_k", "topk", "k", "num_experts_per_tok"), ("model.moe.top_k", "")),
    **dict.fromkeys(("expert_parallel", "expert_parallel_degree", "ep", "ep_size"), ("parallel.expert", "")),
    **dict.fromkeys(("mixup", "mixup_alpha"), ("task.classify.mixup", "")),
    **dict.fromkeys(("cutmix", "cutmix_alpha"), ("task.classify.cutmix", "")),
    **dict.fromkeys(("smoothing", "label_smoothing", "label_smoothing_factor"), ("task.classify.label_smoothing", "")),
    **dict.fromkeys(("aa", "auto_augment", "randaugment"), ("data.auto_augment", "")),
    **dict.fromkeys(
        ("pretrained", "checkpoint_init", "init", "finetune"), ("checkpoint.init", "weights to begin with")
    ),
    **dict.fromkeys(("resume", "resume_from_checkpoint", "ckpt", "ckpt_path"), ("checkpoint.load", "to continue from")),
    **dict.fromkeys(("save_every", "save_steps", "checkpoint_interval"), ("checkpoint.every", "in steps")),
    **dict.fromkeys(("output_dir", "output", "work_dir", "default_root_dir"), ("run.output", "")),
    **dict.fromkeys(("name", "experiment", "run_name"), ("run.name", "")),
    **dict.fromkeys(("seed", "random_seed"), ("run.seed", "")),
    **dict.fromkeys(("amp", "fp16", "bf16", "mixed_precision", "precision", "dtype"), ("engine.precision", "")),
    **dict.fromkeys(("device", "accelerator"), ("engine.device", "")),
    **dict.fromkeys(("compile", "torch_compile", "torchcompile"), ("parallel.compile", "")),
    **dict.fromkeys(
        ("grad_checkpointing", "gradient_checkpointing", "activation_checkpoint"), ("parallel.recompute", "")
    ),
    **dict.fromkeys(("zero_stage", "fsdp", "zero"), ("parallel.zero", "")),
    **dict.fromkeys(("log_interval", "logging_steps", "log_every_n_steps", "log_every"), ("log.every", "in steps")),
    **dict.fromkeys(("eval_steps", "val_check_interval", "check_val_every_n_epoch"), ("log.eval_every", "in epochs")),
}
# What is no option of a config, but of the command around it.
ELSEWHERE = dict.fromkeys(
    "gpus devices num_gpus nproc_per_node world_size num_processes ranks nnodes num_nodes n np".split(),
    "ranks are the launcher's: swin-moe launch -n N -- -m swin_moe.train CONFIG",
)


def meant(word: str, *, given: str = "") -> str:
    """Returns what to say of another program's word for an option, dotted or with dashes: our key, or "".

    given: What stands after the key.
    """
    leaf = word.lstrip("-").rpartition(".")[2].replace("-", "_").lower()
    if leaf in ELSEWHERE:
        return ELSEWHERE[leaf]
    if leaf not in WORDS:
        return ""
    key, remark = WORDS[leaf]
    return f"did you mean {key}{given}{f' ({remark})' if remark else ''}?"
