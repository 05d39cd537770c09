"""The settings of a daemon that runs: changed by clients, by a signal or in the file, as a whole or not at all.

A change is read, judged as a whole, and only then taken over. What cannot be used changes nothing, and is told. The
file is looked at once in `LOOK_S` seconds rather than watched by the kernel: that costs one stat(2), and is one way for
Linux, macOS, links and folders of other machines; and since a change has to have rested for a look before it is read,
nobody's half-written file is.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import msgspec

from mlxd_client import errors, types

from . import configfile
from .settings import (
    APPLIES,
    NOT_BY_CLIENTS,
    Loaded,
    SettingsError,
    check,
    config_file,
    load,
    name_and_key,
    read_file,
    unknown,
)

if TYPE_CHECKING:
    from .logs import Log

__all__ = ["LOOK_S", "Configuration", "change_file", "shown"]

T = TypeVar("T")

LOOK_S = 1.0
NOTHING: frozenset[str] = frozenset()
_TRIES = 5
By = Literal["client", "signal", "file"]
_ORIGINS: dict[str, Literal["default", "file", "environment", "flag"]] = {
    "default": "default", "file": "file", "env": "environment", "flag": "flag",
}  # fmt: skip


class Configuration:
    """What one daemon runs with, and what its file says.

    Args:
        loaded: what it started with. Its settings are changed in place.
        publish: tells the subscribers: see EventLog.publish.
        on_change: called with the names of settings that are others now; it must not fail.

    Attributes:
        settings: those that are in force.
        error: why the file cannot be used as it is, where it cannot.
    """

    def __init__(
        self, loaded: Loaded, publish: Callable[..., Any], on_change: Callable[[frozenset[str]], object], log: Log
    ) -> None:
        self.settings = loaded.settings
        self.error: types.ErrorObject | None = None
        self._path = config_file(loaded.settings.home)
        self._loaded = msgspec.structs.replace(loaded, settings=msgspec.structs.replace(loaded.settings))
        self._publish = publish
        self._on_change = on_change
        self._log = log
        self._turn = asyncio.Lock()
        self._seen = self._look()
        self._fresh: object = self._seen
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what it is -----------------------------------------------------------------------------------------------

    def view(self, names: Sequence[str] | None = None) -> types.ConfigResult:
        """All settings, or those of these names. Raises InvalidParams."""
        known = self.settings.__struct_fields__
        for name in names or ():
            if name not in known:
                raise errors.InvalidParams(str(unknown(name)), field="names", setting=name)
        return types.ConfigResult(
            path=str(self._path), settings={name: self._value(name) for name in names or known}, error=self.error,
            restart=self._waiting(), warnings=self._loaded.warnings,
        )  # fmt: skip

    def _value(self, name: str) -> types.SettingValue:
        made, value = shown(self._loaded, name), getattr(self.settings, name)
        if value != getattr(self._loaded.settings, name):
            made.value, made.configured = msgspec.to_builtins(value), made.value
        return made

    def _waiting(self) -> list[str]:
        """The settings that wait for the next daemon."""
        return [name for name in APPLIES if getattr(self.settings, name) != getattr(self._loaded.settings, name)]

    # --- changing it ----------------------------------------------------------------------------------------------

    async def set(self, values: Mapping[str, Any], unset: Sequence[str] = ()) -> types.ConfigChange:
        """Change the file, and take over what it says then.

        Raises:
            InvalidParams: there is no such setting, or a value is none for it; `details.setting` says which.
            InvalidSettings: what else the file says cannot be used.
            PermissionDenied: the file cannot be written, or the setting is not for clients to change.
            InsufficientDisk: there is no room for it.
        """
        values = _judged(values, unset)
        async with self._turn:
            loaded = await self._on_thread(lambda: _written(self._loaded, values, unset, configfile.edited_apart))
            self._seen = self._fresh = self._look()
            change = self._take_over(loaded, "client")
        change.overridden = _overridden(loaded, (*values, *unset))
        return change

    async def reload(self, by: By = "client") -> types.ConfigChange:
        """Take over what the file says now. Raises InvalidSettings where that cannot be used; nothing changes then."""
        async with self._turn:
            self._seen = self._fresh = self._look()
            try:
                loaded = await self._on_thread(lambda: load(self._loaded.env, self._loaded.flags))
            except SettingsError as error:
                invalid = _invalid(error)
                self.error = types.ErrorObject(kind=invalid.kind, message=invalid.message, details=invalid.details)
                self._log.warning("settings cannot be used", by=by, reason=str(error))
                self._publish("config_failed", error=self.error, details={"by": by})
                raise invalid from None
            return self._take_over(loaded, by)

    def _take_over(self, loaded: Loaded, by: By) -> types.ConfigChange:
        before, self._loaded = self._loaded, loaded
        changed, restart = [], []
        for name in APPLIES:
            value = getattr(loaded.settings, name)
            if value == getattr(before.settings, name):
                continue
            if APPLIES[name] == "restart":
                restart.append(name)
            else:
                changed.append(name)
                setattr(self.settings, name, value)
        if changed:
            self._on_change(frozenset(changed))
        if changed or restart or self.error is not None:
            self._log.info("settings changed", by=by, changed=changed, restart=restart)
            self.error = None
            self._publish("config_changed", details={"by": by, "changed": changed, "restart": restart})
        return types.ConfigChange(path=str(self._path), changed=changed, restart=restart)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        """Away from the loop; on a thread that a daemon which has to end does not wait for, unlike an executor's. What
        it writes is whole or not there."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if not done.done():  # else nobody waits any more
                if error is None:
                    done.set_result(cast("T", result))
                else:
                    done.set_exception(error)

        def run() -> None:
            answer: tuple[T | None, BaseException | None]
            try:
                answer = work(), None
            except BaseException as error:
                answer = None, error
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(settle, *answer)

        threading.Thread(target=run, name="mlxd-settings", daemon=True).start()
        return await done

    # --- changes from outside -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Look at the file from now on, until `close`."""
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._on_look)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    def on_signal(self) -> None:
        self._begin_reload("signal")

    def _on_look(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._on_look)
        now = self._look()
        rested, self._fresh = now == self._fresh, now
        if now != self._seen and rested and not self._turn.locked():
            self._begin_reload("file")

    def _look(self) -> object:
        """What tells one state of the file from another."""
        try:
            status = os.stat(self._path)
        except OSError as error:
            return error.errno
        return status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev

    def _begin_reload(self, by: By) -> None:
        task = asyncio.get_running_loop().create_task(self._reload(by))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload(self, by: By) -> None:
        try:
            await self.reload(by)
        except errors.InvalidSettings:
            pass  # it was told
        except Exception as error:  # a bug; the settings are as they were, and must still be looked after
            self._log.error("reloading the settings failed", by=by, exc_info=error)


def shown(loaded: Loaded, name: str) -> types.SettingValue:
    """One setting for the wire."""
    origin = loaded.origins[name]
    return types.SettingValue(
        value=msgspec.to_builtins(getattr(loaded.settings, name)), origin=_ORIGINS[origin.kind],
        place=origin.place or None, applies=APPLIES[name],
    )  # fmt: skip


def change_file(before: Loaded, values: Mapping[str, Any], unset: Sequence[str] = ()) -> types.ConfigChange:
    """Change the file where no daemon runs. Raises as `Configuration.set`."""
    loaded = _written(before, _judged(values, unset, NOTHING), unset, configfile.edited)
    names = dict.fromkeys(name_and_key(name)[0] for name in (*values, *unset))
    path = str(config_file(loaded.settings.home))
    return types.ConfigChange(path=path, restart=list(names), overridden=_overridden(loaded, names))


def _written(
    before: Loaded, values: Mapping[str, Any], unset: Sequence[str],
    edited: Callable[[str, Mapping[str, Any], Sequence[str]], str],
) -> Loaded:  # fmt: skip
    """Write the new file, judged as a whole before it is put in its place. Waits for the disk."""
    path = config_file(before.settings.home)
    try:
        with configfile.locked(path.parent):
            for _ in range(_TRIES):
                old = read_file(path)
                text = edited(old, values, unset)
                loaded = load(before.env, before.flags, text)
                if read_file(path) == old:  # an editor knows nothing of our lock
                    configfile.write(path, text)
                    return loaded
    except SettingsError as error:
        raise _invalid(error) from None
    except OSError as error:
        raise _unwritten(error, str(path)) from None
    raise errors.PermissionDenied(f"{path} keeps changing: somebody else writes it", path=str(path))


def _overridden(loaded: Loaded, names: Iterable[str]) -> dict[str, str]:
    """What wins over the file, by setting."""
    origins = {name: loaded.origins[name] for name in (name_and_key(name)[0] for name in names)}
    return {name: origin.place for name, origin in origins.items() if origin.kind in ("env", "flag")}


def _judged(
    values: Mapping[str, Any], unset: Sequence[str], refused: frozenset[str] = NOT_BY_CLIENTS
) -> dict[str, Any]:
    """The values, each as the file will have it. Raises InvalidParams, and PermissionDenied for those `refused`."""
    if not values and not unset:
        raise errors.InvalidParams("there is nothing to set: give `values` or `unset`", field="values")
    twice = [name for name in unset if name in values]
    if twice:
        raise errors.InvalidParams(f"{twice[0]} is in `values` and in `unset`", field="unset", setting=twice[0])
    made = {}
    for field, name in (*(("values", name) for name in values), *(("unset", name) for name in unset)):
        try:
            setting, _ = name_and_key(name)
            if setting in refused:
                told = f"{setting} names what is run: it can be set in config.toml, and not by clients"
                raise errors.PermissionDenied(told, field=field, setting=setting)
            if field == "values":
                made[name] = check(name, values[name])
        except SettingsError as error:
            raise errors.InvalidParams(str(error), field=field, setting=name) from None
    tables = [name for name in made if "." in name and name.partition(".")[0] in made]
    if tables:
        raise errors.InvalidParams(f"{tables[0]} is set twice, by itself and in its table", field="values")
    return made


def _invalid(error: SettingsError) -> errors.InvalidSettings:
    facts = {"setting": error.setting, "place": error.place}
    return errors.InvalidSettings(str(error), **{name: told for name, told in facts.items() if told is not None})


def _unwritten(error: OSError, path: str) -> errors.RpcError:
    told = f"{path} cannot be written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return errors.InsufficientDisk(told, path=path)
    return errors.PermissionDenied(told, path=path)
