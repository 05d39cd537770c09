"""Who must go so that a model fits into the memory budget: one pure decision, asked by core.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mlxd_client.errors import InsufficientMemory, RpcError

from .lifecycle import Lifecycle
from .records import ModelRecord


@dataclass(slots=True)
class Room:
    """`fits`: start now. Else `stop` these idle ones at once, let `serve_out` those busy ones go once they served what
    they had accepted, and wait; or give up with `refusal`."""

    fits: bool = False
    stop: list[ModelRecord] = field(default_factory=list)
    serve_out: list[ModelRecord] = field(default_factory=list)
    refusal: RpcError | None = None


def plan_room(loaded: Iterable[ModelRecord], wanting: ModelRecord, budget_bytes: int, *, patient: bool = False) -> Room:
    """Decide for the model at the head of the line.

    What only batch jobs want is `patient`: it fits, or idle models go that nobody but batch jobs has used, or it waits.

    1. It is larger than the whole budget: refuse.
    2. It fits beside what is loaded: start.
    3. What is about to go anyway will make the room: wait.
    4. Idle models go, least recently used first; leased ones never.
    5. Then busy ones, those that only batch jobs use before others and least recently used first, once they served what
       they had accepted.
    6. Still not enough, because leases hold the rest: refuse.
    """
    need = wanting.wanted_bytes
    holders = [m for m in loaded if m.reserved_bytes]
    free = budget_bytes - sum(m.reserved_bytes for m in holders)
    if need > budget_bytes:
        return Room(refusal=_refusal(wanting, budget_bytes, budget_bytes, []))
    if need <= free:
        return Room(fits=True)
    going = [m for m in holders if m.stopping is not None or m.last_seq is not None]
    lacking = need - free - sum(m.reserved_bytes for m in going)
    room = Room()
    movable = [m for m in holders if m not in going and not m.leases]
    if patient:
        movable = [m for m in movable if not m.busy and not m.needed]
    for record in sorted(movable, key=lambda m: (m.pressing, m.busy, m.last_used)):
        if lacking <= 0:
            break
        (room.serve_out if record.busy else room.stop).append(record)
        lacking -= record.reserved_bytes
    if lacking > 0 and patient:
        return Room()
    if lacking > 0:
        leased = [m for m in holders if m.leases]
        available = budget_bytes - sum(m.reserved_bytes for m in leased)
        return Room(refusal=_refusal(wanting, budget_bytes, available, [m.id for m in leased]))
    return room


def room_for(
    loaded: Iterable[ModelRecord], model: str, need_bytes: int, budget_bytes: int
) -> tuple[int, bool, list[str]]:
    """What loading a model would come to, known or not: as if it were not loaded itself.

    Returns:
        How much memory it could have at most, in bytes; whether it fits into that; and the ids of the models that
        would go to make room, in order.
    """
    others = [m for m in loaded if m.id != model]
    room = plan_room(others, ModelRecord(model, "hub", Lifecycle(model), need_bytes), budget_bytes)
    available = budget_bytes - sum(m.reserved_bytes for m in others if m.leases)
    return available, room.refusal is None, [m.id for m in (*room.stop, *room.serve_out)]


def shares(loaded: Iterable[ModelRecord], budget_bytes: int) -> dict[int, int]:
    """What each worker may take beyond what its model needs, by worker, in bytes.

    What is free is divided evenly among the models that stay; what one of them took already is its own. All of this
    together is never more than the budget, as far as that holds what the workers report.
    """
    holders = [m for m in loaded if m.reserved_bytes]
    staying = [m for m in holders if m.stopping is None]
    free = max(0, budget_bytes - sum(m.reserved_bytes for m in holders))
    return {m.worker: m.reserved_bytes - m.wanted_bytes + free // len(staying) for m in staying if m.worker is not None}


def _refusal(wanting: ModelRecord, budget: int, available: int, leased: list[str]) -> RpcError:
    why = f"leases hold {', '.join(leased)}" if leased else "that is all the models may take together"
    return InsufficientMemory(
        f"{wanting.id} needs {wanting.wanted_bytes / 1e9:.2f} GB and {available / 1e9:.2f} GB can be freed: {why}",
        model=wanting.id, needed_bytes=wanting.wanted_bytes, available_bytes=available, budget_bytes=budget,
        leased=leased,
    )  # fmt: skip
