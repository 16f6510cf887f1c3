"""EfficientNet-Lite0 (Tan and Le, arXiv:1905.11946) as a base, with the weights that 07_digits.py writes."""

import os

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = os.environ.get("EFFICIENTNET", "demo/image/efficientnet_lite0.safetensors")
# Expansion, channels, blocks, stride of the first, and kernel of each stage.
STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip


class Pad(nn.Module):
    """Pads for a convolution as TensorFlow does: more at the end where it cannot be even."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        more = [max(0, (-(-side // self.stride) - 1) * self.stride + self.kernel - side) for side in x.shape[:1:-1]]
        return functional.pad(x, [half for total in more for half in (total // 2, total - total // 2)])


def layer(width: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, is_active: bool = True) -> list:
    conv, norm = nn.Conv2d(width, out, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(out, eps=1e-3)
    return [*([Pad(kernel, stride)] if kernel > 1 else []), conv, norm, *([nn.ReLU6()] if is_active else [])]


class Block(nn.Sequential):
    """Wider, each channel by itself, narrower again; added to what came in where that is as large."""

    def __init__(self, width: int, out: int, expansion: int, stride: int, kernel: int) -> None:
        wide = width * expansion
        first, deep = layer(width, wide) if expansion > 1 else [], layer(wide, wide, kernel, stride, wide)
        super().__init__(*first, *deep, *layer(wide, out, is_active=False))
        self.is_added = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x) if self.is_added else super().forward(x)


def build(weights: str | None = WEIGHTS) -> nn.Module:
    blocks, width = [nn.Sequential(*layer(3, 32, 3, 2))], 32
    for expansion, out, count, first_stride, kernel in STAGES:
        for number in range(count):
            blocks.append(Block(width, out, expansion, first_stride if number == 0 else 1, kernel))
            width = out
    ends = [nn.Sequential(*layer(width, 1280)), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    module = nn.Sequential(*blocks, *ends, nn.Linear(1280, 1000))
    module.preprocessing = {"size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if weights:
        module.load_state_dict(load_file(weights))
    return module.eval()
