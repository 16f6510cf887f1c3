"""Pictures and clips of some validation rows, made small for the page of a run, with what was said of them."""

from collections.abc import Callable, Sequence

from thimble.data.media.data_uri import clip_uri, picture_uri
from thimble.data.media.inside import MediaFile
from thimble.errors import InputError
from thimble.report.gallery import Shown, choose_shown, group_of
from thimble.training.answers import Answer
from thimble.training.facts import RunFacts
from thimble.training.result import TrainReport

MOST_PICTURES, MOST_CLIPS = 24, 12  # some kilobytes each
_MAKERS: dict[str, tuple[Callable[[MediaFile], str], int]] = {
    "classify-image": (picture_uri, MOST_PICTURES),
    "classify-audio": (clip_uri, MOST_CLIPS),
    "transcribe": (clip_uri, MOST_CLIPS),
}


def make_gallery(
    facts: RunFacts, report: TrainReport, before: Sequence[Answer], after: Sequence[Answer]
) -> list[Shown]:
    """What the page shows beside the samples of the report: of labels those that changed or are wrong first, of texts
    those of the samples; none of tasks without pictures and clips, or if the run was cut short.
    """
    if facts.task not in _MAKERS or len(before) != len(after):
        return []
    make, most = _MAKERS[facts.task]
    if facts.metric.has_labels:
        groups = [group_of(old.reference, old.written, new.written) for old, new in zip(before, after, strict=True)]
        numbers = choose_shown(groups, most)
    else:
        sampled = {sample["asked"] for sample in report.samples}
        numbers = [number for number, answer in enumerate(after) if answer.asked in sampled][:most]
    shown = []
    for old, new in ((before[number], after[number]) for number in numbers):
        try:
            uri = make(facts.media[new.source])
        except (InputError, OSError, KeyError):  # gone since it was read: the page does without it
            continue
        shown.append(Shown(uri, new.asked, new.reference, old.written, new.written))
    return shown
