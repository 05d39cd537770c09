"""hello, ping, cancel: about the connection itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mlxd_client.errors import InvalidParams, Unsupported
from mlxd_client.types import (
    PROTOCOL,
    CancelParams,
    CancelResult,
    Empty,
    HelloParams,
    HelloResult,
    ServerInfo,
)

if TYPE_CHECKING:
    from ..call import Call

EMPTY = Empty()


def hello(call: Call, params: HelloParams) -> HelloResult:
    lowest, highest = params.protocol
    if lowest > highest:
        raise InvalidParams("`protocol` is [lowest, highest]", field="protocol")
    if not lowest <= PROTOCOL <= highest:
        call.session.end_after_answers()
        raise Unsupported(
            f"this daemon speaks protocol {PROTOCOL}, the client {lowest} to {highest}",
            option="protocol",
            supported=[PROTOCOL, PROTOCOL],
        )
    session = call.session
    session.introduced(params.client)
    runtime = call.runtime
    return HelloResult(
        protocol=PROTOCOL,
        server=ServerInfo(name="mlxd", version=runtime.version, pid=os.getpid()),
        epoch=runtime.epoch,
        limits=session.server.limits.public(),
        capabilities=session.server.capabilities,
        protocols=(PROTOCOL, PROTOCOL),
    )


def ping(call: Call, params: Empty) -> Empty:
    return EMPTY


def cancel(call: Call, params: CancelParams) -> CancelResult:
    return CancelResult(cancelled=call.session.cancel(params.id))
