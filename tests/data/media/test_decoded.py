import threading

import numpy as np
import pytest

from media_files import write_picture
from thimble.data.media.decoded import Decoded
from thimble.data.media.pictures import read_picture
from thimble.errors import DoesNotFitError, RunError


class Reader:
    """Reads a number from the name of a file; counts how often, and may be held up."""

    def __init__(self):
        self.read = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.done = threading.Event()

    def __call__(self, path):
        self.may_go.wait()
        self.read.append(int(str(path)))
        self.done.set()
        return np.full(10, int(str(path)), np.uint8)


def values(arrays):
    return [int(array[0]) for array in arrays]


def test_arrays_come_in_the_order_asked_for_and_twice_if_asked_twice():
    assert values(Decoded(range(9), Reader(), 1000).arrays([3, 1, 3, 8])) == [3, 1, 3, 8]


def test_what_fits_is_decoded_once():
    reader = Reader()
    decoded = Decoded(range(9), reader, 1000)
    for _ in range(3):
        assert values(decoded.arrays(range(9))) == list(range(9))
    assert sorted(reader.read) == list(range(9))


@pytest.mark.parametrize("room", [0, 30, 39])
def test_of_what_does_not_fit_the_first_are_kept(room):
    reader = Reader()
    decoded = Decoded(range(9), reader, room)
    for _ in range(3):
        assert values(decoded.arrays(range(9))) == list(range(9))
    again = 3 if room else 0
    assert len(reader.read) == 9 + 2 * (9 - again)


def test_what_is_expected_is_decoded_before_it_is_asked_for():
    reader = Reader()
    decoded = Decoded(range(9), reader, 1000)
    decoded.expect([4])
    reader.done.wait()
    assert values(decoded.arrays([4])) == [4]
    assert reader.read == [4]


def test_what_is_no_longer_expected_is_not_kept_waiting():
    reader = Reader()
    reader.may_go.clear()
    decoded = Decoded(range(1000), reader, 0)
    decoded.expect(range(1000))
    decoded.expect([5])
    reader.may_go.set()
    assert values(decoded.arrays([5])) == [5]
    assert len(reader.read) < 500  # a few were under way, as many as there are cores


def test_a_full_disk_costs_time_and_nothing_else(monkeypatch):
    reader = Reader()
    decoded = Decoded(range(9), reader, 1000)

    def full(item):
        raise DoesNotFitError("no room")

    monkeypatch.setattr(decoded._file, "append", full)
    for _ in range(2):
        assert values(decoded.arrays(range(9))) == list(range(9))
    assert len(reader.read) == 18


def test_shapes_and_types_come_back():
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((2, 2, 3), np.uint8)]
    decoded = Decoded([0, 1], lambda number: arrays[number].copy())
    for _ in range(2):
        for found, wanted in zip(decoded.arrays([0, 1]), arrays, strict=True):
            assert found.dtype == wanted.dtype
            assert (found == wanted).all()


def test_arrays_are_not_to_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        Decoded([0], Reader(), 1000).arrays([0])[0][0] = 1


def test_a_file_that_is_gone_is_named_and_says_what_to_do(tmp_path):
    path = write_picture(tmp_path / "a.png")
    decoded = Decoded([path], lambda path: read_picture(path, 8), 0)
    assert decoded.arrays([0])[0].shape == (8, 8, 3)
    path.unlink()
    with pytest.raises(RunError, match=r"a\.png cannot be read.*--resume"):
        decoded.arrays([0])
