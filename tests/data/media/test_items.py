from collections import Counter
from pathlib import Path

import pytest

from thimble.data.media.items import Item, split_items


def items(**counts):
    return [
        Item(Path(f"{label}{number}"), f"{label}{number}", label, digest=f"{label}{number}")
        for label, count in counts.items()
        for number in range(count)
    ]


def test_every_label_gives_its_share():
    train, valid = split_items(items(a=60, b=30, c=10), 0.1, 0)
    assert Counter(item.label for item in valid) == {"a": 6, "b": 3, "c": 1}
    assert len(train) + len(valid) == 100


def test_the_split_depends_on_contents_and_seed_not_on_order():
    given = items(a=30, b=30)
    held = {item.source for item in split_items(given, 0.2, 0)[1]}
    assert {item.source for item in split_items(given[::-1], 0.2, 0)[1]} == held
    assert {item.source for item in split_items(given, 0.2, 1)[1]} != held


@pytest.mark.parametrize("seed", range(20))
def test_copies_land_on_one_side(seed):
    given = [Item(Path(str(n)), str(n), "ab"[n % 2], digest=str(n // 4)) for n in range(40)]
    train, valid = split_items(given, 0.25, seed)
    assert valid
    assert not {item.digest for item in train} & {item.digest for item in valid}


@pytest.mark.parametrize("seed", range(20))
def test_clips_of_one_text_land_on_one_side_where_most_texts_differ(seed):
    given = [Item(Path(str(n)), str(n), text=f"text {n % 25}", digest=str(n)) for n in range(40)]
    train, valid = split_items(given, 0.2, seed)
    assert valid
    assert not {item.text for item in train} & {item.text for item in valid}


def test_few_texts_that_recur_may_be_on_both_sides():
    given = [Item(Path(str(n)), str(n), text=("yes", "no")[n % 2], digest=str(n)) for n in range(40)]
    assert {item.text for item in split_items(given, 0.2, 0)[1]} == {"yes", "no"}


def test_a_class_keeps_something_to_learn_from():
    train, _ = split_items(items(a=20, b=1), 0.5, 0)
    assert Counter(item.label for item in train)["b"] == 1
    train, valid = split_items([Item(Path("x"), f"{n}", "a", digest="same") for n in range(5)], 0.5, 0)
    assert (len(train), len(valid)) == (5, 0)


def test_a_small_class_is_measured_while_there_is_room():
    _, valid = split_items(items(a=90, b=4), 0.1, 0)
    assert Counter(item.label for item in valid)["b"] == 1


def test_no_share_holds_nothing_out():
    assert split_items(items(a=9), 0, 0)[1] == []
