"""Arrow and Parquet files that were damaged: refused, or read, and never followed to where their offsets point."""

import functools
import io
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from stress import Line
from stress.files import MEMORY, mutated, try_all


def _whole_files() -> list[tuple[str, bytes]]:
    """One small table in each format."""
    import pyarrow
    import pyarrow.parquet

    ask = {"role": "user", "content": "hi"}
    calls = [{"name": "f", "arguments": {"a": number, "b": [1, 2]}} for number in range(20)]
    answers = [{"role": "assistant", "content": "ho", "tool_calls": [call]} for call in calls]
    table = pyarrow.Table.from_pylist([{"messages": [ask, answer], "id": n} for n, answer in enumerate(answers)])
    table = table.append_column("kind", pyarrow.array(["x", "y"] * 10).dictionary_encode())
    stream, file, parquet = io.BytesIO(), io.BytesIO(), io.BytesIO()
    for sink, new in ((stream, pyarrow.ipc.new_stream), (file, pyarrow.ipc.new_file)):
        with new(sink, table.schema) as out:
            out.write_table(table, 7)
    pyarrow.parquet.write_table(table, parquet)
    return [(".arrow", stream.getvalue()), (".arrow", file.getvalue()), (".parquet", parquet.getvalue())]


def fuzz_arrow(count: int) -> Line:
    """Read damaged Arrow and Parquet files."""
    from thimble.data.records import read_dataset

    whole = _whole_files()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:

        def cases() -> Iterator[Callable[[], object]]:
            dice = random.Random(0)
            for number in range(count):
                suffix, content = dice.choice(whole)
                path = Path(folder) / f"{number}{suffix}"
                path.write_bytes(mutated(content, dice, len(content)))
                yield functools.partial(read_dataset, path)
                path.unlink()

        return try_all("damaged Arrow and Parquet files", cases())
