"""The options of `thimble export`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from thimble.config.options import Options, option
from thimble.config.values import WHOLE_PATH, at_least

FORMATS = ("gguf", "peft")


@dataclass(frozen=True)
class ExportConfig(Options):
    """The options of `thimble export`."""

    group: ClassVar[str] = "export"

    adapter: str = option("", "Adapter folder, the run folder that holds it, or a GGUF adapter.", positional=True,
        path=WHOLE_PATH, metavar="ADAPTER")  # fmt: skip
    to: str = option("gguf", "What to write: gguf, a file for llama.cpp, Ollama and LM Studio; or peft, a folder for "
        "PEFT and vLLM.", choices=FORMATS)  # fmt: skip
    merged: bool = option(False, "Write the whole model, the adapter merged into it, instead of the adapter alone; "
        "without an adapter the base as it is.")  # fmt: skip
    type: str = option("", "With --merged: the type of most weights, F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_1, Q5_0, "
        "Q4_K_M, Q4_1 or Q4_0; those with _M give more bits to layers that need them, as llama.cpp does.",
        metavar="TYPE")  # fmt: skip
    imatrix: bool = option(False, "With --merged: weigh rounding errors by how large the inputs of each column are on "
        "your own training data (an importance matrix).")  # fmt: skip
    out: str = option("", "File (gguf) or folder (peft) to write; it must not exist yet.", path=WHOLE_PATH,
        metavar="PATH")  # fmt: skip
    base: str | None = option(None, "The base that the adapter was made for: a GGUF file, a Hugging Face folder or a "
        "hub name; default: the one that the adapter names.", path=WHOLE_PATH, metavar="BASE")  # fmt: skip
    approximate_rank: int | None = option(None, "Of a DoRA adapter, which few programs but PEFT run, write a plain "
        "one of this rank that is as near as can be; how near is told.", check=at_least(1))  # fmt: skip
    data: str = option("", "Examples that the result is proved on, in llama.cpp against Thimble; default: the "
        "validation rows of the run, or general text.", path=WHOLE_PATH, metavar="DATA")  # fmt: skip
    proof: str = option("auto", "Compare the result in llama.cpp with the original: auto does where the package "
        "xllamacpp is installed, always refuses without it.", choices=("auto", "always", "never"))  # fmt: skip
    verify_only: bool = option(
        False, "Prove the file in --out once more, and write nothing but what was found, beside it."
    )

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        problems = super()._conflicts(given)
        asked = {"--verify-only": given.get("verify_only"), "--proof always": given.get("proof") == "always"}
        if given.get("to") == "peft" and any(asked.values()):
            what = " and ".join(option for option, is_given in asked.items() if is_given)
            problems.append(f"--to peft has no proof, which is made in llama.cpp of GGUF files: leave out {what}")
        if given.get("to") == "peft" and given.get("merged"):
            problems.append("--to peft --merged: a folder with an adapter merged into it is what thimble merge writes")
        of_merged = {"--type": given.get("type"), "--imatrix": given.get("imatrix")}
        if given.get("merged") and given.get("approximate_rank"):
            problems.append("--merged takes DoRA exactly: leave out --approximate-rank")
        if not given.get("merged") and any(of_merged.values()):
            what = " and ".join(option for option, is_given in of_merged.items() if is_given)
            problems.append(f"{what} is for whole models: add --merged, or leave it out")
        return problems
