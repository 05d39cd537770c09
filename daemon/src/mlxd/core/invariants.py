"""What must hold of the core between any two events; the tests check it after each. Too slow to run always."""

from __future__ import annotations

from collections import Counter

from .core import Core
from .records import ModelRecord


class InvariantBroken(AssertionError):
    """A bug in the core, named."""


def check(core: Core) -> None:
    """Raises InvariantBroken with the first thing that does not hold."""
    for record in core.models.values():
        _check_model(core, record)
    _check_requests(core)
    _check_loads(core)


def _hold(condition: object, what: str) -> None:
    if not condition:
        raise InvariantBroken(what)


def _check_model(core: Core, m: ModelRecord) -> None:
    state = m.lifecycle.state
    _hold((m.worker is not None) == (state in ("Loading", "Ready")), f"{m.id} is {state} with worker {m.worker}")
    _hold(m.worker is None or core._book.by_worker.get(m.worker) is m, f"{m.id}'s worker is not on the books")
    _hold(not m.running or state == "Ready", f"{m.id} runs requests while {state}")
    _hold(m.stopping is None or m.worker is not None, f"{m.id} is stopping without a worker")
    _hold(m.last_seq is None or m.worker is not None, f"{m.id} makes room without a worker")
    _hold(len(m.running) <= core.limits.max_batch, f"{m.id} runs more than fits into a batch")
    _hold(m.running_by_client == Counter(r.client for r in m.running.values()), f"{m.id} miscounts its clients")
    # A leased model may still fail to load again after its worker died; what serves is never taken from a lease.
    _hold(not (m.stopping == "unloaded" and m.leases) or core.draining, f"{m.id} is stopping while leased")
    if m.serving and not m.running and not m.queue:
        _hold(m.idle_since is not None, f"{m.id} rests, but its idle timer does not run")
    if m.serving and m.last_seq is None:
        _hold(not m.queue or len(m.running) == core.limits.max_batch, f"{m.id} lets requests wait beside free slots")
    if m.wanted and m.worker is None:
        _hold(m.id in core._book.pending, f"{m.id} is wanted, but is in no line")
    live = m.id in core._book.pending or (state == "Loading" and m.stopping is None)
    _hold((m.job is not None) == live, f"{m.id} is {state} with job {m.job}")


def _check_requests(core: Core) -> None:
    placed = Counter(r.rid for m in core.models.values() for r in m.queue)
    placed.update(rid for m in core.models.values() for rid in m.running)
    _hold(placed == Counter(list(core.requests)), "a request is lost, or in two places")
    goals = Counter(rid for m in core.models.values() for rid in m.goals)
    _hold(goals == Counter(list(core.goals)), "a goal is lost, or in two places")
    _hold(core.waiting <= core.limits.queue, "more requests wait than are allowed to")


def _check_loads(core: Core) -> None:
    needs = sum(m.need_bytes for m in core._book.by_worker.values())
    _hold(needs <= core.limits.budget_bytes, "the loaded models take more than the budget")
    for name in core._book.pending:
        m = core.models[name]
        _hold(m.worker is None and m.job is not None and m.job.state == "queued", f"{name} waits in line wrongly")
    if core._book.pending:
        going = any(m.stopping is not None or m.last_seq is not None for m in core._book.by_worker.values())
        _hold(going, "a load waits for room, and nothing is going to make any")
