"""One contestant on chat rows of real, uneven lengths, one pass over them: Thimble, or HF Trainer with PEFT.

Rows are those of the demo (`examples/01_tool_calling.py`), rendered by the base's own template; the loss is taken on
the assistant's turns by both.
"""

import argparse
import json
import tempfile
import time

import torch

from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.torch.compute import machine
from thimble.backends.torch.session import TorchSession
from thimble.config.train import TrainConfig
from thimble.core.adapter import fresh_adapter
from thimble.core.method import Method
from thimble.core.targets import size_layers
from thimble.data.batches import epoch_steps, shares
from thimble.data.encode import Row
from thimble.data.examples import encode_examples
from thimble.data.model import open_model
from thimble.data.records import read_dataset
from thimble.models.base import default_base, open_base
from thimble.models.execution import ExecutionPlan

RANK, ALPHA, RATE, ROWS_PER_STEP = 16, 32, 3e-4, 8


def read_rows(path: str, count: int) -> list[Row]:
    """The first rows of some data."""
    dataset = read_dataset(path)
    config = TrainConfig.build({"data": path})
    return list(encode_examples(dataset, dataset.train[:count], (), open_model(None), config).train)


def with_thimble(rows: list[Row], compute: str) -> float:
    """Seconds of one pass."""
    machine()  # chooses how fp32 is multiplied, as the commands do
    base = open_base(None)
    store = "int8" if compute == "int8" else "file"
    session = TorchSession(base, compute, store, sample=rows[0].ids)
    shapes = base.spec.linear_shapes()
    adapter = fresh_adapter(shapes, "kaiming", size_layers(list(shapes), RANK, ALPHA), 0)
    state, execution = session.start(adapter, Method()), ExecutionPlan(store, num_shares=2)
    steps = epoch_steps([len(row.ids) for row in rows], 2048, 0, 0)
    began = time.perf_counter()
    for number, step in enumerate(steps):
        chosen = [rows[place] for place in step]
        work = Work(shares(chosen, 2, 1024), sum(row.target_tokens for row in chosen))
        state = session.apply(state, session.gradient(state, work, Objective(), execution, StepKey(0, number)), RATE)
    return time.perf_counter() - began


def with_trainer(rows: list[Row]) -> float:
    """Seconds of one pass."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForSeq2Seq,
        GgufConfig,
        PreTrainedTokenizerFast,
        Trainer,
        TrainingArguments,
    )

    path = default_base()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    # The collator only needs a padding token; the rows are token ids already. Labels are shifted by the model.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>"
    )
    data = [{"input_ids": row.ids.tolist(), "labels": [-100, *row.labels[:-1].tolist()]} for row in rows]
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), num_train_epochs=1, per_device_train_batch_size=ROWS_PER_STEP,
        learning_rate=RATE,
        use_cpu=True, bf16=True, save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100), train_dataset=data)
    began = time.perf_counter()
    trainer.train()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("who", choices=("bf16", "int8", "trainer"))
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    rows = read_rows(options.data, options.rows)
    seconds = with_trainer(rows) if options.who == "trainer" else with_thimble(rows, options.who)
    print(json.dumps({"rows_per_second": len(rows) / seconds, "seconds": seconds}))


main()
