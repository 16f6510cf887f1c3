"""Which number type this machine multiplies fastest, found by a short race that starts small.

bfloat16 is about twice as fast as float32 on CPUs with instructions for it and up to 499 times slower on others
(pytorch issue 146508), so the loser of a small product never meets a large one.
"""

import time

import torch

# Sizes of square products; a type this many times slower than the best is dropped there. A busy machine makes small
# products look slow, so only a hopeless loser goes early; the last size decides.
SIZES = {64: 30.0, 256: 6.0, 768: 0.0}  # 0: none is dropped
REPEATS = 6
FP32_ERROR = 1e-5  # largest relative error that still counts as float32
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPES = {**FLOATS, "int8": torch.bfloat16}  # of activations


def choose_compute(wanted: str) -> tuple[str, str]:
    """Decide the type of the large products.

    Args:
        wanted: `auto`, `fp32` or `bf16`.

    Returns:
        The type, and why, in a sentence.
    """
    fast = use_fast_fp32()
    if wanted != "auto":
        return wanted, f"{wanted} was asked for"
    rates = race()
    best = max(rates, key=lambda name: rates[name])
    told = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
    return best, f"{best} is fastest here ({told}{'; fp32 through oneDNN' if fast else ''})"


def race() -> dict[str, float]:
    """Measure square products; returns operations per second of each type that was still in at the end."""
    rates = dict.fromkeys(FLOATS, 1.0)
    for size, too_slow in SIZES.items():
        rates = {name: _rate(FLOATS[name], size) for name in rates}
        best = max(rates.values())
        rates = {name: rate for name, rate in rates.items() if not too_slow or rate * too_slow >= best}
    return rates


def _rate(dtype: torch.dtype, size: int) -> float:
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def use_fast_fp32() -> bool:
    """Route float32 products through oneDNN where that is still float32: 2.3 times MKL's rate on AMD.

    The switch permits less precise arithmetic, so it is kept only if one product against float64 is exact enough.
    """
    torch.set_float32_matmul_precision("medium")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((64, 576), (576, 512)))
    exact = a @ b
    error = ((a.float() @ b.float()).double() - exact).norm() / exact.norm()
    if error > FP32_ERROR:
        torch.set_float32_matmul_precision("highest")
    return bool(error <= FP32_ERROR)
