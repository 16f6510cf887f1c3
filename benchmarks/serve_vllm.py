"""One contestant of `make bench-serve`: vLLM on a CPU, 8 requests with an adapter each in one call.

    benchmarks/vllm-env/bin/python benchmarks/serve_vllm.py [--shape 135m] [--dtype bf16] [--streams 8]

Runs in an environment of its own, which `make benchmarks/vllm-env/installed` makes. A model of a given shape with
random weights, adapters of rank 16 on every linear layer; all requests are there at the beginning. Prints tokens a
second as JSON; what vLLM tells goes to standard error.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="2", HF_HUB_OFFLINE="1")

from make_models import SHAPES
from make_rows import RANK, make_tokens
from train_peft import make_model

PROMPT, ANSWER = 121, 128
TYPES = {"fp32": "float32", "bf16": "bfloat16"}


def write_adapters(model, folder, number):
    """Adapters in PEFT's layout."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "a0")
    paths = [folder / f"a{place}" for place in range(number)]
    for path in paths[1:]:
        path.symlink_to(folder / "a0")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="135m", choices=SHAPES)
    parser.add_argument("--dtype", default="bf16", choices=TYPES)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--answer", type=int, default=ANSWER, help="tokens written a stream")
    options = parser.parse_args()
    told, sys.stdout = sys.stdout, sys.stderr  # it prints its progress
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(options.shape, options.dtype)
        model.save_pretrained(folder / "base")
        adapters = write_adapters(model, folder, options.streams)
        engine = LLM(
            str(folder / "base"), dtype=TYPES[options.dtype], skip_tokenizer_init=True, enable_lora=True,
            max_loras=options.streams, max_lora_rank=RANK, max_model_len=512, enable_prefix_caching=False,
            max_num_seqs=options.streams, max_num_batched_tokens=1024, enforce_eager=True,
        )  # fmt: skip
        prompts = [{"prompt_token_ids": list(map(int, row))} for row in make_tokens(1.0, options.streams, PROMPT)[0]]
        loras = [LoRARequest(path.name, place + 1, str(path)) for place, path in enumerate(adapters)]

        def run(tokens):
            options_of_it = SamplingParams(
                temperature=1.0, seed=0, max_tokens=tokens, ignore_eos=True, detokenize=False
            )
            began = time.perf_counter()
            engine.generate(prompts, options_of_it, lora_request=loras, use_tqdm=False)
            return time.perf_counter() - began

        run(2)  # nothing is measured of what it does once
        first, seconds = run(1), run(options.answer)
    print(json.dumps({
        "tokens a second": options.streams * options.answer / seconds,
        "pieces a second once all have begun": options.streams * (options.answer - 1) / (seconds - first),
        "first token": [first] * options.streams,
    }), file=told)  # fmt: skip


if __name__ == "__main__":
    main()
