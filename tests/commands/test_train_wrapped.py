"""A run on a text model inside of a model of text and images: what it leaves is used by PEFT as its report says."""

import json
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel

import thimble
from fixtures.tiny_tokenizers import write_tokenizer
from wrapped import make_wrapped


def test_the_adapter_of_a_wrapped_base_works_in_peft_as_the_report_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_wrapped("smolvlm", tmp_path / "base")
    write_tokenizer("smollm", tmp_path / "base")
    rows = [{"prompt": f"say {n} ", "completion": f"{n} it is"} for n in range(12)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = thimble.train(
        "mine.jsonl", base="base", out="run", max_steps=2, seq_len=64, batch_tokens=64, compute="fp32", rank=2,
        eval_rows=0, max_new_tokens=1, valid_split=0, learning_rate=0.02,
    )  # fmt: skip
    page = Path("run/report.html").read_text()
    assert report.loader == "AutoModelForImageTextToText"
    assert "from transformers import AutoModelForImageTextToText" in page
    base = getattr(transformers, report.loader).from_pretrained(report.base_path).eval()
    ids = torch.tensor([[5, 9, 17, 33]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, report.adapter).eval()(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-3
