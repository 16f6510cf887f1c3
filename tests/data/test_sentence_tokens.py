"""Texts as encoders read them: the ids of transformers, cut at the model's length, in batches with little padding."""

import json

import numpy as np
import pytest

from encoders import write_tokenizer
from thimble.data.sentence_tokens import SentenceTokenizer, TokenCounts, even_batches

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "the", "cat", "##s", "sat", ".", "e"]


@pytest.fixture
def bert(tmp_path):
    return write_tokenizer(tmp_path, WORDS)


CONFIG = {"model_type": "bert", "max_position_embeddings": 12, "type_vocab_size": 2, "pad_token_id": 0}
TEXTS = [
    "The cats sat.", "the", "", "  a\tb ", "zebra the é", "[SEP] cat", "sat " * 40, "cat" * 200, "a.b.c", "THE CAT"
]  # fmt: skip


def test_ids_and_kinds_are_those_of_transformers(bert):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(bert)
    ours, counts = SentenceTokenizer(bert, CONFIG), TokenCounts()
    for inputs in ([(text,) for text in TEXTS], list(zip(TEXTS, TEXTS[::-1], strict=True))):
        expected = theirs(*map(list, zip(*inputs, strict=True)), truncation=True, max_length=12)
        found = ours.encode(inputs, counts)
        assert [row.ids.tolist() for row in found] == expected["input_ids"]
        if len(inputs[0]) == 2:
            assert [row.kinds.tolist() for row in found] == expected["token_type_ids"]
        padded = ours.padded(found)
        theirs_padded = theirs.pad(expected, return_tensors="np")
        for name, values in padded.items():
            np.testing.assert_array_equal(values, theirs_padded[name])


def test_what_is_cut_and_what_is_unknown_is_counted(bert):
    ours, counts = SentenceTokenizer(bert, CONFIG), TokenCounts()
    ours.encode([("the cat",), ("sat " * 40,), ("zebra",)], counts)
    assert (counts.texts, counts.cut, counts.unknown) == (3, [30], 1)
    cut, unknown = counts.told(12)
    assert cut == "1 text of 3 (33.3%) longer than 12 tokens lost 30 tokens in all at the end"
    assert unknown.startswith("5.3% of the tokens are unknown")
    quiet = TokenCounts()
    ours.encode([("the cat",)], quiet)
    assert quiet.told(12) == []


def test_the_least_of_all_lengths_counts(bert):
    assert SentenceTokenizer(bert, CONFIG).most_tokens == 12
    assert SentenceTokenizer(bert, CONFIG, most_tokens=8).most_tokens == 8
    assert SentenceTokenizer(bert, {}).most_tokens == 512
    roberta = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert SentenceTokenizer(bert, roberta | {"max_position_embeddings": 24}).most_tokens == 22
    (bert / "sentence_bert_config.json").write_text('{"max_seq_length": 10}')
    assert SentenceTokenizer(bert, CONFIG).most_tokens == 10


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, 0), ({"pad_token_id": 7}, 7), ({"pad_token_id": None, "eos_token_id": 3}, 0), ({"eos_token_id": [3, 4]}, 0)],
)
def test_rows_are_filled_up_with_what_the_model_knows_as_padding(bert, config, expected):
    assert SentenceTokenizer(bert, config).pad_id == expected


def test_without_padding_rows_are_filled_up_with_the_end(bert):
    file = bert / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": None}))
    assert SentenceTokenizer(bert, {"eos_token_id": 3}).pad_id == 3
    assert SentenceTokenizer(bert, {"eos_token_id": [3, 4]}).pad_id == 3


def test_batches_hold_each_row_once_with_hardly_any_padding():
    drawn = np.random.default_rng(0)
    lengths = np.clip(drawn.lognormal(2.5, 0.8, 300), 3, 128).astype(int).tolist()
    batches = even_batches(lengths, 1024)
    assert sorted(number for batch in batches for number in batch) == list(range(300))
    padded = [len(batch) * max(lengths[number] for number in batch) for batch in batches]
    assert max(padded) <= 1024
    assert sum(padded) < 1.15 * sum(lengths)
    assert len(batches) < 30
    assert batches == even_batches(lengths, 1024)


def test_a_row_longer_than_a_batch_may_be_is_alone():
    assert even_batches([5, 2000, 6], 1024) == [[1], [2, 0]]
    assert even_batches([], 1024) == []
