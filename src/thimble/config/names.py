"""What other tools call their options: synonyms of ours, and what to use instead of those without a counterpart.

The names are those of PEFT and TRL, Unsloth, Axolotl, LLaMA-Factory, mlx-lm, torchtune and llama.cpp.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

from thimble.config.values import flag

# Our option and what other tools call it.
_ALSO = {
    "base": "model model_name model_name_or_path base_model pretrained_model_name_or_path",
    "data": "dataset datasets dataset_path train_dataset train_file input_file prompts",
    "out": "output output_dir save_path output_file",
    "adapter": "adapter_path adapter_name_or_path lora_model_dir lora lora_path adapters", "rank": "r lora_r lora_rank",
    "alpha": "lora_alpha", "use_rslora": "rslora peft_use_rslora", "use_dora": "dora peft_use_dora",
    "targets": "lora_target target_modules lora_target_modules", "dropout": "lora_dropout",
    "init": "init_lora_weights peft_init_lora_weights", "learning_rate": "lr",
    "schedule": "lr_scheduler lr_scheduler_type lr_schedule", "epochs": "num_epochs num_train_epochs",
    "max_steps": "iters steps num_steps", "lora_plus": "loraplus_lr_ratio",
    "max_grad_norm": "gradient_clipping clip_grad_norm", "adam_beta2": "beta2",
    "seq_len": "max_seq_length max_length cutoff_len sequence_len sequence_length max_seq_len",
    "valid_split": "val_set_size val_size validation_split", "eval_every_steps": "eval_steps steps_per_eval",
    "patience": "early_stopping_patience", "checkpoint_every_steps": "save_steps save_every",
    "resume": "resume_from_checkpoint", "seed": "random_state random_seed data_seed",
    "prompt_column": "prompt_feature field_instruction", "completion_column": "completion_feature field_output",
    "text_column": "text_feature dataset_text_field text_field",
    "max_new_tokens": "max_tokens n_predict num_predict", "temperature": "temp", "system": "system_prompt",
}  # fmt: skip
SYNONYMS = {other: ours for ours, others in _ALSO.items() for other in others.split()}

# What to use instead of names without a counterpart, or whose counterpart takes other values.
_INSTEAD = {
    "use --batch-tokens: the number of tokens in one optimiser step": "micro_batch_size per_device_train_batch_size "
        "train_batch_size batch_size",
    "use --batch-tokens: a step is split into micro-batches as memory allows": "gradient_accumulation_steps "
        "grad_accumulation_steps",
    "leave it out: batches of an evaluation are as large as memory allows": "per_device_eval_batch_size "
        "eval_batch_size",
    "leave it out: rows are always packed without padding": "sample_packing packing pad_to_sequence_len "
        "group_by_length",
    "give a GGUF file as --base: its own blocks are trained on": "load_in_4bit",
    "use --store int8": "load_in_8bit", "use --store int8, or give a GGUF file as --base": "quantization_bit",
    "use --compute bf16": "bf16", "leave it out: --compute auto takes the faster of fp32 and bf16": "fp16",
    "leave it out: Thimble always uses the CPU": "tf32 use_cpu no_cuda device device_map",
    "use --compute": "dtype torch_dtype", "leave it out: Thimble has its own attention": "flash_attention flash_attn",
    "leave it out: activation checkpointing is chosen by --memory-budget": "gradient_checkpointing "
        "use_gradient_checkpointing grad_checkpoint enable_activation_checkpointing",
    "leave it out: the optimiser is AdamW": "optimizer optim", "use --warmup-steps": "warmup_ratio",
    "leave it out: no noise is added to embeddings": "neftune neftune_noise_alpha",
    "leave it out: an adapter is all that is trained; --targets names the layers that it adapts": "modules_to_save "
        "lora_modules_to_save additional_target bias lora_bias",
    "leave it out for LoRA; use --use-dora for DoRA": "fine_tune_type finetuning_type peft_type",
    "leave it out: --targets all-linear is the default": "lora_target_linear",
    "use --targets attention, or names such as --targets q_proj,v_proj": "lora_attn_modules",
    "use --targets all-linear, --targets attention or --targets mlp": "apply_lora_to_mlp",
    "use --targets last-8 for the last 8 blocks": "num_layers lora_layers layers_to_transform",
    "use --alpha: the update is scaled by alpha/rank": "scale", "use --init pissa": "pissa_init",
    "use --init loftq with --store int8": "loftq_config",
    "to go on with an adapter use --init adapter:PATH; the folder for the result is --out": "adapter adapter_path "
        "adapter_name_or_path lora_model_dir resume_adapter_file",
    "use --loss-on completions or --loss-on all": "train_on_inputs train_on_prompt mask_prompt completion_only_loss "
        "assistant_only_loss",
    "leave it out: the chat template of the base is used": "chat_template chat_template_jinja template formatting_func",
    "leave it out: the tokenizer of the base is used, with its special tokens": "tokenizer tokenizer_name "
        "tokenizer_path processing_class special_tokens",
    "leave it out: where answers begin and end is found by the chat template, and their end is learned":
        "train_on_eos response_template instruction_template response_part instruction_part train_on_responses_only "
        "data_collator",
    'leave it out: give the messages that are not to be learned "weight": 0': "mask_history roles_to_train "
        "last_turn_only train_on_last_turn_only",
    "leave it out: a chat template is told the rows and nothing else; thoughts stand in the answers": "enable_thinking "
        "chat_template_kwargs",
    "lay those rows beside the others, as train.jsonl and valid.jsonl, and name the folder": "eval_dataset "
        "eval_file valid_file validation_file validation_dataset test_datasets eval_data valid_data",
    "name the file of the split, or its folder": "split dataset_split train_split dataset_dir data_dir data_files",
    "leave it out: rows are read one by one, whatever their number": "streaming",
    "give a file with fewer rows, or use --max-steps": "max_samples",
    "use --eval-every-steps": "eval_strategy evals_per_epoch",
    "use --checkpoint-every-steps or --checkpoint-every-minutes": "saves_per_epoch",
    "leave it out: every step is in metrics.jsonl, and the charts are in report.html, in the run folder":
        "logging_steps steps_per_report report_to wandb_project",
    "leave it out: no code from a model folder is ever run": "trust_remote_code",
    "leave it out: messages are always printed, on stderr; --debug shows where an error comes from": "verbose v",
    "leave it out: messages go to stderr, 2>/dev/null hides them": "quiet q silent",
    "leave it out: nothing asks": "yes y",
    "leave it out: thimble train trains on examples, and measures before and after; --task says what for":
        "stage do_train do_eval do_predict rl",
    "leave it out: nothing is overwritten; --resume goes on with a run": "overwrite_output_dir overwrite_cache",
    "leave it out: the charts are in report.html, in the run folder": "plot_loss logging_dir",
    "leave it out: the form of rows is found; --prompt-column, --completion-column and --text-column name others":
        "dataset_format dataset_type formatting",
    "leave it out: every core that this process may use is used; taskset names fewer": "threads n_threads num_threads "
        "num_workers dataset_num_proc preprocessing_num_workers",
}  # fmt: skip
ELSEWHERE = {other: advice for advice, others in _INSTEAD.items() for other in others.split()}

# What other tools call our commands; the first that there is counts.
COMMAND_SYNONYMS = {
    other: ours
    for ours, others in {
        "train": "finetune fine-tune tune sft fit lora qlora", "evaluate": "eval test score benchmark validate",
        "generate chat": "predict infer inference run batch complete", "chat": "talk ask interactive",
        "merge": "fuse merge-lora merge_lora compress", "export": "convert gguf", "plan": "estimate dry-run",
        "inspect": "info show analyse analyze",
    }.items()
    for other in others.split()
}  # fmt: skip


def plain(given: str) -> str:
    """A name of an option as it stands in Python: without leading dashes, with underscores."""
    return given.lstrip("-").replace("-", "_")


def our_name(given: str, known: Collection[str]) -> str | None:
    """Our name, one of `known`, for a name as anybody types it, in a file or in Python; None if there is none."""
    name = plain(given)
    name = name if name in known else SYNONYMS.get(name, name)
    return name if name in known else None


def near_option(given: str, known: Collection[str]) -> str | None:
    """Our name for a name as anybody types it, right or nearly right; None if none is near."""
    if ours := our_name(given, known):
        return ours
    name = plain(given).lower()
    if name in SYNONYMS:  # of an option that only other commands have
        return None
    near = difflib.get_close_matches(name, [*known, *(other for other, ours in SYNONYMS.items() if ours in known)], n=1)
    return our_name(near[0], known) if near else None


def answer(given: str, known: Collection[str], positional: Mapping[str, str] = MappingProxyType({})) -> str:
    """What to say to a name that `our_name` does not know, in one sentence: what to use instead.

    Of the known names, those in `positional` are given without a flag; it holds their placeholders.
    """
    name = plain(given)
    typed = given if given.startswith("-") else flag(name)
    ours, near = our_name(name, known), near_option(name, known)
    instead = ELSEWHERE.get(name.lower(), "")
    named = {plain(option) for option in re.findall(r"--[a-z][a-z-]+", instead)}
    if ours is None and instead and (not named or named & set(known)):  # other commands may have what it advises
        advice = instead
    elif near is not None and near in positional:
        advice = f"give {positional[near]} without a flag"
    elif ours and flag(ours) != typed:
        advice = f"use {flag(ours)}"
    elif near and flag(near) != typed:
        advice = f"did you mean {flag(near)}?"
    else:
        advice = "see the list under --help"
    return f"{typed} is not an option of this command: {advice}"
