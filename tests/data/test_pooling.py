"""Pooling as Sentence Transformers notes it, in the forms of its releases."""

import json

import pytest

from thimble.data.pooling import pooling_of
from thimble.errors import BaseModelError


def write_notes(folder, pooling, *more):
    """A folder as `SentenceTransformer.save` leaves it, without the encoder."""
    kinds = ["Transformer", "Pooling", *more]
    modules = [
        {"idx": place, "name": str(place), "path": f"{place}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for place, kind in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8, **pooling}))
    return folder


def modes(**changes):
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {f"pooling_mode_{name}": False for name in names} | {f"pooling_mode_{name}": True for name in changes}


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (modes(cls_token=1), "first"), (modes(mean_tokens=1), "mean"), (modes(lasttoken=1), "last"),
        (modes(mean_sqrt_len_tokens=1), "mean"), ({"pooling_mode": "cls"}, "first"), ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)  # fmt: skip
def test_pooling_is_what_the_folder_notes(tmp_path, pooling, expected):
    assert pooling_of(write_notes(tmp_path / "base", pooling, "Normalize"), "base") == (expected, ())


@pytest.mark.parametrize("pooling", [modes(max_tokens=1), modes(cls_token=1, mean_tokens=1), {"pooling_mode": "new"}])
def test_other_poolings_are_the_mean_and_told(tmp_path, pooling):
    found, told = pooling_of(write_notes(tmp_path / "base", pooling), "base")
    assert found == "mean"
    assert "and here the mean is taken" in told[0]


def test_what_follows_and_what_stands_in_front_is_told(tmp_path):
    folder = write_notes(tmp_path / "base", modes(cls_token=1), "Dense", "Normalize")
    prompts = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    found, told = pooling_of(folder, "base")
    assert found == "first"
    assert "with Dense, which is left out here" in told[0]
    assert "('query: '), which are not put there" in told[1]


def test_damaged_notes_are_refused(tmp_path):
    (tmp_path / "modules.json").write_text('{"a": 1}')
    with pytest.raises(BaseModelError, match="is no list of modules"):
        pooling_of(tmp_path, "base")
