"""`mlxd list`, `ps`, `load` and `unload`: the models and their memory."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from .common import Commands, add_command, connect, duration, model_ref
from .exits import OK, USAGE

if TYPE_CHECKING:
    from mlxd_client.types import Model

    from .output import Output


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(commands, "list", list_models, "list the models on this machine")
    parser.add_argument("-q", "--quiet", action="store_true", help="ids only")
    parser.add_argument("--updates", action="store_true", help="ask the hub which have a newer revision")

    add_command(commands, "ps", ps, "show the models that are loaded, and for how long they stay")

    parser = add_command(commands, "load", load, "load a model, so that its first answer comes at once")
    parser.add_argument("model", type=model_ref, help="an id, an alias or a folder")
    parser.add_argument(
        "--keep-alive", type=duration, metavar="TIME", help="unload when unused for so long: 90, 5m, 2h, forever"
    )
    parser.add_argument(
        "--adapter",
        type=model_ref,
        metavar="MODEL",
        help="a LoRA or DoRA folder or repository, for requests without one",
    )

    parser.add_argument(
        "--draft-model",
        type=model_ref,
        metavar="MODEL",
        help="a smaller model of the same family, to guess ahead for it",
    )
    system = parser.add_mutually_exclusive_group()
    system.add_argument("--system", metavar="TEXT", help="have the prompts with these instructions begin at once, too")
    system.add_argument("--system-file", metavar="FILE", help="the same, with the instructions in a file")
    system.add_argument("--persona", metavar="NAME", help="the same, with those of a persona")

    parser = add_command(commands, "unload", unload, "unload a model and free its memory")
    parser.add_argument("model", type=model_ref, help="an id, an alias or a folder")


def list_models(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        models = client.models(updates=args.updates)
    if output.json:
        output.document(models)
        return OK
    models = [model for model in models if model.state != "NotDownloaded"]  # of a download that failed: see `jobs`
    if args.quiet:
        for model in models:
            output.line(model.id)
    else:
        _show_list(models, output)
    return OK


def _show_list(models: list[Model], output: Output) -> None:
    from .output import bytes_text

    columns: list[tuple[str, list[str]]] = [
        ("MODEL", [model.id for model in models]),
        ("STATE", [_far(model) for model in models]),
        ("SIZE", [bytes_text(model.size_bytes) for model in models]),
        ("CONTEXT", [_count(model.context_length) for model in models]),
        ("SOURCE", [model.source + (", adapter" if model.kind == "adapter" else "") for model in models]),
    ]
    if any(model.pinned or model.preload for model in models):
        columns.append(("KEPT", [_kept(model) for model in models]))
    if any(model.latest_revision for model in models):
        columns.append(("UPDATE", [_update(model) for model in models]))
    if any(model.error for model in models):
        columns.append(("LAST ERROR", [model.error.message if model.error else "" for model in models]))
    header = [name for name, _ in columns]
    output.table(header, list(zip(*(cells for _, cells in columns), strict=True)), right=frozenset({2, 3}))


def _far(model: Model) -> str:
    """The state, and how far a download or an update is."""
    if model.state == "Downloading" and model.progress is not None:
        return f"{model.state} {model.progress:.0%}"
    if model.state in ("Downloaded", "Ready") and model.phase in ("planning", "downloading", "verifying", "retrying"):
        return f"{model.state}, update {model.progress or 0:.0%}"
    return model.state


def _kept(model: Model) -> str:
    """What the settings say of it."""
    return ", ".join(name for name, said in (("pinned", model.pinned), ("preload", model.preload)) if said)


def _update(model: Model) -> str:
    """The hub's newer revision, as one would say it."""
    return "" if model.latest_revision is None else model.latest_revision[:12]


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def ps(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        models = [
            model for model in client.models()
            if model.state in ("Loading", "Ready") or (model.state == "Downloaded" and model.phase == "queued")
        ]  # fmt: skip
    if output.json:
        output.document(models)
    elif not models:
        output.line("no model is loaded")
    else:
        _show_loaded(models, output)
    return OK


def _show_loaded(models: list[Model], output: Output) -> None:
    from .output import bytes_text

    now = time.time()
    rows = [
        (
            model.id,
            state_text(model),
            bytes_text(model.footprint_bytes or model.memory_bytes),
            str(model.active),
            str(model.waiting),
            stays_text(model, now),
        )
        for model in models
    ]
    output.table(("MODEL", "STATE", "MEMORY", "ACTIVE", "WAITING", "UNLOADS"), rows, right=frozenset({2, 3, 4}))


def state_text(model: Model) -> str:
    """The state, and how far it got."""
    if model.state == "Loading" and model.progress is not None:
        return f"{model.state} {model.progress:.0%}"
    return f"{model.state}, {model.phase}" if model.phase not in (None, "loading") else model.state


def stays_text(model: Model, now: float) -> str:
    """When the model goes if nobody uses it; `now` in Unix seconds."""
    from .output import seconds_text

    if model.idle_unload_at is not None:
        return f"in {seconds_text(model.idle_unload_at - now)}"
    if model.state != "Ready":
        return "-"
    if model.active or model.waiting:
        return "in use"
    if model.leases:
        return "leased"
    return "pinned" if model.pinned else "never"


def load(args: argparse.Namespace, output: Output) -> int:
    from .output import bytes_text, seconds_text

    system = args.system
    if args.system_file is not None:
        try:
            with open(args.system_file, encoding="utf-8") as file:
                system = file.read()
        except (OSError, UnicodeDecodeError) as error:
            output.note(f"{args.system_file} cannot be read: {getattr(error, 'strerror', None) or error}")
            return USAGE
    began = time.monotonic()
    output.progress(f"loading {args.model}")
    try:
        with connect(args) as client:
            model = client.load(
                args.model, keep_alive=args.keep_alive, adapter=args.adapter, draft_model=args.draft_model,
                system=system, persona=args.persona,
            )  # fmt: skip
    finally:
        output.progress(None)
    if output.json:
        output.document(model)
    else:
        took = time.monotonic() - began
        shown = f"{took:.1f} s" if took < 10 else seconds_text(took)
        guessed = f", with {model.draft_model} to guess for it" if model.draft_model else ""
        output.line(f"{model.id} is ready after {shown}, {bytes_text(model.memory_bytes)} in memory{guessed}")
    return OK


def unload(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        model = client.unload(args.model)
    if output.json:
        output.document(model)
    else:
        output.line(f"{model.id} is unloaded")
    return OK
