"""What the contestants learn from: the same random tokens, and ten rows of examples."""

import json
from pathlib import Path

import numpy as np

VOCABULARY, RANK, ALPHA, RATE = 49152, 16, 32, 1e-4


def make_tokens(labels: float, rows: int = 4, length: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and a mask of those that are learned: the last `labels` share of each row, as a completion is."""
    ids = np.random.default_rng(0).integers(10, VOCABULARY, (rows, length)).astype(np.int32)
    is_learned = np.broadcast_to(np.arange(length) >= length * (1 - labels), ids.shape)
    return ids, is_learned


def ten_rows(path: Path) -> None:
    """Ten questions and answers."""
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"{n} plus {n} is {2 * n}."} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def peak_bytes() -> int:
    """Largest resident size of this process so far, by the kernel's account; memory-mapped pages included."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
