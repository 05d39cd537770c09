"""Texts as tokens, and back: what `tokens.encode` and `tokens.decode` ask."""

from __future__ import annotations

from typing import Any

import msgspec

from mlxd_client.errors import InvalidParams
from mlxd_client.types import MAX_FRAME_BYTES, MAX_LISTED, MAX_TEXT_CHARACTERS, EncodeResult

from ..childwire import DecodeTokens, EncodeText, Packed

# What an answer may take, with something left for what is around it.
MAX_ANSWER_BYTES = MAX_FRAME_BYTES - 65_536


def encode(tokenizer: Any, request: EncodeText) -> Packed:
    """The tokens of a text, and with `pieces` each one's own text.

    Args:
        tokenizer: mlx_lm's TokenizerWrapper.

    Raises:
        InvalidParams: the text, or what it becomes, is too long.
    """
    if len(request.text) > MAX_TEXT_CHARACTERS:
        told = f"a text of {len(request.text)} characters is over the limit of {MAX_TEXT_CHARACTERS}"
        raise InvalidParams(told, field="text")
    tokens: list[int] = tokenizer.encode(request.text, add_special_tokens=request.special)
    most = MAX_LISTED // 2 if request.pieces else MAX_LISTED
    if len(tokens) > most:
        told = f"the text has {len(tokens)} tokens; one answer lists {most} at most"
        raise InvalidParams(told, field="text", tokens=len(tokens), limit=most)
    pieces = None
    if request.pieces:
        each = {token: tokenizer.decode([token]) for token in set(tokens)}
        pieces = [each[token] for token in tokens]
    result = EncodeResult(tokens=tokens, pieces=pieces)
    if len(msgspec.json.encode(result)) > MAX_ANSWER_BYTES:
        raise InvalidParams("the pieces of this text are too long for one answer", field="text", tokens=len(tokens))
    return Packed(packed=msgspec.msgpack.encode(result))


def decode(tokenizer: Any, vocabulary: int, request: DecodeTokens) -> str:
    """The text that tokens spell, special ones included.

    Raises:
        InvalidParams: tokens that the model does not have, or a text that is too long for one answer.
    """
    for index, token in enumerate(request.tokens):
        if not 0 <= token < vocabulary:
            told = f"tokens[{index}] is {token}; this model has tokens 0 to {vocabulary - 1}"
            raise InvalidParams(told, field=f"tokens[{index}]")
    text: str = tokenizer.decode(request.tokens)
    if len(msgspec.json.encode(text)) > MAX_ANSWER_BYTES:
        raise InvalidParams(f"these tokens spell {len(text)} characters, too long for one answer", field="tokens")
    return text
