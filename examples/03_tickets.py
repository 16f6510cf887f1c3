"""Answer a table of tickets with an adapter that was trained on labelled ones, and count what it answers.

python examples/03_tickets.py new_tickets.csv answers.csv --adapter runs/tickets-1

The table needs a column `prompt`; where it has a column `completion`, what stands there is the answer that is right.
An interrupted run goes on when it is started again.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path

import thimble

parser = argparse.ArgumentParser()
parser.add_argument("tickets")
parser.add_argument("answers")
parser.add_argument("--adapter", required=True)
parser.add_argument("--base")
given = parser.parse_args()

report = thimble.generate(
    given.tickets, out=given.answers, adapter=[given.adapter], base=given.base, max_new_tokens=8,
    resume=Path(given.answers + ".run.json").exists(),
)  # fmt: skip
with open(given.answers, encoding="utf-8-sig", newline="") as file:
    rows = list(csv.DictReader(file))

print(f"{report.answered} of {report.rows} tickets answered, {report.tokens_per_second:.0f} tokens/s\n")
right = Counter(row["answer"].strip() for row in rows if row["answer"].strip() == row.get("completion", "").strip())
print(f"{'answer':<30} {'tickets':>8} {'right':>8}")
for answer, count in Counter(row["answer"].strip() for row in rows).most_common(20):
    print(f"{answer!r:<30.30} {count:>8} {right[answer]:>8}")
