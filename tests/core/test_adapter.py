"""The adapter file: PEFT's layout, byte-stable, all or nothing."""

import json
import os
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from stress import TINY
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.errors import AdapterError
from thimble.files import peft_config
from thimble.files.peft import CONFIG_FILE, WEIGHTS_FILE, find_adapter, load_adapter, save_adapter

RANDOM = np.random.default_rng(0)


def make_adapter(ranks=(4, 4, 4, 4), scales=(2.0, 2.0, 2.0, 2.0)):
    names = [f"model.layers.{i}.self_attn.{kind}" for i in range(2) for kind in ("q_proj", "v_proj")]
    layers = {
        name: Factors(RANDOM.standard_normal((r, 8)).astype("f4"), RANDOM.standard_normal((6, r)).astype("f4"), s)
        for name, r, s in zip(names, ranks, scales, strict=True)
    }
    return Adapter(layers, "some/base", {"made_by": "test"})


def test_loading_what_was_saved_gives_the_same_adapter_and_the_same_bytes_again(tmp_path):
    adapter = make_adapter()
    save_adapter(adapter, tmp_path / "one")
    again = load_adapter(tmp_path / "one")
    save_adapter(again, tmp_path / "two")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for layer, factors in adapter.layers.items():
        np.testing.assert_array_equal(again.layers[layer].A, factors.A)
        np.testing.assert_array_equal(again.layers[layer].B, factors.B)
        assert again.layers[layer].scale == factors.scale


def test_layers_that_differ_are_told_in_patterns(tmp_path):
    adapter = make_adapter(ranks=(4, 4, 4, 2), scales=(2.0, 2.0, 1.0, 4.0))
    save_adapter(adapter, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["r"] == 4
    assert config["rank_pattern"] == {"model.layers.1.self_attn.v_proj": 2}
    assert config["alpha_pattern"] == {"model.layers.1.self_attn.q_proj": 4.0}
    assert [f.scale for f in load_adapter(tmp_path).layers.values()] == [2.0, 2.0, 1.0, 4.0]


def test_config_has_exactly_the_fields_that_peft_writes(tmp_path):
    peft = pytest.importorskip("peft")
    save_adapter(make_adapter(), tmp_path / "ours")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**settings, inference_mode=True, base_model_name_or_path="some/base")
    config.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / who / CONFIG_FILE).read_text()) for who in ("ours", "theirs"))
    theirs["target_modules"] = sorted(theirs["target_modules"])
    assert {k: v for k, v in ours.items() if k != "peft_version"} == {
        k: v for k, v in theirs.items() if k != "peft_version"
    }


def test_rslora_gives_the_scale_that_peft_computes(tmp_path):
    save_adapter(make_adapter(), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"use_rslora": True}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert {f.scale for f in load_adapter(tmp_path).layers.values()} == {8 / 4**0.5}


def test_a_run_folder_stands_for_its_adapter(tmp_path):
    save_adapter(make_adapter(), tmp_path / "adapter")
    assert find_adapter(tmp_path) == tmp_path / "adapter"


def test_an_adapter_that_is_not_finite_is_never_written(tmp_path):
    broken = Factors(np.full((1, 2), np.nan, "f4"), np.zeros((2, 1), "f4"), 1.0)
    with pytest.raises(AdapterError, match="NaN or Inf"):
        save_adapter(Adapter({"model.layers.0.mlp.up_proj": broken}), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_all_faults_of_the_tensors_are_told_at_once(tmp_path):
    save_adapter(make_adapter(), tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS_FILE)
    prefix = "base_model.model.model.layers"
    del tensors[f"{prefix}.0.self_attn.q_proj.lora_B.weight"]
    tensors[f"{prefix}.1.self_attn.q_proj.lora_A.weight"] = np.zeros((3, 8), "f4")
    tensors["surprise"] = np.zeros(3, "f4")
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path)
    text = str(caught.value)
    assert "surprise" in text
    assert "model.layers.0.self_attn.q_proj has lora_A.weight: expected lora_A.weight, lora_B.weight" in text
    assert "model.layers.1.self_attn.q_proj has A (3, 8) and B (6, 4)" in text


def test_a_folder_without_adapter_says_what_it_holds(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(AdapterError, match="holds adapter_model.bin: expected a folder with adapter_config.json"):
        load_adapter(tmp_path)


# --- adapters from untrusted sources


def peft_adapter(folder, targets=("q_proj", "v_proj"), **settings):
    """What PEFT itself writes for a tiny model, with B that is not zero."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from families import hf_model

    model = peft.get_peft_model(hf_model("llama"), peft.LoraConfig(target_modules=list(targets), **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"model.layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        {"rank_pattern": {"^model.layers.1.self_attn.v_proj": 2, "q_proj$": 3}},
        {"rank_pattern": {".*v_proj": 3, r"self_attn\.q_proj": 5}, "alpha_pattern": {r".*\.q_proj": 2}},
        {"rank_pattern": {r"layers\.\d+\.self_attn\.(q|v)_proj": 6}},
        {"use_rslora": True, "alpha_pattern": {"layers.1.self_attn.q_proj": 0.5}},
        {"rank_pattern": {"^q_proj": 7, "_proj": 7, ".*_proj": 2}, "alpha_pattern": {"^self_attn.q_proj": 7}},
    ],
)
def test_what_peft_writes_is_read_with_the_ranks_and_scales_of_peft(tmp_path, patterns):
    model = peft_adapter(tmp_path, r=4, lora_alpha=8, **patterns)
    theirs = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    ours = {path: (factors.rank, factors.scale) for path, factors in load_adapter(tmp_path).layers.items()}
    assert ours == theirs


def with_config(**changes):
    def change(folder):
        config = json.loads((folder / CONFIG_FILE).read_text()) | changes
        (folder / CONFIG_FILE).write_text(json.dumps(config))

    return change


def both(*changes):
    def change(folder):
        for one in changes:
            one(folder)

    return change


def with_text(old, new):
    def change(folder):
        text = (folder / CONFIG_FILE).read_text()
        assert old in text
        (folder / CONFIG_FILE).write_text(text.replace(old, new, 1))

    return change


def with_tensors(edit):
    def change(folder):
        tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
        edit(tensors)
        safetensors.numpy.save_file(tensors, folder / WEIGHTS_FILE)

    return change


Q = "base_model.model.model.layers.0.self_attn.q_proj"
HOSTILE = {
    "rank 0": (with_config(r=0), "r is 0: expected a whole number from 1 to 2,048"),
    "rank 1e6": (with_config(r=10**6), "r is 1000000"),
    "a negative rank": (with_config(r=-4), "r is -4"),
    "a broken rank": (with_config(r=4.5), "r is 4.5"),
    "a truth value as rank": (with_config(r=True), "r is True"),
    "another rank": (with_config(r=8), "q_proj has tensors of rank 4, but adapter_config.json gives it 8"),
    "another rank in a pattern": (with_config(rank_pattern={"q_proj": 3}), "of rank 4, but .* gives it 3"),
    "alpha NaN": (with_text('"lora_alpha": 8', '"lora_alpha": NaN'), "NaN is not a number"),
    "alpha infinite": (with_text('"lora_alpha": 8', '"lora_alpha": 1e999'), "too large a number"),
    "alpha 1e308": (with_config(lora_alpha=1e308), "lora_alpha is 1e.308: expected a number above 0"),
    "alpha of 400 digits": (with_config(lora_alpha=10**400), "a number has 401 digits"),
    "alpha -1": (with_config(lora_alpha=-1), "lora_alpha is -1"),
    "alpha 0": (with_config(lora_alpha=0), "lora_alpha is 0"),
    "alpha as text": (with_config(lora_alpha="8"), "lora_alpha is '8'"),
    "a scale beyond all": (with_config(lora_alpha=50_000), "is scaled by 12,500: expected .* at most 10,000"),
    "no alpha": (with_text('"lora_alpha": 8,', ""), "lora_alpha is None"),
    "alpha twice": (with_text('"lora_alpha": 8,', '"lora_alpha": 8, "lora_alpha": 9,'), "occurs twice, 'lora_alpha'"),
    "patterns without end": (
        with_config(rank_pattern={f"layer{n}": 4 for n in range(30_000)}),
        "rank_pattern holds 30,000 entries: expected an object of at most 20,000",
    ),
    "a million patterns": (with_config(rank_pattern={str(n): 4 for n in range(10**6)}), "larger than 1,048,576 bytes"),
    "patterns in a list": (with_config(rank_pattern=["q_proj"]), "rank_pattern is .'q_proj'."),
    "a pattern with text": (with_config(alpha_pattern={"q_proj": "8"}), "alpha_pattern gives 'q_proj' the value '8'"),
    "a pattern with rank 0": (with_config(rank_pattern={"q_proj": 0}), "rank_pattern gives 'q_proj' the value 0"),
    "a pattern that could take long": (
        with_config(alpha_pattern={"(a|a)*$": 8, "((.*)*)*x": 9}),
        "regular expression '.a.a..\\$', which is not run",
    ),
    "another method": (with_config(peft_type="LOHA"), "only LORA adapters are supported; if PEFT can merge it"),
    "learned prompts": (
        with_config(peft_type="PROMPT_TUNING"),
        "'PROMPT_TUNING': only LORA .* it changes no weights: train a LoRA",
    ),
    "no method": (with_config(peft_type=None), "only LORA adapters are supported"),
    "DoRA as text": (with_config(use_dora="false"), "use_dora is 'false': expected true or false"),
    "rsLoRA as a number": (with_config(use_rslora=2), "use_rslora is 2: expected true or false"),
    "DoRA without magnitudes": (with_config(use_dora=True), "expected lora_A.weight, lora_B.weight, lora_magnitude"),
    "a start that changed the base": (with_config(init_lora_weights="pissa"), "'pissa', with which the base was"),
    "a base that is no name": (with_config(base_model_name_or_path=["x"]), "base_model_name_or_path is ..x"),
    "a base with control characters": (with_config(base_model_name_or_path="\x1b[2J"), "base_model_name_or_path is"),
    "a base without end": (with_config(base_model_name_or_path="x" * 100_000), "at most 1,024 characters"),
    "half of a character": (with_text('"some/base"', '"\\ud800"'), "half of a character"),
    "great depth": (with_text('"some/base"', "[" * 100_000), "nested too deeply"),
    "a missing B": (with_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), "q_proj has lora_A.weight: expected"),
    "no tensors": (with_tensors(lambda t: t.clear()), "it holds no LoRA matrices"),
    "biases of another kind": (with_config(bias="some"), "bias is 'some': expected one of none, all, lora_only"),
    "biases as a number": (with_config(bias=3), "bias is 3: expected one of"),
    "modules that are no list": (with_config(modules_to_save="head"), "modules_to_save is 'head': expected at most"),
    "a module that is no name": (with_config(modules_to_save=["(a|a)*$"]), "names '.a.a..\\$': expected the name of"),
    "a head that nobody announced": (
        with_tensors(lambda t: t.update({"base_model.model.head.weight": np.ones((2, 4), "f4")})),
        "head.weight F32 .2, 4. is not a LoRA matrix",
    ),
    "a weight of a layer that is not adapted": (
        with_tensors(lambda t: t.update({"base_model.model.x.base_layer.weight": np.ones((2, 4), "f4")})),
        "x.base_layer.weight F32 .2, 4. is not a LoRA matrix",
    ),
    "a layer twice": (
        with_tensors(lambda t: t.update({f"{Q}.base_layer.x.{side}": t[f"{Q}.{side}"] for side in ("lora_A.weight",
            "lora_B.weight")} | {f"{Q}.x.{side}": t[f"{Q}.{side}"] for side in ("lora_A.weight", "lora_B.weight")})),
        "is there twice, with base_layer in its name and without",
    ),
    "NaN in a head": (
        both(with_config(modules_to_save=["head"]),
             with_tensors(lambda t: t.update({"base_model.model.head.weight": np.full((2, 4), np.nan, "f4")}))),
        "head.weight holds numbers that are NaN or Inf",
    ),
    "a convolution whose B is none": (
        with_tensors(lambda t: t.update({f"{Q}.lora_A.weight": np.ones((4, 8, 3, 3), "f4"),
                                         f"{Q}.lora_B.weight": np.ones((6, 4, 3, 3), "f4")})),
        r"lora_B.weight F32 \(6, 4, 3, 3\) is not a LoRA matrix",
    ),
    "a convolution in groups that do not divide": (
        with_tensors(lambda t: t.update({f"{Q}.lora_A.weight": np.ones((4, 8, 3), "f4"),
                                         f"{Q}.lora_B.weight": np.ones((5, 2, 1), "f4")})),
        r"has A \(4, 8, 3\) and B \(5, 2, 1\): expected",
    ),
    "a tensor too many": (with_tensors(lambda t: t.update(x=np.zeros(3, "f4"))), "tensor x F32 .3,. is not a LoRA"),
    "a name that climbs": (with_tensors(lambda t: t.update({"../../x": np.zeros(3, "f4")})), "tensor ../../x F32"),
    "three dimensions": (
        with_tensors(lambda t: t.update({f"{Q}.lora_A.weight": np.ones((4, 8, 1), "f4")})),
        "is not a LoRA matrix",
    ),
    "expert matrices": (
        with_tensors(lambda t: t.update({f"{Q}.lora_A.weight": np.ones((2, 4, 8), "f4")})),
        "is not a LoRA matrix",
    ),
    "A and B turned round": (
        with_tensors(lambda t: t.update({name: np.ascontiguousarray(value.T) for name, value in t.items()})),
        r"has A \(8, 4\) and B \(4, 6\): expected",
    ),
    "sizes of zero": (
        with_tensors(lambda t: t.update({f"{Q}.lora_A.weight": np.ones((4, 0), "f4")})),
        r"has A \(4, 0\) and B",
    ),
    "integers": (with_tensors(lambda t: t.update({f"{Q}.lora_A.weight": np.ones((4, 8), "i4")})), "I32 .* is not a"),
    "NaN": (with_tensors(lambda t: t[f"{Q}.lora_A.weight"].fill(np.nan)), "numbers that are NaN or Inf"),
    "one infinity": (with_tensors(lambda t: t[f"{Q}.lora_B.weight"].put(3, np.inf)), "numbers that are NaN or Inf"),
    "a GGUF": (lambda folder: (folder / WEIGHTS_FILE).write_bytes(TINY.read_bytes()), "is a gguf file"),
    "a pickle": (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"\x80\x04."), "a Python pickle"),
    "a zip": (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"PK\x03\x04xxxxx"), "perhaps a PyTorch pickle"),
    "nothing": (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b""), "is empty"),
    "half of the tensors": (
        lambda folder: (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-100]),
        "ends at byte",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_adapter_is_refused_quickly_and_nothing_of_it_is_kept(tmp_path, case):
    change, message = HOSTILE[case]
    save_adapter(make_adapter(), tmp_path)
    change(tmp_path)
    before, seconds = {path: path.read_bytes() for path in tmp_path.iterdir()}, []
    for _ in range(3):  # the quickest: other work on the machine does not count
        began = time.process_time()
        with pytest.raises(AdapterError, match=message):
            load_adapter(tmp_path)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.5  # what is not refused early takes seconds
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def raw_tensors(header, data=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(1, 2), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


ONE, TWO = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
SEVENTEEN = {
    "an overlap": raw_tensors({ONE: tensor(), TWO: tensor("F32", (2, 1), 4, 12)}, bytes(12)),
    "a hole": raw_tensors({ONE: tensor(), TWO: tensor("F32", (2, 1), 12, 20)}, bytes(20)),
    "bytes behind the data": raw_tensors({ONE: tensor(), TWO: tensor("F32", (2, 1), 8, 16)}, bytes(17)),
    "a shape past all numbers": raw_tensors({ONE: tensor(shape=(1 << 63, 1 << 63))}),
    "a negative size": raw_tensors({ONE: tensor(shape=(-1, -2))}),
    "a header past 100 MB": raw_tensors({ONE: tensor()}, bytes(100), 100_000_001),
    "a header nested deeply": raw_tensors(b'{"a":' + b"[" * 1_000_000),
    "floats called integers": raw_tensors({ONE: tensor("I32"), TWO: tensor("I32", (2, 1), 8, 16)}, bytes(16)),
    "a key twice": raw_tensors((json.dumps({ONE: tensor()})[:-1] + "," + json.dumps({ONE: tensor()})[1:]).encode()),
    "an empty shape of 2^60": raw_tensors({ONE: tensor(shape=(0, 1 << 60), end=0)}, b""),
    "a name that climbs": raw_tensors({"../../etc/passwd": tensor()}),
    "a name with a NUL": raw_tensors({"a\0b\n": tensor()}),
    "no name": raw_tensors({"": tensor()}),
    "NaN alone": raw_tensors({ONE: tensor(), TWO: tensor("F32", (2, 1), 8, 16)}, b"\xff" * 16),
    "100,000 empty tensors": raw_tensors({f"t{n}": tensor(shape=(0,), end=0) for n in range(100_000)}, b""),
    "a header of 95 MB": raw_tensors(b'{"a":"' + b"x" * 95_000_000 + b'"}', b""),
    "data cut short": raw_tensors({ONE: tensor(), TWO: tensor("F32", (2, 1), 8, 16)}, bytes(15)),
}


@pytest.mark.parametrize("case", SEVENTEEN)
def test_every_hostile_file_of_tensors_is_refused_quickly(tmp_path, case):
    """The first seven the reference refuses too; the others it takes, some at the cost of seconds and gigabytes."""
    save_adapter(make_adapter(), tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(SEVENTEEN[case])
    with_config(r=1)(tmp_path)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        with pytest.raises(AdapterError):
            load_adapter(tmp_path)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.5  # what is not refused early takes seconds


@pytest.mark.parametrize(
    "name",
    ["lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "trainable_token_indices",
     "layer_replication", "megatron_config", "arrow_config", "velora_config", "kasa_config", "monteclora_config"],
)  # fmt: skip
def test_what_would_change_the_function_is_refused_by_name(tmp_path, name):
    save_adapter(make_adapter(), tmp_path)
    for value in ("all", True, [1], {"a": 1}, 3):
        with_config(**{name: value})(tmp_path)
        with pytest.raises(AdapterError, match=f"{name} is .*: not supported; (if PEFT can merge it|train without it)"):
            load_adapter(tmp_path)
    for value in (None, False, [], {}):
        with_config(**{name: value})(tmp_path)
        assert load_adapter(tmp_path).layers


def test_all_faults_of_the_config_are_told_at_once(tmp_path):
    save_adapter(make_adapter(), tmp_path)
    with_config(r=0, lora_alpha="8", lora_bias=True, rank_pattern=3, peft_type="IA3")(tmp_path)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path)
    assert len(caught.value.problems) == 5


def test_faults_of_very_many_layers_are_counted_and_not_all_told(tmp_path):
    layers = {
        f"model.layers.{n}.mlp.up_proj": Factors(np.ones((1, 2), "f4"), np.ones((2, 1), "f4"), 1.0) for n in range(99)
    }
    save_adapter(Adapter(layers), tmp_path)
    with_config(r=2)(tmp_path)
    with pytest.raises(AdapterError, match="and 79 problems more") as caught:
        load_adapter(tmp_path)
    assert len(caught.value.problems) == 21


def test_many_layers_are_not_each_looked_up_in_twenty_thousand_patterns(tmp_path, monkeypatch):
    looked_up, seen = [], peft_config._seen
    monkeypatch.setattr(peft_config, "_seen", lambda layer, shape: looked_up.append(layer) or seen(layer, shape))
    layers = {
        f"model.layers.{n}.mlp.up_proj": Factors(np.ones((1, 2), "f4"), np.ones((2, 1), "f4"), 1.0) for n in range(999)
    }
    save_adapter(Adapter(layers), tmp_path)
    with_config(rank_pattern={f"x{n}": 3 for n in range(20_000)}, alpha_pattern={f".*y{n}": 3 for n in range(20_000)})(
        tmp_path
    )
    assert len(load_adapter(tmp_path).layers) == 999
    assert 0 < len(looked_up) <= 999 * 2 * 10  # five lengths of keys, twice, for ranks and scales


def test_unknown_fields_change_nothing_and_nothing_they_name_is_imported(tmp_path):
    (tmp_path / "stolen_library.py").write_text("raise AssertionError('imported')")
    save_adapter(make_adapter(), tmp_path)
    expected = load_adapter(tmp_path)
    names = {"base_model_class": "system", "parent_library": "stolen_library"}
    with_config(
        auto_mapping=names, megatron_core="stolen_library", parent_library="os", runtime_config={"x": 1}, new=[1]
    )(tmp_path)
    found = load_adapter(tmp_path)
    assert "stolen_library" not in sys.modules
    assert found.layers.keys() == expected.layers.keys()
    assert [f.scale for f in found.layers.values()] == [f.scale for f in expected.layers.values()]


OPENED: list[str] | None = None


def note_opened(event, args):
    if event == "open" and OPENED is not None and isinstance(args[0], str | os.PathLike):
        OPENED.append(os.fspath(args[0]))


def test_of_a_folder_only_the_two_files_are_opened(tmp_path):
    global OPENED
    save_adapter(make_adapter(), tmp_path)
    for name in (
        "adapter_model.bin",
        "training_args.bin",
        "rng_state.pth",
        ".x.mdl",
        "x.pkl",
        "adapter_model.pt",
        "README.md",
    ):
        (tmp_path / name).write_bytes(b"\x80\x04.")
    sys.addaudithook(note_opened)
    OPENED = []
    try:
        load_adapter(tmp_path)
        found = {path for path in OPENED if path.startswith(str(tmp_path))}
    finally:
        OPENED = None
    assert found == {str(tmp_path / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}


def test_a_folder_with_nothing_but_a_pickle_says_how_to_convert_it(tmp_path):
    save_adapter(make_adapter(), tmp_path)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(
        AdapterError, match="adapter_model.bin is a pickle, which can run code when read: .* convert it with"
    ):
        load_adapter(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused(tmp_path, name):
    for kind, make in (("a pipe", os.mkfifo), ("a directory", os.mkdir)):
        save_adapter(make_adapter(), tmp_path / kind)
        (tmp_path / kind / name).unlink()
        make(tmp_path / kind / name)
        with pytest.raises(AdapterError, match=f"{name} is {kind}: expected a file"):
            load_adapter(tmp_path / kind)


def test_links_into_the_cache_of_the_hub_client_are_followed_and_others_refused_by_content(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    save_adapter(make_adapter(), blobs)
    snapshot.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert load_adapter(snapshot).layers
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (blobs / name).unlink()
        (blobs / name).symlink_to("/etc/passwd")
        with pytest.raises(AdapterError):
            load_adapter(snapshot)


def test_a_folder_of_runs_is_answered_with_one_of_them(tmp_path):
    save_adapter(
        Adapter({"model.layers.0.mlp.up_proj": Factors(np.ones((1, 2)), np.ones((3, 1)), 1.0)}),
        tmp_path / "runs" / "my run-1" / "adapter",
    )
    with pytest.raises(AdapterError, match=r"name one of its run folders, such as '.*/runs/my run-1'"):
        load_adapter(tmp_path / "runs")


@pytest.mark.parametrize(
    ("files", "named", "said"),
    [
        (["adapters.safetensors", CONFIG_FILE], ".", "an adapter of mlx-lm"),
        (["config.json", "model.safetensors"], ".", "it is a base: name it with --base"),
        ([CONFIG_FILE, WEIGHTS_FILE], WEIGHTS_FILE, "name the folder around it, /"),
        ([f"checkpoint-50/{CONFIG_FILE}", f"checkpoint-50/{WEIGHTS_FILE}"], ".", "name one of its folders, such as /"),
        ([f"checkpoint-{n}/{name}" for n in (9, 100, 20) for name in (CONFIG_FILE, WEIGHTS_FILE)], ".",
         "/checkpoint-100"),
        (["adapters.safetensors", CONFIG_FILE], "adapters.safetensors", "an adapter of mlx-lm"),
        (["pytorch_lora_weights.safetensors"], ".", "a LoRA of diffusers, for a model that makes pictures"),
        (["pytorch_lora_weights.safetensors"], "pytorch_lora_weights.safetensors", "a LoRA of diffusers"),
        ([f"models--a--b/snapshots/1f/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)], "models--a--b",
         "models--a--b/snapshots/1f"),
        ([], "nowhere", "nowhere does not exist: expected a folder"),
        ([WEIGHTS_FILE], ".", "adapter_config.json is missing"),
        ([WEIGHTS_FILE], WEIGHTS_FILE, "adapter_config.json is missing"),
        (["snapshots"], ".", "holds snapshots: expected a folder with"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_folder_is_answered_with_what_it_is(tmp_path, files, named, said):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(AdapterError) as caught:
        find_adapter(tmp_path / named)
    assert said in str(caught.value)


def test_an_adapter_of_the_hub_is_not_fetched_but_how_is_said():
    with pytest.raises(AdapterError, match="hf download owner/name, which prints the folder to name"):
        find_adapter("owner/name")


def test_a_slip_in_the_name_of_a_run_is_not_taken_for_a_name_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "tickets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError) as caught:
        find_adapter("runs/ticket")
    assert "hf download" not in str(caught.value)


@pytest.mark.parametrize("name", ["lora_unet_mid_attn.lora_down.weight", "unet.mid.attn.lora_A.weight"])
def test_a_lora_of_pictures_is_known_by_its_tensors(tmp_path, name):
    safetensors.numpy.save_file({name: np.ones((2, 4), "f4")}, tmp_path / "style.safetensors")
    for place in (tmp_path, tmp_path / "style.safetensors"):
        with pytest.raises(AdapterError, match=r"style.safetensors is a LoRA .*, for a model that makes pictures"):
            find_adapter(place)


def test_an_embedding_that_peft_saved_because_the_vocabulary_grew_is_told_as_one(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from families import hf_model

    with torch.random.fork_rng():
        model = hf_model("llama")
        model.resize_token_embeddings(330)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)  # as it does by itself where it sees a larger one
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path)
    assert len(caught.value.problems) == 2
    for problem, name in zip(caught.value.problems, ("lm_head", "embed_tokens"), strict=True):
        assert f"{name}.weight F32 (330, 32) is a whole " in problem
        assert "merge_and_unload" in problem


@pytest.mark.parametrize("name", ["base_model.model.layers.{n}.q.lora_A.default.weight", "layers.{n}.q.lora_A.weight"])
def test_tensors_of_another_layout_are_told_in_a_few_lines_with_how_to_save_them(tmp_path, name):
    tensors = {name.format(n=n): np.ones((2, 4), "f4") for n in range(40)}
    save_adapter(Adapter({"model.q": Factors(np.ones((2, 4), "f4"), np.ones((4, 2), "f4"), 1.0)}, "base"), tmp_path)
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path)
    assert len(caught.value.problems) < 8
    assert "save_pretrained" in caught.value.problems[0]
    assert caught.value.problems[-1].endswith("35 problems more of this kind")
