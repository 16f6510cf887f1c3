"""LoRA in the Trainer of transformers: a tiny BERT learns which of two kinds the first word is of.

    python examples/05_trainer.py [FOLDER]

The Trainer needs nothing from Thimble: A and B are parameters of the model like others. Its checkpoints hold the whole
model with them; what you give away is the adapter folder.
"""

import sys
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import thimble


def rows(count: int, seed: int) -> list[dict]:
    """Texts of six words; label 1 if the first is of the second half of the vocabulary."""
    words = torch.randint(2, 30, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": text, "labels": int(text[0] >= 16)} for text in words]


torch.manual_seed(0)
config = BertConfig(
    vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
)
model = BertForSequenceClassification(config)  # in real life: .from_pretrained(...)
print(thimble.attach(model, "all-linear", rank=8, train_also=["classifier"], dropout=0.05))

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=20, per_device_train_batch_size=16, learning_rate=1e-2, logging_steps=10, save_steps=10,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows(320, 1), eval_dataset=rows(200, 2))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss {before:.4f} before, {trainer.evaluate()['eval_loss']:.4f} after 20 steps")
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-10")  # the second half again
    print(f"loss {trainer.evaluate()['eval_loss']:.4f} after the second half again, from a checkpoint")

adapter = (sys.argv[1:] or ["trainer_adapter"])[0]
thimble.save_adapter(thimble.adapter_of(model), adapter)
thimble.merge(model)  # for a model that runs as fast as its base
thimble.detach(model)
print(f"{adapter} holds the adapter; the model has it merged")
