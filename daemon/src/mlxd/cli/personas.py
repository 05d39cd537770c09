"""`mlxd personas`: the personas and prompt templates that requests may name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .common import Commands, add_command, connect
from .exits import OK

if TYPE_CHECKING:
    from mlxd_client.types import Persona, Template

    from .output import Output

_MOST = 60


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "personas", personas, "list the personas and prompt templates of the settings",
        epilog="`mlxd run --persona NAME` and `mlxd run --template NAME` use them; `mlxd config edit` changes them.",
    )  # fmt: skip
    parser.add_argument("--kind", choices=("persona", "template"), help="only these")
    parser.add_argument("-q", "--quiet", action="store_true", help="names only")


def personas(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        found = client.personas()
    if output.json:
        output.document(found)
        return OK
    rows = [(name, "persona", *_persona(one)) for name, one in found.personas.items()]
    rows += [(name, "template", *_template(one)) for name, one in found.templates.items()]
    rows = [row for row in rows if args.kind in (None, row[1])]
    if args.quiet:
        for name, *_ in rows:
            output.line(name)
    elif rows:
        output.table(("NAME", "KIND", "WITH", "WHAT FOR"), rows)
    else:
        what = "none" if args.kind is None else f"no {args.kind}"
        output.line(f"the settings have {what}; docs/personas.md says how to write them")
    return OK


def _persona(persona: Persona) -> tuple[str, str]:
    """What it sets, and a word about it: its description, or how its instructions begin."""
    import msgspec

    said = msgspec.to_builtins(persona)
    text = said.pop("description", None) or said.pop("system", "")
    names = [f"{name}={value}" if isinstance(value, (int, float, str)) else name for name, value in said.items()]
    return _short(", ".join(name for name in names if not name.startswith("system="))), _short(text)


def _template(template: Template) -> tuple[str, str]:
    from msgspec import UNSET

    names = [name for name in template.placeholders if name != "text"]
    shown = [f"{name}={template.defaults[name]}" if name in template.defaults else name for name in names]
    return _short(", ".join(shown)), _short(template.prompt if template.description is UNSET else template.description)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST else line[: _MOST - 3] + "..."
