"""events.*: watching the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxd_client.errors import NotFound, QueueFull
from mlxd_client.types import Empty, SubscribeParams, SubscribeResult, SubscriptionParams

from .connection import EMPTY

if TYPE_CHECKING:
    from ..call import Call


def subscribe(call: Call, params: SubscribeParams) -> SubscribeResult:
    session = call.session
    limit = session.server.limits.subscriptions
    if len(session.subscriptions) >= limit:
        raise QueueFull(f"this connection holds {limit} subscriptions already", limit=limit)
    number = session.next_subscription
    sub, result = session.server.events.subscribe(number, session.encoding, params, session.schedule_flush)
    session.next_subscription += 1
    session.subscriptions[number] = sub
    return result


def unsubscribe(call: Call, params: SubscriptionParams) -> Empty:
    session = call.session
    sub = session.subscriptions.pop(params.subscription, None)
    if sub is None:
        raise NotFound("there is no such subscription on this connection", subscription=params.subscription)
    session.server.events.unsubscribe(sub)
    return EMPTY
