"""Examples: damaged in every way, and a million of them."""

import csv
import functools
import gzip
import io
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stress import TINY, Line
from stress.files import MEMORY, mutated, try_all
from stress.grammar import changed, text_of

ASKED, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [ASKED, SAID]},
    {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "rain"}, SAID],
     "tools": [TOOL]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "be kind"},
    {"instruction": "add", "input": "1 and 2", "output": "3", "history": [["a", "b"]]},
    {"prompt": "hi", "completion": "ho"},
    {"prompt": [ASKED], "completion": [SAID]},
    {"text": "once upon a time"},
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MOST_ENCODED_BYTES = 50_000  # of a file: to cut more text into tokens may take a tenth of a second honestly
MOST_GROWN_BYTES = 200_000_000  # while a million rows are read


def _file(dice: random.Random) -> tuple[str, bytes]:
    """A data file with something wrong in it, and its suffix."""
    rows = [dice.choice(ROWS) for _ in range(dice.randint(1, 12))]
    broken = dice.randrange(len(rows))
    if dice.random() < 0.5:
        rows[broken] = changed(rows[broken], dice)
    kind = dice.choice([".jsonl", ".json", ".csv", ".txt", ".jsonl.gz", ".csv.gz"])
    plain = kind.removesuffix(".gz")
    if plain == ".csv":
        content = _as_csv([row for row in rows if isinstance(row, dict)])
    else:
        texts = [text_of(row, dice) for row in rows]
        content = b"[" + b",".join(texts) + b"]" if plain == ".json" else b"\n".join(texts)
    content = dice.choice([b"", b"", b"\xef\xbb\xbf"]) + content
    if dice.random() < 0.2:
        content = content.replace(b"\n", b"\r\n")
    if dice.random() < 0.5:
        content = mutated(content, dice, len(content)) if content else content
    if kind.endswith(".gz"):
        content = gzip.compress(content, 1)
        content = mutated(content, dice, len(content)) if dice.random() < 0.3 else content
    return kind, content


def _as_csv(rows: list[dict[str, Any]]) -> bytes:
    columns = sorted({str(key) for row in rows for key in row})
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
    return text.getvalue().encode("utf-8", "surrogatepass")


def fuzz_data(count: int) -> Line:
    """Read damaged data files, and turn what was read into tokens."""
    from thimble.data.encode import Encoder
    from thimble.data.model import open_model
    from thimble.data.records import read_dataset
    from thimble.data.template import ChatTemplate

    encoder = Encoder(open_model(str(TINY)).tokenizer, ChatTemplate(TEMPLATE), 64)

    def read(path: Path) -> None:
        examples = read_dataset(path).train
        if path.stat().st_size < MOST_ENCODED_BYTES:
            for record in examples:
                encoder.encode(record)

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:

        def cases() -> Iterator[Callable[[], object]]:
            dice = random.Random(0)
            for number in range(count):
                kind, content = _file(dice)
                path = Path(folder) / f"{number}{kind}"
                path.write_bytes(content)
                yield functools.partial(read, path)
                path.unlink()

        return try_all("damaged data files", cases())


def many_rows(count: int) -> Line:
    """Read, check, split and pick from so many rows, a few of them bad, without holding them in memory."""
    from thimble.data.records import read_dataset, split_rows

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many.jsonl.gz"
        with gzip.open(path, "wt", compresslevel=1) as file:
            for number in range(count):
                row = {
                    "prompt": f"what is {number} and {number % 7}, please? " * 8,
                    "completion": f"{number + number % 7}",
                }
                file.write(json.dumps(row) + "\n" if number % 1000 else "{broken\n")
        before = _resident_bytes()
        dataset = read_dataset(path)
        train, held = split_rows(dataset.train, 0.1, 0)
        grown = _resident_bytes() - before
        last = dataset.train[len(dataset.train) - 1].completion
    expected = count - 1 + (count - 1) % 7
    bad = len(range(0, count, 1000))
    is_right = (len(dataset.train), dataset.skipped.count, last) == (count - bad, bad, str(expected))
    is_right &= len(train) + len(held) == count - bad
    note = f"memory grew by {grown / 1e6:.0f} MB; {bad:,} bad ones left out and told"
    wrong = (not is_right) + (grown > MOST_GROWN_BYTES)
    return Line("rows in one data file", count, wrong, time.perf_counter() - began, note)


def _resident_bytes() -> int:
    """Largest size of this process so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
