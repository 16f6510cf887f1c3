import json
import os
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from thimble.data import gguf_vocab
from thimble.data.gguf_vocab import byte_level_alphabet, merges_from_scores, rust_faults
from thimble.data.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from thimble.errors import BaseModelError
from thimble.files.tensors import open_tensors

HERE = Path(__file__).parent
TEXTS = json.loads((HERE / "sample_texts.json").read_text())
SMOLLM_IDS = json.loads((HERE / "sample_ids_smollm.json").read_text())  # written by transformers
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def byte_level_file(pre="smollm", merges=(), specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), **more):
    """Metadata of a GGUF file with 256 bytes, the tokens the merges make, and special tokens."""
    merged = ["".join(merge.split(" ")) for merge in merges]
    tokens = [*sorted(byte_level_alphabet()), *merged, *specials]
    types = [NORMAL] * (256 + len(merged)) + [CONTROL] * len(specials)
    eos = {"eos_token_id": tokens.index("<|im_end|>")} if "<|im_end|>" in specials else {}
    values = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": list(merges), "token_type": types, **eos, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def sentencepiece_file(words=("▁a", "ab", "▁"), **more):
    letters = list("abcdefgh")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(words) + len(letters))
    scores = [0.0] * 259 + [-float(index) for index in range(len(words) + len(letters))]
    values = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def test_smollm_encodes_as_transformers_did(smollm):
    for text, ids in zip(TEXTS, SMOLLM_IDS, strict=True):
        assert smollm.encode(text) == ids
        assert smollm.decode(ids) == text


@pytest.mark.slow
def test_smollm_encodes_as_transformers_does(smollm, smollm_file):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(smollm_file.parent, gguf_file=smollm_file.name)
    for text in [*TEXTS, "\n".join(TEXTS), smollm.chat_template]:
        assert smollm.encode(text) == oracle(text, add_special_tokens=False).input_ids
        assert (
            smollm.encode(text, special=False)
            == oracle(text, add_special_tokens=False, split_special_tokens=True).input_ids
        )


@pytest.mark.slow
def test_smollm_loads_well_under_half_a_second(smollm_file):
    def load():
        begin = time.process_time()
        tokenizer_from_gguf(open_tensors(smollm_file).metadata)
        return time.process_time() - begin

    assert min(load() for _ in range(3)) < 0.5


def test_smollm_knows_its_special_tokens(smollm):
    assert smollm.vocab_size == 49152
    assert (smollm.bos_token, smollm.bos_id) == ("<|im_start|>", 1)
    assert (smollm.eos_token, smollm.eos_id) == ("<|im_end|>", 2)
    assert smollm.stop_ids == {0, 2}
    assert len(smollm.special_ids) == 17
    assert not smollm.add_bos
    assert "add_generation_prompt" in smollm.chat_template


def test_every_kind_of_number_stands_alone_in_smollm(smollm):
    """transformers forgets the digit splitting of this vocabulary when it reads GGUF; its tokenizer.json has it."""
    oracle = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    words = [word for word, _ in oracle.pre_tokenize_str("½ ² Ⅷ٣ a12")]
    alphabet = byte_level_alphabet()
    pieces = [bytes(alphabet[c] for c in word).decode() for word in words]
    assert smollm.encode("½ ² Ⅷ٣ a12") == [index for piece in pieces for index in smollm.encode(piece)]


@pytest.mark.parametrize(
    ("file", "kind"),
    [("smollm2", "smollm"), ("llama3_rope", "llama-bpe"), ("qwen2", "qwen2"), ("phi3_partial_rope", "gpt-4o"),
     ("llama", "llama"), ("phi3", "phi3"), ("gemma2", "gemma")],
)  # fmt: skip
def test_gguf_and_folder_of_one_model_encode_alike(file, kind, tiny, write_tokenizer, tmp_path):
    write_tokenizer(kind, tmp_path)
    from_gguf, from_folder = tiny(file), tokenizer_from_folder(tmp_path)
    # llama.cpp drops white space behind special tokens if the model is called Phi-3.
    for text in (text.replace("<|", "(") if file.startswith("phi3") else text for text in TEXTS):
        assert from_gguf.encode(text) == from_folder.encode(text)
        assert from_gguf.encode(text, special=False) == from_folder.encode(text, special=False)
        assert from_gguf.decode(from_gguf.encode(text)) == from_folder.decode(from_folder.encode(text)) == text
    assert (from_gguf.eos_id, from_gguf.add_bos) == (from_folder.eos_id, from_folder.add_bos)
    assert from_gguf.stop_ids == from_folder.stop_ids


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "123", ["1", "2", "3"]),
        ("gpt-2", "123", ["123"]),
        ("llama-bpe", "12312", ["123", "12"]),
        ("qwen2", "123", ["1", "2", "3"]),
        ("smaug-bpe", "12312", ["123", "12"]),
        ("tekken", "aB1", ["a", "B", "1"]),
        ("gpt-4o", "aB12", ["a", "B", "12"]),
        ("llama-bpe", "aB", ["aB"]),
        ("qwen2", "(a", ["(a"]),
        ("starcoder", "(a", ["(", "a"]),
        ("deepseek-llm", "a1", ["a", "1"]),
        ("deepseek-v3", "(a", ["(a"]),
        ("qwen35", "a\u0301", ["a\u0301"]),
        ("qwen2", "a\u0301", ["a", "\u0301"]),
        ("default", "12312", ["123", "12"]),
        (None, "12312", ["123", "12"]),
    ],
)
def test_the_named_pattern_decides_which_bytes_may_merge(pre, text, pieces):
    accent = "".join(next(c for c, b in byte_level_alphabet().items() if b == byte) for byte in "\u0301".encode())
    merges = ["1 2", "12 3", "123 1", "a B", "( a", "a 1", f"{accent[0]} {accent[1]}", f"a {accent}"]
    tokenizer = tokenizer_from_gguf(byte_level_file(pre, merges))
    assert [tokenizer.piece(index) for index in tokenizer.encode(text)] == pieces


def test_llama3_takes_a_whole_word_that_is_a_token_though_no_merge_leads_there():
    merges = ["o o"]
    words = {"merges": merges, "tokens": [*sorted(byte_level_alphabet()), "oo", "foo"], "token_type": None}
    assert len(tokenizer_from_gguf(byte_level_file("llama-bpe", specials=(), **words)).encode("foo")) == 1
    assert len(tokenizer_from_gguf(byte_level_file("qwen2", specials=(), **words)).encode("foo")) == 2


def test_special_tokens_in_a_text_are_plain_text_if_asked_for(smollm):
    text = "a<|im_end|>b"
    assert smollm.encode(text)[1] == 2
    plain = smollm.encode(text, special=False)
    assert 2 not in plain
    assert smollm.decode(plain) == text
    assert smollm.encode(text)[1] == 2, "asking for plain text must not change later calls"


def test_control_looking_tokens_are_special_even_if_the_file_calls_them_text():
    file = byte_level_file()
    file["tokenizer.ggml.token_type"] = [NORMAL] * 259
    tokenizer = tokenizer_from_gguf(file)
    assert tokenizer.encode("<|im_end|>") == [258]
    assert tokenizer.stop_ids >= {258}


def test_decoding_can_leave_special_tokens_out(smollm):
    ids = smollm.encode("<|im_start|>Hi<|im_end|>")
    assert smollm.decode(ids) == "<|im_start|>Hi<|im_end|>"
    assert smollm.decode(ids, skip_special=True) == "Hi"


def test_pieces_of_a_text_join_to_the_text_byte_by_byte(smollm, tiny):
    for tokenizer, text in (
        (smollm, " 😀 naïve<|im_end|>"),
        (tiny("llama"), "😀 naïve</s>"),
        (tiny("gemma2"), " a 😀"),
    ):
        joined = b"".join(tokenizer.piece_bytes(index) for index in tokenizer.encode(text))
        assert joined.decode().removeprefix("" if text.startswith(" ") else " ") == text


def test_part_of_a_character_is_a_replacement_character(smollm):
    assert smollm.piece(smollm.encode("𐍈")[0]) == "\ufffd"


def test_an_id_outside_the_vocabulary_has_no_piece(smollm):
    with pytest.raises(IndexError, match="49152.*49,152 tokens"):
        smollm.piece(49152)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "qwen2"])
def test_consecutive_pieces_have_no_space_between_them(tiny, name):
    tokenizer = tiny(name)
    pieces = ["You are", " here", "now", "\nand there", "", "the end"]
    ids = [index for part in tokenizer.encode_pieces(pieces) for index in part]
    assert tokenizer.decode(ids) == "".join(pieces)


def test_a_piece_behind_a_special_token_is_encoded_as_there(tiny):
    llama = tiny("llama")
    head, tail = llama.encode_pieces(["a</s>", "the"])
    assert head + tail == llama.encode("a</s>the")
    assert head + tail != llama.encode("a</s>") + llama.encode_pieces(["a", "the"])[1]


@pytest.mark.parametrize(("pre", "is_told"), [("qwen2", False), ("default", False), (None, True), ("", True)])
def test_a_file_that_does_not_say_how_text_is_cut_is_told(pre, is_told):
    key = "tokenizer.ggml.pre"
    file = {name: value for name, value in {**byte_level_file(), key: pre}.items() if value is not None}
    told = tokenizer_from_gguf(file, "old.gguf").warnings
    assert [
        text.startswith(f"old.gguf does not say how text is cut before tokens are made of it ({key}") for text in told
    ] == ([True] if is_told else [])


def test_sentencepiece_joins_the_neighbours_of_the_highest_score_first():
    tokens, scores = ["a", "b", "c", "ab", "bc"], [0.0, 0.0, 0.0, -2.0, -1.0]
    assert merges_from_scores(tokens, scores, [NORMAL] * 5) == [("b", "c"), ("a", "b")]
    assert merges_from_scores(tokens, scores, [NORMAL, NORMAL, NORMAL, NORMAL, CONTROL]) == [("a", "b")]


def test_sentencepiece_falls_back_to_bytes():
    tokenizer = tokenizer_from_gguf(sentencepiece_file())
    ids = tokenizer.encode("a é")
    assert tokenizer.decode(ids) == "a é"
    assert [tokenizer.piece_bytes(index) for index in ids[-2:]] == [b"\xc3", b"\xa9"]
    assert tokenizer.add_bos
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_no_space_is_put_in_front_if_the_file_says_so():
    spaced, bare = (tokenizer_from_gguf(sentencepiece_file(add_space_prefix=value)) for value in (True, False))
    assert [spaced.piece(index) for index in spaced.encode("a")] == [" a"]
    assert [bare.piece(index) for index in bare.encode("a")] == ["a"]


def test_special_tokens_of_phi3_swallow_the_line_break_behind_them():
    words = {"general.name": "Phi-3 mini"} | byte_level_file()
    assert tokenizer_from_gguf(words).encode("<|im_end|>\n") == [258]
    assert len(tokenizer_from_gguf(byte_level_file()).encode("<|im_end|>\n")) == 2


def test_empty_and_repeated_tokens_get_names_of_their_own():
    file = byte_level_file()
    file["tokenizer.ggml.tokens"] += ["", "", "<|im_end|>"]
    file["tokenizer.ggml.token_type"] += [NORMAL] * 3
    assert tokenizer_from_gguf(file).vocab_size == 262


def test_end_of_message_stops_a_model_of_channels_but_end_of_channel_does_not():
    tokenizer = tokenizer_from_gguf(byte_level_file(specials=("<|end|>", "<|return|>", "<|call|>")))
    assert tokenizer.stop_ids == {257, 258}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "has no tokenizer: tokenizer.ggml.tokens is missing"),
        ({"model": None}, "has no tokenizer: tokenizer.ggml.model is missing"),
        ({"model": "bert"}, "kind 'bert': expected one of gpt2, llama, gemma4"),
        ({"pre": "martian"}, "tokenizer.ggml.pre is 'martian', expected one of .*smollm"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["Q zzz"]}, "vocabulary and merges do not fit together"),
        ({"token_type": [1, 2]}, "token_type has 2 entries, expected one for each of the 259 tokens"),
        ({"eos_token_id": 999_999}, "eos_token_id is 999999, expected an id below 259"),
        ({"model": "llama"}, "scores has 0 entries, expected one for each of the 259 tokens"),
        ({"model": ["gpt2"]}, "kind ..gpt2..: expected one of gpt2"),
        ({"pre": ["smollm"]}, "pre is ..smollm.., expected one of"),
        ({"tokens": 7}, "tokens is 7, expected an array of str"),
        ({"tokens": [1, 2]}, "tokens is .1, 2., expected an array of str"),
        ({"tokens": []}, "a vocabulary of 0 tokens"),
        ({"tokens": ["a" * 2000] * 259}, "the longest 2,000: expected 1 to 1,048,576 tokens of at most 1,024"),
        ({"merges": "a b"}, "merges is 'a b', expected an array of str"),
        ({"merges": [1]}, "merges is .1., expected an array of str"),
        ({"token_type": ["1"] * 259}, "token_type is .*, expected an array of int"),
        ({"eos_token_id": "7"}, "eos_token_id is '7', expected an id below 259"),
        ({"bos_token_id": 1.5}, "bos_token_id is 1.5, expected an id below 259"),
        ({"bos_token_id": -1}, "bos_token_id is -1, expected an id below 259"),
    ],
)
def test_a_damaged_or_unknown_vocabulary_is_refused_by_name(changes, message):
    base = byte_level_file()
    file = base | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(BaseModelError, match=message) as caught:
        tokenizer_from_gguf({key: value for key, value in file.items() if value is not None}, "base.gguf")
    assert str(caught.value).startswith("base.gguf ")


# --- folders


@pytest.fixture
def folder(tmp_path):
    inner = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(byte_level_alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", "<|im_end|>")])
    inner.enable_truncation(3)
    inner.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, bos_token="<s>", eos_token={"content": "</s>"}, chat_template="of the config")
    return tmp_path


def write_config(folder, **values):
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def test_a_folder_gives_tokens_by_name_and_by_object(folder):
    tokenizer = tokenizer_from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_token) == (256, 257, "</s>")
    assert tokenizer.stop_ids == {257, 258}
    assert not tokenizer.add_bos
    assert tokenizer.encode("far too long") == tokenizer.encode("far ") + tokenizer.encode("too long"), "truncation"


def test_a_folder_says_whether_texts_begin_with_bos(folder):
    write_config(folder, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    assert tokenizer_from_folder(folder).add_bos
    write_config(folder, eos_token="</s>", add_bos_token=True)
    assert not tokenizer_from_folder(folder).add_bos, "there is no such token"


def test_stop_tokens_of_the_generation_config_count(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 7]}')
    assert tokenizer_from_folder(folder).stop_ids == {257, 258, 7}
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert tokenizer_from_folder(folder).stop_ids == {257, 258, 7}


def test_the_first_stop_token_ends_documents_if_no_other_is_named(folder):
    write_config(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 7]}')
    assert tokenizer_from_folder(folder).eos_token == "</s>"


def test_older_folders_keep_special_tokens_in_a_map_of_their_own(folder):
    write_config(folder)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert tokenizer_from_folder(folder).eos_id == 257


def test_the_template_file_goes_before_the_config(folder):
    assert tokenizer_from_folder(folder).chat_template == "of the config"
    (folder / "chat_template.jinja").write_text("of the file")
    assert tokenizer_from_folder(folder).chat_template == "of the file"


def test_the_default_of_several_templates_is_taken(folder):
    templates = [{"name": "tool_use", "template": "for tools"}, {"name": "default", "template": "for all"}]
    write_config(folder, chat_template=templates)
    assert tokenizer_from_folder(folder).chat_template == "for all"
    assert tokenizer_from_folder(folder).tool_template == "for tools"
    write_config(folder, chat_template="for all")
    assert tokenizer_from_folder(folder).tool_template is None
    write_config(folder)
    assert tokenizer_from_folder(folder).chat_template is None


def test_templates_in_files_of_their_own_are_read_by_name(folder):
    (folder / "chat_template.jinja").write_text("for all")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    tokenizer = tokenizer_from_folder(folder)
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("for all", "for tools")


def test_a_gguf_file_has_a_template_for_tools_under_the_key_of_llama_cpp(smollm_file):
    metadata = {**open_tensors(smollm_file).metadata, "tokenizer.chat_template.tool_use": "for tools"}
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.tool_template == "for tools"
    assert tokenizer.chat_template == metadata["tokenizer.chat_template"]


def test_several_templates_none_of_which_is_the_default_are_told(folder):
    write_config(folder, chat_template=[{"name": name, "template": f"for {name}"} for name in ("rag", "story")])
    tokenizer = tokenizer_from_folder(folder)
    assert tokenizer.chat_template == "for rag"
    assert "chat templates rag, story and none called default: rag is used" in tokenizer.warnings[0]


def test_plain_text_knows_the_added_tokens_of_a_folder_by_the_same_ids(folder):
    tokenizer = tokenizer_from_folder(folder)
    assert 258 in tokenizer.encode("a<|im_end|>")
    assert max(tokenizer.encode("a<|im_end|>", special=False)) < 256


@pytest.mark.slow
def test_a_folder_encodes_as_transformers_does(smollm_file, tmp_path):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(smollm_file.parent, gguf_file=smollm_file.name)
    oracle.save_pretrained(tmp_path)
    tokenizer = tokenizer_from_folder(tmp_path)
    assert tokenizer.chat_template == oracle.chat_template
    assert (tokenizer.eos_id, tokenizer.bos_id) == (oracle.eos_token_id, oracle.bos_token_id)
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle(text, add_special_tokens=False).input_ids


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match=r"has no tokenizer: expected tokenizer\.json beside the weights"):
        tokenizer_from_folder(tmp_path)


def test_a_folder_with_only_a_sentencepiece_file_says_how_to_convert_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(BaseModelError, match=r"only tokenizer\.model.*save_pretrained"):
        tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is damaged.*Expected JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object, found list"),
        ("tokenizer_config.json", '{"a": 1, "a": 2}', "a key occurs twice, 'a'"),
        ("special_tokens_map.json", '{"a": NaN}', "NaN is not a number"),
        ("chat_template.json", "[" * 100_000, "nested too deeply"),
        ("chat_template.json", '{"chat_template": 7}', "has a chat template 7: expected text"),
        ("tokenizer_config.json", '{"chat_template": {"a": "b"}}', "has a chat template .*: expected text"),
        ("chat_template.jinja", "\xff", r"chat_template\.jinja is not UTF-8 at byte 0"),
        ("chat_template.jinja", "x" * 1_000_001, r"chat_template\.jinja is larger than 1,000,000 bytes"),
        ("generation_config.json", '{"eos_token_id": "7"}', "eos_token_id '7': expected an id, or a list of them"),
        ("generation_config.json", '{"eos_token_id": [[7]]}', "eos_token_id ..7..: expected an id"),
        ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id -1: expected an id"),
        ("generation_config.json", '{"eos_token_id": 9223372036854775808}', "eos_token_id 9223372036854775808: exp"),
        ("tokenizer.json", '{"model":' * 100_000, r"tokenizer\.json cannot be read as a tokenizer"),
        ("generation_config.json", "\xff", r"generation_config\.json is damaged"),
    ],
)
def test_a_damaged_file_in_a_folder_is_named(folder, name, content, message):
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(BaseModelError, match=message):
        tokenizer_from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                  "generation_config.json", "chat_template.jinja", "chat_template.json"])  # fmt: skip
@pytest.mark.parametrize(("kind", "make"), [("a pipe", os.mkfifo), ("a directory", os.mkdir)])
def test_what_is_no_file_is_refused_without_waiting_for_it(folder, name, kind, make):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(BaseModelError, match=f"{name} is {kind}: expected a file"):
        tokenizer_from_folder(folder)


def test_a_tokenizer_without_end_is_not_read(folder):
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BaseModelError, match=r"tokenizer.json is larger than 128,000,000 bytes"):
        tokenizer_from_folder(folder)


def test_a_template_may_link_into_the_cache_of_the_hub_client_and_nowhere_else(folder, tmp_path_factory):
    model = folder / "models--owner--name"
    snapshot = model / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "0123").write_text("of the cache")
    for path in folder.glob("*.json"):
        (snapshot / path.name).symlink_to(path)
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/0123")
    assert tokenizer_from_folder(snapshot).chat_template == "of the cache"
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("root:x:0:0")
    (snapshot / "chat_template.jinja").unlink()
    (snapshot / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(BaseModelError, match="links to .*secret.: expected a file of the same folder"):
        tokenizer_from_folder(snapshot)


def test_a_tokenizer_that_leaves_out_merges_at_random_is_refused(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.5
    path.write_text(json.dumps(content))
    with pytest.raises(BaseModelError, match="leaves out merges at random"):
        tokenizer_from_folder(folder)


def test_a_panic_in_the_rust_package_is_an_error_of_ours():
    class PanicException(BaseException):
        """As the package raises it: no Exception."""

    with pytest.raises(BaseModelError, match="x.json cannot be read: index out of bounds. Copy it again"):
        with rust_faults("x.json cannot be read", "Copy it again."):
            raise PanicException("index out of bounds")
    for ours in (KeyboardInterrupt, SystemExit):
        with pytest.raises(ours), rust_faults("x", "y"):
            raise ours


def test_a_real_panic_in_the_rust_package_is_an_error_of_ours(folder, capfd):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}
    path.write_text(json.dumps(content))
    with pytest.raises(BaseModelError, match="tokenizer"):
        tokenizer_from_folder(folder).encode("a text")


def test_a_token_that_only_looks_like_a_byte_is_text():
    assert gguf_vocab.byte_of("<0x0A>") == b"\n"
    assert [gguf_vocab.byte_of(token) for token in ("<0xZZ>", "<0x 1>", "<0x-1>", "<0x1_>")] == [None] * 4


def test_a_long_token_does_not_take_the_square_of_its_length():
    file = sentencepiece_file()
    file["tokenizer.ggml.tokens"][-1] = "a" * 1_000_000
    began = time.process_time()
    with pytest.raises(BaseModelError, match="the longest 1,000,000: expected 1 to"):
        tokenizer_from_gguf(file)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("template", [7, ["x"], "x" * 1_000_001])
def test_a_template_in_a_gguf_is_text_of_some_length(template):
    with pytest.raises(BaseModelError, match="has a chat template"):
        tokenizer_from_gguf({**byte_level_file(), "tokenizer.chat_template": template})


def test_a_bare_tokenizer_needs_no_ids_at_all():
    inner = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    tokenizer = Tokenizer(inner, bos_id=None, eos_id=None, add_bos=True)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.stop_ids, tokenizer.add_bos) == ("", "", set(), False)
