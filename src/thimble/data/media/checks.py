"""Every picture or clip decoded once before anything is trained: broken files come to light here, and copies."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import NamedTuple

from thimble.data.media.inside import open_media
from thimble.data.media.items import Item
from thimble.data.media.kinds import IMAGE, refusal
from thimble.data.media.pictures import content_of, is_animated
from thimble.data.media.sound import listen_to
from thimble.data.records import Skipped
from thimble.data.sources.raw import Told
from thimble.errors import DataError, listing, plural
from thimble.models.machine import usable_cores

AHEAD = 4  # files a thread, that wait for their turn


class Checked(NamedTuple):
    """An item that was decoded, or why it cannot be."""

    item: Item
    problem: str = ""
    remark: str = ""  # what many may have in common: "silent"


def check_items(
    found: Mapping[str, Iterable[Item]], kind: str, most_seconds: float, skipped: Skipped, told: Told
) -> dict[str, list[Item]]:
    """The items of each split that can be decoded, with digest and length; the others are noted as skipped."""
    look = partial(_checked, _look if kind == IMAGE else partial(_listen, most_seconds), kind)
    remarks: dict[str, list[str]] = {}
    checked: dict[str, list[Item]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large pictures and odd metadata: what matters is told
        for split, items in found.items():
            checked[split] = []
            for result in _in_order(look, items):
                if result.problem:
                    skipped.add(result.item.source, result.problem)
                else:
                    checked[split].append(result.item)
                if result.remark:
                    remarks.setdefault(result.remark, []).append(result.item.source)
    for remark, sources in remarks.items():
        told.warn(f"{plural(len(sources), 'file')} {remark}: {listing(sources, 3)}")
    return checked


def _in_order(look: Callable[[Item], Checked], items: Iterable[Item]) -> Iterator[Checked]:
    """What comes of each item, in order; threads work a little ahead, since decoders leave the interpreter free."""
    threads, rest = usable_cores(), iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(look, item) for item in islice(rest, AHEAD * threads)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(look, item) for item in islice(rest, 1)]


def _checked(look: Callable[[Item], Checked], kind: str, item: Item) -> Checked:
    try:
        if problem := refusal(item.path, kind):
            return Checked(item, problem)
        return look(item)
    except DataError as error:
        return Checked(item, error.problems[0])


def _look(item: Item) -> Checked:
    content = content_of(item.path)
    remark = "with several frames, of which the first is taken" if is_animated(content) else ""
    return Checked(replace(item, digest=hashlib.sha256(content).hexdigest()), remark=remark)


def _listen(most_seconds: float, item: Item) -> Checked:
    heard = listen_to(item.path, most_seconds)
    with open_media(item.path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    remark = "silent from beginning to end" if heard.is_silent else ""
    if heard.seconds > most_seconds:
        remark = f"longer than {most_seconds:g} seconds, the most that is heard"
    return Checked(replace(item, digest=digest, seconds=heard.seconds), remark=remark)
