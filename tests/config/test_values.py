"""Values of options as people, YAML and Python write them."""

import pytest

from thimble.config import values


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4e9), ("500 MB", 5e8), ("1GiB", 2**30), ("50000", 5e4), ("1.5kb", 1500)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert values.parse_size(text) == size


@pytest.mark.parametrize(
    "value", ["q_proj=8,mlp=32", ["q_proj=8", "mlp=32"], {"q_proj": 8, "mlp": 32}, " q_proj=8, mlp=32 "]
)
def test_several_values_are_read_from_text_a_list_or_a_mapping(value):
    assert values.parse(tuple[str, ...], value) == ("q_proj=8", "mlp=32")


def test_init_auto_is_refused_with_what_to_type():
    wrong = values.init("auto")
    assert "--init kaiming" in wrong
    assert "thimble inspect --data DATA" in wrong
    assert "does not foretell" in wrong


@pytest.mark.parametrize(
    ("check", "value", "wrong"),
    [
        (values.init, "pissa:exact", None),
        (values.init, "adapter:runs/mine-1", None),
        (values.init, "adapter", "adapter:PATH"),
        (values.init, "pisa", "did you mean pissa?"),
        (values.pattern, ["q_proj"], "expected pairs such as q_proj=8"),
        (values.pattern, ["q_proj=2.5"], None),
        (values.rank_pattern, ["q_proj=2.5"], "expected whole numbers as ranks"),
        (values.share, 1, None),
        (values.share, 0.0, "expected a share above 0 and up to 1"),
        (values.fraction, 0, None),
        (values.fraction, 1.0, "up to, but not including, 1"),
        (values.alpha, 1e5, "at most 10000"),
    ],
)
def test_a_check_says_what_was_expected(check, value, wrong):
    said = check(value)
    assert said is None if wrong is None else wrong in said


def test_names_may_come_as_the_set_that_peft_makes_of_them():
    assert values.parse(tuple[str, ...], {"v_proj", "q_proj"}) == ("q_proj", "v_proj")
