"""The property list for launchd's gui domain, and how launchctl is told of it. See launchd.plist(5), launchctl(1)."""

from __future__ import annotations

import os
import plistlib
import re
import subprocess
import time
from pathlib import Path

from ..server.activation import LAUNCHD_SOCKET
from .manager import ServiceState
from .spec import ServiceError, ServiceSpec, write_private

__all__ = ["Launchd", "property_list"]

_WAIT_S = 60.0
# After a bootout, launchd refuses a bootstrap with EIO until the old job is gone.
_RETRY_S, _RETRIES = 0.25, 60
_EIO, _EALREADY, _EINPROGRESS = 5, 37, 36
_NOT_THERE = 113


def property_list(spec: ServiceSpec) -> bytes:
    """No RunAtLoad: the first client starts the daemon. ProcessType Interactive, for what is unset is throttled, and
    Adaptive follows XPC activity, of which there is none. ExitTimeOut lets running requests end."""
    return plistlib.dumps(
        {
            "Label": _label(spec),
            "ProgramArguments": spec.command,
            "EnvironmentVariables": spec.environment,
            "Sockets": {
                LAUNCHD_SOCKET: {
                    "SockFamily": "Unix",
                    "SockType": "stream",
                    "SockPathName": spec.socket,
                    "SockPathMode": 0o600,
                }
            },
            "ProcessType": "Interactive",
            "LimitLoadToSessionType": "Aqua",
            "ExitTimeOut": spec.stop_s,
            "KeepAlive": {"Crashed": True},
            "Umask": 0o077,
            "StandardOutPath": _stderr(spec),
            "StandardErrorPath": _stderr(spec),
        },
        sort_keys=False,
    )


def _label(spec: ServiceSpec) -> str:
    return f"org.mlxd.{spec.name}"


def _stderr(spec: ServiceSpec) -> str:
    return str(Path(spec.log_file).with_name("service.log"))


class Launchd:
    """launchd's domain of the user's own session, as launchctl reaches it."""

    name = "launchd"

    def __init__(self, spec: ServiceSpec) -> None:
        self.spec = spec
        self._domain = f"gui/{os.getuid()}"
        self._target = f"{self._domain}/{_label(spec)}"
        self.path = Path(os.path.expanduser("~")) / "Library" / "LaunchAgents" / f"{_label(spec)}.plist"

    def install(self) -> bool:
        Path(_stderr(self.spec)).parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # launchd does not make it
        self._validate()
        changed = write_private(self.path, property_list(self.spec))
        loaded = self._loaded()
        if loaded and not changed:
            return False
        if loaded:
            self._bootout()
        self._bootstrap()
        return True

    def update(self) -> bool:
        """launchd takes another list only after it has let go of the old one, and of the socket with it."""
        return self.path.exists() and self.path.read_bytes() == property_list(self.spec)

    def uninstall(self) -> bool:
        there, loaded = self.path.exists(), self._loaded()
        if loaded:
            self._bootout()
        self.path.unlink(missing_ok=True)
        return there or loaded

    def start(self) -> None:
        self._bootstrap_if_needed()
        self._ask("kickstart", self._target)

    def stop(self) -> None:
        """The daemon; the next client starts it again."""
        self._ask("kill", "SIGTERM", self._target, may_fail=True)

    def restart(self) -> None:
        self._bootstrap_if_needed()
        self._ask("kickstart", "-k", self._target)

    def state(self) -> ServiceState:
        status, told = self._run("print", self._target)
        pid = re.search(r"^\s*pid = (\d+)", told, re.MULTILINE)
        last = re.search(r"^\s*last exit code = (.+)", told, re.MULTILINE)
        installed = self.path.exists()
        failed = last[1].strip() if last and not re.match(r"0\b|\(never exited\)", last[1].strip()) else None
        return ServiceState(
            manager=self.name,
            installed=installed,
            current=installed and self.path.read_bytes() == property_list(self.spec),
            listening=status == 0,
            pid=int(pid[1]) if pid else None,
            text="",
            failed=failed,
            files=[str(self.path)],
        )

    def _validate(self) -> None:
        """Have the system read the list before it replaces what works."""
        try:
            done = subprocess.run(
                ["plutil", "-lint", "-"],
                input=property_list(self.spec),
                capture_output=True,
                timeout=_WAIT_S,
                check=False,
            )
        except FileNotFoundError:
            return
        if done.returncode:
            raise ServiceError(
                f"launchd would not take the property list: {done.stdout.decode(errors='replace').strip()}"
            )

    def _loaded(self) -> bool:
        return self._run("print", self._target)[0] == 0

    def _bootstrap_if_needed(self) -> None:
        if not self._loaded():
            self._bootstrap()

    def _bootstrap(self) -> None:
        self._ask("enable", self._target, may_fail=True)  # a `launchctl disable` of old would refuse it
        for _ in range(_RETRIES):
            status, told = self._run("bootstrap", self._domain, str(self.path))
            if status == 0 or (status == _EALREADY and self._loaded()):
                return
            if status not in (_EIO, _EALREADY, _EINPROGRESS):
                break
            time.sleep(_RETRY_S)
        raise ServiceError(f"launchd did not take {self.path}: {told.strip() or status}")

    def _bootout(self) -> None:
        status, told = self._run("bootout", self._target)
        if status not in (0, _EINPROGRESS, _NOT_THERE, 3):
            raise ServiceError(f"launchd did not let go of {self._target}: {told.strip() or status}")
        for _ in range(_RETRIES):
            if not self._loaded():
                return
            time.sleep(_RETRY_S)
        raise ServiceError(f"launchd does not let go of {self._target}; log out and in again")

    def _ask(self, *words: str, may_fail: bool = False) -> None:
        status, told = self._run(*words)
        if status and not may_fail:
            raise ServiceError(f"`launchctl {' '.join(words)}` failed: {told.strip() or status}")

    def _run(self, *words: str) -> tuple[int, str]:
        try:
            done = subprocess.run(["launchctl", *words], capture_output=True, text=True, timeout=_WAIT_S, check=False)
        except FileNotFoundError:
            raise ServiceError("this system has no launchctl") from None
        except subprocess.TimeoutExpired:
            raise ServiceError(f"`launchctl {' '.join(words)}` does not end") from None
        return done.returncode, done.stdout + done.stderr
