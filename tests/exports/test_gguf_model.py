"""Whole models as GGUF: as llama.cpp's converter writes them, and in llama.cpp itself."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from families import GGUF_FILES, HF_ONLY, make_hf_folder
from samples import make_adapter
from thimble.backends.torch.encode import encode
from thimble.backends.torch.session import TorchSession
from thimble.core.lowrank import merge
from thimble.data.batches import micro_batches
from thimble.data.encode import Row
from thimble.data.model import model_of
from thimble.data.tokenizer import TEMPLATE_KEYS, tokenizer_from_folder
from thimble.data.vocab_to_gguf import vocab_header
from thimble.errors import BaseModelError, RunError
from thimble.exports import gguf_model
from thimble.exports.gguf_model import plan_tensors, write_gguf_model
from thimble.exports.proof_model import Here, prove_model
from thimble.exports.proof_weights import check_weights
from thimble.models.base import open_base
from thimble.models.gguf_header import carried_header, made_header
from thimble.models.gguf_names import gguf_name

GGUF = Path(__file__).parents[1] / "fixtures" / "gguf"
CONVERTED = sorted(file for file, (_, storage) in GGUF_FILES.items() if storage == "f32")
# What the converter writes and nothing reads, or reads from the tensors; and what it leaves to a default.
UNREAD = {"general.size_label", "tokenizer.ggml.add_sep_token", "tokenizer.ggml.add_space_prefix"}


def header_of(base):
    model = model_of(base)
    return {**made_header(base), **vocab_header(base.path, model.tokenizer, base.spec.vocab_size)}


def fields(path):
    found = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in found.fields.items() if not key.startswith("GGUF.")}
    kinds = {key: [kind.name for kind in field.types] for key, field in found.fields.items()}
    return values, kinds, {tensor.name: tensor for tensor in found.tensors}


@pytest.fixture(scope="module", params=CONVERTED)
def both(request, tmp_path_factory):
    """A folder written as GGUF here, and by llama.cpp's converter."""
    folder = tmp_path_factory.mktemp("base") / request.param
    base = open_base(make_hf_folder(GGUF_FILES[request.param][0], folder))
    write_gguf_model(folder / "ours.gguf", plan_tensors(base, {}, "F32"), "F32", header_of(base))
    return folder / "ours.gguf", GGUF / f"{request.param}.gguf"


def test_a_folder_gets_the_tensors_of_the_converter(both):
    ours, theirs = (fields(path)[2] for path in both)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        if name.startswith("rope"):
            np.testing.assert_allclose(ours[name].data, tensor.data, rtol=1e-6)
        else:
            np.testing.assert_array_equal(ours[name].data, tensor.data, name)


def test_a_folder_gets_the_metadata_of_the_converter(both):
    (ours, our_kinds, _), (theirs, their_kinds, _) = (fields(path) for path in both)
    for key in set(theirs) - UNREAD - {"general.name", "tokenizer.ggml.scores", "tokenizer.ggml.pre"}:
        assert key in ours, key
        assert ours[key] == theirs[key], key
        assert our_kinds[key] == their_kinds[key], key


def test_both_are_the_same_base_here(both):
    ours, theirs = (open_base(path) for path in both)
    assert (ours.spec.family, ours.spec.windows, ours.spec.attention_scale) == (
        theirs.spec.family, theirs.spec.windows, theirs.spec.attention_scale,
    )  # fmt: skip
    for one, other in zip(ours.spec.ropes, theirs.spec.ropes, strict=True):
        assert (one is None) == (other is None)
        if one and other:
            np.testing.assert_allclose(one.inv_freq, other.inv_freq, rtol=1e-6)
            assert one.scale == pytest.approx(other.scale, rel=1e-6)
    texts = ["Hello the world 123 45", "it's  fine\n\nyou're", "<|im_start|>user\nHi 🦙 é<|im_end|>", " a"]
    first, second = (model_of(base).tokenizer for base in (ours, theirs))
    for text in texts:
        assert first.encode(text) == second.encode(text)
    assert (first.bos_id, first.eos_id, first.stop_ids) == (second.bos_id, second.eos_id, second.stop_ids)
    assert first.add_bos == second.add_bos
    assert first.chat_template == second.chat_template


def test_a_template_for_tools_is_written_where_llama_cpp_looks_for_it(tmp_path):
    folder = make_hf_folder("qwen2", tmp_path)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    (folder / "chat_template.jinja").write_text("for all")
    header = vocab_header(folder, tokenizer_from_folder(folder), 320)
    assert header["tokenizer.chat_templates"] == ["tool_use"]
    assert [header[key] for key in TEMPLATE_KEYS] == ["for all", "for tools"]


@pytest.mark.parametrize("family", sorted(HF_ONLY))
def test_what_gguf_has_no_place_for_is_refused(family, tmp_path):
    base = open_base(make_hf_folder(family, tmp_path / "base"))
    with pytest.raises(BaseModelError, match="GGUF has no place for it; keep the folder"):
        made_header(base)


@pytest.mark.parametrize("file", ["llama", "llama3_rope", "phi3_longrope", "qwen3_f16", "llama_wide_mixed"])
def test_a_gguf_base_keeps_all_it_says(file, tmp_path):
    base = open_base(GGUF / f"{file}.gguf")
    write_gguf_model(tmp_path / "x.gguf", plan_tensors(base, {}, "F32"), "F32", carried_header(base))
    ours, theirs = fields(tmp_path / "x.gguf"), fields(base.path)
    own = {"general.file_type", "general.quantization_version", "general.alignment"}
    assert {k: v for k, v in ours[0].items() if k not in own} == {k: v for k, v in theirs[0].items() if k not in own}
    again = open_base(tmp_path / "x.gguf")
    for name, weight in base.weights.items():
        np.testing.assert_array_equal(again.weights[name].read(), weight.read())


# ---- adapters merged into it ----------------------------------------------------------------------------------------


def rows():
    """Two rows of tokens of any kind, all of them targets."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, 300, 24).astype(np.int32) for _ in range(2)]
    return [Row(some, np.append(some[1:], -100).astype(np.int32), "x") for some in ids]


def written(base, adapter, file, file_type="F32", importance=None):
    header = carried_header(base) if base.metadata is not None else header_of(base)
    layers = adapter.plain().layers if adapter else {}
    write_gguf_model(file, plan_tensors(base, layers, file_type, importance), file_type, header)
    return open_base(file)


def proved(base, adapter, file, file_type="F32"):
    layers = adapter.plain().layers if adapter else {}
    weights = check_weights(base, layers, open_base(file))
    here = Here(model_of(base), adapter, model_of(open_base(file)), lambda model: TorchSession(model.base))
    return prove_model(here, file, file_type, weights, rows(), threads=1)


def with_magnitudes(adapter, base):
    """DoRA: rows a little longer than they are."""
    layers = {}
    for path, factors in adapter.layers.items():
        lengths = np.linalg.norm(merge(base.weights[f"{path}.weight"].read(), factors), axis=1)
        layers[path] = replace(factors, magnitude=(1.1 * lengths).astype(np.float32))
    return replace(adapter, layers=layers)


@pytest.mark.parametrize("family", ["llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_llama_cpp_computes_what_base_and_adapter_do(family, tmp_path):
    pytest.importorskip("xllamacpp")
    base = open_base(make_hf_folder(family, tmp_path / "base"))
    adapter = make_adapter(base)
    written(base, adapter, tmp_path / "x.gguf")
    proof = proved(base, adapter, tmp_path / "x.gguf")
    assert proof.holds, proof
    # llama.cpp takes Gemma's GELU from a table of half floats.
    assert proof.runtime_difference < (5e-3 if family.startswith("gemma") else 5e-5)
    assert proof.rounding_difference < 1e-5
    assert proof.effect_there == pytest.approx(1, abs=5e-3)
    assert proof.different_texts == []


def test_dora_is_merged_exactly(tmp_path):
    pytest.importorskip("xllamacpp")
    base = open_base(GGUF / "llama.gguf")
    adapter = with_magnitudes(make_adapter(base), base)
    found = written(base, adapter, tmp_path / "x.gguf")
    for path, factors in adapter.layers.items():
        name = f"{path}.weight"
        np.testing.assert_allclose(
            found.weights[name].read(), merge(base.weights[name].read().astype(np.float64), factors), rtol=1e-6
        )
    assert proved(base, adapter, tmp_path / "x.gguf").holds


def scaled(adapter, by):
    return replace(adapter, layers={p: replace(f, scale=f.scale * by) for p, f in adapter.layers.items()})


def without_one(adapter):
    return replace(adapter, layers=dict(list(adapter.layers.items())[1:]))


@pytest.mark.parametrize("file_type", ["F32", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda adapter: scaled(adapter, 1.5), "1.50 of the update of"),
        (without_one, "of the update of model.layers.0.self_attn.q_proj.weight is in the file"),
    ],
    ids=["scale", "dropped"],
)
def test_a_wrong_scale_and_a_dropped_layer_are_seen_through_rounding(file_type, wrong, said, tmp_path):
    base = open_base(GGUF / "llama.gguf")
    adapter = make_adapter(base, b_size=0.3)
    found = written(base, wrong(adapter), tmp_path / "x.gguf", file_type)
    problems = check_weights(base, adapter.layers, found).problems
    assert any(said in problem for problem in problems), problems
    good = written(base, adapter, tmp_path / "good.gguf", file_type)
    assert check_weights(base, adapter.layers, good).problems == ()


@pytest.mark.parametrize("file_type", ["F32", "Q4_0"])
def test_a_wrong_row_order_is_caught(file_type, tmp_path, monkeypatch):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    monkeypatch.setattr(gguf_model, "gguf_name", lambda base, weight: gguf_name(base, weight)._replace(order=None))
    found = written(base, None, tmp_path / "x.gguf", file_type)
    problems = check_weights(base, {}, found).problems
    assert len(problems) == 2 * base.spec.num_layers
    assert all("_proj.weight" in problem and "of its length" in problem for problem in problems)


# A base that lies on the grid of four bits already, and an update far below its steps: rounding takes nearly all of it.
LOSSY = ["Q4_0", "Q4_1", "Q5_0", "Q4_K_M"]


@pytest.fixture
def drowned(tmp_path):
    base = written(open_base(GGUF / "llama_wide_mixed.gguf"), None, tmp_path / "base.gguf", "Q4_1")
    return base, make_adapter(base, b_size=2e-4)


@pytest.mark.parametrize("file_type", ["F32", "BF16", "Q8_0", *LOSSY])
def test_what_rounding_takes_makes_no_file_wrong(file_type, drowned, tmp_path):
    base, adapter = drowned
    importance = {path: np.linspace(1, 2, shape[1], dtype="f4") for path, shape in base.spec.linear_shapes().items()}
    for weighed in (None, importance):
        found = written(base, adapter, tmp_path / "x.gguf", file_type, weighed)
        check = check_weights(base, adapter.layers, found, weighed)
        assert check.problems == ()
        if file_type == "F32":
            assert check.kept_update == pytest.approx(1, abs=1e-6)
        if file_type == "Q4_1" and not weighed:
            assert check.kept_update < 0.5


@pytest.mark.parametrize("file_type", LOSSY)
@pytest.mark.parametrize("wrong", [lambda adapter: scaled(adapter, 1.41), without_one], ids=["scale", "dropped"])
def test_faults_are_seen_where_rounding_took_the_update(file_type, wrong, drowned, tmp_path):
    base, adapter = drowned
    found = written(base, wrong(adapter), tmp_path / "x.gguf", file_type)
    problems = check_weights(base, adapter.layers, found).problems
    assert any("of the blocks that it changes are not those of base and update" in problem for problem in problems)


@pytest.mark.parametrize("file_type", LOSSY)
def test_an_update_in_another_order_of_rows_is_seen_where_rounding_took_it(file_type, drowned, tmp_path, monkeypatch):
    base, adapter = drowned
    rows_of = gguf_model._rows_of

    def wrong(update, order, window):
        return rows_of(update, None, window)

    monkeypatch.setattr(gguf_model, "_rows_of", wrong)
    found = written(base, adapter, tmp_path / "x.gguf", file_type)
    problems = check_weights(base, adapter.layers, found).problems
    assert problems
    assert all("q_proj" in problem or "k_proj" in problem for problem in problems)


def test_what_keeps_its_type_keeps_its_blocks(tmp_path):
    base = open_base(GGUF / "llama_q8_0.gguf")
    found = written(base, None, tmp_path / "x.gguf", "Q8_0")
    for name, weight in base.weights.items():
        assert (found.weights[name].dtype, found.weights[name].raw().tobytes()) == (
            weight.dtype, weight.raw().tobytes(),
        )  # fmt: skip


def test_importance_is_the_mean_square_of_the_inputs():
    base = open_base(GGUF / "qwen3.gguf")
    session = TorchSession(base)
    found = gguf_model.importance_of(session, None, rows())
    (names, moments), *_ = session.input_moments(micro_batches(rows(), 64))
    assert set(found) == set(base.spec.linear_shapes())
    for name in names:
        np.testing.assert_allclose(found[name], np.diag(moments.mean_square), rtol=1e-5)


def test_importance_is_measured_with_the_adapter_at_work():
    base = open_base(GGUF / "qwen3.gguf")
    adapter = make_adapter(base, b_size=0.3)
    session = TorchSession(base)
    found = gguf_model.importance_of(session, adapter, rows())
    bare = gguf_model.importance_of(session, None, rows())
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(found[first], bare[first])
    assert not np.allclose(found[last], bare[last], rtol=1e-2)


def test_importance_reaches_the_encoder_by_layer(tmp_path):
    base = open_base(GGUF / "llama.gguf")
    importance = {
        path: np.linspace(0, 1, shape[1], dtype=np.float32) for path, shape in base.spec.linear_shapes().items()
    }
    found = written(base, None, tmp_path / "x.gguf", "Q4_0", importance)
    name = "model.layers.0.mlp.up_proj"
    weight = base.weights[f"{name}.weight"]
    expected = encode(weight.read(), "Q4_0", importance[name])
    assert np.array_equal(found.weights[f"{name}.weight"].raw(), expected)
    assert not np.array_equal(expected, encode(weight.read(), "Q4_0"))


def test_numbers_that_are_none_end_the_work_and_leave_nothing(tmp_path):
    base = open_base(GGUF / "llama.gguf")
    adapter = make_adapter(base)
    first = next(iter(adapter.layers))
    bad = replace(adapter.layers[first], B=np.full_like(adapter.layers[first].B, np.inf))
    with pytest.raises(RunError, match="blk.0.attn_q.weight holds NaN or Inf: nothing is written"):
        written(base, replace(adapter, layers={first: bad}), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []
