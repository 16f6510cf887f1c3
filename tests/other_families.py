"""Tiny random models of families that Thimble's own engine does not have, as folders that transformers opens."""

import functools
import tempfile
from pathlib import Path

import torch
import transformers as hf

from fixtures.tiny_tokenizers import write_tokenizer

VOCABULARY = 320
_NAMES = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCABULARY}
_SIZES = {
    **_NAMES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_OLD = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CONFIGS = {
    "gpt2": lambda: hf.GPT2Config(**_OLD, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "opt": lambda: hf.OPTConfig(
        **_NAMES, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
        word_embed_proj_dim=24,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SIZES),
    "bloom": lambda: hf.BloomConfig(**_OLD, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: hf.FalconConfig(**_OLD, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "olmo2": lambda: hf.Olmo2Config(**_GROUPED),
    "granite": lambda: hf.GraniteConfig(
        **_GROUPED, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3, embedding_multiplier=2.0
    ),
    "cohere2": lambda: hf.Cohere2Config(**_GROUPED, head_dim=8, sliding_window=8),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(**_GROUPED, **_EXPERTS, shared_expert_intermediate_size=24),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **_SIZES, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        moe_intermediate_size=16, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "lfm2": lambda: hf.Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention"]),
    "mamba": lambda: hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8),
}  # fmt: skip


def make_model(config: hf.PretrainedConfig) -> hf.PreTrainedModel:
    """A model of any kind that writes text, with weights far enough from zero for all parts of it to count."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save(config: hf.PretrainedConfig, folder: Path) -> Path:
    """A folder with such a model and a tiny tokenizer."""
    make_model(config).save_pretrained(folder)
    write_tokenizer("smollm", folder)
    return folder


@functools.cache
def folder_of(family: str) -> Path:
    """The folder of a family; nobody may change it."""
    return save(CONFIGS[family](), Path(tempfile.mkdtemp()) / family)
