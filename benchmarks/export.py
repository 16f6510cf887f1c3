"""Writing GGUF files: an adapter of the default base, or a base of 1B parameters in bfloat16 with its adapter merged.

    python benchmarks/export.py FOLDER KIND...

FOLDER gets bases and adapters, random, if they are not there (2.6 GB). A KIND is `adapter` or a type such as Q4_K_M.
Each is one `thimble export` without a proof in a process of its own; what it wrote is deleted. One line of JSON a kind.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from make_models import write_model
from merge import make_adapter

from thimble.models.base import default_base

COMMAND = "import sys; from thimble.cli import main; sys.exit(main(sys.argv[1:]))"


def make(folder: Path) -> None:
    """Bases and adapters, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for base, name in ((write_model("1b", "BF16", folder / "1b.gguf"), "1b-adapter"), (default_base(), "adapter")):
        if not (folder / name).exists():
            make_adapter(base, folder / name)


def measure(folder: Path, kind: str) -> dict[str, float]:
    """Wall and processor seconds, and the highest resident memory, of one export."""
    out = folder / "out.gguf"
    given = [str(folder / "adapter")]
    if kind != "adapter":
        given = [str(folder / "1b-adapter"), "--base", str(folder / "1b.gguf"), "--merged", "--type", kind]
    words = ["export", *given, "--proof", "never", "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{kind} failed")
    for path in folder.glob("out.gguf*"):
        path.unlink()
    processor = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "cpu_seconds": processor, "peak_bytes": used.ru_maxrss * 1024}


if __name__ == "__main__":
    place, kinds = Path(sys.argv[1]), sys.argv[2:]
    if kinds == ["make"]:
        make(place)
    else:  # the base is made by another process, whose memory would count as that of its children
        subprocess.run([sys.executable, __file__, str(place), "make"], check=True)
        for one in kinds:
            print(json.dumps(measure(place, one)), flush=True)
