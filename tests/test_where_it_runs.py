"""Streams, homes, terminals, file systems and interpreters as they may be: what they lack costs no run."""

import ast
import errno
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

import pytest

from thimble import __main__ as thimble_main
from thimble import cli
from thimble.data import spool
from thimble.data.answers import AnswerFile
from thimble.data.spool import Spool
from thimble.errors import DoesNotFitError
from thimble.files import atomic
from thimble.files.atomic import sync, write_atomic
from thimble.models import machine
from thimble.report import streams
from thimble.report.formatting import table
from thimble.training.checkpoint import locked

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "fixtures" / "gguf" / "smollm2.gguf"
QUICK = "--seq-len 64 --batch-tokens 64 --max-steps 3 --eval-rows 0 --compute fp32 --rank 2".split()


class Failing(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, *errors):
        super().__init__()
        self.faults = itertools.cycle(errors)

    def write(self, text):
        raise next(self.faults)


FULL, LEFT = OSError(errno.ENOSPC, "No space left on device"), BrokenPipeError(errno.EPIPE, "Broken pipe")


# ---- standard streams ----------------------------------------------------------------------------------------------


def test_a_run_whose_progress_nobody_can_read_goes_on_to_its_end(thimble, examples, tiny_base, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Failing(LEFT, ValueError("I/O operation on closed file"), FULL))
    assert thimble("train", examples, "--base", tiny_base, "--out", "run", *QUICK)[0] == 0
    assert Path("run/report.json").exists()


@pytest.mark.parametrize(("error", "code"), [(FULL, 3), (LEFT, 0)], ids=["full", "left"])
def test_a_report_that_cannot_be_printed_is_told_but_not_if_its_reader_left(error, code, thimble, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Failing(error))
    entry = cli.COMMANDS["plan"]._replace(function_path="report.streams:columns", renderer_path="cli:str")
    monkeypatch.setattr(type(entry), "listeners", ())
    monkeypatch.setitem(cli.COMMANDS, "plan", entry)
    monkeypatch.setattr(streams, "columns", lambda config: "a report")
    monkeypatch.setattr(cli, "str", str, raising=False)
    assert cli.main(["plan"]) == code
    told = capsys.readouterr().err
    assert ("the report cannot be written to standard output (No space left on device)" in told) == (code == 3)


@pytest.mark.parametrize(
    ("redirection", "code"),
    [("<&- >&- 2>&-", 0), ("2>/dev/full", 0), (">/dev/full 2>&1", 0), ("| true", 0)],
)
def test_streams_that_are_closed_or_full_cost_no_command_its_exit_code(redirection, code):
    command = f"set -o pipefail; {sys.executable} -m thimble plan --help {redirection}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (code, "")


def test_a_chat_without_standard_input_ends(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    streams.prepare_streams()
    with pytest.raises(EOFError):
        input()


def test_a_package_that_cannot_be_loaded_is_not_our_fault():
    told, code = cli._explained(ImportError("libx.so: failed to map segment from shared object", name="torch"))
    assert (told[0].split(":")[0], code) == ("torch cannot be loaded (libx.so", 2)
    assert cli._explained(ImportError("cannot import name x", name="thimble.x"))[1] == 1


def test_memory_that_torch_was_not_given_is_not_our_fault():
    """It tells so as a RuntimeError, wherever a command happens to be: before the plan too, where speed is measured."""
    said = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    told, code = cli._explained(RuntimeError(f"{said} allocate 67108864 bytes. Error code 12 (Cannot allocate memory)"))
    assert (told[0].split(" (")[0], code) == ("memory ran out", 3)
    assert "67108864" in told[0]
    assert cli._explained(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))[1] == 1


@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("width", [20, 40, 200])
def test_the_moving_line_fits_the_terminal_and_is_left_out_where_nothing_moves(term, width, monkeypatch):
    from thimble.events import Event
    from thimble.report.terminal import Progress

    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", str(width))
    step = {"step": 1, "total": 3, "loss": 2.5, "tokens_so_far": 100, "seconds": 0.5, "peak_memory_bytes": 1e9}
    progress = Progress(stream)
    progress.on_event(Event("step", data=step))
    text = stream.getvalue()
    assert ("\x1b" in text) == (term == "xterm")
    assert term == "dumb" or len(text.removeprefix("\r\x1b[K")) < width


ROWS = [
    ("", *(f"runs/a folder with a long name-{n}" for n in range(4))),
    ("general text loss (forgetting)", *["1.234"] * 4),
]


@pytest.mark.parametrize("width", [20, 40, 60, 100])
def test_a_table_fits_a_narrow_terminal_and_loses_no_column(width):
    lines = table(ROWS, width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.count("1.234") for line in lines) == 4
    assert table(ROWS) == table(ROWS, 1000).replace("…", "")


def test_the_width_is_that_of_columns_or_of_the_terminal_or_has_no_limit(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert streams.columns(io.StringIO()) == 40
    monkeypatch.delenv("COLUMNS")
    assert streams.columns(io.StringIO()) is None


# ---- homes, caches and other people --------------------------------------------------------------------------------


def test_a_cache_is_where_the_xdg_specification_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert machine.cache_folder() == tmp_path / ".cache" / "thimble"


@pytest.mark.parametrize("there", ["nothing", "a link", "of anybody", "no place at all"])
def test_without_a_home_a_cache_in_a_place_for_all_is_ones_own_or_none(there, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine, theirs = tmp_path / f"thimble-{os.getuid()}", tmp_path / "theirs"
    theirs.mkdir()
    if there == "a link":
        mine.symlink_to(theirs)
    if there == "of anybody":
        mine.mkdir()
        mine.chmod(0o777)
    if there == "no place at all":
        monkeypatch.setattr(tempfile, "gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError("no place")))
    found = machine.cache_folder()
    assert found == mine if there == "nothing" else not found.exists()
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **where: (_ for _ in ()).throw(FileNotFoundError("no place")))
    words = Spool(str.encode, bytes.decode)  # kept in memory if nowhere else
    words.append("one")
    assert (list(words), list(theirs.iterdir())) == (["one"], [])


@pytest.mark.parametrize(
    ("siblings", "cores"), [({0: "0,2", 2: "0,2", 1: "1,3"}, 2), ({}, 3), ({0: "0-2", 1: "0-2", 2: "0-2"}, 1)]
)
def test_threads_of_one_core_count_once(siblings, cores, tmp_path, monkeypatch):
    for cpu, text in siblings.items():
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    monkeypatch.setattr(machine, "CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(machine, "quota_cores", lambda: float("inf"))
    assert machine.usable_cores.__wrapped__() == cores


def test_memory_is_what_the_tightest_group_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(
        machine, "_control_groups", lambda _: [tmp_path / "outer", tmp_path / "outer" / "inner", tmp_path]
    )
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    values = {"outer/memory.max": "900", "outer/memory.current": "100", "outer/memory.stat": "inactive_file 50",
              "outer/inner/memory.max": "max", "outer/inner/memory.high": "600", "outer/inner/memory.current": "100",
              "outer/inner/memory.stat": ""}  # fmt: skip
    for name, text in values.items():
        (tmp_path / name).write_text(text)
    assert machine.available_bytes() == 500
    (tmp_path / "outer/inner/memory.high").write_text("max")
    assert machine.available_bytes() == 850


# ---- file systems --------------------------------------------------------------------------------------------------


def failing(error, times=99):
    def call(*arguments, **options):
        raise OSError(error, os.strerror(error))

    return call


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_or_rename_over_a_file_takes_files_too(error, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", failing(error))
    monkeypatch.setattr(os, "replace", failing(error))
    write_atomic(path, [b"new"])
    sync(tmp_path)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"new", ["file"])


def test_a_disk_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_atomic(tmp_path / "file", [b"new"])
    assert os.listdir(tmp_path) == []
    assert atomic.NOT_OFFERED == (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_holds_runs(error, tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", failing(error))
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    answers = AnswerFile(str(tmp_path / "answers.jsonl"))
    answers.begin({})
    answers.close()
    assert answers.resumable() == {}


# ---- interpreters and installs -------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_without_room_for_the_examples_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr(spool, "_nameless_file", lambda: open("/dev/full", "r+b"))
    words = Spool(str.encode, bytes.decode)
    words.append("x")  # which waits in the buffer
    with pytest.raises(DoesNotFitError, match="No space left on device"):
        words.append("y")
    words._closing()  # as at the end of the process, when what is buffered cannot be written either
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_while_the_command_line_is_loaded_ends_it_quietly(monkeypatch):
    class Interrupts:
        def find_spec(self, name, path=None, target=None):
            if name == "thimble.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "thimble.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    with pytest.raises(SystemExit) as left:
        thimble_main.run()
    assert left.value.code == 130


def test_nothing_depends_on_what_python_leaves_out_when_it_optimises():
    asserts, docs = [], []
    for path in (ROOT / "src" / "thimble").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            asserts += [f"{path.name}:{node.lineno}"] if isinstance(node, ast.Assert) else []
            docs += [f"{path.name}:{node.lineno}"] if getattr(node, "attr", "") == "__doc__" else []
    assert (asserts, docs) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-OO", "-I -W error -bb -X dev", "-X utf8=0"])
def test_a_run_is_the_same_however_python_is_started(flags, examples, tmp_path):
    words = ["train", examples, "--base", TINY, "--out", "run", *QUICK]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "TMPDIR": str(tmp_path)}  # no home either
    command = [sys.executable, *flags.split(), "-m", "thimble", *map(str, words)]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (found.returncode, "Warning" in found.stderr, "Traceback" in found.stderr) == (0, False, False), found.stderr


@pytest.mark.slow
def test_a_wheel_holds_all_that_a_run_needs(examples, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", tmp_path, source]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "fresh", with_pip=False)
    python = str(tmp_path / "fresh" / "bin" / "python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
    zipfile.ZipFile(wheel).extractall(packages)
    ours = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "dependencies.pth").write_text("\n".join(ours) + "\n")
    (tmp_path / "elsewhere").mkdir()
    words = ["train", examples, "--base", TINY, "--out", "run", "--json", *QUICK]
    command = [python, "-I", "-m", "thimble", *map(str, words)]
    found = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["steps"] == 3
    where = [python, "-I", "-c", "import thimble; print(thimble.__file__)"]
    assert str(packages) in subprocess.run(where, check=True, capture_output=True, text=True).stdout
