"""`mlxd cache`: what is kept of prompts, so that requests that begin alike are answered sooner; `mlxd cache clear`."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from .common import Commands, add_command, connect, model_ref
from .exits import OK

if TYPE_CHECKING:
    from mlxd_client.types import CacheResult, ModelCache

    from .output import Output


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(commands, "cache", cache, "show what is kept of prompts, in memory and on disk, or clear it")
    parser.add_argument("action", nargs="?", choices=("clear",), help="forget what is kept")
    parser.add_argument("model", nargs="?", type=model_ref, help="with clear: of this model only")


def cache(args: argparse.Namespace, output: Output) -> int:
    if args.action == "clear":
        return _clear(args, output)
    with connect(args) as client:
        found = client.cache()
    if output.json:
        output.document(found)
    else:
        _show(found, output)
    return OK


def _clear(args: argparse.Namespace, output: Output) -> int:
    from .output import bytes_text

    with connect(args) as client:
        freed = client.clear_cache(args.model)
    if output.json:
        output.document(freed)
    else:
        memory, disk = bytes_text(freed.memory_bytes), bytes_text(freed.disk_bytes)
        output.line(f"cleared: {memory} in memory and {disk} on disk are free again")
    return OK


def _show(found: CacheResult, output: Output) -> None:
    from .output import bytes_text

    if found.models:
        header = ("MODEL", "HITS", "MISSES", "TOKENS SAVED", "MEMORY", "ENTRIES", "DISK", "LAST USED")
        output.table(header, [_row(one) for one in found.models], right=frozenset({1, 2, 3, 4, 5, 6}))
    else:
        output.line("nothing is kept")
    failures = sum(one.disk.failures for one in found.models if one.disk is not None)
    if failures:
        output.line(f"{failures} files could not be read or written, and were removed")
    memory = f"at most {bytes_text(found.memory_budget_bytes)} for each model" if found.memory_budget_bytes else "off"
    disk = f"{bytes_text(found.disk_bytes)} of at most {bytes_text(found.disk_budget_bytes)}"
    output.line(f"memory: {memory}; disk: {disk if found.disk_budget_bytes else 'off'}")


def _row(one: ModelCache) -> tuple[str, ...]:
    from .output import bytes_text, seconds_text

    memory, disk = one.memory, one.disk
    in_memory = ("-",) * 4
    if memory is not None:
        in_memory = (str(memory.hits), str(memory.misses), f"{memory.saved_tokens:,}", bytes_text(memory.bytes))
    on_disk = ("-",) * 3
    if disk is not None and disk.entries:
        used = "-" if disk.last_used_at is None else f"{seconds_text(max(0.0, time.time() - disk.last_used_at))} ago"
        on_disk = (str(disk.entries), bytes_text(disk.bytes), used)
    return (one.model, *in_memory, *on_disk)
