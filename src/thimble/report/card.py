"""README.md of an adapter folder, as the Hugging Face hub wants it: what the adapter is, what it does, how it is used.

The same run always makes the same text: it holds no time, no place on this machine and nothing that was measured by the
clock. A marker holds the hash of the rest, so that a text that somebody has changed is theirs, and is left alone.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thimble.config.options import Options, as_command, options_of
from thimble.config.paths import without_folders
from thimble.config.train import TrainConfig
from thimble.errors import escaped, plural
from thimble.report.formatting import is_number, number
from thimble.report.verdict import score
from thimble.report.words import TEXT, is_text, words_of

CARD = "README.md"
MOST_BYTES = 1_000_000  # of a card of ours; a longer one is not ours
MOST_FILES = 4  # of the data, whose hashes are listed
# Which highest ranks vLLM can be started with.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# What the hub calls the tasks.
PIPELINES = {
    TEXT: "text-generation", "classify-text": "text-classification", "embed": "sentence-similarity",
    "classify-image": "image-classification", "classify-audio": "audio-classification",
    "transcribe": "automatic-speech-recognition",
}  # fmt: skip
_MARKER = re.compile(r"<!-- Written by Thimble; (?:sha256 ([0-9a-f]{64}|))\. [^\n]*-->")
# Options that say how a run was watched and kept, and not what it made.
_NOT_REPEATED = {"out", "resume", "accept_changes", "explain", "memory_budget", "checkpoint_every_steps",
                 "checkpoint_every_minutes"}  # fmt: skip


@dataclass(frozen=True)
class About:
    """What a card says of an adapter and its base.

    Attributes:
        base: Name of the base, for people.
        hub_name: Its hub name, `owner/name`; empty if none is known.
        file: Name of the file, if the base is a GGUF file.
        license: Of the base; empty if it does not say.
        loader: The class of transformers that opens the base; empty for a function of the user's own.
        ranks: Of the layers.
        scales: Of the layers.
        parameters: In the adapter.
        use_dora: Whether it is DoRA.
        task: What it was trained for.
        labels: How many classes it tells apart; 0 where there are none.
    """

    base: str
    hub_name: str
    file: str
    license: str
    loader: str
    ranks: Sequence[int]
    scales: Sequence[float]
    parameters: int
    use_dora: bool
    task: str = TEXT
    labels: int = 0


def is_ours(path: Path) -> bool:
    """Whether a card is as Thimble wrote it."""
    try:
        if path.is_symlink() or path.stat().st_size > MOST_BYTES:
            return False
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    found = _MARKER.search(text)
    return found is not None and found[1] == _hash(text[: found.start(1)] + text[found.end(1) :])


def training_card(about: About, report: Mapping[str, Any], data: Mapping[str, str]) -> str:
    """The card of what a run made, from its report and the SHA-256 of its data files."""
    made = [f"{plural(report['training_rows'], 'row')} to learn from, {report['validation_rows']:,} held out"]
    made += [f"{_plain(os.path.basename(name))}, sha256 `{digest}`" for name, digest in list(data.items())[:MOST_FILES]]
    made += [f"and {len(data) - MOST_FILES} more files"] if len(data) > MOST_FILES else []
    facts = [("data", "; ".join(made)), ("steps", f"{report['steps']:,}")]
    config = TrainConfig.build({name: value for name, value in report["config"].items() if value is not None})
    parts = [_figures(report), *_verdict(report.get("verdict") or {}), _command("train", config, _NOT_REPEATED)]
    return _card(about, facts, parts)


def derived_card(about: About, command: str, config: Options, facts: Iterable[tuple[str, str]]) -> str:
    """The card of an adapter that a command made of others."""
    return _card(about, facts, [_command(command, config, {"out"})])


def _card(about: About, facts: Iterable[tuple[str, str]], parts: Iterable[str]) -> str:
    """Front matter, marker, a table of facts, and the parts."""
    rank = f"{about.ranks[0]}" if len(set(about.ranks)) == 1 else f"{min(about.ranks)} to {max(about.ranks)}"
    kind = "DoRA" if about.use_dora else "LoRA"
    base = f"[{about.hub_name}](https://huggingface.co/{about.hub_name})" if about.hub_name else _plain(about.base)
    rows = [("base", base + (f", as {_plain(about.file)}" if about.file else "")), *facts]
    rows.append(("adapter", f"{kind}, rank {rank}, {len(about.ranks)} layers, {about.parameters:,} parameters"))
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])
    marker = "<!-- Written by Thimble; sha256 . A text that was changed is never written over. -->"
    title = f"# {kind} adapter for {_plain(about.hub_name or about.base)}"
    text = "\n\n".join([f"---\n{_front_matter(about)}---\n{marker}", title, table, *parts, _use(about)]) + "\n"
    return text.replace("sha256 .", f"sha256 {_hash(text)}.", 1)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _front_matter(about: About) -> str:
    """YAML, in which texts may stand as JSON."""
    tags = [f"base_model:adapter:{about.hub_name}"] * bool(about.hub_name) + ["lora", "peft", "thimble"]
    lines = [f"base_model: {json.dumps(about.hub_name)}"] * bool(about.hub_name) + ["library_name: peft"]
    lines += [f"license: {json.dumps(about.license)}"] * bool(about.license)
    lines += [
        f"pipeline_tag: {PIPELINES.get(about.task, PIPELINES[TEXT])}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    return "".join(f"{line}\n" for line in lines)


def _figures(report: Mapping[str, Any]) -> str:
    """What was measured before and after, on rows that were held out and on general text."""
    rows = [
        (what, *(number(report[f"{name}_{when}"]) for when in ends))
        for what, name, ends in (
            (
                f"loss on held-out {words_of(report).rows}, nats" + " per token" * is_text(report),
                "loss",
                ("base", "after"),
            ),
            ("loss on general text, nats per token", "general", ("before", "after")),
        )
        if is_number(report[f"{name}_{ends[0]}"])
    ]
    before, after = report["metrics_before"], report["metrics_after"]
    told = [(name, *(_score(report, name, side) for side in (before, after))) for name in before]
    rows += [(f"{_plain(name)}, of {report['metrics_rows']:,} answers", *sides) for name, *sides in told]
    if not rows:
        return "Nothing was measured: no rows were held out."
    before = words_of(report).before.removeprefix("the ")
    return "\n".join(
        [f"| | {before} | with the adapter |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    )


def _score(report: Mapping[str, Any], name: str, metrics: Mapping[str, float]) -> str:
    return score(report, name, metrics[name]) if name in metrics else "not measured"


def _verdict(verdict: Mapping[str, Any]) -> list[str]:
    if not verdict:
        return []
    return [_plain(f"Did it work? {verdict['word']}. {verdict['text']}"), *map(_plain, verdict["cautions"])]


def _command(name: str, config: Options, left_out: Iterable[str]) -> str:
    """The command that makes the adapter again, with names of files and folders but not where they lie."""
    specs = options_of(type(config))
    plain = config.replace(**{name: specs[name].default for name in left_out if name in specs})
    line = as_command(name, without_folders(plain))
    return f"Made with Thimble; this makes it again:\n\n```bash\n{line}\n```"


def _use(about: About) -> str:
    """How the adapter is used elsewhere."""
    if about.task != TEXT:
        return _use_in_task(about)
    base, parts = _base_elsewhere(about), [f"## Use\n\n{_with_peft(about)}"]
    if about.use_dora:
        return "\n\n".join([*parts, "llama.cpp, Ollama and vLLM do not run DoRA: merge it into the base with "
                            "`thimble merge adapter --base BASE --out merged`."])  # fmt: skip
    parts.append(
        "With llama.cpp and Ollama, beside a GGUF file of the base:\n\n```bash\n"
        "thimble export adapter --out adapter.gguf\nllama-server -m base.gguf --lora adapter.gguf\n```\n\n"
        "```text\nFROM ./base.gguf\nADAPTER ./adapter.gguf\n```"
    )
    highest = next((rank for rank in VLLM_RANKS if rank >= max(about.ranks)), None)
    if len({round(scale, 6) for scale in about.scales}) > 1:
        parts.append(
            "Not with vLLM as it is: vLLM gives all layers one scale, alpha / r, and those of this adapter differ. "
            "Merge it into the base first."
        )
    elif highest is None:
        parts.append(f"Not with vLLM as it is, which takes ranks up to {VLLM_RANKS[-1]}: merge it into the base first.")
    else:
        parts.append(
            f"With vLLM:\n\n```bash\nvllm serve {base} --enable-lora --max-lora-rank {highest} --lora-modules "
            "mine=adapter\n```"
        )
    return "\n\n".join(parts)


def _use_in_task(about: About) -> str:
    """The same of an adapter that makes no model write as an answer to a prompt."""
    base = "" if about.hub_name else " --base BASE"
    parts = ["## Use\n\n```bash\nthimble generate DATA --adapter adapter" + base + " --out answers.jsonl\n```"]
    return "\n\n".join([*parts, _with_peft(about)] if about.loader else parts)


def _base_elsewhere(about: About) -> str:
    return about.hub_name or ("path/to/its/folder" if about.file else f"path/to/{_plain(about.base)}")


def _with_peft(about: About) -> str:
    """The lines of Python that open base and adapter."""
    file = f', gguf_file="{_plain(about.file)}"' if about.file and not about.hub_name else ""
    classes = f", num_labels={about.labels}, ignore_mismatched_sizes=True" if about.labels else ""
    return (
        "With PEFT, where `adapter` is this folder:\n\n```python\nfrom peft import PeftModel\n"
        f"from transformers import {about.loader}\n\n"
        f'base = {about.loader}.from_pretrained("{_base_elsewhere(about)}"{file}{classes})\n'
        'model = PeftModel.from_pretrained(base, "adapter")\n```'
    )


def _plain(text: str) -> str:
    """Text from elsewhere, so that Markdown and a table show it as it is."""
    return re.sub(r"([|<>`*_\[\]])", r"\\\1", escaped(text)) if re.search(r"[|<>`*\[\]]", text) else escaped(text)
