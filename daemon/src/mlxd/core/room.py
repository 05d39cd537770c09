"""Who must go so that a model fits into memory: one pure decision, asked by line.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from mlxd_client.errors import InsufficientMemory, RpcError

from .lifecycle import Lifecycle
from .records import ModelRecord


@dataclass(slots=True)
class Room:
    """`fits`: start now. Else `stop` these idle ones at once, let `serve_out` those busy ones go once they served what
    they had accepted, and wait; or give up with `refusal`: because of the `system`, where the budget alone would do."""

    fits: bool = False
    stop: list[ModelRecord] = field(default_factory=list)
    serve_out: list[ModelRecord] = field(default_factory=list)
    refusal: RpcError | None = None
    system: bool = False


# How a load goes about it. What only batch jobs want is `patient`: it fits, or idle models go that nobody but batch
# jobs has used, or it waits. What only the settings want is `modest`: nobody goes for it.
Manner = Literal["urgent", "patient", "modest"]


def plan_room(
    loaded: Iterable[ModelRecord],
    wanting: ModelRecord,
    budget_bytes: int,
    manner: Manner = "urgent",
    *,
    spare_bytes: int | None = None,
) -> Room:
    """Decide for the model at the head of the line. `spare_bytes` is what the system has for it, as far as that is
    known: see Gauge.

    1. It is larger than the whole budget: refuse.
    2. It fits beside what is loaded, into the budget and into what the system has: start.
    3. What is about to go anyway will make the room: wait.
    4. Idle models go, least recently used first; those that are held never.
    5. Then busy ones, those that only batch jobs use before others and least recently used first, once they served what
       they had accepted.
    6. Pinned ones go for a pinned one, after all others, in the same order.
    7. Still not enough, because leases and pins, or others on this machine, hold the rest: refuse.
    """
    need = wanting.wanted_bytes
    holders = [m for m in loaded if m.reserved_bytes]
    free = _free_bytes(holders, budget_bytes, spare_bytes)
    if need > budget_bytes:
        return Room(refusal=_refusal(wanting, budget_bytes, budget_bytes, [], holders, None))
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
        staying = sum(m.reserved_bytes for m in held)
        available = free + sum(m.reserved_bytes for m in holders) - staying
        refusal = _refusal(wanting, budget_bytes, available, held, holders, spare_bytes)
        return Room(refusal=refusal, system=need <= budget_bytes - staying)
    return room


def _free_bytes(holders: Iterable[ModelRecord], budget_bytes: int, spare_bytes: int | None) -> int:
    """What is free of the budget, as far as the system has it."""
    free = budget_bytes - sum(m.reserved_bytes for m in holders)
    return free if spare_bytes is None else min(free, spare_bytes)


def plan_shed(loaded: Iterable[ModelRecord], budget_bytes: int) -> Room | None:
    """Who goes because the models that are loaded need more than the budget, which was larger when they came, or their
    needs were thought smaller; None where they fit. The order is that of plan_room; leased ones stay, and pinned ones
    go last."""
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
    loaded: Iterable[ModelRecord],
    model: str,
    need_bytes: int,
    budget_bytes: int,
    *,
    pinned: bool = False,
    spare_bytes: int | None = None,
) -> tuple[int, bool, list[str]]:
    """What loading a model would come to, known or not: as if it were not loaded itself.

    Returns:
        How much memory it could have at most, in bytes; whether it fits into that; and the ids of the models that
        would go to make room, in order.
    """
    all_loaded = list(loaded)
    others = [m for m in all_loaded if m.id != model]
    if spare_bytes is not None:
        spare_bytes += sum(m.reserved_bytes for m in all_loaded if m.id == model)
    wanting = ModelRecord(model, "hub", Lifecycle(model), need_bytes, pinned=pinned)
    room = plan_room(others, wanting, budget_bytes, spare_bytes=spare_bytes)
    free = _free_bytes(others, budget_bytes, spare_bytes)
    movable = sum(m.reserved_bytes for m in others if not m.leases and (pinned or not m.pinned))
    available = max(0, free + movable)
    return available, room.refusal is None, [m.id for m in (*room.stop, *room.serve_out)]


def shares(loaded: Iterable[ModelRecord], budget_bytes: int, spare_bytes: int | None = None) -> dict[int, int]:
    """What each worker may take beyond what its model needs, by worker, in bytes.

    What is free is divided evenly among the models that stay; what one of them took already is its own, as far as it
    was allowed to. All of this together is never more than the budget, as far as that holds what the workers take.
    """
    holders = [m for m in loaded if m.reserved_bytes]
    staying = [m for m in holders if m.stopping is None]
    free = max(0, _free_bytes(holders, budget_bytes, spare_bytes))
    found = {}
    for m in staying:
        own = m.reserved_bytes if m.allowed_bytes is None else min(m.reserved_bytes, m.allowed_bytes)
        if m.worker is not None:
            found[m.worker] = max(own, m.wanted_bytes) - m.wanted_bytes + free // len(staying)
    return found


def _refusal(
    wanting: ModelRecord,
    budget_bytes: int,
    available_bytes: int,
    held: list[ModelRecord],
    holders: list[ModelRecord],
    spare_bytes: int | None,
) -> RpcError:
    """The numbers: what it needs, what it could have at most, and who has the rest."""
    need, available = wanting.wanted_bytes, max(0, available_bytes)
    leased = [m.id for m in held if m.leases]
    pinned = [m.id for m in held if m.pinned and not m.leases]
    loaded = [m.id for m in held if not (m.pinned or m.leases)]
    by = (("leases hold", leased), ("pins hold", pinned), ("nothing goes for a preload, and there are", loaded))
    whys = [f"{what} {', '.join(ids)}" for what, ids in by if ids]
    if spare_bytes is not None and spare_bytes < budget_bytes - sum(m.reserved_bytes for m in holders):
        whys.append(f"others on this machine leave {max(0, spare_bytes) / 1e9:.2f} GB")
    why = "; ".join(whys) or "that is all the models may take together"
    known = {} if spare_bytes is None else {"system_bytes": max(0, spare_bytes)}
    return InsufficientMemory(
        f"{wanting.id} needs {need / 1e9:.2f} GB and {available / 1e9:.2f} GB can be freed: {why}",
        model=wanting.id, needed_bytes=need, available_bytes=available, budget_bytes=budget_bytes, **known,
        leased=leased, pinned=pinned, unload=_enough(held, need - available),
        held=[msgspec.to_builtins(m.holding()) for m in holders],
    )  # fmt: skip


def _enough(held: Iterable[ModelRecord], lacking: int) -> list[str]:
    """Who of those that are held would have to go, least recently used first; none where that does not help."""
    found = []
    for record in sorted(held, key=lambda m: m.last_used):
        if lacking > 0:
            found.append(record.id)
            lacking -= record.reserved_bytes
    return found if lacking <= 0 else []
