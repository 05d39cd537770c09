"""`mlxd service`: have launchd or systemd start the daemon for the first client, and take that back without a trace."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import TYPE_CHECKING

from .common import Commands, add_command
from .exits import FAILED, OK, USAGE

if TYPE_CHECKING:
    from pathlib import Path

    from mlxd.service.manager import Manager, ServiceState
    from mlxd.service.spec import ServiceSpec
    from mlxd.settings import Settings

    from .output import Output

_ACTIONS = ("install", "uninstall", "start", "stop", "restart", "status", "logs")
# What lies in a home folder, as patterns, with what writers that were killed have left beside it; settings, caches and
# batch jobs, also those in a file that was damaged, outlive the service unless it is purged.
_LEFTOVERS = ("logs", "run", "downloads.json", "mlxd.lock", ".*.new")
_PURGED = ("config.toml", "cache", "batch.sqlite3*")
_LINES = 50


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "service", service, "have the system start the daemon for the first client", daemon=False,
        epilog="install and uninstall may be repeated. stop ends the daemon; the next client starts it again. What "
               "this shell's MLXD_ and HF_ variables say is installed with it.",
    )  # fmt: skip
    parser.add_argument("action", choices=_ACTIONS, help="what to do with it")
    parser.add_argument(
        "--purge", action="store_true", help="with uninstall: also remove config.toml, caches and batch jobs"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="with logs: go on as they grow")
    parser.add_argument(
        "-n", "--lines", type=int, default=_LINES, metavar="N", help=f"with logs: how many of them (default: {_LINES})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def service(args: argparse.Namespace, output: Output) -> int:
    for given, option, action in ((args.purge, "--purge", "uninstall"), (args.follow, "--follow", "logs")):
        if given and args.action != action:
            output.note(f"{option} goes with `mlxd service {action}`")
            return USAGE
    from mlxd.service.manager import manager_for
    from mlxd.service.spec import describe

    settings = _settings(args.action, output)
    if args.action == "logs":
        return _logs(settings.log_file, args, output)
    manager = manager_for(describe(settings))
    if args.action == "status":
        return _status(manager.state(), output)
    done = _act(manager, args, output)
    if output.json:
        output.document({"service": manager.spec.name, "manager": manager.name, "done": done})
    else:
        output.line(done)
    return OK


def _settings(action: str, output: Output) -> Settings:
    """Those of this shell. A wrong configuration must not keep anyone from looking at the service, or ending it."""
    from mlxd import settings
    from mlxd_client import paths

    try:
        return settings.load().settings
    except settings.SettingsError as error:
        if action == "install":
            raise
        output.note(f"the daemon will not run: {error}")
        return settings.Settings(home=paths.home(), socket=paths.socket_path())


def _act(manager: Manager, args: argparse.Namespace, output: Output) -> str:
    """Do it, and say what was done."""
    from pathlib import Path

    from mlxd.service.spec import ServiceError

    spec = manager.spec
    if args.action == "install":
        from mlxd.server.listen import HomeError, prepare_home

        try:
            prepare_home(Path(spec.home))
        except HomeError as error:
            raise ServiceError(str(error)) from None
        if not manager.state().listening:
            _stop_daemon(spec.socket)  # one that was started by hand would hold the socket
        changed = manager.install()
        return f"mlxd is started by {manager.name} for the first client" + ("" if changed else ", as it was before")
    if args.action == "uninstall":
        changed = manager.uninstall()
        _stop_daemon(spec.socket)
        removed = _remove_socket(Path(spec.socket))  # before its folder, which may be home
        removed |= _remove(Path(spec.home), purge=args.purge)
        return "the service is uninstalled" if changed or removed else "there was no service"
    if not manager.state().installed:
        raise ServiceError("the service is not installed; `mlxd service install` does that")
    if args.action == "restart":
        return _restart(manager)
    {"start": manager.start, "stop": manager.stop}[args.action]()
    return {"start": "mlxd runs", "stop": "mlxd has stopped"}[args.action]


def _restart(manager: Manager) -> str:
    """Have the service run this very installation with this shell's settings, with as little of a gap as can be.

    1. Nothing but the command differs from what is installed, and the daemon runs: another takes over from it.
    2. Other settings, or a manager that would not have that: it is installed anew, and started.
    3. An older daemon, that nothing can take over from, is stopped by the manager, whose socket keeps who connects.
    """
    from mlxd.service.spec import ServiceError
    from mlxd_client import Client
    from mlxd_client.errors import ClientError, MethodNotFound, RestartFailed, Unsupported

    spec = manager.spec
    if not manager.update():
        manager.install()
        manager.start()
        return "mlxd was installed anew and started"
    if manager.state().pid is None:
        manager.start()
        return "mlxd was started"
    try:
        with Client(spec.socket, name="mlxd-cli", start=False, reconnect=False) as client:
            _choose(spec)
            result = client.restart()
        return f"mlxd {result.version} has taken over"
    except RestartFailed as error:
        raise ServiceError(f"the daemon goes on as it was: {error.message}") from None
    except (MethodNotFound, Unsupported, ClientError):
        manager.restart()
        return "mlxd was started anew"


def _choose(spec: ServiceSpec) -> None:
    """Let the service's own command take over."""
    from pathlib import Path

    from mlxd.handover import choose_program

    try:
        choose_program(Path(spec.home), spec.program, managed=True)
    except OSError:
        return  # then the daemon takes its own, which mostly is the same


def _stop_daemon(socket: str) -> None:
    """End a daemon that listens there, once what it does is done. None is fine."""
    from mlxd_client import Client
    from mlxd_client.errors import ClientError

    from .daemon import gone

    if not os.path.exists(socket):
        return
    try:
        with Client(socket, name="mlxd-cli", start=False, reconnect=False) as client:
            pid = client.status().pid
            client.shutdown()
    except ClientError:
        return
    gone(socket, pid, 60.0)


def _remove_socket(socket: Path) -> bool:
    """Take away a socket that nobody listens on any more, with its lock and those that killed daemons were about to put
    in its place, and the folder in /tmp that homes with too long a path share, once it is empty. Returns whether there
    was anything."""
    from mlxd.server.listen import lock_of

    sockets = [path for path in (socket, *socket.parent.glob(f".{socket.name}.*")) if path.is_socket()]
    found = [path for path in (*sockets, lock_of(socket)) if path.exists()]
    for path in found:
        path.unlink(missing_ok=True)
    if str(socket.parent) == f"/tmp/mlxd-{os.getuid()}":
        with contextlib.suppress(OSError):
            socket.parent.rmdir()
    return bool(found)


def _remove(home: Path, *, purge: bool) -> bool:
    """Take away what the daemon left in its home. What it did not make stays. Returns whether there was anything."""
    import shutil

    removed = False
    for path in [path for name in (*_LEFTOVERS, *(_PURGED if purge else ())) for path in home.glob(name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
            removed = True
        else:
            path.unlink()
            removed = True
    try:
        home.rmdir()
    except OSError:
        pass  # something is left in it, or it never was
    return removed


def _status(state: ServiceState, output: Output) -> int:
    if output.json:
        output.document(state)
    else:
        output.table((), _rows(state))
    return OK if state.installed and state.listening and state.failed is None else FAILED


def _rows(state: ServiceState) -> list[tuple[str, str]]:
    if not state.installed:
        return [("service", f"not installed ({state.manager})")]
    rows = [("service", f"installed ({state.manager})")]
    if not state.current:
        rows.append(("", "with other settings than this shell's; `mlxd service install` brings it up to date"))
    rows.append(("socket", "held: the first client starts the daemon" if state.listening else "not held; start it"))
    rows.append(("daemon", f"runs as process {state.pid}" if state.pid else "does not run"))
    if state.text:
        rows.append(("", state.text))
    if state.failed:
        rows.append(("failed", f"{state.failed}; see `mlxd service logs`"))
    return rows + [("file", file) for file in state.files]


def _logs(path: Path, args: argparse.Namespace, output: Output) -> int:
    if not path.exists():
        output.note(f"there is no log yet: {path}")
        return FAILED
    output.out.flush()
    if args.follow:
        os.execvp("tail", ["tail", "-n", str(args.lines), "-F", str(path)])
    with open(path, errors="replace") as file:
        for line in file.readlines()[-args.lines :] if args.lines > 0 else ():
            output.text(line)
    return OK
