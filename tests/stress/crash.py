"""What a power cut may leave of what was done to files, and whether a run keeps its promises in every such state.

After ALICE (Pillai et al., OSDI 2014, "All File Systems Are Not Created Equal"), and harsher than any real file system:
what was not synced may be lost in any combination and without regard to order. A rename alone is one step.
"""

import itertools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stress import Line
from stress.disk import Do, Operation, Record
from stress.made import MEMORY, goes_on, is_step, publish, read_number, save
from thimble.training.checkpoint import clear_unfinished, latest_checkpoint
from thimble.training.run_folder import STEPS, StepLog, read_steps


@dataclass(eq=False)
class Node:
    """A file or a folder, with all that was done to it, and how much of that is on disk for sure.

    Attributes:
        is_folder: Whether its changes are names.
        changes: Of a folder, new nodes by name (None: it is gone); of a file, offset and data (None: cut to nothing).
        synced: How many of the changes a power cut cannot undo.
    """

    is_folder: bool
    changes: list[Any] = field(default_factory=list)
    synced: int = 0

    def names(self, lost: frozenset[tuple[int, int]] = frozenset()) -> dict[str, "Node"]:
        """What a folder holds if some changes never reached the disk, each given by its node's id and its number."""
        found: dict[str, Node] = {}
        for number, change in enumerate(self.changes):
            if (id(self), number) not in lost:
                found |= change
        return {name: node for name, node in found.items() if node}

    def bytes(self, most: int | None = None) -> bytes:
        """What a file holds after its first changes."""
        found = bytearray()
        for offset, data in self.changes[:most]:
            if data is None:
                found.clear()
            else:
                found[offset : offset + len(data)] = data
        return bytes(found)


class World:
    """Files as the system shows them while it runs, and what of them a power cut may leave."""

    def __init__(self) -> None:
        self.root = Node(is_folder=True)

    def apply(self, operation: Operation) -> None:
        """Do what was done."""
        if operation.kind == "open":
            return
        if operation.kind == "fsync":
            node = self._find(operation.path)
            node.synced = len(node.changes)
            return
        if operation.kind == "write":
            self._find(operation.path).changes.append((operation.offset, operation.data))
            return
        folder, name = self._find(os.path.dirname(operation.path)), os.path.basename(operation.path)
        other, there = os.path.basename(operation.other), folder.names()
        assert os.path.dirname(operation.other) in ("", os.path.dirname(operation.path)), "a move between folders"
        if operation.kind in ("create", "append", "mkdir"):
            if name not in there:
                folder.changes.append({name: Node(operation.kind == "mkdir")})
            elif operation.kind == "create":
                there[name].changes.append((0, None))
        elif operation.kind == "rename":
            folder.changes.append({name: None, other: there[name]})
        elif operation.kind == "exchange":
            folder.changes.append({name: there[other], other: there[name]})
        else:  # unlink, rmdir
            folder.changes.append({name: None})

    def _find(self, path: str) -> Node:
        node = self.root
        for name in Path(path).parts:
            node = node.names()[name]
        return node

    def _reachable(self) -> Iterator[Node]:
        """Everything that some power cut may leave a name of."""
        waiting, seen = [self.root], {id(self.root)}
        while waiting:
            node = waiting.pop()
            yield node
            if node.is_folder:
                sure = Node(True, node.changes[: node.synced]).names().values()
                maybe = (found for change in node.changes[node.synced :] for found in change.values() if found)
                for found in (*sure, *maybe):
                    if id(found) not in seen:
                        seen.add(id(found))
                        waiting.append(found)

    def unsure(self) -> tuple[list[tuple[int, int]], list[Node]]:
        """Changes of names, and files, that may not have reached the disk."""
        nodes = list(self._reachable())
        names = [(id(n), i) for n in nodes if n.is_folder for i in range(n.synced, len(n.changes))]
        return names, [node for node in nodes if not node.is_folder and node.synced < len(node.changes)]

    def left(
        self, lost: frozenset[tuple[int, int]] = frozenset(), data: Callable[[Node], bytes] = Node.bytes
    ) -> dict[str, bytes | None]:
        """Files by path, folders as None: what is there if some changes of names are lost and files hold `data`."""
        found: dict[str, bytes | None] = {}

        def walk(folder: Node, path: str) -> None:
            for name, node in folder.names(lost).items():
                place = os.path.join(path, name)
                found[place] = None if node.is_folder else data(node)
                if node.is_folder:
                    walk(node, place)

        walk(self.root, "")
        return found


def tree(root: Path) -> dict[str, bytes | None]:
    """Files by path, folders as None."""
    return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")}


def build(root: Path, files: dict[str, bytes | None]) -> None:
    """Make what `tree` would return."""
    root.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        if data is None:
            (root / path).mkdir(exist_ok=True)
        else:
            (root / path).write_bytes(data)


# ---- what is done before the power is cut ---------------------------------------------------------------------------

WORKS = (("save", 1), ("adapter", 1), ("save", 2), ("save", 3), ("adapter", 2), ("adapter", 3))
DO: dict[str, Callable[[Path, int], None]] = {"save": save, "adapter": publish}


class _DiedError(BaseException):
    """The process is no more; nobody is to catch this."""


class _Dying(Record):
    """A process that dies after some operations; what it would do to clean up is not done."""

    def __init__(self, root: Path, at: int | None) -> None:
        super().__init__(root)
        self.at = at

    def happen(self, operation: Operation, do: Do) -> Any:
        if self.at is not None and len(self.operations) >= self.at:
            raise _DiedError
        return super().happen(operation, do)


@dataclass
class _Story:
    """What was done, and the numbers of the operations at which each save and publish began and was done."""

    operations: list[Operation]
    begun: list[tuple[int, str, int]] = field(default_factory=list)
    done: list[tuple[int, str, int]] = field(default_factory=list)


def _told(place: Path, at: int | None) -> _Story:
    """Three saves, three publishes and a log; if the process dies after some operations, another takes the run up."""
    place.mkdir()
    works = list(WORKS)
    with _Dying(place, at) as disk:
        story = _Story(disk.operations)
        while works:
            try:
                _run(place / "runs" / "run", works, story)
            except _DiedError:
                disk.at = None
    return story


def _run(run: Path, works: list[tuple[str, int]], story: _Story) -> None:
    run.mkdir(parents=True, exist_ok=True)
    clear_unfinished(run)
    found = latest_checkpoint(run)
    log = StepLog(run / STEPS, found.step if found else 0)
    try:
        while works:
            kind, number = works[0]
            if kind == "save" and number > len(read_steps(run / STEPS)):
                log.add({"step": number})
            story.begun.append((len(story.operations), kind, number))
            DO[kind](run, number)
            story.done.append((len(story.operations), kind, number))
            works.pop(0)
    finally:
        log.close()


# ---- power cuts -----------------------------------------------------------------------------------------------------

MOST_UNSURE = 8  # changes of names of which every combination is tried
RANDOM = 8  # states with torn files, after each operation


def _torn(dice: random.Random) -> Callable[[Node], bytes]:
    """Files of which some pieces reached the disk and some did not; those in between read as zeros."""

    def data(node: Node) -> bytes:
        old, new = node.bytes(node.synced), node.bytes()
        kind = dice.randrange(4)
        if node.synced == len(node.changes) or kind == 0:
            return new
        size, found = dice.choice((512, 4096)), bytearray(new)
        for start in range(0, len(new), size):
            if dice.random() < 0.5:
                piece = old[start : start + size]
                found[start : start + size] = piece.ljust(len(found[start : start + size]), b"\0")
        least = min(len(old), len(new))
        return bytes(found[: dice.randint(least, len(new))] if kind == 1 else found)

    return data


DATA: list[Callable[[Node], bytes]] = [
    Node.bytes,
    lambda node: node.bytes(node.synced),
    lambda node: node.bytes(node.synced).ljust(len(node.bytes()), b"\0"),
]


def _left(world: World, dice: random.Random) -> Iterator[dict[str, bytes | None]]:
    """What a power cut may leave.

    All combinations of names that may be lost (where there are many: none, all, each alone, all but each), with files
    that are whole, as last synced, or zeros from there on; then some at random, with torn files.
    """
    names, files = world.unsure()
    if len(names) <= MOST_UNSURE:
        sizes = range(len(names) + 1)
    else:
        sizes = (0, 1, len(names) - 1, len(names))
    for lost in itertools.chain.from_iterable(itertools.combinations(names, size) for size in sizes):
        for data in DATA if files else DATA[:1]:
            yield world.left(frozenset(lost), data)
    for _ in range(RANDOM if files or len(names) > MOST_UNSURE else 0):
        share = dice.random()
        yield world.left(frozenset(name for name in names if dice.random() < share), _torn(dice))


def power_cuts(count: int) -> Line:
    """Cut the power after every operation, in every way in which what was not synced may be lost.

    Args:
        count: How many states to try at least; once those of one process are through, it dies at some operation,
            another takes the run up, and the power is cut after that.
    """
    began, dice, seen, wrong = time.perf_counter(), random.Random(0), set(), []
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        stops: list[int | None] = [None]
        for at in stops:
            story = _told(Path(place, "true"), at)
            if at is None:
                stops += dice.sample(range(len(story.operations)), len(story.operations))
            wrong += _try_cuts(Path(place), story, at or 0, seen, dice)
            shutil.rmtree(Path(place, "true"))
            if len(seen) >= count:
                break
    for text in sorted(set(wrong))[:10]:
        print("   ", text)
    note = (
        f"{len(stops) - 1} operations in 3 saves and 3 publishes; {stops.index(at)} times taken up by another process"
    )
    return Line("power cuts", len(seen), len(wrong), time.perf_counter() - began, note)


def _try_cuts(place: Path, story: _Story, since: int, seen: set[int], dice: random.Random) -> list[str]:
    """Try the states not yet seen that a story may leave; returns the promises that are broken."""
    world, wrong = World(), []
    for number, operation in enumerate(story.operations, 1):
        world.apply(operation)
        if number < since:
            continue
        begun, done = ([(kind, n) for at, kind, n in marks if at <= number] for marks in (story.begun, story.done))
        for files in _left(world, dice):
            key = hash((frozenset(files.items()), tuple(begun), tuple(done)))
            if key in seen:
                continue
            seen.add(key)
            build(place / "cut", files)
            problem = _broken(place / "cut" / "runs" / "run", begun, dict(done))
            shutil.rmtree(place / "cut")
            if problem:
                wrong.append(f"{problem} after {operation.kind} {operation.path} {operation.other}")
    assert world.left() == tree(place / "true"), "an operation was not seen"
    return wrong


def _broken(run: Path, begun: list[tuple[str, int]], done: dict[str, int]) -> str:
    """Which promise a state of the disk breaks; nothing if none.

    Args:
        run: The run folder.
        begun: Kind and number of what had begun to be written.
        done: The last of each kind that was said to be on disk.
    """
    found = latest_checkpoint(run)
    if (found.step if found else 0) < done.get("save", 0):
        return "a checkpoint is lost"
    if found and (("save", found.step) not in begun or not is_step(found, found.step)):
        return "a checkpoint is not what was saved"
    if found and [row["step"] for row in read_steps(run / STEPS)][: found.step] != [*range(1, found.step + 1)]:
        return "the log ends before the checkpoint"
    if "adapter" in done or (run / "adapter").exists():
        number = read_number(run)
        if number is None or ("adapter", number) not in begun:
            return "the adapter is not whole"
        if number < done.get("adapter", 0):
            return "an adapter is lost"
    run.mkdir(parents=True, exist_ok=True)
    return "" if goes_on(run) else "the run cannot go on"
