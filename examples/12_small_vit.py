"""Prepare `make demo-vit`: a vision transformer of 1.4 million parameters that has seen the digits 0 to 4 alone.

    python examples/12_small_vit.py demo/image/digits demo/vit [ROWS] [STEPS]

After 07_digits.py. Written are a Hugging Face folder, `base`, trained here in some minutes if it is not there, and the
digits 5 to 9 as `digits-ROWS`: ROWS of each (100) to learn from, and all that are held out.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample
from transformers import ViTConfig, ViTForImageClassification

SEEN, NEW, BATCH, RATE = "01234", "56789", 32, 1e-3
SHAPE = {"image_size": 28, "patch_size": 7, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3,
         "num_attention_heads": 4, "id2label": dict(enumerate(SEEN))}  # fmt: skip
READING = {"size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def read(folder):  # pictures float32 (rows, 3, 28, 28), from 0 to 2, and the places of their digits int64 (rows,)
    paths = [path for digit in SEEN for path in sorted((folder / digit).glob("*.png"))]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB"), np.float32) for path in paths])
    labels = torch.tensor([SEEN.index(path.parent.name) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5, labels


def moved(pixels):  # each turned, slanted, scaled and shifted a little, for the model to learn shapes and no places
    change = torch.eye(2, 3) + (2 * torch.rand(len(pixels), 2, 3) - 1) * torch.tensor([0.1, 0.1, 0.15])
    return grid_sample(pixels, affine_grid(change, list(pixels.shape), False), align_corners=False)


source, out = Path(sys.argv[1]), Path(sys.argv[2])
rows, steps = (*map(int, sys.argv[3:]), *(100, 2800)[len(sys.argv) - 3 :])
for part, most, digit in [(*part, digit) for part in (("train", rows), ("valid", None)) for digit in NEW]:
    (place := out / f"digits-{rows}" / part / digit).mkdir(parents=True, exist_ok=True)
    for path in sorted((source / part / digit).glob("*.png"))[:most]:
        shutil.copy(path, place)
if (out / "base").exists():
    sys.exit()
torch.manual_seed(0)
model, (pixels, labels) = ViTForImageClassification(ViTConfig(**SHAPE)), read(source / "train")
optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
for step in range(steps):
    optimiser.param_groups[0]["lr"] = RATE * min(1, 10 * (step + 1) / steps, 1.1 - step / steps)
    chosen = torch.randint(len(labels), (BATCH,))
    optimiser.zero_grad()
    model(moved(pixels[chosen]) - 1, labels=labels[chosen]).loss.backward()
    optimiser.step()
pixels, labels = read(source / "valid")
right = float((model.eval()(pixels - 1).logits.argmax(1) == labels).float().mean())
print(f"{right:.1%} of the held-out digits {SEEN[0]} to {SEEN[-1]} are right")
model.save_pretrained(out / "base")
(out / "base" / "preprocessor_config.json").write_text(json.dumps(READING))
