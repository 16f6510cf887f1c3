"""The program a chat template runs in: Jinja's own sandbox, in a process without files, network or much memory.

A request is a length and JSON, first the template and its limits. A reply is what became of it, a length, and UTF-8.
"""

import contextlib
import json
import os
import signal
import struct
import sys
import time
from datetime import datetime
from typing import Any

TEXT, REFUSED, FAILED, FORBIDDEN, EXCESS, LONG, LATER, INVALID, DIED = range(9)  # what became of a rendering
REQUEST_HEAD, REPLY_HEAD = struct.Struct("<I"), struct.Struct("<BI")
SET_TIMER = getattr(signal, "setitimer", lambda which, seconds: None)  # 2 is ITIMER_PROF; without a handler it ends us
SLOW_SECONDS = 1.0  # what a request wants behind these is left for later
# System calls that are left, by their numbers on x86-64: read, write, memory, signals, time, futex, random, exit.
CALLS = (0, 1, 9, 10, 11, 12, 13, 14, 15, 24, 25, 28, 38, 60, 96, 201, 202, 219, 228, 231, 318)


def main() -> None:
    """Answer requests until the input ends."""
    sys.path += sys.argv[1:]  # where jinja2 is, behind the standard library
    environment, setup = _make_environment(), _read_request()
    _reply(
        *_attempt(setup["seconds"], INVALID, _compile, environment, setup["source"], _confine(setup["memory_bytes"]))
    )
    while True:
        sys.stdout.buffer.flush()
        SET_TIMER(2, 0)
        request = _read_request()
        environment.now = datetime.fromisoformat(request["now"])
        _answer(environment.template, setup, request)


def _read_request() -> Any:
    size = sys.stdin.buffer.read(REQUEST_HEAD.size) or os._exit(0)
    content = sys.stdin.buffer.read(*REQUEST_HEAD.unpack(size))
    return json.loads(content) | {"bytes": len(content)}


def _reply(kind: int, said: str) -> None:
    sys.stdout.buffer.write(REPLY_HEAD.pack(kind, len(content := said.encode("utf-8", "surrogatepass"))) + content)


def _answer(template: Any, setup: dict[str, Any], request: dict[str, Any]) -> None:
    """Write each wanted prefix of the conversations; what is too much for one request is left for later."""
    most, written, began = setup["characters"], 0, time.monotonic()
    seconds = setup["seconds"] + request["bytes"] / most
    for index, length, prompt in request["wanted"]:
        messages, tools = request["conversations"][index]
        given = {"messages": messages[:length], "tools": tools, "documents": None, "add_generation_prompt": prompt}
        given = request.get("variables", {}) | given | setup["variables"]
        is_due = written <= most and time.monotonic() - began < SLOW_SECONDS
        kind, said = _attempt(seconds, FAILED, _render, template, given, most) if is_due else (LATER, "")
        _reply(kind, said)
        written += len(said)


def _render(template: Any, given: dict[str, Any], most: int) -> tuple[int, str]:
    chunks, length = [], 0
    for chunk in template.root_render_func(template.new_context(given)):  # template.render compiles code if it fails
        chunks.append(chunk)
        length += len(chunk)
        if length > most:
            return LONG, ""
    return TEXT, "".join(chunks)


def _attempt(seconds: float, otherwise: int, make: Any, *given: Any) -> tuple[int, str]:
    """Give back what is made, or what went wrong. After so many seconds the kernel ends the process."""
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    SET_TIMER(2, seconds)
    try:
        return make(*given)
    except TemplateSyntaxError as error:
        return INVALID, f"{error.message} (line {error.lineno} of the template)"
    except Exception as error:  # a program from an untrusted source may raise anything
        kinds = {SecurityError: FORBIDDEN, OSError: FORBIDDEN, ImportError: FORBIDDEN, TemplateError: REFUSED}
        kinds |= dict.fromkeys((RecursionError, MemoryError, OverflowError), EXCESS)
        return next((kind for known, kind in kinds.items() if isinstance(error, known)), otherwise), str(error)


def _compile(environment: Any, source: str, lacking: str) -> tuple[int, str]:
    from jinja2 import TemplateSyntaxError, nodes

    tree = environment.parse(source)
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise TemplateSyntaxError("it asks for another file: expected no include, import or extends", node.lineno)
    environment.template = environment.from_string(tree)
    environment.template.globals = dict(environment.globals)  # Jinja's is a chain of maps, which takes time to walk
    return TEXT, lacking


def _make_environment() -> Any:
    """Jinja's sandbox with what transformers gives its templates, and nothing that is left to chance."""
    import html, jinja2.debug  # noqa: E401, F401, I001  # which is too late when they are first used
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

    class Mark(Extension):  # marks assistant text for other trainers
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:  # what is set inside is not seen outside, as in the block of transformers
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: Any) -> None:
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # without escapes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Mark])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": lambda format: made.now.strftime(format)}
    del made.globals["lipsum"], made.filters["random"]
    made.from_string(r"{{ '\N{BULLET}' | wordwrap }}{{ [] | pprint }}").render()  # loads what is loaded when first used
    return made


def _confine(memory_bytes: int) -> str:
    """Give up every right a template does not need. Returns what this system lacks for that, as words."""
    try:
        import ctypes  # noqa: E401
        import resource
    except ImportError:  # Windows
        return "time memory files calls"
    datetime.now().strftime("%c %Z")  # reads the time zone while files can be read
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    limits = dict.fromkeys(("CORE", "FSIZE", "NPROC", "NOFILE"), 0)
    lacking = {"AS": "memory", "NOFILE": "files", "SECCOMP": "calls"}
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        limits["AS"] = int(file.read().split()[0]) * resource.getpagesize() + memory_bytes
    for name, most in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
            lacking.pop(name, None)
    if sys.platform == "linux" and os.uname().machine == "x86_64" and sys.maxsize > 2**32:
        load, jump_if_equal, give_back, allow, fail = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050001
        steps = [(load, 0, 0, 4), (jump_if_equal, 1, 0, 0xC000003E), (give_back, 0, 0, fail), (load, 0, 0, 0)]
        steps += [(jump_if_equal, len(CALLS) - place, 0, call) for place, call in enumerate(CALLS)]
        steps += [(give_back, 0, 0, fail), (give_back, 0, 0, allow)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
        seccomp = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(program)))
        prctl, number = ctypes.CDLL(None).prctl, ctypes.c_ulong  # PR_SET_NO_NEW_PRIVS is 38, PR_SET_SECCOMP 22
        if not prctl(38, number(1), number(0), number(0), number(0)) and not prctl(22, number(2), seccomp):
            del lacking["SECCOMP"]
    return " ".join(lacking.values())


if __name__ == "__main__":
    main()
