"""What a run writes: the sink of the training loop that fills a run folder."""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from thimble import __version__
from thimble.core.adapter import Adapter
from thimble.core.metrics import LossSum
from thimble.events import EventLog
from thimble.models.adapter_base import manifest_entry
from thimble.models.frozen_base import FrozenBase
from thimble.report.card import training_card
from thimble.report.gallery import Shown
from thimble.report.keys import to_json_dict
from thimble.report.page import write_report
from thimble.report.verdict import judge
from thimble.training import run_folder
from thimble.training.answers import Answer
from thimble.training.card import about_adapter, write_card
from thimble.training.checkpoint import (
    BEFORE,
    HASHED,
    NOTED,
    clear_checkpoints,
    clear_unfinished,
    save_checkpoint,
    saved_origin,
)
from thimble.training.protocols import Before, Scores
from thimble.training.result import TrainReport


class RunFolderSink:
    """Fills a run folder, once rid of what a killed run left half-written; holding its lock is up to the caller."""

    def __init__(self, folder: Path, origin: Mapping[str, str], data: Sequence[Path]) -> None:
        self._folder, self._origin = folder, origin
        self._data = {str(path): run_folder.hash_file(path) for path in data}
        self._steps: run_folder.StepLog  # from the beginning of the run on
        self._measured: dict[str, Any] = {}  # how rows are answered and scored
        self._adapter: Path | None = None  # where the result is, once it is written
        clear_unfinished(folder)

    def begin(
        self, config: Mapping[str, Any], skipped: Sequence[Mapping[str, str]], initial: Adapter | None, done_steps: int
    ) -> None:
        """Write what is known before the first step, with the initial adapter if its seed alone cannot redo it."""
        if not done_steps and self._is_of_another_base():
            (self._folder / BEFORE).unlink()  # with what is accepted now, it is measured again
        run_folder.write_config(self._folder, config)
        metric = Path(str(config["metric"])).name  # a file of the user's own may lie elsewhere by then
        self._measured = {"metric": metric, "rows": config["eval_rows"], "tokens": config["max_new_tokens"]}
        if skipped:
            lines = "".join(json.dumps(row) + "\n" for row in skipped)
            run_folder.write_text(self._folder / "skipped.jsonl", lines)
        if initial:
            run_folder.publish_adapter(self._folder, initial, run_folder.START)
        self._steps = run_folder.StepLog(self._folder / run_folder.STEPS, done_steps)

    def saved_before(self) -> Before | None:
        """What an interrupted run measured before its first step, if that is known and measured as what is after."""
        saved = run_folder.read_json(self._folder / BEFORE)
        if not saved or saved.get("measured", self._measured) != self._measured:
            return None
        answers = [Answer(**answer) for answer in saved["answers"]]
        losses, general = (
            {row: LossSum(nats, tokens) for row, nats, tokens in saved.get(name, ())}
            for name in ("row_losses", "general_rows")
        )
        train_loss = math.nan if saved.get("train_loss") is None else saved["train_loss"]
        base = Scores(saved["loss_base"], saved["general_before"], answers, losses, train_loss, general)
        return Before(base, saved["loss_before"])

    def _is_of_another_base(self) -> bool:
        began = saved_origin(self._folder)
        return began is not None and any(began[name] != self._origin[name] for name in HASHED)

    def scratch_file(self) -> BinaryIO:
        """See Sink; in the run folder, for the system's place for such files may be memory."""
        return tempfile.TemporaryFile(dir=self._folder)  # type: ignore[return-value]

    def write_before(self, before: Before) -> None:
        """Keep what was measured before the first step."""
        base, answers = before.base, [answer.described() for answer in before.base.answers]
        values = {
            "loss_base": base.loss, "loss_before": before.loss, "general_before": base.general_loss,
            "metrics_before": base.metrics, "metrics_rows": len(answers), "answers": answers,
            "origin": {name: self._origin[name] for name in NOTED if name in self._origin},
            "measured": self._measured,
            "row_losses": [(row, loss.nats, loss.tokens) for row, loss in base.row_losses.items()],
            "general_rows": [(row, loss.nats, loss.tokens) for row, loss in base.general_rows.items()],
            "train_loss": None if math.isnan(base.train_loss) else base.train_loss,
        }  # fmt: skip
        run_folder.write_json(self._folder / BEFORE, values)

    def write_step(self, row: Mapping[str, Any]) -> None:
        """Append a step to metrics.jsonl."""
        self._steps.add(dict(row))

    def write_checkpoint(
        self, step: int, arrays: Mapping[str, NDArray[np.float32]], progress: Mapping[str, Any]
    ) -> None:
        """Save a checkpoint, with every step up to it in metrics.jsonl; raises OSError if there is no room."""
        self._steps.flush()
        save_checkpoint(self._folder, step, arrays, progress, self._origin)

    def end_steps(self) -> None:
        """Close metrics.jsonl."""
        self._steps.close()

    def write_adapter(self, adapter: Adapter) -> None:
        """Publish the adapter; raises OSError if there is no room."""
        self._adapter = run_folder.publish_adapter(self._folder, adapter)

    def publish(
        self, adapter: Adapter, report: TrainReport, base: FrozenBase, log: EventLog, shown: Sequence[Shown] = ()
    ) -> None:
        """Write the adapter if it is not yet, the manifest and the reports; checkpoints that are needed no more go.

        `shown` are pictures or clips for the page.
        """
        folder = self._folder
        if self._adapter is None:
            self.write_adapter(adapter)
        report.adapter = str(self._adapter)
        place = manifest_entry(base, folder, self._origin["base"])
        about = {"name": base.name, "sha256": _fingerprint(base, log), **place}
        run_folder.write_manifest(folder, about, self._data, __version__)
        steps = run_folder.read_steps(folder / run_folder.STEPS)
        report.verdict = asdict(judge(asdict(report), steps))
        write_report(folder / "report.html", asdict(report), steps, shown)
        card = training_card(about_adapter(adapter, base), asdict(report), self._data)
        write_card(folder / "adapter", card)
        run_folder.write_json(folder / "report.json", to_json_dict(report))  # last: with it the run is done
        if report.status == "done" and not report.config.get("checkpoint_every_steps"):
            clear_checkpoints(folder)


def _fingerprint(base: FrozenBase, log: EventLog) -> str | None:
    try:
        return base.fingerprint()
    except OSError as error:
        log.warning(f"the base is gone ({error.filename}), so the manifest does not hold its hash")
        return None
