"""`mlxd events`: what happens in the daemon, as it happens."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from .common import Commands, add_command, connect, model_ref
from .exits import OK

if TYPE_CHECKING:
    from mlxd_client.types import Event, Snapshot

    from .output import Output


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "events", events, "show what happens in the daemon until ctrl-C",
        epilog="Goes on by itself when the daemon restarts. With --json, the first line holds the state, then one "
               "event a line.",
    )  # fmt: skip
    parser.add_argument(
        "--topic", action="append", metavar="NAME",
        help="models, jobs, queue, generation, system or the name of an event; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--model", action="append", type=model_ref, metavar="ID", help="of this model only; may be repeated"
    )
    parser.add_argument("--count", type=int, metavar="N", help="leave after so many events")


def events(args: argparse.Namespace, output: Output) -> int:
    left = args.count
    _leave_with_reader(output)
    with connect(args) as client, client.events(topics=args.topic, models=args.model) as stream:
        if stream.snapshot is not None:
            _show_snapshot(stream.epoch, stream.rev, stream.snapshot, output)
        while left is None or left > 0:
            event = stream.get()
            if event is None:
                break
            _show(event, output)
            left = None if left is None else left - 1
    return OK


def _leave_with_reader(output: Output) -> None:
    """End with BrokenPipeError as soon as nobody reads our pipe any more, and not with the next event only."""
    import os
    import select
    import signal
    import stat
    import threading

    try:
        number = output.out.fileno()
        if not stat.S_ISFIFO(os.fstat(number).st_mode):
            return
    except (OSError, ValueError):
        return
    reader = select.poll()
    # It has to wait for something, or macOS watches nothing; this is what never happens to a pipe.
    reader.register(number, select.POLLRDBAND)

    def broken(*_: object) -> None:
        raise BrokenPipeError

    def watch() -> None:
        reader.poll()
        signal.pthread_kill(main, signal.SIGPIPE)

    main = threading.get_ident()
    signal.signal(signal.SIGPIPE, broken)
    threading.Thread(target=watch, name="mlxd-reader", daemon=True).start()


def _show_snapshot(epoch: str, rev: int, snapshot: Snapshot, output: Output) -> None:
    if output.json:
        output.document({"name": "snapshot", "epoch": epoch, "rev": rev, "snapshot": snapshot})
        return
    for model in snapshot.models:
        output.line(f"{_clock(time.time())}  {model.id} is {model.state}")


def _show(event: Event, output: Output) -> None:
    if output.json:
        output.document(event)
        return
    parts = [_clock(event.at), event.name]
    if event.model_id is not None:
        parts.append(event.model_id)
    if event.model is not None:
        parts.append(f"→ {event.model.state}" + (f", {event.model.phase}" if event.model.phase else ""))
    if event.progress is not None:
        parts.append(f"{event.progress:.0%}")
    if event.request is not None:
        parts.append(f"request {event.request}")
    if event.job is not None:
        parts.append(f"{event.job.job} {event.job.state}")
    if event.dropped is not None:
        parts.append(f"{event.dropped} events were dropped")
    if event.error is not None:
        parts.append(f"{event.error.kind}: {event.error.message}")
    output.line("  ".join(parts))


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at % 1 * 1000):03}"
