"""Any name will do, of data, base, run folder, config, metric and adapter: what is made can be used and shown."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from thimble.errors import as_word, escaped
from thimble.files.peft import load_adapter
from thimble.training.run_folder import choose_folder

NAMES = {
    "wide and no-break spaces": "小さな\u3000モデル\u00a0\u2028x",
    "spaces around": "  a  ",
    "signs of shells": """a [v2] 100% #1 "q" 'p' $x ${y} * ? \\ ! ~ & ; | < > ( )""",
    "a dash in front": "-o",
    "a dot in front": ".hidden",
    "a comma": "a,b",
    "an emoji": "👩\u200d🔬 é e\u0301",
    "right to left": "\u202eעברית\u2066\u200f",
    "controls": "a\x1b[31m\tb\nc\rd",
    "not UTF-8": os.fsdecode(b"caf\xe9\xff"),
    "like a tag": "a: b <b>&amp; {{x}} - #",
}
QUICK = "--seq-len 64 --batch-tokens 64 --max-steps 2 --max-new-tokens 1 --eval-rows 1 --compute fp32 --rank 2".split()
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# Every name at once, as far as they go together, takes the way through all commands.
WAYS = {
    "every letter": "".join(NAMES[key] for key in ("wide and no-break spaces", "an emoji", "right to left")),
    "every sign": NAMES["a dash in front"] + NAMES["signs of shells"] + NAMES["a comma"] + NAMES["like a tag"],
    "no text": NAMES["a dot in front"] + NAMES["controls"] + NAMES["not UTF-8"] + NAMES["spaces around"],
}


@pytest.fixture
def named(request, tmp_path, examples, tiny_base):
    """A base, data, a metric and a config of a name, in an empty folder."""
    name = WAYS[request.param]
    shutil.copy(tiny_base, tmp_path / f"{name}.gguf")
    examples.rename(tmp_path / f"{name}.jsonl")
    (tmp_path / f"{name}.py").write_text("def right(answer, reference):\n    return 1.0\n")
    return name


@pytest.mark.parametrize("named", WAYS, indirect=True)
def test_what_is_made_with_a_name_can_be_used(named, thimble, tmp_path):
    out = f"./{named} run" if named.startswith("-") else f"{named} run"
    options = {"base": f"{named}.gguf", "metric": f"{named}.py:right", "eval_every_steps": 0}
    Path(f"{named}.yaml").write_text(yaml.safe_dump(options, allow_unicode=True))
    code, shown, told = thimble("train", f"--config={named}.yaml", f"--out={out}", *QUICK, "--", f"{named}.jsonl")
    assert (code, UNSAFE.findall(shown + told)) == (0, []), told
    report = json.loads((tmp_path / out / "report.json").read_text())
    assert report["metrics_after"] == {"right": 1.0}
    page = (tmp_path / out / "report.html").read_bytes().decode()
    assert UNSAFE.findall(page) == []
    assert load_adapter(tmp_path / out).base == str(tmp_path)  # the folder in which PEFT opens the GGUF
    assert json.loads((tmp_path / out / "manifest.json").read_text())["base"]["name"] == escaped(f"{named}.gguf")
    saved = yaml.safe_load((tmp_path / out / "config.yaml").read_text())
    places = {"data": ".jsonl", "base": ".gguf", "metric": ".py:right", "out": " run"}
    assert {key: saved[key] for key in places} == {key: str(tmp_path / (named + end)) for key, end in places.items()}
    code, _, told = thimble("train", f"--out={out}", "--resume")
    assert code == 0, told
    again = ["evaluate", f"--base={named}.gguf", f"--adapter={out}", "--eval-rows", "1", "--max-new-tokens", "1"]
    code, shown, told = thimble(*again, "--", f"{named}.jsonl")
    assert (code, UNSAFE.findall(shown + told)) == (0, []), told
    code, shown, told = thimble("merge", f"--out={out} small", "--rank", "1", "--json", "--", out)
    assert json.loads(shown)["adapters"] == [out]
    code, shown, told = thimble("train", f"--base={named} is not there.gguf", "--", f"{named} nor this.jsonl")
    assert (code, UNSAFE.findall(shown + told)) == (2, [])


def test_a_file_that_looks_like_an_option_is_answered_with_how_to_name_it(thimble):
    Path("-o.jsonl").touch()
    assert "-o.jsonl is taken for an option: to name the file, type ./-o.jsonl" in thimble("plan", "-o.jsonl")[2]


@pytest.mark.parametrize("name", [*NAMES.values(), "it's", "\x1b'\\", "plain-1.x", "é/ü"])
def test_a_word_for_a_shell_is_the_name_again(name):
    word = as_word(name)
    assert UNSAFE.findall(word) == []
    found = subprocess.run(
        ["bash", "-c", f"printf %s {word}"], stdout=subprocess.PIPE, env={"LC_ALL": "C.UTF-8"}
    ).stdout
    assert os.fsdecode(found).removeprefix("./") == name


@pytest.mark.parametrize(
    ("data", "folder"),
    [
        (NAMES["controls"] + ".jsonl", "runs/a_[31m_b_c_d-1"),
        (NAMES["not UTF-8"] + ".jsonl", "runs/caf__-1"),
        ("é" * 124 + ".jsonl", f"runs/{'é' * 100}-1"),
        (".hidden.jsonl", "runs/hidden-1"),
        ("my data.jsonl", "runs/my data-1"),
    ],
)
def test_a_run_folder_is_named_after_the_data_as_far_as_that_can_be_seen_and_fits(data, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose_folder(None, data) == Path(folder)


def test_names_as_long_as_can_be_deep_paths_and_folders_called_like_files(thimble, tmp_path, examples, tiny_base):
    deep = tmp_path.joinpath(*["d" * 100] * 20)
    deep.mkdir(parents=True)
    base, out, data = deep / ("b" * 250 + ".gguf"), "o" * 255, deep / "folder.jsonl"
    shutil.copy(tiny_base, base)
    data.mkdir()
    examples.rename(data / ("x" * 249 + ".jsonl"))
    code, _, told = thimble("train", data, "--base", base, "--out", out, *QUICK)
    assert code == 0, told
    assert thimble("merge", out, "--out", "m" * 255, "--rank", "1")[0] == 0
    code, _, told = thimble("train", data, "--base", base, "--out", "p" * 256, *QUICK)
    assert code == 2
    assert "name another folder" in told
