"""How few rows lower the learning rate: what 20 and 40 rows teach at three rates, and what is forgotten for it.

Whole runs of `thimble train`, as a user makes them: they end at 30 steps, or once the rows are known by heart. Right
answers are those to 40 messages about phrases that no row has. Results are kept after every run in few_rows.json, so a
study that was stopped goes on. Writes its table of docs/tuning.md.
"""

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from short_runs import CLOSINGS, OPENINGS, TOPICS, Kept

import thimble
from thimble.core.schedule import MANY_ROWS

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "tuning.md"
BEGIN, END = "<!-- few rows: written by benchmarks/few_rows.py -->", "<!-- end of few rows -->"
FULL_RATE = 7.1e-4  # the default of such rows where they are many
SHARES = {"as of many": 1.0, "the default": 0.5, "lower": 1.0}  # powers of rows / MANY_ROWS
COUNTS, SEEDS, ASKED = (20, 40), (0, 1), 40
SEEN = slice(4)  # phrases of each topic in training rows; the others are asked about


def written(phrases: slice, count: int) -> list[dict[str, str]]:
    """Messages about some phrases of each topic, topics in turn, no two alike."""
    topics = {topic: found[phrases] for topic, found in TOPICS.items()}
    rows = []
    for number in range(count):
        topic = list(topics)[number % len(topics)]
        turn = number // len(topics)
        phrase = topics[topic][turn % len(topics[topic])]
        opening, closing = OPENINGS[number % len(OPENINGS)], CLOSINGS[turn % len(CLOSINGS)]
        rows.append({"prompt": f"{opening} {phrase}. {closing}", "completion": topic})
    return rows


def run(rows: int, power: float, seed: int) -> dict[str, Any]:
    """Train on some rows, and ask about phrases that they do not have."""
    began, rate = time.perf_counter(), float(f"{FULL_RATE * min(1.0, rows / MANY_ROWS) ** power:.1e}")
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "asked.jsonl"
        asked.write_text("".join(json.dumps(row) + "\n" for row in written(slice(SEEN.stop, None), ASKED)))
        report = thimble.train(
            written(SEEN, rows), out=f"{folder}/run", learning_rate=rate, seed=seed, compute="fp32", valid_split=0.0,
            max_new_tokens=8,
        )  # fmt: skip
        found = thimble.evaluate(str(asked), adapter=[f"{folder}/run"], metric="exact", max_new_tokens=8).results[-1]
    return {
        "rate": rate, "steps": report.steps, "final": found.loss, "right": round(found.scores["exact match"] * ASKED),
        "general_before": report.general_before, "general": report.general_after, "kl": report.divergence.get("kl"),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def as_page(runs: list[dict[str, Any]]) -> str:
    """The table for people."""
    page = [
        BEGIN, "",
        "| rows | rate | seed | ended after step | loss on general text | KL from the base on its texts "
        f"| right of {ASKED} |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for done in sorted(runs, key=lambda done: (done["rows"], -done["rate"], done["seed"])):
        rise = done["general"] - done["general_before"]
        cells = [
            str(done["rows"]), f"{done['rate']:.1e}, {done['share']}", str(done["seed"]), str(done["steps"]),
            f"{done['general']:.3f} ({rise:+.2f})", f"{done['kl']:.2f}", str(done["right"]),
        ]  # fmt: skip
        page.append(f"| {' | '.join(cells)} |")
    return "\n".join([*page, "", END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="write the table of what was run, and run nothing")
    kept, is_table_only = Kept(HERE / "few_rows.json"), parser.parse_args().table
    wanted = [(seed, rows, share) for seed in SEEDS for rows in COUNTS for share in SHARES]
    for seed, rows, share in () if is_table_only else wanted:
        key = {"rows": rows, "share": share, "seed": seed}
        kept.result(key, functools.partial(run, rows, SHARES[share], seed))
    page, table = PAGE.read_text(), as_page(kept.runs)
    PAGE.write_text(page[: page.index(BEGIN)] + table + page[page.index(END) + len(END) :])
    print(table)


if __name__ == "__main__":
    main()
