"""Changing config.toml: its comments are kept, it is written as a whole, and by one at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .settings import MAX_FILE_BYTES, SettingsError, name_and_key
from .wholefiles import write_whole

__all__ = ["edited", "locked", "write"]

LOCK_S = 5.0


def edited(text: str, values: Mapping[str, Any], unset: Sequence[str] = ()) -> str:
    """`text` with these settings, or entries of tables, set and taken out. All else stays as it is written.

    Raises:
        SettingsError: `text` is no TOML, or a value cannot be written as such.
    """
    import tomllib

    # A small library of Python alone, and a megabyte in memory: only who changes a setting pays for it.
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        wanted = tomllib.loads(text)
        document = tomlkit.parse(text)
        for target in (wanted, document):
            for name in unset:
                _take_out(target, *name_and_key(name))
            for name, value in values.items():
                _put_in(target, *name_and_key(name), value)
        made = document.as_string()
        size = len(made.encode())
        same = size > MAX_FILE_BYTES or tomllib.loads(made) == wanted
    except (tomllib.TOMLDecodeError, TOMLKitError, RecursionError, ValueError, TypeError) as error:
        raise SettingsError(f"config.toml cannot be changed: {error}") from None
    if size > MAX_FILE_BYTES:
        raise SettingsError(f"config.toml would be larger than {MAX_FILE_BYTES} bytes")
    if not same:
        raise SettingsError("config.toml is written in a way that cannot be changed here: edit it by hand")
    return made


def _take_out(target: Any, name: str, key: str | None) -> None:
    if key is None:
        _remove(target, name)
    elif isinstance(table := target.get(name), dict):
        _remove(table, key)
        if not table:
            _remove(target, name)


def _remove(table: Any, key: str) -> None:
    """Take an entry out of a table, or of tomlkit's likeness of one. To that, comments above the next table belong to
    the one before, and would go with it."""
    from tomlkit.container import Container
    from tomlkit.items import Whitespace

    if key not in table:
        return
    container = table if isinstance(table, Container) else getattr(table, "value", None)
    if not isinstance(container, Container):
        del table[key]
        return
    places = [at for at, (known, _) in enumerate(container.body) if known is not None and known.key == key]
    tail = _tail(container.body[places[-1]][1])
    table.remove(key)
    if "#" in tail:
        container.body[places[-1]] = (None, Whitespace(tail))


def _tail(item: Any) -> str:
    """What stands behind the last entry of a table."""
    from tomlkit.items import AbstractTable, InlineTable

    tail = ""
    if isinstance(item, AbstractTable) and not isinstance(item, InlineTable):
        for key, one in reversed(item.value.body):
            if key is not None:
                return _tail(one) + tail
            tail = one.as_string() + tail
    return tail


def _put_in(target: Any, name: str, key: str | None, value: Any) -> None:
    if key is None:
        target[name] = value
    elif isinstance(table := target.get(name), dict):
        table[key] = value
    else:
        target[name] = {key: value}


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
