"""Where options come from: flags over a file over the run that is resumed."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

import thimble
from thimble.config.evaluate import EvaluateConfig
from thimble.config.sources import build_config
from thimble.config.train import TrainConfig
from thimble.errors import ConfigError, InputError

OLD_CONFIG = Path(__file__).parent / "fixtures" / "config_0_1_0.yaml"  # as the first release wrote it
QUICK = {"seq_len": 64, "batch_tokens": 64, "max_steps": 6, "eval_rows": 0, "compute": "fp32", "learning_rate": 0.01}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder `runs/mine-1` with the config of an earlier release, and the working folder around it."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/mine-1")
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(OLD_CONFIG, folder / "config.yaml")
    return folder


def write(text: str) -> str:
    Path("options.yaml").write_text(text)
    return "options.yaml"


def test_a_flag_overrides_the_file_and_a_problem_names_the_file_only_where_the_file_is_at_fault(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write("rank: 0\nseq_len: 99\nrnak: 3\n")
    config = build_config(TrainConfig, {"seq_len": "0"}, file)
    assert config.problems == (
        "options.yaml: --rnak is not an option of this command: did you mean --rank?",
        "options.yaml: --rank 0: expected at least 1",
        "--seq-len 0: expected at least 8",
    )
    assert build_config(TrainConfig, {"rank": 4}, file).rank == 4


@pytest.mark.parametrize("given", [{"max_steps": 5}, {"iters": 5}])
def test_a_length_that_is_given_replaces_the_one_in_the_file(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    config = build_config(TrainConfig, given, write("num_train_epochs: 2\n"))
    assert (config.epochs, config.max_steps, config.problems) == (None, 5, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: [1", "options.yaml line 1, column 9 is not YAML"),
        ("- rank", "holds no options"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_holds_no_options_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        write(text)
    with pytest.raises(ConfigError, match=message):
        build_config(TrainConfig, {}, "options.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 4\nalpha: 8\nrank: 8\n", "line 3: rank stands there twice"),
        ("rank: 4\nrank_pattern:\n  q_proj: 4\n  q_proj: 8\n", "line 4: q_proj stands there twice"),
    ],
)
def test_an_option_that_a_file_gives_twice_is_refused_since_one_would_be_dropped(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        build_config(TrainConfig, {}, write(text))


def test_data_in_the_form_of_another_tool_are_refused_without_showing_it_as_a_shell_would():
    config = build_config(TrainConfig, {"datasets": [{"path": "a.jsonl", "type": "alpaca"}]})
    assert "expected the path of one file or folder, and nothing around it" in config.problems[0]


# ---- resuming -------------------------------------------------------------------------------------------------------


def test_the_config_of_an_earlier_release_is_read(run):
    config = build_config(TrainConfig, {}, str(run / "config.yaml"))
    assert config.problems == ()
    assert (config.rank, config.targets, config.init, config.use_rslora) == (4, ("attention",), "gradient", True)
    resumed = build_config(TrainConfig, {"out": str(run), "resume": True})
    assert resumed.replace(resume=False) == config


def test_a_run_of_an_earlier_release_goes_on_with_the_optimiser_it_began_with(run):
    """Its config.yaml knows no beta2: it was 0.999 for all, whatever is the default now."""
    assert "adam_beta2" not in yaml.safe_load((run / "config.yaml").read_text())
    assert TrainConfig().adam_beta2 is None
    resumed = build_config(TrainConfig, {"out": str(run), "resume": True})
    repeated = build_config(TrainConfig, {"out": "runs/again"}, str(run / "config.yaml"))
    asked = build_config(TrainConfig, {"out": "runs/again", "beta2": 0.9}, str(run / "config.yaml"))
    assert (resumed.adam_beta2, repeated.adam_beta2, asked.adam_beta2) == (0.999, 0.999, 0.9)
    assert build_config(TrainConfig, {}, write("rank: 4\n")).adam_beta2 is None


def test_a_run_of_an_earlier_release_keeps_the_answers_that_it_began_with(run):
    """Its config.yaml has a weight alone: answers to general text were kept then, in every step."""
    kept = {"keep_general": 0.3}
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **kept}))
    resumed = build_config(TrainConfig, {"out": str(run), "resume": True})
    repeated = build_config(TrainConfig, {"out": "runs/again"}, str(path))
    for config in (resumed, repeated):
        assert (config.keep_general, config.keep_general_on, config.keep_general_every_steps) == (0.3, "general", 1)
    new = build_config(TrainConfig, kept)
    assert (new.keep_general_on, new.keep_general_every_steps) == ("own", 4)
    changed = build_config(TrainConfig, {"out": str(run), "resume": True, "keep_general_on": "own"})
    assert changed.problems == (
        "--keep-general-on own: the run to resume began with general; leave it out, or begin another run with another "
        "--out",
    )


@pytest.mark.parametrize("values", [{"rank": "8"}, {"lora_r": 8}, {"lora-rank": 8}])
@pytest.mark.parametrize(
    ("named", "file"), [({"out": "runs/mine-1"}, None), ({}, "runs/mine-1/config.yaml"), ({}, "options.yaml")]
)
def test_a_run_that_is_resumed_keeps_what_makes_it_that_run_however_it_is_named(run, values, named, file):
    write("out: runs/mine-1\nseq_len: 64\n")
    config = build_config(TrainConfig, {**values, **named, "resume": True}, file)
    assert config.problems == (
        "--rank 8: the run to resume began with 4; leave it out, or begin another run with another --out",
    )


@pytest.mark.parametrize(
    ("began", "now", "said"),
    [(False, True, "--use-dora: the run to resume began with no --use-dora;"),
     (True, False, "no --use-dora: the run to resume began with --use-dora;")],
)  # fmt: skip
def test_a_switch_is_shown_as_it_is_typed(run, began, now, said):
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump({**TrainConfig(data="x", use_dora=began).resolved(), "out": str(run)}))
    [problem] = build_config(TrainConfig, {"out": str(run), "resume": True, "use_dora": now}).problems
    assert problem.startswith(said)


def test_a_run_that_is_resumed_keeps_its_columns(run):
    path = run / "config.yaml"
    named = TrainConfig(data="x", prompt_template=r"{Betreff}\n\n{der Text}: 'é'", completion_column="Klasse")
    path.write_text(yaml.safe_dump({**named.resolved(), "out": str(run)}, allow_unicode=True))
    config = build_config(TrainConfig, {"out": str(run), "resume": True})
    assert (config.prompt_template, config.completion_column) == (named.prompt_template, "Klasse")
    changed = build_config(TrainConfig, {"out": str(run), "resume": True, "completion_column": "Antwort"})
    assert changed.problems[0].startswith("--completion-column Antwort: the run to resume began with Klasse")


@pytest.mark.parametrize(("saved", "began"), [("file", "file"), ("dense", "dense"), ("auto", "dense")])
def test_a_run_that_is_resumed_keeps_how_frozen_weights_are_stored(run, saved, began):
    """A run on pictures of an earlier release has `auto` in its config.yaml, which was float32 for all of them."""
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "store": saved}))
    for store in (began, "auto"):
        assert build_config(TrainConfig, {"out": str(run), "resume": True, "store": store}).problems == ()
    assert build_config(TrainConfig, {"out": str(run), "resume": True, "store": "int8"}).problems == (
        f"--store int8: the run to resume began with {began}; leave it out, or begin another run with another --out",
    )


def test_resume_may_stand_in_the_file(run):
    problems = build_config(TrainConfig, {}, write("out: runs/mine-1\nresume: true\nrank: 8\n")).problems
    assert "--rank 8: the run to resume began with 4" in problems[0]


def test_what_does_not_make_another_run_may_change(run):
    given = {"resume": True, "max_minutes": 2, "patience": 0, "rank": 4, "init": "auto"}
    config = build_config(TrainConfig, given, str(run / "config.yaml"))
    assert config.problems == ()
    assert (config.max_minutes, config.max_steps, config.patience, config.init) == (2, None, 0, "gradient")


@pytest.mark.parametrize("place", ["elsewhere/moved", "."])
def test_a_run_folder_that_was_moved_is_the_one_that_is_resumed(run, place, monkeypatch):
    Path("elsewhere").mkdir()
    run.rename("elsewhere/moved")
    if place == ".":
        monkeypatch.chdir("elsewhere/moved")
    config = build_config(TrainConfig, {"resume": True, "rank": 8}, os.path.join(place, "config.yaml"))
    assert config.out == place
    assert "--rank 8: the run to resume began with 4" in config.problems[0]


def test_a_folder_that_is_named_with_out_is_the_one_that_is_resumed(run):
    shutil.copytree(run, "runs/other")
    config = build_config(TrainConfig, {"resume": True, "out": "runs/other"}, str(run / "config.yaml"))
    assert (config.out, config.problems) == ("runs/other", ())


def test_a_config_beside_no_run_is_an_ordinary_file_of_options(run):
    Path("config.yaml").write_text("out: runs/mine-1\nseq_len: 64\n")
    assert build_config(TrainConfig, {"resume": True}, "config.yaml").out == "runs/mine-1"


def test_resume_needs_to_know_what_to_resume(run):
    problems = build_config(TrainConfig, {"resume": True}, write("seq_len: 64\n")).problems
    assert problems == ("--resume: name the run folder to continue, such as --out runs/mydata-1",)


def test_a_command_that_cannot_resume_says_so(run):
    problems = build_config(EvaluateConfig, {"resume": True}).problems
    assert problems == ("--resume is not an option of this command: see the list under --help",)


def test_a_run_that_was_moved_ends_with_the_adapter_of_an_uninterrupted_one(examples, tiny_base, tmp_path):
    def adapter(folder):
        return (tmp_path / folder / "adapter" / "adapter_model.safetensors").read_bytes()

    taken = []
    options = {"base": tiny_base, **QUICK}
    thimble.train(examples, out=str(tmp_path / "straight"), **options)
    thimble.train(
        examples, out=str(tmp_path / "begun"), checkpoint_every_steps=2, **options,
        on_event=lambda event: taken.append(event) if event.kind == "step" else None,
        should_stop=lambda: len(taken) >= 3,
    )  # fmt: skip
    (tmp_path / "begun").rename(tmp_path / "moved")
    file = str(tmp_path / "moved" / "config.yaml")
    with pytest.raises(InputError, match="--rank 8: the run to resume began with 16"):
        thimble.train(config=file, resume=True, rank=8)
    report = thimble.train(config=file, resume=True)
    assert (report.status, report.out) == ("done", str(tmp_path / "moved"))
    assert adapter("moved") == adapter("straight")
    assert not (tmp_path / "begun").exists()
