"""`hello`, and what the daemon says of itself there."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from .base import Name, Params, Result


class ClientInfo(Params, kw_only=True):
    name: Name
    version: Annotated[str, Meta(max_length=64)] = ""


class HelloParams(Params, kw_only=True):
    """`protocol` is the range of versions the client speaks, both ends included."""

    protocol: tuple[int, int]
    client: ClientInfo


class ServerInfo(Result, kw_only=True):
    name: str
    version: str
    pid: int


class Limits(Result, kw_only=True):
    frame_bytes: int
    depth: int
    requests_in_flight: int
    queue: int
    subscriber_events: int
    subscriber_bytes: int


class HelloResult(Result, kw_only=True):
    """`epoch` names this run of the daemon: revisions and request ids mean nothing across epochs. `protocols` is the
    range of versions that this daemon speaks, both ends included; daemons before 0.2 do not say."""

    protocol: int
    server: ServerInfo
    epoch: str
    limits: Limits
    capabilities: list[str]
    protocols: tuple[int, int] | None = None
