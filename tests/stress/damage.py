"""Checkpoints that are damaged on disk: noticed, named and passed over."""

import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

from stress import Line
from stress.made import MEMORY, is_step, save
from thimble.training.checkpoint import FOLDER, MANIFEST, STATE, latest_checkpoint


def _flip(path: Path, dice: random.Random) -> None:
    whole = bytearray(path.read_bytes())
    whole[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
    path.write_bytes(whole)


def _swap(one: Path, other: Path) -> None:
    kept = one.with_name("kept")
    one.rename(kept)
    other.rename(one)
    kept.rename(other)


def _damage(place: Path, kind: str, dice: random.Random) -> set[str]:
    """Damage checkpoint 3, in some ways 2 as well; returns what is damaged then."""
    one, two, three = (place / f"step-{step:08d}" for step in (1, 2, 3))
    name = dice.choice((STATE, MANIFEST))
    if kind == "bit flipped":
        _flip(three / name, dice)
    elif kind == "cut short":
        os.truncate(three / name, dice.randrange((three / name).stat().st_size))
    elif kind == "zeros":
        (three / name).write_bytes(bytes((three / name).stat().st_size))
    elif kind == "file gone":
        (three / name).unlink()
    elif kind == "files swapped":
        _swap(two / name, three / name)
        return {two.name, three.name}
    elif kind == "folders swapped":
        _swap(two, three)
        return {two.name, three.name}
    elif kind == "manifest of another step":
        shutil.copy(one / MANIFEST, three / MANIFEST)
    elif kind == "copy of another step":
        shutil.rmtree(three)
        shutil.copytree(one, three)
    elif kind == "vouches for nothing":
        manifest = json.loads((three / MANIFEST).read_text())
        (three / MANIFEST).write_text(json.dumps({**manifest, "files": {}}))
    else:
        other = place / f"step-{dice.randrange(4, 10**8):08d}"
        other.mkdir()
        if kind == "foreign folder":
            (other / MANIFEST).write_text(json.dumps({"step": 4, "files": {"model.safetensors": ""}}))
            (other / STATE).write_bytes(dice.randbytes(100))
        return {other.name}
    return {three.name}


OTHER_DAMAGE = (
    "cut short", "zeros", "file gone", "files swapped", "folders swapped", "manifest of another step",
    "copy of another step", "vouches for nothing", "empty folder", "foreign folder",
)  # fmt: skip


def bit_flips(count: int) -> Line:
    """Flip a bit of a checkpoint, `count` times, and damage it otherwise half as often."""
    began, dice, wrong, same = time.perf_counter(), random.Random(0), [], 0
    kinds = ["bit flipped"] * count + [OTHER_DAMAGE[number % len(OTHER_DAMAGE)] for number in range(-(-count // 2))]
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        begun = Path(place, "begun")
        for step in (1, 2, 3):
            save(begun, step)
            shutil.copytree(begun / FOLDER / f"step-{step:08d}", begun / "kept" / f"step-{step:08d}")
        shutil.rmtree(begun / FOLDER)
        (begun / "kept").rename(begun / FOLDER)
        for kind in kinds:
            folder = Path(place, "damaged")
            shutil.copytree(begun, folder)
            damaged = _damage(folder / FOLDER, kind, dice)
            found = latest_checkpoint(folder)
            expected = max({"step-00000001", "step-00000002", "step-00000003"} - damaged)
            is_noticed = found and set(found.damaged) == damaged and is_step(found, int(expected[5:]))
            is_same = kind == "bit flipped" and not is_noticed and is_step(found, 3)  # the digit of a number too long
            same += is_same
            if not is_noticed and not is_same:
                wrong.append(f"{kind}: {sorted(damaged)} are damaged, {found and (found.step, found.damaged)} was used")
            shutil.rmtree(folder)
    for text in sorted(set(wrong))[:10]:
        print("   ", text)
    note = f"{same} of the bits changed nothing that is read"
    return Line("damaged checkpoints", len(kinds), len(wrong), time.perf_counter() - began, note)
