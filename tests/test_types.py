"""A type checker knows every option of the Python functions: a misspelt one is found before anything runs."""

import importlib.util
from pathlib import Path

import pytest

import thimble
from thimble.commands import COMMANDS
from thimble.config.options import options_of

PACKAGE = Path(thimble.__file__).parent
TYPED = [PACKAGE / name for name in ("__init__.py", "api.pyi", "training/result.py")]
GOOD = """\
import thimble
from pathlib import Path

rows = [{"prompt": "2 + 2?", "completion": "4"}]
report = thimble.train(rows, rank=8, base=Path("x"), targets=["q_proj"], rank_pattern={"q_proj": 8}, rank_budget="auto")
report = thimble.train("mine.jsonl", memory_budget="4GB", learning_rate=1e-4, on_event=print, config="my.yaml")
print(report.loss_after.is_integer())
thimble.plan(None, config="my.yaml", machine={"cores": 4, "memory": "8GB"})
thimble.plan({"train": rows, "valid": iter(rows)}, machine="cores=4")
thimble.merge("one", Path("two"), out="three", truncate=0.9)
thimble.evaluate("x", adapter=["one", Path("two")], compute="bf16")
thimble.chat(adapter="one", temperature=0).ask("Hello")
thimble.inspect("one", blocks=[0, 7])
"""
BAD = [
    ('thimble.train("x", rnak=8)', 'Unexpected keyword argument "rnak" for "train"'),
    ('thimble.train("x", compute="fp16")', 'expected "Literal['),
    ('thimble.train("x", max_steps="many")', "incompatible type"),
    ("thimble.plan(5)", 'Argument 1 to "plan" has incompatible type "int"'),
    ('thimble.train(["a.jsonl"])', "List item 0 has incompatible type"),
    ('thimble.merge("x", truncate=0.9, adapter="y")', 'Unexpected keyword argument "adapter"'),
    ("report.loss_aftr", '"TrainReport" has no attribute "loss_aftr"'),
]


@pytest.fixture(scope="module")
def make_api():
    path = Path(__file__).parents[1] / "docs" / "make_api.py"
    spec = importlib.util.spec_from_file_location("make_api", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_types_are_those_of_the_options(make_api):
    assert make_api.STUB.read_text() == make_api.write_stub(), "run make docs"


def test_every_option_of_every_command_has_a_type(make_api):
    text = make_api.write_stub()
    for name, command in COMMANDS.items():
        signature = text.split(f"def {name}(\n")[1].split("\n)")[0]
        assert all(
            f"    {option}: " in signature or f"*{option}s: " in signature for option in options_of(command.options)
        )


def test_a_type_checker_finds_what_is_misspelt_and_nothing_else(tmp_path):
    """With what the functions import left out, which would take mypy half a minute to read."""
    from mypy import api

    (tmp_path / "sample.py").write_text(GOOD + "".join(line + "\n" for line, _ in BAD))
    options = ["--follow-imports=skip", "--no-error-summary", f"--cache-dir={tmp_path / 'cache'}", "--config-file="]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", str(PACKAGE.parent))
        out, err, _ = api.run([*options, *map(str, [tmp_path / "sample.py", *TYPED])])
    found = [line.split("sample.py:", 1)[1] for line in out.splitlines() if "sample.py" in line and ": error: " in line]
    first = len(GOOD.splitlines()) + 1
    assert err == ""
    assert [int(line.split(":")[0]) for line in found] == list(range(first, first + len(BAD))), out
    for line, (_, said) in zip(found, BAD, strict=True):
        assert said in line
