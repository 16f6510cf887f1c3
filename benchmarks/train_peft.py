"""One contestant: transformers + PEFT on a model of a given shape with random weights, in its usual loop."""

import argparse
import json
import tempfile
import time

import torch
from make_models import SHAPES
from make_rows import ALPHA, RANK, RATE, make_tokens, peak_bytes
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM


def make_model(shape: str, dtype: str) -> LlamaForCausalLM:
    """A model with random weights."""
    hidden, inner, layers, heads, kv_heads, vocab, is_tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=is_tied, max_position_embeddings=8192,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16 if dtype in ("bf16", "nf4") else torch.float32)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return as_nf4(model) if dtype == "nf4" else model


def as_nf4(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model in 4 bits, as bitsandbytes makes it when it loads a folder: all matrices but embedding and head."""
    # Without prepare_model_for_kbit_training, which makes embedding, head and norms fp32: 5.5 GB become 6.3.
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu", attn_implementation="sdpa"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "medium", "nf4"), default="bf16")
    parser.add_argument("--labels", type=float, default=1.0)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    if options.dtype == "medium":
        torch.set_float32_matmul_precision("medium")  # fp32 through oneDNN, and through bfloat16 where that is faster
    model = make_model(options.shape, options.dtype)
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.train()
    forward = torch.compile(model) if options.compile else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE)
    ids, is_learned = (
        torch.from_numpy(array.copy()) for array in make_tokens(options.labels, options.rows, options.length)
    )
    ids = ids.long()
    labels = ids.masked_fill(~is_learned, -100)
    times = []
    for _ in range(options.steps + 1):
        began = time.perf_counter()
        forward(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        times.append(time.perf_counter() - began)
    seconds = sorted(times[1:])[(len(times) - 1) // 2]
    rate = options.rows * options.length / seconds
    print(json.dumps({"tokens_per_second": rate, "peak_bytes": peak_bytes(), "seconds": seconds}))


if __name__ == "__main__":
    main()
