"""What merging costs in each type of file: the untouched base with its adapter against the two as one file.

    python benchmarks/merged_types.py RUN DATA OUT.json [--rows 60] [--types Q8_0 Q4_K_M ...]

RUN is a run folder, such as demo/run, and DATA a file of rows it has not seen, such as demo/data/valid.jsonl. A file
of each type is written and measured by `thimble evaluate` on the same rows: loss, and the task's metrics of greedy
answers. `+imatrix` behind a type weighs its rounding by the inputs of the run's own training rows. Results are kept in
OUT.json as they come, so the work may be interrupted; in the end they are printed as a table.
"""

import argparse
import json
import tempfile
from pathlib import Path

import thimble

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_M+imatrix", "Q4_1", "Q4_0", "Q4_0+imatrix")


def measure(data: Path, metric: str, **models: object) -> list[dict]:
    """Loss and scores of the base, and of the adapters if there are any."""
    found = thimble.evaluate(data=str(data), compute="fp32", metric=metric, max_new_tokens=96, **models)
    return [{"loss": result.loss, **result.scores} for result in found.results]


def write_and_measure(run: Path, data: Path, metric: str, named: str) -> dict:
    """Merge into a file of one type, which is deleted in the end, and measure it."""
    wanted, _, weighed = named.partition("+")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "merged.gguf")
        report = thimble.export(str(run), merged=True, type=wanted, imatrix=bool(weighed), proof="never", out=file)
        [found] = measure(data, metric, base=file)
    return {"megabytes": report.size_bytes / 1e6, "kept": report.weights["kept_update"], **found}


def print_table(results: dict[str, dict]) -> None:
    """One line a file, in Markdown."""
    scores = [name for name in next(iter(results.values())) if name not in ("loss", "megabytes", "kept")]
    print("|", " | ".join(["file", "MB", "update left", "loss", *scores]), "|")
    print("|---" * (4 + len(scores)) + "|")
    for name, found in results.items():
        numbers = [f"{found[key]:{form}}" if key in found else ""
                   for key, form in (("megabytes", ".0f"), ("kept", ".2f"), ("loss", ".4f"))]  # fmt: skip
        print("|", " | ".join([name, *numbers, *(f"{found[score]:.3f}" for score in scores)]), "|")


def main() -> None:
    """Measure what is not in OUT.json yet, and print all that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rows", type=int, default=60, help="rows of DATA, the first ones")
    parser.add_argument("--metric", default="auto", help="of thimble evaluate; none measures the loss alone")
    parser.add_argument("--types", nargs="*", default=TYPES)
    given = parser.parse_args()
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(given.data.open().readlines()[: given.rows]))
        for name in ("base", *given.types):
            if name in results:
                continue
            if name == "base":
                found = measure(rows, given.metric, adapter=[str(given.run)])
                results |= dict(zip(("base", "base and adapter"), found, strict=True))
            else:
                results[name] = write_and_measure(given.run, rows, given.metric, name)
            given.out.write_text(json.dumps(results, indent=1))
    print_table(results)


if __name__ == "__main__":
    main()
