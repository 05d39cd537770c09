"""What a model's worker is asked that is no generation. The model is held for as long as that lasts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from mlxd_client import errors, types
from mlxd_client.types import UNSET

from .. import texts
from ..core import events as ev
from ..generation import characters, check_tools, count_params
from ..prompts import ask
from .crew import Crew
from .holding import Holding

if TYPE_CHECKING:
    from ..settings import Settings


class Asking:
    """Questions to workers."""

    def __init__(self, settings: Settings, holding: Holding, crew: Crew, tell: Callable[[ev.Event], None]) -> None:
        self._settings = settings
        self._holding = holding
        self._crew = crew
        self._tell = tell

    async def count_tokens(self, client: int, params: types.TokensParams) -> types.TokensResult:
        if (params.text is UNSET) == (params.messages is UNSET):
            raise errors.InvalidParams("give either text or messages", field="text")
        check_tools(params.tools)
        turns = [] if params.messages is UNSET else params.messages
        length = len(params.text or "") + characters(turns)
        length += sum(len(msgspec.json.encode(tool)) for tool in params.tools or ())
        _, result = await self._ask(client, params.model, "count", count_params(params), length)
        return msgspec.convert(result, types.TokensResult)

    async def encode(self, client: int, params: types.EncodeParams) -> types.EncodeResult:
        _, result = await self._ask(client, params.model, "encode", texts.encode_params(params), len(params.text))
        return texts.encoded(result)

    async def decode(self, client: int, params: types.DecodeParams) -> types.DecodeResult:
        _, result = await self._ask(client, params.model, "decode", texts.decode_params(params), len(params.tokens))
        return texts.decoded(result)

    async def embed(self, client: int, params: types.EmbedParams) -> types.EmbedResult:
        limit_s = None if params.timeout_s is UNSET else params.timeout_s
        keep_alive_s = None if params.keep_alive is UNSET else params.keep_alive
        longest = max(map(len, params.input))
        patience = asyncio.timeout(limit_s)
        try:
            async with patience:
                model, result = await self._ask(
                    client, params.model, "embed", texts.embed_params(params), longest, keep_alive_s
                )
        except TimeoutError:
            if not patience.expired():  # a disk may raise it, too
                raise
            told = f"not done within {limit_s:g} s"
            raise errors.DeadlineExceeded(told, phase="embedding", timeout_s=limit_s) from None
        return texts.embedded(model, params.encoding, result)

    async def _ask(
        self, client: int, ref: str | msgspec.UnsetType, method: str, params: Any, characters: int,
        keep_alive_s: float | None = None,
    ) -> tuple[str, Any]:  # fmt: skip
        """Returns the model's id and the plain result."""
        ref = self._settings.default_model if ref is UNSET else ref
        # Leased, so that the model cannot go between loading and asking.
        lease = await self._holding.acquire(client, ref, keep_alive_s=keep_alive_s)
        try:
            link = self._crew.link(lease.model.id)
            return lease.model.id, await ask(link, method, params, characters)
        finally:
            self._tell(ev.Release(client, lease.lease))
