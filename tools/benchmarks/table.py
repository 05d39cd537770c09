"""Rows of results, the machine they were made on, and both as text, Markdown or JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

Measure = Literal["ratio", "difference", "value"]
HEADER = ("what", "ours", "theirs", "ratio", "target", "holds")


@dataclass(frozen=True, slots=True)
class Row:
    """One result.

    Attributes:
        name: what `--rows` selects it by.
        what: the same for people.
        ours, theirs: medians, in `unit`.
        measure: what the target speaks of: ours / theirs, ours − theirs, or ours alone.
        value: that measure. For ratios and differences the median over pairs of neighbouring runs, which is not
            exactly that of the two medians.
        target: ("<=" or ">=" or "==", bound); None for a row that only informs.
        spread: lowest and highest value of a single pair.
    """

    name: str
    what: str
    ours: float
    theirs: float | None
    unit: str
    measure: Measure
    value: float
    target: tuple[str, float] | None = None
    spread: tuple[float, float] | None = None

    @property
    def holds(self) -> bool | None:
        if self.target is None:
            return None
        sign, bound = self.target
        return {"<=": self.value <= bound, ">=": self.value >= bound, "==": self.value == bound}[sign]

    def cells(self) -> tuple[str, ...]:
        theirs = "–" if self.theirs is None else f"{number(self.theirs)} {self.unit}"
        ratio = "–" if self.theirs is None else f"{self.ours / self.theirs:.3f}"
        value = {"ratio": f"{self.value:.3f}", "difference": f"{self.value:+.2f} {self.unit}", "value": ratio}
        holds = {None: "–", True: "yes", False: "NO"}[self.holds]
        measured = value[self.measure]
        if self.spread is not None and self.measure != "value":
            low, high = (f"{edge:.2f}" for edge in self.spread)
            measured += f" ({low}…{high})"
        return (self.what, f"{number(self.ours)} {self.unit}", theirs, measured, self._target(), holds)

    def _target(self) -> str:
        if self.target is None:
            return "–"
        sign, bound = self.target
        written = {"<=": "at most", ">=": "at least", "==": "exactly"}[sign]
        unit = "" if self.measure == "ratio" else f" {self.unit}"
        plus = "+" if self.measure == "difference" else ""
        return f"{written} {plus}{bound:,g}{unit}"


def paired(
    name: str,
    what: str,
    pairs: Sequence[tuple[float, float]],
    unit: str,
    target: tuple[str, float] | None = None,
    measure: Measure = "ratio",
) -> Row:
    """The row of a comparison, from (ours, theirs) of neighbouring runs."""
    measures = {"ratio": lambda ours, theirs: ours / theirs, "difference": float.__sub__, "value": lambda ours, _: ours}
    values = [measures[measure](ours, theirs) for ours, theirs in pairs]
    ours, theirs = (median(side) for side in zip(*pairs, strict=True))
    spread = (min(values), max(values)) if len(values) > 1 else None
    return Row(name, what, ours, theirs, unit, measure, median(values), target, spread)


def alone(name: str, what: str, value: float, unit: str, target: tuple[str, float] | None = None) -> Row:
    """The row of a figure that has nothing beside it."""
    return Row(name, what, value, None, unit, "value", value, target)


def number(value: float) -> str:
    if value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


# --- the machine --------------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What a reader must know to judge the figures."""
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "uvloop", "msgspec")}
    return {
        "cpu": f"{_cpu()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": "Metal" if sys.platform == "darwin" else "CPU",
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{k} {v}" for k, v in versions.items())]),
        "load_before": f"{os.getloadavg()[0]:.2f}",
    }


def _cpu() -> str:
    if sys.platform == "darwin":
        name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return name.stdout.strip()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


# --- output -------------------------------------------------------------------------------------------------------


def as_text(rows: Sequence[Row], about: dict[str, str]) -> str:
    table = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*(f"{name}: {value}" for name, value in about.items()), "", *lines])


def as_markdown(rows: Sequence[Row], about: dict[str, str]) -> str:
    lines = [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "| " + " | ".join(HEADER) + " |", "|---|---:|---:|---:|---|---|"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines)


def as_document(rows: Sequence[Row], about: dict[str, str]) -> dict[str, Any]:
    return {"machine": about, "rows": [asdict(row) | {"holds": row.holds} for row in rows]}
