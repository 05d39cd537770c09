"""`mlxd stats` and `mlxd metrics`: what the daemon has counted and measured, for people and for Prometheus."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from .common import Commands, add_command, connect, model_ref
from .exits import OK

if TYPE_CHECKING:
    from mlxd_client.types import Distribution, ModelStats, Stats

    from .output import Output

_ANSWERED = frozenset({"stop", "length", "tool_calls", "done"})
_Told = Callable[[float], str]
_TIMES = (("queue", "queue_s"), ("load", "load_s"), ("first token", "first_token_s"), ("total", "total_s"))


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(commands, "stats", stats, "show how many requests there were, and how long they took")
    parser.add_argument("model", nargs="?", type=model_ref, help="only this model")
    add_command(
        commands, "metrics", metrics, "print all figures as Prometheus reads them",
        epilog="With --json, the answer as on the wire. docs/observability.md says how Prometheus gets it.",
    )  # fmt: skip


def stats(args: argparse.Namespace, output: Output) -> int:
    from .output import seconds_text

    with connect(args) as client:
        answer = client.stats(args.model)
    if output.json:
        output.document(answer)
        return OK
    output.line(f"since the daemon began, {seconds_text(time.time() - answer.since_at)} ago")
    if not answer.models:
        output.line("no request has ended yet")
    for model in answer.models:
        output.line()
        output.line(model.model or "(no model was found)")
        output.table((), [("  " + name, told) for name, told in _counts(model)])
        _show_times(model, output)
    return OK


def totals(stats: Stats) -> tuple[int, int, int]:
    """Requests over all models: answered, failed, cancelled."""
    ended: Counter[str] = Counter()
    for model in stats.models:
        for by in model.requests.values():
            ended.update(by)
    answered = sum(count for outcome, count in ended.items() if outcome in _ANSWERED)
    return answered, ended.total() - answered - ended["cancelled"], ended["cancelled"]


def _counts(model: ModelStats) -> list[tuple[str, str]]:
    rows = [(method, _listed(by)) for method, by in sorted(model.requests.items())]
    if model.slow_requests:
        rows.append(("slow", f"{model.slow_requests}, see the log"))
    if model.prompt_tokens:
        told = f"{model.prompt_tokens} read ({model.cached_tokens} of them cached), {model.completion_tokens} made"
        rows.append(("tokens", told))
    if model.prompt_cache is not None and (model.prompt_cache.hits or model.prompt_cache.misses):
        rows.append(("prompt cache", f"{model.prompt_cache.hits} hits, {model.prompt_cache.misses} misses"))
    if model.speculation is not None and model.speculation.drafted_tokens:
        guessed, right = model.speculation.drafted_tokens, model.speculation.accepted_tokens
        rows.append(("guessed ahead", f"{guessed} tokens, {right / guessed:.0%} of them right"))
    for name, by in (("unloads", model.unloads), ("failed loads", model.load_failures), ("deaths", model.deaths)):
        if by:
            rows.append((name, _listed(by)))
    return rows


def _listed(by: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(by.items(), key=lambda item: -item[1]))


def _show_times(model: ModelStats, output: Output) -> None:
    rows = [
        (f"  {name}", *_figures(of, _duration)) for name, field in _TIMES if (of := getattr(model, field)) is not None
    ]
    if model.tokens_per_s is not None:
        rows.append(("  tokens/s", *_figures(model.tokens_per_s, lambda rate: f"{rate:.1f}")))
    if rows:
        output.table(("", "COUNT", "MEAN", "P50", "P95", "P99", "MOST"), rows, right=frozenset(range(1, 7)))


def _figures(of: Distribution, told: _Told) -> tuple[str, ...]:
    return str(of.count), *(told(value) for value in (of.mean, of.p50, of.p95, of.p99, of.most))


def _duration(seconds: float) -> str:
    from .output import seconds_text

    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms" if seconds < 0.0995 else f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 99.5 else seconds_text(seconds)


def metrics(args: argparse.Namespace, output: Output) -> int:
    with connect(args) as client:
        text = client.metrics()
    if output.json:
        output.document({"text": text})
    else:
        output.out.write(text)
    return OK
