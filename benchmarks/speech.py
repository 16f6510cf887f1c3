"""One contestant: Whisper on short clips, by thimble train, or by PEFT as its users have it; the last line is JSON.

    python benchmarks/speech.py demo/speech/names demo/speech/whisper [--way peft]

`peft` cuts the encoder to the longest clip, which is the best that can be had of one window for all; `peft-30` gives it
the 30 seconds of WhisperProcessor. Both get features that are made before the clock starts, batches of 16 clips, LoRA
of rank 16 on all linear layers, and float32 unless --dtype names another.
"""

import argparse
import csv
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

ROWS, RANK = 16, 16
LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def thimble_steps(args: argparse.Namespace) -> list[float]:
    """Seconds of each step of `thimble train`, read from its log."""
    import thimble

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        thimble.train(
            args.data, base=args.base, out=str(out), max_steps=args.steps, valid_split=0, batch_rows=ROWS, rank=RANK,
            learning_rate=1e-3, seed=0,
        )  # fmt: skip
        ends = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]


def peft_steps(args: argparse.Namespace) -> list[float]:
    """Seconds of each step of a plain loop around PEFT."""
    import peft
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForSpeechSeq2Seq, WhisperFeatureExtractor

    from thimble.data.media.sound import read_sound

    table = list(csv.DictReader((Path(args.data) / "metadata.csv").open(encoding="utf-8")))
    clips = [read_sound(Path(args.data) / row["file_name"], 16_000, 30) for row in table]
    seconds = 30 if args.way == "peft-30" else -(-max(map(len, clips)) // 16_000)
    extractor = WhisperFeatureExtractor.from_pretrained(args.base, chunk_length=seconds)
    features = torch.cat([extractor(clip, sampling_rate=16_000, return_tensors="pt").input_features for clip in clips])
    tokenizer, start = Tokenizer.from_file(f"{args.base}/tokenizer.json"), [50257, 50362]  # of tiny.en
    texts = [
        [*start, *tokenizer.encode(" " + row["transcription"], add_special_tokens=False).ids, 50256] for row in table
    ]
    model = AutoModelForSpeechSeq2Seq.from_pretrained(args.base, dtype=getattr(torch, args.dtype))
    encoder = model.model.encoder
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(
        encoder.embed_positions.weight[: 50 * seconds].detach()
    )
    model.config.max_source_positions = 50 * seconds
    # The model within is called: PEFT's own wrapper is for models that take input_ids.
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR)
    ).base_model.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser, order = torch.optim.AdamW(trained, 1e-3), torch.Generator().manual_seed(0)
    model.train()
    took = []
    for _ in range(args.steps):
        rows = torch.randperm(len(table), generator=order)[:ROWS]
        began = time.perf_counter()
        chosen = [texts[row] for row in rows]
        most = max(map(len, chosen)) - 1
        given = torch.tensor([text[:-1] + [50256] * (most - len(text) + 1) for text in chosen])
        labels = torch.tensor([[-100, *text[2:]] + [-100] * (most - len(text) + 1) for text in chosen])
        loss = model(features[rows].to(model.dtype), decoder_input_ids=given, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        took.append(time.perf_counter() - began)
    return took


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("base")
    parser.add_argument("--way", choices=("thimble", "peft", "peft-30"), default="thimble")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dtype", default="float32", help="of PEFT: float32 or bfloat16")
    args = parser.parse_args()
    took = thimble_steps(args) if args.way == "thimble" else peft_steps(args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": statistics.median(took[args.steps // 5 :]), "peak_bytes": peak}))
