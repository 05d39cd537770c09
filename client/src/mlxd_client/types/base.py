"""What the other files of this package build on: bounds of the wire, names, and the bases of params and results."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

PROTOCOL = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
MAX_DEPTH = 64
MAX_INTEGER = 2**53

ModelState = Literal["NotDownloaded", "Downloading", "Downloaded", "Loading", "Ready"]
PressureLevel = Literal["normal", "warning", "critical"]
# What was done about a worker that holds more than its share.
ExcessStep = Literal["reported", "trimmed", "recycled"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
FINISH_REASONS: tuple[str, ...] = ("stop", "length", "tool_calls", "cancelled")


class Params(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Base of everything that a client sends."""


class Result(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Base of everything that the daemon sends."""


Name = Annotated[str, Meta(min_length=1, max_length=256)]
ModelRef = Annotated[str, Meta(min_length=1, max_length=4096)]
KeepAlive = Annotated[float, Meta(ge=-1, le=31_536_000)]


class Empty(Params, kw_only=True):
    """No parameters, or nothing to say."""


class ErrorObject(Result, kw_only=True):
    """What went wrong, as a field of a model, a job or an event."""

    kind: str
    message: str
    details: dict[str, Any] = {}
