"""docs/troubleshooting.md: every case is brought about for real, and what Thimble says then is pasted.

`make docs` writes the page; a test fails if it is not what would be written.
"""

import contextlib
import errno
import gzip
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np

from fixtures.tiny_tokenizers import write_tokenizer
from stress import TINY
from stress.foreign_files import CONFIGS, write_base
from thimble import cli
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.files.peft import save_adapter
from thimble.files.tensors import open_tensors, write_safetensors

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
HEAD = """\
# When something goes wrong

*Written by `make docs`, which brings about each case and pastes what Thimble says; do not edit this page.*

A message says what is wrong, where, what was expected and what to do. All that can be checked is checked before any
work, and everything that is wrong is reported at once. Exit code 2: refused, nothing was written. Exit code 3: the work
began and failed; what was learned until then is kept. Lines with `!` are warnings: the run goes on, but its result may
not be what you want. `--debug` shows the traceback of any error.

What Thimble promises about crashes and damaged files stands in [reliability.md](reliability.md).
"""
# So that a run takes a second; the page leaves it out.
QUICK = "--seq-len 64 --batch-tokens 64 --max-steps 4 --max-new-tokens 2 --compute fp32 --rank 4 --eval-rows 0".split()
RUN = ["train", "mine.jsonl", "--out", "run", "--base", "tiny.gguf", *QUICK]

Prepare = Callable[[], object]
Around = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class Case:
    """One thing that goes wrong.

    Attributes:
        title: What a user would say.
        advice: What to do, beyond what the message says.
        words: The command, without `thimble`.
        prepare: Makes the files, in an empty folder with a base and examples.
        around: Holds while the command runs.
        shows: Which lines are pasted: those of an error, or warnings that hold this text.
    """

    title: str
    advice: str
    words: list[str]
    prepare: Prepare = lambda: None
    around: Around = contextlib.nullcontext
    shows: str = ""


def rows(count: int = 20, **more: object) -> str:
    return "".join(json.dumps({"prompt": f"say {n} ", "completion": f"{n} it is", **more}) + "\n" for n in range(count))


def write(name: str, text: str | bytes) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def plan(name: str) -> list[str]:
    return ["plan", name, "--base", "tiny.gguf"]


def trained(*flags: str) -> Callable[[], None]:
    """A run that ended, in run/, with its checkpoints."""
    return lambda: quiet(*RUN, "--checkpoint-every-steps", "2", *flags)


def quiet(*words: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli.main(list(words))


def unfinished() -> None:
    trained()()
    Path("run/report.json").unlink()


def move_run() -> None:
    """The run folder and the base elsewhere; of the data only the config of the run knows."""
    unfinished()
    Path("moved").mkdir()
    shutil.move("run", "moved/run")
    shutil.move("tiny.gguf", "moved/tiny.gguf")
    Path("mine.jsonl").unlink()
    config = Path("moved/run/config.yaml")
    config.write_text(config.read_text().replace(os.getcwd(), "/project"))


def damage_checkpoint() -> None:
    unfinished()
    path = sorted(Path("run/checkpoints").glob("step-*"))[-1] / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def other_adapter() -> None:
    layer = Factors(np.ones((2, 8), np.float32), np.ones((8, 2), np.float32), 1.0)
    save_adapter(Adapter({"model.layers.7.self_attn.q_proj": layer}, base="another.gguf"), Path("theirs"))


def pickled_adapter() -> None:
    write("theirs/adapter_config.json", json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16}))
    write("theirs/adapter_model.bin", b"\x80\x04")


def nan_base() -> None:
    info = open_tensors("tiny.gguf").tensors["blk.1.ffn_up.weight"]
    whole = bytearray(Path("tiny.gguf").read_bytes())
    whole[info.offset : info.offset + 4] = b"\x00\x00\xc0\x7f"
    write("tiny.gguf", bytes(whole))


def binary_base() -> None:
    folder = write_base(Path("model"), CONFIGS[0])
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    write("model/pytorch_model.bin", b"\x80\x04")


def base_with(**fields: object) -> Callable[[], None]:
    """A folder whose config.json has these fields, too."""

    def prepare() -> None:
        config = {**CONFIGS[0], "rope_scaling": None, **fields}
        (write_base(Path("model"), CONFIGS[0]) / "config.json").write_text(json.dumps(config))

    return prepare


def endless_template() -> None:
    folder = write_base(Path("model"), CONFIGS[0])
    write_tokenizer("llama-bpe", folder)
    write("model/chat_template.jinja", "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}")


def folder_base(name: str = "model") -> Path:
    """A Hugging Face folder with a tokenizer, in two shards."""
    folder = write_base(Path(name), CONFIGS[0])
    write_tokenizer("llama-bpe", folder)
    return folder


def quantised_base() -> None:
    folder = folder_base("Llama-3.2-1B-Instruct-bnb-4bit")
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = {name: open_tensors(shard).read(name) for name in open_tensors(shard).tensors}
    packed = next(name for name in tensors if name.endswith("_proj.weight"))
    write_safetensors(shard, {**tensors, f"{packed}.absmax": np.zeros(4, np.uint8)})
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    write(f"{folder}/config.json", json.dumps({**CONFIGS[0], "quantization_config": settings}))


def weights_twice() -> None:
    folder = folder_base()
    tensors = {name: open_tensors(shard).read(name) for shard in sorted(folder.glob("*.safetensors"))
               for name in open_tensors(shard).tensors}  # fmt: skip
    write_safetensors(folder / "model.safetensors", tensors)


def contradicting_tokenizer() -> None:
    path = folder_base() / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"]["319"] = {"content": "<mark>", "special": True}
    path.write_text(json.dumps(config))


def one_part_of_two() -> None:
    import gguf

    writer = gguf.GGUFWriter("big.gguf", "llama", split_max_tensors=1)
    for name in ("token_embd.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path("big-00002-of-00002.gguf").unlink()


def seeing_adapter() -> None:
    layer = Factors(np.ones((2, 8), np.float32), np.ones((8, 2), np.float32), 1.0)
    save_adapter(Adapter({"model.vision_tower.encoder.layers.0.self_attn.q_proj": layer}), Path("theirs"))


def adapter_with_tokenizer() -> None:
    folder_base()
    layer = Factors(np.ones((2, 8), np.float32), np.ones((16, 2), np.float32), 1.0)
    save_adapter(Adapter({"model.layers.0.self_attn.q_proj": layer}), Path("theirs"))
    write_tokenizer("llama-bpe", Path("theirs"))
    write("theirs/chat_template.jinja", "{{ messages[0].content }}")


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No checkpoint finds room any more."""
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch("thimble.training.sink.save_checkpoint", side_effect=error):
        yield


@contextlib.contextmanager
def little_room() -> Iterator[None]:
    usage = shutil.disk_usage(".")
    with patch("shutil.disk_usage", return_value=usage._replace(free=5_000_000)):
        yield


@contextlib.contextmanager
def no_memory() -> Iterator[None]:
    """Memory runs out in the first step, once."""
    from thimble.backends.torch.session import TorchSession

    true, times = TorchSession.gradient, []

    def gradient(session: TorchSession, *arguments: object) -> object:
        if not times:
            times.append(1)
            raise MemoryError
        return true(session, *arguments)

    with patch.object(TorchSession, "gradient", gradient):
        yield


@contextlib.contextmanager
def another_run() -> Iterator[None]:
    from thimble.training.checkpoint import locked

    with locked(Path("run")):
        yield


ASK, SAY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
CHAT = [{"role": "user", "content": "<|im_start|>user\nHi<|im_end|>"}, {"role": "assistant", "content": "Hello"}]

CASES: dict[str, list[Case]] = {
    "The examples": [
        Case("The file is not found", "", plan("train.jsonl"), lambda: shutil.move("mine.jsonl", "training.jsonl")),
        Case("The columns have other names", "Add the options that are shown, or others: [data_format.md](data_format.md) describes them, and the "
             "forms whose columns are known.", plan("mine.csv"), lambda: write("mine.csv", "Betreff,Text der Mail,Antwort\n" + "a,b,c\n" * 3)),
        Case("A column that is named is not there", "", [*plan("mine.csv"), "--prompt-column", "Frge", "--completion-column", "Antwort"],
             lambda: write("mine.csv", "Frage,Antwort\n" + "a,b\n" * 3)),
        Case("Columns are filled and not used", "Name what belongs into the prompt, as in `--prompt-template '{prompt}{note}'`, or take the columns out.",
             plan("mine.jsonl"), lambda: write("mine.jsonl", rows(note="by heart")), shows="filled but not used"),
        Case("The rows are texts with labels", "", plan("mine.jsonl"), lambda: write("mine.jsonl", '{"text": "a fine day", "label": 1}\n' * 3)),
        Case("A message is marked in a way that cannot be followed", "", plan("mine.jsonl"),
             lambda: write("mine.jsonl", json.dumps({"messages": [{**ASK, "train": True}, {**SAY, "weight": 0.5}]}))),
        Case("The rows are tokens already", "", plan("mine.jsonl"), lambda: write("mine.jsonl", '{"input_ids": [1, 2], "labels": [1, 2]}\n')),
        Case("The rows hold preferences, chosen and rejected", "", plan("mine.jsonl"),
             lambda: write("mine.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n')),
        Case("A few rows cannot be used", "They are left out, and listed in `skipped.jsonl` in the run folder. With `--strict` the data are "
             "refused instead.", plan("mine.jsonl"), lambda: write("mine.jsonl", rows() + '{"prompt": "a", "compl'), shows="cannot be used"),
        Case("Many rows cannot be used", "", plan("mine.jsonl"), lambda: write("mine.jsonl", rows(4) + "{'prompt': 'a'}\n" * 3)),
        Case("A spreadsheet has commas in its cells", "", [*plan("mine.csv"), "--strict"],
             lambda: write("mine.csv", "prompt,completion\nhello,hi, you\n")),
        Case("A spreadsheet was saved for Windows", "If the words look right, nothing need be done.", plan("mine.csv"),
             lambda: write("mine.csv", "prompt;completion\r\nGröße?;3,50 €\r\n".encode("cp1252")), shows="Windows-1252"),
        Case("A file is in the encoding of another language", "", plan("mine.csv"),
             lambda: write("mine.csv", "prompt;completion\nПривет;Как дела?\n".encode("cp1251"))),
        Case("A spreadsheet has a column twice", "", plan("mine.csv"), lambda: write("mine.csv", "prompt,completion,prompt\na,b,c\n")),
        Case("A spreadsheet has no header", "", plan("mine.csv"), lambda: write("mine.csv", "1,what is 2+2?,4\n2,and 3+3?,6\n")),
        Case("The file is a spreadsheet itself", "", plan("mine.xlsx"), lambda: write("mine.xlsx", b"PK\x03\x04")),
        Case("The file is a Git LFS pointer", "", plan("train.parquet"), lambda: write("train.parquet", "version https://git-lfs.github.com/spec/v1\n")),
        Case("A data set from the hub holds several", "", plan("data"), lambda: [write(f"data/{name}/train.jsonl", rows()) for name in ("en", "fr")]),
        Case("A data set from the hub has no rows yet", "", plan("data"), lambda: write("data/README.md", "---\nlicense: mit\n---\n# Rows\n")),
        Case("A data set from the hub is there in part", "", plan("data"), lambda: write("data/data/train-00000-of-00003.jsonl", rows()), shows="in part"),
        Case("A saved data set has splits of other names", "", plan("data"), lambda: [
            write("data/dataset_dict.json", json.dumps({"splits": ["english", "french"]})),
            *(write(f"data/{name}/state.json", json.dumps({"_data_files": [{"filename": "data.arrow"}]})) for name in ("english", "french")),
            *(write(f"data/{name}/data.arrow", b"") for name in ("english", "french"))]),
        Case("A file is packed badly", "", plan("mine.jsonl.gz"), lambda: write("mine.jsonl.gz", gzip.compress(rows().encode())[:-20])),
        Case("Nothing is to be learned", "", [*plan("mine.txt"), "--loss-on", "completions"], lambda: write("mine.txt", "Once upon a time.")),
        Case("The rows have been through a chat template already", "Give the messages themselves; the base's own template writes the marks.",
             plan("mine.jsonl"), lambda: write("mine.jsonl", rows(9) + json.dumps({"prompt": CHAT[0]["content"], "completion": "Hi"})),
             shows="marks of a chat template"),
        Case("Held-out rows are among the training rows", "Take them out of one of the files: what is learned by heart is no proof.",
             plan("data"), lambda: [write("data/train.jsonl", rows(9)), write("data/valid.jsonl", rows(2))], shows="also among"),
        Case("Rows are too long", "Raise `--seq-len` if memory allows.", [*plan("mine.jsonl"), "--seq-len", "64"],
             lambda: write("mine.jsonl", rows(9) + json.dumps({"prompt": "word " * 100, "completion": "x"})), shows="longer than --seq-len"),
    ],
    "The base": [
        Case("There is no such base", "", ["plan", "mine.jsonl", "--base", "tinny.gguf"]),
        Case("The download was cut off", "", plan("mine.jsonl"), lambda: write("tiny.gguf", TINY.read_bytes()[:-5000])),
        Case("Git LFS left a pointer", "", plan("mine.jsonl"), lambda: write("tiny.gguf", "version https://git-lfs.github.com/spec/v1\n")),
        Case("The weights are pickles", "Thimble never reads a pickle. Load the model once with transformers and save it with "
             "`save_pretrained`, which writes safetensors.", ["plan", "mine.jsonl", "--base", "model"], binary_base),
        Case("The base has a setting that is not supported", "Every field of config.json that changes what a model computes is honoured or "
             "refused by its name, and every key of GGUF metadata too. Fields that only other programs read are told as a note.",
             ["plan", "mine.jsonl", "--base", "model"],
             base_with(residual_multiplier=0.22, attention_multiplier=0.015, rope_scaling={"type": "dynamic", "factor": 2.0})),
        Case("The base is a classifier or an embedding model", "Without a language head there is nothing that writes text. Such a "
             "model learns to tell texts apart (`--task classify-text`), or to find those that belong together (`--task embed`).",
             ["plan", "mine.jsonl", "--base", "model", "--task", "text"], base_with(architectures=["LlamaForSequenceClassification"])),
        Case("The weights are quantised", "", ["plan", "mine.jsonl", "--base", "Llama-3.2-1B-Instruct-bnb-4bit"], quantised_base),
        Case("It is another kind of model", "", ["plan", "mine.jsonl", "--base", "model"],
             lambda: write("model/config.json", '{"model_type": "t5"}')),
        Case("The folder holds its weights twice", "", ["plan", "mine.jsonl", "--base", "model", "--rank", "4"], weights_twice, shows="twice"),
        Case("The folder holds several GGUF files", "", ["plan", "mine.jsonl", "--base", "models"],
             lambda: [write(f"models/model.{kind}.gguf", TINY.read_bytes()) for kind in ("Q4_0", "Q8_0")]),
        Case("A GGUF comes in parts, and one is missing", "Any part may be named if all of them lie in one folder.",
             plan("mine.jsonl")[:3] + ["big-00001-of-00002.gguf"], one_part_of_two),
        Case("A file was cut into pieces", "", ["plan", "mine.jsonl", "--base", "big.gguf.part1of2"],
             lambda: [write(f"big.gguf.part{number}of2", TINY.read_bytes()[:99]) for number in (1, 2)]),
        Case("The tokenizer files contradict each other", "", ["plan", "mine.jsonl", "--base", "model", "--rank", "4"],
             contradicting_tokenizer, shows="contradict"),
        Case("A weight is not a number", "", RUN, nan_base),
        Case("The chat template never ends", "Templates are programs from untrusted sources: each runs in a process of its own, and its time, memory and output are bounded.",
             ["plan", "mine.jsonl", "--base", "model", "--rank", "4"], endless_template),
    ],
    "An adapter": [
        Case("It belongs to another base", "", ["evaluate", "mine.jsonl", "--base", "tiny.gguf", "--adapter", "theirs"], other_adapter),
        Case("It adapts layers that see", "", ["evaluate", "mine.jsonl", "--base", "tiny.gguf", "--adapter", "theirs"], seeing_adapter),
        Case("It brings a tokenizer of its own", "",
             ["evaluate", "mine.jsonl", "--base", "model", "--adapter", "theirs", "--max-new-tokens", "2", "--eval-rows", "0"],
             adapter_with_tokenizer, shows="of its own"),
        Case("It is a pickle", "", ["evaluate", "mine.jsonl", "--base", "tiny.gguf", "--adapter", "theirs"], pickled_adapter),
    ],
    "Flags": [
        Case("A variable in a path is not set", "", ["plan", "$MY_DATA/mine.jsonl", "--base", "tiny.gguf"]),
        Case("A flag is misspelt, and another has a wrong value", "", ["plan", "mine.jsonl", "--lerning-rate", "1", "--rank", "0"]),
        Case("The folder exists", "", RUN, trained()),
    ],
    "Memory and disk": [
        Case("The run does not fit the memory", "", [*RUN, "--memory-budget", "100MB"]),
        Case("Memory runs out on the way", "", RUN, around=no_memory, shows="memory ran out"),
        Case("The disk is too full to begin", "", RUN, around=little_room),
        Case("The disk fills on the way", "", [*RUN, "--checkpoint-every-steps", "3"], around=full_disk, shows="cannot be written"),
    ],
    "Going on": [
        Case("Another run is at work in the folder", "", RUN, around=another_run),
        Case("The data have changed since the run began", "", [*RUN, "--resume"], lambda: [unfinished(), write("mine.jsonl", rows(19))]),
        Case(
            "The run was moved, without its data", "Base and data are known by their hashes: they may lie anywhere, under any name.",
            ["train", "--out", "moved/run", "--resume"], move_run,
        ),
        Case("An option differs from that of the run", "", [*RUN, "--resume", "--rank", "8"], unfinished),
        Case("A checkpoint is damaged", "", [*RUN, "--resume"], damage_checkpoint, shows="is damaged"),
    ],
    "Training": [
        Case("The loss explodes", "", [*RUN, "--max-steps", "60", "--learning-rate", "1000", "--max-grad-norm", "1e9"]),
    ],
}  # fmt: skip


def write_page() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for chapter, cases in CASES.items():
        parts.append(f"## {chapter}\n")
        parts += [_section(case) for case in cases]
    return "\n".join(parts)


def _section(case: Case) -> str:
    told, code = _bring_about(case)
    command = " ".join(["thimble", *case.words]).replace(f" {' '.join(QUICK)}", "")
    end = f"exit code {code}" if code else "the run goes on"
    advice = f"\n{case.advice}\n" if case.advice else ""
    return f"### {case.title}\n\n`{command}` — {end}\n\n```text\n{told}```\n{advice}"


def _bring_about(case: Case) -> tuple[str, int]:
    """What a command says in such a case, and its exit code."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        shutil.copy(TINY, "tiny.gguf")
        write("mine.jsonl", rows())
        case.prepare()
        told = io.StringIO()
        with case.around(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
            with patch.object(cli.signal, "signal"):
                code = cli.main(case.words)
    lines = [line for line in told.getvalue().splitlines() if _is_shown(line, case.shows)]
    assert lines, (case.title, told.getvalue())
    return "".join(f"{_settled(line)}\n" for line in lines), code


def _is_shown(line: str, shows: str) -> bool:
    return line.startswith("warning: ") and shows in line if shows else line.startswith("thimble: ")


def _settled(line: str) -> str:
    """A line without what differs from machine to machine."""
    return re.sub(r"this machine has free [\d.]+", "this machine has free 7.50", line)


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
