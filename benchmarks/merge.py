"""Merging an adapter into a folder of 1B parameters: Thimble, PEFT's merge_and_unload with save_pretrained, and a copy.

`python benchmarks/merge.py FOLDER` makes base and adapter there, if they are not (2.5 GB of random bfloat16), and runs
each contestant in a process of its own, in turns; each ends when its files are on disk. What it wrote is deleted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

COPY = """
import os, shutil, sys
for name in os.listdir(sys.argv[1]):
    shutil.copyfile(os.path.join(sys.argv[1], name), os.path.join(sys.argv[3], name))
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
SYNC = """
for name in os.listdir(sys.argv[3]):
    with open(os.path.join(sys.argv[3], name)) as file:
        os.fsync(file.fileno())
"""
THIMBLE = """
import sys
from thimble.cli import main
sys.exit(main(["merge", sys.argv[2], "--base", sys.argv[1], "--out", sys.argv[3]]))
"""
CONTESTANTS = {"copy": COPY + SYNC, "thimble": THIMBLE, "peft": PEFT + "import os" + SYNC}
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}  # fmt: skip
RANK = 16


def make_base(folder: Path) -> None:
    """A base of random numbers in the shape of Llama 3.2 1B, one file a block."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    LlamaConfig(**SHAPE, dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    hidden, inner, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], 512
    sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
             "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
             "mlp.down_proj": (hidden, inner)}  # fmt: skip
    places = {}

    def save(number: int, tensors: dict) -> None:
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    for block in range(SHAPE["num_hidden_layers"]):
        path = f"model.layers.{block}"
        tensors = {f"{path}.{name}.weight": torch.randn(size).mul_(0.02).bfloat16() for name, size in sizes.items()}
        tensors |= {f"{path}.{name}.weight": torch.ones(hidden).bfloat16() for name in
                    ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
        save(block, tensors)
    embedding = torch.randn(SHAPE["vocab_size"], hidden, dtype=torch.bfloat16).mul_(0.02)
    last = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(hidden).bfloat16()}
    save(SHAPE["num_hidden_layers"], last)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def make_adapter(base: Path, folder: Path) -> None:
    """An adapter of all linear layers, random."""
    import numpy as np

    from thimble.core.adapter import Adapter
    from thimble.core.lowrank import Factors
    from thimble.files.peft import save_adapter
    from thimble.models.base import open_base

    random = np.random.default_rng(0)
    layers = {
        path: Factors(random.standard_normal((RANK, fan_in), np.float32) * 0.02,
                      random.standard_normal((fan_out, RANK), np.float32) * 0.02, 2.0)
        for path, (fan_out, fan_in) in open_base(base).spec.linear_shapes().items()
    }  # fmt: skip
    save_adapter(Adapter(layers, str(base)), folder)


def measure(name: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Wall and CPU seconds, and the highest resident memory, of one contestant."""
    shutil.rmtree(out, ignore_errors=True)
    if name != "thimble":
        out.mkdir()
    began = time.perf_counter()
    words = [sys.executable, "-c", CONTESTANTS[name], str(base), str(adapter), str(out)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read().decode()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{name} failed: {errors[-2000:]}")
    shutil.rmtree(out)
    return {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}


def main() -> None:
    """Run the contestants in turns, and print each turn as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--make", action="store_true", help="make base and adapter, and run nobody")
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS))
    options = parser.parse_args()
    base, adapter = options.folder / "base", options.folder / "adapter"
    if options.make:
        make_base(base)
        make_adapter(base, adapter)
        return
    if not adapter.exists():  # in another process: the memory of this one would count as that of its children
        subprocess.run([sys.executable, __file__, str(options.folder), "--make"], check=True)
    for turn in range(options.turns):
        for name in options.only:
            found = measure(name, base, adapter, options.folder / "out")
            print(json.dumps({"turn": turn, "contestant": name, **found}), flush=True)


if __name__ == "__main__":
    main()
