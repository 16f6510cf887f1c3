"""Scripts that complete commands, options and their values in a shell, made from the declared options."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from thimble.config.options import Field, Options, is_path, is_switch, options_of, positional_of
from thimble.config.values import flag

SHELLS = ("bash", "zsh", "fish")
MOST_TOLD = 70  # characters of what an option means
_GENERAL = {"config": "Read options from a YAML file", "json": "Print one JSON object", "debug": "Show tracebacks",
            "help": "Show the help"}  # fmt: skip


class Completed(NamedTuple):
    """An option as a shell completes it."""

    flag: str
    meaning: str
    takes_value: bool
    choices: tuple[str, ...] = ()
    is_file: bool = False


def completion_script(shell: str, commands: Mapping[str, tuple[str, type[Options]]]) -> str:
    """The script for one of SHELLS; commands are given by name, with summary and options."""
    return _SCRIPTS[shell](commands)


def completed_options(config: type[Options]) -> Iterator[Completed]:
    """The options of a command that are typed as flags, those of every command last."""
    positional = positional_of(config)
    yield from (_completed(spec) for name, spec in options_of(config).items() if name not in positional)
    for name, meaning in _GENERAL.items():
        yield Completed(flag(name), meaning, name == "config", is_file=name == "config")


def _completed(spec: Field) -> Completed:
    choices = spec.metadata["choices"] or ()
    meaning = re.split(r"[;:.(]", spec.metadata["help"])[0].strip()[:MOST_TOLD]
    return Completed(flag(spec.name), meaning, not is_switch(spec), tuple(choices), is_path(spec))


def _bash(commands: Mapping[str, tuple[str, type[Options]]]) -> str:
    flags, values = [], []
    for name, (_, config) in commands.items():
        options = list(completed_options(config))
        flags.append(f"        {name}) words='{' '.join(option.flag for option in options)}' ;;")
        for option in options:
            what = "files" if option.is_file else f"'{' '.join(option.choices)}'"
            values += [f"        '{name} {option.flag}') values={what} ;;"] if option.takes_value else []
    names = " ".join(commands)
    return _BASH.format(names=names, pattern="|".join(commands), flags="\n".join(flags), values="\n".join(values))


_BASH = """\
# Completion in bash, in this shell and all to come:
#     thimble --completion bash >> ~/.bash_completion && source ~/.bash_completion
_thimble() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} command='' word words values=none
    if [[ $cur == = ]]; then cur=''; elif [[ $prev == = ]]; then prev=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case $word in {pattern}) command=$word; break ;; esac
    done
    case "$command $prev" in
        ' --completion') values='bash zsh fish' ;;
{values}
    esac
    case $command in
        '') words='{names} --help --version --completion' ;;
{flags}
    esac
    COMPREPLY=()
    if [[ $values == none && ( $cur == -* || -z $command ) ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
    elif [[ $values == none || $values == files ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
    elif [[ -n $values ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$values" -- "$cur")
    fi
}}
complete -F _thimble thimble
"""


def _zsh(commands: Mapping[str, tuple[str, type[Options]]]) -> str:
    listed = " ".join(_zsh_quoted(f"{name}:{summary}") for name, (summary, _) in commands.items())
    parts = []
    for name, (_, config) in commands.items():
        specs = [_zsh_quoted(_zsh_option(option)) for option in completed_options(config)]
        specs += ["'*:FILE:_files'"] if positional_of(config) else []
        parts.append(f"        {name}) _arguments " + " ".join(specs) + " ;;")
    return _ZSH.format(commands=listed, cases="\n".join(parts))


def _zsh_option(option: Completed) -> str:
    meaning = option.meaning.replace("[", "(").replace("]", ")")
    action = "_files" if option.is_file else f"({' '.join(option.choices)})" if option.choices else " "
    return f"{option.flag}[{meaning}]" + (f":value:{action}" if option.takes_value else "")


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


_ZSH = """\
#compdef thimble
# Completion in zsh, in this shell and all to come, after compinit in ~/.zshrc:
#     source <(thimble --completion zsh)
_thimble() {{
    local -a commands=({commands})
    if (( CURRENT == 2 )); then
        _describe command commands
        _arguments '--help[Show the help]' '--version[Show the version]' '--completion[Print this]: :(bash zsh fish)'
        return
    fi
    shift words
    (( CURRENT-- ))
    case $words[1] in
{cases}
    esac
}}
if [[ $funcstack[1] == _thimble ]]; then _thimble "$@"; else compdef _thimble thimble; fi
"""


def _fish(commands: Mapping[str, tuple[str, type[Options]]]) -> str:
    lines = [
        "# Completion in fish, in all shells to come:",
        "#     thimble --completion fish > ~/.config/fish/completions/thimble.fish",
        "complete -c thimble -f",
        "complete -c thimble -n __fish_use_subcommand -l help",
        "complete -c thimble -n __fish_use_subcommand -l version",
        "complete -c thimble -n __fish_use_subcommand -l completion -x -a 'bash zsh fish'",
    ]
    for name, (summary, config) in commands.items():
        lines.append(f"complete -c thimble -n __fish_use_subcommand -a {name} -d {_fish_quoted(summary)}")
        when = f"complete -c thimble -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{when} -F"] if positional_of(config) else []
        for option in completed_options(config):
            choices = f" -x -a {_fish_quoted(' '.join(option.choices))}" if option.choices else " -x"
            value = "" if not option.takes_value else " -r -F" if option.is_file else choices
            lines.append(f"{when} -l {option.flag.removeprefix('--')}{value} -d {_fish_quoted(option.meaning)}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
