"""Prepare the demo: tool calls from the Berkeley Function Calling Leaderboard (package bfcl-eval, Apache-2.0).

Writes DIR/train.jsonl and DIR/valid.jsonl. Rows that share a function, even as an alternative that is not called, land
on the same side, so no function of a held-out row is ever seen in training.

    python examples/01_tool_calling.py demo/data
    thimble train demo/data --out demo/run
"""

import importlib.util
import json
import random
import sys
from pathlib import Path

SOURCES = ("simple_python", "live_simple", "multiple")
HELD_OUT_ROWS, LONGEST_CHARACTERS = 200, 1350
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


def schema(value):
    """BFCL names types as Python does; OpenAI's form is JSON schema."""
    if isinstance(value, dict):
        return {k: TYPES.get(v, v) if k == "type" and isinstance(v, str) else schema(v) for k, v in value.items()}
    return [schema(item) for item in value] if isinstance(value, list) else value


def first(accepted):
    """BFCL lists every accepted value, at every level; the first one is taught."""
    if isinstance(accepted, dict):
        return {name: first(values[0]) for name, values in accepted.items() if values and values[0] != ""}
    return [first(item) for item in accepted] if isinstance(accepted, list) else accepted


def read(folder, source):
    lines = (folder / f"BFCL_v4_{source}.json").read_text().splitlines()
    truth = (folder / "possible_answer" / f"BFCL_v4_{source}.json").read_text().splitlines()
    answers = {row["id"]: row["ground_truth"][0] for row in map(json.loads, truth)}
    for row in map(json.loads, lines):
        [(name, arguments)] = answers[row["id"]].items()
        tools = [{"type": "function", "function": schema(tool)} for tool in row["function"]]
        call = {"type": "function", "function": {"name": name, "arguments": json.dumps(first(arguments))}}
        yield {"messages": [*row["question"][0], {"role": "assistant", "tool_calls": [call]}], "tools": tools}


def split(rows):
    """Give every group of rows that are linked by a shared function to one side."""
    group_of, groups = {}, []
    for row in rows:
        names = {tool["function"]["name"] for tool in row["tools"]}
        linked = [group for group in groups if group is not None and any(group_of.get(n) is group for n in names)]
        merged = [row, *(other for group in linked for other in group)]
        groups = [group for group in groups if not any(group is other for other in linked)] + [merged]
        group_of.update({tool["function"]["name"]: merged for item in merged for tool in item["tools"]})
    random.Random(0).shuffle(groups)
    train, valid = [], []
    for group in groups:
        (valid if len(valid) + len(group) <= HELD_OUT_ROWS else train).extend(group)
    return {"train": train, "valid": valid}


if __name__ == "__main__":
    data = Path(importlib.util.find_spec("bfcl_eval").submodule_search_locations[0]) / "data"
    rows = [row for source in SOURCES for row in read(data, source) if len(json.dumps(row)) <= LONGEST_CHARACTERS]
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo/data")
    out.mkdir(parents=True, exist_ok=True)
    for side, chosen in split(rows).items():
        (out / f"{side}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
        print(f"{out / side}.jsonl: {len(chosen)} rows")
