"""status, stats, metrics, shutdown, restart, rpc.discover: about the daemon itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxd_client.types import UNSET, Empty, MetricsResult, RestartResult, ShutdownParams, Stats, StatsParams, Status

from .connection import EMPTY

if TYPE_CHECKING:
    from ..call import Call


def status(call: Call, params: Empty) -> Status:
    server = call.session.server
    made = call.runtime.status(clients=server.clients, subscribers=server.events.subscribers)
    if server.configuration is not None:
        made.config_error = server.configuration.error
    return made


async def stats(call: Call, params: StatsParams) -> Stats:
    model = None if params.model is UNSET else params.model
    return await call.runtime.stats(model, call.session.server.client_totals)


def metrics(call: Call, params: Empty) -> MetricsResult:
    return call.runtime.metrics(call.session.server.client_totals)


def shutdown(call: Call, params: ShutdownParams) -> Empty:
    """Where it is to be idle, that is decided and acted on at once: no request can come in between."""
    if params.if_idle:
        call.runtime.make_room(call.session.server.working)
    else:
        call.runtime.request_shutdown()
    return EMPTY


async def restart(call: Call, params: Empty) -> RestartResult:
    return await call.runtime.restart()


def discover(call: Call, params: Empty) -> Any:
    from ..document import encoded_openrpc  # schemas are generated on demand: most daemons are never asked

    return encoded_openrpc(call.runtime.version, call.session.encoding)
