"""The keys of JSON reports, and the keys they had before: reports carry both for one release, and either is read."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "messages": "told", "rollbacks": "returns", "best_step": "kept_step", "initialization": "start",
    "metrics_before": "task_before", "metrics_after": "task_after", "metrics_rows": "task_rows",
    "target_tokens": "label_tokens", "target_tokens_per_epoch": "label_tokens_per_epoch",
}  # fmt: skip
_NEW = {old: new for new, old in RENAMED.items()}


def to_json_dict(report: Any) -> dict[str, Any]:
    """A report as JSON can hold it, NaN and Inf as None, renamed fields also by their old names; also for `--json`."""
    values = {spec.name: _plain(getattr(report, spec.name)) for spec in dataclasses.fields(report)}
    return values | {RENAMED[name]: value for name, value in values.items() if name in RENAMED}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_new_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """What was written with old keys, new keys or both, with the new keys only; a new key wins over its old one."""
    return {_NEW.get(name, name): value for name, value in values.items() if _NEW.get(name) not in values}
