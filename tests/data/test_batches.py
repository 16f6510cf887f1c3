import numpy as np
import pytest

from thimble.data.batches import epoch_steps, lay_out, micro_batches, pack, shares
from thimble.data.encode import IGNORED, Row

LENGTHS = [int(length) for length in np.random.default_rng(0).integers(1, 50, 200)]


def row(*ids, learned=1):
    ids = np.array(ids, np.int32)
    labels = np.append(ids[1:], IGNORED).astype(np.int32)
    labels[: len(ids) - 1 - learned] = IGNORED
    return Row(ids, labels, "line")


def of_length(length):
    return row(*range(length))


def test_every_row_stands_in_exactly_one_step():
    steps = epoch_steps(LENGTHS, 100, seed=0, epoch=0)
    assert sorted(index for step in steps for index in step) == list(range(200))


def test_steps_are_filled_until_the_next_row_would_not_fit():
    steps = epoch_steps(LENGTHS, 100, seed=0, epoch=0)
    sizes = [sum(LENGTHS[index] for index in step) for step in steps]
    assert max(sizes) <= 100
    firsts = [LENGTHS[step[0]] for step in steps[1:]]
    assert all(size + following > 100 for size, following in zip(sizes, firsts, strict=False))


def test_a_row_longer_than_a_step_makes_a_step_of_its_own():
    assert sorted(epoch_steps([500, 3, 500], 100, seed=0, epoch=0)) == [[0], [1], [2]]


def test_the_order_depends_on_seed_and_epoch_alone():
    first = epoch_steps(LENGTHS, 100, seed=3, epoch=1)
    assert first == epoch_steps(LENGTHS, 100, seed=3, epoch=1)
    assert first != epoch_steps(LENGTHS, 100, seed=3, epoch=2)
    assert first != epoch_steps(LENGTHS, 100, seed=4, epoch=1)


def test_the_order_is_the_same_on_every_machine():
    assert epoch_steps([1] * 6, 2, seed=0, epoch=0) == [[0, 2], [1, 5], [4, 3]]


def test_no_rows_make_no_steps():
    assert epoch_steps([], 100, seed=0, epoch=0) == []


def test_packed_rows_lie_end_to_end():
    batch = pack([row(1, 2, 3), row(4, 5)])
    assert batch.ids.tolist() == [1, 2, 3, 4, 5]
    assert batch.labels.tolist() == [IGNORED, 3, IGNORED, 5, IGNORED]
    assert batch.starts.tolist() == [0, 3, 5]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert (batch.tokens, batch.target_tokens) == (5, 2)
    assert (batch.ids.dtype, batch.labels.dtype, batch.positions.dtype) == (np.int32,) * 3
    assert batch.starts.dtype == np.int64


def test_no_label_reaches_into_the_next_row():
    batch = pack([of_length(5), of_length(7)])
    assert (batch.labels[batch.starts[1:] - 1] == IGNORED).all()


@pytest.mark.parametrize("max_tokens", [50, 64, 100, 1000, 10_000])
def test_micro_batches_hold_all_rows_and_no_more_tokens_than_allowed(max_tokens):
    rows = [of_length(length) for length in LENGTHS]
    batches = micro_batches(rows, max_tokens)
    assert max(batch.tokens for batch in batches) <= max_tokens
    lengths = sorted(length for batch in batches for length in np.diff(batch.starts))
    assert lengths == sorted(LENGTHS)


def test_micro_batches_are_about_the_same_size():
    sizes = [batch.tokens for batch in micro_batches([of_length(length) for length in LENGTHS], 1000)]
    assert max(sizes) - min(sizes) < 50
    assert len(sizes) == -(-sum(LENGTHS) // 1000)


def test_a_row_is_never_split():
    batches = micro_batches([of_length(300), of_length(10), of_length(20)], 100)
    assert sorted(np.diff(batch.starts).tolist() for batch in batches) == [[10, 20], [300]]


def test_the_split_does_not_change_what_is_learned():
    rows = [of_length(length) for length in LENGTHS]
    whole = pack(rows).target_tokens
    assert all(sum(b.target_tokens for b in micro_batches(rows, size)) == whole for size in (60, 500))


def test_shares_are_even_and_hold_every_row_once():
    rows = [of_length(length) for length in LENGTHS]
    split = shares(rows, 3, 100)
    sizes = [sum(batch.tokens for batch in share) for share in split]
    assert len(split) == 3
    assert max(sizes) - min(sizes) < 20
    assert max(batch.tokens for share in split for batch in share) <= 100
    lengths = sorted(length for share in split for batch in share for length in np.diff(batch.starts))
    assert lengths == sorted(LENGTHS)


def test_no_share_is_empty_when_there_are_few_rows():
    assert [len(share) for share in shares([of_length(5), of_length(9)], 4, 100)] == [1, 1]


def test_two_shares_are_as_even_as_they_can_be():
    lengths = [80, 70, 60, 50, 40]  # the longest first to the lighter share would give 170 and 130
    found = shares([of_length(length) for length in lengths], 2, 1000)
    assert [sum(batch.tokens for batch in share) for share in found] == [150, 150]
    pairs = [shares([of_length(length) for length in pair], 2, 1000) for pair in ([1, 400], [7, 7])]
    assert all(len(share) == 1 for pair in pairs for share in pair)


# ---- shared prefixes ------------------------------------------------------------------------------------------------


def of_group(group, prefix, own, learned=1):
    """A row that begins as the others of its group do, and goes on as no other."""
    first = 100_000 * (group + 1)
    return row(*range(first, first + prefix), *range(next_own := 10_000 * own[0], next_own + own[1]), learned=learned)


GROUPED = [of_group(number % 2, 300, (number, 150)) for number in range(8)]  # two groups of four rows


def computed_tokens(batch):
    return len(lay_out(batch, shares_prefixes=True).places)


def test_rows_that_begin_alike_come_together():
    batches = micro_batches(GROUPED, 900, shares_prefixes=True)
    assert [computed_tokens(batch) for batch in batches] == [900, 900]
    assert sorted(number for batch in batches for number in batch.numbers) == list(range(8))
    assert len(micro_batches(GROUPED, 900)) == 4


def test_shares_take_a_group_each_where_that_is_less_work():
    first, second = shares(GROUPED, 2, 1024, shares_prefixes=True)
    assert [computed_tokens(*share) for share in (first, second)] == [900, 900]


def test_rows_that_share_nothing_are_split_as_ever():
    rows = [of_group(number, 20, (number, length)) for number, length in enumerate(LENGTHS[:40])]
    plain = [[batch.numbers.tolist() for batch in share] for share in shares(rows, 2, 200)]
    assert [[b.numbers.tolist() for b in share] for share in shares(rows, 2, 200, shares_prefixes=True)] == plain


def test_no_batch_computes_more_tokens_than_it_may():
    random = np.random.default_rng(0)
    rows = [of_group(random.integers(4), random.integers(10, 60), (n, random.integers(1, 40))) for n in range(100)]
    batches = micro_batches(rows, 200, shares_prefixes=True)
    assert max(map(computed_tokens, batches)) <= 200
    assert sorted(number for batch in batches for number in batch.numbers) == list(range(100))


def test_a_prefix_ends_before_the_first_label_of_any_row():
    rows = [of_group(0, 100, (number, 20), learned) for number, learned in enumerate((1, 60))]
    layout = lay_out(pack(rows), shares_prefixes=True)
    assert [tuple(segment) for segment in layout.segments] == [(0, 59, 0, 0), (59, 120, 0, 59), (120, 181, 0, 59)]
    assert np.count_nonzero(pack(rows).labels[layout.places] != IGNORED) == 61
    np.testing.assert_array_equal(pack(rows).ids[layout.places][layout.copies], pack(rows).ids)
    assert lay_out(pack(rows), shares_prefixes=False).places.tolist() == list(range(240))


def test_the_same_row_twice_keeps_a_token_of_its_own():
    twice = row(*range(40), learned=0)
    layout = lay_out(pack([twice, twice]), shares_prefixes=True)
    assert [tuple(segment) for segment in layout.segments] == [(0, 39, 0, 0), (39, 40, 0, 39), (40, 41, 0, 39)]
