"""The program: which rows are wanted, in which order they are measured, and the table at the end."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from . import (
    download_rows,
    fairness_rows,
    generation_rows,
    job_rows,
    load_rows,
    mixed_rows,
    models,
    prefix_rows,
    profile_rows,
    size_rows,
    socket_rows,
    speculation_rows,
    table,
)
from .effort import FULL, QUICK, SMOKE, Effort
from .processes import Daemon, Echo, Reference, folder

MODELS = ("cleanup", "shape")
NAMES = (
    "size",
    "ping",
    "pipelined",
    "download",
    *(f"speculation/{kind}" for kind in ("copy", "clean-ups", "draft")),
    *(f"{kind}/{model}" for model in MODELS for kind in ("stream", "batch", "schema", "http", "prefix", "restart")),
    *(f"{kind}/cleanup" for kind in ("jobs", "load", "profile")),
    *(f"{kind}/dense" for kind in ("load", "blas", "mixed", "fairness", "profile")),
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/dev.py bench", description=__doc__)
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_const", dest="effort", const=QUICK, help="fewer and shorter runs")
    effort.add_argument("--smoke", action="store_const", dest="effort", const=SMOKE, help="no figures worth reading")
    parser.add_argument("--rows", nargs="+", metavar="NAME", default=[""], help="only these: " + ", ".join(NAMES))
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="the table as JSON")
    output.add_argument("--markdown", action="store_true", help="the table as Markdown")
    options = parser.parse_args(arguments)
    wanted = [name for name in NAMES if any(name.startswith(row) for row in options.rows)]
    if not wanted:
        parser.error(f"no rows are named {' '.join(options.rows)}; there are {', '.join(NAMES)}")

    about = table.machine()
    began = time.monotonic()
    rows = []
    for row in measure(wanted, options.effort or FULL):
        print(f"[{time.monotonic() - began:4.0f} s] " + "  ".join(row.cells()), file=sys.stderr, flush=True)
        rows.append(row)
    about["took"] = f"{time.monotonic() - began:.0f} s"
    if options.json:
        print(json.dumps(table.as_document(rows, about), ensure_ascii=False, indent=2))
    else:
        print((table.as_markdown if options.markdown else table.as_text)(rows, about))
    return 0


def measure(wanted: Sequence[str], effort: Effort) -> Iterator[table.Row]:
    """All rows that are wanted. One daemon for all; memory is read while it is fresh."""
    with ExitStack() as stack:
        temp = stack.enter_context(folder())
        daemon = stack.enter_context(Daemon())
        if "size" in wanted:
            yield from size_rows.before_rows(daemon)
        if {"ping", "pipelined"} & set(wanted):
            with Echo(temp) as bare:
                if "ping" in wanted:
                    yield from socket_rows.ping_rows(daemon, bare, effort)
                if "pipelined" in wanted:
                    yield from socket_rows.pipelined_rows(daemon, bare, effort)
        if "download" in wanted:
            yield from download_rows.download_rows(temp, effort.download_mb, effort.download_rounds)
        guesses = {name for name in wanted if name.startswith("speculation/")}
        if guesses:
            yield from speculation_rows.speculation_rows(guesses, daemon, temp, effort.shape)
        cleanup = models.make("cleanup", temp) if any(name.endswith(("/cleanup", "size")) for name in wanted) else temp
        if "size" in wanted:
            yield from size_rows.after_rows(daemon, cleanup)
        yield from generation(wanted, "cleanup", daemon, temp, cleanup, effort)
        if any(name.endswith("/shape") for name in wanted):
            shape = models.make("shape", temp, effort.width, effort.layers)
            yield from generation(wanted, "shape", daemon, temp, shape, effort)
        if any(name.endswith("/dense") for name in wanted):
            dense = models.make("dense", temp, effort.dense_width, effort.dense_layers)
            yield from generation(wanted, "dense", daemon, temp, dense, effort)


def generation(
    wanted: Sequence[str], model: str, daemon: Daemon, temp: Path, path: Path, effort: Effort
) -> Iterator[table.Row]:
    """The rows of one model, which is unloaded afterwards."""
    scale = {"cleanup": effort.cleanup, "shape": effort.shape, "dense": effort.dense}[model]
    width = "4-bit" if model == "shape" else "float"
    label = model if model == "cleanup" else f"{models.parameters(path) / 1e6:.0f} M, {width}"
    if not any(name.endswith(f"/{model}") for name in wanted):
        return
    if f"restart/{model}" in wanted:
        yield from prefix_rows.restart_rows(label, path, scale)
    with daemon.client() as client:
        client.load(str(path), keep_alive=-1)
        if {f"stream/{model}", f"batch/{model}", f"load/{model}"} & set(wanted):
            with Reference(path, temp) as reference:
                if f"stream/{model}" in wanted:
                    yield from generation_rows.stream_rows(label, daemon, reference, path, scale)
                if f"batch/{model}" in wanted:
                    yield from generation_rows.batch_rows(label, daemon, reference, path, scale)
                if f"load/{model}" in wanted:
                    yield from load_rows.load_rows(label, daemon, reference, path, scale)
        if f"blas/{model}" in wanted and sys.platform == "linux":
            yield from load_rows.blas_rows(label, daemon, path, scale)
        if f"jobs/{model}" in wanted:
            yield from job_rows.job_rows(label, daemon, path, scale)
        if f"mixed/{model}" in wanted:
            yield from mixed_rows.mixed_rows(label, daemon, temp, path, scale)
        if f"schema/{model}" in wanted:
            yield from generation_rows.schema_rows(label, daemon, path, scale)
        if f"http/{model}" in wanted:
            yield from generation_rows.http_rows(label, daemon, temp, path, scale)
        if f"prefix/{model}" in wanted:
            yield from prefix_rows.prefix_rows(label, daemon, path, scale)
        if f"fairness/{model}" in wanted:
            yield from fairness_rows.fairness_rows(label, daemon, path, scale)
        client.unload(str(path))
    if f"profile/{model}" in wanted:
        yield from profile_rows.profile_rows(label, path, temp, scale)
