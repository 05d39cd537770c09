"""Texts as tokens and vectors, between wire and worker: what is asked and what came of it; no decisions, no IO."""

from __future__ import annotations

import base64
import sys
from array import array
from typing import Any

import msgspec

from mlxd_client import types
from mlxd_client.types import UNSET

from . import childwire as wire

# How many numbers one answer can hold: as lists, and as base64.
MOST_LISTED = types.MAX_LISTED - types.MAX_INPUTS
MOST_BASE64 = 2_500_000


def encode_params(params: types.EncodeParams) -> wire.EncodeText:
    return wire.EncodeText(text=params.text, special=params.special, pieces=params.pieces)


def encoded(result: Any) -> types.EncodeResult:
    return msgspec.msgpack.decode(msgspec.convert(result, wire.Packed).packed, type=types.EncodeResult)


def decode_params(params: types.DecodeParams) -> wire.DecodeTokens:
    return wire.DecodeTokens(tokens=params.tokens)


def decoded(result: Any) -> types.DecodeResult:
    return msgspec.convert(result, types.DecodeResult)


def embed_params(params: types.EmbedParams) -> wire.EmbedTexts:
    return wire.EmbedTexts(
        input=params.input, most_values=MOST_LISTED if params.encoding == "float" else MOST_BASE64,
        dimensions=None if params.dimensions is UNSET else params.dimensions,
        normalize=None if params.normalize is UNSET else params.normalize, truncate=params.truncate,
    )  # fmt: skip


def embedded(model: str, encoding: str, result: Any) -> types.EmbedResult:
    """The wire's answer from the worker's bytes."""
    made = msgspec.convert(result, wire.Embedded)
    size = 4 * made.dimensions
    parts = [made.vectors[at : at + size] for at in range(0, len(made.vectors), size)]
    usage = types.EmbedUsage(prompt_tokens=made.prompt_tokens)
    if encoding == "base64":
        texts = [base64.b64encode(part).decode() for part in parts]
        return types.EmbedResult(model=model, dimensions=made.dimensions, usage=usage, base64=texts)
    vectors = []
    for part in parts:
        numbers = array("f", part)
        if sys.byteorder == "big":
            numbers.byteswap()
        vectors.append(numbers.tolist())
    return types.EmbedResult(model=model, dimensions=made.dimensions, usage=usage, vectors=vectors)
