"""Pictures and players on the page, a confusion picture, calibration: safe, and in an honest order."""

import re
from dataclasses import asdict

import numpy as np
import pytest

from run_reports import full_report, render, steps
from thimble.core.cross_fitted import calibration, thresholds
from thimble.core.labels import score_labels
from thimble.report.gallery import Shown, choose_shown, group_of
from thimble.report.page import write_report

PIXEL = "data:image/png;base64,iVBORw0KGgo="
CLIP = "data:audio/mpeg;base64,SUQz"
EVIL = '"><script>alert(1)</script>'


def labels_of(pairs):
    return {"training_rows": {}, "before": {}, "after": asdict(score_labels(pairs, {}))}


def page_of(tmp_path, shown=(), **changes):
    write_report(tmp_path / "report.html", full_report(**changes), steps(20), shown)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_changed_and_what_is_wrong_comes_first():
    groups = ["right"] * 90 + ["wrong"] * 5 + ["mended"] * 3 + ["spoilt"] * 2
    chosen = [groups[row] for row in choose_shown(groups, 24)]
    assert chosen == ["spoilt"] * 2 + ["mended"] * 3 + ["wrong"] * 5 + ["right"] * 14
    assert choose_shown(groups[:10], 24) == list(range(10))
    assert [groups[row] for row in choose_shown(groups, 3)] == ["spoilt", "mended", "wrong"]


@pytest.mark.parametrize(
    ("before", "after", "group"),
    [("a", "b", "spoilt"), ("b", "a ", "mended"), ("b", "c", "wrong"), ("a", "a", "right")],
)
def test_groups(before, after, group):
    assert group_of("a", before, after) == group


def test_pictures_stand_on_the_page_with_what_was_said(tmp_path):
    shown = [Shown(PIXEL, "cats/3.png", "cat", "dog", "cat"), Shown(PIXEL, EVIL, EVIL, EVIL, "dog")]
    text = page_of(tmp_path, shown, labels=labels_of([("cat", "cat"), ("dog", "cat")]))
    assert text.count(f'src="{PIXEL}"') == 2
    assert "Wrong before, right after" in text
    assert "✓ cat" in text
    assert EVIL not in text
    assert "<script" not in text
    assert text.index("Right before, wrong after") < text.index("Wrong before, right after")


def test_nothing_but_data_is_loaded(tmp_path):
    text = page_of(tmp_path, [Shown(CLIP, "a.wav", "cat", "dog", "cat")], labels=labels_of([("cat", "cat")]))
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', text))
    assert "media-src data:" in text
    assert "<audio controls" in text


def test_transcripts_have_their_players(tmp_path):
    samples = [{"asked": "a.wav", "reference": "una gallina", "before": "oararina", "after": "una gallino"}]
    text = page_of(tmp_path, [Shown(CLIP, "a.wav", "una gallina", "oararina", "una gallino")], samples=samples)
    assert text.index(f'<audio controls preload="metadata" src="{CLIP}"') < text.index("oararina")


def test_many_labels_are_a_picture_and_few_a_coloured_table(tmp_path):
    pairs = [(f"label {EVIL} {n}", f"label {EVIL} {(n + (n % 5 == 0)) % 30}") for n in range(30)]
    text = page_of(tmp_path, labels=labels_of(pairs))
    assert text.count("<title>label") == 30
    assert "<script" not in text
    few = page_of(tmp_path, labels=labels_of([("a", "a")] * 3 + [("a", "b")] + [("b", "b")]))
    assert 'class="diagonal" style="--share: 0.75"' in few
    assert 'class="share" style="--share: 0.25"' in few
    assert 'class="confusion"' not in few


def drawn(rows, classes, heat):
    random = np.random.default_rng(0)
    logits = random.standard_normal((rows, classes))
    labels = np.array([random.choice(classes, p=np.exp(row) / np.exp(row).sum()) for row in logits])
    return logits * heat, labels


def test_calibration_and_thresholds_are_told(tmp_path):
    logits, labels = drawn(400, 2, 5.0)
    found = thresholds(logits, labels)
    details = {"calibration": calibration(logits, labels), "thresholds": found | {"name": EVIL}}
    text = page_of(tmp_path, task_details=details)
    assert "The model is too sure of itself" in text
    assert 'class="chart reliability"' in text
    assert "the rarer label, is said where its probability is at least the threshold" in text
    assert f"{found['best']['f1']:.2f} on the other" in text
    assert "<script" not in text


def test_a_temperature_that_brings_nothing_says_so(tmp_path):
    found = calibration(*drawn(400, 3, 1.0))
    found["scaled"]["error"] = found["plain"]["error"] + 0.01
    assert "that brings nothing here" in page_of(tmp_path, task_details={"calibration": found})


def test_a_page_without_pictures_has_none_of_it(tmp_path):
    text, _ = render(tmp_path, full_report(), steps(20))
    assert "<img" not in text
    assert "<audio" not in text
    assert "How sure it is" not in text
