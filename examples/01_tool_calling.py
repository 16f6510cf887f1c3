"""Prepare the demo: tool calls from the Berkeley Function Calling Leaderboard (package bfcl-eval, Apache-2.0).

Rows that share a function, called or not, land on the same side: no function of a validation row is seen in training.
"""

import importlib.util
import json
import random
import sys
from pathlib import Path

SOURCES = ("simple_python", "live_simple", "multiple")
HELD_OUT_ROWS, LONGEST = 200, 1350  # rows, characters
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}  # Python's names, JSON schema's


def schema(value):
    if isinstance(value, dict):
        return {k: TYPES.get(v, v) if k == "type" and isinstance(v, str) else schema(v) for k, v in value.items()}
    return [schema(item) for item in value] if isinstance(value, list) else value


def first(accepted):
    """BFCL lists every accepted value, at every level; the first one is taught."""
    if isinstance(accepted, dict):
        return {name: first(values[0]) for name, values in accepted.items() if values and values[0] != ""}
    return [first(item) for item in accepted] if isinstance(accepted, list) else accepted


def read(folder, source):
    tasks, truth = (folder / place / f"BFCL_v4_{source}.json" for place in ("", "possible_answer"))
    answers = {row["id"]: row["ground_truth"][0] for row in map(json.loads, truth.open(encoding="utf-8"))}
    for row in map(json.loads, tasks.open(encoding="utf-8")):
        [(name, arguments)] = answers[row["id"]].items()
        call = {"type": "function", "function": {"name": name, "arguments": json.dumps(first(arguments))}}
        tools = [{"type": "function", "function": schema(tool)} for tool in row["function"]]
        yield {"messages": [*row["question"][0], {"role": "assistant", "tool_calls": [call]}], "tools": tools}


def split(rows):
    groups = []  # of (function names, rows) that are linked by a shared function
    for row in rows:
        names, members = {tool["function"]["name"] for tool in row["tools"]}, [row]
        for group in [group for group in groups if group[0] & names]:
            groups.remove(group)
            names, members = names | group[0], members + group[1]
        groups.append((names, members))
    random.Random(0).shuffle(groups)
    sides = {"train": [], "valid": []}
    for _, members in groups:
        sides["valid" if len(sides["valid"]) + len(members) <= HELD_OUT_ROWS else "train"].extend(members)
    return sides


data = Path(importlib.util.find_spec("bfcl_eval").submodule_search_locations[0]) / "data"
out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo/data")
out.mkdir(parents=True, exist_ok=True)
for side, rows in split(r for source in SOURCES for r in read(data, source) if len(json.dumps(r)) <= LONGEST).items():
    (out / f"{side}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out / side}.jsonl: {len(rows)} rows")
