"""A run folder, its base and its data in other places than they were: known by their hashes, found or asked for."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

import thimble
from thimble.errors import InputError

QUICK = {"seq_len": 64, "batch_tokens": 64, "max_steps": 3, "eval_rows": 0, "compute": "fp32", "rank": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project with a run of three steps, begun with relative paths, and the adapter it ends in."""
    place = tmp_path_factory.mktemp("old")
    tiny = Path(__file__).parents[1] / "fixtures" / "gguf" / "smollm2.gguf"
    (place / "models").mkdir()
    shutil.copy(tiny, place / "models" / "tiny.gguf")
    rows = [json.dumps({"prompt": f"say {n} ", "completion": f"{n} it is"}) for n in range(12)]
    (place / "mine.jsonl").write_text("\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        thimble.train("mine.jsonl", base="models/tiny.gguf", out="runs/it", checkpoint_every_steps=1, **QUICK)
    return place


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    """The same, copied elsewhere, as it was after step 2; the first place is not what its config.yaml names."""
    shutil.copytree(finished, tmp_path / "new")
    run = tmp_path / "new" / "runs" / "it"
    (run / "report.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    text = (run / "config.yaml").read_text().replace(str(finished), "/gone/old")
    (run / "config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "new"


def go_on(run, *data, **options):
    """Resume a run and say what it ended in."""
    steps = []
    report = thimble.train(
        *data, out=str(run), resume=True, on_event=lambda e: steps.append(e.data["step"]) if e.kind == "step" else 0,
        **options,
    )  # fmt: skip
    assert (report.status, steps, report.out) == ("done", [3], str(run))
    return (Path(run) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def expected(finished):
    return (finished / "runs" / "it" / "adapter" / "adapter_model.safetensors").read_bytes()


def move(source, target):
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)


MOVES = {
    "all together": {},
    "the run folder renamed": {"runs/it": "runs/called otherwise"},
    "data beside the run folder": {"mine.jsonl": "runs/it/mine.jsonl"},
    "data in the working directory": {"mine.jsonl": "../mine.jsonl"},
    "the base too, with its folder": {"models": "../models", "mine.jsonl": "../mine.jsonl"},
}


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_what_lies_near_is_found(project, expected, moves):
    for source, target in moves.items():
        move(project / source, project / target)
    run = project / moves.get("runs/it", "runs/it")
    assert go_on(run) == expected
    saved = (run / "config.yaml").read_text()
    assert "/gone/old" not in saved  # written anew, with the places of now
    assert yaml.safe_load(saved)["out"] == str(run)


@pytest.mark.parametrize("working_directory", [".", "new", "new/runs/it", "elsewhere"])
def test_relative_paths_of_an_earlier_release_are_found_from_any_working_directory(
    project, expected, working_directory, monkeypatch
):
    config = project / "runs" / "it" / "config.yaml"
    config.write_text(config.read_text().replace("/gone/old/", ""))
    Path("elsewhere").mkdir()
    monkeypatch.chdir(working_directory)
    assert go_on(os.path.relpath(project / "runs" / "it")) == expected


def test_new_places_can_be_named_without_accepting_changes(project, expected):
    move(project / "mine.jsonl", "far/away/renamed.jsonl")
    move(project / "models" / "tiny.gguf", "other/name.gguf")
    with pytest.raises(InputError) as refused:
        thimble.train(out=str(project / "runs" / "it"), resume=True)
    (problem,) = refused.value.problems
    assert "began with the data /gone/old/mine.jsonl and the base /gone/old/models/tiny.gguf: not there now" in problem
    line = f"thimble train PATH/TO/mine.jsonl --base PATH/TO/tiny.gguf --out {project}/runs/it --resume"
    assert problem.endswith(line)
    assert go_on(project / "runs" / "it", "far/away/renamed.jsonl", base="other/name.gguf") == expected


def test_a_run_is_repeated_from_a_folder_that_was_moved(project, expected):
    thimble.train(config=str(project / "runs" / "it" / "config.yaml"), out="again")
    assert Path("again/adapter/adapter_model.safetensors").read_bytes() == expected


def other_data(project):
    Path("other.jsonl").write_text((project / "mine.jsonl").read_text().replace("it is", "it was"))
    return {"data": "other.jsonl"}


def other_base(project):
    whole = bytearray((project / "models" / "tiny.gguf").read_bytes())
    whole[-1] ^= 1
    Path("other.gguf").write_bytes(whole)
    return {"base": "other.gguf"}


@pytest.mark.parametrize("state", ["with a checkpoint", "before the first one", "ended"])
@pytest.mark.parametrize(("make", "what"), [(other_data, "data"), (other_base, "base")])
def test_another_base_and_other_data_are_refused_with_what_changed(project, finished, make, what, state):
    run = project / "runs" / "it"
    if state == "before the first one":
        shutil.rmtree(run / "checkpoints")
    if state == "ended":
        shutil.copy(finished / "runs" / "it" / "report.json", run)
    named = make(project)
    with pytest.raises(InputError) as refused:
        thimble.train(named.pop("data", None), out=str(run), resume=True, **named)
    assert f"other.{'jsonl' if what == 'data' else 'gguf'}" in str(refused.value)
    assert state == "ended" or f"the {what} changed since the run to resume began" in str(refused.value)


def test_a_run_that_has_ended_needs_neither_base_nor_data_and_says_where_it_is_now(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs" / "it", "moved")
    text = Path("moved/config.yaml").read_text().replace(str(finished), "/gone/old")
    Path("moved/config.yaml").write_text(text)
    report = thimble.train(out="moved", resume=True)
    assert (report.out, report.adapter) == ("moved", "moved/adapter")
    shutil.copy(finished / "mine.jsonl", "renamed.jsonl")
    assert thimble.train("renamed.jsonl", out="moved", resume=True).adapter == "moved/adapter"
    assert thimble.inspect("moved", base=str(finished / "models" / "tiny.gguf")).subject == "adapter"


def test_a_run_that_has_ended_is_not_asked_for_more_steps_in_vain(finished, tmp_path):
    run = shutil.copytree(finished / "runs" / "it", tmp_path / "run")
    before = (run / "report.json").read_bytes()
    with pytest.raises(InputError, match="has ended") as refused:
        thimble.train(out=str(run), resume=True, max_steps=9)
    assert f"--max-steps 9: the run in {run} has ended, and it had --max-steps 3" in str(refused.value)
    assert f"--init adapter:{run}" in str(refused.value)
    assert (run / "report.json").read_bytes() == before
    assert thimble.train(out=str(run), resume=True, max_steps=3).steps == 3


def test_before_is_measured_anew_if_a_change_is_accepted_before_the_first_checkpoint(project):
    run = project / "runs" / "it"
    shutil.rmtree(run / "checkpoints")
    before = json.loads((run / "before.json").read_text())
    report = thimble.train(out=str(run), resume=True, accept_changes=True, data=other_data(project)["data"])
    assert report.loss_base != before["loss_base"]


def test_new_places_are_told(project):
    report = thimble.train(str(project / "mine.jsonl"), out=str(project / "runs" / "it"), resume=True)
    assert f"data: /gone/old/mine.jsonl when the run began, {project}/mine.jsonl now" in report.messages["note"]
