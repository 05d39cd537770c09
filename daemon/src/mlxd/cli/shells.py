"""Completion scripts for shells, written from the parser itself, so that they never miss an option."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from mlxd.settings import Settings
from mlxd_client.types import EVENT_TOPICS

__all__ = ["Described", "Word", "bash", "describe", "fish", "zsh"]

# What lists the ids or names of each kind, asked only of a daemon that already runs: a tab key should not start one.
_LISTS = {
    "models": "mlxd list --quiet --no-start 2>/dev/null",
    "catalog": "mlxd catalog --quiet --no-start 2>/dev/null",
    "jobs": "mlxd jobs --quiet --no-start 2>/dev/null",
    "personas": "mlxd personas --kind persona --quiet --no-start 2>/dev/null",
    "templates": "mlxd personas --kind template --quiet --no-start 2>/dev/null",
}
_CONFIG = ("get", "set", "unset", "reload", "path", "edit")
_USES = ("general", "light", "coding", "vision")


@dataclass(frozen=True)
class Word:
    """One option or positional. `values` is a fixed set, or kinds with blanks between: `files`, those of `_LISTS`."""

    flags: tuple[str, ...]
    help: str
    takes_value: bool
    values: tuple[str, ...] | str = ()

    @property
    def files(self) -> bool:
        return isinstance(self.values, str) and "files" in self.values.split()

    @property
    def lists(self) -> tuple[str, ...]:
        """The kinds of ids that it may be."""
        return tuple(kind for kind in self.values.split() if kind in _LISTS) if isinstance(self.values, str) else ()

    @property
    def fixed(self) -> tuple[str, ...]:
        return () if isinstance(self.values, str) else self.values


@dataclass(frozen=True)
class Described:
    name: str
    help: str
    words: tuple[Word, ...]

    @property
    def options(self) -> tuple[Word, ...]:
        return tuple(word for word in self.words if word.flags)

    @property
    def positionals(self) -> tuple[Word, ...]:
        return tuple(word for word in self.words if not word.flags)


def describe(parser: argparse.ArgumentParser) -> Iterator[Described]:
    """Every command of the parser with its words."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {pseudo.dest: pseudo.help or "" for pseudo in action._choices_actions}
            for name, sub in action.choices.items():
                yield Described(name, helps.get(name, ""), tuple(_word(name, each) for each in sub._actions))


def _word(command: str, action: argparse.Action) -> Word:
    values: tuple[str, ...] | str = tuple(map(str, action.choices or ()))
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if action.dest in ("model", "models", "adapter", "draft_model"):
        values = "catalog" if command == "pull" else "models"
    elif action.dest == "job":
        values = "jobs files" if "FILE" in metavar else "jobs"
    elif action.dest in ("persona", "template"):
        values = action.dest + "s"
    elif action.dest == "use":
        values = _USES
    elif action.dest == "topic":
        values = (*dict.fromkeys(EVENT_TOPICS.values()), *EVENT_TOPICS)
    elif (command, action.dest) == ("config", "words"):
        values = (*_CONFIG, *Settings.__struct_fields__)
    elif "PATH" in metavar or "FILE" in metavar:
        values = "files"
    return Word(tuple(action.option_strings), action.help or "", action.nargs != 0, values)


def bash(commands: list[Described]) -> str:
    cases = []
    for command in commands:
        flags = " ".join(flag for word in command.options for flag in word.flags)
        lines = [f"        {command.name})", '            case "$previous" in']
        for word in command.options:
            if word.takes_value:
                lines.append(f"                {'|'.join(word.flags)}) {_bash_values(word)}; return ;;")
        lines += ["            esac", f'            COMPREPLY=($(compgen -W "{flags}" -- "$current"))']
        if any(word.values for word in command.positionals):
            lines.append(f"            [[ $current == -* ]] || {_bash_values(*command.positionals)}")
        cases += [*lines, "            ;;"]
    names = " ".join(command.name for command in commands)
    return f"""\
# bash completion for mlxd, written by `mlxd completion bash`
_mlxd() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
    COMPREPLY=()
    if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "{names} --help --version" -- "$current"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{chr(10).join(cases)}
    esac
}}
complete -F _mlxd mlxd
"""


def _bash_values(*words: Word) -> str:
    """Completes with what any of the words may be: which of a command's positionals it is, is not counted."""
    known = [f"$({_LISTS[kind]})" for word in words for kind in word.lists]
    known += [value for word in words for value in word.fixed]
    sources = ["-f"] if any(word.files for word in words) else []
    if known or not sources:
        sources.append('-W "' + " ".join(known) + '"')
    found = " ".join("$(compgen " + source + ' -- "$current")' for source in sources)
    return f"COMPREPLY=({found})"


def zsh(commands: list[Described]) -> str:
    def quoted(text: str) -> str:
        return (
            text.replace("\\", "\\\\").replace("'", "'\\''").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
        )

    def action(word: Word) -> str:
        calls = [f"_mlxd_{kind}" for kind in word.lists] + (["_files"] if word.files else [])
        if len(calls) > 1:
            return f"{{{'; '.join(calls)}}}"
        return calls[0] if calls else f"({' '.join(word.fixed)})" if word.fixed else ""

    cases = []
    for command in commands:
        specs = []
        for word in command.options:
            value = f":value:{action(word)}" if word.takes_value else ""
            specs += [f"'*{flag}[{quoted(word.help)}]{value}'" for flag in word.flags]
        for number, word in enumerate(command.positionals, 1):
            if not word.values:
                continue  # zsh would show what it is for in place of completing options
            place = "*" if len(command.positionals) == 1 else str(number)
            specs.append(f"'{place}:{quoted(word.help or 'argument')}:{action(word)}'")
        cases.append(f"        {command.name}) _arguments {' '.join(specs)} ;;")
    names = "\n".join(f"        '{command.name}:{quoted(command.help)}'" for command in commands)
    lists = "\n".join(
        f"""_mlxd_{kind}() {{\n    local -a ids\n    ids=(${{(f)"$({command})"}})\n    compadd -a ids\n}}"""
        for kind, command in _LISTS.items()
    )
    return f"""\
#compdef mlxd
# zsh completion for mlxd, written by `mlxd completion zsh`
{lists}
_mlxd() {{
    local -a commands
    commands=(
{names}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    local command=$words[2]
    shift words
    (( CURRENT-- ))
    case $command in
{chr(10).join(cases)}
    esac
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _mlxd "$@"
else
    compdef _mlxd mlxd
fi
"""


def fish(commands: list[Described]) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = ["# fish completion for mlxd, written by `mlxd completion fish`", "complete -c mlxd -f"]
    for command in commands:
        lines.append(f"complete -c mlxd -n __fish_use_subcommand -a {command.name} -d {quoted(command.help)}")
    for command in commands:
        when = f"-n '__fish_seen_subcommand_from {command.name}'"
        for word in command.words:
            parts = [f"complete -c mlxd {when}"]
            parts += [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in word.flags]
            if word.takes_value and word.flags:
                parts.append("-r -F" if word.files else "-x")
            elif word.files:
                parts.append("-F")
            if values := " ".join([*(f"({_LISTS[kind]})" for kind in word.lists), *word.fixed]):
                parts.append(f"-a {quoted(values)}")
            if word.flags or word.values:
                lines.append(" ".join([*parts, f"-d {quoted(word.help)}"]))
    return "\n".join(lines) + "\n"
