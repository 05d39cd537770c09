"""Changing config.toml: its comments are kept, it is written as a whole, and by one at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import tomledit
from .settings import MAX_FILE_BYTES, SettingsError, name_and_key
from .wholefiles import write_whole

__all__ = ["edited", "edited_apart", "locked", "write"]

LOCK_S = 3.0
EDIT_S = 10.0
# What a Python needs of the environment; nothing there is for others to know, nor makes it do more than it is told.
_FOR_PYTHON = re.compile(r"^(PYTHON(HOME|PATH|UTF8|HASHSEED|DONTWRITEBYTECODE)|PATH|HOME|LANG|LC_\w+|(LD|DYLD)_\w+)$")


def edited(text: str, values: Mapping[str, Any], unset: Sequence[str] = ()) -> str:
    """`text` with these settings, or entries of tables, set and taken out. All else stays as it is written.

    Raises:
        SettingsError: `text` is no TOML, or a value cannot be written as such.
    """
    return _result(tomledit.answer(_order(text, values, unset)))


def edited_apart(text: str, values: Mapping[str, Any], unset: Sequence[str] = ()) -> str:
    """The same by a process of its own, for a daemon: what reading and writing TOML takes is given back with it, and
    nobody waits for the interpreter meanwhile. Takes at most `EDIT_S` seconds."""
    command = [sys.executable, "-m", "mlxd.tomledit"]
    env = {name: value for name, value in os.environ.items() if _FOR_PYTHON.match(name)} | {"PYTHONSAFEPATH": "1"}
    try:
        order = json.dumps(_order(text, values, unset)).encode()
        done = subprocess.run(command, input=order, capture_output=True, env=env, timeout=EDIT_S, check=True)
        return _result(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        raise SettingsError(f"config.toml could not be changed within {EDIT_S:g} s") from None
    except (OSError, subprocess.CalledProcessError, TypeError, ValueError) as error:
        raise SettingsError(f"config.toml could not be changed: {error}") from None


def _order(text: str, values: Mapping[str, Any], unset: Sequence[str]) -> dict[str, Any]:
    return {
        "text": text, "most_bytes": MAX_FILE_BYTES, "unset": [name_and_key(name) for name in unset],
        "values": [(*name_and_key(name), value) for name, value in values.items()],
    }  # fmt: skip


def _result(answer: dict[str, str]) -> str:
    if "error" in answer:
        raise SettingsError(f"config.toml cannot be changed: {answer['error']}")
    return answer["text"]


def write(path: Path, text: str) -> None:
    """Put the text in the file's place: whoever reads it finds the old one or the new one. A link stays one, and
    permissions are kept. Raises OSError."""
    place = Path(os.path.realpath(path))
    try:
        mode = place.stat().st_mode & 0o777
    except FileNotFoundError:
        mode = 0o600
    write_whole(place, text.encode(), mode=mode)


@contextlib.contextmanager
def locked(home: Path, limit_s: float = LOCK_S) -> Iterator[None]:
    """Keep everybody else from changing the file meanwhile, also from other processes.

    Raises:
        TimeoutError: somebody else has held it for `limit_s` seconds.
        OSError: there is no such folder.
    """
    fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        give_up_at = time.monotonic() + limit_s
        while not _locked(fd):
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"another process has been changing the settings for {limit_s:g} s")
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    """Whether the lock is ours now. A file system that knows no locks can keep nobody out."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
