"""`mlxd pull`, `rm`, `verify`, `plan` and `catalog`: models between the hub and this machine's disk."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from .common import Commands, add_command, connect, model_ref
from .exits import BAD_FILES, CANCELLED, OK, code_of

if TYPE_CHECKING:
    from mlxd_client import Client
    from mlxd_client.types import CatalogEntry, Job, Model, Plan, VerifyResult

    from .output import Output

_MODEL = "an id such as org/name, or an alias"


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "pull", pull, "download a model or an adapter from the hub, or its newest revision",
        epilog="Where the model is being downloaded already, joins that. Ctrl-C asks whether to cancel the download or "
               "to leave it to the daemon.",
    )  # fmt: skip
    parser.add_argument("model", type=model_ref, help=_MODEL)
    parser.add_argument("--revision", metavar="R", help="a branch, tag or commit; makes it a model of its own, ID@R")
    parser.add_argument("--repair", action="store_true", help="check the files that are there, fetch bad ones anew")
    parser.add_argument("--detach", action="store_true", help="start it, and leave it to the daemon")

    parser = add_command(commands, "rm", rm, "delete models from the disk")
    parser.add_argument("models", nargs="+", metavar="model", type=model_ref, help=_MODEL)
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")

    parser = add_command(commands, "verify", verify, "check every file of a model against the hub's hashes")
    parser.add_argument("model", type=model_ref, help=_MODEL)
    parser.add_argument("--repair", action="store_true", help="fetch bad files anew")

    parser = add_command(commands, "plan", plan, "show what having and running a model would take")
    parser.add_argument("model", type=model_ref, help="an id, an alias or a folder")
    parser.add_argument("--revision", metavar="R", help="a branch, tag or commit")
    parser.add_argument("--context", type=int, metavar="N", help="tokens that the KV cache shall hold")

    parser = add_command(commands, "catalog", catalog, "list recommended models, and which of them run here")
    parser.add_argument("--use", metavar="NAME", help="only those for: general, light, coding, vision")
    parser.add_argument("-q", "--quiet", action="store_true", help="ids only")


# --- pull -----------------------------------------------------------------------------------------------------------


def pull(args: argparse.Namespace, output: Output) -> int:
    if args.detach:
        return _detach(args, output)
    from .pull import fetch

    began = time.monotonic()
    with connect(args) as client:
        before = _known(client, args.model if args.revision is None else f"{args.model}@{args.revision}")
        job = fetch(args, output, args.model, revision=args.revision, repair=args.repair)
        if output.json:
            output.document(job)
        else:
            now = _known(client, job.model or args.model)
            output.line(_pulled(job, before, now, time.monotonic() - began, repaired=args.repair))
    return OK


def _detach(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        job = client.job(client.download(args.model, revision=args.revision, repair=args.repair))
    if output.json:
        output.document(job)
    else:
        output.line(f"{job.model} is downloaded in the daemon: job {job.job}")
    return OK


def _known(client: Client, ref: str) -> Model | None:
    """The model as it is on this machine, if it is there whole."""
    from mlxd_client.errors import ModelInvalid, ModelNotFound

    try:
        model = client.model(ref)
    except (ModelNotFound, ModelInvalid):
        return None
    return model if model.state in ("Downloaded", "Loading", "Ready") else None


def _pulled(job: Job, before: Model | None, now: Model | None, waited_s: float, *, repaired: bool) -> str:
    """The last word: the model, its size, and how long it took, or that there was nothing to do."""
    from .output import bytes_text, seconds_text

    id = now.id if now is not None else job.model or job.job
    size = now.size_bytes if now is not None and now.size_bytes is not None else job.total_bytes
    if before is not None and now is not None and before.revision == now.revision and not repaired:
        return f"{id}, {bytes_text(size)}, is there already" + (", the newest revision" if "@" not in id else "")
    took_s = waited_s
    if job.started_at is not None and job.ended_at is not None:
        took_s = job.ended_at - job.started_at
    return f"{id}, {bytes_text(size)}, is {'whole' if repaired else 'there'} after {seconds_text(took_s)}"


# --- rm -------------------------------------------------------------------------------------------------------------


def rm(args: argparse.Namespace, output: Output) -> int:
    """Delete each; what cannot be deleted does not keep the others, and the first failure's code is the answer."""
    from mlxd_client.errors import ConnectFailed, ConnectionLost, RpcError

    from .output import bytes_text

    status = OK
    with connect(args) as client:
        if not args.yes and output.answered and not _agreed(client, args.models, output):
            output.note("nothing was deleted")
            return CANCELLED
        for model in args.models:
            try:
                freed = client.delete(model)
            except (ConnectFailed, ConnectionLost):
                raise
            except RpcError as error:
                output.error(error)
                status = status or code_of(error)
                continue
            if output.json:
                output.document({"model": model, "freed_bytes": freed})
            else:
                output.line(f"{model} is deleted, {bytes_text(freed)} are free again")
    return status


def _agreed(client: Client, names: list[str], output: Output) -> bool:
    from .output import bytes_text

    sizes = {model.id: model.size_bytes for model in client.models()}
    told = [f"{name} ({bytes_text(sizes[name])})" if sizes.get(name) is not None else name for name in names]
    return output.ask(f"Delete {', '.join(told)}? [y/N]") in ("y", "yes")


# --- verify ---------------------------------------------------------------------------------------------------------


def verify(args: argparse.Namespace, output: Output) -> int:
    output.progress(f"verifying {args.model}")
    try:
        with connect(args) as client:
            found = client.verify(args.model)
    finally:
        output.progress(None)
    if output.json:
        output.document(found)
    else:
        _show_verified(args.model, found, output)
    if found.ok:
        return OK
    if not args.repair:
        if not output.json:
            output.note(f"to mend it: mlxd verify --repair {args.model}")
        return BAD_FILES
    from .pull import fetch

    job = fetch(args, output, args.model, repair=True)
    if output.json:
        output.document(job)
    else:
        output.line(f"{job.model} is whole again")
    return OK


_REASONS = {
    "missing": "is missing",
    "size": "has the wrong size",
    "hash": "has other bytes than the hub's",
    "safetensors": "is no valid safetensors file",
}


def _show_verified(model: str, found: VerifyResult, output: Output) -> None:
    if found.ok:
        output.line(f"{model}: every file is as it should be")
        return
    output.line(f"{model}: bad files: {len(found.bad_files)}")
    for bad in found.bad_files:
        output.line(f"  {bad.file} {_REASONS.get(bad.reason, bad.reason)}")


# --- plan -----------------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        made = client.plan(args.model, revision=args.revision, context_length=args.context)
    if output.json:
        output.document(made)
    else:
        output.table((), _plan_rows(made))
    return OK


def _plan_rows(made: Plan) -> list[tuple[str, str]]:
    from .output import bytes_text, seconds_text

    download = "nothing: it is all there" if made.download_bytes == 0 else bytes_text(made.download_bytes)
    memory = f"{bytes_text(made.memory_bytes)}: weights {bytes_text(made.weights_bytes)}"
    memory += f", KV cache {bytes_text(made.kv_bytes)}" if made.kind == "model" else ", beside those of its model"
    rows = [
        (made.kind, made.model + (f", revision {made.revision[:12]}" if made.revision else "")),
        ("download", download),
        ("disk", f"{bytes_text(made.disk_free_bytes)} free"
                 + (f": {bytes_text(made.disk_missing_bytes)} are missing" if made.disk_missing_bytes else "")),
        ("memory", memory),
        ("available", bytes_text(made.memory_available_bytes)),
        ("fits", fits_text(made)),
    ]  # fmt: skip
    if made.load_s is not None:
        took = f"{made.load_s:.1f} s" if made.load_s < 10 else seconds_text(made.load_s)
        rows.append(("load", f"took {took} the last time"))
    return rows


def fits_text(made: Plan) -> str:
    """Whether the model can run beside what must stay, and what would have to go."""
    from .output import bytes_text

    if not made.fits:
        missing = made.memory_bytes - made.memory_available_bytes
        return "no" + (f": {bytes_text(missing)} of memory are missing" if missing > 0 else "")
    return f"yes, once {' and '.join(made.evicts)} made room" if made.evicts else "yes"


# --- catalog --------------------------------------------------------------------------------------------------------


def catalog(args: argparse.Namespace, output: Output) -> int:
    from .output import bytes_text

    with connect(args) as client:
        found = client.catalog()
    if args.use is not None:
        found.entries = [entry for entry in found.entries if args.use in entry.uses]
    if output.json:
        output.document(found)
    elif args.quiet:
        for entry in found.entries:
            output.line(entry.model)
    elif not found.entries:
        output.line("there are none" + (f" for {args.use}" if args.use is not None else ""))
    else:
        _show_catalog(found.entries, output)
        output.line(f"All models together may take {bytes_text(found.memory_bytes)} of this machine's memory.")
    return OK


def _show_catalog(entries: list[CatalogEntry], output: Output) -> None:
    from .output import bytes_text

    rows = [
        (entry.model, ", ".join(entry.uses) + (" (default)" if entry.default else ""),
         bytes_text(entry.size_bytes or None), bytes_text(entry.memory_bytes or None),
         f"{entry.smallest_mac_gb} GB" if entry.smallest_mac_gb else "-", entry.state, "yes" if entry.fits else "no")
        for entry in entries
    ]  # fmt: skip
    header = ("MODEL", "FOR", "SIZE", "MEMORY", "MAC", "STATE", "FITS")
    output.table(header, rows, right=frozenset({2, 3, 4}))
