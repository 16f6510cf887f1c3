"""Bases that run through transformers: the losses, gradients and logits of transformers and of PEFT, for many families.

What every session promises is tested in tests/backends/test_contract.py, which this one passes too.
"""

import functools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from other_families import CONFIGS, folder_of, make_model, save
from thimble.backends.session import ForwardRow, Objective, Pass, StepKey, Work
from thimble.backends.torch.transformers_cache import BlockCache
from thimble.backends.torch.transformers_model import MOST_PADDING, groups_of
from thimble.backends.torch.transformers_session import TransformersSession
from thimble.core.adapter import Adapter, drawn
from thimble.core.inits import LayerData, kaiming
from thimble.core.method import Method
from thimble.data.batches import pack, shares
from thimble.data.encode import IGNORED, Row
from thimble.errors import BaseModelError, ConfigError, MissingPackageError
from thimble.files.peft import load_adapter, save_adapter
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan
from thimble.models.merged import check_mergeable, write_merged
from thimble.models.transformers_spec import describe

EXECUTION = ExecutionPlan("dense")
QUICK = ("gpt2", "opt", "cohere2", "deepseek_v3", "mamba")  # the others take longer than they add on every commit
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS]
CACHED = [family for family in CONFIGS if family not in ("lfm2", "mamba")]  # whose keys and values are kept in blocks


@pytest.fixture(autouse=True)
def one_thread():
    """Models as small as these lose more than they gain by handing work over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def session_of(family):
    return TransformersSession(open_base(folder_of(family)))


def adapter_of(session, size=0.05, dora=False):
    """An adapter of every layer, and of the parameters of experts, away from zero."""
    random, layers = np.random.default_rng(2), {}
    experts = {} if dora else {path: found[0] for path, found in session.model.spec.parameter_shapes().items()}
    for path, shape, _ in session.layers:
        if dora and path in session.model.spec.parameters:
            continue
        count = experts.get(path, 0)
        data = LayerData(path, shape, 3 * max(1, count), 2.0)
        first = drawn("kaiming", data, count) if count else kaiming(data)
        layers[path] = replace(first, B=(random.standard_normal(first.B.shape) * size).astype(np.float32))
    found = Adapter(layers, prefix=session.model.spec.prefix, settings=session.model.spec.adapter_settings)
    return session.with_magnitudes(found) if dora else found


def make_rows(count=4, seed=0):
    random, rows = np.random.default_rng(seed), []
    for number in range(count):
        ids = random.integers(3, 290, 4 + 5 * number).astype(np.int32)
        labels = np.append(ids[1:], IGNORED).astype(np.int32)
        labels[: 1 + number // 2] = IGNORED
        rows.append(Row(ids, labels, ""))
    return rows


def work_of(rows):
    split = shares(rows, 1, 1000)
    return Work(split, sum(batch.target_tokens for share in split for batch in share))


def summed(model, row):
    """transformers' own loss of one row, run alone."""
    labels = torch.from_numpy(row.labels.astype(np.int64))
    return cross_entropy(model(input_ids=tokens(row.ids)).logits[0].float(), labels, reduction="sum")


def tokens(ids):
    return torch.from_numpy(np.asarray(ids)[None].astype(np.int64))


def in_peft(family, adapter, folder, trainable=False):
    save_adapter(adapter, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable).eval()


# ---- as transformers and PEFT compute it ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_rows_are_those_of_transformers_and_with_an_adapter_those_of_peft(family, tmp_path):
    session, rows = session_of(family), make_rows()
    adapter, model = adapter_of(session), transformers.AutoModelForCausalLM.from_pretrained(folder_of(family)).eval()
    peft_model = in_peft(family, adapter, tmp_path)
    for active, other in ((session.load(None), model), (session.load(load_adapter(tmp_path)), peft_model)):
        (found,) = session.row_losses(active, [pack(rows)], EXECUTION)
        with torch.no_grad():
            expected = [summed(other, row).item() for row in rows]
        assert [loss.nats for loss in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_reaches_every_layer_and_is_the_same_with_checkpointing(family):
    session = session_of(family)
    state = session.start(adapter_of(session), Method())
    found, again = (
        session.gradient(state, work_of(make_rows()), Objective(), execution, StepKey(0, 0)).flat
        for execution in (EXECUTION, replace(EXECUTION, checkpointed_blocks=1))
    )
    np.testing.assert_allclose(again, found, atol=1e-7)
    state = session.apply(
        state, session.gradient(state, work_of(make_rows()), Objective(), EXECUTION, StepKey(0, 0)), 0.1
    )
    assert session.unmoved_layers(state) == []


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe", pytest.param("granite", marks=pytest.mark.slow)])
def test_twenty_steps_are_those_of_peft(family, tmp_path):
    session, rows = session_of(family), make_rows()
    first, method = adapter_of(session), Method(max_grad_norm=1e9)
    model = in_peft(family, first, tmp_path, trainable=True)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
    state, expected, found = session.start(first, method), [], []
    for step in range(20):
        gradient = session.gradient(state, work_of(rows), Objective(), EXECUTION, StepKey(0, step))
        state = session.apply(state, gradient, 1e-3)
        found.append(gradient.loss.mean)
        loss = sum(summed(model, row) for row in rows) / gradient.loss.tokens
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[-1] < found[0] - 0.01


# ---- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_in_parts_beside_others_has_the_logits_of_a_whole_row(family):
    session = session_of(family)
    cache = session.new_cache()
    assert isinstance(cache, BlockCache) == (family in CACHED)
    cache.reserve(8)
    text, plain, adapted = np.random.default_rng(1).integers(3, 290, 40).astype(np.int32), *map(
        session.load, (None, adapter_of(session))
    )  # fmt: skip
    rows = [(text, [0, 4], plain), (text[::-1].copy(), [5, 1], plain), (text[:9], [7], adapted)]
    position = [0, 0, 0]
    for sizes in ((20, 3, 5), (1, 30, 1), (1, 1, 1), (11, 1, 2)):
        parts = [ids[at : at + size] for (ids, *_), at, size in zip(rows, position, sizes, strict=True)]
        one = Pass(
            np.concatenate(parts),
            [ForwardRow(len(part), blocks, at, 60, active)
             for part, (_, blocks, active), at in zip(parts, rows, position, strict=True)],
            (np.cumsum([len(part) for part in parts]) - 1).tolist(),
        )  # fmt: skip
        ((found, _),) = session.forward([one], cache, 1)
        position = [at + size for at, size in zip(position, sizes, strict=True)]
        for logits, (ids, _, active), end in zip(found, rows, position, strict=True):
            with torch.no_grad(), session.model.using(active.low_ranks):
                expected = session.model.logits([ids[:end]], [np.array([end - 1])])[0].numpy()
            np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))


def test_rows_of_about_one_length_run_together():
    lengths = [40, 7, 39, 8, 1]
    groups = groups_of(lengths)
    assert sorted(number for group in groups for number in group) == list(range(5))
    for group in groups:
        longest = max(lengths[number] for number in group)
        assert sum(lengths[number] for number in group) >= (1 - MOST_PADDING) * longest * len(group)


# ---- merged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dora"), [("gpt2", False), ("gpt2", True), ("bloom", False)])
def test_a_merged_folder_has_the_logits_of_the_base_with_its_adapter(family, dora, tmp_path):
    session, ids = session_of(family), np.arange(5, 25).astype(np.int32)
    adapter, base = adapter_of(session, dora=dora), open_base(folder_of(family))
    check_mergeable(base, list(adapter.layers))
    write_merged(base, adapter.layers, tmp_path, lambda layer: None)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad(), session.model.using(session.load(adapter).low_ranks):
        found, expected = merged(input_ids=tokens(ids)).logits[0], session.model.logits([ids], [np.arange(20)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ---- refused --------------------------------------------------------------------------------------------------------


def test_a_model_in_which_later_tokens_change_earlier_ones_is_refused(tmp_path):
    small = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = make_model(transformers.BertConfig(**small, intermediate_size=48))
    model.save_pretrained(tmp_path)
    llama = save(transformers.OlmoConfig(**small, intermediate_size=48, pad_token_id=0), tmp_path / "olmo")
    base = replace(open_base(llama), path=tmp_path, spec=describe(tmp_path, {"model_type": "bert"}))
    with pytest.raises(BaseModelError, match="is a bert in which later tokens change what comes before them"):
        TransformersSession(base)


def test_a_folder_that_lacks_a_tensor_is_refused_by_its_name(tmp_path):
    folder = shutil.copytree(folder_of("olmo2"), tmp_path / "olmo2")
    tensors = make_model(CONFIGS["olmo2"]()).state_dict()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    transformers.AutoModelForCausalLM.from_config(CONFIGS["olmo2"]()).save_pretrained(folder, state_dict=tensors)
    with pytest.raises(BaseModelError, match=r"lacks model.layers.1.mlp.up_proj.weight: it is not complete"):
        TransformersSession(open_base(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 10**9}, "n_layer is 1000000000: expected at most"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "which has no language head: expected GPT2LMHeadModel"),
        ({"n_head": 5}, "transformers cannot build a gpt2"),
        ({"model_type": "no_such_family"}, "transformers has no causal language model"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(changes, message, tmp_path):
    folder = shutil.copytree(folder_of("gpt2"), tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(BaseModelError, match=message):
        open_base(folder)


def test_without_transformers_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"the base is a gpt2, no family of Thimble's own engine.*models"):
        open_base(folder_of("gpt2"))


def test_dropout_of_a_layer_that_computes_in_a_way_of_its_own_is_refused():
    session = session_of("falcon")
    with pytest.raises(
        ConfigError, match=r"--dropout is set and transformer.h.0.self_attention.query_key_value, .* in a"
    ):
        session.start(adapter_of(session), Method(dropout=0.1))


def test_code_of_the_folder_is_never_run(tmp_path):
    """Neither that of a family that transformers knows nor that of another."""
    folder = shutil.copytree(folder_of("gpt2"), tmp_path / "gpt2")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_base(folder).spec.family == "gpt2"
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "its_own"}))
    with pytest.raises(BaseModelError):
        open_base(folder)
    assert not Path(tmp_path / "was_run").exists()
