from types import SimpleNamespace

import pytest

from media_files import write_clip
from thimble.data.media.items import Item
from thimble.errors import RunError
from thimble.training.tasks.clips import KeptClips


def test_a_clip_that_is_gone_is_named_and_says_what_to_do(tmp_path):
    inputs = SimpleNamespace(
        most_seconds=30.0, rate=16000, frames=lambda seconds: round(seconds * 100),
        features=lambda samples, frames: {"samples": samples},
    )  # fmt: skip
    paths = [write_clip(tmp_path / f"{number}.wav", 0.1) for number in range(2)]
    clips = KeptClips([Item(path, path.name, "a", seconds=0.1) for path in paths], inputs, 30.0)
    assert len(clips[0]["samples"]) == 1600
    for path in paths:
        path.unlink()
    assert len(clips[0]["samples"]) == 1600
    with pytest.raises(RunError, match=r"1\.wav cannot be read.*--resume"):
        clips[1]
