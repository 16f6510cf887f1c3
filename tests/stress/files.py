"""Files from untrusted sources, damaged in every way: each is refused with an error of ours, or read."""

import functools
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from stress import TINY, Line
from stress.guided import Corpus

SLOW_SECONDS = 0.1  # of the processor's time, so that other work on the machine does not count
SLOW_WALL_SECONDS = 5.0  # by the clock: something that waits
MOST_GROWN_BYTES = 64_000_000  # in one case
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


def mutated(whole: bytes, dice: random.Random, header: int) -> bytes:
    """A file with something wrong in its first `header` bytes, or cut short, or with bytes too many."""
    found = bytearray(whole)
    for _ in range(dice.randint(1, 4)):
        place, kind = dice.randrange(min(header, len(found)) or 1), dice.randrange(7)
        if kind == 0:
            found[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            found[place] = dice.randrange(256)
        elif kind == 2:  # a number, perhaps a length or an offset
            value = dice.choice([0, 1, 255, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, dice.getrandbits(64)])
            width = dice.choice([1, 4, 8])
            found[place : place + width] = (value % 256**width).to_bytes(width, "little")
        elif kind == 3:
            del found[place : place + dice.randint(1, 64)]
        elif kind == 4:
            found[place:place] = bytes(dice.randrange(256) for _ in range(dice.randint(1, 16)))
        elif kind == 5:  # another piece of the header here
            other = dice.randrange(min(header, len(found)) or 1)
            found[place : place + 16] = found[other : other + 16]
        else:
            del found[dice.randrange(len(found)) :]
        if not found:
            break
    return bytes(found)


def fuzz_files(name: str, whole: bytes, suffix: str, header: int, count: int, read: Callable[[Path], object]) -> Line:
    """Read mutated files: each is refused with an error of ours, or read; nothing else, and quickly."""
    dice, corpus = random.Random(0), Corpus(whole)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:

        def cases() -> Iterator[Callable[[], object]]:
            for number in range(count):
                path = Path(folder) / f"{number}{suffix}"
                content = mutated(corpus.pick(dice), dice, header)
                path.write_bytes(content)
                case = functools.partial(read, path)
                if 0 < len(content) < 2 * len(whole):
                    corpus.watch(content, case)
                yield case
                path.unlink()

        line = try_all(name, cases())
    line.note += f"; {len(corpus.found)} that reached new lines were changed again"
    return line


def try_all(name: str, cases: Iterable[Callable[[], object]]) -> Line:
    """Call each case: it ends well, or in an error of ours, and quickly."""
    from thimble.errors import InputError

    wrong, slow, refused, tried, most = [], 0, 0, 0, 0
    before, began = _peak_bytes(), time.perf_counter()
    for case in cases:
        tried += 1
        peak = _peak_bytes()
        started, started_wall = time.process_time(), time.perf_counter()
        try:
            case()
        except InputError:
            refused += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a package in Rust is no Exception
            wrong.append(f"{type(error).__name__}: {error}")
        slow += time.process_time() - started > SLOW_SECONDS or time.perf_counter() - started_wall > SLOW_WALL_SECONDS
        most = max(most, _peak_bytes() - peak)
    grown = (_peak_bytes() - before) / 1e6
    for text in sorted(set(wrong))[:10]:
        print("   ", text[:200])
    memory = f"memory grew by {most / 1e6:.0f} MB in one, {grown:.0f} in all"
    note = f"{refused} refused, {slow} took over {SLOW_SECONDS} s, {memory}"
    return Line(name, tried, len(wrong) + slow + (most > MOST_GROWN_BYTES), time.perf_counter() - began, note)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz_safetensors(count: int) -> Line:
    from thimble.files.tensors import open_tensors, write_safetensors

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_safetensors(path, {f"layer.{n}": np.ones((3, 4), np.float32) for n in range(6)}, {"format": "pt"})
        whole = path.read_bytes()

    def read(path: Path) -> None:
        file = open_tensors(path)
        for name in file.tensors:
            file.read(name)

    return fuzz_files("mutated safetensors", whole, ".safetensors", 600, count, read)


def fuzz_gguf(count: int) -> Line:
    from thimble.models.base import open_base

    whole = TINY.read_bytes()
    header = len(whole) - sum(w.info.nbytes for w in open_base(TINY).weights.values())
    return fuzz_files("mutated GGUF", whole, ".gguf", header, count, lambda path: open_base(path))


def fuzz_gguf_adapter(count: int) -> Line:
    """A LoRA adapter as GGUF, on a base that is sound."""
    from samples import make_adapter
    from thimble.exports.gguf_adapter import write_gguf_adapter
    from thimble.models.base import open_base
    from thimble.models.gguf_adapter import load_gguf_adapter

    base = open_base(TINY)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        write_gguf_adapter(make_adapter(base), base, path)
        whole = path.read_bytes()
    header = whole.rindex(b".lora_b") + 64  # behind the last entry of the list of tensors
    return fuzz_files(
        "mutated GGUF adapters", whole, ".gguf", header, count, lambda path: load_gguf_adapter(path, base)
    )
