"""Renders every hostile template in a process of its own, and hears what Python is asked meanwhile.

Run as a program: prints a JSON object of name to time, memory, events and what came of it.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from stress.templates import CONVERSATION, PAYLOADS, peak_megabytes, try_template

_ASKED: list[str] | None = None  # None while nothing is watched


@dataclass
class Seen:
    """What came of one template.

    Attributes:
        seconds: Of the processor, compiling included.
        megabytes: By which the process grew.
        compiled: Audit events while the template was compiled.
        asked: Audit events while it was rendered.
        error: Class of the error, or nothing.
        said: The error, or the text.
    """

    seconds: float = 0.0
    megabytes: float = 0.0
    compiled: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    error: str = ""
    said: str = ""


def _hear(event: str, details: Any) -> None:
    if _ASKED is not None:
        _ASKED.append(f"{event} {str(details)[:100]}")


def watch(source: str) -> Seen:
    """Compile and render a template, hearing of everything."""
    global _ASKED
    from thimble.data.template import ChatTemplate

    seen, before, began = Seen(), peak_megabytes(), time.process_time()
    try:
        _ASKED = seen.compiled
        template = ChatTemplate(source, "<s>", "</s>")
        _ASKED = seen.asked
        seen.said = template.render(CONVERSATION)[:1000]
    except Exception as error:
        seen.error, seen.said = type(error).__name__, str(error)[:1000]
    finally:
        _ASKED = None
    seen.seconds, seen.megabytes = time.process_time() - began, peak_megabytes() - before
    return seen


def _apart(source: str) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, json.dumps(asdict(watch(source))).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return json.loads(told) if told else asdict(Seen(error="died"))


if __name__ == "__main__":
    try_template("{{ messages | tojson }}")  # imports what is imported when it is first needed
    sys.addaudithook(_hear)
    print(json.dumps({name: _apart(source) for name, source in PAYLOADS.items()}))
