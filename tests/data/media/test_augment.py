import numpy as np
import pytest

from thimble.config import groups
from thimble.data.media.augment import CHANGES, augment

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_a_function_of_its_key(name):
    found = [augment(PICTURE, [name], (1, step, 3)) for step in range(20)]
    again = [augment(PICTURE, [name], (1, step, 3)) for step in range(20)]
    assert all((one == other).all() for one, other in zip(found, again, strict=True))
    assert len({one.tobytes() for one in found}) > 1
    assert all(one.shape == PICTURE.shape and one.dtype == np.uint8 for one in found)


def test_the_option_names_the_ways_there_are():
    assert groups.CHANGES == tuple(CHANGES)


def test_nothing_named_changes_nothing():
    assert (augment(PICTURE, [], (0, 0, 0)) == PICTURE).all()


def test_a_flip_changes_left_and_right_in_half_of_the_cases():
    flipped = [(augment(PICTURE, ["flip"], (0, step, 0)) == PICTURE[:, ::-1]).all() for step in range(200)]
    same = [(augment(PICTURE, ["flip"], (0, step, 0)) == PICTURE).all() for step in range(200)]
    assert 70 < sum(flipped) < 130
    assert sum(flipped) + sum(same) == 200


def test_a_shift_moves_by_at_most_an_eighth():
    for step in range(20):
        moved = augment(PICTURE, ["shift"], (0, step, 0))
        assert any(
            (moved[8:24, 8:24] == PICTURE[8 + y : 24 + y, 8 + x : 24 + x]).all()
            for y in range(-4, 5)
            for x in range(-4, 5)
        )


def test_a_crop_of_a_gradient_is_a_gradient_of_less_range():
    ramp = np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], 32, 0).repeat(3, 2)
    found = augment(ramp, ["crop"], (0, 1, 0)).astype(int)
    steps = np.diff(found[4, :, 0])
    assert (found == found[:1]).all()
    assert 0.79 * 8 <= steps[1:-1].mean() <= 8


def test_noise_has_the_size_it_says():
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert 4.5 < augment(grey, ["noise"], (0, 0, 0)).std() < 5.5


def test_another_way_beside_it_does_not_change_what_is_drawn():
    dark = np.zeros((8, 8, 3), np.uint8)  # of which light changes nothing
    assert (augment(dark, ["noise"], (0, 1, 2)) == augment(dark, ["light", "noise"], (0, 1, 2))).all()
