"""`thimble inspect` on tiny bases and adapters made for the purpose."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import thimble as package
from families import make_hf_folder
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors, Layout, delta
from thimble.errors import InputError
from thimble.files.peft import save_adapter
from thimble.files.tensors import open_tensors, write_safetensors
from thimble.models.base import open_base
from thimble.report.inspect_text import render_inspect

Q = "model.layers.0.self_attn.q_proj"


def make_adapter(base, folder, seed=0, rank=2, **changed):
    """A random adapter of all layers; `changed` maps a kind to a function of its factors, or None to leave it out."""
    random = np.random.default_rng(seed)
    layers = {}
    for path, (fan_out, fan_in) in open_base(base).spec.linear_shapes().items():
        a = random.standard_normal((rank, fan_in)).astype("f4")
        factors = Factors(a, random.standard_normal((fan_out, rank)).astype("f4"), 0.1)
        change = changed.get(path.rsplit(".", 1)[-1], lambda same: same)
        if change:
            layers[path] = change(factors)
    save_adapter(Adapter(layers), folder)
    return str(folder)


def test_columns_are_named_for_data_alone(tiny_base, tmp_path):
    with pytest.raises(InputError, match="--text-column: only with --data"):
        package.inspect(base=tiny_base, text_column="a")
    path = tmp_path / "mine.jsonl"
    path.write_text('{"Frage": "a", "Antwort": "b"}\n')
    with pytest.raises(InputError, match="--prompt-column names Frge, and no row has such a column"):
        package.inspect(base=tiny_base, data=str(path), prompt_column="Frge", completion_column="Antwort")


@pytest.fixture
def adapter(tiny_base, tmp_path):
    return make_adapter(tiny_base, tmp_path / "run" / "adapter")


@pytest.fixture
def refused(thimble):
    def run(*argv):
        code, out, text = thimble("inspect", *argv)
        assert (code, out) == (2, "")
        return text

    return run


def damaged_folder(tmp_path, **changes):
    """A base in a folder, some of whose weights are replaced: name to what multiplies them."""
    folder = make_hf_folder("llama", tmp_path / "damaged")
    [path] = folder.glob("*.safetensors")
    file = open_tensors(path)
    tensors = {name: file.read(name).copy() for name in file.tensors}
    for part, factor in changes.items():
        for name in tensors:
            if part in name:
                tensors[name] = tensors[name] * np.float32(factor)
    write_safetensors(path, tensors, {"format": "pt"})
    return str(folder)


# ---- a base --------------------------------------------------------------------------------------------------------


def test_the_spectrum_of_a_weight_is_that_of_an_svd(tiny_base):
    report = package.inspect(tiny_base)
    base = open_base(tiny_base)
    assert [row.layer for row in report.spectra] == list(base.spec.linear_shapes())
    row = next(row for row in report.spectra if row.layer == Q)
    values = np.linalg.svd(base.weights[f"{Q}.weight"].read().astype(np.float64), compute_uv=False)
    energy = np.cumsum(values**2) / (values**2).sum()
    assert row.norm == pytest.approx(np.sqrt((values**2).sum()))
    assert row.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2)
    assert row.rank_90 == int(np.argmax(energy >= 0.9)) + 1
    assert row.top_16 == pytest.approx(energy[15])
    assert (row.kind, row.block, row.below_noise) == ("q_proj", 0, None)
    assert row.shape == [len(base.weights[f"{Q}.weight"].read()), base.spec.hidden_size]


def test_kinds_and_blocks_are_summed_up_as_means(tiny_base):
    report = package.inspect(tiny_base)
    ranks = [row.stable_rank for row in report.spectra if row.kind == "up_proj"]
    assert report.by_kind["up_proj"]["stable_rank"] == pytest.approx(np.mean(ranks))
    assert report.by_kind["up_proj"]["layers"] == len(ranks) == report.num_blocks
    assert set(report.by_block) == {str(block) for block in range(report.num_blocks)}
    assert report.overall["layers"] == len(report.spectra)


def test_a_folder_is_looked_into_as_a_file_is(tmp_path):
    folder = make_hf_folder("qwen2", tmp_path / "qwen2")
    assert package.inspect(folder).subject == "base"
    assert package.inspect(base=str(folder)).base == "qwen2"


def test_a_quantised_base_is_measured_against_its_own_rounding(tiny_base):
    quantised = tiny_base.replace("smollm2", "llama_q8_0")
    report = package.inspect(quantised)
    assert all(0 <= row.below_noise < 0.1 for row in report.spectra), "eight bits are enough for nearly everything"
    assert "Q8_0" in report.dtypes


def test_only_the_blocks_asked_for_are_decomposed(tiny_base, adapter):
    report = package.inspect(tiny_base, blocks="1")
    assert {row.block for row in report.spectra} == set(report.blocks) == {1}
    update = package.inspect(adapter, base=tiny_base, blocks=(1,)).updates
    assert {row.block for row in update} == {0, 1}
    assert all((row.written_top is None) == (row.block == 0) for row in update)


def test_of_a_large_base_an_even_spread_is_decomposed_and_said(tiny_base, monkeypatch):
    tall = tiny_base.replace("smollm2", "smollm3")  # five blocks
    monkeypatch.setattr("thimble.models.survey.MOST_OPERATIONS", 1.0)
    report = package.inspect(tall)
    assert report.blocks == [0, 2, 4]
    assert "blocks 0, 2, 4 of 5 are decomposed" in report.messages["decision"][0]


def test_a_weight_of_zeros_is_left_out_by_name(tmp_path):
    base = damaged_folder(tmp_path, **{"layers.0.self_attn.v_proj": 0.0, "layers.1.mlp.up_proj": np.nan})
    report = package.inspect(base)
    assert report.skipped == [
        "model.layers.0.self_attn.v_proj: its weight is all zeros",
        "model.layers.1.mlp.up_proj: its weight holds NaN or Inf",
    ]
    assert len(report.spectra) == len(open_base(base).spec.linear_shapes()) - 2
    adapted = package.inspect(make_adapter(base, tmp_path / "adapter"), base=base)
    assert [row.layer for row in adapted.updates if row.relative_norm is None] == [
        what.partition(":")[0] for what in report.skipped
    ]


def test_a_base_of_nothing_but_damage_is_refused(tmp_path, refused):
    text = refused(damaged_folder(tmp_path, _proj=np.nan), "--out", tmp_path / "figures")
    assert text.count("its weight holds NaN or Inf") >= 14
    assert not (tmp_path / "figures").exists()


def test_looking_stops_when_asked(tiny_base):
    asked = []
    report = package.inspect(tiny_base, should_stop=lambda: len(asked) == 3 or asked.append(1))
    assert len(report.spectra) == 3
    assert "stopped early: 3 of" in report.messages["warning"][0]


# ---- an adapter -----------------------------------------------------------------------------------------------------


def test_an_update_is_measured_as_its_dense_matrix_would_be(tiny_base, adapter):
    report = package.inspect(adapter, base=tiny_base)
    factors = package.load_adapter(adapter).layers[Q]
    row = next(row for row in report.updates if row.layer == Q)
    weight = open_base(tiny_base).weights[f"{Q}.weight"].read().astype(np.float64)
    left, values, right = np.linalg.svd(delta(factors).astype(np.float64))
    assert row.norm == pytest.approx(np.linalg.norm(values), rel=1e-5)
    assert row.relative_norm == pytest.approx(np.linalg.norm(values) / np.linalg.norm(weight), rel=1e-5)
    np.testing.assert_allclose(row.values, values[:2], rtol=1e-5)
    u, _, v = np.linalg.svd(weight, full_matrices=False)
    k = row.rank_90
    assert row.written_top == pytest.approx(np.square(u[:, :2].T @ left[:, :k]).sum() / k, rel=1e-4)
    assert row.read_bottom == pytest.approx(np.square(v[-2:] @ right[:k].T).sum() / k, rel=1e-4)
    assert (row.written_chance, row.read_chance) == (2 / len(weight), 2 / weight.shape[1])


def test_an_update_along_the_top_of_w_is_seen_there(tiny_base, tmp_path):
    base = open_base(tiny_base)
    layers = {}
    for at, path in enumerate(base.spec.linear_shapes()):
        u, values, v = np.linalg.svd(base.weights[f"{path}.weight"].read(), full_matrices=False)
        part = slice(0, 2) if at % 2 == 0 else slice(-2, None)
        layers[path] = Factors(v[part], u[:, part] * values[part], 0.1)
    save_adapter(Adapter(layers), tmp_path / "along")
    rows = package.inspect(tmp_path / "along", base=tiny_base).updates
    assert [row.written_top for row in rows[::2]] == pytest.approx([1.0] * len(rows[::2]), abs=1e-4)
    assert [row.read_bottom for row in rows[1::2]] == pytest.approx([1.0] * len(rows[1::2]), abs=1e-3)
    assert {row.intruders for row in rows[::2]} == {0}, "what grows along its own directions brings no new ones"


def test_a_strong_update_in_new_directions_is_an_intruder(tiny_base, tmp_path):
    strong = {"down_proj": lambda f: Factors(f.A, f.B, 100.0), "up_proj": lambda f: Factors(f.A, f.B, 1e-6)}
    rows = package.inspect(make_adapter(tiny_base, tmp_path / "strong", **strong), base=tiny_base).by_kind
    assert rows["up_proj"]["intruders"] == 0
    assert rows["down_proj"]["intruders"] >= 1


def test_layers_that_did_not_move_are_named(tiny_base, tmp_path, thimble):
    still = {"v_proj": lambda f: Factors(f.A, 0 * f.B, f.scale)}
    path = make_adapter(tiny_base, tmp_path / "still", **still)
    report = package.inspect(path, base=tiny_base)
    assert {layer.rsplit(".", 1)[1] for layer in report.unmoved} == {"v_proj"}
    assert not set(report.unmoved) & set(report.moved)
    row = next(row for row in report.updates if row.kind == "v_proj")
    assert (row.norm, row.stable_rank, row.rank_90, row.written_top, row.intruders) == (0, 0, 0, None, None)
    relative = {row.layer: row.relative_norm for row in report.updates}
    assert [relative[layer] for layer in report.moved] == sorted(map(relative.get, report.moved), reverse=True)
    assert "not moved   0.self_attn.v_proj" in thimble("inspect", path, "--base", tiny_base)[1]


def test_an_adapter_that_did_nothing_at_all_is_shown_as_that(tiny_base, tmp_path, thimble):
    nothing = dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        lambda f: Factors(f.A, 0 * f.B, f.scale),
    )
    path = make_adapter(tiny_base, tmp_path / "nothing", **nothing)
    code, out, _ = thimble("inspect", path, "--base", tiny_base, "--out", "figures")
    assert code == 0
    assert "moved most" not in out
    assert not (tmp_path / "figures").exists()


def test_a_run_folder_stands_for_its_adapter(tiny_base, adapter, tmp_path):
    assert package.inspect(tmp_path / "run", base=tiny_base).overall == package.inspect(adapter, base=tiny_base).overall


# ---- two adapters ---------------------------------------------------------------------------------------------------


def test_an_adapter_has_all_in_common_with_its_double(tiny_base, adapter, tmp_path):
    doubled = make_adapter(tiny_base, tmp_path / "doubled", q_proj=lambda f: Factors(f.A, -2 * f.B, f.scale))
    report = package.inspect(adapter, doubled)
    assert report.overall["read"] == pytest.approx(1)
    assert report.overall["written"] == pytest.approx(1)
    assert report.by_kind["k_proj"]["cosine"] == pytest.approx(1)
    assert report.by_kind["q_proj"]["cosine"] == pytest.approx(-1)


def test_the_cosine_is_that_of_the_dense_updates(tiny_base, adapter, tmp_path):
    other = make_adapter(tiny_base, tmp_path / "other", seed=1, rank=3)
    report = package.inspect(adapter, other)
    pair = [package.load_adapter(path).layers for path in (adapter, other)]
    flat = [np.concatenate([delta(layers[path]).ravel() for path in layers]).astype(np.float64) for layers in pair]
    expected = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert report.overall["cosine"] == pytest.approx(expected, abs=1e-6)
    row = next(row for row in report.overlaps if row.layer == Q)
    assert row.read_chance == 3 / pair[0][Q].A.shape[1]
    assert row.ranks == [2, 3]


def test_layers_that_only_one_adapter_has_are_named(tiny_base, adapter, tmp_path, thimble):
    fewer = make_adapter(tiny_base, tmp_path / "fewer", q_proj=None)
    report = package.inspect(adapter, fewer)
    assert {layer.rsplit(".", 1)[1] for layer in report.only_in[adapter]} == {"q_proj"}
    assert report.only_in[fewer] == []
    assert {row.kind for row in report.overlaps} == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert "only in 1   0.self_attn.q_proj" in thimble("inspect", adapter, fewer)[1]


def test_an_adapter_that_did_nothing_has_no_overlap(tiny_base, adapter, tmp_path):
    still = make_adapter(tiny_base, tmp_path / "still", q_proj=lambda f: Factors(f.A, 0 * f.B, f.scale))
    report = package.inspect(adapter, still)
    row = next(row for row in report.overlaps if row.layer == Q)
    assert (row.written, row.cosine, row.norms[1]) == (None, None, 0)
    assert row.read == pytest.approx(1)
    assert {layer.rsplit(".", 1)[1] for layer in report.unmoved} == {"q_proj"}


def test_two_adapters_are_compared_without_a_base(adapter, tiny_base, tmp_path, monkeypatch):
    other = make_adapter(tiny_base, tmp_path / "other", seed=1)
    monkeypatch.setattr("thimble.models.base.DEFAULT_PACKAGE", "no_such_package")
    assert package.inspect(adapter, other).base == ""


# ---- inits --------------------------------------------------------------------------------------------------------


def test_inits_are_measured_on_data_overall_and_by_kind(thimble, examples, tiny_base):
    code, out, _ = thimble("inspect", "--data", examples, "--base", tiny_base, "--json")
    report = json.loads(out)
    assert (code, report["subject"], report["names"], report["base"]) == (0, "inits", [str(examples)], "smollm2.gguf")
    rows = [row for row in report["inits"] if row["kind"] == "up_proj"]
    for init in ("kaiming", "eva", "gradient"):
        whole = sum(row["energy"] * row[init] for row in rows) / sum(row["energy"] for row in rows)
        assert report["by_kind"]["up_proj"][init] == pytest.approx(whole)
        assert 0 < report["overall"][init] <= 1
    assert report["overall"]["kaiming"] < report["overall"]["gradient"]
    assert "does not predict which init trains better" in report["remark"]


def test_shares_of_inits_are_shown_in_a_table_that_claims_no_more_than_it_says(thimble, examples, tiny_base):
    code, out, _ = thimble("inspect", "--data", examples, "--base", tiny_base)
    assert code == 0
    lines = out.splitlines()
    assert lines[2].split()[-3:] == ["kaiming", "eva", "gradient"]
    assert [line.split()[0] for line in lines[3:11]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all",
    ]  # fmt: skip
    assert "does not predict which init trains better" in lines[-1]


def test_data_beside_an_adapter_are_refused(refused, examples, adapter, tiny_base):
    assert "name the base with --base" in refused(adapter, "--data", examples, "--base", tiny_base)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2])
def test_each_use_prints_a_table_of_all_kinds(thimble, tiny_base, adapter, tmp_path, count):
    other = make_adapter(tiny_base, tmp_path / "other", seed=1)
    code, out, _ = thimble("inspect", *[adapter, other][:count], "--base", tiny_base)
    assert code == 0
    lines = out.replace(str(tmp_path), "").splitlines()
    first = [line.split()[0] for line in lines if line.startswith("  ") and line.split()[0].endswith("_proj")]
    assert first == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(lines) < 30
    assert max(map(len, lines)) <= 120


def test_a_base_is_said_to_tell_nothing_about_the_rank(thimble, tiny_base):
    assert "says nothing about the rank an adapter needs" in thimble("inspect", tiny_base)[1]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_json_is_the_whole_report(thimble, tiny_base, adapter, tmp_path, count):
    other = make_adapter(tiny_base, tmp_path / "other", seed=1)
    code, out, _ = thimble("inspect", *[adapter, other][:count], "--base", tiny_base, "--json")
    report = json.loads(out)
    assert code == 0
    rows = report[("spectra", "updates", "overlaps")[count]]
    assert len(rows) == len(open_base(tiny_base).spec.linear_shapes())
    assert {"layer", "kind", "block"} <= set(rows[0])


@pytest.mark.parametrize(
    ("count", "names"), [(0, ("energy",)), (1, ("moved", "decay", "alignment")), (2, ("overlap",))], ids=str
)
def test_figures_are_drawn_in_both_forms(thimble, tiny_base, adapter, tmp_path, count, names):
    other = make_adapter(tiny_base, tmp_path / "other", seed=1)
    argv = [*[adapter, other][:count], "--base", tiny_base, "--out", "figures"]
    assert thimble("inspect", *argv)[0] == 0
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(
        f"{name}.{form}" for name in names for form in ("png", "svg")
    )
    assert (tmp_path / "figures" / f"{names[0]}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "figures" / f"{names[0]}.svg").read_text()
    code, _, text = thimble("inspect", *argv)
    assert code == 2
    assert f"--out is figures, which holds {names[0]}.png" in text


def test_adapters_of_the_head_alone_are_compared_but_not_drawn(thimble, tmp_path):
    random = np.random.default_rng(0)
    for name in ("one", "two"):
        a, b = random.standard_normal((2, 8)).astype("f4"), random.standard_normal((9, 2)).astype("f4")
        save_adapter(Adapter({"lm_head": Factors(a, b, 1.0)}), tmp_path / name)
    code, out, text = thimble("inspect", "one", "two", "--out", "figures")
    assert code == 0
    assert "lm_head" in out
    assert "no figure was drawn" in text
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_what_is_stopped_before_the_first_layer_is_still_shown(tiny_base, adapter, tmp_path, count):
    other = make_adapter(tiny_base, tmp_path / "other", seed=1)
    named = [adapter, other][:count]
    report = package.inspect(*named, base=tiny_base, out=str(tmp_path / "figures"), should_stop=lambda: True)
    assert "mean" in render_inspect(report)
    assert report.figures == []


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_an_adapter_of_pictures_is_looked_into_without_its_base(thimble, refused, tmp_path):
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 27)).astype("f4"), random.standard_normal((9, 2)).astype("f4")
    head = {"fc.weight": np.ones((2, 9), "f4"), "fc.bias": np.ones(2, "f4")}
    notes = {"task": "classify-image", "labels": '["cat", "dog"]'}
    factors = Factors(a, b, 1.0, layout=Layout((3, 3)))
    save_adapter(Adapter({"stem.conv": factors}, notes=notes, replaced=head), tmp_path / "pictures")
    code, out, text = thimble("inspect", "pictures")
    assert code == 0
    assert "pictures: 1 layer of rank 2\n" in out
    assert f"{np.linalg.norm(b @ a):.3g}" in out
    assert "intruders" not in out
    assert "pictures: for classify-image, labels cat, dog; trained whole: fc.bias, fc.weight" in text
    assert "leave out --base" in refused("pictures", "--base", "net.py:build")


def test_a_path_that_is_nothing_is_refused_with_what_was_expected(refused, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("hello")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapters.safetensors").write_bytes(b"")
    for name, state in (
        ("missing.gguf", "does not exist"),
        ("theirs", "it is an adapter of mlx-lm"),
        ("notes", "it holds a.txt"),
        ("notes/a.txt", "another file"),
    ):
        text = refused(name)
        assert f"{name} is neither a base nor an adapter: " in text
        assert state in text
        assert "expected a GGUF file" in text


def test_an_adapter_of_another_base_is_refused(refused, tmp_path, tiny_base):
    other = make_adapter(tiny_base.replace("smollm2", "gemma2"), tmp_path / "other")
    assert "does not belong to smollm2.gguf" in refused(other, "--base", tiny_base)


def test_an_adapter_that_does_not_fit_the_default_base_asks_for_its_own(refused, adapter, tiny_base, monkeypatch):
    monkeypatch.setattr("thimble.models.base.default_base", lambda: Path(tiny_base.replace("smollm2", "gemma2")))
    assert "name the one that the adapter was trained on with --base" in refused(adapter)


def test_two_bases_are_refused(refused, tiny_base):
    assert "two bases are given" in refused(tiny_base, tiny_base)
    assert "two bases are given" in refused(tiny_base, "--base", tiny_base)


def test_a_base_beside_an_adapter_is_refused_with_the_flag_for_it(refused, tiny_base, adapter):
    assert "name the base with --base" in refused(tiny_base, adapter)


def test_adapters_that_cannot_be_compared_are_refused(refused, tiny_base, adapter, tmp_path):
    other = make_adapter(tiny_base.replace("smollm2", "gemma2"), tmp_path / "other")
    assert "the adapters do not belong to the same base: model.layers.0" in refused(adapter, other)
    assert "is named twice" in refused(adapter, adapter)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    first = make_adapter(tiny_base, tmp_path / "first", **dict.fromkeys(kinds[1:]))
    second = make_adapter(tiny_base, tmp_path / "second", **dict.fromkeys(kinds[:1]))
    assert "have no layer in common" in refused(first, second)


def test_a_block_that_is_not_there_is_refused(refused, tiny_base, adapter):
    text = refused(tiny_base, "--blocks", "0,2,x")
    assert "--blocks 2, x: expected some of 0, 1" in text
    assert "leave it out" in refused(adapter, adapter, "--blocks", "0")


def test_all_faults_are_told_at_once_and_nothing_is_written(refused, tiny_base, adapter, tmp_path):
    (tmp_path / "file").write_text("")
    text = refused(adapter, "nowhere", "--out", "file", "--seed", "-1")
    assert all(part in text for part in ("nowhere is neither", "out is file", "--seed -1"))
    assert (tmp_path / "file").read_text() == ""


def test_an_adapter_with_numbers_that_are_not_finite_is_refused(refused, tiny_base, adapter, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    file = open_tensors(broken / "adapter_model.safetensors")
    tensors = {name: file.read(name) * np.float32(np.inf if Q in name else 1) for name in file.tensors}
    write_safetensors(broken / "adapter_model.safetensors", tensors, {"format": "pt"})
    assert f"{Q} holds numbers that are NaN or Inf" in refused(broken, "--base", tiny_base)


def test_the_function_raises_what_the_command_tells(tmp_path):
    with pytest.raises(InputError, match="is neither a base nor an adapter"):
        package.inspect(tmp_path / "nowhere")
