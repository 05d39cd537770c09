"""`mlxd config`: the settings, where each comes from, and changing them; by the daemon where one runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .common import Commands, add_command
from .exits import FAILED, OK, USAGE

if TYPE_CHECKING:
    from mlxd.settings import Loaded
    from mlxd_client import Client
    from mlxd_client.types import ConfigChange, ConfigResult

    from .output import Output

_EPILOG = """\
get NAME prints one value; set NAME VALUE (or NAME=VALUE...) and unset NAME... change config.toml, comments kept; reload
has the daemon read it, path says where it is, edit opens it. A name is a setting, or SETTING.KEY for one entry of a
table. Where a daemon runs, it is the one that answers and changes; no daemon is started for this."""
_WHEN = {
    "now": "at once",
    "connection": "for new connections",
    "load": "for models that are loaded from then on",
    "download": "for downloads that begin from then on",
    "restart": "when the daemon starts next",
}


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "config", config, "show the settings and where they come from, or change them", daemon=False,
        epilog=_EPILOG,
    )  # fmt: skip
    parser.add_argument(
        "words", nargs="*", metavar="NAME", help="only these settings; or get, set, unset, reload, path, edit"
    )
    parser.add_argument("--changed", action="store_true", help="only those that are not at their default")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--socket", metavar="PATH", help="where the daemon listens (default: $MLXD_SOCKET, $MLXD_HOME)")


def config(args: argparse.Namespace, output: Output) -> int:
    actions: dict[str, Callable[[Sequence[str], argparse.Namespace, Output], int]] = {
        "get": _get, "set": _set, "unset": _unset, "reload": _reload, "path": _path, "edit": _edit,
    }  # fmt: skip
    words: list[str] = args.words
    if words and words[0] in actions:
        return actions[words[0]](words[1:], args, output)
    return _show(words, args, output)


def _running(args: argparse.Namespace) -> Client | None:
    """The daemon that runs, if one does."""
    from mlxd import __version__
    from mlxd_client import Client
    from mlxd_client.errors import ConnectFailed

    client = Client(args.socket, name="mlxd-cli", version=__version__, start=False, reconnect=False)
    try:
        client.ping()
    except ConnectFailed:
        client.close()
        return None
    return client


# --- looking ------------------------------------------------------------------------------------------------------


def _found(names: Sequence[str], args: argparse.Namespace, output: Output) -> ConfigResult:
    """The settings of these names, of the daemon or, where none runs, as the next one of this shell would have them."""
    client = _running(args)
    if client is not None:
        with client:
            found = client.config_get(*names)
    else:
        found = _local(names)
    for warning in found.warnings:
        output.note(warning)
    if found.error is not None:
        output.note(f"{found.error.message}; until that is right, what the file said before stands")
    return found


def _local(names: Sequence[str]) -> ConfigResult:
    from mlxd import settings
    from mlxd.configuration import shown
    from mlxd_client.types import ConfigResult

    loaded = settings.load()
    for name in names:
        if name not in loaded.origins:
            raise settings.unknown(name)
    values = {name: shown(loaded, name) for name in names or loaded.origins}
    return ConfigResult(path=str(settings.config_file(loaded.settings.home)), settings=values, warnings=loaded.warnings)


def _show(names: Sequence[str], args: argparse.Namespace, output: Output) -> int:
    import msgspec

    found = _found(names, args, output).settings
    rows = {name: one for name, one in found.items() if not args.changed or one.origin != "default"}
    if output.json:
        output.document({
            name: {"value": one.value, "from": _from(one.origin, one.place), "applies": one.applies}
            for name, one in rows.items()
        })  # fmt: skip
    else:
        output.table(
            ("setting", "value", "from"),
            [
                (name, msgspec.json.encode(one.value).decode(), _from(one.origin, one.place))
                for name, one in rows.items()
            ],
        )
        for name, one in rows.items():
            if one.configured is not msgspec.UNSET:
                wanted = msgspec.json.encode(one.configured).decode()
                output.note(f"{name} will be {wanted} {_WHEN[one.applies]}")
    return OK


def _from(origin: str, place: str | None) -> str:
    return {"default": "the default", "environment": f"the environment's {place}"}.get(origin, place or origin)


def _get(names: Sequence[str], args: argparse.Namespace, output: Output) -> int:
    """One value by itself, as scripts want it: a text without quotes, all else as JSON."""
    import msgspec

    from mlxd.settings import name_and_key

    if len(names) != 1:
        output.note("get takes one NAME; `mlxd config NAME...` shows several")
        return USAGE
    setting, key = name_and_key(names[0])
    value: Any = _found([setting], args, output).settings[setting].value
    if key is not None:
        if key not in value:
            output.note(f"{setting} has no entry {key!r}")
            return FAILED
        value = value[key]
    if output.json:
        output.document(value)
    else:
        output.line(value if isinstance(value, str) else msgspec.json.encode(value).decode())
    return OK


# --- changing -----------------------------------------------------------------------------------------------------


def _set(words: Sequence[str], args: argparse.Namespace, output: Output) -> int:
    from mlxd.settings import from_text

    pairs = [tuple(words)] if len(words) == 2 and "=" not in words[0] else [word.partition("=")[::2] for word in words]
    if not words or any("=" not in word for word in words if len(pairs) == len(words)):
        output.note("say `mlxd config set NAME VALUE`, or NAME=VALUE...")
        return USAGE
    return _change({name: from_text(name, text) for name, text in pairs}, [], args, output)


def _unset(words: Sequence[str], args: argparse.Namespace, output: Output) -> int:
    if not words:
        output.note("say `mlxd config unset NAME...`")
        return USAGE
    return _change({}, words, args, output)


def _change(values: dict[str, Any], unset: Sequence[str], args: argparse.Namespace, output: Output) -> int:
    client = _running(args)
    if client is None:
        from mlxd.configuration import change_file

        change = change_file(_loaded(), values, unset)
        return _told(change, [*values, *unset], output, running=False)
    with client:
        change = client.config_set(values, unset=unset)
    return _told(change, [*values, *unset], output, running=True)


def _loaded() -> Loaded:
    """The settings of this shell; a file that is wrong may be what is to be put right."""
    from pathlib import Path

    from mlxd import settings
    from mlxd.server.listen import HomeError, prepare_home

    loaded = settings.load(text="")
    try:
        prepare_home(Path(loaded.settings.home))
    except HomeError as error:
        raise settings.SettingsError(str(error)) from None
    return loaded


def _told(change: ConfigChange, names: Sequence[str], output: Output, *, running: bool) -> int:
    from mlxd.settings import APPLIES

    if output.json:
        output.document(change)
        return OK
    for setting in dict.fromkeys(name.partition(".")[0] for name in names):
        if setting in change.overridden:
            output.note(f"{setting} stands in {change.path} without effect: {change.overridden[setting]} wins")
        elif not running:
            output.line(f"{setting} is changed; the next daemon will have it")
        elif setting in change.changed or setting in change.restart:
            output.line(f"{setting} is changed, {_WHEN[APPLIES[setting]]}")
        else:
            output.line(f"{setting} was so before")
    return OK


def _reload(words: Sequence[str], args: argparse.Namespace, output: Output) -> int:
    from mlxd_client.errors import ConnectFailed

    client = _running(args)
    if client is None:
        raise ConnectFailed("no daemon is running: the next one will read the file")
    with client:
        change = client.config_reload()
    if output.json:
        output.document(change)
    elif not (change.changed or change.restart):
        output.line("nothing has changed")
    else:
        _told(change, [*change.changed, *change.restart], output, running=True)
    return OK


def _path(words: Sequence[str], args: argparse.Namespace, output: Output) -> int:
    client = _running(args)
    if client is not None:
        with client:
            output.line(client.config_get("home").path)
        return OK
    from mlxd.settings import config_file
    from mlxd_client import paths

    output.line(str(config_file(paths.home())))
    return OK


def _edit(words: Sequence[str], args: argparse.Namespace, output: Output) -> int:
    """Open the file in the person's editor, then say what became of it."""
    import shlex
    import subprocess

    from mlxd import settings

    client = _running(args)
    if client is None:
        path = str(settings.config_file(_loaded().settings.home))
    else:
        with client:
            path = client.config_get("home").path
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        done = subprocess.run([*shlex.split(editor), path], check=False)
    except (OSError, ValueError) as error:  # ValueError: quotes that are not closed
        why = getattr(error, "strerror", None) or error
        output.note(f"{editor} cannot be started: {why}; set EDITOR to another, or edit {path}")
        return FAILED
    if done.returncode:
        output.note(f"{editor} ended with {done.returncode}")
        return FAILED
    if client is None:
        settings.load()
        return OK
    return _reload((), args, output)
