"""`mlxd config`: each setting as the next daemon of this shell would have it, and where it comes from."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .common import Commands, add_command
from .exits import OK

if TYPE_CHECKING:
    from .output import Output


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "config", config, "show each setting and where it comes from", daemon=False,
        epilog="Reads config.toml, the environment and nothing else: a daemon that runs may have begun with others.",
    )  # fmt: skip
    parser.add_argument("name", nargs="*", help="only these settings")
    parser.add_argument("--changed", action="store_true", help="only those that are not at their default")
    parser.add_argument("--json", action="store_true", help="print JSON")


def config(args: argparse.Namespace, output: Output) -> int:
    import msgspec

    from mlxd import settings

    loaded = settings.load()
    for warning in loaded.warnings:
        output.note(warning)
    values: dict[str, Any] = msgspec.to_builtins(loaded.settings)
    for name in args.name:
        if name not in values:
            raise settings.unknown(name)
    shown = {
        name: value
        for name, value in values.items()
        if name in (args.name or values) and (not args.changed or loaded.origins[name].kind != "default")
    }
    if output.json:
        origins = {name: str(loaded.origins[name]) for name in shown}
        output.document({name: {"value": value, "from": origins[name]} for name, value in shown.items()})
    else:
        rows = [(name, msgspec.json.encode(value).decode(), str(loaded.origins[name])) for name, value in shown.items()]
        output.table(("setting", "value", "from"), rows)
    return OK
