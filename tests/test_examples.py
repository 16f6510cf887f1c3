"""The examples: short enough to read at once, and doing what they say."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
MOST_LINES = 60
RUN_HERE = {"01_tool_calling.py"}
needs_bfcl = pytest.mark.skipif(
    importlib.util.find_spec("bfcl_eval") is None, reason="needs the data: pip install --no-deps bfcl-eval"
)


def run_example(name: str, *args: str, **environment: str) -> str:
    """Run an example in a process of its own and return what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *args]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def functions_in(rows: list[dict]) -> set[str]:
    return {tool["function"]["name"] for row in rows for tool in row["tools"]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    run_example("01_tool_calling.py", str(folder), PYTHONHASHSEED="1")
    return folder


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_on_a_page(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_every_example_is_run_by_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == RUN_HERE


@needs_bfcl
def test_the_demo_holds_out_200_rows(demo):
    assert len(read_rows(demo / "valid.jsonl")) == 200
    assert len(read_rows(demo / "train.jsonl")) >= 200


@needs_bfcl
def test_no_function_of_a_held_out_row_is_seen_in_training(demo):
    """Not even as an alternative that is not called: the score would partly measure memory."""
    sides = [functions_in(read_rows(demo / f"{side}.jsonl")) for side in ("train", "valid")]
    assert sides[0] & sides[1] == set()


@needs_bfcl
def test_every_demo_row_calls_a_function_it_offers_with_known_arguments(demo):
    for side in ("train", "valid"):
        for row in read_rows(demo / f"{side}.jsonl"):
            [call] = row["messages"][-1]["tool_calls"]
            offered = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in row["tools"]}
            assert set(json.loads(call["function"]["arguments"])) <= set(offered[call["function"]["name"]])


@needs_bfcl
def test_the_demo_data_is_the_same_every_time(demo, tmp_path):
    run_example("01_tool_calling.py", str(tmp_path), PYTHONHASHSEED="2")
    for side in ("train", "valid"):
        assert (tmp_path / f"{side}.jsonl").read_bytes() == (demo / f"{side}.jsonl").read_bytes()
