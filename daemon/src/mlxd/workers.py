"""The daemon's end of one worker: loads its model, hands it requests, and sorts what comes back.

Knows the frames of childwire.py and nothing of queues, memory or clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from mlxd_client import errors, types

from . import childwire as wire
from .children.child import Child
from .children.death import Death

# Characters, and characters a second: a slow tokenizer on a busy machine.
_LONG_TEXT = 100_000
_READING_SPEED = 20_000
# Seconds: a large vision tower looks at one image, on a slow device.
_LOOKING_S = 60.0


class WorkerEvents(Protocol):
    """Whom a worker's end reports to of the worker."""

    def worker_progress(self, worker: int, progress: float) -> None: ...
    def worker_loaded(self, worker: int, loaded: wire.Loaded) -> None: ...
    def worker_load_failed(self, worker: int, error: errors.RpcError) -> None: ...
    def worker_memory(self, worker: int, memory_bytes: int) -> None: ...
    def worker_beat(self, worker: int, heartbeat: wire.Heartbeat, before: wire.PromptCacheStats | None) -> None: ...
    def worker_cache_failed(self, worker: int, failures: int) -> None: ...
    def worker_exited(self, worker: int, death: Death) -> None: ...


class AnswerEvents(Protocol):
    """Whom it reports to of the requests that the worker has."""

    def worker_piece(self, rid: int, text: str, reasoning: str, index: int = 0) -> None: ...
    def worker_calls(self, rid: int, calls: list[types.ToolCall], malformed: list[types.MalformedToolCall]) -> None: ...
    def worker_answered(self, rid: int, outcome: wire.Generated | errors.RpcError) -> None: ...


Answered = Callable[[Any], None]  # with the plain result, or an RpcError
Attached = Callable[[wire.Attached | errors.RpcError], None]


class WorkerLink:
    """One worker from spawn to exit; the handler of its child.

    Args:
        worker: the core's number for it.
        load: what it is to load as soon as it is ready.
        load_s: how long it may take to load, from when it is ready, in seconds.
    """

    def __init__(
        self, worker: int, load: wire.LoadModel, events: WorkerEvents, answers: AnswerEvents, *, load_s: float
    ) -> None:
        self.worker = worker
        self.model = load.model
        self.draft = None if load.draft is None else load.draft.draft
        self.child: Child | None = None
        self.loaded: wire.Loaded | None = None
        self.ready_at: float | None = None
        self.prompt_cache: wire.PromptCacheStats | None = None  # as it said last
        self._load = load
        self._load_s = load_s
        self._events = events
        self._answers = answers
        self._death: Death | None = None
        self._load_id: int | None = None
        self._load_timer: asyncio.TimerHandle | None = None
        self._rids: dict[int, int] = {}  # the child's request id → rid
        self._ids: dict[int, int] = {}  # and back
        self.adapter: wire.Adapter | None = None  # what requests get that name none
        self.prewarmed: set[int] = set()  # system turns that were computed ahead, by their hashes
        self._asked: dict[int, Answered] = {}  # what is no generation
        self._attaching: dict[int, Attached] = {}
        self._reading: dict[int, float] = {}  # requests with long texts, and the seconds that reading each may take

    # --- what the runtime does ------------------------------------------------------------------------------------

    def generate(self, rid: int, params: wire.Generate) -> None:
        assert self.child is not None
        request_id = self.child.request("generate", params)
        self._expect_reading(request_id, *_size(params.messages, params.tools))
        self._rids[request_id] = rid
        self._ids[rid] = request_id

    def cancel(self, rid: int) -> None:
        if self.child is not None and rid in self._ids:
            self.child.notify("cancel", {"id": self._ids[rid]})

    def allow(self, kv_bytes: int) -> None:
        """Tell what KV caches may hold from now on, in bytes; changes below a MiB are noise."""
        if self.child is not None and self.loaded is not None and abs(kv_bytes - self._load.kv_bytes) >= 1024 * 1024:
            self._load.kv_bytes = kv_bytes
            self.child.notify("allow", {"kv_bytes": kv_bytes})

    def trim(self, keep: float) -> None:
        """Have it give back memory that no request needs; of what is kept of prompts, this share may stay."""
        if self.child is not None and self.loaded is not None:
            self.child.notify("trim", {"keep": keep})

    def ask(self, method: str, params: Any, answer: Answered, characters: int = 0) -> int:
        """Ask for what is no generation; `answer` is called once, with the result or an error.

        Args:
            characters: how much text is read without a sign of life.

        Returns: what `give_up` takes.
        """
        assert self.child is not None
        if self._death is not None:  # it ended since whoever asks has looked for it: nobody would answer any more
            answer(self._death.to_error())
            return -1
        request_id = self.child.request(method, params)
        self._asked[request_id] = answer
        self._expect_reading(request_id, characters)
        return request_id

    def give_up(self, request_id: int) -> None:
        """Nobody waits for the answer any more; it still comes."""
        if self.child is not None and request_id in self._asked:
            self.child.notify("cancel", {"id": request_id})

    def attach(self, params: wire.Attach, answer: Attached) -> None:
        """Have a draft model loaded; `answer` is called once, with what the worker says of it."""
        assert self.child is not None
        request_id = self.child.request("attach", params)
        self._attaching[request_id] = answer
        self._reading[request_id] = self._load_s  # as with a load, there may be no sign of life meanwhile
        self._bear_silence()

    def adapt(self, adapter: wire.Adapter | None, answer: Answered) -> None:
        """Have requests get this adapter that name none, once it is read; `answer` is called then, or with why not."""

        def answered(told: Any) -> None:
            if not isinstance(told, errors.RpcError):
                self.adapter = adapter
            answer(told)

        self.ask("adapt", wire.Adapt(adapter=None if adapter is None else adapter.path), answered, characters=0)

    def _expect_reading(self, request_id: int, characters: int, images: int = 0) -> None:
        """A tokenizer gives no sign of life before it has read its whole text, nor a vision tower before it has seen
        an image: bear with them, with texts in proportion."""
        patience_s = characters / _READING_SPEED if characters > _LONG_TEXT else 0.0
        if images:
            patience_s += _LOOKING_S
        if patience_s:
            self._reading[request_id] = patience_s
            self._bear_silence()

    def _bear_silence(self) -> None:
        assert self.child is not None
        self.child.expect_silence(sum(self._reading.values()))

    # --- what the child says --------------------------------------------------------------------------------------

    def on_ready(self, child: Child, ready: wire.Ready, /) -> None:
        child.expect_silence(self._load_s)
        self._load_id = child.request("load", self._load)
        self._load_timer = asyncio.get_running_loop().call_later(self._load_s, self._too_slow)

    def on_heartbeat(self, child: Child, heartbeat: wire.Heartbeat, /) -> None:
        if self.loaded is not None:
            before, self.prompt_cache = self.prompt_cache, heartbeat.prompt_cache
            self._events.worker_memory(self.worker, heartbeat.memory_bytes)
            self._events.worker_beat(self.worker, heartbeat, before)
            failures = heartbeat.prompt_cache.disk_failures if heartbeat.prompt_cache is not None else 0
            if failures > (before.disk_failures if before is not None else 0):
                self._events.worker_cache_failed(self.worker, failures)

    def on_message(self, child: Child, message: dict[str, Any], /) -> None:
        method = message.get("method")
        if method == "step":
            for request_id, text, reasoning in message["params"]["pieces"]:
                rid = self._rids.get(request_id)
                if rid is not None:
                    self._answers.worker_piece(rid, text, reasoning)
            for request_id, number, text, reasoning in message["params"].get("others", ()):
                rid = self._rids.get(request_id)
                if rid is not None:
                    self._answers.worker_piece(rid, text, reasoning, number)
            if "calls" in message["params"]:
                self._on_calls(message["params"]["calls"])
        elif method == "progress":
            self._events.worker_progress(self.worker, min(1.0, max(0.0, float(message["params"]["progress"]))))
        elif "id" in message:
            self._on_answer(child, message)

    def _on_calls(self, raw: Any) -> None:
        for made in msgspec.convert(raw, list[wire.Calls]):
            rid = self._rids.get(made.id)
            if rid is not None:
                self._answers.worker_calls(rid, made.tool_calls, made.malformed_tool_calls)

    def on_exit(self, child: Child, death: Death, /) -> None:
        self._load_ended()
        self._death = death
        asked, self._asked = self._asked, {}
        for answer in asked.values():
            answer(death.to_error())
        attaching, self._attaching = self._attaching, {}
        for told in attaching.values():
            told(death.to_error())
        self._events.worker_exited(self.worker, death)

    def _too_slow(self) -> None:
        """It shows signs of life, and would load for ever."""
        told = f"{self.model} was not loaded within {self._load_s:g} s"
        self._events.worker_load_failed(self.worker, errors.LoadFailed(told, model=self.model, load_s=self._load_s))

    def _load_ended(self) -> None:
        if self._load_timer is not None:
            self._load_timer.cancel()
            self._load_timer = None

    def _on_answer(self, child: Child, message: dict[str, Any]) -> None:
        request_id = message["id"]
        failed = errors.from_wire(message["error"]) if "error" in message else None
        if self._reading.pop(request_id, None) is not None:
            self._bear_silence()
        if request_id == self._load_id:
            child.expect_silence(0)
            self._load_ended()
            if failed is not None:
                self._events.worker_load_failed(self.worker, failed)
            else:
                self.loaded = msgspec.convert(message["result"], wire.Loaded)
                self._events.worker_loaded(self.worker, self.loaded)
        elif (answer := self._asked.pop(request_id, None)) is not None:
            answer(failed if failed is not None else message["result"])
        elif (told := self._attaching.pop(request_id, None)) is not None:
            told(failed if failed is not None else msgspec.convert(message["result"], wire.Attached))
        elif (rid := self._rids.pop(request_id, None)) is not None:
            del self._ids[rid]
            outcome = failed if failed is not None else msgspec.convert(message["result"], wire.Generated)
            self._answers.worker_answered(rid, outcome)


def settle(future: asyncio.Future[Any], told: Any) -> None:
    """Hand an answer to whom waits for it: a result, or an RpcError to raise."""
    if future.done():
        return
    if isinstance(told, errors.RpcError):
        future.set_exception(told)
    else:
        future.set_result(told)


def _size(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> tuple[int, int]:
    """How many characters of text a prompt will have, about, and how many images."""
    others = [tools, *(turn["tool_calls"] for turn in messages if turn.get("tool_calls"))]
    characters, images = sum(len(msgspec.json.encode(other)) for other in others if other), 0
    for turn in messages:
        content = turn.get("content", "")
        if isinstance(content, str):
            characters += len(content)
        else:
            texts = [part["text"] for part in content if part["type"] == "text"]
            characters += sum(map(len, texts))
            images += len(content) - len(texts)
    return characters, images
