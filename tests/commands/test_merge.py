"""Merging: the same function in fewer numbers, or in the base; refused whole, written whole."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

import thimble
from families import make_hf_folder, sample_tokens
from thimble.cli import main
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors, delta
from thimble.errors import InputError, RunError
from thimble.exports.gguf_adapter import write_gguf_adapter
from thimble.files.peft import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from thimble.files.tensors import open_tensors, rewrite_safetensors
from thimble.models import merged
from thimble.models.adapter_base import base_notes
from thimble.models.base import open_base

LAYERS = {"model.layers.0.self_attn.q_proj": (12, 10), "model.layers.0.mlp.up_proj": (9, 10)}


def make_factors(shape, rank=4, scale=0.5, seed=0, magnitude=False, size=1.0):
    random = np.random.default_rng(seed)
    fan_out, fan_in = shape
    a, b = random.standard_normal((rank, fan_in)) * size, random.standard_normal((fan_out, rank))
    lengths = (random.random(fan_out) + 0.5).astype("f4") if magnitude else None
    return Factors(a.astype("f4"), b.astype("f4"), scale, lengths)


def write_adapter(folder, shapes=LAYERS, name="some/base", **how) -> str:
    layers = {path: make_factors(shape, **{"seed": i, **how}) for i, (path, shape) in enumerate(shapes.items())}
    save_adapter(Adapter(layers, name), folder)
    return str(folder)


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- a smaller adapter ----------------------------------------------------------------------------------------------


def test_a_delta_form_of_less_rank_than_it_is_stored_with_loses_nothing(tmp_path):
    """Rank 2r on disk, r in truth: B0 A0 lies in the span of B A."""
    layers = {}
    for path, shape in LAYERS.items():
        half = make_factors(shape, rank=3)
        layers[path] = Factors(np.concatenate([half.A, half.A]), np.concatenate([half.B, -0.5 * half.B], 1), 2.0)
    save_adapter(Adapter(layers), tmp_path / "long")
    report = thimble.merge(tmp_path / "long", truncate=1, out=str(tmp_path / "short"))
    short = load_adapter(tmp_path / "short")
    for path, factors in layers.items():
        assert short.layers[path].rank == 3
        np.testing.assert_allclose(delta(short.layers[path]), delta(factors), atol=1e-5)
    assert report.kinds[-1].error < 1e-6
    assert (report.kinds[-1].rank_before, report.kinds[-1].rank_after) == ([6, 6], [3, 3])
    assert report.kinds[-1].parameters_after * 2 == report.kinds[-1].parameters_before


def test_an_update_that_saves_no_rank_is_left_as_it_is(tmp_path):
    write_adapter(tmp_path / "one")
    thimble.merge(tmp_path / "one", truncate=1, out=str(tmp_path / "two"))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_truncation_keeps_the_share_asked_for_with_the_least_rank_and_tells_what_it_lost(tmp_path):
    write_adapter(tmp_path / "one", rank=8)
    report = thimble.merge(tmp_path / "one", truncate=0.8, out=str(tmp_path / "small"))
    before, after = load_adapter(tmp_path / "one"), load_adapter(tmp_path / "small")
    for layer in report.layers:
        whole, kept = delta(before.layers[layer.name]), delta(after.layers[layer.name])
        values = np.linalg.svd(whole, compute_uv=False) ** 2
        least = int(np.argmax(np.cumsum(values) / values.sum() >= 0.8)) + 1
        assert layer.rank_after == after.layers[layer.name].rank == least < 8
        assert layer.norm == pytest.approx(np.linalg.norm(whole), rel=1e-5)
        assert layer.error == pytest.approx(np.linalg.norm(whole - kept) / np.linalg.norm(whole), abs=1e-5)
        assert layer.error <= 0.2**0.5


def test_a_cap_on_the_rank_holds_whatever_it_costs(tmp_path):
    write_adapter(tmp_path / "one", rank=8)
    report = thimble.merge(tmp_path / "one", rank=2, out=str(tmp_path / "small"))
    assert {factors.rank for factors in load_adapter(tmp_path / "small").layers.values()} == {2}
    worst = max(report.layers, key=lambda layer: layer.error)
    whole = report.kinds[-1]
    assert (whole.worst_layer, whole.worst_error) == (worst.name, worst.error)
    lost = sum((layer.norm * layer.error) ** 2 for layer in report.layers)
    assert whole.error == pytest.approx((lost / sum(layer.norm**2 for layer in report.layers)) ** 0.5)
    assert 0 < whole.error < whole.worst_error < 1


def test_several_adapters_become_their_sum(tmp_path):
    """Of different rank, scale and layers."""
    write_adapter(tmp_path / "one", rank=2, scale=0.5)
    write_adapter(tmp_path / "two", dict(list(LAYERS.items())[:1]), rank=3, scale=3.0, seed=7)
    thimble.merge(tmp_path / "one", tmp_path / "two", truncate=1, out=str(tmp_path / "sum"))
    one, two, both = (load_adapter(tmp_path / name) for name in ("one", "two", "sum"))
    for path in LAYERS:
        other = delta(two.layers[path]) if path in two.layers else 0.0
        np.testing.assert_allclose(delta(both.layers[path]), delta(one.layers[path]) + other, atol=1e-5)
    assert [both.layers[path].rank for path in LAYERS] == [5, 2]


def test_bytes_are_those_of_the_files(tmp_path):
    write_adapter(tmp_path / "one", rank=4)
    report = thimble.merge(tmp_path / "one", rank=1, out=str(tmp_path / "small"))
    for folder, name in (("one", "bytes_before"), ("small", "bytes_after")):
        tensors = open_tensors(tmp_path / folder / WEIGHTS_FILE).tensors.values()
        assert getattr(report.kinds[-1], name) == sum(info.nbytes for info in tensors)


def test_truncating_dora_keeps_its_magnitude(tmp_path):
    write_adapter(tmp_path / "dora", magnitude=True)
    thimble.merge(tmp_path / "dora", rank=1, out=str(tmp_path / "small"))
    before, after = load_adapter(tmp_path / "dora"), load_adapter(tmp_path / "small")
    for path in LAYERS:
        assert after.layers[path].rank == 1
        np.testing.assert_array_equal(after.layers[path].magnitude, before.layers[path].magnitude)


def test_peft_reads_a_truncated_adapter_with_ranks_that_differ(tmp_path):
    base = make_hf_folder("llama", tmp_path / "base")
    shapes = open_base(base).spec.linear_shapes()
    write_adapter(tmp_path / "one", shapes, rank=8, scale=0.05)
    report = thimble.merge(tmp_path / "one", truncate=0.7, base=str(base), out=str(tmp_path / "small"))
    assert len({layer.rank_after for layer in report.layers}) > 1
    path = "model.layers.1.mlp.down_proj"
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "small"
    ).get_submodule(f"base_model.model.{path}")
    found = model.get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(found, delta(load_adapter(tmp_path / "small").layers[path]), atol=1e-6)


# ---- a merged base --------------------------------------------------------------------------------------------------


def shard_folder(family: str, folder: Path, dtype=torch.float32) -> Path:
    """A base in several shards, with other files beside it."""
    make_hf_folder(family, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(sample_tokens()).logits


def load_hf(folder: Path, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **how).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_a_merged_folder_answers_as_peft_does_with_the_adapter(tmp_path, family, magnitude):
    base = make_hf_folder(family, tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", open_base(base).spec.linear_shapes(), scale=0.05, magnitude=magnitude)
    report = thimble.merge(adapter, base=str(base), out=str(tmp_path / "merged"))
    wanted = logits_of(peft.PeftModel.from_pretrained(load_hf(base), adapter).eval())
    found = logits_of(load_hf(tmp_path / "merged"))
    assert (found - wanted).abs().max() < 1e-4
    assert (found - logits_of(load_hf(base))).abs().max() > 1e-2
    assert report.rounding["F32"] < 1e-5


def test_two_adapters_are_merged_into_shards_as_peft_adds_them(tmp_path):
    base = shard_folder("llama", tmp_path / "base")
    shapes = open_base(base).spec.linear_shapes()
    paths = [write_adapter(tmp_path / f"{i}", shapes, scale=0.03 * (i + 1), seed=10 * i, rank=i + 2) for i in (0, 1)]
    thimble.merge(*paths, base=str(base), out=str(tmp_path / "merged"))
    model = peft.PeftModel.from_pretrained(load_hf(base), paths[0], adapter_name="0").eval()
    model.load_adapter(paths[1], "1")
    model.base_model.set_adapter(["0", "1"])
    assert (logits_of(load_hf(tmp_path / "merged")) - logits_of(model)).abs().max() < 1e-4


def test_a_merged_folder_has_the_other_files_and_no_other_copy_of_the_weights(tmp_path):
    base = shard_folder("llama", tmp_path / "base")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", ".gitattributes"):
        (base / name).write_text("old")
    (base / "extra").mkdir()
    (base / "extra" / "template.jinja").write_text("{{ messages }}")
    adapter = write_adapter(tmp_path / "a", open_base(base).spec.linear_shapes())
    thimble.merge(adapter, base=str(base), out=str(tmp_path / "merged"))
    left_out = {"pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", ".gitattributes"}
    assert names_in(tmp_path / "merged") == names_in(base) - left_out
    for name in ("config.json", "tokenizer.json", "extra/template.jinja", "model.safetensors.index.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()


def test_an_adapter_beside_the_base_is_not_taken_along_where_transformers_would_load_it(tmp_path):
    base = make_hf_folder("llama", tmp_path / "base")
    write_adapter(base, open_base(base).spec.linear_shapes())
    thimble.merge(base, base=str(base), out=str(tmp_path / "merged"))
    assert CONFIG_FILE not in names_in(tmp_path / "merged")
    assert load_hf(tmp_path / "merged")


def test_a_merged_folder_takes_no_programs_and_nothing_from_outside_of_the_base(tmp_path):
    base = shard_folder("llama", tmp_path / "base")
    (base / "modeling_llama.py").write_text("import os")
    (tmp_path / "secret.txt").write_text("mine")
    (base / "notes.txt").symlink_to(tmp_path / "secret.txt")
    adapter = write_adapter(tmp_path / "a", open_base(base).spec.linear_shapes())
    thimble.merge(adapter, base=str(base), out=str(tmp_path / "merged"))
    assert not {"modeling_llama.py", "notes.txt"} & names_in(tmp_path / "merged")


def test_a_base_whose_files_are_links_to_elsewhere_is_merged_with_all_that_describes_it(tmp_path):
    base = shard_folder("llama", tmp_path / "store")
    farm = tmp_path / "farm"
    farm.mkdir()
    for path in base.iterdir():
        (farm / path.name).symlink_to(path)
    adapter = write_adapter(tmp_path / "a", open_base(base).spec.linear_shapes())
    thimble.merge(adapter, base=str(farm), out=str(tmp_path / "merged"))
    assert names_in(tmp_path / "merged") == names_in(base)


def test_a_weight_without_an_adapter_stays_as_it_is_byte_for_byte(tmp_path):
    base = make_hf_folder("llama", tmp_path / "base")
    one = "model.layers.1.mlp.up_proj"
    adapter = write_adapter(tmp_path / "a", {one: open_base(base).spec.linear_shapes()[one]})
    thimble.merge(adapter, base=str(base), out=str(tmp_path / "merged"))
    before, after = (open_tensors(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert before.tensors == after.tensors
    same = {name for name in before.tensors if np.array_equal(before.raw(name), after.raw(name))}
    assert set(before.tensors) - same == {f"{one}.weight"}


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_a_sum_is_rounded_once_to_the_type_of_the_file_and_the_loss_is_told(tmp_path, dtype, name):
    base = shard_folder("llama", tmp_path / "base", dtype)
    shapes = open_base(base).spec.linear_shapes()
    adapter = write_adapter(tmp_path / "a", shapes, scale=0.05)
    report = thimble.merge(adapter, base=str(base), out=str(tmp_path / "merged"))
    layer = report.layers[0]
    weight = load_hf(base, dtype=torch.float32).get_parameter(f"{layer.name}.weight").detach()
    update = torch.from_numpy(delta(load_adapter(adapter).layers[layer.name]))
    wanted = (weight + update).to(dtype)
    found = load_hf(tmp_path / "merged", dtype=dtype).get_parameter(f"{layer.name}.weight").detach()
    assert torch.equal(found, wanted)
    lost = (wanted.double() - weight.double() - update.double()).norm() / update.double().norm()
    assert layer.error == pytest.approx(float(lost), rel=1e-3)
    assert report.rounding == {name: max(layer.error for layer in report.layers)}
    assert not report.messages["warning"]


def test_an_update_that_vanishes_in_bfloat16_is_warned_about(tmp_path):
    base = shard_folder("llama", tmp_path / "base", torch.bfloat16)
    adapter = write_adapter(tmp_path / "a", open_base(base).spec.linear_shapes(), scale=1e-4)
    report = thimble.merge(adapter, base=str(base), out=str(tmp_path / "merged"))
    assert report.rounding["BF16"] > 0.5
    (warning,) = report.messages["warning"]
    assert "rounding to BF16 changed the updates of 14 layers by more than 10%" in warning
    assert report.kinds[-1].worst_layer in warning


def test_rows_are_merged_in_windows_with_the_same_result(tmp_path, monkeypatch):
    base = make_hf_folder("llama", tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", open_base(base).spec.linear_shapes(), magnitude=True)
    monkeypatch.setattr(merged, "WINDOW_VALUES", 100)
    narrow = thimble.merge(adapter, base=str(base), out=str(tmp_path / "narrow"))
    monkeypatch.undo()
    wide = thimble.merge(adapter, base=str(base), out=str(tmp_path / "wide"))
    files = [open_tensors(tmp_path / name / "model.safetensors") for name in ("narrow", "wide")]
    for name in files[0].tensors:
        np.testing.assert_allclose(files[0].read(name), files[1].read(name), atol=1e-6)
    assert narrow.kinds[-1].error == pytest.approx(wide.kinds[-1].error, rel=0.1)


# ---- refused whole, written whole -----------------------------------------------------------------------------------


@pytest.fixture
def refuse(tmp_path):
    """A merge that must be refused and leave nothing: gives the message."""

    def run(*adapters, kind=InputError, **options):
        before = names_in(tmp_path)
        with pytest.raises(kind) as caught:
            thimble.merge(*adapters, **{"out": str(tmp_path / "out"), **options})
        assert names_in(tmp_path) == before
        return str(caught.value)

    return run


def test_everything_that_is_wrong_is_told_at_once(refuse, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    text = refuse("nowhere", out=str(tmp_path / "full"), truncate=1.5, rank=0, base="no/such/base/folder")
    assert "--truncate 1.5: expected a share above 0 and up to 1" in text
    assert "--rank 0: expected at least 1" in text
    assert "adapter nowhere does not exist" in text
    assert "base no/such/base/folder does not exist" in text
    assert "which exists and is not empty" in text


@pytest.mark.parametrize("share", [0, -1, 1.01, float("nan"), float("inf"), "most"])
def test_a_share_that_is_none_is_refused(refuse, tmp_path, share):
    assert f"--truncate {share}: expected" in refuse(write_adapter(tmp_path / "a"), truncate=share)


def test_what_is_missing_is_named(refuse, tmp_path):
    assert "no adapter is given" in refuse(truncate=0.9)
    assert "no out is given" in refuse(write_adapter(tmp_path / "a"), truncate=0.9, out="")
    assert "no base is given: name with --base" in refuse(str(tmp_path / "a"))


def test_a_gguf_base_is_refused_with_what_to_do_instead(refuse, tmp_path, tiny_base):
    adapter = write_adapter(tmp_path / "a", open_base(tiny_base).spec.linear_shapes())
    text = refuse(adapter, base=tiny_base)
    assert "is a GGUF file" in text
    assert "thimble chat --adapter" in text
    assert "a folder of float weights" in text
    assert f"thimble export {adapter} --merged --type Q8_0 --out merged.gguf" in text


def test_a_smaller_adapter_for_a_gguf_base_is_fine(tmp_path, tiny_base):
    adapter = write_adapter(tmp_path / "a", open_base(tiny_base).spec.linear_shapes())
    assert thimble.merge(adapter, base=tiny_base, rank=1, out=str(tmp_path / "out")).base == "smollm2.gguf"


def test_an_adapter_that_does_not_fit_the_base_is_refused(refuse, tmp_path):
    base = make_hf_folder("llama", tmp_path / "base")
    text = refuse(write_adapter(tmp_path / "a"), base=str(base))
    assert "does not belong to base" in text
    assert "it was made for some/base" in text


def test_adapters_that_do_not_fit_each_other_are_refused(refuse, tmp_path):
    other = {path: (fan_out, fan_in + 1) for path, (fan_out, fan_in) in LAYERS.items()}
    paths = write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b", other)
    text = refuse(*paths, truncate=1)
    assert "the adapters do not belong to the same base" in text
    assert "q_proj is (out, in) (12, 11)" in text


def test_a_sum_with_magnitudes_is_refused_with_the_reason(refuse, tmp_path):
    paths = write_adapter(tmp_path / "a", magnitude=True), write_adapter(tmp_path / "b")
    text = refuse(*paths, truncate=1)
    assert f"adapter {paths[0]} is DoRA" in text
    assert "lengths do not add up" in text


def test_an_adapter_given_twice_is_refused(refuse, tmp_path):
    path = write_adapter(tmp_path / "a")
    assert "is given more than once" in refuse(path, f"{path}/", truncate=1)


def test_adapters_of_different_bases_are_warned_about(tmp_path):
    paths = write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b", name="other/base")
    report = thimble.merge(*paths, truncate=1, out=str(tmp_path / "out"))
    assert "other/base, some/base" in report.messages["warning"][0]
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["base_model_name_or_path"] is None


def test_a_full_disk_is_refused_before_work(refuse, tmp_path, monkeypatch):
    path = write_adapter(tmp_path / "a")
    monkeypatch.setattr("thimble.training.run_folder.shutil.disk_usage", lambda path: type("U", (), {"free": 100}))
    assert "MB free" in refuse(path, truncate=1)


def test_a_weight_that_does_not_fit_its_type_leaves_nothing_behind(refuse, tmp_path):
    base = shard_folder("llama", tmp_path / "base", torch.float16)
    adapter = write_adapter(tmp_path / "a", open_base(base).spec.linear_shapes(), scale=1e4)
    assert "does not fit float16" in refuse(adapter, base=str(base), kind=RunError)


def test_a_base_that_is_not_finite_leaves_nothing_behind(refuse, tmp_path):
    base = make_hf_folder("llama", tmp_path / "base")
    model = load_hf(base)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = float("nan")
    model.save_pretrained(base)
    adapter = write_adapter(tmp_path / "a", open_base(base).spec.linear_shapes())
    assert "model.layers.1.mlp.up_proj of the base holds NaN or Inf" in refuse(adapter, base=str(base), kind=RunError)


def test_a_base_of_another_number_type_is_refused_before_work(refuse, tmp_path):
    base = make_hf_folder("llama", tmp_path / "base")
    load_hf(base, dtype=torch.float64).save_pretrained(base)
    adapter = write_adapter(tmp_path / "a", open_base(base).spec.linear_shapes())
    text = refuse(adapter, base=str(base))
    assert "model.layers.0.mlp.down_proj is F64" in text
    assert "expected F32, F16, BF16" in text


@pytest.mark.parametrize("to_base", [False, True])
def test_who_stops_a_merge_finds_nothing_written(tmp_path, to_base):
    base = make_hf_folder("llama", tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", open_base(base).spec.linear_shapes())
    before = names_in(tmp_path)
    how = {"base": str(base)} if to_base else {"truncate": 0.9}
    report = thimble.merge(adapter, out=str(tmp_path / "out"), should_stop=lambda: True, **how)
    assert report.status == "interrupted"
    assert names_in(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    thimble.merge(write_adapter(tmp_path / "a"), truncate=1, out=str(tmp_path / "out"))
    assert load_adapter(tmp_path / "out").layers


def test_the_folder_one_stands_in_is_filled(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    thimble.merge(write_adapter(tmp_path / "a"), truncate=1, out=".")
    assert load_adapter(tmp_path / "out").layers
    assert names_in(tmp_path / "out") == {CONFIG_FILE, WEIGHTS_FILE, "README.md"}


# ---- weights, and ways to combine -----------------------------------------------------------------------------------


def test_each_adapter_counts_with_its_weight(tmp_path):
    write_adapter(tmp_path / "one", rank=2)
    write_adapter(tmp_path / "two", rank=3, seed=7)
    report = thimble.merge(
        tmp_path / "one", tmp_path / "two", weight=[0.7, -0.4], truncate=1, out=str(tmp_path / "sum")
    )
    one, two, both = (load_adapter(tmp_path / name) for name in ("one", "two", "sum"))
    for path in LAYERS:
        wanted = 0.7 * delta(one.layers[path]) - 0.4 * delta(two.layers[path])
        np.testing.assert_allclose(delta(both.layers[path]), wanted, atol=1e-5)
    assert (report.weights, report.combination_type) == ([0.7, -0.4], "cat")


def test_adapters_merged_with_weights_answer_as_peft_combines_them(tmp_path):
    base = make_hf_folder("llama", tmp_path / "base")
    shapes = open_base(base).spec.linear_shapes()
    paths = [write_adapter(tmp_path / f"{i}", shapes, scale=0.05, seed=10 * i) for i in (0, 1)]
    model = peft.PeftModel.from_pretrained(load_hf(base), paths[0], adapter_name="0").eval()
    model.load_adapter(paths[1], "1")
    for kind, more in (("cat", {}), ("ties", {"density": 0.5, "majority_sign_method": "frequency"}), ("svd", {})):
        out = str(tmp_path / kind)
        thimble.merge(*paths, base=str(base), out=out, weight=[0.6, 0.9], combination_type=kind, **more)
        model.add_weighted_adapter(["0", "1"], [0.6, 0.9], kind, kind, **more)
        model.set_adapter(kind)
        assert (logits_of(load_hf(out)) - logits_of(model)).abs().max() < 1e-4


def test_the_command_line_takes_a_weight_for_each_adapter(tmp_path, capsys):
    paths = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two", seed=3)
    out = tmp_path / "out"
    words = ["merge", *paths, "--weight", "0.5", "--weight", "-0.25", "--truncate", "1", "--out", str(out), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == [0.5, -0.25]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": [1.0]}, "--weight is given 1 time for 2 adapters: give one for each"),
        ({"weight": [1.0, 0.0]}, "--weight 1.0,0.0: expected a number for each adapter, from -100 to 100 and not 0"),
        ({"weight": [1.0, float("nan")]}, "expected a number for each adapter"),
        ({"weight": ["much", 1]}, "--weight much,1: expected a number"),
        ({"combination_type": "tise"}, "did you mean ties?"),
        ({"combination_type": "ties"}, "say which, as in --density 0.5"),
        ({"combination_type": "dare_ties", "density": 0}, "--density 0: expected a share above 0"),
        ({"density": 0.5}, "--density is what ties, dare and magnitude_prune keep"),
        ({"combination_type": "svd", "majority_sign_method": "total"}, "--majority-sign-method is for ties"),
        ({"unmerge": True}, "--unmerge takes adapters off a base, and --truncate writes one"),
        ({"combination_type": "linear"}, "need one rank, and model.layers.0.mlp.up_proj has rank 4 in"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused(refuse, tmp_path, options, said):
    paths = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two", rank=2)
    assert said in refuse(*paths, truncate=1, **options)


def test_one_adapter_is_not_combined_and_dora_has_no_half(refuse, tmp_path):
    path = write_adapter(tmp_path / "dora", magnitude=True)
    assert "makes one adapter of several, and one is given" in refuse(path, combination_type="svd", truncate=1)
    assert "is DoRA, which sets the lengths" in refuse(path, weight=0.5, truncate=1)


def test_who_stops_while_adapters_are_combined_finds_nothing_written(tmp_path):
    paths = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two", seed=3)
    before, asked = names_in(tmp_path), []
    report = thimble.merge(
        *paths, rank=1, combination_type="ties_svd", density=0.5, out=str(tmp_path / "out"),
        should_stop=lambda: asked.append(1) or True,
    )  # fmt: skip
    assert (report.status, len(asked)) == ("interrupted", 1)
    assert names_in(tmp_path) == before


# ---- unmerging ------------------------------------------------------------------------------------------------------


def merged_folder(tmp_path, dtype=torch.bfloat16, named=True, **how):
    """A base, an adapter that knows it and the folder they were merged into."""
    base = shard_folder("llama", tmp_path / "base", dtype)
    opened = open_base(base)
    layers = {path: make_factors(shape, scale=0.02, **how) for path, shape in opened.spec.linear_shapes().items()}
    notes = base_notes(opened.quick_fingerprint()) if named else {}
    save_adapter(Adapter(layers, str(base) if named else "", notes), tmp_path / "adapter")
    thimble.merge(tmp_path / "adapter", base=str(base), out=str(tmp_path / "merged"))
    return base, str(tmp_path / "adapter"), str(tmp_path / "merged")


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_unmerging_gives_the_bytes_of_the_base_that_the_adapter_knows(tmp_path, magnitude):
    base, adapter, full = merged_folder(tmp_path, magnitude=magnitude)
    report = thimble.merge(adapter, base=full, unmerge=True, out=str(tmp_path / "again"))
    assert report.original == str(base)
    assert not report.messages["warning"]
    assert names_in(tmp_path / "again") == names_in(base)
    for path in base.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.2)])
def test_without_the_base_it_is_given_back_within_rounding_and_that_is_told(tmp_path, dtype, most):
    base, adapter, full = merged_folder(tmp_path, dtype, named=False)
    report = thimble.merge(adapter, base=full, unmerge=True, out=str(tmp_path / "again"))
    assert report.original == ""
    assert "the original base is not found: the updates are subtracted" in report.messages["warning"][0]
    before, after, update = open_base(base), open_base(tmp_path / "again"), load_adapter(adapter)
    told = {layer.name: layer.error for layer in report.layers}
    for path, factors in update.layers.items():
        away = after.weights[f"{path}.weight"].read() - before.weights[f"{path}.weight"].read()
        share = np.linalg.norm(away) / np.linalg.norm(delta(factors))
        assert share < most
        assert share < 3 * told[path], "merging rounded once, and unmerging once more"


def test_a_folder_that_is_not_that_base_with_that_adapter_is_told_as_such(tmp_path):
    base, adapter, full = merged_folder(tmp_path)
    thimble.merge(adapter, base=full, out=str(tmp_path / "twice"))
    report = thimble.merge(adapter, base=str(tmp_path / "twice"), unmerge=True, out=str(tmp_path / "again"))
    assert report.original == ""
    assert f"{base} with the adapters is not what it holds" in report.messages["warning"][0]


def test_several_adapters_come_off_with_the_weights_they_went_on_with(tmp_path):
    base, adapter, _ = merged_folder(tmp_path)
    other = load_adapter(adapter)
    layers = {path: make_factors(factors.shape, scale=0.03, seed=9) for path, factors in other.layers.items()}
    save_adapter(Adapter(layers, other.base, other.notes), tmp_path / "other")
    how = {"weight": [0.5, -0.8]}
    thimble.merge(adapter, tmp_path / "other", base=str(base), out=str(tmp_path / "both"), **how)
    given = {"base": str(tmp_path / "both"), "unmerge": True}
    assert thimble.merge(adapter, tmp_path / "other", out=str(tmp_path / "x"), **given, **how).original == str(base)
    assert thimble.merge(adapter, tmp_path / "other", out=str(tmp_path / "y"), **given).original == ""


def test_dora_without_its_base_cannot_come_off(refuse, tmp_path):
    _, adapter, full = merged_folder(tmp_path, named=False, magnitude=True)
    assert "what those were only the original base knows, which is not found" in refuse(
        adapter, base=full, unmerge=True
    )
    assert "name with --base the folder that the adapters were merged into" in refuse(adapter, unmerge=True)


# ---- adapters in GGUF files -----------------------------------------------------------------------------------------


def test_a_gguf_adapter_is_merged_as_the_folder_it_was_made_of(tmp_path):
    base = make_hf_folder("llama", tmp_path / "base")
    opened = open_base(base)
    folder = write_adapter(tmp_path / "a", opened.spec.linear_shapes(), scale=0.05)
    write_gguf_adapter(load_adapter(folder), opened, tmp_path / "a.gguf")
    for name in ("a", "a.gguf"):
        report = thimble.merge(tmp_path / name, base=str(base), out=str(tmp_path / f"{name} merged"))
        small = thimble.merge(tmp_path / name, base=str(base), out=str(tmp_path / f"{name} small"), rank=2)
        assert small.kinds[-1].bytes_before == 4 * small.kinds[-1].parameters_before
        assert report.kinds[-1].bytes_before == small.kinds[-1].bytes_before
    for kind, file in (("merged", "model.safetensors"), ("small", WEIGHTS_FILE)):
        one, other = (open_tensors(tmp_path / f"{name} {kind}" / file) for name in ("a", "a.gguf"))
        for name in one.tensors:
            np.testing.assert_allclose(one.read(name), other.read(name), atol=1e-6)


# ---- what goes wrong on the way -------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_of_that_shape_is_warned_about_by_hash(tmp_path):
    base, adapter, _ = merged_folder(tmp_path)
    other = shard_folder("llama", tmp_path / "other", torch.float32)
    hashes = open_base(base).quick_fingerprint()[:12], open_base(other).quick_fingerprint()[:12]
    assert hashes[0] != hashes[1]
    report = thimble.merge(adapter, base=str(other), out=str(tmp_path / "wrong"))
    assert all(text in report.messages["warning"][0] for text in (*hashes, "was trained on", "harm on any other"))


def test_a_disk_that_fills_up_on_the_way_leaves_nothing_and_is_told(tmp_path, monkeypatch, capsys):
    base = shard_folder("llama", tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", open_base(base).spec.linear_shapes())
    before, written = names_in(tmp_path), []

    def full(file, path, changed):
        if written:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        rewrite_safetensors(file, path, changed)

    monkeypatch.setattr(merged, "rewrite_safetensors", full)
    assert main(["merge", adapter, "--base", str(base), "--out", str(tmp_path / "out")]) == 3
    assert "the disk is full" in capsys.readouterr().err
    assert written
    assert names_in(tmp_path) == before


def test_a_killed_merge_leaves_nothing_under_the_final_name_and_can_be_run_again(tmp_path):
    base = shard_folder("llama", tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", open_base(base).spec.linear_shapes())
    code = (
        "import os, sys, thimble\n"
        "from thimble.models import merged\n"
        "merged.rewrite_safetensors = lambda *_: os.kill(os.getpid(), 9)\n"
        "thimble.merge(sys.argv[1], base=sys.argv[2], out=sys.argv[3])\n"
    )
    words = [sys.executable, "-c", code, adapter, str(base), str(tmp_path / "out")]
    assert subprocess.run(words, check=False).returncode == -9
    assert not (tmp_path / "out").exists()
    thimble.merge(adapter, base=str(base), out=str(tmp_path / "out"))
    assert names_in(tmp_path / "out") == names_in(base)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
