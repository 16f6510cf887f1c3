"""What is opened at all, and what counts as JSON."""

import json
import os
import socket
import threading
import time

import pytest

from thimble.errors import AdapterError, BaseModelError
from thimble.files.untrusted import (
    MOST_VALUES,
    open_plain,
    parse_json_object,
    printable,
    read_bytes,
    read_json_object,
    shown,
    some,
)


def pipe(path):
    os.mkfifo(path)


def socket_at(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


PLACES = {
    "a pipe": pipe, "a directory": lambda path: path.mkdir(), "a socket": socket_at,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "config.json"
    PLACES[kind](path)
    began = time.perf_counter()
    with pytest.raises(AdapterError, match=f"config.json is {kind}: expected a file"):
        read_json_object(path, 1000, AdapterError)
    assert time.perf_counter() - began < 30  # not waited for


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gone", "No such file"), ("loop", "symbolic links"), ("a\0b", "null byte"), ("x" * 300, "too long")],
)
def test_what_cannot_be_opened_is_refused_with_the_reason(tmp_path, name, reason):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BaseModelError, match=f"cannot be opened .*{reason}"):
        open_plain(tmp_path / name, BaseModelError)


def test_a_link_to_a_file_is_that_file(tmp_path):
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json_object(tmp_path / "config.json", 100, BaseModelError) == {"a": 1}


def test_a_file_that_is_swapped_for_a_pipe_is_never_waited_for(tmp_path):
    """The file is opened once, and the open handle is asked what it is."""
    path, pipes, files = tmp_path / "x", tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipes)
    files.write_text('{"a": 1}')
    path.symlink_to(files)
    stop = threading.Event()

    def swap():
        number = 0
        while not stop.is_set():
            number += 1
            (tmp_path / "next").symlink_to((files, pipes)[number % 2])
            os.replace(tmp_path / "next", path)

    thread = threading.Thread(target=swap)
    thread.start()
    read = refused = 0
    try:
        for _ in range(2000):
            try:
                assert read_json_object(path, 100, BaseModelError) == {"a": 1}
                read += 1
            except BaseModelError as error:
                refused += "is a pipe" in str(error)
    finally:
        stop.set()
        thread.join()
    assert read + refused == 2000
    assert read
    assert refused


def test_a_file_may_be_as_large_as_allowed_and_no_larger(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert len(read_bytes(tmp_path / "a", 100, BaseModelError)) == 100
    with pytest.raises(BaseModelError, match="larger than 99 bytes"):
        read_bytes(tmp_path / "a", 99, BaseModelError)


def test_a_file_without_end_is_not_read_to_its_end(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BaseModelError, match="larger than 1,000 bytes"):
        read_json_object(tmp_path / "sparse", 1000, BaseModelError)


REFUSED = {
    "nothing": (b"", "it is not JSON"),
    "half an object": (b'{"a": 1', "it is not JSON"),
    "a web page": (b"\n<!DOCTYPE html><title>403</title>", "it is a web page, not the file itself. Expected JSON"),
    "something behind it": (b"{} {}", "it is not JSON"),
    "a list": (b"[]", "expected a JSON object, found list"),
    "a number": (b"1", "expected a JSON object, found int"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "byte 0xff at 0 is not UTF-8"),
    "no UTF-8": (b'{"a": "\xc3\x28"}', "byte 0xc3 at 7 is not UTF-8"),
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "a key occurs twice, 'c'"),
    "NaN": (b'{"a": NaN}', "NaN is not a number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not a number"),
    "a number past all floats": (b'{"a": 1e999}', "1e999 is too large a number"),
    "a number without end": (b'{"a": ' + b"1" * 5000 + b"}", "a number has 5,000 digits"),
    "depth": (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "nested more than 64 deep"),
    "great depth": (b'{"a":' * 100_000, "nested too deeply"),
    "half of a character": (b'{"a": "\\ud800"}', "half of a character"),
    "half of a character in a key": (b'{"\\uDFFF": 1}', "half of a character"),
    "very many values": (b'{"a": [' + b"0," * MOST_VALUES + b"0]}", "holds more than 500,000 values"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_two_readers_might_read_differently_is_refused(tmp_path, case):
    content, message = REFUSED[case]
    (tmp_path / "x.json").write_bytes(content)
    seconds = []
    for _ in range(3):  # the quickest: other work on the machine does not count
        began = time.process_time()
        with pytest.raises(BaseModelError, match=message) as caught:
            read_json_object(tmp_path / "x.json", 10_000_000, BaseModelError)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.05
    assert str(tmp_path / "x.json") in str(caught.value)
    assert "copy the file again" in str(caught.value)


def test_everything_else_is_read_as_json_reads_it():
    value = {"a": [1, -2, 0.5, 1e300, True, None, "\\ud800 \U0001f600 猫"], "": {"b": {}}, "deep": [[[[[]]]]]}
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert parse_json_object(text) == value


def test_a_value_in_a_message_is_short_and_printable():
    assert shown("x" * 100_000) == f"'{'x' * 37}...{'x' * 38}'"
    assert len(shown([["y" * 1000] * 1000] * 1000)) == 203
    assert printable("a\x1b[2J\nb" + "c" * 1000) == "a?[2J?b" + "c" * 293
    assert some(map(str, range(23))) == [*map(str, range(20)), "and 3 problems more of this kind"]
