"""One contestant of `make bench-serve`: PEFT's mixed batch, each row of `generate` with an adapter of its own.

    python benchmarks/serve_peft.py [--shape 135m] [--dtype fp32] [--streams 8]

transformers + PEFT on a model of a given shape with random weights, rank 16 on every linear layer; all rows begin
together, so nothing waits, which no server can have. Prints tokens a second as JSON.
"""

import argparse
import json
import time

import torch
from make_models import SHAPES
from make_rows import RANK, make_tokens
from peft import LoraConfig, get_peft_model
from train_peft import make_model

PROMPT, ANSWER = 121, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="135m", choices=SHAPES)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--answer", type=int, default=ANSWER, help="tokens written a stream")
    options = parser.parse_args()
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    names = [f"a{number}" for number in range(options.streams)]
    model = get_peft_model(make_model(options.shape, options.dtype), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    ids = torch.from_numpy(make_tokens(1.0, options.streams, PROMPT)[0]).long()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "adapter_names": names}
    lengths = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generate(**given, **lengths, min_new_tokens=2, max_new_tokens=2)  # nothing is measured of what it does once
    began = time.perf_counter()
    model.generate(**given, **lengths, min_new_tokens=1, max_new_tokens=1)
    first = time.perf_counter() - began
    began = time.perf_counter()
    out = model.generate(**given, **lengths, min_new_tokens=options.answer, max_new_tokens=options.answer)
    seconds = time.perf_counter() - began
    assert out.shape[1] == PROMPT + options.answer
    print(json.dumps({
        "tokens a second": options.streams * options.answer / seconds,
        "pieces a second once all have begun": options.streams * (options.answer - 1) / (seconds - first),
        "first token": [first] * options.streams,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
