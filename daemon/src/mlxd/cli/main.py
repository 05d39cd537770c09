"""The `mlxd` command's entry: parse, run one command, and turn whatever ends it into a sentence and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

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
)  # fmt: skip
from .common import HelpFormatter
from .exits import BROKEN_PIPE, INTERRUPTED, code_of
from .output import Output

__all__ = ["build_parser", "main"]

_DESCRIPTION = "Local language models, ready for every app of yours."
_EPILOG = "Every command that needs the daemon starts it if it is not running. See docs/cli.md for exit codes."


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlxd", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=HelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"mlxd {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for group in (
        generate, chat, personas, models, hub, jobs, batch, cache, watch, top, stats, status, daemon, service, config,
        doctor, bugreport, completion,
    ):  # fmt: skip
        group.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (see exits.py)."""
    from mlxd_client.errors import MlxdError

    args = build_parser().parse_args(argv)
    output = Output(json=getattr(args, "json", False))
    try:
        status = _run(args, output)
        output.out.flush()
    except MlxdError as error:
        output.error(error)
        return code_of(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough. What is still buffered must not raise again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return status


def _run(args: argparse.Namespace, output: Output) -> int:
    """Run the command; where its model is not downloaded and a person wants it now, download that first."""
    from mlxd_client.errors import ModelNotDownloaded

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
