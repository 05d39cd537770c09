"""Draws the model state machine from its own table into docs/states.md.

python3 tools/dev.py draw
"""

from __future__ import annotations

from pathlib import Path

from mlxd.core.lifecycle import TRANSITIONS, diagram

PAGE = Path(__file__).parents[1] / "docs" / "states.md"


def page() -> str:
    """The whole page: the diagram, then each transition with the event that tells of it."""
    rows = "\n".join(f"| {t.source} | {t.cause} | {t.target} | `{t.event}` |" for t in TRANSITIONS)
    return (
        "# The states of a model\n\n"
        "<!-- Drawn from the table in daemon/src/mlxd/core/lifecycle.py by `tools/dev.py draw`; do not edit. -->\n\n"
        f"```mermaid\n{diagram()}```\n\n"
        "Anything else is refused inside the daemon, with the model's story. What is not a state is a field: phase,\n"
        "progress, leases, queue length, idle deadline, memory, the last error (see the `Model` object in\n"
        "[wire.md](wire.md)).\n\n"
        "| in state | cause | goes to | event |\n|---|---|---|---|\n"
        f"{rows}\n"
    )


def files() -> dict[Path, bytes]:
    return {PAGE: page().encode()}
