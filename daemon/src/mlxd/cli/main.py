"""The `mlxd` command's entry: parse, run one command, and turn whatever ends it into a sentence and an exit code.

What it needs is imported by `main` itself, so that ctrl-C ends it in good order from the beginning.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from .output import Output

__all__ = ["build_parser", "main"]

_DESCRIPTION = "Local language models, ready for every app of yours."
_EPILOG = "Every command that needs the daemon starts it if it is not running. See docs/cli.md for exit codes."


def build_parser() -> argparse.ArgumentParser:
    from mlxd import __version__

    from . import (
        batch,
        bugreport,
        cache,
        chat,
        completion,
        config,
        daemon,
        doctor,
        generate,
        hub,
        jobs,
        models,
        personas,
        service,
        stats,
        status,
        top,
        watch,
    )
    from .common import HelpFormatter, Parser

    parser = Parser(prog="mlxd", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"mlxd {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    for group in (
        generate, chat, personas, models, hub, jobs, batch, cache, watch, top, stats, status, daemon, service, config,
        doctor, bugreport, completion,
    ):  # fmt: skip
        group.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (see exits.py)."""
    try:
        _open_streams()
        return _main(argv)
    except KeyboardInterrupt:
        from .exits import INTERRUPTED

        return INTERRUPTED
    except BrokenPipeError:
        from .exits import BROKEN_PIPE

        _forget_output()
        return BROKEN_PIPE


def _main(argv: Sequence[str] | None) -> int:
    from mlxd_client.errors import ClientError, ConnectionLost, MlxdError

    from .exits import USAGE, code_of
    from .output import Output

    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return USAGE
    output = Output(json=getattr(args, "json", False))
    try:
        status = _run(args, output)
        output.out.flush()
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk under our output, as a rule; the daemon's own come as MlxdErrors
        _forget_output()
        place = "the output cannot be written" if error.filename is None else error.filename
        failure = ClientError(f"{place}: {error.strerror or error}")
        output.error(failure)
        return code_of(failure)
    except MlxdError as error:
        output.error(error)
        if isinstance(error, ConnectionLost) and not output.json:
            _tell_wrong_settings(output)
        return code_of(error)
    return status


def _tell_wrong_settings(output: Output) -> None:
    """A daemon that a service manager starts hangs up on its clients where its settings are wrong."""
    from mlxd import settings
    from mlxd_client.errors import MlxdError

    try:
        settings.load()
    except MlxdError as error:
        output.note(f"the daemon will not run: {error}")


def _open_streams() -> None:
    """Whoever started this may have closed some: what is opened next must not be taken for standard output. And what a
    terminal's encoding cannot say must not end the command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # until the end
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _forget_output() -> None:
    """What is still buffered must not raise again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: argparse.Namespace, output: Output) -> int:
    """Run the command; where its model is not downloaded and a person wants it now, download that first."""
    from mlxd_client.errors import ModelNotDownloaded

    from .exits import code_of

    try:
        status: int = args.run(args, output)
    except ModelNotDownloaded as error:
        from . import offer

        output.error(error)
        if not offer.taken(error, args, output):
            return code_of(error)
        status = args.run(args, output)
    return status


if __name__ == "__main__":
    sys.exit(main())
