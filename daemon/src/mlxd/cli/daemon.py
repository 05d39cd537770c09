"""`mlxd serve`, `restart` and `stop`: the daemon itself."""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING, Any

from .common import Commands, add_command, connect
from .exits import FAILED, OK, USAGE

if TYPE_CHECKING:
    from .output import Output


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(commands, "serve", serve, "run the daemon in the foreground", daemon=False)
    parser.add_argument("--home", metavar="PATH", help="the folder that holds everything the daemon keeps")
    parser.add_argument("--socket", metavar="PATH", help="where to listen (default: mlxd.sock in the home folder)")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="what the log holds")
    parser.add_argument("--log-prompts", action="store_true", default=None, help="log prompts and answers too")
    parser.add_argument(
        "--stdio",
        action="store_true",
        help="also serve whoever started this, on standard input and output, and end with it",
    )
    parser.add_argument(
        "--join",
        action="store_true",
        help="with --stdio: run no daemon, lead to the one of the user, which is started if need be",
    )
    parser.add_argument("--parent-pid", type=int, metavar="PID", help="end when this process does")
    parser.add_argument(
        "--managed", action="store_true",
        help="started by launchd or systemd: exit with 0 where starting again would not help",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings",
        help="any setting of config.toml, e.g. --set keep_alive_s=60; may be repeated",
    )  # fmt: skip

    parser = add_command(
        commands, "restart", restart, "replace the running daemon by a new one, of the version that is installed now",
        epilog="Requests that the old one has accepted are answered by it; nobody is refused meanwhile. Where the new "
               "one does not start, the old one goes on and this command says why.",
    )  # fmt: skip

    parser = add_command(commands, "stop", stop, "stop the daemon, once running requests are done or out of time")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="how long to wait (default: 60)")


def serve(args: argparse.Namespace, output: Output) -> int:
    if args.join:
        return _join(args, output)
    from mlxd import settings
    from mlxd_client.errors import MlxdError

    flags: dict[str, Any] = {
        "home": args.home, "socket": args.socket, "log_level": args.log_level, "log_prompts": args.log_prompts,
    }  # fmt: skip
    from mlxd.lean import without_openssl

    without_openssl()
    from mlxd import app

    try:
        for text in args.settings:
            name, equals, value = text.partition("=")
            if not equals:
                raise settings.SettingsError(f"--set {text} has no value: write --set {name}=VALUE")
            flags[name.strip().replace("-", "_")] = value
        loaded = settings.load(flags=flags)
    except MlxdError as error:
        if args.managed:
            return app.give_up(str(error))
        raise
    for warning in loaded.warnings:
        output.note(warning)
    return app.serve(loaded, app.Launch(managed=args.managed, stdio=args.stdio, parent_pid=args.parent_pid))


def _join(args: argparse.Namespace, output: Output) -> int:
    """Lead standard input and output to the user's daemon."""
    from mlxd import sidecar

    from .join import reached

    if not args.stdio:
        output.note("--join goes with --stdio")
        return USAGE
    sidecar.join(reached(args.socket))
    return OK


def restart(args: argparse.Namespace, output: Output) -> int:
    """Have a daemon take over that is what this command is. None running is fine: the next one will be."""
    from mlxd_client.errors import ConnectFailed

    args.no_start = True
    try:
        with connect(args) as client:
            before = client.connect().server
            _choose(client.path)
            after = client.restart()
    except ConnectFailed:
        if output.json:
            output.document({"restarted": False})
        else:
            output.line("mlxd is not running")
        return OK
    if output.json:
        output.document({"restarted": True, "before": before, "after": after})
    else:
        process = "" if after.pid is None else f" (process {after.pid})"
        output.line(f"mlxd {before.version} (process {before.pid}) is replaced by {after.version}{process}")
    return OK


def _choose(path: str) -> None:
    """Where the daemon has the home of this shell, let this command's own program take over."""
    from pathlib import Path

    from mlxd.handover import choose_program
    from mlxd_client import paths
    from mlxd_client.errors import SocketPathTooLong

    from .common import program

    try:
        if os.path.realpath(path) == os.path.realpath(paths.socket_path()):
            choose_program(Path(paths.home()), program())
    except (OSError, SocketPathTooLong):
        return  # then it takes its own, as it would have anyway


def stop(args: argparse.Namespace, output: Output) -> int:
    """Ask the daemon to end and wait until it has. None running is fine: that is what was wanted."""
    from mlxd_client.errors import ConnectFailed, ConnectionLost

    args.no_start = True
    try:
        with connect(args) as client:
            path, status = client.path, client.status()
            client.shutdown()
    except (ConnectFailed, ConnectionLost):
        if output.json:
            output.document({"stopped": False})
        else:
            output.line("mlxd is not running")
        return OK
    pid = status.pid
    # A service manager keeps the socket, for the next daemon.
    if not gone(None if status.activated else path, pid, args.timeout):
        output.note(f"mlxd (process {pid}) agreed to stop, but still runs after {args.timeout:g} s")
        return FAILED
    if output.json:
        output.document({"stopped": True, "pid": pid})
    else:
        output.line("mlxd has stopped")
    return OK


def gone(path: str | None, pid: int, timeout_s: float) -> bool:
    """Wait for the end of a daemon that is no child of ours, which only asking again and again can tell. Where it made
    its socket itself, at `path`, that goes, too."""
    deadline = time.monotonic() + timeout_s
    while (path is not None and os.path.exists(path)) or runs(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def runs(pid: int) -> bool:
    """Whether it is a process of this user's. One that has ended, and that nobody has asked how, does not run."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.uids().real == os.getuid()
    except psutil.Error:
        return False
