"""What the daemon and its children say to each other: the structs of their frames. Data only.

The frames are those of the public wire (4-byte big-endian length, one msgpack map, JSON-RPC 2.0 members), over a
socketpair whose child end is file descriptor number `--fd`. The daemon asks, the child answers.

Daemon → worker, requests (id, method, params), each answered once by a result or an error:
    load      LoadModel      → Loaded
    generate  Generate       → Generated        with `step` notifications on the way
    count     CountTokens    → {tokens}
Daemon → child, notifications:
    cancel    {id}           the request of that id ends at the next step, with finish_reason "cancelled"
    stop      {}             finish nothing, exit 0
Child → daemon, notifications:
    ready     Ready          once, first of all: the interpreter runs and the heavy imports are done
    heartbeat Heartbeat      at least every HEARTBEAT_S, from the loop that does the work
    progress  {progress}     a load got so far, 0 to 1
    step      Step           what one decode step brought, for all requests at once
"""

from __future__ import annotations

from typing import Any

import msgspec

from mlxd_client import types

HEARTBEAT_S = 1.0
# A client's largest request has to fit, with what the daemon puts around it.
MAX_FRAME_BYTES = types.MAX_FRAME_BYTES + 65_536


class Ready(msgspec.Struct, omit_defaults=True):
    """`kind` is what the child is (`worker`, `fetcher`); `versions` of what it runs on, for logs and reports."""

    pid: int
    kind: str
    versions: dict[str, str] = {}


class Heartbeat(msgspec.Struct, omit_defaults=True):
    """`memory_bytes` is what the child's model and caches hold now, as MLX counts it."""

    active: int = 0
    waiting: int = 0
    memory_bytes: int = 0


class LoadModel(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`path` is a verified local folder. `max_batch` bounds how many requests decode together."""

    model: str
    path: str
    max_batch: int = 32
    prefill_step: int = 512


class Loaded(msgspec.Struct, omit_defaults=True, kw_only=True):
    context_length: int
    memory_bytes: int
    load_s: float
    capabilities: list[str] = []


class Generate(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One request. `messages` are chat turns as on the public wire; `options` the sampling options that were set,
    under the public wire's names; what is not set falls to the model's defaults, then the worker's."""

    kind: str  # "process" | "chat"
    messages: list[dict[str, Any]]
    options: dict[str, Any] = {}
    stream: bool = False


class WorkerTimings(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Seconds. `first_token_s` counts from the worker's receipt of the request."""

    prompt_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0


class Generated(msgspec.Struct, omit_defaults=True, kw_only=True):
    text: str
    finish_reason: str  # stop | length | cancelled
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    timings: WorkerTimings = msgspec.field(default_factory=WorkerTimings)
    reasoning: str | None = None
    logprobs: list[dict[str, Any]] | None = None
    invented: list[str] | None = None


class CountTokens(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Either plain `text`, or `messages` through the chat template."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None


class Step(msgspec.Struct, omit_defaults=True):
    """`pieces` holds (request id, text, reasoning) for each streaming request that got new text."""

    pieces: list[tuple[int, str, str]] = []
