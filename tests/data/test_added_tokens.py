"""Tokenizer files of a folder that do not all say the same: read as transformers reads them, or told."""

import json

import numpy as np
import pytest
import transformers

from fixtures.tiny_tokenizers import write_tokenizer
from stress import TINY
from stress.foreign_files import CONFIGS, write_base
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.data.model import log_base, open_model
from thimble.data.tokenizer import tokenizer_from_folder
from thimble.errors import BaseModelError
from thimble.events import EventLog, ignore
from thimble.files.peft import save_adapter
from thimble.models.base import open_base

TEXTS = [
    "", "hello there", "<|im_start|>user\nsay 12345<|im_end|>\n", "  <|im_end|>  ", "a<mark>b", "a <mark> b",
    "x <mark>\n", "<MARK>", "word<mark>word <mark>s", "<think> 1 </think>",
    "<pad><extra_1>  <extra_2>", "é\u0301<|im_end|>ﬁ",
    "<|endoftext|><|eot|>", "<tool> <image>", "amark", "\u00a0<mark>\u00a0",
]  # fmt: skip


def listed(content, **rules):
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
            "special": True, **rules}  # fmt: skip


def without(*gone):
    """Take added tokens out of tokenizer.json."""

    def change(folder, tokenizer, config):
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] not in gone]

    return change


def decoder(**tokens):
    """List further tokens in added_tokens_decoder, by `i316=...`."""

    def change(folder, tokenizer, config):
        config["added_tokens_decoder"] |= {key[1:]: token for key, token in tokens.items()}

    return change


def settings(**values):
    def change(folder, tokenizer, config):
        config |= values

    return change


def legacy(tokens, named, **values):
    """The files of older versions: no added_tokens_decoder, but added_tokens.json and special_tokens_map.json."""

    def change(folder, tokenizer, config):
        del config["added_tokens_decoder"]
        for name in ("bos_token", "eos_token", "pad_token"):
            config.pop(name, None)
        config |= values
        (folder / "added_tokens.json").write_text(json.dumps(tokens))
        (folder / "special_tokens_map.json").write_text(json.dumps(named))

    return change


MARKS = ("<|im_start|>", "<|im_end|>", "<think>")
NAMES = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "lstrip": False, "rstrip": False,
         "single_word": False, "normalized": False}}  # fmt: skip
CASES = {
    "as-written": [],
    "marks-only-in-the-config": [without(*MARKS)],
    "all-only-in-the-config": [without("<|endoftext|>", *MARKS)],
    "one-more": [decoder(i316=listed("<mark>"))],
    "left-space": [decoder(i316=listed("<mark>", lstrip=True))],
    "right-space": [decoder(i316=listed("<mark>", rstrip=True))],
    "both-spaces": [decoder(i316=listed("<mark>", lstrip=True, rstrip=True))],
    "single-word": [decoder(i316=listed("mark", single_word=True))],
    "text": [decoder(i316=listed("<mark>", special=False, normalized=True))],
    "normalised": [decoder(i316=listed("<mark>", special=False, normalized=False))],
    "other-rules-than-tokenizer-json": [decoder(i314=listed("<|im_end|>", lstrip=True, special=False))],
    "text-made-special": [decoder(i315=listed("<think>"))],
    "already-a-word": [decoder(i0=listed("!"))],
    "several-out-of-order": [decoder(i318=listed("<c>"), i316=listed("<mark>"), i317=listed("<pad>"))],
    "named-but-nowhere": [settings(pad_token="<pad>", unk_token="<mark>")],
    "additional": [settings(additional_special_tokens=["<extra_1>", "<extra_2>", "<|im_end|>"])],
    "additional-objects": [settings(additional_special_tokens=["<extra_1>", "<tool>"], pad_token="<pad>")],
    "extra": [settings(extra_special_tokens=["<extra_1>"])],
    "extra-by-name": [settings(extra_special_tokens={"image_token": "<image>", "tool_token": "<tool>"})],
    "own-names": [settings(image_token="<image>", eot_token="<|eot|>")],
    "legacy": [without(*MARKS), legacy({"<|im_start|>": 313, "<|im_end|>": 314, "<think>": 315}, NAMES)],
    "legacy-one-more": [legacy({"<mark>": 316, "</think>": 317}, NAMES)],
    "legacy-named": [legacy({}, {**NAMES, "pad_token": "<pad>", "additional_special_tokens": ["<extra_1>"]})],
    "legacy-map-rules": [legacy({}, NAMES, eos_token="<|endoftext|>")],
}  # fmt: skip


def made(folder, *changes, kind="llama-bpe"):
    write_tokenizer(kind, folder)
    paths = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    contents = [json.loads(path.read_text()) for path in paths]
    for change in changes:
        change(folder, *contents)
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2"])
@pytest.mark.parametrize("name", CASES)
def test_the_ids_are_those_of_transformers(name, kind, tmp_path):
    folder = made(tmp_path, *CASES[name], kind=kind)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), tokenizer_from_folder(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert {index for index in range(330) if ours.decode([index], True) == ""} == {
        index for index in range(330) if theirs.decode([index], skip_special_tokens=True) == ""
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([decoder(i319=listed("<mark>"))], "'<mark>' is 316, not 319"),
        ([decoder(i311=listed("<|im_end|>"))], "'<.im_end.>' is 314, not 311"),
        ([legacy({"<mark>": 400}, NAMES)], "'<mark>' is 316, not 400"),
    ],
)
def test_ids_that_contradict_each_other_are_told(changes, told, tmp_path):
    (warning,) = tokenizer_from_folder(made(tmp_path, *changes)).warnings
    assert told.replace(".", "|") in warning
    assert "copy all tokenizer files from one place" in warning


def test_what_does_not_contradict_itself_is_not_told(tmp_path):
    for name in ("as-written", "marks-only-in-the-config", "several-out-of-order", "legacy"):
        assert not tokenizer_from_folder(made(tmp_path / name, *CASES[name])).warnings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"added_tokens_decoder": ["<x>"]}, "expected an object of tokens by id"),
        ({"added_tokens_decoder": {"x": listed("<x>")}}, "the id 'x': expected a whole number"),
        ({"added_tokens_decoder": {"-1": listed("<x>")}}, "the id '-1': expected a whole number"),
        ({"added_tokens_decoder": {"99999999999": listed("<x>")}}, "expected a whole number"),
        ({"added_tokens_decoder": {"316": 7}}, "lists the added token 7: expected text, or an object with content"),
        ({"added_tokens_decoder": {"316": {"content": ""}}}, "expected text, or an object with content"),
        ({"added_tokens_decoder": {"316": listed("<x>", lstrip="yes")}}, "'<x>' with a rule that is not true or false"),
        ({"additional_special_tokens": [7]}, "lists the added token 7"),
        ({"pad_token": {"content": None}}, "expected text, or an object with content"),
    ],
)
def test_an_entry_that_is_no_token_is_refused(values, message, tmp_path):
    with pytest.raises(BaseModelError, match=message):
        tokenizer_from_folder(made(tmp_path, settings(**values)))


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [("llama", False, 1), ("llama", True, 0), ("gemma", False, 0), ("gemma", True, 1), ("llama-bpe", False, 0),
     ("llama-bpe", True, 1), ("qwen2", None, 0), ("llama", None, 0)],
)  # fmt: skip
def test_a_prefix_that_the_files_do_not_agree_on_is_told(kind, value, told, tmp_path):
    warnings = tokenizer_from_folder(made(tmp_path, settings(add_prefix_space=value), kind=kind)).warnings
    assert len(warnings) == told
    assert all("has add_prefix_space" in warning and "tokenizer.json counts here" in warning for warning in warnings)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_mark_that_the_base_does_not_know_is_refused(name, tmp_path):
    folder = write_base(tmp_path / "base", {**CONFIGS[0], "vocab_size": 316})
    made(folder, settings(**{name: "<mark>"}))
    with pytest.raises(BaseModelError, match="texts with '<mark>' as number 316, but the base knows 316: name tokens"):
        open_model(str(folder))
    made(folder, settings(pad_token="<mark>"))
    assert open_model(str(folder)).tokenizer.eos_id == 314


# --- a tokenizer beside an adapter


def with_adapter(folder, *changes):
    made(folder, *changes)
    save_adapter(
        Adapter({"model.layers.0.mlp.up_proj": Factors(np.ones((1, 8), "f4"), np.ones((8, 1), "f4"), 1.0)}), folder
    )
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([], ""),
        (
            [decoder(i316=listed("<mark>"))],
            "with tokens that the base does not have under these ids ('<mark>'): the base",
        ),
        (
            [settings(chat_template="x")],
            "with another chat template: the base's is used; copy its tokenizer files into",
        ),
        ([decoder(i316=listed("<mark>")), settings(chat_template="x")], "('<mark>') and another chat template"),
        ([settings(added_tokens_decoder=[])], "cannot be read and is not used"),
    ],
)
def test_a_tokenizer_beside_an_adapter_is_told_if_it_is_another(changes, told, tmp_path):
    adapter = with_adapter(tmp_path / "adapter", *changes)
    log = EventLog(ignore)
    log_base(open_base(TINY), log, tokenizer_from_folder(made(tmp_path / "base")), [str(adapter)])
    assert [told in warning for warning in log.messages["warning"]] == ([True] if told else [])


# --- what ends an answer


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        ({"eos_token_id": 312}, None, {312, 314}),
        ({"eos_token_id": [312, 300]}, {}, {312, 300, 314}),
        ({"eos_token_id": 312}, {"eos_token_id": 301}, {301, 314}),
        ({"text_config": {"eos_token_id": 312}}, None, {312, 314}),
        ({}, None, {314}),
    ],
)
def test_what_ends_an_answer_stands_in_the_generation_config_or_else_in_the_config(config, generation, stops, tmp_path):
    folder = made(tmp_path)
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert tokenizer_from_folder(folder).stop_ids - {312} == stops - {312}
    assert tokenizer_from_folder(folder).stop_ids >= stops


# --- chat templates


def write_templates(folder, places):
    for name, text in places.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"chat_template": text}) if name.endswith(".json") else text)


FILE, MORE = "chat_template.jinja", "additional_chat_templates"
BY_NAME = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]


@pytest.mark.parametrize(
    ("setting", "places"),
    [
        ("of the config", {}),
        ("of the config", {FILE: "of the file"}),
        ("of the config", {"chat_template.json": "of the processor"}),
        ("of the config", {FILE: "of the file", f"{MORE}/tools.jinja": "for tools"}),
        ("of the config", {FILE: "of the file", f"{MORE}/default.jinja": "the default"}),
        (BY_NAME, {}),
        (BY_NAME, {FILE: "of the file"}),
    ],
)
def test_the_chat_template_is_that_of_transformers(setting, places, tmp_path):
    folder = made(tmp_path, settings(chat_template=setting))
    write_templates(folder, places)
    theirs = transformers.AutoTokenizer.from_pretrained(folder).chat_template
    assert tokenizer_from_folder(folder).chat_template == (theirs["default"] if isinstance(theirs, dict) else theirs)


def test_a_processors_template_is_better_than_none(tmp_path):
    folder = made(tmp_path, settings(chat_template=None))
    write_templates(folder, {"chat_template.json": "of the processor"})
    assert tokenizer_from_folder(folder).chat_template == "of the processor"


# --- vocab.json and merges.txt


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast"])
@pytest.mark.parametrize("has_prefix", [False, True])
def test_vocabulary_and_merges_make_the_tokenizer_that_transformers_makes(name, has_prefix, tmp_path):
    folder = made(tmp_path, settings(tokenizer_class=name, add_prefix_space=has_prefix, bos_token="<|endoftext|>"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), tokenizer_from_folder(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, "vocab.json is damaged: expected tokens and their ids"),
        ({"vocab.json": "{}", "merges.txt": ""}, "vocab.json is damaged: expected tokens and their ids"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b c\n"}, "merges.txt, line 1: 'a b c': expected two tokens"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "cannot be used as a tokenizer"),
        ({"vocab.json": '{"a": 0}'}, r"has only vocab.json, expected tokenizer.json. Write it once with transformers"),
        ({"tekken.json": "{}"}, r"has only tekken.json, expected tokenizer.json. Write it once with transformers"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(files, message, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BaseModelError, match=message):
        tokenizer_from_folder(tmp_path)


def test_a_vocabulary_of_another_class_is_left_to_transformers(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CodeGenTokenizer"}')
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(BaseModelError, match=r"has only vocab.json, merges.txt, expected tokenizer.json"):
        tokenizer_from_folder(tmp_path)
