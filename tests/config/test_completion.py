"""Completion in a shell: made from the options, and run where the shell is there."""

import shutil
import subprocess

import pytest

from thimble.commands import COMMANDS
from thimble.config.completion import SHELLS, completed_options, completion_script

SCRIPTS = {
    shell: completion_script(shell, {name: (it.summary, it.options) for name, it in COMMANDS.items()})
    for shell in SHELLS
}


def complete(folder, *words: str) -> list[str]:
    """What bash offers for the last of some words."""
    line = "\n".join(f"COMP_WORDS+=({subprocess.list2cmdline([word]) or chr(39) * 2})" for word in words)
    program = f"{SCRIPTS['bash']}\nCOMP_WORDS=(thimble)\n{line}\nCOMP_CWORD={len(words)}\n_thimble\n"
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=folder, check=True)
    assert done.stderr == ""
    return [found for found in done.stdout.split("\n") if found]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("tr",), ["train"]),
        (("",), [*COMMANDS, "--help", "--version", "--completion"]),
        (("--comp",), ["--completion"]),
        (("--completion", ""), list(SHELLS)),
        (("train", "--compu"), ["--compute"]),
        (("train", "--compute", ""), ["auto", "fp32", "bf16", "bf16-int8", "int8"]),
        (("train", "--compute", "=", "b"), ["bf16", "bf16-int8"]),
        (("train", "--compute", "="), ["auto", "fp32", "bf16", "bf16-int8", "int8"]),
        (("train", "--rank", ""), []),
        (("train", "--resume", "mi"), ["mine.jsonl"]),
        (("train", "my"), ["my data.jsonl"]),
        (("chat", "--adapter", "runs/"), ["runs/one two"]),
        (("train", "mine.jsonl", "--strict", "--learning"), ["--learning-rate"]),
        (("merge", "--truncate", "0.9", ""), ["mine.jsonl", "my data.jsonl", "runs"]),
    ],
)
def test_bash_offers_commands_options_choices_and_files(tmp_path, words, offered):
    (tmp_path / "runs" / "one two").mkdir(parents=True)
    for name in ("mine.jsonl", "my data.jsonl"):
        (tmp_path / name).touch()
    assert sorted(complete(tmp_path, *words)) == sorted(offered)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_stands_in_every_script(shell):
    script = SCRIPTS[shell]
    for name, command in COMMANDS.items():
        assert name in script
        for option in completed_options(command.options):
            assert (option.flag if shell != "fish" else f"-l {option.flag[2:]}") in script
            assert all(choice in script for choice in option.choices)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_that_is_here_can_read_its_script(shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not here")
    (tmp_path / "script").write_text(SCRIPTS[shell])
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)
