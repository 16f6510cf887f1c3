"""What `thimble inspect` found, as text; tests/commands/test_inspect.py reads it of real bases and adapters."""

from types import SimpleNamespace

from thimble.report.inspect_text import render_inspect


def test_shares_that_inits_capture_are_shown_with_what_they_do_not_say():
    mean = {"layers": 2.0, "rank": 8.0, "kaiming": 0.024, "eva": 0.85, "gradient": 0.933}
    report = SimpleNamespace(
        subject="inits", names=["mine.jsonl"], base="a.gguf", inits=[1, 2], by_kind={"q_proj": mean}, overall=mean,
        remark="No forecast.", skipped=[], figures=[],
    )  # fmt: skip
    head, table, _, remark = render_inspect(report).split("\n\n")
    assert head == "gradients of mine.jsonl on a.gguf, 2 layers"
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["q_proj", "2", "8", "2.4%", "85.0%", "93.3%"],
        ["all", "2", "8", "2.4%", "85.0%", "93.3%"],
    ]
    assert remark == "No forecast."


def test_what_was_left_out_is_a_warning():
    report = SimpleNamespace(
        subject="inits", names=["x"], base="y", inits=[], by_kind={}, overall={}, remark="",
        skipped=["a", "b"], figures=["one.png"],
    )  # fmt: skip
    text = render_inspect(report)
    assert "warning: 2 weights left out: a, b" in text
    assert text.endswith("figures  one.png")
