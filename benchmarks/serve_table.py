"""What was measured of serving: kept in serve.json by base and load, and shown in its part of RESULTS.md."""

import datetime
import json
import statistics
from pathlib import Path

from run import BEGIN, END
from servers import CORES, worst

from thimble.models.machine import processor

HERE = Path(__file__).parent
KEPT = HERE / "serve.json"
FIRST, FIRST_P95 = "first token", "first token, p95, seconds"
RATE = "tokens a second"


def keep(base, loads, memory):
    """Put what was measured with a base in place of what was measured of the same loads and servers; the rest stays.

    Args:
        base: Its name.
        loads: Figures by load and server, a list of rounds.
        memory: Bytes by server, after all loads.
    """
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    kept = kept if "bases" in kept else {"bases": {}}
    of_base = kept["bases"].setdefault(base, {"loads": {}, "memory": {}})
    for load, by_server in loads.items():
        of_base["loads"].setdefault(load, {}).update(by_server)
    of_base["memory"] |= memory
    of_base.pop("beside", None)
    of_base["date"], of_base["processor"] = str(datetime.date.today()), processor()[0]
    KEPT.write_text(json.dumps(kept, indent=1))
    text = "\n\n".join(_section(name, found) for name, found in kept["bases"].items())
    _write_down(f"{_head()}\n\n{text}")
    print(_section(base, of_base))


def _head():
    return (
        "## Serving\n\nWritten by `make bench-serve`: two servers with one file on a machine, asked in turns; medians "
        "of the rounds. 121 tokens in, 128 out, drawn at temperature 1, so that no answer goes in circles, which would "
        "flatter guesses ahead; the load that is about these has greedy answers. Each adapter is of rank 16 on every "
        "linear layer. Pieces are texts as they are sent: models named 135m or 1b have random weights and write many "
        "tokens that are no text, so theirs say nothing; tokens a second do."
    )


def _section(name, found):
    rounds = sorted({len(of_load) for by_server in found["loads"].values() for of_load in by_server.values()})
    several = " to ".join(map(str, sorted({rounds[0], rounds[-1]})))
    beside = f" {found['beside']}" if "beside" in found else ""  # written by hand where a machine was not quiet
    head = f"### {name}\n\n{found['date']}, {CORES} cores of an {found['processor']}, {several} rounds.{beside}"
    return f"{head}\n\n{_table(found['loads'], found['memory'])}"


def _table(loads, memory):
    """Rows of ours, theirs and the ratio."""
    lines = ["| load | figure | thimble | against | | ratio |", "|---|---|---|---|---|---|"]
    for load, by_server in loads.items():
        ours = by_server.get("thimble")
        for server, theirs in by_server.items():
            if server == "thimble":
                continue
            for name in _figures(theirs):
                one, other = _median(ours, name) if ours else None, _median(theirs, name)
                lines.append(_row(load, name, one, server, other))
        for name in _figures(ours) if ours and len(by_server) == 1 else ():
            lines.append(_row(load, name, _median(ours, name)))
    lines += _taxes(loads)
    if "thimble" in memory:
        for server in sorted(memory.keys() - {"thimble"}):
            lines.append(
                _row("all of them", "memory of its own, MB", memory["thimble"] / 1e6, server, memory[server] / 1e6)
            )
    return "\n".join(lines)


def _taxes(loads):
    """What 8 adapters take from 8 streams on the base, for each server that had both loads."""
    mixed, base = (loads.get(f"8 streams, {what}", {}) for what in ("8 adapters", "base"))
    found = {name: _median(base[name], RATE) / _median(mixed[name], RATE) - 1 for name in mixed.keys() & base.keys()}
    if "thimble" not in found:
        return []
    ours = found.pop("thimble")
    name = "more time than on the base, %"
    return [_row("8 streams, 8 adapters", name, 100 * ours, server, 100 * other) for server, other in found.items()]


def _figures(rounds):
    return [FIRST_P95 if name == FIRST else name for name in rounds[0]]


def _median(rounds, name):
    """The median over rounds; of first tokens the 95th percentile over all answers."""
    if name == FIRST_P95:
        return worst([seconds for one in rounds for seconds in one[FIRST]], 95)
    return statistics.median(one[name] for one in rounds)


def _row(load, name, ours, server="", theirs=None):
    one, other = ("" if value is None else f"{value:.3g}" for value in (ours, theirs))
    ratio = f"{ours / theirs:.2f}" if ours is not None and theirs else ""
    return f"| {load} | {name} | {one} | {server} | {other} | {ratio} |"


def _write_down(text):
    """Put the tables into RESULTS.md, in place of the last ones."""
    page = HERE / "RESULTS.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before.rstrip()}\n\n{BEGIN}\n{text}\n{END}\n{after.lstrip()}", encoding="utf-8")
