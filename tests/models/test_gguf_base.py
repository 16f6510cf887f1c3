"""GGUF files in parts, and those that hold something else than a language model."""

import gguf
import numpy as np
import pytest

from stress import TINY
from thimble.errors import BaseModelError
from thimble.files.tensors import open_tensors
from thimble.models.base import open_base

WHOLE = open_base(TINY)


def split(folder, tensors_per_file=7, no_tensor_first=False):
    """The tiny base in parts, as llama.cpp's own package writes them."""
    copy(folder / "big.gguf", split_max_tensors=tensors_per_file, small_first_shard=no_tensor_first)
    return sorted(folder.glob("*.gguf"))


def copy(path, more=(), without=(), **options):
    """The tiny base with more tensors, without some metadata."""
    reader = gguf.GGUFReader(TINY)
    arch = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    writer = gguf.GGUFWriter(path, arch, **options)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", *without):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name in more:
        writer.add_tensor(name, np.full(1, 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("no_tensor_first", [False, True])
def test_all_parts_are_read_whichever_is_named(no_tensor_first, tmp_path):
    parts = split(tmp_path, no_tensor_first=no_tensor_first)
    assert len(parts) > 2
    prints = set()
    for path in (*parts, tmp_path):
        base = open_base(path)
        assert (base.path, base.name, base.num_parameters) == (parts[0], parts[0].name, WHOLE.num_parameters)
        assert base.metadata["tokenizer.ggml.tokens"] == WHOLE.metadata["tokenizer.ggml.tokens"]
        assert f"read from all {len(parts)} parts" in base.notes[-1]
        assert len(base.files) == len(parts) - no_tensor_first
        for name, weight in base.weights.items():
            np.testing.assert_array_equal(weight.read(), WHOLE.weights[name].read())
        prints.add((base.fingerprint(), base.quick_fingerprint()))
    assert len(prints) == 1
    parts[-1].write_bytes(parts[-1].read_bytes()[:-64] + b"\1" * 64)
    assert open_base(parts[0]).fingerprint() not in {full for full, _ in prints}, "the last part counts too"


def test_parts_that_are_missing_are_named(tmp_path):
    parts = split(tmp_path)
    parts[1].unlink()
    for path in (parts[0], parts[2], tmp_path):
        with pytest.raises(BaseModelError, match=f"of the others {parts[1].name} is missing in .*: download all parts"):
            open_base(path)


def test_a_part_that_was_renamed_is_named_as_a_part(tmp_path):
    parts = split(tmp_path)
    path = parts[1].rename(tmp_path / "model.gguf")
    with pytest.raises(
        BaseModelError, match=rf"part 2 of {len(parts)} of a split GGUF, .*llama-gguf-split --merge NAME-00001"
    ):
        open_base(path)


def test_a_part_under_the_name_of_another_is_refused(tmp_path):
    parts = split(tmp_path)
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(
        BaseModelError, match=f"{parts[2].name} does not belong to the same split as {parts[0].name}: exp"
    ):
        open_base(parts[0])


def test_parts_of_two_splits_do_not_add_up(tmp_path):
    for name, count in (("a", 7), ("b", 8)):
        (tmp_path / name).mkdir()
        split(tmp_path / name, count)
    one, two = (sorted((tmp_path / name).iterdir()) for name in "ab")
    if len(one) != len(two):
        two = [
            path.rename(path.with_name(path.name.replace(f"{len(two):05}.gguf", f"{len(one):05}.gguf"))) for path in two
        ]
    one[1].write_bytes(two[1].read_bytes())
    with pytest.raises(BaseModelError, match="like a part before it|parts of .* hold|does not belong|lacks"):
        open_base(one[0])


def write_kind(path, arch="llama", kind=None, **values):
    writer = gguf.GGUFWriter(path, arch)
    if kind:
        writer.add_type(kind)
    for key, value in values.items():
        writer.add_uint16(key.replace("__", "."), value)
    writer.add_tensor("x.weight", np.ones(4, "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("arch", "kind", "message"),
    [("llama", "adapter", "an adapter, not a base"), ("clip", "mmproj", "the vision or audio part of a model"),
     ("clip", None, "the vision or audio part of a model"), ("llama", "imatrix", "an importance matrix"),
     ("llama", "vocab", "a vocabulary without weights")],
)  # fmt: skip
def test_what_is_no_language_model_is_named_as_what_it_is(arch, kind, message, tmp_path):
    with pytest.raises(BaseModelError, match=message):
        open_base(write_kind(tmp_path / "x.gguf", arch, kind))


@pytest.mark.parametrize("values", [{"split__count": 3, "split__no": 3}, {"split__count": 60000, "split__no": 0}])
def test_parts_that_cannot_be_are_refused(values, tmp_path):
    with pytest.raises(BaseModelError, match="says that it is part .* expected whole numbers, at most 1,000 parts"):
        open_base(write_kind(tmp_path / "x-00001-of-00003.gguf", **values))


def test_a_type_that_cannot_be_read_is_named_with_what_to_take(tmp_path):
    content = bytearray(TINY.read_bytes())
    info = open_tensors(TINY).tensors["blk.0.ffn_up.weight"]
    place = content.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 8 * len(info.shape)
    content[place : place + 4] = (21).to_bytes(4, "little")  # IQ3_S
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(BaseModelError, match=r"up_proj.weight is IQ3_S, expected one of F32.*: take the same model"):
        open_base(tmp_path / "x.gguf")


def test_pieces_of_bytes_say_how_to_join_them(tmp_path):
    content = TINY.read_bytes()
    for names in (
        ["m.gguf-split-a", "m.gguf-split-b"],
        ["n.gguf.part1of2", "n.gguf.part2of2"],
        ["o.gguf.00", "o.gguf.01"],
    ):
        for name, part in zip(names, (content[:5000], content[5000:]), strict=True):
            (tmp_path / name).write_bytes(part)
        for name in names:
            with pytest.raises(BaseModelError, match=rf"cat {names[0]} {names[1]} > {names[0][:6]}$"):
                open_base(tmp_path / name)


def test_opening_a_file_decodes_no_vocabulary(monkeypatch):
    def decoded(array):
        raise AssertionError("a metadata array of the vocabulary is decoded")

    monkeypatch.setattr("thimble.files.gguf._Array.decode", decoded)
    assert open_base(TINY).spec.family == WHOLE.spec.family


def test_factors_by_which_llama_cpp_multiplies_are_not_left_out_in_silence(tmp_path):
    with pytest.raises(BaseModelError, match="holds blk.0.attn_q.scale, by which llama.cpp multiplies"):
        open_base(copy(tmp_path / "x.gguf", ["blk.0.attn_q.scale"]))


@pytest.mark.parametrize(
    "name", ["blk.0.attn_sinks.weight", "blk.0.attn_norm.bias", "blk.9.attn_q.weight", "cls.weight"]
)
def test_tensors_that_llama_cpp_would_not_load_are_told(name, tmp_path):
    (told,) = open_base(copy(tmp_path / "x.gguf", [name])).warnings
    assert f"x.gguf holds {name}, which a llama does not read" in told


def test_factors_of_inputs_that_llama_cpp_passes_over_are_no_reason_for_a_warning(tmp_path):
    assert not open_base(copy(tmp_path / "x.gguf", ["blk.0.attn_q.input_scale"])).warnings


@pytest.mark.parametrize("key", ["llama.context_length", "llama.attention.layer_norm_rms_epsilon"])
def test_metadata_that_llama_cpp_needs_is_not_made_up(key, tmp_path):
    with pytest.raises(BaseModelError, match=f"the GGUF lacks {key}, as llama.cpp needs too: convert it again"):
        open_base(copy(tmp_path / "x.gguf", without=[key]))
