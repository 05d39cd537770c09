"""personas.list, process, chat, tokens.…, embed: the models at work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxd_client.errors import InvalidParams
from mlxd_client.types import (
    UNSET,
    ChatParams,
    DecodeParams,
    DecodeResult,
    EmbedParams,
    EmbedResult,
    Empty,
    EncodeParams,
    EncodeResult,
    PersonasResult,
    ProcessParams,
    TokensParams,
    TokensResult,
)

from ..call import PENDING

if TYPE_CHECKING:
    from ..call import Call


def personas(call: Call, params: Empty) -> PersonasResult:
    return call.runtime.personas()


def process(call: Call, params: ProcessParams) -> object:
    call.streaming = params.stream
    call.attach(call.runtime.generate(call.client, "process", params, call))
    return PENDING


def chat(call: Call, params: ChatParams) -> object:
    call.streaming = params.stream
    call.attach(call.runtime.generate(call.client, "chat", params, call))
    return PENDING


async def count_tokens(call: Call, params: TokensParams) -> TokensResult:
    if (params.text is UNSET) == (params.messages is UNSET):
        raise InvalidParams("give either `text` or `messages`", field="text")
    if params.tools and params.messages is UNSET:
        raise InvalidParams("tools are counted with the messages they come with", field="tools")
    return await call.runtime.count_tokens(call.client, params)


async def encode(call: Call, params: EncodeParams) -> EncodeResult:
    return await call.runtime.encode(call.client, params)


async def decode(call: Call, params: DecodeParams) -> DecodeResult:
    return await call.runtime.decode(call.client, params)


async def embed(call: Call, params: EmbedParams) -> EmbedResult:
    return await call.runtime.embed(call.client, params)
