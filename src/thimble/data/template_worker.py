"""The program a chat template runs in: Jinja's own sandbox, in a process without files, network or much memory.

Run by its path; needs jinja2 and nothing of Thimble. A request is four bytes of length and JSON, the first one the
template and its limits. The reply to a rendering is a byte that says what became of it, four bytes of length and UTF-8.
"""

import contextlib
import functools
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
SLOW_SECONDS = 1.0  # what a request wants behind these is left for later

# The system calls that are left, on x86-64: read, write, mmap, mprotect, munmap, brk, rt_sigaction, rt_sigprocmask,
# rt_sigreturn, sched_yield, mremap, madvise, setitimer, exit, gettimeofday, time, futex, restart_syscall,
# clock_gettime, exit_group, getrandom. All others fail with EPERM.
CALLS = (0, 1, 9, 10, 11, 12, 13, 14, 15, 24, 25, 28, 38, 60, 96, 201, 202, 219, 228, 231, 318)


def main() -> None:
    """Answer requests until the input ends."""
    sys.path += sys.argv[1:]  # where jinja2 is, behind the standard library
    clock: dict[str, datetime] = {}
    environment, setup = _make_environment(clock), _read_request()
    compile_source = functools.partial(_compile, environment, setup["source"], _confine(setup["memory_bytes"]))
    _reply(*_attempt(compile_source, setup["seconds"], INVALID))
    while True:
        sys.stdout.buffer.flush()
        request = _read_request()
        clock["now"] = datetime.fromisoformat(request["now"])
        _answer(environment.template, setup, request)


def _read_request() -> Any:
    size = sys.stdin.buffer.read(REQUEST_HEAD.size) or os._exit(0)
    content = sys.stdin.buffer.read(*REQUEST_HEAD.unpack(size))
    return json.loads(content) | {"bytes": len(content)}


def _reply(kind: int, said: str) -> None:
    content = said.encode("utf-8", "surrogatepass")
    sys.stdout.buffer.write(REPLY_HEAD.pack(kind, len(content)) + content)


def _answer(template: Any, setup: dict[str, Any], request: dict[str, Any]) -> None:
    """Write each wanted prefix of the conversations; what is too much for one request is left for later."""
    most, written, began = setup["characters"], 0, time.monotonic()
    for index, length, prompt in request["wanted"]:
        messages, tools = request["conversations"][index]
        given = {"messages": messages[:length], "tools": tools, "add_generation_prompt": prompt, **setup["variables"]}
        kind, said = LATER, ""
        if written <= most and time.monotonic() - began < SLOW_SECONDS:
            render = functools.partial(_render, template, given, most)
            kind, said = _attempt(render, setup["seconds"] + request["bytes"] / most, FAILED)
        _reply(kind, said)
        written += len(said)


def _render(template: Any, given: dict[str, Any], most: int) -> tuple[int, str]:
    chunks, length = [], 0
    # Not by template.render, which compiles code of its own to tell where an error was.
    for chunk in template.root_render_func(template.new_context(given)):
        chunks.append(chunk)
        length += len(chunk)
        if length > most:
            return LONG, ""
    return TEXT, "".join(chunks)


def _attempt(make: Any, seconds: float, otherwise: int) -> tuple[int, str]:
    """Give back what is made, or what went wrong. After so many seconds the kernel ends the process."""
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return make()
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


def _make_environment(clock: dict[str, datetime]) -> Any:
    """Jinja's sandbox with what transformers gives its templates, and nothing that is left to chance."""
    import html, jinja2.debug  # noqa: E401, F401, I001  # which is too late when they are first used
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):  # marks assistant text for other trainers; here it changes nothing
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            return next(parser.stream) and parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: Any) -> None:
        raise TemplateError(message)

    extensions = ["jinja2.ext.loopcontrols", Generation]
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )  # Jinja's own escapes <, > and & for web pages
    made.globals |= {"raise_exception": raise_exception, "strftime_now": lambda format: clock["now"].strftime(format)}
    del made.globals["lipsum"], made.filters["random"]
    made.from_string(r"{{ '\N{BULLET}' | wordwrap }}{{ [] | pprint }}").render()  # loads what is loaded when first used
    return made


def _confine(memory_bytes: int) -> str:
    """Give up every right a template does not need. Returns what this system lacks for that, as words."""
    try:
        import ctypes
        import resource
    except ImportError:  # Windows
        return "time memory files calls"
    datetime.now().strftime("%c %Z")  # reads the time zone while files can be read
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    limits, lacking = dict.fromkeys(("CORE", "FSIZE", "NPROC", "NOFILE"), 0), {"AS": "memory", "NOFILE": "files"}
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm", "rb") as file:
            limits["AS"] = int(file.read().split()[0]) * resource.getpagesize() + memory_bytes
    for name, most in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
            lacking.pop(name, None)
    is_known = sys.platform == "linux" and os.uname().machine == "x86_64" and sys.maxsize > 2**32
    return " ".join([*lacking.values(), *["calls"] * (not (is_known and _filter_calls(ctypes)))])


def _filter_calls(ctypes: Any) -> bool:
    """Have the kernel refuse every system call but `CALLS`; whether it does."""
    load, jump_if_equal, give_back, allow, fail = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050001
    steps = [(load, 0, 0, 4), (jump_if_equal, 1, 0, 0xC000003E), (give_back, 0, 0, fail), (load, 0, 0, 0)]
    steps += [(jump_if_equal, len(CALLS) - place, 0, call) for place, call in enumerate(CALLS)]
    steps += [(give_back, 0, 0, fail), (give_back, 0, 0, allow)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    described = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(program)))
    prctl, filter_at = ctypes.CDLL(None).prctl, ctypes.c_void_p(ctypes.addressof(described))
    none = [ctypes.c_ulong(0)] * 2
    # PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP with SECCOMP_MODE_FILTER
    return not prctl(38, ctypes.c_ulong(1), none[0], *none) and not prctl(22, ctypes.c_ulong(2), filter_at, *none)


if __name__ == "__main__":
    main()
