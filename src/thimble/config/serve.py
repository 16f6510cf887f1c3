"""The options of `thimble serve`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from thimble.config.groups import WritingOptions
from thimble.config.options import option
from thimble.config.values import WHOLE_PATH, above, at_least

NAMED_PATH = r"(?s)(?:[\w.@-]+=)?(.+)"  # an adapter may be given a name in front of its path


@dataclass(frozen=True)
class ServeConfig(WritingOptions):
    """The options of `thimble serve`."""

    group: ClassVar[str] = "server"

    adapter: tuple[str, ...] = option((), "Adapter to serve: its folder, the run folder that holds it, or a folder of "
        "such folders, or NAME=PATH; may be given several times; default: everything under runs/.", path=NAMED_PATH,
        metavar="DIR")  # fmt: skip
    host: str = option("127.0.0.1", "Address to listen at; any but this machine's own wants an --api-key.",
        metavar="ADDRESS")  # fmt: skip
    port: int = option(8000, "Port to listen at; 0: any that is free.", check=at_least(0))
    api_key: tuple[str, ...] = option((), "Keys, one of which clients have to send, separated by commas; default: "
        "THIMBLE_API_KEY of the environment, which no list of processes shows.", metavar="KEY")  # fmt: skip
    admin_key: str | None = option(None, "Key for loading and unloading adapters while the server runs; default: "
        "THIMBLE_ADMIN_KEY of the environment; without one these routes are off.", metavar="KEY")  # fmt: skip
    allowed_host: tuple[str, ...] = option((), "Further names that the server is called by, or whose pages may use it, "
        "such as that of a proxy in front.", metavar="NAMES")  # fmt: skip
    cache_type: str = option("float", "How keys and values of what was read are kept: float, in the dtype of "
        "--compute; or int8, a little less exact, in about a quarter of the memory of fp32 and half of that of bf16.",
        choices=("float", "int8"))  # fmt: skip
    adapter_memory: int | None = option(None, "Memory for adapters that stay for later requests, the longest unused "
        "going first; default: an eighth of the free memory, at most 1 GB.", is_size=True, metavar="SIZE")  # fmt: skip
    prefix_cache: int | None = option(None, "Memory for keys and values of earlier prompts and answers, kept for "
        "requests that begin alike; 0 keeps none; default: an eighth of the free memory, at most 1 GB.",
        is_size=True, metavar="SIZE")  # fmt: skip
    max_new_tokens: int | None = option(None, "Longest answer, in tokens; default: what the context leaves.",
        check=at_least(1))  # fmt: skip
    max_running: int = option(64, "Answers written at the same time; others wait.", check=at_least(1))
    max_waiting: int = option(256, "Answers that may wait; more are refused with status 429.", check=at_least(0))
    max_seconds: float = option(600.0, "Longest time of a request, in seconds: its answer ends there.", check=above(0))
    max_body: int = option(4_000_000, "Largest request.", is_size=True, metavar="SIZE")
    drain_seconds: float = option(30.0, "How long answers that were begun may go on once the server is told to stop.",
        check=at_least(0))  # fmt: skip
    log: str | None = option(None, "File to add a line of JSON to for each request: times, counts and status, never "
        "what was asked or answered.", path=WHOLE_PATH, metavar="FILE.jsonl")  # fmt: skip

    @classmethod
    def _conflicts(cls, given: Mapping[str, Any]) -> list[str]:
        problems = super()._conflicts(given)
        if given.get("port", 0) > 65535:
            problems.append(f"--port {given['port']}: expected at most 65535")
        return problems
