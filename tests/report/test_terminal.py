"""Events and reports as text in a terminal, and in a pipe."""

import io
from types import SimpleNamespace

import pytest

from run_reports import full_report, unmeasured
from thimble.events import Event
from thimble.report.terminal import Progress, render_plan, render_train


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


STEP = {"step": 1, "total": 3, "loss": 2.5, "tokens_so_far": 100, "seconds": 0.5, "seconds_left": 187.0,
        "peak_memory_bytes": 1_880_000_000}  # fmt: skip


@pytest.mark.parametrize(
    ("counted", "unit", "told"),
    [("pictures", "pixels", "24 pictures/s"), ("clips", "frames", "24 clips/s, 2.0 s of sound/s"),
     ("texts", "tokens", "24 texts/s"), ("tokens", "tokens", "200 tokens/s")],
)  # fmt: skip
def test_a_step_tells_its_speed_in_what_a_person_counts(counted, unit, told):
    from thimble.report.terminal import _step_line

    assert told in _step_line({**STEP, "counted": counted, "unit": unit, "rows_so_far": 12})


def shown(stream: io.StringIO, *events: Event) -> str:
    progress = Progress(stream)
    for event in events:
        progress.on_event(event)
    progress.end()
    return stream.getvalue()


def test_warnings_begin_with_the_word():
    text = shown(io.StringIO(), Event("decision", "compute: bf16"), Event("warning", "3 rows were cut off"))
    assert text == "  compute: bf16\nwarning: 3 rows were cut off\n"


def test_a_step_is_one_line_in_a_pipe():
    text = shown(io.StringIO(), Event("step", data=STEP))
    assert text == "  step 1/3  loss 2.500  200 tokens/s, 3:07 left, 1.88 GB\n"


def test_the_moving_line_of_a_terminal_is_left_before_anything_else_is_written():
    text = shown(Terminal(), Event("step", data=STEP), Event("warning", "x"))
    assert text.startswith("\r\x1b[K  step 1/3")
    assert text.endswith("1.88 GB\nwarning: x\n")


def test_the_end_of_a_run_names_the_metrics_and_what_to_type():
    text = render_train(SimpleNamespace(**full_report()))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "valid JSON 0/200 (0%) 199/200 (99.5%)" in lines, "never rounded up to all"
    assert "all arguments right 0/200 (0%) 95/200 (48%)" in lines
    assert "validation loss 2.094 0.312" in lines
    assert "130 steps in 21:14 (206 tokens/s, 1.99 GB), 27:11 in all" in lines
    assert text.endswith("try it   thimble chat --adapter runs/calls-1")


def test_what_was_not_measured_is_shown_as_such():
    text = render_train(SimpleNamespace(**unmeasured(status="interrupted")))
    assert "nan" not in text
    assert "interrupted: 130 steps" in text


def test_a_mean_of_what_is_not_right_or_wrong_is_no_count_of_rows():
    found = {"metric": "none", "metrics_rows": 269, "metric_comparisons": {}, "task": "embed"}
    metrics = {
        "metrics_before": {"MRR": 0.65, "recall@1": 144 / 269},
        "metrics_after": {"MRR": 0.72, "recall@1": 168 / 269},
    }
    lines = render_train(SimpleNamespace(**{**full_report(), **found, **metrics})).splitlines()
    shown = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
    assert shown["MRR"] == ["65%", "(mean", "of", "269)", "72%", "(mean", "of", "269)"]
    assert shown["recall@1"] == ["144/269", "(54%)", "168/269", "(62%)"]


@pytest.mark.parametrize(("steps", "time"), [(130, "3.8 minutes for 130 steps"), (None, "3.8 minutes")])
def test_a_plan_is_a_line_for_each_question(steps, time):
    report = SimpleNamespace(
        task="text", unit="tokens", base="a.gguf (llama, 135M parameters)", base_parameters=134_515_008,
        adapter_parameters=4_884_480, rows=400,
        tokens_per_epoch=80_000, target_tokens_per_epoch=9_000, longest_row_tokens=900, steps=steps,
        memory={"weights": 98_000_000, "total": 1_700_000_000}, available_bytes=8_000_000_000, seconds_per_step=1.73,
        seconds_total=225.0, tokens_per_second=1088.0,
        machine={"name": "x86", "cores": 2, "flops": {"bf16": 8e11}, "copy_bytes": 2e10, "disk_bytes": 1e9},
        alternatives=[SimpleNamespace(change="--rank 8", memory_bytes=1_600_000_000, seconds_per_step=1.6)],
    )  # fmt: skip
    assert render_plan(report).splitlines() == [
        " machine  x86, 2 cores; G operations/s: bf16 800; memory 20 GB/s, disk 1.0 GB/s",
        "    base  a.gguf (llama, 135M parameters)",
        " adapter  4.9 million parameters (3.6% of the base)",
        "    data  400 rows, 80,000 tokens, 9,000 of them target tokens; longest row 900",
        "  memory  1.70 GB of 8.00 GB free",
        "          MB: weights 98",
        "   speed  1,088 tokens/s, 1.73 s a step",
        f"    time  {time}",
        "      or  --rank 8: 1.60 GB, 1.08 times the speed",
    ]
