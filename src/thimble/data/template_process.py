"""The process a chat template runs in: started when first needed, asked ahead, ended by limits or with its owner."""

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from typing import Any

from thimble.data.template_worker import DIED, EXCESS, LATER, REPLY_HEAD, REQUEST_HEAD, TEXT
from thimble.errors import BaseModelError

MAX_CHARACTERS = 1_000_000  # of one rendered conversation
MAX_SECONDS = 1.0  # of the processor, for one rendering; a long conversation has more
MAX_MEMORY_BYTES = 256_000_000  # beyond what the process has before it reads the template
MAX_REPLY_BYTES = 8 * MAX_CHARACTERS  # to one request: two texts of so many characters
PATIENCE_SECONDS = 60  # without a reply; counted one by one, so that Ctrl-Z takes only one of them
PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "template_worker.py")
TIMED_OUT = -getattr(signal, "SIGPROF", 0)  # the exit code of a process that the kernel ended
ENVIRONMENT = {"TZ": ":/etc/localtime", "LD_LIBRARY_PATH": "", "SYSTEMROOT": ""}  # all that is passed on, or this


class Asked:
    """A request and, once they are here, what became of each of its renderings, with the text or what went wrong."""

    def __init__(self, request: dict[str, Any]) -> None:
        content = json.dumps(request).encode()
        self.payload, self.request = REQUEST_HEAD.pack(len(content)) + content, request
        self.count, self.replies, self.is_retried = len(request.get("wanted", "1")), [], False


class TemplateProcess:
    """A chat template in a process of its own, which threads may share; its `setup` is what it is asked first."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        limits = {"seconds": MAX_SECONDS, "memory_bytes": MAX_MEMORY_BYTES, "characters": MAX_CHARACTERS}
        self.setup = Asked({"source": source, "variables": variables, **limits})  # the reply: what this system lacks
        self._waiting, self._refusal = deque[Asked](), []  # in the order of replies; the setup's, if that is no text
        self._lock, self._owner, self._end = threading.RLock(), 0, weakref.finalize(self, int)

    def start(self) -> None:
        """Start the process if it does not run, without waiting. Raises a BaseModelError if that is impossible."""
        with self._lock:
            if self._end.alive and self._owner == os.getpid():
                return
            origins = [importlib.util.find_spec(name).origin for name in ("jinja2", "markupsafe")]
            folders = [os.path.abspath(os.path.join(origin, "..", "..")) for origin in origins]
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-W", "ignore", PROGRAM, *folders], bufsize=1 << 16,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    env={key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()},
                    start_new_session=True,  # Ctrl-C is not meant for it
                )  # fmt: skip
            except OSError as error:
                raise BaseModelError(f"the process of the chat template cannot be started: {error}") from error
            self._sent, self._counts, self._read = (queue.SimpleQueue[Any]() for _ in range(3))
            self._owner = os.getpid()  # a forked process starts another
            self._end = weakref.finalize(self, _end, self._process, self._owner, self._sent, self._counts)
            threading.Thread(target=_write, args=(self._process, self._sent), daemon=True).start()
            threading.Thread(target=_read, args=(self._process, self._counts, self._read), daemon=True).start()
            again, self._waiting = [asked for asked in self._waiting if asked is not self.setup], deque()
            for asked in (self.setup, *again):
                self.ask(asked)

    def ask(self, asked: Asked) -> None:
        """Send a request; does not wait for the replies."""
        with self._lock:
            self.start()
            self._waiting.append(asked)
            self._counts.put(asked.count)
            self._sent.put(asked.payload)

    def replies(self, asked: Asked) -> list[tuple[int, str]]:
        """Wait for the replies to a request; if the template cannot be used, why is the reply to all."""
        with self._lock:
            try:
                while not asked.replies and not self._refusal:
                    self.start()
                    self._take()
            except BaseException:  # such as Ctrl-C between taking a reply and keeping it
                self._end()
                raise
            return self._refusal * asked.count or asked.replies

    def _take(self) -> None:
        """Give the next replies to who asked; if some are missing, end the process and say why."""
        asked, replies = self._waiting[0], []
        for _ in range(PATIENCE_SECONDS):
            with contextlib.suppress(queue.Empty):
                replies = self._read.get(timeout=1)
                break
        if len(replies) < asked.count:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            code = self._process.returncode
            self._end()
            if code not in (None, TIMED_OUT) and not asked.is_retried:
                asked.is_retried = True
                return
            kind, why = DIED, f"ended twice, with exit code {code}" if code else "did not answer, or not with a reply"
            if code == TIMED_OUT:
                kind, why = EXCESS, f"it takes more than {MAX_SECONDS:g} s of the processor for one conversation"
            # To blame is the first rendering without a reply; those behind it are to be asked for again.
            replies += [(kind, why)] + [(LATER, "")] * (asked.count - len(replies) - 1)
        self._waiting.popleft().replies = replies
        self._refusal = [reply for reply in self.setup.replies if reply[0] != TEXT]


def _write(process: Any, payloads: "queue.SimpleQueue[Any]") -> None:
    with contextlib.suppress(OSError):
        while payload := payloads.get():
            process.stdin.write(payload)
            if payloads.empty():
                process.stdin.flush()
    with contextlib.suppress(OSError):  # who should have read it has ended
        process.stdin.close()


def _read(process: Any, counts: "queue.SimpleQueue[Any]", read: "queue.SimpleQueue[Any]") -> None:
    """Take as many replies as each request has renderings; fewer if they end, or are none."""
    while count := counts.get():
        replies, room = [], MAX_REPLY_BYTES
        with contextlib.suppress(ValueError):  # of what is no UTF-8
            while len(replies) < count and len(head := process.stdout.read(REPLY_HEAD.size)) == REPLY_HEAD.size:
                kind, length = REPLY_HEAD.unpack(head)
                room -= length
                if kind >= DIED or room < 0 or len(content := process.stdout.read(length)) < length:
                    break
                replies.append((kind, content.decode("utf-8", "surrogatepass")))
        read.put(replies)
    process.stdout.close()


def _end(process: Any, owner: int, *queues: "queue.SimpleQueue[Any]") -> None:
    for each in queues:
        each.put(None)
    if owner == os.getpid():
        process.kill()
        process.wait()
