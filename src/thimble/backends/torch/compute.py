"""What this machine multiplies fastest, found by a short race that starts small.

bfloat16 is about twice as fast as float32 on CPUs with instructions for it and up to 499 times slower on others
(pytorch issue 146508), so the loser of a small product never meets a large one.
"""

import math
import time
import timeit
from collections.abc import Callable, Mapping

import torch

from thimble.backends.torch.threads import num_cores
from thimble.errors import ConfigError
from thimble.models.machine import LoadMeter, Machine, core_set, processor, remembered

# Sizes of square products; a type this many times slower than the best is dropped there. A busy machine makes small
# products look slow, so only a hopeless loser goes early; the last size decides.
SIZES = {64: 30.0, 256: 6.0, 1024: 0.0}  # 0: none is dropped
REPEATS = 6
FP32_ERROR = 1e-5  # largest relative error that still counts as float32
COPY_NUMBERS = 1 << 24
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLOWER = 1.5  # a choice of the user's that is so many times slower is told
INT8_INSTRUCTIONS = {"avx512_vnni", "avx_vnni", "amx_int8"}
NO_INT8 = "this processor has no instructions for products of int8 (VNNI or AMX), which would be slower than fp32"


def choose_compute(wanted: str, is_fresh: bool = False) -> tuple[str, str]:
    """The type of the large products, and why, by rates measured anew if `is_fresh`; a ConfigError refuses bf16-int8
    where the processor has no instructions for int8. Where int8 can run depends on the store: see `choose_store`.
    """
    fast, here = use_fast_fp32(), machine(is_fresh=True) if is_fresh else machine()
    flops = here.flops
    if wanted == "bf16-int8" and "int8" not in flops:
        raise ConfigError(f"compute is bf16-int8: {NO_INT8}; use --compute bf16, or fp32 where that is faster")
    rates = {name: rate for name, rate in flops.items() if name in FLOATS}
    if wanted == "int8":
        return wanted, "int8 was asked for"
    if wanted != "auto":
        rate = _rate_of(wanted, flops)
        slower = max(rates.values()) / rate if rate else math.inf
        how_slow = "far" if math.isinf(slower) else f"{slower:.1f} times"
        return wanted, f"{wanted} was asked for" + (f", {how_slow} slower than auto here" if slower > SLOWER else "")
    best = max(rates, key=lambda name: rates[name])
    told = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
    told += "; fp32 through oneDNN" if fast else ""
    if here.is_loaded:
        told += f"; measured while other programs took {here.load:.0%} of the cores, so it is measured again next time"
    return best, f"{best} is fastest here ({told})"


def _rate_of(compute: str, flops: Mapping[str, float]) -> float:
    """Operations per second of a step that does half of them, the gradients of inputs, in the second of two types."""
    forward, _, back = compute.partition("-")
    rates = [flops.get(name, 0.0) for name in (forward, back or forward)]
    return 2 / sum(1 / rate for rate in rates) if all(rates) else 0.0


def torch_version() -> str:
    """Version of torch, which decides how products are summed."""
    return str(torch.__version__)


def machine(is_fresh: bool = False) -> Machine:
    """The rates of this machine for the cores and the quota of this process, remembered or, if `is_fresh`, measured."""
    name, flags = processor()
    use_fast_fp32()

    def measure() -> Machine:
        meter, flops = LoadMeter(), race()
        if flags & INT8_INSTRUCTIONS:
            flops["int8"] = _rate(torch.int8, max(SIZES))
        copy_bytes = _copy_rate()
        return Machine(name, num_cores(), flops, copy_bytes, time.time(), meter.share())

    key = f"{name}, cores {core_set()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return remembered(key, measure, is_fresh)


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
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    return 2 * size**3 / _fastest(lambda: multiply(a, b))


def _copy_rate() -> float:
    source, target = torch.ones(COPY_NUMBERS), torch.empty(COPY_NUMBERS)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source))


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the quickest of a few runs."""
    return min(timeit.repeat(work, number=1, repeat=REPEATS))


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
