"""`mlxd batch`: many requests from a file of JSON lines, worked off by the daemon while nobody else needs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import IO, TYPE_CHECKING, Any

from .common import Command, Commands, add_command, connect, model_ref
from .exits import CANCELLED, FAILED, OK, USAGE

if TYPE_CHECKING:
    from mlxd_client import Client
    from mlxd_client.types import BatchItem, BatchResult, Job

    from .output import Output

_EPILOG = """
Each line of FILE is one request: {"method": "process", "params": {"prompt": "..."}} or "chat" with "messages", and
"custom_id" where wanted; a line with "prompt" or "messages" beside the other params will do, too. Results are JSON
lines in the same order, with index, custom_id, and result or error {kind, message, details}."""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "batch", batch, "put in many requests from a file, to be worked off in idle slots",
        epilog=_EPILOG,
    )  # fmt: skip
    parser.add_argument("action", choices=tuple(_ACTIONS), help="what to do")
    parser.add_argument(
        "job", nargs="*", metavar="FILE|JOB", help="with submit: a file of JSON lines, - for standard input; else jobs"
    )
    submit = parser.add_argument_group("submit")
    submit.add_argument("-m", "--model", type=model_ref, help="for requests that name none")
    submit.add_argument("--name", help="what to call the job in lists")
    submit.add_argument("--key", help="the same file under the same key is put in once, however often this is run")
    submit.add_argument("--wait", action="store_true", help="wait until the job has ended, and say how far it is")
    results = parser.add_argument_group("results, rm")
    results.add_argument("--after", type=int, metavar="INDEX", help="only results after this one")
    results.add_argument("--follow", action="store_true", help="go on until the job has ended")
    results.add_argument("-o", "--output", metavar="FILE", help="write results there, not to standard output")
    results.add_argument("--force", action="store_true", help="also remove jobs that have not ended")


def batch(args: argparse.Namespace, output: Output) -> int:
    run, most = _ACTIONS[args.action]
    if not (1 if most else 0) <= len(args.job) <= most:
        what = "a file" if args.action == "submit" else "a job; `mlxd batch list` lists them"
        output.note(f"{args.action} takes {what if most else 'no job'}")
        return USAGE
    return run(args, output)


# --- putting in -------------------------------------------------------------------------------------------------------


def _submit(args: argparse.Namespace, output: Output) -> int:
    opened: Any = nullcontext(sys.stdin.buffer) if args.job[0] == "-" else _opened(args.job[0])
    with connect(args) as client, opened as file:
        job = client.submit_items(_items(file), model=args.model, key=args.key, name=args.name)
        if args.wait:
            return _waited(client, job.job, output)
    if output.json:
        output.document(job)
    else:
        output.line(job.job)
    return OK


def _opened(path: str) -> IO[bytes]:
    from mlxd_client.errors import InvalidParams

    try:
        return open(path, "rb")
    except OSError as error:
        raise InvalidParams(f"{path} cannot be read: {error.strerror}", field="file") from None


def _items(file: IO[bytes]) -> Iterator[BatchItem]:
    """The lines' items, as they are read. Raises InvalidParams that names the line."""
    import msgspec

    from mlxd_client.batching import item
    from mlxd_client.errors import InvalidParams

    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield item(_whole(msgspec.json.decode(line)), number - 1)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidParams(f"line {number} is no JSON: {error}", field=f"line {number}") from None
        except InvalidParams as error:
            told = error.message.partition(": ")[2]
            raise InvalidParams(f"line {number}: {told}", field=f"line {number}") from None


def _whole(given: Any) -> Any:
    """An item; params that stand by themselves become one."""
    if not isinstance(given, dict) or "method" in given or "params" in given:
        return given
    params = {name: value for name, value in given.items() if name != "custom_id"}
    rest = {"custom_id": given["custom_id"]} if "custom_id" in given else {}
    return {"method": "chat" if "messages" in given else "process", "params": params, **rest}


# --- looking ----------------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        found = client.batches()
    if output.json:
        output.document(found)
    elif not found:
        output.line("there are no batch jobs")
    else:
        header = ("JOB", "NAME", "MODEL", "STATE", "DONE", "FAILED", "ITEMS")
        output.table(header, [_row(job) for job in found], right=frozenset({4, 5, 6}))
    return OK


def _row(job: Job) -> tuple[str, ...]:
    numbers = (job.done_items or 0, job.failed_items or 0, job.total_items or 0)
    return (job.job, job.name or "-", job.model or "-", _state(job), *(f"{number:,}" for number in numbers))


def _state(job: Job) -> str:
    return (job.phase or job.state) if job.ended_at is None else job.state


def _show(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        job = client.batch(args.job[0])
    _tell(job, output)
    return OK


def _tell(job: Job, output: Output) -> None:
    if output.json:
        output.document(job)
        return
    output.line(f"{job.job}: {_state(job)}, {_far(job)}")
    if job.error is not None:
        output.line(f"{job.error.kind}: {job.error.message}")


def _far(job: Job) -> str:
    failed = f", {job.failed_items:,} of them with an error" if job.failed_items else ""
    return f"{job.done_items or 0:,} of {job.total_items or 0:,} done{failed}"


def _wait(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        return _waited(client, args.job[0], output)


def _waited(client: Client, id: str, output: Output) -> int:
    """Follow the job to its end. Exit code 0 where all of its items are done."""
    for job in _changes(client, id):
        why = f" ({job.error.message})" if job.error is not None else ""
        output.progress(f"{_state(job)}: {_far(job)}{why}")
    output.progress(None)
    _tell(job, output)
    return OK if job.state == "done" else CANCELLED if job.state == "cancelled" else FAILED


def _changes(client: Client, id: str) -> Iterator[Job]:
    """The job as it is, and again whenever it has changed, until it has ended."""
    with client.events(["job"]) as events:
        job = client.batch(id)
        yield job
        while job.ended_at is None:
            event = events.get()
            if event is not None and event.job is not None:
                if event.job.job != id:
                    continue
                job = event.job
            else:  # events were missed
                job = client.batch(id)
            yield job


def _results(args: argparse.Namespace, output: Output) -> int:
    after = args.after
    with connect(args) as client:
        client.batch(args.job[0])  # what is in a file stays, where there is no such job
        with _written(args.output, output) as out:
            for _ in _changes(client, args.job[0]) if args.follow else (None,):
                after = _write(client.results(args.job[0], after=after), out, after)
    return OK


def _written(path: str | None, output: Output) -> Any:
    from mlxd_client.errors import InvalidParams

    try:
        return nullcontext(output.out) if path is None else open(path, "w", encoding="utf-8")
    except OSError as error:
        raise InvalidParams(f"{path} cannot be written: {error.strerror}", field="output") from None


def _write(results: Iterable[BatchResult], out: IO[str], last: int | None) -> int | None:
    """Returns the index of the last one there is now."""
    import msgspec

    for result in results:
        out.write(msgspec.json.encode(result).decode() + "\n")
        last = result.index
    out.flush()
    return last


# --- ending -----------------------------------------------------------------------------------------------------------


def _start(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        _tell(client.start_batch(args.job[0]), output)
    return OK


def _cancel(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        _tell(client.cancel_batch(args.job[0]), output)
    return OK


def _rm(args: argparse.Namespace, output: Output) -> int:
    from mlxd_client.errors import InvalidParams

    status = OK
    with connect(args) as client:
        for name in args.job:
            try:
                client.delete_batch(name, cancel=args.force)
            except InvalidParams:
                output.note(f"{name} has not ended; `mlxd batch cancel {name}` first, or --force")
                status = USAGE
            else:
                if not output.json:
                    output.line(f"{name} is deleted")
    return status


# What each action does, and with how many files or jobs at most.
_ACTIONS: dict[str, tuple[Command, int]] = {
    "submit": (_submit, 1), "list": (_list, 0), "show": (_show, 1), "results": (_results, 1), "wait": (_wait, 1),
    "start": (_start, 1), "cancel": (_cancel, 1), "rm": (_rm, 1000),
}  # fmt: skip
