"""Transcripts as LibriSpeech, Kaldi, LJ Speech and VCTK lay them out: each clip comes with its own text."""

import pytest

from media_files import write_clip
from thimble.data.media.find import find_media
from thimble.errors import DataError


def clip(path, number):
    return write_clip(path, seconds=0.05, hertz=200 + 50 * number)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def librispeech(folder):
    for number, place in enumerate(("train-clean-100/84/121123", "train-clean-100/84/121550", "dev-clean/174/50561")):
        name = "-".join(place.split("/")[1:])
        for part in range(2):
            clip(folder / "LibriSpeech" / place / f"{name}-000{part}.flac", 2 * number + part)
        write(
            folder / "LibriSpeech" / place / f"{name}.trans.txt", f"{name}-0000 ONE {name}", f"{name}-0001 TWO {name}"
        )
    write(folder / "LibriSpeech" / "SPEAKERS.TXT", "; ID |SEX| SUBSET", "84 | F | train-clean-100")
    texts = [f"{word} {name}" for name in ("84-121123", "84-121550") for word in ("ONE", "TWO")]
    return texts, ["ONE 174-50561", "TWO 174-50561"]


def kaldi(folder):
    for split, numbers in (("train", range(3)), ("test", range(3, 5))):
        for number in numbers:
            clip(folder / "wav" / f"{number}.wav", number)
        write(folder / "data" / split / "wav.scp", *(f"u{number} wav/{number}.wav" for number in numbers))
        write(folder / "data" / split / "text", *(f"u{number} hello  you {number}" for number in numbers))
        write(folder / "data" / split / "utt2spk", *(f"u{number} s" for number in numbers))
    return [f"hello  you {number}" for number in range(3)], None


def lj_speech(folder):
    for number in range(3):
        clip(folder / "wavs" / f"LJ001-{number}.wav", number)
    write(folder / "metadata.csv", *(f'LJ001-{n}|in the "only" 1{n}|in the "only" sense {n}' for n in range(3)))
    write(folder / "README", "LJ Speech")
    return [f'in the "only" sense {n}' for n in range(3)], None


def lists_for_voices(folder):
    for number in range(4):
        clip(folder / "wavs" / f"{number}.wav", number)
    write(folder / "train.txt", *(f"wavs/{n}.wav|7|bonjour {n}|{n}.5" for n in range(3)))
    write(folder / "val.txt", "wavs/3.wav|7|bonjour 3|2.5")
    return [f"bonjour {n}" for n in range(3)], ["bonjour 3"]


def vctk(folder):
    for number, speaker in enumerate(("p225", "p226")):
        clip(folder / "wav48" / speaker / f"{speaker}_001.wav", number)
        write(folder / "txt" / speaker / f"{speaker}_001.txt", "Please call", f" {speaker}.")
    return ["Please call p225.", "Please call p226."], None


def beside(folder):
    for number in range(3):
        clip(folder / f"{number}.wav", number)
        write(folder / f"{number}.txt", f"words {number}")
    return [f"words {number}" for number in range(3)], None


@pytest.mark.parametrize("layout", [librispeech, kaldi, lj_speech, lists_for_voices, vctk, beside])
def test_each_clip_of_a_corpus_comes_with_its_text(layout, tmp_path):
    train, valid = layout(tmp_path)
    found = find_media(tmp_path, "audio", needed="text")
    assert [item.text for item in found.train] == train
    assert [item.text for item in found.valid or ()] == (valid or [])
    assert not found.skipped.count
    for item in found.train:  # the tone of a clip, and so its digest, says which one it is
        assert item.path.is_file()
        assert item.path.stem in item.source
    assert len({item.digest for item in found.train}) == len(found.train)


def test_the_clips_and_texts_of_a_corpus_are_matched_by_their_names(tmp_path):
    librispeech(tmp_path)
    for item in find_media(tmp_path / "LibriSpeech" / "dev-clean", "audio", needed="text").train:
        assert (item.text == "ONE 174-50561") == (item.path.stem == "174-50561-0000")


def test_a_list_may_be_named_itself(tmp_path):
    texts, _ = lj_speech(tmp_path)
    assert [item.text for item in find_media(tmp_path / "metadata.csv", "audio", needed="text").train] == texts


def test_a_clip_that_is_listed_and_not_there_is_told_with_its_line(tmp_path):
    lj_speech(tmp_path)
    (tmp_path / "wavs" / "LJ001-1.wav").unlink()
    with pytest.raises(DataError, match=r"metadata\.csv line 2: names LJ001-1, which is not there"):
        find_media(tmp_path, "audio", needed="text")


def test_commands_of_kaldi_are_never_run(tmp_path):
    kaldi(tmp_path)
    write(tmp_path / "data" / "train" / "wav.scp", f"u0 touch {tmp_path}/ran && cat wav/0.wav |")
    with pytest.raises(DataError, match="none is run"):
        find_media(tmp_path, "audio", needed="text")
    assert not (tmp_path / "ran").exists()


def test_pieces_of_longer_clips_are_refused_by_the_name_of_their_list(tmp_path):
    kaldi(tmp_path)
    write(tmp_path / "data" / "train" / "segments", "u0 r0 0.0 1.5")
    with pytest.raises(DataError, match="segments takes utterances from within longer clips"):
        find_media(tmp_path, "audio", needed="text")


def test_several_parts_of_a_corpus_without_one_for_training_are_refused(tmp_path):
    lists_for_voices(tmp_path)
    (tmp_path / "train.txt").rename(tmp_path / "test.txt")
    with pytest.raises(DataError, match="test, valid, and none for training"):
        find_media(tmp_path, "audio", needed="text")


def test_libritts_has_its_texts_twice_of_which_the_normalised_ones_are_learned(tmp_path):
    for number in range(2):
        write_clip(tmp_path / "84" / f"84_1_{number}.wav", hertz=300 + number)
        for kind, text in (("original", "Dr. No"), ("normalized", "Doctor No")):
            (tmp_path / "84" / f"84_1_{number}.{kind}.txt").write_text(f"{text} {number}")
    data = find_media(tmp_path, "audio", needed="text")
    assert [item.text for item in data.train] == ["Doctor No 0", "Doctor No 1"]
