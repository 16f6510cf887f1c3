"""Prepare `make demo-vit`: a vision transformer of 1.2 million parameters that has seen the digits 0 to 4 alone.

    python examples/12_small_vit.py demo/image/digits demo/vit [ROWS] [EPOCHS]

After 07_digits.py. Written are a Hugging Face folder, `base`, trained here in some minutes if it is not there, and the
digits 5 to 9 as `digits-ROWS`: ROWS of each (20) to learn from, and all that are held out.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

SEEN, NEW, BATCH, RATE, MOVED = "01234", "56789", 64, 1e-3, 3  # by so many pixels at most, for it to learn shapes
SHAPE = {"image_size": 28, "patch_size": 4, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6,
         "num_attention_heads": 4, "id2label": dict(enumerate(SEEN))}  # fmt: skip
READING = {"size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def read(folder):  # pictures float32 (rows, 3, 28, 28), and the places of their digits int64 (rows,)
    paths = [path for digit in SEEN for path in sorted((folder / digit).glob("*.png"))]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB"), np.float32) for path in paths])
    labels = torch.tensor([SEEN.index(path.parent.name) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, labels


def train(model, pixels, labels, epochs):
    optimiser = torch.optim.AdamW(model.parameters(), RATE)
    order = torch.cat([torch.randperm(len(labels)) for _ in range(epochs)]).split(BATCH)
    for step, rows in enumerate(order):
        optimiser.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 50, 2 - 2 * step / len(order))
        moved = pixels[rows].roll(torch.randint(-MOVED, MOVED + 1, (2,)).tolist(), (2, 3))
        loss = model(moved, labels=labels[rows]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


source, out = Path(sys.argv[1]), Path(sys.argv[2])
rows, epochs = (*map(int, sys.argv[3:]), *(20, 12)[len(sys.argv) - 3 :])
for digit in NEW:
    for part, most in (("train", rows), ("valid", None)):
        (place := out / f"digits-{rows}" / part / digit).mkdir(parents=True, exist_ok=True)
        for path in sorted((source / part / digit).glob("*.png"))[:most]:
            shutil.copy(path, place)
if (out / "base").exists():
    sys.exit()
torch.manual_seed(0)
model = ViTForImageClassification(ViTConfig(**SHAPE))
train(model, *read(source / "train"), epochs)
pixels, labels = read(source / "valid")
right = float((model.eval()(pixels).logits.argmax(1) == labels).float().mean())
print(f"{right:.1%} of the held-out digits {SEEN[0]} to {SEEN[-1]} are right")
model.save_pretrained(out / "base")
(out / "base" / "preprocessor_config.json").write_text(json.dumps(READING))
