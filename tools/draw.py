#!/usr/bin/env python3
"""Writes everything that is made from the code: `python3 tools/dev.py draw`; with --check, names what is out of date.

docs/wire.md                      from the method table, the structs and the examples beside them
docs/configuration.md             from the struct of settings
docs/states.md                    from the table of transitions
daemon/man/*.1                    from the command's parser
clients/typescript/src/types.ts   from the method table
launchd/                          from what `mlxd service install` writes
docs/*.md, quotations             from the files that they quote
"""

from __future__ import annotations

import sys
from pathlib import Path

import draw_configuration
import draw_man
import draw_quotes
import draw_service
import draw_states
import draw_typescript
from mlxd.server import document

ROOT = Path(__file__).resolve().parents[1]
WIRE = ROOT / "docs" / "wire.md"


def files() -> dict[Path, bytes | None]:
    """What each file should hold; None where it should not be."""
    made: dict[Path, bytes | None] = {WIRE: document.rewrite(WIRE.read_text("utf-8")).encode()}
    for part in (draw_configuration, draw_states, draw_man, draw_typescript, draw_service):
        made |= part.files()
    return made | draw_quotes.files(made)


def stale() -> dict[Path, bytes | None]:
    """The files that are not what they should be, with what they should hold."""
    return {
        path: content for path, content in files().items() if content != (path.read_bytes() if path.exists() else None)
    }


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("draw.py: takes nothing, or --check", file=sys.stderr)
        return 2
    check = bool(arguments)
    changed = stale()
    for path, content in changed.items():
        done = "out of date" if check else "removed" if content is None else "wrote"
        print(f"{done}: {path.relative_to(ROOT)}")
        if check:
            continue
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    if not changed:
        print("everything is up to date")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
