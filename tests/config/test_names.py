"""Names of other tools: understood, or answered with ours."""

import pytest

from thimble.commands import COMMANDS
from thimble.config.evaluate import EvaluateConfig
from thimble.config.names import ELSEWHERE, SYNONYMS, answer, our_name
from thimble.config.options import options_of
from thimble.config.train import TrainConfig

TRAIN, EVALUATE = options_of(TrainConfig), options_of(EvaluateConfig)
ALL = {name for command in COMMANDS.values() for name in options_of(command.options)}


def test_names_of_other_tools_are_understood():
    config = TrainConfig.build({"data": "x", "lora_r": 4, "cutoff_len": 99, "lr": 1e-3, "lora-target-modules": ["mlp"]})
    assert (config.rank, config.seq_len, config.learning_rate, config.targets) == (4, 99, 1e-3, ("mlp",))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("learnin_rate", "--learnin-rate is not an option of this command: did you mean --learning-rate?"),
        ("lora_rnak", "did you mean --rank?"),
        ("micro_batch_size", "use --batch-tokens"),
        (
            "--per-device-train-batch-size",
            "--per-device-train-batch-size is not an option of this command: use --batch-tokens",
        ),
        ("--lora-r", "--lora-r is not an option of this command: use --rank"),
        ("--model", "use --base"),
        ("xyzzy", "see the list under --help"),
    ],
)
def test_any_other_name_is_answered_with_what_to_use(given, said):
    assert said in answer(given, TRAIN)


def test_a_name_means_what_it_means_for_the_command():
    assert our_name("adapter_path", EVALUATE) == "adapter"
    assert our_name("adapter_path", TRAIN) is None
    assert "--init adapter:PATH" in answer("adapter_path", TRAIN)
    assert our_name("lora_r", EVALUATE) is None


@pytest.mark.parametrize(
    "names",
    [
        "base_model lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save sequence_len "
        "micro_batch_size num_epochs val_set_size peft_use_rslora peft_use_dora sample_packing neftune_noise_alpha "
        "roles_to_train train_on_eos test_datasets special_tokens chat_template_jinja streaming",
        "model_name_or_path cutoff_len lora_rank lora_target per_device_train_batch_size num_train_epochs val_size "
        "additional_target quantization_bit finetuning_type stage do_train overwrite_cache overwrite_output_dir "
        "plot_loss template dataset cutoff_len max_samples preprocessing_num_workers report_to eval_dataset "
        "mask_history dataset_dir streaming enable_thinking",
        "r target_modules max_seq_length use_rslora random_state load_in_4bit use_gradient_checkpointing tokenizer "
        "train_dataset eval_dataset instruction_part response_part train_on_responses_only formatting_func "
        "data_collator split",
        "model num_layers adapter_path iters batch_size steps_per_eval save_every grad_checkpoint mask_prompt",
        "lora_attn_modules apply_lora_to_mlp clip_grad_norm max_seq_len enable_activation_checkpointing",
    ],
    ids=["axolotl", "llama-factory", "unsloth", "mlx-lm", "torchtune"],
)
def test_the_common_names_of_each_tool_are_understood_or_answered(names):
    assert [name for name in names.split() if our_name(name, TRAIN) is None and name not in ELSEWHERE] == []


def test_every_synonym_is_of_an_option_and_is_none_itself():
    assert set(SYNONYMS.values()) <= ALL
    assert set(SYNONYMS) & ALL == set()
    assert {SYNONYMS[name] for name in set(SYNONYMS) & set(ELSEWHERE)} == {"adapter"}  # which train has not


def test_what_only_another_command_has_is_not_advised():
    assert "--batch-tokens" in answer("--batch-size", ["batch_tokens"])
    assert answer("--batch-size", ["max_new_tokens"]).endswith("see the list under --help")
