"""Adapters as GGUF: in llama.cpp itself, and back again."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from families import make_hf_folder
from samples import make_adapter
from thimble.backends.torch.session import TorchSession
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors, delta
from thimble.data.encode import Row
from thimble.data.model import base_with_adapters
from thimble.errors import AdapterError, Problems
from thimble.events import EventLog, ignore
from thimble.exports import gguf_adapter
from thimble.exports.gguf_adapter import check_exportable, write_gguf_adapter
from thimble.exports.proof import prove
from thimble.models.base import open_base
from thimble.models.gguf_adapter import load_gguf_adapter
from thimble.models.gguf_names import architecture, gguf_name

GGUF = Path(__file__).parents[1] / "fixtures" / "gguf"
FAMILIES = ["llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]


def rows():
    """Two rows of tokens of any kind, all of them targets."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, 300, 24).astype(np.int32) for _ in range(2)]
    return [Row(some, np.append(some[1:], -100).astype(np.int32), "x") for some in ids]


def scaled(adapter, factor_of):
    """The adapter with the scale of each layer multiplied."""
    return replace(adapter, layers={
        path: replace(factors, scale=factors.scale * factor_of(number))
        for number, (path, factors) in enumerate(adapter.layers.items())
    })  # fmt: skip


def in_delta_form(adapter):
    origin = {path: Factors(f.A * 1.1, f.B + 0.02, f.scale) for path, f in adapter.layers.items()}
    return replace(
        adapter, origin={path: Factors(o.A.astype("f4"), o.B.astype("f4"), o.scale) for path, o in origin.items()}
    )


def with_ranks(adapter):
    layers = {}
    for number, (path, factors) in enumerate(adapter.layers.items()):
        rank = 1 + number % factors.rank
        layers[path] = Factors(factors.A[:rank], factors.B[:, :rank].copy(), 8 / rank)
    return replace(adapter, layers=layers)


VARIANTS = {
    "plain": lambda adapter: adapter,
    "rslora": lambda adapter: scaled(adapter, lambda number: 3**0.5),
    "alphas": lambda adapter: scaled(adapter, lambda number: 0.3 + number % 3),
    "ranks": with_ranks,
    "delta": in_delta_form,
}


def proved(base, adapter, file):
    return prove(adapter, base, TorchSession(base), file, rows(), threads=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_we_do(family, tmp_path):
    base = open_base(GGUF / f"{family}.gguf")
    for name, variant in VARIANTS.items() if family in ("llama", "gemma3") else [("plain", VARIANTS["plain"])]:
        adapter = variant(make_adapter(base))
        write_gguf_adapter(adapter, base, tmp_path / f"{name}.gguf")
        proof = proved(base, adapter, tmp_path / f"{name}.gguf")
        assert proof.holds, (name, proof)
        assert proof.adapter_difference <= 2 * max(proof.base_difference, 1e-6), (name, proof)
        assert proof.effect > 100 * proof.adapter_difference, (name, proof)
        # llama.cpp takes Gemma's GELU from a table of half floats.
        assert proof.effect_there == pytest.approx(1, abs=5e-3 if family.startswith("gemma") else 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gets_the_names_and_the_order_of_the_converted_file(family, tmp_path):
    folder, file = open_base(make_hf_folder(family, tmp_path / "base")), open_base(GGUF / f"{family}.gguf")
    assert architecture(folder) == architecture(file)
    for layer in folder.spec.linear_shapes():
        ours, theirs = (gguf_name(base, f"{layer}.weight") for base in (folder, file))
        assert ours.name == theirs.name
        assert np.array_equal(ours.order, theirs.order)


def test_a_wrong_row_order_scale_or_a_dropped_layer_is_caught(tmp_path, monkeypatch):
    base, file = open_base(GGUF / "llama.gguf"), tmp_path / "x.gguf"
    adapter = make_adapter(base)
    wrong = {
        "scale": scaled(adapter, lambda number: 1.3),
        "dropped": replace(adapter, layers=dict(list(adapter.layers.items())[1:])),
    }
    for name, other in wrong.items():
        write_gguf_adapter(other, base, file)
        assert not proved(base, adapter, file).holds, name
    monkeypatch.setattr(gguf_adapter, "gguf_name", lambda base, weight: gguf_name(base, weight)._replace(order=None))
    write_gguf_adapter(adapter, base, file)
    assert not proved(base, adapter, file).holds


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_there_and_back(family, variant, tmp_path):
    base = open_base(GGUF / f"{family}.gguf")
    adapter = replace(VARIANTS[variant](make_adapter(base)), notes={"base_sha256": "abc"}, base="mine")
    write_gguf_adapter(adapter, base, tmp_path / "x.gguf")
    back = load_gguf_adapter(tmp_path / "x.gguf", base)
    assert (back.base, back.notes) == ("mine", {"base_sha256": "abc"})
    assert list(back.layers) == list(adapter.layers)
    for path, factors in adapter.plain().layers.items():
        found = back.layers[path]
        np.testing.assert_array_equal(found.A, factors.A)
        np.testing.assert_allclose(delta(found), delta(factors), rtol=1e-5, atol=1e-7)
        if variant in ("plain", "delta"):
            np.testing.assert_array_equal(found.B, factors.B)
            assert found.scale == factors.scale
    write_gguf_adapter(back, base, tmp_path / "again.gguf")
    if variant == "plain":
        assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()


def foreign(
    path,
    base,
    types=None,
    alpha: float | None = 16.0,
    raw=None,
    about=(),
    kind="lora",
    arch="llama",
    drop=(),
    more=(),
    keys=(),
):
    """An adapter as llama.cpp's converter writes it, by the reference package."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, kind)
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, text in about:
        writer.add_string(key, text)
    for key, values in keys:
        writer.add_array(key, values)
    for name, values in more:
        writer.add_tensor(name, values)
    layers = list(base.spec.linear_shapes().items())[:2]
    for layer, (fan_out, fan_in) in layers:
        name = gguf_name(base, f"{layer}.weight").name
        sides = {"lora_a": np.ones((4, fan_in), np.float32), "lora_b": np.ones((fan_out, 4), np.float32)}
        for side, values in sides.items():
            if f"{name}.{side}" not in drop:
                stored = gguf.quants.quantize(values, raw) if raw else values.astype(types or np.float32)
                writer.add_tensor(f"{name}.{side}", stored, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
def test_an_adapter_of_llama_cpps_converter_is_read(dtype, tmp_path):
    base = open_base(GGUF / "llama.gguf")
    foreign(tmp_path / "x.gguf", base, dtype)
    given = str(GGUF / "llama.gguf"), [str(tmp_path / "x.gguf")]
    (found,) = base_with_adapters(*given, Problems(), EventLog(ignore))[1].values()
    assert [factors.scale for factors in found.layers.values()] == [4.0, 4.0]
    foreign(tmp_path / "folded.gguf", base, dtype, alpha=0.0)
    assert {factors.scale for factors in load_gguf_adapter(tmp_path / "folded.gguf", base).layers.values()} == {1.0}


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "F16"])
def test_each_type_that_the_converter_writes_is_read(kind, tmp_path):
    """Its outtype; Q8_0 only where rows are whole blocks, else it writes F16."""
    base = open_base(GGUF / "llama.gguf")
    raw = getattr(gguf.GGMLQuantizationType, kind)
    if kind == "Q8_0":
        writer_rank = 32
        name = gguf_name(base, "model.layers.0.mlp.up_proj.weight").name
        fan_out, fan_in = base.spec.linear_shapes()["model.layers.0.mlp.up_proj"]
        more = [(f"{name}.lora_a", (writer_rank, fan_in)), (f"{name}.lora_b", (fan_out, writer_rank))]
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 64.0)
        for tensor, shape in more:
            writer.add_tensor(tensor, gguf.quants.quantize(np.ones(shape, np.float32), raw), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        expected = 64.0
    else:
        foreign(tmp_path / "x.gguf", base, raw=raw)
        expected = 16.0
    for factors in load_gguf_adapter(tmp_path / "x.gguf", base).layers.values():
        np.testing.assert_allclose(delta(factors), np.full(factors.shape, expected), rtol=1e-2)


def test_without_an_alpha_the_product_counts_as_it_is(tmp_path):
    base = open_base(GGUF / "llama.gguf")
    foreign(tmp_path / "x.gguf", base, alpha=None)
    assert {factors.scale for factors in load_gguf_adapter(tmp_path / "x.gguf", base).layers.values()} == {1.0}


def test_the_name_of_the_base_as_the_converter_writes_it_is_no_reason_for_a_warning(tmp_path):
    base = open_base(GGUF / "llama.gguf")
    called = str(base.metadata.get("general.name", "llama.gguf"))
    for about in (
        [("general.base_model.0.name", called.replace("-", " ").title())],
        [
            ("general.base_model.0.name", "x"),
            ("general.base_model.0.repo_url", f"https://huggingface.co/some/{called}"),
        ],
    ):
        foreign(tmp_path / "x.gguf", base, about=about)
        log = EventLog(ignore)
        found = base_with_adapters(str(base.path), [str(tmp_path / "x.gguf")], Problems(), log)[1]
        assert found
        assert not log.messages["warning"], about
        (tmp_path / "x.gguf").unlink()
    foreign(tmp_path / "x.gguf", base, about=[("general.base_model.0.name", "Another Model")])
    log = EventLog(ignore)
    base_with_adapters(str(base.path), [str(tmp_path / "x.gguf")], Problems(), log)
    assert "was trained on Another Model" in log.messages["warning"][0]


NAN = np.full((4, 32), np.nan, np.float32)
REFUSED = [
    ({"arch": "qwen2"}, "is for 'qwen2', and llama.gguf is llama"),
    ({"kind": "control_vector"}, "is no LoRA adapter"),
    ({"alpha": float("nan")}, "has the alpha nan: expected a number"),
    ({"drop": ("blk.0.attn_q.weight.lora_b",)}, "has only one side of blk.0.attn_q.weight"),
    ({"more": [("blk.0.attn_norm.weight", np.ones(32, np.float32))]}, "lora_a and lora_b alone; load .* with PEFT"),
    ({"more": [("token_embd.weight.lora_a", NAN), ("token_embd.weight.lora_b", NAN)]},
     "adapts token_embd.weight.*load .* with PEFT and write the merged model"),
    ({"more": [("blk.1.attn_q.weight.lora_a", NAN), ("blk.1.attn_q.weight.lora_b", np.ones((32, 4), np.float32))]},
     "blk.1.attn_q.weight holds numbers that are NaN"),
    ({"more": [("blk.1.attn_q.weight.lora_a", NAN), ("blk.1.attn_q.weight.lora_b", np.ones((32, 3), np.float32))]},
     r"has A \(4, 32\) and B \(32, 3\)"),
    ({"keys": [("adapter.alora.invocation_tokens", [1, 2])]}, "is an aLoRA"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_cannot_be_used_is_named(options, said, tmp_path):
    base = open_base(GGUF / "llama.gguf")
    foreign(tmp_path / "x.gguf", base, **options)
    with pytest.raises(AdapterError, match=said):
        load_gguf_adapter(tmp_path / "x.gguf", base)


def test_a_base_is_no_adapter_and_an_adapter_needs_one(tmp_path):
    base = open_base(GGUF / "llama.gguf")
    with pytest.raises(AdapterError, match="is a base"):
        load_gguf_adapter(GGUF / "llama.gguf", base)
    write_gguf_adapter(make_adapter(base), base, tmp_path / "x.gguf")
    with pytest.raises(AdapterError, match="only makes sense beside its base: name it with --base"):
        load_gguf_adapter(tmp_path / "x.gguf", None)


def test_dora_is_refused_with_the_way_round():
    factors = Factors(np.ones((1, 2)), np.ones((3, 1)), 1.0, np.ones(3))
    with pytest.raises(AdapterError, match="is DoRA .*merge it into a folder"):
        check_exportable("mine", Adapter({"model.layers.0.mlp.up_proj": factors}))


def test_an_adapter_that_does_nothing_is_named_as_that_and_is_no_failure_of_the_runtime():
    layers = {"model.layers.0.mlp.up_proj": Factors(np.ones((2, 3), np.float32), np.zeros((4, 2), np.float32), 1.0)}
    with pytest.raises(AdapterError, match="mine changes nothing: A or B is 0"):
        check_exportable("mine", Adapter(layers))
