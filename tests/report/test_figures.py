"""Figures of what inspect found, drawn from plain data."""

import dataclasses

import matplotlib
import pytest

import thimble
from thimble.core.adapter import Adapter
from thimble.core.inits import LayerData, kaiming, orthogonal
from thimble.files.peft import save_adapter
from thimble.models.base import open_base
from thimble.report import figures


@pytest.fixture
def report(tiny_base):
    return dataclasses.asdict(thimble.inspect(tiny_base))


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_report_gives_the_same_bytes_whatever_the_users_own_style(report, tmp_path):
    figures.write_figures(tmp_path / "one", report)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        written = figures.write_figures(tmp_path / "two", report)
    assert read(tmp_path / "one") == read(tmp_path / "two")
    assert sorted(written) == sorted(str(tmp_path / "two" / name) for name in figures.figure_files("base"))


def test_axes_are_labelled_and_every_kind_is_named(report, tmp_path):
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure = matplotlib.figure.Figure(layout="constrained")
        figures._draw_energy(figure, report)
    [axes] = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("directions kept, % of the full rank", "energy of W, %")
    kinds = [text.get_text().split(",")[0] for text in axes.get_legend().get_texts()]
    assert sorted(kinds) == sorted(report["by_kind"])


def test_nothing_is_written_if_one_figure_cannot_be_drawn(tiny_base, tmp_path, monkeypatch):
    shapes = open_base(tiny_base).spec.linear_shapes()
    layers = {path: orthogonal(LayerData(path, shape, 2, 1.0)) for path, shape in shapes.items()}
    layers = {path: dataclasses.replace(factors, B=factors.B + 1) for path, factors in layers.items()}
    save_adapter(Adapter(layers), tmp_path / "adapter")
    report = dataclasses.asdict(thimble.inspect(tmp_path / "adapter", base=tiny_base))
    monkeypatch.setitem(figures._DRAWN, "alignment", lambda figure, report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        figures.write_figures(tmp_path / "figures", report)
    assert not (tmp_path / "figures").exists()


def test_an_adapter_of_one_layer_is_drawn(tiny_base, tmp_path):
    path, shape = next(iter(open_base(tiny_base).spec.linear_shapes().items()))
    factors = kaiming(LayerData(path, shape, 1, 1.0))
    save_adapter(Adapter({path: dataclasses.replace(factors, B=factors.B + 1)}), tmp_path / "adapter")
    report = thimble.inspect(tmp_path / "adapter", base=tiny_base, out=str(tmp_path / "figures"))
    assert len(report.figures) == 6


def test_nothing_is_drawn_of_inits(tmp_path):
    assert figures.write_figures(tmp_path / "figures", {"subject": "inits"}) == []
    assert not (tmp_path / "figures").exists()
