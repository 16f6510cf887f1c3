"""PEFT on the demo's own split, in its usual loop: what the demo is compared with.

Trains for `--minutes` with the settings of a plain script (r 8 on attention, batch 4, padded, fp32) on the dequantised
base, and writes the adapter; `thimble evaluate demo/data --adapter OUT` then scores both alike, on the same 200 rows.

    python benchmarks/demo_peft.py demo/data OUT --minutes 4
"""

import argparse
import json
import random
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GgufConfig

from thimble.config.train import TrainConfig
from thimble.data.examples import encode_examples
from thimble.data.model import open_model
from thimble.data.records import read_dataset
from thimble.models.base import default_base

RATE, ROWS_AT_ONCE = 1e-3, 4


def batches(rows):
    """Rows of like length together, in random order, as the prototype did."""
    order = sorted(range(len(rows)), key=lambda k: len(rows[k].ids) + random.random() * 8)
    groups = [order[k : k + ROWS_AT_ONCE] for k in range(0, len(order), ROWS_AT_ONCE)]
    random.shuffle(groups)
    return [[rows[k] for k in group] for group in groups]


def padded(rows):
    """Ids, labels (shifted by transformers itself) and mask of a batch."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), 2)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for place, row in enumerate(rows):
        n = len(row.ids)
        ids[place, :n], mask[place, :n] = torch.from_numpy(row.ids), 1
        labels[place, 1:n] = torch.from_numpy(row.labels[:-1])
    return ids, labels, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--minutes", type=float, default=4.0)
    options = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium")
    dataset = read_dataset(options.data)
    config = TrainConfig.build({"data": options.data})
    rows = encode_examples(dataset, dataset.train, (), open_model(None), config).train
    path = default_base()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE)
    began, limit, step, tokens = time.perf_counter(), options.minutes * 60, 0, 0
    model.train()
    while (spent := time.perf_counter() - began) < limit:
        for batch in batches(rows):
            spent = time.perf_counter() - began
            if spent >= limit:
                break
            optimiser.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 10) * max(0.05, 1 - spent / limit)
            ids, labels, mask = padded(batch)
            model(input_ids=ids, labels=labels, attention_mask=mask).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            step, tokens = step + 1, tokens + int(mask.sum())
    model.save_pretrained(options.out)
    print(json.dumps({"steps": step, "tokens": tokens, "seconds": spent, "tokens_per_second": tokens / spent}))


main()
