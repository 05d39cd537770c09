"""Writes the man pages in daemon/man from the command's own parser: mlxd.1, and mlxd-COMMAND.1 for each command.

python3 tools/dev.py draw

Exit codes come from docs/cli.md, whose table the tests hold against the code. The macros are those of man(7), which
groff and mandoc both read.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from mlxd import __version__
from mlxd.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "daemon" / "man"
CLI = ROOT / "docs" / "cli.md"
_ENVIRONMENT = (
    ("MLXD_HOME", "The folder that holds everything the daemon keeps."),
    ("MLXD_SOCKET", "Where the daemon listens, if not at mlxd.sock in that folder."),
    ("MLXD_NAME", "Any setting, by its name in capitals: MLXD_KEEP_ALIVE_S=60."),
    ("HF_HOME, HF_HUB_CACHE", "Where models from the hub lie."),
    ("HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE", "How the hub is asked, as for huggingface_hub."),
    ("NO_COLOR", "Print no colours."),
)
_FILES = (
    ("~/Library/Application Support/mlxd", "The home folder on macOS."),
    ("~/.local/share/mlxd", "The home folder on Linux, in XDG_DATA_HOME where that is set."),
    ("config.toml", "In the home folder: settings."),
    ("mlxd.sock", "In the home folder: the socket."),
    ("logs/mlxd.log", "In the home folder: what the daemon has to say, one JSON object a line."),
)
_EXAMPLES = (
    ("mlxd run um so i think we should uh meet on monday", "The built-in model; starts the daemon if need be."),
    ("mlxd pull mlx-community/Qwen3-1.7B-4bit", "Fetch a model from the hub."),
    ("mlxd chat -m mlx-community/Qwen3-1.7B-4bit", "Talk with it."),
    ("mlxd service install", "Have the system start the daemon for its first client."),
    ("mlxd doctor", "Say what is missing."),
)


def files() -> dict[Path, bytes | None]:
    """Every page; None for those of commands that are no more."""
    made: dict[Path, bytes | None] = dict.fromkeys(FOLDER.glob("*.1"))
    parser = build_parser()
    commands = list(_commands(parser))
    made[FOLDER / "mlxd.1"] = _main_page(parser, commands).encode()
    for name, summary, sub in commands:
        made[FOLDER / f"mlxd-{name}.1"] = _command_page(name, summary, sub).encode()
    return made


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {pseudo.dest: pseudo.help or "" for pseudo in action._choices_actions}
            for name, sub in action.choices.items():
                yield name, helps.get(name, ""), sub


# --- pages --------------------------------------------------------------------------------------------------------


def _main_page(parser: argparse.ArgumentParser, commands: list[tuple[str, str, argparse.ArgumentParser]]) -> str:
    lines = [
        *_head("mlxd", "local language models, ready for every app of one user"),
        ".B mlxd", ".I COMMAND", r"[\fIOPTION\fR ...]", ".br", ".B mlxd", r"\fB\-\-help\fR | \fB\-\-version\fR",
        ".SH DESCRIPTION",
        _text(
            "mlxd loads, runs and unloads MLX language models for all apps of one user. Its daemon listens on a Unix "
            "socket; each loaded model runs in a process of its own. The command is a client like any other, and has "
            "the daemon started where it needs one and none runs."
        ),
        ".SH COMMANDS",
        *_list((rf"\fBmlxd\-{_hyphens(name)}\fR(1)", _text(_sentence(summary)))
               for name, summary, _ in commands),
        ".SH EXIT STATUS",
        *_list((code, _text(meaning)) for code, meaning in _exit_codes()),
        ".SH ENVIRONMENT", *_list((rf"\fB{name}\fR", _text(told)) for name, told in _ENVIRONMENT),
        ".SH FILES", *_list((rf"\fI{_plain(name)}\fR", _text(told)) for name, told in _FILES),
        ".SH EXAMPLES", *_list((rf"\fB{_hyphens(_plain(line))}\fR", _text(told)) for line, told in _EXAMPLES),
        ".SH SEE ALSO",
        " ,\n".join(rf".BR mlxd\-{_hyphens(name)} (1)" for name, _, _ in commands),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _command_page(name: str, summary: str, parser: argparse.ArgumentParser) -> str:
    lines = [
        *_head(f"mlxd-{name}", summary),
        *_synopsis(parser),
        ".SH DESCRIPTION",
        _text(parser.description or summary),
        *([".PP", _text(parser.epilog)] if parser.epilog else []),
        *_arguments(parser, ".SH"),
    ]
    for inner, told, sub in _commands(parser):
        lines += [f'.SH "{_plain(f"mlxd {name} {inner}").upper()}"', _text(_sentence(told))]
        lines += [".PP", *_synopsis_line(sub), *_arguments(sub, ".SS")]
    lines += [".SH EXIT STATUS", _text("As mlxd(1) lists them."), ".SH SEE ALSO", ".BR mlxd (1)"]
    return "\n".join(lines) + "\n"


def _head(name: str, summary: str) -> list[str]:
    return [
        r".\" Written by `tools/dev.py draw` from the command's parser.",
        f'.TH {name.upper()} 1 "" "mlxd {__version__}" "mlxd manual"',
        ".nh",  # names of options and kinds of errors are not to be broken
        ".ad l",
        ".SH NAME",
        rf"{_hyphens(name)} \- {_text(summary)}",
        ".SH SYNOPSIS",
    ]


def _synopsis(parser: argparse.ArgumentParser) -> list[str]:
    """One line for each form of the command."""
    lines = _synopsis_line(parser)
    for _, _, sub in _commands(parser):
        lines += [".br", *_synopsis_line(sub)]
    return lines


def _synopsis_line(parser: argparse.ArgumentParser) -> list[str]:
    actions = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
    words = [_usage(action) for action in sorted(actions, key=lambda action: not action.option_strings)]
    return [rf"\fB{_hyphens(parser.prog)}\fR", *words]


def _usage(action: argparse.Action) -> str:
    """One word of the synopsis; its blanks do not break, and its dots end no sentence."""
    if not action.option_strings:
        shown = _value(action)
        forms = {"?": f"[{shown}]", "*": f"[{shown} ...]", "+": f"{shown} [{shown} ...]"}
        shown = forms.get(str(action.nargs), shown)
    else:
        flags = [flag for flag in action.option_strings if flag.startswith("--")] or action.option_strings
        shown = " | ".join(rf"\fB{_hyphens(flag)}\fR" for flag in flags)
        shown += "" if action.nargs == 0 else f" {_value(action)}"
        shown = shown if action.required else f"[{shown}]"
    return shown.replace(" ", r"\ ") + (r"\&" if "..." in shown else "")


def _arguments(parser: argparse.ArgumentParser, heading: str) -> list[str]:
    """Positionals and options, in the groups that `--help` has."""
    lines: list[str] = []
    for group in parser._action_groups:
        entries = [
            (_invocation(action), _text(_help(action)))
            for action in group._group_actions
            if not isinstance(action, argparse._SubParsersAction)
        ]
        if entries:
            lines += [f'{heading} "{_plain((group.title or "options").upper())}"', *_list(entries)]
    return lines


def _invocation(action: argparse.Action) -> str:
    if not action.option_strings:
        return _value(action)
    value = "" if action.nargs == 0 else f" {_value(action)}"
    return ", ".join(rf"\fB{_hyphens(flag)}\fR{value}" for flag in action.option_strings)


def _value(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return rf"\fI{_hyphens(_plain(action.metavar))}\fR"
    if action.choices is not None:
        return "{" + "|".join(rf"\fB{_hyphens(str(choice))}\fR" for choice in action.choices) + "}"
    return rf"\fI{_hyphens(action.dest if not action.option_strings else action.dest.upper())}\fR"


def _help(action: argparse.Action) -> str:
    """The option's own words; argparse's `%(default)s` and the like are filled in."""
    told = action.help or ""
    told = told % {**vars(action), "prog": "mlxd"} if "%" in told else told
    return _sentence(told) if told else ""


def _exit_codes() -> list[tuple[str, str]]:
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.*?) ?\|$", CLI.read_text("utf-8"), re.MULTILINE)
    return [
        (code, _sentence((f"{meaning} ({kinds})" if kinds else meaning).replace("`", "")))
        for code, meaning, kinds in rows
    ]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


# --- roff ---------------------------------------------------------------------------------------------------------


def _list(entries: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> list[str]:
    lines: list[str] = []
    for head, text in entries:
        lines += [".TP", head, *([text] if text else [])]
    return lines


def _text(text: str) -> str:
    """Running text, of which no line may be taken for a request. One sentence a line, as roff wants it."""
    text = re.sub(r"(?<=[.:;?!]) +(?=[A-Z`])", "\n", _plain(" ".join(text.split())))
    text = re.sub(r"(?<![\w-])(--?[a-z][a-z-]*)", lambda found: _hyphens(found[1]), text)
    return "\n".join(r"\&" + line if line[:1] in (".", "'") else line for line in text.splitlines())


def _plain(text: str) -> str:
    return text.replace("\\", r"\e").replace("…", "...").replace("~", r"\(ti").replace("^", r"\(ha")


def _hyphens(text: str) -> str:
    return text.replace("-", r"\-")
