"""Texts as tokens and as vectors: `tokens.encode`, `tokens.decode`, `embed`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from .base import KeepAlive, ModelRef, Params, Result

# A frame holds this many values, and what is around them.
MAX_LISTED = 120_000
MAX_TEXT_CHARACTERS = 2_000_000
MAX_INPUTS = 2048

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
InputText = Annotated[str, Meta(max_length=MAX_TEXT_CHARACTERS)]


class EncodeParams(Params, kw_only=True):
    """`special` adds what the tokenizer puts around a text, such as a token for its beginning. `pieces` asks for each
    token's own text, too. At most 120,000 tokens and pieces together are listed; a longer text is refused
    with its number."""

    text: InputText
    model: ModelRef | UnsetType = UNSET
    special: bool = False
    pieces: bool = False


class EncodeResult(Result, kw_only=True):
    """`pieces` are for people: a token that is part of a character only has a replacement character there."""

    tokens: list[int]
    pieces: list[str] | None = None


class DecodeParams(Params, kw_only=True):
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_LISTED)]
    model: ModelRef | UnsetType = UNSET


class DecodeResult(Result, kw_only=True):
    text: str


class EmbedParams(Params, kw_only=True):
    """Vectors for texts, by any model whose hidden states can be had; ones that were made for it are of more use.

    `input` are the texts as the model should see them, with the instruction that it may want before them. `dimensions`
    keeps so many of the first numbers of each vector. `normalize` scales vectors to length 1; unset means as the
    model's folder says, and yes where it says nothing. A text that is longer than the context is refused, or cut off
    with `truncate`. `encoding` `base64` gives each vector as little-endian 32-bit floats: as lists, one answer holds
    120,000 numbers, as base64 2,500,000.
    """

    input: Annotated[list[InputText], Meta(min_length=1, max_length=MAX_INPUTS)]
    model: ModelRef | UnsetType = UNSET
    dimensions: Annotated[int, Meta(ge=1, le=1_000_000)] | UnsetType = UNSET
    normalize: bool | UnsetType = UNSET
    truncate: bool = False
    encoding: Literal["float", "base64"] = "float"
    keep_alive: KeepAlive | UnsetType = UNSET
    timeout_s: Annotated[float, Meta(gt=0, le=86_400)] | UnsetType = UNSET


class EmbedUsage(Result, kw_only=True):
    prompt_tokens: int


class EmbedResult(Result, kw_only=True):
    """A vector for each text, in their order: in `vectors`, or, where that was asked, in `base64`. `dimensions` is how
    many numbers each has."""

    model: str
    dimensions: int
    usage: EmbedUsage
    vectors: list[list[float]] = []
    base64: list[str] = []
