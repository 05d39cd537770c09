"""Who must go so that a model fits into the memory budget: one pure decision, asked by core.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

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


# How a load goes about it. What only batch jobs want is `patient`: it fits, or idle models go that nobody but batch
# jobs has used, or it waits. What only the settings want is `modest`: nobody goes for it.
Manner = Literal["urgent", "patient", "modest"]


def plan_room(
    loaded: Iterable[ModelRecord], wanting: ModelRecord, budget_bytes: int, manner: Manner = "urgent"
) -> Room:
    """Decide for the model at the head of the line.

    1. It is larger than the whole budget: refuse.
    2. It fits beside what is loaded: start.
    3. What is about to go anyway will make the room: wait.
    4. Idle models go, least recently used first; leased ones never.
    5. Then busy ones, those that only batch jobs use before others and least recently used first, once they served what
       they had accepted.
    6. Pinned ones go for a pinned one, after all others, in the same order.
    7. Still not enough, because leases and pins hold the rest: refuse.
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
    held = [m for m in holders if m.leases or (m.pinned and not wanting.pinned)]
    movable = [m for m in holders if m not in going and m not in held]
    if manner == "patient":
        movable = [m for m in movable if not m.busy and not m.needed]
    elif manner == "modest":
        held = [m for m in holders if m not in going]
        movable = []
    room, lacking = _choose([(m, m.reserved_bytes) for m in movable], lacking)
    if lacking > 0 and manner == "patient":
        return Room()
    if lacking > 0:
        available = budget_bytes - sum(m.reserved_bytes for m in held)
        return Room(refusal=_refusal(wanting, budget_bytes, available, held))
    return room


def plan_shed(loaded: Iterable[ModelRecord], budget_bytes: int) -> Room | None:
    """Who goes because the models that are loaded need more than the budget, which was larger when they came; None
    where they fit. The order is that of plan_room; leased ones stay, and pinned ones go last."""
    holders = list(loaded)
    lacking = sum(m.wanted_bytes for m in holders) - budget_bytes
    if lacking <= 0:
        return None
    going = [m for m in holders if m.stopping is not None or m.last_seq is not None]
    movable = [(m, m.wanted_bytes) for m in holders if m not in going and not m.leases]
    return _choose(movable, lacking - sum(m.wanted_bytes for m in going))[0]


def _choose(movable: Iterable[tuple[ModelRecord, int]], lacking: int) -> tuple[Room, int]:
    """Those who go, in order, until so many bytes are found; and how many are lacking still."""
    room = Room()
    for record, size in sorted(movable, key=lambda m: (m[0].pinned, m[0].pressing, m[0].busy, m[0].last_used)):
        if lacking <= 0:
            break
        (room.serve_out if record.busy else room.stop).append(record)
        lacking -= size
    return room, lacking


def room_for(
    loaded: Iterable[ModelRecord], model: str, need_bytes: int, budget_bytes: int, *, pinned: bool = False
) -> tuple[int, bool, list[str]]:
    """What loading a model would come to, known or not: as if it were not loaded itself.

    Returns:
        How much memory it could have at most, in bytes; whether it fits into that; and the ids of the models that
        would go to make room, in order.
    """
    others = [m for m in loaded if m.id != model]
    wanting = ModelRecord(model, "hub", Lifecycle(model), need_bytes, pinned=pinned)
    room = plan_room(others, wanting, budget_bytes)
    available = budget_bytes - sum(m.reserved_bytes for m in others if m.leases or (m.pinned and not pinned))
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


def _refusal(wanting: ModelRecord, budget: int, available: int, held: list[ModelRecord]) -> RpcError:
    leased = [m.id for m in held if m.leases]
    pinned = [m.id for m in held if m.pinned and not m.leases]
    loaded = [m.id for m in held if not (m.pinned or m.leases)]
    by = (("leases hold", leased), ("pins hold", pinned), ("nothing goes for a preload, and there are", loaded))
    why = "; ".join(f"{what} {', '.join(ids)}" for what, ids in by if ids)
    why = why or "that is all the models may take together"
    return InsufficientMemory(
        f"{wanting.id} needs {wanting.wanted_bytes / 1e9:.2f} GB and {available / 1e9:.2f} GB can be freed: {why}",
        model=wanting.id, needed_bytes=wanting.wanted_bytes, available_bytes=available, budget_bytes=budget,
        leased=leased, pinned=pinned,
    )  # fmt: skip
