"""Four ways in which people use it, each from the first file to the end, by what is printed; see also test_examples."""

import csv
import json
import os
import shlex
import subprocess
import sys

import pytest

QUICK = ("--compute", "fp32", "--seq-len", "128", "--rank", "4", "--max-steps", "3", "--max-new-tokens", "4")


@pytest.fixture
def typed(thimble):
    """Type a command as it is printed; gives what it says, and fails if it fails."""

    def run(line: str, *more: str) -> str:
        words = shlex.split(line)
        code, out, told = thimble(*(words[1:] if words[0] == "thimble" else words), *more)
        assert code == 0, told
        return out + told

    return run


def test_a_teacher_with_a_spreadsheet_gets_answers_back_as_one(thimble, typed, tiny_base, tmp_path):
    rows = [
        ("Frage", "Antwort", "Thema"),
        *((f"Was ist {n} plus {n}?", f"{2 * n}, natürlich", "Größen") for n in range(20)),
    ]
    with (tmp_path / "Fragen Klasse 7.csv").open("w", encoding="cp1252", newline="") as file:
        csv.writer(file, delimiter=";").writerows(rows)
    code, _, told = thimble("train", "Fragen Klasse 7.csv", "--base", tiny_base, *QUICK)
    assert code == 2
    options = told[told.index("--prompt-") :].split(" (likewise")[0]  # what the refusal says to add
    told = typed(f"train 'Fragen Klasse 7.csv' --base {shlex.quote(tiny_base)} {options}", *QUICK)
    assert "Too few rows to tell" in told
    with (tmp_path / "neu.csv").open("w", encoding="cp1252", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("Frage", "Thema"), ("Was ist 30 plus 30?", "Größen")])
    told = typed("generate neu.csv --adapter 'runs/Fragen Klasse 7-1' --out Antworten.csv", *QUICK[-2:])
    assert "columns as in the run that trained the adapter" in told
    with (tmp_path / "Antworten.csv").open(encoding="utf-8-sig", newline="") as file:
        (answered,) = csv.DictReader(file, delimiter=";")
    assert (answered["Frage"], answered["Thema"]) == ("Was ist 30 plus 30?", "Größen")
    assert "answer" in answered


def test_an_engineer_with_tickets_sees_each_label_and_answers_them_all(typed, tiny_base, tmp_path):
    labels = ("delivery", "account", "billing")
    rows = [{"text": f"ticket {n} about {labels[n % 3]}", "label": labels[n % 3]} for n in range(60)]
    (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "--prompt-column text --completion-column label"
    told = typed(f"train tickets.jsonl --base {shlex.quote(tiny_base)} {columns} --valid-split 0.3", *QUICK)
    assert "always writing" in told
    told = typed("generate tickets.jsonl --adapter runs/tickets-1 --out answers.jsonl", *QUICK[-2:])
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 61))
    assert {line["reference"] for line in lines} == set(labels)
    told = typed("evaluate tickets.jsonl --adapter runs/tickets-1 --compute fp32", *QUICK[-2:])
    assert f"columns as in the run that trained the adapter: {columns}" in told
    assert "(other)" in told


def test_a_student_looks_at_the_spectra_of_an_update(typed, examples, tiny_base, tmp_path):
    told = typed(f"train mine.jsonl --base {shlex.quote(tiny_base)}", *QUICK)
    assert "try it" in told
    told = typed("inspect runs/mine-1 --out figures")
    assert "stable" in told
    assert [path.suffix for path in (tmp_path / "figures").iterdir() if path.suffix == ".svg"]


def test_a_container_without_a_home_makes_the_same_adapter_twice(examples, tiny_base, tmp_path):
    words = ["train", str(examples), "--base", tiny_base, "--eval-rows", "0", "--json", *QUICK]
    made = []
    for number in range(2):
        place = tmp_path / str(number)
        place.mkdir()
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "thimble", *words, "--out", str(place / "run")], cwd=place, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["status"] == "done"
        made.append((place / "run" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]
