"""What other tools call their options: synonyms of ours, and what to use instead of those without a counterpart.

The names are those of PEFT and TRL, Unsloth, Axolotl, LLaMA-Factory, mlx-lm, torchtune and llama.cpp.
"""

import difflib
from collections.abc import Collection

from thimble.config.values import flag

# Our option and what other tools call it.
_ALSO = {
    "base": "model model_name model_name_or_path base_model pretrained_model_name_or_path",
    "data": "dataset datasets dataset_path train_file",
    "out": "output output_dir save_path",
    "adapter": "adapter_path adapter_name_or_path lora_model_dir lora lora_path adapters",
    "rank": "r lora_r lora_rank",
    "alpha": "lora_alpha",
    "use_rslora": "rslora peft_use_rslora",
    "use_dora": "dora peft_use_dora",
    "targets": "lora_target target_modules lora_target_modules",
    "dropout": "lora_dropout",
    "init": "init_lora_weights peft_init_lora_weights",
    "learning_rate": "lr",
    "schedule": "lr_scheduler lr_scheduler_type lr_schedule",
    "epochs": "num_epochs num_train_epochs",
    "max_steps": "iters steps num_steps",
    "lora_plus": "loraplus_lr_ratio",
    "max_grad_norm": "gradient_clipping clip_grad_norm",
    "seq_len": "max_seq_length max_length cutoff_len sequence_len sequence_length max_seq_len",
    "valid_split": "val_set_size val_size validation_split",
    "eval_every_steps": "eval_steps steps_per_eval",
    "patience": "early_stopping_patience",
    "checkpoint_every_steps": "save_steps save_every",
    "resume": "resume_from_checkpoint",
    "seed": "random_state random_seed data_seed",
    "max_new_tokens": "max_tokens n_predict num_predict",
    "temperature": "temp",
    "system": "system_prompt",
}
SYNONYMS = {other: ours for ours, others in _ALSO.items() for other in others.split()}

_TOKENS = "use --batch-tokens: the number of tokens in one optimiser step"
_PACKED = "leave it out: rows are always packed without padding"
_CHECKPOINTING = "leave it out: activation checkpointing is chosen by --memory-budget"
_LOGGED = "leave it out: every step is in metrics.jsonl, and the charts are in report.html, in the run folder"
_ADAPTER_ALONE = "leave it out: an adapter is all that is trained; --targets names the layers that it adapts"
_LOSS_ON = "use --loss-on completions or --loss-on all"
_CPU = "leave it out: Thimble always uses the CPU"
_CONTINUE = "to go on with an adapter use --init adapter:PATH; the folder for the result is --out"

# Names without a counterpart, or whose counterpart takes other values: what to use instead.
ELSEWHERE = {
    "micro_batch_size": _TOKENS,
    "per_device_train_batch_size": _TOKENS,
    "train_batch_size": _TOKENS,
    "batch_size": _TOKENS,
    "gradient_accumulation_steps": "use --batch-tokens: a step is split into micro-batches as memory allows",
    "grad_accumulation_steps": "use --batch-tokens: a step is split into micro-batches as memory allows",
    "per_device_eval_batch_size": "leave it out: batches of an evaluation are as large as memory allows",
    "eval_batch_size": "leave it out: batches of an evaluation are as large as memory allows",
    "val_batches": "use --valid-split for the share of rows, --eval-rows for how many are answered",
    "sample_packing": _PACKED,
    "packing": _PACKED,
    "pad_to_sequence_len": _PACKED,
    "group_by_length": _PACKED,
    "load_in_4bit": "give a GGUF file as --base: its own blocks are trained on",
    "load_in_8bit": "use --store int8",
    "quantization_bit": "use --store int8, or give a GGUF file as --base",
    "bf16": "use --compute bf16",
    "fp16": "leave it out: --compute auto takes the faster of fp32 and bf16",
    "tf32": _CPU,
    "dtype": "use --compute",
    "torch_dtype": "use --compute",
    "use_cpu": _CPU,
    "no_cuda": _CPU,
    "device": _CPU,
    "device_map": _CPU,
    "flash_attention": "leave it out: Thimble has its own attention",
    "flash_attn": "leave it out: Thimble has its own attention",
    "gradient_checkpointing": _CHECKPOINTING,
    "use_gradient_checkpointing": _CHECKPOINTING,
    "grad_checkpoint": _CHECKPOINTING,
    "enable_activation_checkpointing": _CHECKPOINTING,
    "optimizer": "leave it out: the optimiser is AdamW",
    "optim": "leave it out: the optimiser is AdamW",
    "warmup_ratio": "use --warmup-steps",
    "max_steps_per_epoch": "use --max-steps",
    "neftune": "leave it out: no noise is added to embeddings",
    "neftune_noise_alpha": "leave it out: no noise is added to embeddings",
    "modules_to_save": _ADAPTER_ALONE,
    "lora_modules_to_save": _ADAPTER_ALONE,
    "additional_target": _ADAPTER_ALONE,
    "bias": _ADAPTER_ALONE,
    "lora_bias": _ADAPTER_ALONE,
    "fine_tune_type": "leave it out for LoRA; use --use-dora for DoRA",
    "finetuning_type": "leave it out for LoRA; use --use-dora for DoRA",
    "peft_type": "leave it out for LoRA; use --use-dora for DoRA",
    "lora_target_linear": "leave it out: --targets all-linear is the default",
    "lora_attn_modules": "use --targets attention, or names such as --targets q_proj,v_proj",
    "apply_lora_to_mlp": "use --targets all-linear, --targets attention or --targets mlp",
    "num_layers": "use --targets last-8 for the last 8 blocks",
    "lora_layers": "use --targets last-8 for the last 8 blocks",
    "layers_to_transform": "use --targets last-8 for the last 8 blocks, or patterns of layer names",
    "scale": "use --alpha: the update is scaled by alpha/rank",
    "pissa_init": "use --init pissa",
    "loftq_config": "use --init loftq with --store int8",
    "adapter": _CONTINUE,
    "adapter_path": _CONTINUE,
    "adapter_name_or_path": _CONTINUE,
    "lora_model_dir": _CONTINUE,
    "resume_adapter_file": _CONTINUE,
    "train_on_inputs": _LOSS_ON,
    "train_on_prompt": _LOSS_ON,
    "mask_prompt": _LOSS_ON,
    "mask_history": "leave it out: all assistant turns are learned from",
    "completion_only_loss": _LOSS_ON,
    "assistant_only_loss": _LOSS_ON,
    "chat_template": "leave it out: the chat template of the base is used",
    "template": "leave it out: the chat template of the base is used",
    "dataset_text_field": "leave it out: the form of the rows is recognised, as docs/data_format.md describes",
    "max_samples": "give a file with fewer rows, or use --max-steps",
    "eval_strategy": "use --eval-every-steps",
    "evals_per_epoch": "use --eval-every-steps",
    "saves_per_epoch": "use --checkpoint-every-steps or --checkpoint-every-minutes",
    "save_total_limit": "leave it out: old checkpoints are removed",
    "overwrite_output_dir": "leave it out: no folder is overwritten; name another with --out, or add --resume",
    "logging_steps": _LOGGED,
    "steps_per_report": _LOGGED,
    "report_to": _LOGGED,
    "wandb_project": _LOGGED,
    "trust_remote_code": "leave it out: no code from a model folder is ever run",
    "top_k": "use --top-p",
    "min_p": "use --top-p",
}


def plain(given: str) -> str:
    """A name of an option as it stands in Python: without leading dashes, with underscores."""
    return given.lstrip("-").replace("-", "_")


def our_name(given: str, known: Collection[str]) -> str | None:
    """Our name of an option.

    Args:
        given: A name as typed, in a file or in Python, by us or by another tool.
        known: Names of the command's options.

    Returns:
        One of `known`, or None.
    """
    name = plain(given)
    name = name if name in known else SYNONYMS.get(name, name)
    return name if name in known else None


def answer(given: str, known: Collection[str]) -> str:
    """What to say to a name that `our_name` does not know: what to use instead.

    Args:
        given: As for `our_name`.
        known: Likewise.

    Returns:
        One sentence.
    """
    name = plain(given)
    if ours := our_name(name, known):  # of a flag; files and Python may use the name
        advice = f"use {flag(ours)}"
    elif name in ELSEWHERE:
        advice = ELSEWHERE[name]
    else:
        others = [other for other, ours in SYNONYMS.items() if ours in known]
        near = difflib.get_close_matches(name, [*known, *others], n=1)
        advice = f"did you mean {flag(our_name(near[0], known) or near[0])}?" if near else "see the list under --help"
    return f"{flag(name)} is not an option of this command: {advice}"
