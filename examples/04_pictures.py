"""LoRA on a convolutional network in a plain loop: digits 0 to 4 are known, 5 to 9 are learned.

    python examples/04_pictures.py [FOLDER]

Prints how many unseen pictures a new head tells right on the frozen network, and LoRA with a new head.
"""

import sys

import torch
from torch import nn

import thimble

SHAPES = {  # 3 x 5 dots each
    0: "###|#.#|#.#|#.#|###", 1: ".#.|##.|.#.|.#.|###", 2: "###|..#|###|#..|###", 3: "###|..#|.##|..#|###",
    4: "#.#|#.#|###|..#|..#", 5: "###|#..|###|..#|###", 6: "###|#..|###|#.#|###", 7: "###|..#|.#.|.#.|.#.",
    8: "###|#.#|###|#.#|###", 9: "###|#.#|###|..#|###",
}  # fmt: skip


def pictures(digits: range, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures (count, 1, 9, 9) of digits at random places, and their labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(digits), (count,), generator=random)
    images = 0.45 * torch.randn(count, 1, 9, 9, generator=random)
    places = torch.randint(5, (count, 2), generator=random)
    for image, label, (row, column) in zip(images, labels, places, strict=True):
        dots = torch.tensor([[dot == "#" for dot in line] for line in SHAPES[digits[label]].split("|")]).float()
        image[0, row : row + 5, column : column + 3] += dots
    return images, labels


def fit(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], steps: int) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (64,))
        loss = nn.functional.cross_entropy(model(data[0][rows]), data[1][rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


torch.manual_seed(0)
layers = (nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
model = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(128, 5))
fit(model, pictures(range(5), 2000, 1), 150)
new, unseen = pictures(range(5, 10), 500, 2), pictures(range(5, 10), 1000, 3)
with torch.no_grad():
    features, unseen_features = (model.eval()[:8](images) for images in (new[0], unseen[0]))
head = nn.Linear(128, 5)
fit(head, (features, new[1]), 200)
right = (head(unseen_features).argmax(1) == unseen[1]).float().mean()
print(f"frozen network, new head: {100 * right:.1f} % of 1,000 unseen pictures right")
print(thimble.attach(model, "all-conv", rank=8, train_also=["8"]))
fit(model, new, 200)
right = (model.eval()(unseen[0]).argmax(1) == unseen[1]).float().mean()
print(f"LoRA, new head: {100 * right:.1f} % of 1,000 unseen pictures right")
thimble.save_adapter(thimble.adapter_of(model), (sys.argv[1:] or ["pictures_adapter"])[0])
