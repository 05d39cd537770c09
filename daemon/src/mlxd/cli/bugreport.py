"""`mlxd bug-report`: what helps to find out what went wrong, in one file; without secrets, and without what was said.

Works with the daemon down, starts none, and sends nothing anywhere. What goes in is in evidence.py.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING

from .common import Commands, add_command
from .exits import FAILED, OK

if TYPE_CHECKING:
    from .output import Output

_LINES = 2000


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "bug-report", bug_report, "pack what helps to find a fault into one file", daemon=False,
        epilog="Nothing is sent anywhere. Tokens and passwords, prompts and answers are left out, and the home folder "
               "is told as ~; look at it before you pass it on all the same. Starts no daemon, and needs none.",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", help="where to (default: a new file in this folder)")
    parser.add_argument(
        "-n", "--lines", type=int, default=_LINES, metavar="N", help=f"lines of the log (default: {_LINES})"
    )
    parser.add_argument("--socket", metavar="PATH", help="where the daemon listens (default: $MLXD_SOCKET, $MLXD_HOME)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def bug_report(args: argparse.Namespace, output: Output) -> int:
    from . import evidence

    path = args.output or time.strftime("mlxd-bug-report-%Y%m%d-%H%M%S.tar.gz")
    try:  # before anything is gathered, so that nothing is gathered in vain
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        told = "is there already, and is not overwritten" if isinstance(error, FileExistsError) else error.strerror
        output.note(f"{path}: {told}")
        return FAILED
    try:
        with os.fdopen(file, "wb") as stream:
            os.fchmod(stream.fileno(), 0o600)
            output.progress("gathering")
            parts = evidence.gather(args.socket, args.lines)
            evidence.pack(parts, stream)
    except BaseException as error:
        os.unlink(path)
        if not isinstance(error, OSError):
            raise
        output.note(f"{path}: {error.strerror or error}")
        return FAILED
    finally:
        output.progress(None)
    _tell(path, parts, output)
    return OK


def _tell(path: str, parts: dict[str, bytes], output: Output) -> None:
    from .output import bytes_text

    if output.json:
        output.document({"path": os.path.abspath(path), "parts": {name: len(part) for name, part in parts.items()}})
        return
    output.table((), [(f"  {name}", bytes_text(len(part)), _told(part)) for name, part in parts.items()])
    output.line(f"{path}: {bytes_text(os.stat(path).st_size)}, to be read by you alone; nothing was sent anywhere")


def _told(part: bytes) -> str:
    """That a part is missing, and why."""
    return part.decode()[:200].strip() if part.startswith(b'{"missing"') else ""
