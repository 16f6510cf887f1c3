"""The options of `thimble generate`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from thimble.config.groups import AnswerOptions, ColumnOptions, SpokenPurposeOptions
from thimble.config.options import option
from thimble.config.values import WHOLE_PATH


@dataclass(frozen=True)
class GenerateConfig(AnswerOptions, SpokenPurposeOptions, ColumnOptions):
    """The options of `thimble generate`."""

    group: ClassVar[str] = "prompts"

    data: str = option("", "Prompts: a .jsonl, .json, .csv, .tsv, .parquet or .arrow file of rows with prompt, "
        "question, instruction, messages or text, with or without answers, or a .txt file with a prompt on each line "
        "(each may be packed, as .gz); or a folder of such files.", positional=True, path=WHOLE_PATH,
        metavar="DATA")  # fmt: skip
    prompt_column: str = option("", "Column that holds the prompt, if its name is not a known one.", metavar="NAME")
    completion_column: str = option("", "Column that holds the right answer, if there is one, to stand beside what is "
        "written.", metavar="NAME")  # fmt: skip
    text_column: str = option("", "Column that holds plain text to continue, instead of a prompt.", metavar="NAME")
    out: str | None = option(None, "File for the answers: .jsonl, or .csv with the columns of the prompts beside them.",
        path=WHOLE_PATH, metavar="FILE")  # fmt: skip
    strict: bool = option(False, "Refuse the data if a single row cannot be answered, instead of leaving a few without "
        "an answer.")  # fmt: skip
    resume: bool = option(False, "Go on with the answers in --out that an interrupted run left.")
    overwrite: bool = option(False, "Replace the file in --out, or what an interrupted run left of it.")

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        is_named = given.get("prompt_column") or given.get("prompt_template")
        unanswered = {"completion_column": "the answer"} if is_named and not given.get("completion_column") else {}
        problems = super()._conflicts({**given, **unanswered})  # a prompt needs no answer here
        if given.get("resume") and given.get("overwrite"):
            problems.append("--resume --overwrite: give one of them, to go on or to begin again")
        if len(adapters := given.get("adapter", ())) > 1:
            problems.append(f"--adapter {' --adapter '.join(adapters)}: give one; each answers into a file of its own")
        return problems
