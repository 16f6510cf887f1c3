"""Blocks: each has as many users as were told, and what is kept is found by what stands before it."""

import numpy as np
import pytest

from thimble.inference.blocks import Blocks, chained

ROOT = b"an adapter"


def tokens(*ids):
    return np.array(ids, np.int32)


def kept(blocks, before, ids):
    """A block with these tokens, kept and without users."""
    block = blocks.keep(blocks.take(), before, ids)
    blocks.release([block])
    return block


def test_blocks_that_are_given_back_are_given_out_again():
    blocks = Blocks(4)
    taken = [blocks.take() for _ in range(4)]
    assert sorted(taken) == [0, 1, 2, 3]
    blocks.release(taken[1:3])
    assert sorted([blocks.take(), blocks.take()]) == sorted(taken[1:3])
    assert (blocks.used, blocks.count) == (4, 4)


def test_a_kept_block_is_found_by_its_tokens_and_all_before_them():
    blocks = Blocks(4)
    first = kept(blocks, ROOT, tokens(1, 2))
    key = chained(ROOT, tokens(1, 2))
    assert blocks.find(key) == first
    for other in (chained(ROOT, tokens(1, 3)), chained(b"another", tokens(1, 2)), chained(key, tokens(1, 2))):
        assert blocks.find(other) is None


def test_what_is_unused_for_longest_makes_room_and_what_is_used_never_does():
    blocks = Blocks(3)
    old, new = kept(blocks, ROOT, tokens(1)), kept(blocks, ROOT, tokens(2))
    used = blocks.keep(blocks.take(), ROOT, tokens(3))
    assert blocks.find(chained(ROOT, tokens(1))) == old
    blocks.release([old])  # used again: now the other one is the older
    assert blocks.take() == new
    assert blocks.find(chained(ROOT, tokens(2))) is None
    assert blocks.take() == old
    assert blocks.take() == 3  # beyond what there may be, for a request that needs it
    assert blocks.find(chained(ROOT, tokens(3))) == used


def test_the_end_of_a_request_goes_before_its_beginning():
    blocks = Blocks(2)
    first = blocks.keep(blocks.take(), ROOT, tokens(1))
    second = blocks.keep(blocks.take(), chained(ROOT, tokens(1)), tokens(2))
    blocks.release([first, second])
    assert blocks.take() == second


def test_what_was_read_twice_at_once_is_kept_once():
    blocks = Blocks(4)
    first = blocks.keep(blocks.take(), ROOT, tokens(1))
    second = blocks.take()
    assert blocks.keep(second, ROOT, tokens(1)) == first
    assert blocks.used == 1
    assert blocks.take() == second
    blocks.release([first])
    assert blocks.find(chained(ROOT, tokens(1))) == first  # it had two users


def test_the_longest_beginning_in_common_is_found():
    blocks = Blocks(8)
    kept(blocks, ROOT, tokens(1, 2, 3, 4))
    longer = kept(blocks, ROOT, tokens(1, 2, 9, 9))
    short = kept(blocks, ROOT, tokens(5))
    assert blocks.find_beginning(ROOT, tokens(1, 2, 9)) == (longer, 3)
    assert blocks.find_beginning(ROOT, tokens(5, 6, 7)) == (short, 1)
    assert blocks.find_beginning(ROOT, tokens(7, 7))[1] == 0
    assert blocks.find_beginning(b"another", tokens(1, 2))[1] == 0


def test_no_more_than_so_many_blocks_are_kept_without_users():
    blocks = Blocks(8, most_unused=2)
    first, second = kept(blocks, ROOT, tokens(1)), kept(blocks, ROOT, tokens(2))
    used = blocks.keep(blocks.take(), ROOT, tokens(3))  # one that has a user is not counted
    assert blocks.find(chained(ROOT, tokens(1))) == first
    blocks.release([first])  # used again: the second one is the older now
    assert (blocks.unused, blocks.evictions) == (2, 0)
    blocks.release([used])
    assert (blocks.unused, blocks.evictions) == (2, 1)
    assert blocks.find(chained(ROOT, tokens(2))) is None
    assert blocks.take() == second  # before what holds something


def test_of_a_request_that_is_longer_than_what_may_be_kept_the_beginning_stays():
    blocks, taken, before = Blocks(8, most_unused=2), [], ROOT
    for number in range(5):
        taken.append(blocks.keep(blocks.take(), before, tokens(number)))
        before = chained(before, tokens(number))
    blocks.release(taken)
    assert blocks.find(chained(ROOT, tokens(0))) == taken[0]
    assert blocks.find(chained(chained(ROOT, tokens(0)), tokens(1))) == taken[1]
    assert (blocks.unused, blocks.evictions) == (0, 3)


def test_blocks_that_hold_nothing_any_more_are_told_once():
    blocks = Blocks(8, most_unused=1)
    taken = [blocks.take() for _ in range(3)]
    first, second = kept(blocks, ROOT, tokens(1)), kept(blocks, ROOT, tokens(2))  # for which the first makes room
    blocks.release(taken)
    again = blocks.take()
    assert again in {first, *taken}
    assert blocks.emptied() == sorted({first, *taken} - {again})
    assert blocks.emptied() == []
    blocks.release([again])
    assert blocks.emptied() == [again]
    assert blocks.find(chained(ROOT, tokens(2))) == second


@pytest.mark.parametrize("unused", [None, 5])
@pytest.mark.parametrize("most", [None, 12])
def test_counts_hold_whatever_happens(most, unused):
    random, blocks, held, before = np.random.default_rng(0), Blocks(most, unused), [], 0
    for _ in range(4000):
        what = random.integers(4)
        if what == 0 and len(held) < 12:
            held.append(blocks.take())
        elif what == 1 and held:
            block = held.pop(random.integers(len(held)))
            blocks.release([block])
        elif what == 2 and held and held[-1] not in blocks._kept:
            held[-1] = blocks.keep(held[-1], ROOT, tokens(*random.integers(0, 5, 2)))
        elif (found := blocks.find(chained(ROOT, tokens(*random.integers(0, 5, 2))))) is not None:
            held.append(found)
        users = {block: held.count(block) for block in held}
        assert blocks._users == users
        everything = [*blocks._free, *blocks._unused, *users]
        assert sorted(everything) == list(range(blocks.count))
        assert set(blocks._unused) <= set(blocks._kept)
        assert unused is None or blocks.unused <= unused
        before = max(before, len(users))
    if most is None:
        assert blocks.count <= 12 + 25  # what is kept makes room before another block is added
