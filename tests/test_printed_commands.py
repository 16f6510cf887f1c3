"""What Thimble prints can be typed: every command in its output and its messages is run as it stands there.

From a folder with a space in its name, with files whose names a shell would take apart.
"""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from families import make_hf_folder
from thimble import cli
from thimble.commands import COMMANDS

TINY = Path(__file__).parent / "fixtures" / "gguf" / "smollm2.gguf"
QUICK = ("--rank", "4", "--seq-len", "64", "--max-steps", "2", "--eval-rows", "2", "--max-new-tokens", "2")
QUICK = (*QUICK, "--compute", "fp32", "--store", "dense")
ROWS = "".join(json.dumps({"prompt": f"say {n} ", "completion": f"{n} it is"}) + "\n" for n in range(12))
# Words that stand for the user's own: a command that holds one of them may be refused with exit code 2.
PLACEHOLDERS = ("DATA", "DATA.jsonl", "examples.jsonl", "mine.jsonl", "runs/mine-1")
COMMAND = re.compile(rf"\bthimble ((?:{'|'.join(COMMANDS)})\b[^\n`]*)")
END = re.compile(r"(?:\"| \(|[.;,:)]+(?:\s|$)|\s+or |\s+and )")


def printed_commands(text: str) -> list[str]:
    """The commands in a text, as a user would copy them: to the end of the line, or of the sentence around them."""
    found = []
    for match in COMMAND.finditer(text):
        begin_of_line = text.rfind("\n", 0, match.start()) + 1
        is_own_line = re.fullmatch(r"[a-z ]*", text[begin_of_line : match.start()])
        line = match[1] if is_own_line else END.split(match[1])[0]
        found.append(f"thimble {line.strip()}")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("printed") / "my work (1)"
    folder.mkdir()
    shutil.copy(TINY, folder / "my base.gguf")
    make_hf_folder("llama", folder / "my folder base")
    (folder / "it's mine.jsonl").write_text(ROWS)
    return folder


@pytest.fixture(scope="module")
def run_in(folder):
    """Run a command line in that folder, with nothing on the standard input: gives exit code and all it printed."""
    import contextlib
    import io

    def run(*words: str) -> tuple[int, str]:
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            patch.chdir(folder)
            patch.setattr("sys.stdin", io.StringIO(""))
            patch.setattr(cli.signal, "signal", lambda *a: None)
            code = cli.main(list(words))
        return code, out.getvalue()

    return run


@pytest.fixture(scope="module")
def outputs(folder, run_in) -> dict[str, str]:
    """What the commands print, when they work and when they refuse."""
    data, base = "it's mine.jsonl", ("--base", "my base.gguf")
    lines: dict[str, tuple[int, tuple[str, ...]]] = {
        "train": (0, ("train", data, *base, *QUICK, "--out", "my run")),
        "train a folder": (0, ("train", data, "--base", "my folder base", *QUICK, "--out", "runs/folder run")),
        "plan": (0, ("plan", data, *base, *QUICK)),
        "evaluate": (0, ("evaluate", data, "--adapter", "my run", "--eval-rows", "1", "--max-new-tokens", "2")),
        "inspect": (0, ("inspect", "my run")),
        "truncate": (0, ("merge", "my run", "--truncate", "0.9", "--out", "smaller one")),
        "merge": (0, ("merge", "runs/folder run", "--out", "merged one")),
        "merge into a GGUF": (2, ("merge", "my run", "--out", "merged two")),
        "no data": (2, ("train", *base)),
        "no adapter": (2, ("merge", "--out", "x")),
        "init auto": (2, ("train", data, *base, "--init", "auto")),
        "no command": (2, ("--json",)),
        "a run that exists": (2, ("train", data, *base, *QUICK, "--out", "my run")),
    }
    texts = {}
    for name, (expected, words) in lines.items():
        code, texts[name] = run_in(*words)
        assert code == expected, (name, texts[name])
    return texts


@pytest.fixture(scope="module")
def interrupted(run_in, monkeypatch_module) -> str:
    """What a run that is stopped after its first step prints."""
    taken: list[int] = []
    monkeypatch_module.setattr("thimble.cli._StopFlag.__call__", lambda self: bool(taken))
    monkeypatch_module.setattr(
        "thimble.report.terminal.Progress.on_event", lambda self, event: taken.append(1) if event.kind == "step" else 0
    )
    return run_in("train", "it's mine.jsonl", "--base", "my base.gguf", *QUICK, "--out", "cut off")[1]


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_every_printed_command_runs_as_printed(outputs, run_in):
    found = {line: name for name, text in outputs.items() for line in printed_commands(text)}
    with_commands = {name for name, text in outputs.items() if printed_commands(text)}
    assert {"train", "train a folder", "truncate", "merge", "merge into a GGUF", "no data"} <= with_commands
    assert "thimble chat --adapter 'my run'" in found
    assert "thimble chat --base 'merged one'" in found
    words = {line: shlex.split(line) for line in found}
    program = "\n".join(f"printf '%s\\n' {line.removeprefix('thimble ')}" for line in found)
    in_bash = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout
    assert in_bash.splitlines() == [word for line in words.values() for word in line[1:]], "a shell reads them alike"
    for line, (_, *argv) in words.items():
        code, text = run_in(*argv)
        may_refuse = any(word in PLACEHOLDERS for word in argv)
        assert code == 0 or (may_refuse and code == 2), (found[line], line, text)


def test_a_run_that_was_stopped_prints_what_continues_it(interrupted, run_in, monkeypatch_module):
    monkeypatch_module.undo()
    [go_on, try_it] = printed_commands(interrupted)
    assert go_on == "thimble train --out 'cut off' --resume"
    code, text = run_in(*shlex.split(try_it)[1:])
    assert code == 0, text
    code, text = run_in(*shlex.split(go_on)[1:])
    assert code == 0, text
    assert "2 steps in" in text


def test_a_smaller_adapter_is_told_with_its_base_where_it_does_not_lead_there(outputs, folder, run_in):
    """It carries the name of its GGUF, and that lies beside it here; elsewhere the command names the base."""
    assert "thimble chat --adapter 'smaller one'" in printed_commands(outputs["truncate"])
    (folder / "far").mkdir()
    shutil.move(folder / "my run", folder / "far" / "run")
    shutil.move(folder / "my base.gguf", folder / "far" / "my base.gguf")
    code, text = run_in("merge", "far/run", "--truncate", "0.9", "--out", "deep/er/one")
    assert code == 0
    [line] = printed_commands(text)
    assert line == "thimble chat --base 'far/my base.gguf' --adapter deep/er/one"
    assert run_in(*shlex.split(line)[1:])[0] == 0


def test_the_base_that_is_not_there_is_asked_for(outputs, folder, run_in):
    (folder / "gone.gguf").write_bytes(TINY.read_bytes()[:-1] + b"\1")
    data = "it's mine.jsonl"
    assert run_in("train", data, "--base", "gone.gguf", *QUICK, "--out", "lost")[0] == 0
    (folder / "elsewhere").mkdir()
    (folder / "gone.gguf").rename(folder / "elsewhere" / "renamed.gguf")
    (folder / "another.gguf").write_bytes(TINY.read_bytes()[:-1] + b"\2")  # no base that anybody named
    for words in (("chat",), ("evaluate", data), ("inspect",), ("merge", "--out", "x")):
        flag = () if words[0] in ("inspect", "merge") else ("--adapter",)
        code, text = run_in(*words, *flag, "lost")
        assert code == 2, text
        assert "the base of adapter lost, gone.gguf, is not found (it was " in text
        assert "--base gone.gguf" in text
    code, text = run_in("chat", "--adapter", "lost", "--base", "elsewhere/renamed.gguf")
    assert (code, "warning" in text) == (0, False), "by its hash it is the one"


def test_another_base_of_the_same_shape_is_told_and_one_of_another_shape_refused(outputs, folder, run_in):
    content = bytearray(TINY.read_bytes())
    content[-3] ^= 1
    (folder / "alike.gguf").write_bytes(content)
    code, text = run_in("evaluate", "it's mine.jsonl", "--adapter", "lost", "--base", "alike.gguf", "--eval-rows", "0")
    assert code == 0
    assert "warning: adapter lost was trained on gone.gguf (hash " in text
    code, text = run_in("chat", "--adapter", "lost", "--base", "my folder base")
    assert code == 2
    assert "adapter lost does not belong to my folder base" in text
    code, text = run_in("chat", "--adapter", "lost", "--adapter", "runs/folder run")
    assert code == 2
    assert "--base" in text
