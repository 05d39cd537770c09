"""A real `systemd --user` of a test's own: its own runtime folder and configuration, gone with the test."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

_PROGRAM = Path("/usr/lib/systemd/systemd")
# systemd runs as a user's only where this says that it is the system's, too.
_BOOTED = Path("/run/systemd/system")
PATIENCE_S = 60.0


class NoSystemd(Exception):
    """Why none can be had here."""


class UserSystemd:
    """`with UserSystemd() as systemd:` starts it; `systemd.env` is what its clients need.

    Raises:
        NoSystemd: there is none, or it may not run here.
    """

    def __init__(self) -> None:
        if not _PROGRAM.exists() or shutil.which("systemctl") is None:
            raise NoSystemd("no systemd is installed")
        self.folder = Path(tempfile.mkdtemp(prefix="mlxd-"))
        self._pretended = False
        runtime = self.folder / "run"
        runtime.mkdir(mode=0o700)
        keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
        self.env = keep | {
            "HOME": str(self.folder), "XDG_RUNTIME_DIR": str(runtime), "XDG_CONFIG_HOME": str(self.folder / "config"),
            "MLXD_HOME": str(self.folder / "m"), "HF_HUB_CACHE": str(self.folder / "hub"), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["systemctl", "--user", *words]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    def __enter__(self) -> Self:
        try:
            if not _BOOTED.exists():
                _BOOTED.mkdir(parents=True)
                self._pretended = True
        except OSError as error:
            raise NoSystemd(f"systemd does not run here: {error}") from None
        manager = {name: value for name, value in self.env.items() if not name.startswith(("MLXD_", "HF_"))}
        self._process = subprocess.Popen(
            [_PROGRAM, "--user", "--unit=basic.target"], env=manager, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        give_up_at = time.monotonic() + 15.0
        while self.ctl("is-active", "basic.target").stdout.strip() != "active":
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self.__exit__()
                raise NoSystemd("`systemd --user` does not run here")
            time.sleep(0.05)  # it offers nothing to wait on before it answers
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self.ctl("exit")
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._pretended:
            shutil.rmtree(_BOOTED, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
