"""`make bench`: Thimble against its peers on this machine, alternating in one run; writes RESULTS.md and results.json.

Every contestant is a process of its own, so that peak memory is the kernel's figure for it alone. Rounds alternate, and
ratios are taken between medians of the same run. `--only NAME ...` runs some rows and keeps the others as they are.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
MODELS = Path(os.environ.get("THIMBLE_BENCH_MODELS", HERE / "models"))
DEMO = HERE.parent / "demo"
DEMO_DATA = DEMO / "data"
PEERS_PYTHON = HERE / "peers-env" / "bin" / "python"  # of the environment made from peers.txt
ROUNDS = 3
GROUP = Path("/sys/fs/cgroup/memory/thimble-bench")
BEGIN, END = "<!-- serving: written by benchmarks/serve.py -->", "<!-- end of serving -->"
NO_MORE = "at most"
NO_LESS = "at least"


@dataclass
class Row:
    """One line of the table.

    Attributes:
        group: Name for `--only`.
        name: What was measured.
        peer: Against what; empty for a figure that stands alone.
        ratio: Ours against the peer's, or the figure itself.
        bound: `at least` or `at most`.
        goal: None where there is none.
        ours: What stands above the line of the ratio, with its unit.
        runs: Rounds; 0 stands for those of the whole run.
    """

    group: str
    name: str
    peer: str
    ratio: float
    bound: str = NO_LESS
    goal: float | None = None
    ours: str = ""
    runs: int = 0


# ---- running contestants --------------------------------------------------------------------------------------------


def run_contestant(program: str, *arguments: str, python: str | Path = sys.executable, limit_bytes: int = 0) -> dict:
    """Run one program of this folder, in a memory control group if asked; its last line is a JSON object."""
    command = [str(python), str(HERE / program), *arguments]
    with _control_group(limit_bytes) as join:
        result = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=join)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    found = json.loads(result.stdout.strip().splitlines()[-1])
    print(f"  {program} {' '.join(arguments)}: {found}", flush=True)
    return found


@contextmanager
def _control_group(limit_bytes: int):  # noqa: ANN202
    if not limit_bytes:
        yield None
        return
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(limit_bytes))
    yield lambda: (GROUP / "cgroup.procs").write_text(str(os.getpid()))
    GROUP.rmdir()


def alternate(
    contestants: dict[str, tuple[str, ...]], rounds: int, peers: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """Run contestants in turns, those named as peers in the peers' environment; medians of their figures."""
    found: dict[str, list[dict]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, arguments in contestants.items():
            python = PEERS_PYTHON if name in peers else sys.executable
            found[name].append(run_contestant(*arguments, python=python))
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}


def model(shape: str, dtype: str) -> str:
    """A model with random weights, made at the first use."""
    from make_models import write_model

    MODELS.mkdir(parents=True, exist_ok=True)
    return str(write_model(shape, dtype, MODELS / f"{shape}-{dtype}.gguf"))


def compared(
    group: str, what: str, ours: dict, peer_name: str, peer: dict, goals: tuple[float | None, float | None]
) -> list[Row]:
    """Speed and memory of a contestant against a peer's."""
    rate, size = ours["tokens_per_second"], ours["peak_bytes"]
    speed, memory = rate / peer["tokens_per_second"], size / peer["peak_bytes"]
    return [
        Row(group, f"tokens/s, {what}", peer_name, speed, NO_LESS, goals[0], f"{rate:.1f} tokens/s"),
        Row(group, f"peak memory, {what}", peer_name, memory, NO_MORE, goals[1], f"{size / 1e9:.2f} GB"),
    ]


# ---- rows -----------------------------------------------------------------------------------------------------------

PLANS: list[dict] = []  # what was planned and measured, of every contestant of ours


def note_plan(found: dict[str, dict]) -> None:
    """Keep what the plan expected of our contestants."""
    PLANS.extend(row for row in found.values() if "planned_bytes" in row)


def step_135m(group: str, labels: str, goals: dict[str, float]) -> list[Row]:
    """SmolLM2's shape, 4 rows of 512 tokens."""
    ours = ("train_thimble.py", "--labels", labels, "--base", model("135m", "BF16"), "--compute")
    peer = ("train_peft.py", "--labels", labels, "--dtype")
    found = alternate({
        "bf16": (*ours, "bf16", "--store", "dense"), "int8": (*ours, "int8", "--store", "int8"),
        "PEFT bf16": (*peer, "bf16"), "PEFT fp32 medium": (*peer, "medium"),
        "PEFT bf16, compiled": (*peer, "bf16", "--compile"),
        "PEFT bf16, compiled, checkpointing": (*peer, "bf16", "--compile", "--checkpointing"),
    }, ROUNDS)  # fmt: skip
    note_plan(found)
    eager = max(("PEFT bf16", "PEFT fp32 medium"), key=lambda name: found[name]["tokens_per_second"])
    what = f"135M shape, 4x512 tokens, {float(labels):.0%} target tokens"
    rows = []
    for peer_name in (eager, "PEFT bf16, compiled", "PEFT bf16, compiled, checkpointing"):
        wanted = goals if peer_name == eager else {"bf16": 2.4, "int8": 2.4, "memory": 0.5}
        for compute in ("bf16", "int8"):
            bounds = (wanted[compute], wanted["memory"])
            rows += compared(group, f"{what}, {compute}", found[compute], peer_name, found[peer_name], bounds)
    return rows


def step_fp32(group: str) -> list[Row]:
    """The same in float32 alone, for machines without instructions for bfloat16."""
    ours = ("train_thimble.py", "--base", model("135m", "BF16"), "--compute", "fp32", "--store", "dense")
    peers = {
        "PEFT fp32": ("train_peft.py", "--dtype", "fp32"),
        "PEFT fp32, compiled": ("train_peft.py", "--dtype", "fp32", "--compile"),
        "PEFT fp32, compiled, checkpointing": ("train_peft.py", "--dtype", "fp32", "--compile", "--checkpointing"),
    }
    found = alternate({"ours": ours, **peers}, ROUNDS)
    note_plan(found)
    what = "135M shape, 4x512 tokens, all target tokens, fp32"
    return [row for name in peers for row in compared(group, what, found["ours"], name, found[name], (None, None))]


def step_1b(group: str) -> list[Row]:
    """The shape of Llama-3.2-1B, 2 rows of 512 tokens: as fast as can be, and with less memory."""
    ours = ("train_thimble.py", "--rows", "2", "--steps", "2", "--base")
    whole = ("--compute", "int8", "--store", "int8")
    contestants = {
        "bf16 dense": (*ours, model("1b", "BF16"), "--store", "dense"),
        "bf16 file, streamed": (*ours, model("1b", "BF16"), "--store", "file", "--streamed"),
        "int8": (*ours, model("1b", "Q8_0"), *whole),
        "int8, 12 of 16 blocks recomputed": (*ours, model("1b", "Q8_0"), *whole, "--recomputed", "12"),
        "Q4_0 file": (*ours, model("1b", "Q4_0"), "--store", "file"),
    }
    eager = ("train_peft.py", "--shape", "1b", "--rows", "2", "--steps", "2")
    peer = {"PEFT": eager, "PEFT bf16, compiled": (*eager, "--compile")}
    found = alternate({**contestants, **peer}, ROUNDS)
    note_plan(found)
    goals = {"bf16 dense": (1.6, 0.45), "bf16 file, streamed": (1.6, 0.45), "Q4_0 file": (1.6, 0.35)}
    rows = []
    for name in contestants:
        what = f"1B shape, 2x512 tokens, {name}"
        rows += compared(group, what, found[name], "PEFT bf16", found["PEFT"], goals.get(name, (2.5, 0.35)))
        compiled = "PEFT bf16, compiled"
        rows += compared(group, what, found[name], compiled, found[compiled], (2.0, None))
    share = limit_seconds("1b", 1024) / found["bf16 dense"]["seconds"]
    rows.append(Row(group, "1B shape, bf16, share of the limit 4·N·tokens / rate", "", share, NO_LESS, 0.8))
    slower = found["Q4_0 file"]["seconds"] / found["bf16 dense"]["seconds"]
    rows.append(Row(group, "1B shape, time with a Q4_0 base against a bf16 base", "ourselves", slower, NO_MORE, 1.15))
    return rows


def limit_seconds(shape: str, tokens: int) -> float:
    """What the bf16 products of a step would take at the rate of a large one."""
    from make_models import num_numbers

    from thimble.backends.torch.compute import race

    return 4 * num_numbers(shape) * tokens / race()["bf16"]


def nf4(group: str) -> list[Row]:
    """A base in 4 bits on both sides: Q4_0 in a file against NF4 by bitsandbytes, in the environment of the peers."""
    if not PEERS_PYTHON.exists():
        print(f"  left out: there is no {PEERS_PYTHON}; `make bench` makes it")
        return []
    rows = []
    for shape, count, steps in (("135m", "4", "3"), ("1b", "2", "2")):
        size = ("--rows", count, "--steps", steps)
        found = alternate({
            "ours": ("train_thimble.py", "--base", model(shape, "Q4_0"), "--store", "file", *size),
            "PEFT": ("train_peft.py", "--shape", shape, "--dtype", "nf4", *size),
        }, ROUNDS, peers=("PEFT",))  # fmt: skip
        note_plan(found)
        what = f"{shape.upper()} shape, {count}x512 tokens, Q4_0 file"
        rows += compared(group, what, found["ours"], "PEFT bf16, NF4 base", found["PEFT"], (None, None))
    return rows


def smallest(group: str) -> list[Row]:
    """Both shapes at our smallest memory, against PEFT with gradient checkpointing."""
    rows = []
    for shape, blocks, count in (("135m", "30", "4"), ("1b", "12", "2")):
        ours = ("train_thimble.py", "--rows", count, "--steps", "2", "--recomputed", blocks, "--base")
        whole = ("--compute", "int8", "--store", "int8")
        streamed = ("--store", "file", "--streamed")
        contestants = {
            "bf16 file, streamed": (*ours, model(shape, "BF16"), *streamed),
            "int8 store": (*ours, model(shape, "Q8_0"), *whole),
            "Q8_0 file, streamed": (*ours, model(shape, "Q8_0"), *streamed),
        }
        peer = {"PEFT": ("train_peft.py", "--shape", shape, "--rows", count, "--steps", "2", "--checkpointing")}
        found = alternate({**contestants, **peer}, ROUNDS)
        note_plan(found)
        for name in contestants:
            what = f"{shape} shape, {blocks} blocks recomputed, {name}"
            goals = (1.8, 0.55 if "bf16" in name else 0.35)
            rows += compared(group, what, found[name], "PEFT bf16, checkpointing", found["PEFT"], goals)
    return rows


def larger_than_memory(group: str) -> list[Row]:
    """The shape of Llama-3.1-8B, a file of 4.5 GB, in a memory control group of 4 GB."""
    base = model("8b", "Q4_0")
    ours = ("train_thimble.py", "--base", base, "--rows", "1", "--steps", "2", "--recomputed", "32")
    Path("/proc/sys/vm/drop_caches").write_text("3")
    streamed = run_contestant(*ours, "--streamed", limit_bytes=4_000_000_000)
    inside = run_contestant(*ours)
    note_plan({"streamed": streamed, "inside": inside})
    ratio = streamed["tokens_per_second"] / inside["tokens_per_second"]
    fall = streamed["first_loss"] - streamed["last_loss"]
    return [
        Row(group, "8B shape, Q4_0, 512 tokens a step, 4 GB for everything: tokens/s", "ourselves in RAM", ratio,
            NO_LESS, 0.5, f"{streamed['tokens_per_second']:.1f} tokens/s, {streamed['peak_bytes'] / 1e9:.2f} GB", 1),
        Row(group, "8B shape, Q4_0: fall of the loss on a repeated batch, 2 steps", "", fall, NO_LESS, 0.0, "", 1),
    ]  # fmt: skip


def chat(group: str) -> list[Row]:
    """Chat rows of uneven length, one pass, against HF Trainer."""
    command = ("chat_rows.py", str(DEMO_DATA))
    found = alternate({name: (*command, name) for name in ("bf16", "int8", "trainer")}, ROUNDS)
    peer = found["trainer"]["rows_per_second"]
    return [
        Row(group, f"chat rows of uneven length, one pass, {name}", "HF Trainer + PEFT bf16, 8 rows a step",
            found[name]["rows_per_second"] / peer, NO_LESS, 4.0, f"{found[name]['rows_per_second']:.2f} rows/s")
        for name in ("bf16", "int8")
    ]  # fmt: skip


def quality(group: str) -> list[Row]:
    """Short runs of three tasks in each type of products: the loss on the base in fp32, at most, over that of fp32."""
    rows = []
    for way, tasks in run_contestant("int8_quality.py", "--seeds", "3").items():
        worst = max(tasks.values(), key=lambda task: task["upper"])
        name = (
            f"loss of adapters trained with {way} over those of fp32: upper 95 % bound in %, the worst of three tasks"
        )
        told = ", ".join(f"{task} {found['rise']:+.2%}" for task, found in tasks.items())
        rows.append(Row(group, name, "ourselves, fp32", 100 * worst["upper"], NO_MORE, 0.5, told, worst["pairs"]))
    return rows


def sizes(group: str) -> list[Row]:
    """Tokens per second over row length and over model size; written as a chart."""
    rows = []
    for length in (256, 512, 1024, 2048, 4096):
        count = max(1, 4096 // length)
        arguments = ("--rows", str(count), "--length", str(length), "--steps", "2")
        rows += _size_row(group, f"135M, rows of {length} tokens", *arguments)
    for shape, dtype in (("135m", "BF16"), ("360m", "BF16"), ("1b", "BF16"), ("1.7b", "BF16"), ("3b", "Q8_0")):
        arguments = ("--base", model(shape, dtype), "--rows", "2", "--steps", "2")
        rows += _size_row(group, f"{shape} shape, {dtype} file, rows of 512 tokens", *arguments)
    return rows


def _size_row(group: str, name: str, *arguments: str) -> list[Row]:
    found = run_contestant("train_thimble.py", *arguments)
    note_plan({name: found})
    rate = found["tokens_per_second"]
    return [Row(group, f"tokens/s, {name}", "", rate, NO_LESS, None, f"{found['peak_bytes'] / 1e9:.2f} GB", 1)]


def planner(group: str) -> list[Row]:
    """How near the plan is to what is measured: all of our contestants of this run, and 20 random configurations."""
    draw = random.Random(0)
    for _ in range(20):
        shape, dtype = draw.choice([("135m", "BF16"), ("135m", "Q8_0"), ("360m", "BF16"), ("1b", "Q8_0")])
        compute = draw.choice(["bf16", "bf16", "int8", "fp32"])
        store = "int8" if compute == "int8" else draw.choice(["file", "dense", "int8"])
        blocks = {"135m": 30, "360m": 32, "1b": 16}[shape]
        arguments = [
            "--base", model(shape, dtype), "--compute", compute, "--store", store,
            "--rows", str(draw.choice([1, 2, 4])), "--length", str(draw.choice([128, 256, 512, 1024])),
            "--rank", str(draw.choice([4, 16, 64])), "--labels", str(draw.choice([0.1, 0.4, 1.0])),
            "--recomputed", str(draw.choice([0, 0, blocks // 2, blocks])), "--steps", "2",
        ]  # fmt: skip
        if store == "file" and draw.random() < 0.3:
            arguments.append("--streamed")
        note_plan({"random": run_contestant("train_thimble.py", *arguments)})
    memory = sorted(abs(row["planned_bytes"] / row["peak_bytes"] - 1) for row in PLANS)
    seconds = sorted(abs(row["planned_seconds"] / row["seconds"] - 1) for row in PLANS)
    of = f"of {len(PLANS)} configurations"
    return [
        Row(group, f"plan: largest error of peak memory {of}", "measured", memory[-1], NO_MORE, 0.10, "", 1),
        Row(group, f"plan: median error of peak memory {of}", "measured", statistics.median(memory), NO_MORE, runs=1),
        Row(group, f"plan: median error of time {of}", "measured", statistics.median(seconds), NO_MORE, 0.20, "", 1),
        Row(group, f"plan: 90th percentile of the error of time {of}", "measured",
            seconds[int(0.9 * (len(seconds) - 1))], NO_MORE, 0.40, "", 1),
    ]  # fmt: skip


def starts(group: str) -> list[Row]:
    """Starts that PEFT has too, on SmolLM2 once it is loaded: time, and memory beside the model."""
    rows = []
    for init in ("pissa", "olora", "eva"):
        found = alternate({who: ("starts.py", who, init, str(DEMO_DATA)) for who in ("ours", "peft")}, ROUNDS)
        ours, peer = found["ours"], found["peft"]
        faster, less = peer["seconds"] / ours["seconds"], ours["extra_bytes"] / peer["extra_bytes"]
        told = f"{ours['seconds']:.2f} s", f"{ours['extra_bytes'] / 1e6:.0f} MB"
        rows += [
            Row(group, f"init {init}: times as fast", f"PEFT {init}", faster, NO_LESS, 5.0, told[0]),
            Row(group, f"init {init}: extra memory", f"PEFT {init}", less, NO_MORE, 0.333, told[1]),
        ]
    for init, goal in (("gradient", 60.0), ("gradient:lora-ga", 60.0)):
        ours = alternate({"ours": ("starts.py", "ours", init, str(DEMO_DATA))}, ROUNDS)["ours"]
        rows.append(Row(group, f"init {init}: seconds", "", ours["seconds"], NO_MORE, goal))
    return rows


def start(group: str) -> list[Row]:
    """Seconds from process start to the end of the first optimiser step, evaluation before training not counted."""
    from make_rows import ten_rows

    times = []
    for _ in range(ROUNDS + 1):  # the first one warms caches and is dropped
        with tempfile.TemporaryDirectory() as folder:
            ten_rows(Path(folder) / "ten.jsonl")
            command = ["-m", "thimble", "train", f"{folder}/ten.jsonl", "--max-steps", "1", "--valid-split", "0",
                       "--eval-rows", "0", "--out", f"{folder}/run", "--json"]  # fmt: skip
            began = time.time()
            subprocess.run([sys.executable, "-c", FIRST_STEP, *command], check=True, capture_output=True, cwd=folder)
            times.append(float((Path(folder) / "first_step").read_text()) - began)
    name = "seconds from start to the end of the first step, SmolLM2 GGUF, warm"
    return [Row(group, name, "", statistics.median(times[1:]), NO_MORE, 4.0)]


# Runs `thimble train` in this process and notes when the first step is logged, less what the evaluation took.
FIRST_STEP = """
import sys, time, thimble.training.loop as loop
from thimble.training.sink import RunFolderSink
spent, before, write = [0.0], loop.measure_before, RunFolderSink.write_step
def timed(*a):
    began = time.time(); found = before(*a); spent[0] = time.time() - began; return found
def noted(self, row):
    open("first_step", "w").write(str(time.time() - spent[0])); write(self, row)
loop.measure_before, RunFolderSink.write_step = timed, noted
sys.argv = sys.argv[2:]
from thimble.cli import run
run()
"""


def export(group: str) -> list[Row]:
    """GGUF files: the whole command, from its start to the file on disk, without a proof."""
    rows = []
    for kind, goal in (("adapter", 1.0), ("Q8_0", 30.0), ("Q4_K_M", 60.0)):
        found = alternate({kind: ("export.py", str(MODELS), kind)}, ROUNDS)[kind]
        what = "an adapter of SmolLM2 as GGUF" if kind == "adapter" else f"1B shape with its adapter merged, as {kind}"
        processor = f"{found['cpu_seconds']:.1f} s of processor"
        rows += [
            Row(group, f"export: seconds, {what}", "", found["seconds"], NO_MORE, goal, processor),
            Row(group, f"export: peak memory in GB, {what}", "", found["peak_bytes"] / 1e9, NO_MORE, 0.5),
        ]
    return rows


def pictures(group: str) -> list[Row]:
    """A network of convolutions on pictures, in both layouts that PEFT's tensors may have."""
    rows = []
    for peer, options in (("PEFT", ()), ("PEFT, channels-last", ("--channels-last",))):
        found = run_contestant("pictures.py", demo("image"), "--rounds", str(ROUNDS), *options)
        rows += compared_steps(group, "EfficientNet-lite0, 32 pictures of 96 pixels, fp32", found, peer, (1.2, 0.8))
    for last in (1, 2):
        found = run_contestant("kept_features.py", demo("image"), "--last", str(last))
        what = f"EfficientNet-lite0, LoRA on the last {last} and the head: an epoch from kept features, times as fast"
        told = f"{found['seconds']:.2f} s"
        rows += [
            Row(group, what, "an epoch that runs all", found["whole_over_kept_wall"], NO_LESS, 5.0, told, 1),
            Row(group, what, "the first, which keeps them", found["first_over_second_wall"], NO_LESS, 5.0, told, 1),
        ]
    return rows


def sentences(group: str) -> list[Row]:
    """A text encoder on pairs of uneven length."""
    found = run_contestant("encoder.py", demo("sentences"), "--rounds", str(ROUNDS))
    return compared_steps(group, "MiniLM, 32 questions and answers, fp32", found, "PEFT", (2, 0.6))


def speech(group: str) -> list[Row]:
    """Whisper on short clips, against PEFT with windows of the longest clip, and with those of its processor."""
    contestants = {
        way: ("speech.py", demo("speech/names"), demo("speech/whisper"), "--way", way, "--steps", "10")
        for way in ("thimble", "peft", "peft-30")
    }
    found = alternate(contestants, ROUNDS)
    ours, what = found["thimble"], "Whisper tiny.en, 16 clips, fp32"
    rows = []
    for way, peer in (("peft", "PEFT, windows of the longest clip"), ("peft-30", "PEFT, windows of 30 seconds")):
        ratios = {
            "speed": found[way]["seconds"] / ours["seconds"], "memory": ours["peak_bytes"] / found[way]["peak_bytes"],
            "steps_per_second": 1 / ours["seconds"], "peak_bytes": ours["peak_bytes"],
        }  # fmt: skip
        rows += compared_steps(group, what, ratios, peer, (1.4, 0.7))
    return rows


def compared_steps(group: str, what: str, found: dict, peer: str, goals: tuple[float, float]) -> list[Row]:
    """Speed and memory of steps that sides.py compared."""
    rate, size = f"{found['steps_per_second']:.2f} steps/s", f"{found['peak_bytes'] / 1e9:.2f} GB"
    return [
        Row(group, f"steps/s, {what}", peer, found["speed"], NO_LESS, goals[0], rate),
        Row(group, f"peak memory, {what}", peer, found["memory"], NO_MORE, goals[1], size),
    ]


def demo(name: str) -> str:
    """Data and base that a demo fetched."""
    if not (DEMO / name).exists():
        raise SystemExit(f"{DEMO / name} is missing: run `make demo-image demo-speech demo-encoder` first")
    return str(DEMO / name)


def show_help(group: str) -> list[Row]:
    """Seconds of `thimble --help`."""
    times = []
    for _ in range(7):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "thimble", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return [Row(group, "seconds of thimble --help", "", statistics.median(times), NO_MORE, 0.3, "", len(times))]


GROUPS: dict[str, Callable[[str], list[Row]]] = {
    "help": show_help,
    "start": start,
    "starts": starts,
    "135m": lambda group: step_135m(group, "1.0", {"bf16": 2.3, "int8": 2.8, "memory": 0.45}),
    "135m-40": lambda group: step_135m(group, "0.4", {"bf16": 2.6, "int8": 3.1, "memory": 0.45}),
    "fp32": step_fp32,
    "1b": step_1b,
    "nf4": nf4,
    "smallest": smallest,
    "8b": larger_than_memory,
    "chat": chat,
    "export": export,
    "pictures": pictures,
    "speech": speech,
    "sentences": sentences,
    "quality": quality,
    "sizes": sizes,
    "planner": planner,
}


# ---- writing --------------------------------------------------------------------------------------------------------


def write_results(rows: list[Row]) -> None:
    """Write the table for people and the numbers behind it; groups that were not measured now stay as they are."""
    import torch

    from thimble.backends.torch.compute import machine

    path, now = HERE / "results.json", asdict(machine()) | {"torch": torch.__version__}
    now["measured"] = time.strftime("%Y-%m-%d")
    measured = {row.group for row in rows}
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    lines = [line for line in old if line.get("group") in GROUPS and line["group"] not in measured]
    lines += [{**asdict(row), "runs": row.runs or ROUNDS, "machine": now} for row in rows]
    lines.sort(key=lambda line: list(GROUPS).index(line["group"]))
    path.write_text(json.dumps({"rows": lines}, indent=2) + "\n")
    (HERE / "RESULTS.md").write_text(as_page(lines))


def as_page(lines: list[dict]) -> str:
    """The table for people."""
    page = ["# Results", "", "Written by `make bench`; ratios of medians, contestants alternating in one run.", ""]
    machines = {json.dumps(line["machine"], sort_keys=True): line["machine"] for line in lines}
    for machine in machines.values():
        rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in machine["flops"].items())
        page.append(
            f"Machine: {machine['name']}, {machine['cores']} cores; large products, G operations/s: {rates}; "
            f"torch {machine['torch']}; {machine['measured']}"
        )
        page.append("")
    page += ["| what | against | measured | goal | ours | rounds |", "|---|---|---|---|---|---|"]
    for line in lines:
        goal = "" if line["goal"] is None else f"{line['bound']} {line['goal']:g}"
        met = "" if line["goal"] is None else _met(line)
        cells = (line["name"], line["peer"], f"{line['ratio']:.3g}{met}", goal, line["ours"], str(line["runs"]))
        page.append(f"| {' | '.join(cells)} |")
    if (HERE / "sizes.svg").exists():
        page += ["", "![Tokens per second over row length and model size](sizes.svg)"]
    if (HERE / "initialisation.md").exists():
        page += ["", (HERE / "initialisation.md").read_text().rstrip()]
    return "\n".join([*page, "", serving()]) + "\n"


def serving() -> str:
    """What `make bench-serve` wrote into the page, between its marks."""
    page = (HERE / "RESULTS.md").read_text()
    return page[page.index(BEGIN) : page.index(END) + len(END)]


def _met(line: dict) -> str:
    is_met = line["ratio"] >= line["goal"] if line["bound"] == NO_LESS else line["ratio"] <= line["goal"]
    return "" if is_met else " (missed)"


def draw_sizes(rows: list[Row]) -> None:
    """The chart of tokens per second over row length and over model size."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    lengths = [row for row in rows if "rows of" in row.name and row.name.startswith("tokens/s, 135M")]
    left.plot([int(row.name.split()[-2]) for row in lengths], [row.ratio for row in lengths], "o-")
    left.set(xscale="log", xlabel="tokens in a row", ylabel="tokens/s", title="135M, 4096 tokens a step", ylim=0)
    left.set_xticks([256, 512, 1024, 2048, 4096], ["256", "512", "1024", "2048", "4096"])
    left.minorticks_off()
    shapes = [row for row in rows if "shape" in row.name]
    right.loglog([_parameters(row.name) for row in shapes], [row.ratio for row in shapes], "o-")
    right.set(xlabel="parameters", ylabel="tokens/s", title="2 rows of 512 tokens")
    right.set_xticks([_parameters(row.name) for row in shapes], [row.name.split(", ")[1].split()[0] for row in shapes])
    right.set_yticks([50, 100, 200, 500, 1000], ["50", "100", "200", "500", "1000"])
    right.minorticks_off()
    figure.savefig(HERE / "sizes.svg")


def _parameters(name: str) -> float:
    size = name.split(", ")[1].split()[0].lower()
    return float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    ROUNDS = options.rounds
    for group in options.only:
        print(f"{group} ...", flush=True)
        found = GROUPS[group](group)
        if group == "sizes":
            draw_sizes(found)
        write_results(found)
    print((HERE / "RESULTS.md").read_text())
