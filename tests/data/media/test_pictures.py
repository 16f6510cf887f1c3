import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from media_files import write_picture
from thimble.data.media.pictures import is_animated, read_picture, to_pixels
from thimble.errors import DataError


def by_pillow(picture, size):
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))


def random(*shape, dtype=np.uint8, most=256):
    return np.random.default_rng(0).integers(0, most, shape).astype(dtype)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".tif", ".gif", ".ppm", ".jpg", ".tga"])
def test_pixels_are_those_of_pillow(tmp_path, suffix):
    path = write_picture(tmp_path / f"a{suffix}", size=(40, 30))
    assert (read_picture(path, 24) == by_pillow(Image.open(path).convert("RGB"), 24)).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "a.tif"
    Image.fromarray(random(30, 40, 3)).convert(mode).save(path)
    assert (read_picture(path, 24) == by_pillow(Image.open(path).convert("RGB"), 24)).all()


def test_what_is_transparent_lies_on_white(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).convert("P").save(tmp_path / "p.gif", transparency=0)
    Image.fromarray(np.stack([pixels[..., 0], pixels[..., 3]], -1), "LA").save(tmp_path / "la.png")
    assert read_picture(tmp_path / "a.png", 8)[0, [0, 7]].tolist() == [[255, 255, 255], [255, 0, 0]]
    assert read_picture(tmp_path / "la.png", 8)[0, [0, 7]].tolist() == [[255, 255, 255], [255, 255, 255]]
    assert read_picture(tmp_path / "p.gif", 8)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_keep_their_range(tmp_path, suffix):
    deep = random(16, 16, dtype=np.uint16, most=65536)
    Image.fromarray(deep).save(tmp_path / f"a{suffix}")
    found = read_picture(tmp_path / f"a{suffix}", 16)
    assert np.abs(found[..., 0] - deep / 257).max() <= 0.5
    assert (found[..., 0] == found[..., 2]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write_picture(tmp_path / "a.png", size=(16, 16), exif=exif)
    assert (read_picture(path, 16) == by_pillow(ImageOps.exif_transpose(Image.open(path)), 16)).all()


def test_the_first_frame_of_what_moves_is_taken(tmp_path):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "a.gif", 8).max() < 20
    assert is_animated((tmp_path / "a.gif").read_bytes())
    assert not is_animated(write_picture(tmp_path / "b.jpg").read_bytes())


def test_a_large_jpeg_that_is_decoded_at_a_fraction_looks_the_same(tmp_path):
    at = np.linspace(0, 6, 1200)
    waves = 127 + 100 * np.sin(at)[:, None, None] * np.cos(np.array([1.0, 2.0, 3.0]) * at[:900, None])[None]
    Image.fromarray(waves.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    whole = by_pillow(Image.open(tmp_path / "a.jpg"), 64).astype(int)
    assert np.abs(read_picture(tmp_path / "a.jpg", 64) - whole).mean() < 1


def test_the_content_counts_and_not_the_name(tmp_path):
    path = write_picture(tmp_path / "a.png")
    path.rename(tmp_path / "a.jpg")
    assert read_picture(tmp_path / "a.jpg", 8).shape == (8, 8, 3)


def bomb(side):
    """A PNG of a few bytes whose head claims side x side pixels."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))  # noqa: E731
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 60_000, 2_000_000_000])
@pytest.mark.filterwarnings("ignore")
def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path, side):
    (tmp_path / "a.png").write_bytes(bomb(side))
    with pytest.raises(DataError, match=r"89 million pixels|no picture that can be read"):
        read_picture(tmp_path / "a.png", 8)


@pytest.mark.parametrize("cut", [0.5, 0.9])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".webp", ".tif"])
def test_a_truncated_picture_is_refused(tmp_path, suffix, cut):
    path = write_picture(tmp_path / f"a{suffix}", size=(64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(DataError, match="cannot be decoded whole|is no picture"):
        read_picture(path, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"%PDF-1.4", "is a PDF"), (b"plain words", "no picture that can be read"),
     (b"\0\0\0 ftypheic\0\0\0\0mif1heic", "HEIC inside, .* magick IN OUT.png"),
     (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG inside"),
     (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no picture")],
)  # fmt: skip
def test_what_is_no_picture_says_what_it_is(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_picture(tmp_path / "a.png", 8)


def test_floating_point_pictures_are_refused(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="floating-point"):
        read_picture(tmp_path / "a.tif", 8)


def test_pixels_are_normalised_channel_by_channel():
    picture = random(5, 5, 3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = ((picture / 255 - mean) / std).transpose(2, 0, 1)
    assert to_pixels(picture, mean, std).dtype == np.float32
    assert np.abs(to_pixels(picture, mean, std) - expected).max() < 1e-6


def test_grey_is_what_pillow_makes_of_it():
    picture = random(5, 4, 3)
    expected = (np.asarray(Image.fromarray(picture).convert("L")) / 255 - 0.4) / 0.2
    made = to_pixels(picture, (0.4,) * 3, (0.2,) * 3, is_grey=True)
    assert (made.shape, made.dtype) == ((1, 5, 4), np.float32)
    assert np.abs(made[0] - expected).max() < 1e-6
