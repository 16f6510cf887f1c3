"""Reports of training runs in every state a run can end in, and a reader of their pages, for the tests of report."""

import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

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
                         "learning rate: 0.00047, from the width of the base and 317 target tokens a step"],
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
        **{"steps": 0, "tokens": 0, "target_tokens": 0, "seconds": 0.0, "tokens_per_second": 0.0,
           "peak_memory_bytes": 0, "loss_base": NAN, "loss_before": NAN, "general_before": NAN, "metric": "none",
           "metrics_before": {}, "metrics_rows": 0, "plan": {}, "planned_seconds_per_step": 0.0, "messages": {},
           "config": {}, "out": "runs/x", "base": ""} | changes
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
             "grad_norm": math.inf if step == bad_at else norm, "tokens": 2016, "label_tokens": 375,
             "seconds": 9.8 * step, "peak_memory_bytes": 1_985_000_000}
        )  # fmt: skip
    return rows


STATES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "full": (full_report(), steps(130)),
    "no metric": (full_report(metric="none", metrics_before={}, metrics_after={}, metrics_rows=0), steps(130)),
    "no validation": (
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
