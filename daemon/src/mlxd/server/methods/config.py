"""config.*: the daemon's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxd_client.errors import Unsupported
from mlxd_client.types import UNSET, ConfigChange, ConfigResult, Empty, GetConfigParams, SetConfigParams

if TYPE_CHECKING:
    from ..call import Call
    from ..runtime_api import Configuration


def get(call: Call, params: GetConfigParams) -> ConfigResult:
    return _configuration(call).view(None if params.names is UNSET else params.names)


async def set_values(call: Call, params: SetConfigParams) -> ConfigChange:
    return await _configuration(call).set(params.values, params.unset)


async def reload(call: Call, params: Empty) -> ConfigChange:
    return await _configuration(call).reload()


def _configuration(call: Call) -> Configuration:
    made = call.session.server.configuration
    if made is None:
        raise Unsupported("this server has no settings to look at", option="config")
    return made
