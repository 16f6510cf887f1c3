"""A tiny base with a tokenizer, examples, and a way to run the command line."""

import json
from pathlib import Path

import pytest

from thimble import cli

TINY = Path(__file__).parent / "fixtures" / "gguf" / "smollm2.gguf"


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory):
    """Keep measurements out of the user's cache, and the terminal out of the tests; processes they start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv(
            "COLUMNS", raising=False
        )  # of the terminal the tests were started in: tables are as wide as they are
        yield


@pytest.fixture
def tiny_base() -> str:
    """A GGUF of the SmolLM2 kind with random weights, a tokenizer and no chat template."""
    return str(TINY)


@pytest.fixture
def examples(tmp_path) -> Path:
    """Twelve prompts and completions."""
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"say {n} ", "completion": f"{n} it is"} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def thimble(capsys, monkeypatch, tmp_path):
    """Run `thimble` in an empty folder: gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.signal, "signal", lambda *a: None)  # leave the signals of pytest alone

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(word) for word in argv])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run
