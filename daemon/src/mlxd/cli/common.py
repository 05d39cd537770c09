"""What several commands share: options that all have, the connection, and names of models as people type them."""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING, NoReturn, Protocol

if TYPE_CHECKING:
    from mlxd_client import Client

    from .output import Output

__all__ = [
    "Command",
    "Commands",
    "HelpFormatter",
    "Parser",
    "add_command",
    "connect",
    "duration",
    "model_ref",
    "program",
]

Commands = argparse._SubParsersAction  # the class has no public name


class Parser(argparse.ArgumentParser):
    """As the base, but names what a mistyped command was most likely meant to be."""

    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message):
            import difflib

            near = difflib.get_close_matches(wrong[1], re.findall(r"[\w-]+", wrong[2]), n=2)
            message += f"; did you mean {' or '.join(near)}?" if near else ""
        super().error(message)


class HelpFormatter(argparse.HelpFormatter):
    """As the base, but asks for the width itself: the base imports shutil for it, which takes time."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=_columns() - 2)


def _columns() -> int:
    try:
        return max(40, int(os.environ["COLUMNS"]))
    except (KeyError, ValueError):
        pass
    try:
        return max(40, os.get_terminal_size(1).columns)
    except OSError:
        return 100


class Command(Protocol):
    """Runs one command and returns its exit code."""

    def __call__(self, args: argparse.Namespace, output: Output, /) -> int: ...


def add_command(
    commands: Commands[argparse.ArgumentParser], name: str, run: Command, summary: str, *, daemon: bool = True,
    epilog: str | None = None,
) -> argparse.ArgumentParser:  # fmt: skip
    """A parser for `mlxd NAME`, with the options that every command has.

    Args:
        daemon: whether it talks to the daemon, which then is started if need be.
    """
    description = summary[0].upper() + summary[1:] + "."
    parser = commands.add_parser(
        name, help=summary, description=description, epilog=epilog, formatter_class=HelpFormatter
    )
    parser.set_defaults(run=run)
    if daemon:
        common = parser.add_argument_group("connection and output")
        common.add_argument("--json", action="store_true", help="print JSON, as on the wire")
        common.add_argument("--no-start", action="store_true", help="fail if no daemon is running; do not start it")
        common.add_argument(
            "--socket", metavar="PATH", help="where the daemon listens (default: $MLXD_SOCKET, $MLXD_HOME)"
        )
    return parser


def connect(args: argparse.Namespace, *, reconnect: bool = True) -> Client:
    """A client, not yet connected; the first call starts the daemon, unless that was ruled out."""
    from mlxd import __version__
    from mlxd_client import Client

    return Client(args.socket, name="mlxd-cli", version=__version__, start=not args.no_start, reconnect=reconnect)


def program() -> list[str]:
    """How this command was started, without its arguments: what would run a daemon of this very version."""
    from mlxd.handover import own_program

    return own_program()


def model_ref(text: str) -> str:
    """A model as typed: `./folder`, `../folder` and `~/folder` become absolute; all else the daemon knows."""
    if text in (".", "..") or text.startswith(("./", "../", "~/")):
        return os.path.abspath(os.path.expanduser(text))
    return text


def duration(text: str) -> float:
    """Seconds, from `90`, `90s`, `5m`, `2h`, `1d`; `-1` and `forever` mean without end."""
    if text in ("forever", "-1"):
        return -1.0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|d)?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 90, 5m, 2h or forever")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2] or "s"]
