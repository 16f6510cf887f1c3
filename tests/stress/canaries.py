"""Folders that try to run something when they are loaded: nothing of them runs, and nothing outside of them is touched.

Each trick is tried alone, then several at a time at random. An audit hook of Python sees what a load does: what it
unpickles, executes, imports, opens, sends. Run as a program it tries them in this process and prints a line as JSON.
"""

import builtins
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stress import Line
from thimble.data.template_process import PROGRAM

SECONDS = 60  # a load that waits for something is stopped
CANARY = "canary"  # the file that a trick would write
SECRET = "secret"  # a file beside the folders that no load may take for a part of one
FILES = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors.index.json",
    "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
PICKLES = (
    "adapter_model.bin", "pytorch_model.bin", "rng_state.pth", "training_args.bin", "optimizer.pt", ".hidden.mdl",
    "model.pkl", "tokenizer.pkl", "spiece.model", "tokenizer.model", "vocab.joblib",
)  # fmt: skip
MODULES = (
    "modeling_x.py", "tokenizer_x.py", "configuration_x.py", "sitecustomize.py", "usercustomize.py", "__init__.py",
    "conftest.py", "parquet.py", "megatron.py", "flash_attn.py",
)  # fmt: skip
CODE = "__import__('pathlib').Path({!r}).write_text('x')"
PAYLOAD = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('id') }}"

Trick = Callable[[Path, random.Random], None]


class Poison:
    """Writes the canary when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return builtins.exec, (CODE.format(str(self.place / CANARY)),)


def _poison(folder: Path, kind: int) -> bytes:
    """A pickle, bare or as PyTorch wraps it."""
    content = pickle.dumps(Poison(folder), protocol=kind % 5)
    if kind < 5:
        return content
    path = folder / "made.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
    content = path.read_bytes()
    path.unlink()
    return content


def _pickles_beside(folder: Path, dice: random.Random) -> None:
    for name in PICKLES:
        (folder / name).write_bytes(_poison(folder, dice.randrange(6)))


def _pickles_instead(folder: Path, dice: random.Random) -> None:
    path = folder / dice.choice([*FILES, "mine.jsonl"])
    _remove(path)  # it may be a link out of the folder by now
    path.write_bytes(_poison(folder, dice.randrange(6)))


def _only_pickles(folder: Path, dice: random.Random) -> None:
    _pickles_beside(folder, dice)
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)


def _modules(folder: Path, dice: random.Random) -> None:
    for name in MODULES:
        (folder / name).write_text(CODE.format(str(folder / CANARY)) + "\n")


def _change(folder: Path, name: str, changes: dict[str, Any]) -> None:
    path = folder / name
    try:
        value = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:  # another trick was here before
        value = {}
    path.unlink(missing_ok=True) if not path.is_dir() else shutil.rmtree(path)
    path.write_text(json.dumps({**value, **changes}))


def _base_config(folder: Path, dice: random.Random) -> None:
    code = "x\n" + CODE.format(str(folder / CANARY))
    changes = [
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "owner/name--configuration_x.X"}},
        {"trust_remote_code": True, "_attn_implementation_internal": "owner/kernels:flash", "auto_map": {"": "x"}},
        {"model_type": code}, {"model_type": "../../x"}, {"architectures": ["os.system"], "custom_pipelines": {"x": 1}},
        {"quantization_config": {"quant_method": code}}, {"_name_or_path": "https://127.0.0.1:9/x"},
        {"rope_scaling": {"rope_type": code}}, {"hidden_act": code}, {"torch_dtype": code},
    ]  # fmt: skip
    _change(folder, "config.json", dice.choice(changes))


def _adapter_config(folder: Path, dice: random.Random) -> None:
    changes = [
        {"auto_mapping": {"base_model_class": "X", "parent_library": "modeling_x"}},
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        {"megatron_core": "megatron", "megatron_config": {"x": 1}}, {"megatron_core": "sitecustomize"},
        {"base_model_name_or_path": "https://127.0.0.1:9/x"}, {"base_model_name_or_path": "../../etc/passwd"},
        {"target_modules": "(a+)+$"}, {"rank_pattern": {"(a+)+$": 2}}, {"alpha_pattern": {"(a|a)*": 2}},
        {"peft_type": "os.system"}, {"task_type": "../../x"}, {"runtime_config": {"x": 1}}, {"revision": "x\ny"},
    ]  # fmt: skip
    _change(folder, "adapter_config.json", dice.choice(changes))


def _index_names(folder: Path, dice: random.Random) -> None:
    names = [
        "../../../etc/passwd", "/etc/passwd", "..", ".", "", "a\0b", "x/../config.json", "pytorch_model.bin", 7, None,
        "model.safetensors\n", "\\\\host\\x.safetensors", "https://127.0.0.1:9/x.safetensors", "~/x.safetensors",
    ]  # fmt: skip
    _change(folder, "model.safetensors.index.json", {"weight_map": {"model.norm.weight": dice.choice(names)}})


def _tokenizer_config(folder: Path, dice: random.Random) -> None:
    changes = [
        {"auto_map": {"AutoTokenizer": ["tokenizer_x.X", None]}, "tokenizer_class": "X"},
        {"tokenizer_file": "/etc/passwd", "vocab_file": "tokenizer.pkl", "name_or_path": "owner/name"},
        {"chat_template": PAYLOAD}, {"chat_template": [{"name": "default", "template": PAYLOAD}]},
        {"chat_template": "{% include '/etc/passwd' %}{% import 'x' as y %}"},
    ]  # fmt: skip
    _change(folder, "tokenizer_config.json", dice.choice(changes))


def _links(folder: Path, dice: random.Random) -> None:
    path = folder / dice.choice(FILES)
    _remove(path)
    path.symlink_to(
        dice.choice([folder.parent / SECRET, "/dev/zero", "/dev/stdin", path.name, "/proc/self/environ", "/", "gone"])
    )


def _template_link(folder: Path, dice: random.Random) -> None:
    path = folder / dice.choice(["chat_template.jinja", "chat_template.json"])
    _remove(path)
    path.symlink_to(folder.parent / SECRET)


def _no_file(folder: Path, dice: random.Random) -> None:
    path, kind = folder / dice.choice(FILES), dice.randrange(3)
    _remove(path)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))


def _names(folder: Path, dice: random.Random) -> None:
    import numpy as np

    from thimble.files.tensors import write_safetensors

    names = ["../../etc/x", "a\0b", "\x1b[2J", "__import__('os')", "base_model.model.../../x.lora_A.weight"]
    path = folder / dice.choice(["adapter_model.safetensors", "model-00001-of-00002.safetensors"])
    _remove(path)
    write_safetensors(path, {dice.choice(names): np.ones((2, 2), "f4")}, {"format": "pt", "auto_map": "modeling_x.X"})


def _data(folder: Path, dice: random.Random) -> None:
    rows = [
        {"prompt": "/etc/passwd", "completion": "file:///etc/passwd"}, {"text": "!!python/object/apply:os.system [id]"},
        {"messages": [{"role": "user", "content": PAYLOAD}, {"role": "assistant", "content": "$(id) `id`"}]},
        {"image": {"path": "/etc/passwd", "bytes": None}, "text": "x"}, {"_type": "Dataset", "builder": "x.py"},
    ]  # fmt: skip
    _remove(folder / "mine.jsonl")
    (folder / "mine.jsonl").write_text("".join(json.dumps(dice.choice(rows)) + "\n" for _ in range(3)))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


TRICKS: tuple[Trick, ...] = (
    _pickles_beside, _pickles_instead, _only_pickles, _modules, _base_config, _adapter_config, _index_names,
    _tokenizer_config, _links, _template_link, _no_file, _names, _data,
)  # fmt: skip

# What a load never does, by the names of Python's audit events.
FORBIDDEN = (
    "pickle.", "marshal.", "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "os.putenv", "shutil.", "ctypes.dlopen", "urllib.", "webbrowser.", "ftplib.", "http.", "smtplib.", "tempfile.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SOURCES = Path(__file__).parents[2] / "src"
OURS = tuple({sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), str(SOURCES), "/proc", "/sys"})


class Watch:
    """Notes what loads do that they must not."""

    def __init__(self, cache: Path) -> None:
        self.cache = str(cache)  # Thimble's own, where it may write
        self.folder: Path | None = None  # the hostile one, while it is loaded
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if args and str(args[0]).startswith(self.cache):
            return
        if event == "subprocess.Popen" and PROGRAM in args[1]:
            return  # the process of the chat template, which has no rights
        if event.startswith(FORBIDDEN) and not _within_import():
            self.seen.append(f"{event} {str(args)[:100]}")
        elif event == "open":
            self._open(*args)
        elif event in ("exec", "compile"):
            code, name = (args[0], args[0].co_filename) if event == "exec" else args
            if not str(name).startswith((*OURS, "<frozen")) and not _within("jinja2"):
                self.seen.append(f"{event} {str(code)[:100]}")

    def _open(self, path: Any, mode: Any, flags: int) -> None:
        if isinstance(path, int) or path == os.devnull:
            return
        whole = os.path.abspath(os.fsdecode(path))
        is_inside = Path(whole).is_relative_to(self.folder) or whole.startswith(OURS)
        is_text = whole.endswith(
            ".jinja"
        )  # of these any content will do, so a link out of the folder is followed by none
        if is_text and not os.path.realpath(whole).startswith((str(self.folder), *OURS)):
            is_inside = False
        if not is_inside or flags & WRITING:
            self.seen.append(f"open {whole} {mode} {flags:#x}")


def _within(package: str) -> bool:
    """Whether a function of a package is at work."""
    frame = sys._getframe()
    while frame is not None:
        if f"{os.sep}{package}{os.sep}" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _within_import() -> bool:
    """Whether Python is loading the code of a module; that it is one of ours is seen by its place."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def canaries(count: int) -> Line:
    """Load hostile folders in every public way, in a process of their own."""
    command = [sys.executable, "-m", "stress.canaries", str(count)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    *told, last = done.stdout.splitlines() or [""]
    print(*told, sep="\n")
    name = "hostile folders, nothing of which runs"
    return Line(**json.loads(last)) if not done.returncode else Line(name, 0, 1, 0.0, f"exit code {done.returncode}")


def _execution_plans(folder: Path) -> list[Callable[[], object]]:
    """The public ways to load what lies in a folder."""
    from thimble.data.model import open_model
    from thimble.data.records import read_dataset
    from thimble.data.tokenizer import tokenizer_from_folder
    from thimble.files.peft import load_adapter
    from thimble.models.base import open_base

    def say() -> None:
        template = open_model(str(folder)).template
        if template:
            template.render([{"role": "user", "content": "Hi"}])

    return [
        lambda: open_base(folder), lambda: load_adapter(folder), lambda: tokenizer_from_folder(folder),
        lambda: open_model(str(folder)), say, lambda: read_dataset(str(folder / "mine.jsonl")),
    ]  # fmt: skip


def _sound_folder(folder: Path) -> None:
    """A base with tokenizer and template, an adapter and data in one folder, all of it as it should be."""
    from fixtures.tiny_tokenizers import write_tokenizer
    from stress.foreign_files import CONFIGS, write_adapter, write_base

    write_base(folder, CONFIGS[0])
    write_tokenizer("llama-bpe", folder)
    write_adapter(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "mine.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)


def _late(*_: Any) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def _try(watch: Watch, folder: Path) -> list[str]:
    """Load a folder in every way; return what went wrong."""
    from thimble.errors import InputError

    wrong, modules = [], set(sys.modules)
    os.chdir(folder)
    for way in _execution_plans(folder):
        signal.alarm(SECONDS)
        watch.folder = folder
        try:
            way()
        except InputError:
            pass
        except BaseException as error:
            wrong.append(f"{type(error).__name__}: {error}")
        finally:
            watch.folder = None
            signal.alarm(0)
    wrong += watch.seen
    watch.seen = []
    for name in set(sys.modules) - modules:
        place = getattr(sys.modules[name], "__file__", None)
        if place and not place.startswith(OURS):
            wrong.append(f"import of {name} from {place}")
    if (folder / CANARY).exists():
        wrong.append("the canary was written")
    os.chdir("/")
    return wrong


def main(count: int) -> Line:
    """Try the tricks one by one, then some at a time, and count the folders with which something went wrong."""
    began, dice, wrong = time.perf_counter(), random.Random(0), 0
    signal.signal(signal.SIGALRM, _late)
    with tempfile.TemporaryDirectory() as parent:
        sound = Path(parent, "sound").resolve()
        Path(parent, SECRET).write_text("root:x:0:0:root:/root:/bin/bash")
        _sound_folder(sound)
        os.environ["XDG_CACHE_HOME"] = f"{parent}/cache"
        for way in _execution_plans(sound):  # all of it is read, and what is imported when it is first used is imported
            way()
        watch = Watch(Path(os.environ["XDG_CACHE_HOME"]))
        for number in range(count):
            folder = sound.with_name(f"case{number}")
            shutil.copytree(sound, folder)
            tricks = [TRICKS[number % len(TRICKS)]] + dice.sample(TRICKS, dice.randint(0, 2) if number > 100 else 0)
            for trick in tricks:
                trick(folder, dice)
            if found := _try(watch, folder):
                wrong += 1
                print(f"    {[trick.__name__ for trick in tricks]}: {found}"[:400])
            shutil.rmtree(folder)
    note = f"{len(TRICKS)} tricks, alone and together"
    return Line("hostile folders, nothing of which runs", count, wrong, time.perf_counter() - began, note)


if __name__ == "__main__":
    print(json.dumps(asdict(main(int(sys.argv[1])))))
