"""Draws the model state machine from its own table into docs/states.md; `--check` only says whether it is current.

python3 tools/dev.py exec python tools/draw_states.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from mlxd.core.lifecycle import TRANSITIONS, diagram

PAGE = Path(__file__).parents[1] / "docs" / "states.md"


def page() -> str:
    """The whole page: the diagram, then each transition with the event that tells of it."""
    rows = "\n".join(f"| {t.source} | {t.cause} | {t.target} | `{t.event}` |" for t in TRANSITIONS)
    return (
        "# The states of a model\n\n"
        "<!-- Drawn from the table in daemon/src/mlxd/core/lifecycle.py by tools/draw_states.py; do not edit. -->\n\n"
        f"```mermaid\n{diagram()}```\n\n"
        "Anything else is refused inside the daemon, with the model's story. What is not a state is a field: phase,\n"
        "progress, leases, queue length, idle deadline, memory, the last error (see the `Model` object in\n"
        "[wire.md](wire.md)).\n\n"
        "| in state | cause | goes to | event |\n|---|---|---|---|\n"
        f"{rows}\n"
    )


def main() -> int:
    if "--check" in sys.argv[1:]:
        current = PAGE.exists() and PAGE.read_text() == page()
        print("docs/states.md is current" if current else "docs/states.md is out of date: run tools/draw_states.py")
        return 0 if current else 1
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
