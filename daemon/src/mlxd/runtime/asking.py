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
from .figures import Counting, Figures
from .holding import Holding

if TYPE_CHECKING:
    from ..settings import Settings


class Asking:
    """Questions to workers."""

    def __init__(
        self, settings: Settings, holding: Holding, crew: Crew, figures: Figures, tell: Callable[[ev.Event], None]
    ) -> None:
        self._settings = settings
        self._figures = figures
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
        with self._figures.counting("tokens.count") as counted:
            result = await self._ask(counted, client, params.model, "count", count_params(params), length)
        return msgspec.convert(result, types.TokensResult)

    async def encode(self, client: int, params: types.EncodeParams) -> types.EncodeResult:
        with self._figures.counting("tokens.encode") as counted:
            asked, size = texts.encode_params(params), len(params.text)
            result = await self._ask(counted, client, params.model, "encode", asked, size)
        return texts.encoded(result)

    async def decode(self, client: int, params: types.DecodeParams) -> types.DecodeResult:
        with self._figures.counting("tokens.decode") as counted:
            asked, size = texts.decode_params(params), len(params.tokens)
            result = await self._ask(counted, client, params.model, "decode", asked, size)
        return texts.decoded(result)

    async def embed(self, client: int, params: types.EmbedParams) -> types.EmbedResult:
        with self._figures.counting("embed") as counted:
            result = await self._embed(counted, client, params)
            counted.prompt_tokens = result.usage.prompt_tokens
        return result

    async def _embed(self, counted: Counting, client: int, params: types.EmbedParams) -> types.EmbedResult:
        limit_s = None if params.timeout_s is UNSET else params.timeout_s
        keep_alive_s = None if params.keep_alive is UNSET else params.keep_alive
        longest = max(map(len, params.input))
        patience = asyncio.timeout(limit_s)
        try:
            async with patience:
                asked = texts.embed_params(params)
                result = await self._ask(counted, client, params.model, "embed", asked, longest, keep_alive_s)
        except TimeoutError:
            if not patience.expired():  # a disk may raise it, too
                raise
            told = f"not done within {limit_s:g} s"
            raise errors.DeadlineExceeded(told, phase="embedding", timeout_s=limit_s) from None
        return texts.embedded(counted.model, params.encoding, result)

    async def _ask(
        self, counted: Counting, client: int, ref: str | msgspec.UnsetType, method: str, params: Any, characters: int,
        keep_alive_s: float | None = None,
    ) -> Any:  # fmt: skip
        """Returns the plain result; `counted` learns the model's id."""
        ref = self._settings.default_model if ref is UNSET else ref
        # Leased, so that the model cannot go between loading and asking.
        lease = await self._holding.acquire(client, ref, keep_alive_s=keep_alive_s, asking=True)
        try:
            counted.model = lease.model.id
            link = self._crew.link(counted.model)
            return await ask(link, method, params, characters)
        finally:
            self._tell(ev.Release(client, lease.lease))
