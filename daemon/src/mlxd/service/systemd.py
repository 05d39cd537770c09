"""The units for `systemd --user`, and how it is told of them. See systemd.socket(5) and systemd.service(5)."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

from .manager import ServiceState
from .spec import ServiceError, ServiceSpec, write_private

__all__ = ["Systemd", "service_unit", "socket_unit"]

_WAIT_S = 90.0


def socket_unit(spec: ServiceSpec) -> str:
    """No limit to how often it triggers: past one, systemd would give the socket up until somebody starts it by hand,
    and there is no start without a client that connected."""
    return f"""\
# Written by `mlxd service install`, which overwrites it.
[Unit]
Description=mlxd: local language models, on their first use

[Socket]
ListenStream={_path(spec.socket)}
SocketMode=0600
DirectoryMode=0700
Backlog=1024
RemoveOnStop=yes
TriggerLimitIntervalSec=0

[Install]
WantedBy=sockets.target
"""


def service_unit(spec: ServiceSpec) -> str:
    """No limit to how often it starts: five kills in ten seconds, or clients while the settings are wrong, would
    otherwise leave it and its socket failed for good. RestartSec keeps one that cannot even begin from spinning."""
    environment = "".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in spec.environment.items())
    return f"""\
# Written by `mlxd service install`, which overwrites it.
[Unit]
Description=mlxd: local language models
Requires={spec.name}.socket
After={spec.name}.socket
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={" ".join(_quoted(word, command=True) for word in spec.command)}
ExecReload=/bin/kill -HUP $MAINPID
{environment}UMask=0077
NoNewPrivileges=yes
Restart=on-failure
RestartSec=1
WatchdogSec=30
TimeoutStartSec=90
TimeoutStopSec={spec.stop_s}
KillMode=mixed
"""


def _commandless(unit: str) -> list[str]:
    return [line for line in unit.splitlines() if not line.startswith("ExecStart=")]


def _quoted(text: str, *, command: bool = False) -> str:
    """A word of a unit file: quoted, specifiers and, in commands, variables taken literally."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text.replace("$", "$$") if command else text}"'


def _path(text: str) -> str:
    return text.replace("%", "%%")  # the rest of the line is the path, blanks and all


class Systemd:
    """`systemd --user`, as systemctl reaches it."""

    name = "systemd"

    def __init__(self, spec: ServiceSpec) -> None:
        self.spec = spec
        base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
        self._folder = Path(base) / "systemd" / "user"
        self.files = {
            self._folder / f"{spec.name}.socket": socket_unit(spec),
            self._folder / f"{spec.name}.service": service_unit(spec),
        }
        self._socket, self._service = f"{spec.name}.socket", f"{spec.name}.service"

    def install(self) -> bool:
        self._validate()
        changed = [write_private(path, text.encode()) for path, text in self.files.items()]
        if any(changed):
            self._ask("daemon-reload")
        if any(changed) and self._is("active", self._socket):
            # Where its own file is the same, the socket stays: who connects waits in it for the next daemon.
            self._ask("stop", self._service, *([self._socket] if changed[0] else []))
        was = self._is("enabled", self._socket) and self._is("active", self._socket)
        self._ask("enable", "--now", self._socket)
        return any(changed) or not was

    def update(self) -> bool:
        """The service's file alone, and only where nothing differs in it but the command."""
        socket_file, service_file = self.files
        try:
            old, new = service_file.read_text(), self.files[service_file]
            same = socket_file.read_text() == self.files[socket_file] and _commandless(old) == _commandless(new)
        except OSError:
            return False
        if not same:
            return False
        if old != new:
            self._validate()
            write_private(service_file, new.encode())
            self._ask("daemon-reload")
        return True

    def uninstall(self) -> bool:
        there = [path for path in self.files if path.exists()]
        if not there and not self._is("active", self._socket):
            return False
        self._ask("disable", "--now", self._socket, may_fail=True)
        self._ask("stop", self._service, may_fail=True)
        for path in there:
            path.unlink(missing_ok=True)
        self._ask("daemon-reload")
        self._ask("reset-failed", self._service, self._socket, may_fail=True)
        with contextlib.suppress(OSError):  # folders that are empty now, and were most likely made for these files
            self._folder.rmdir()
            self._folder.parent.rmdir()
        return True

    def start(self) -> None:
        self._ask("start", self._socket, self._service)

    def stop(self) -> None:
        """The daemon; the next client starts it again."""
        self._ask("stop", self._service)
        self._ask("start", self._socket)  # it stops with nothing, but may have failed before

    def restart(self) -> None:
        self._ask("start", self._socket)
        self._ask("restart", self._service)

    def state(self) -> ServiceState:
        installed = all(path.exists() for path in self.files)
        told = self._ask("show", self._service, "--property=MainPID,StatusText,Result,ActiveState", may_fail=True)
        values = dict(line.partition("=")[::2] for line in told.splitlines())
        pid = values.get("MainPID", "0")
        return ServiceState(
            manager=self.name,
            installed=installed,
            current=installed and all(path.read_text() == text for path, text in self.files.items()),
            listening=self._is("active", self._socket),
            pid=int(pid) if pid.isdigit() and pid != "0" else None,
            text=values.get("StatusText", ""),
            failed=values.get("Result", "success") if values.get("ActiveState") == "failed" else None,
            files=[str(path) for path in self.files],
        )

    def _validate(self) -> None:
        """Have systemd read the units before they replace what works."""
        with tempfile.TemporaryDirectory(prefix="mlxd-units-") as folder:
            paths = [Path(folder, path.name) for path in self.files]
            for path, text in zip(paths, self.files.values(), strict=True):
                path.write_text(text)
            command = ["systemd-analyze", "--user", "verify", *map(str, paths)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT_S, check=False)
            except FileNotFoundError:
                return
        told = [line for line in done.stderr.splitlines() if folder in line]
        if done.returncode and told:
            raise ServiceError(f"systemd would not take the units: {told[0]}")

    def _is(self, what: str, unit: str) -> bool:
        return self._ask(f"is-{what}", unit, may_fail=True).strip() == what

    def _ask(self, *words: str, may_fail: bool = False) -> str:
        command = ["systemctl", "--user", "--no-ask-password", *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT_S, check=False)
        except FileNotFoundError:
            raise ServiceError(
                "this system has no systemd; run `mlxd serve` from whatever starts your programs"
            ) from None
        except subprocess.TimeoutExpired:
            raise ServiceError(f"`{' '.join(command)}` does not end") from None
        if done.returncode and re.search(r"Failed to connect to .*\bbus\b", done.stderr):
            raise ServiceError(
                "systemd runs nothing for this user here: log in directly and not by su or sudo, have it run without a "
                "login by `loginctl enable-linger`, or run `mlxd serve` from whatever starts your programs"
            )
        if done.returncode and not may_fail:
            told = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise ServiceError(f"`{' '.join(command)}` failed: {told[-1] if told else done.returncode}")
        return done.stdout
