"""The worker's one loop: read the pipe, take a decode step, write the pipe. MLX stays on the thread that runs it."""

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
import msgspec

from mlxd_client.errors import (
    InvalidParams,
    InvalidRequest,
    LoadFailed,
    MethodNotFound,
    ModelInvalid,
    RpcError,
)

from ..childside import Pipe, PipeClosed, Pulse, Stopped
from ..childwire import (
    Attach,
    Attached,
    CountTokens,
    DecodeTokens,
    EmbedTexts,
    EncodeText,
    Generate,
    Heartbeat,
    Loaded,
    LoadModel,
)
from .engine import Engine, EngineLost, Outcome
from .load import LoadedModel, load

# MLX keeps freed memory for reuse; a worker that was idle this long gives it back.
IDLE_TRIM_S = 5.0

T = TypeVar("T")


class Worker:
    """Serves one pipe. `run` returns on `stop` and raises PipeClosed when the daemon is gone."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._pulse = Pulse(pipe, self._vitals)
        self._engine: Engine | None = None
        self._early: list[dict[str, Any]] = []  # messages that came while a model was being loaded
        self._busy_at = time.monotonic()
        self._trimmed = True
        self._attaches: deque[tuple[int, Attach, Engine]] = deque()
        self._methods: dict[str, Callable[[int, Any], None]] = {
            "load": self._load,
            "attach": self._attach,
            "generate": self._generate,
            "count": self._count,
            "encode": self._encode,
            "decode": self._decode,
            "embed": self._embed,
        }

    def run(self) -> None:
        while True:
            self._turn(self._pulse.rest_s)
            if self._attaches:
                self._attach_next()

    def _turn(self, patience_s: float) -> None:
        """Take in what has arrived, waiting for it so long where there is nothing else to do; then one step."""
        engine = self._engine
        busy = engine is not None and engine.busy
        for message in self._receive(0.0 if busy else patience_s):
            self._handle(message)
        if self._engine is not None and self._engine.busy:
            self._send(self._engine.step())
            self._busy_at, self._trimmed = time.monotonic(), False
        elif not self._trimmed and time.monotonic() - self._busy_at > IDLE_TRIM_S:
            mx.clear_cache()
            self._trimmed = True
        self._pulse.beat()
        self._pipe.flush()

    def _receive(self, timeout_s: float) -> list[dict[str, Any]]:
        if self._early:
            messages, self._early = self._early, []
            return messages
        return self._pipe.receive(timeout_s)

    def _vitals(self) -> Heartbeat:
        engine = self._engine
        if engine is None:
            return Heartbeat(memory_bytes=mx.get_active_memory())
        cache = engine.cache
        return Heartbeat(
            active=engine.active,
            waiting=engine.waiting,
            memory_bytes=mx.get_active_memory(),
            prompt_cache=cache.stats() if cache is not None else None,
        )

    # --- messages

    def _handle(self, message: dict[str, Any]) -> None:
        method, request_id, params = message.get("method"), message.get("id"), message.get("params", {})
        if request_id is None:
            self._notified(method, params)
            return
        try:
            handler = self._methods.get(method) if isinstance(method, str) else None
            if handler is None:
                raise MethodNotFound(f"a worker has no method {method!r}")
            handler(request_id, params)
        except RpcError as error:
            self._pipe.fail(request_id, error)

    def _notified(self, method: Any, params: Any) -> None:
        if method == "stop":
            raise Stopped
        if method == "cancel" and self._engine is not None and isinstance(params, dict):
            self._send(self._engine.cancel(params.get("id", -1)))
        if method == "allow" and self._engine is not None and isinstance(params, dict):
            self._engine.allow(int(params["kv_bytes"]))

    def _load(self, request_id: int, params: Any) -> None:
        request = _convert(params, LoadModel)
        if self._engine is not None:
            raise InvalidRequest("a worker loads one model in its life")
        started = time.perf_counter()
        loaded = load(request.path, self._progress, request.context_length)
        engine = Engine(
            loaded,
            **limits(request),
            cache_bytes=request.cache_bytes,
            kv_bytes=request.kv_bytes,
            kv_bits=request.kv_bits,
            guard=find_guard() if loaded.faithful else None,
        )
        no_draft = self._begin_with(engine, request.draft) if request.draft is not None else None
        try:
            engine.warm_up()
        except Exception as error:
            raise ModelInvalid(f"the model loads but does not run: {type(error).__name__}: {error}") from error
        mx.clear_cache()
        self._engine = engine
        result = Loaded(
            context_length=loaded.context_length,
            memory_bytes=mx.get_active_memory(),
            load_s=time.perf_counter() - started,
            capabilities=loaded.capabilities,
            no_draft=no_draft,
        )
        self._pipe.reply(request_id, result)

    def _begin_with(self, engine: Engine, wished: Attach) -> str | None:
        """Load a draft model with its model. Returns why it is not, where it is not: the model goes without."""
        try:
            engine.attach(wished.draft, load(wished.path, self._progress))
        except RpcError as error:
            return error.message
        return None

    def _attach(self, request_id: int, params: Any) -> None:
        self._attaches.append((request_id, _convert(params, Attach), self._loaded()))

    def _attach_next(self) -> None:
        """Load a draft model. What is running goes on between two parts of it."""
        request_id, request, engine = self._attaches.popleft()
        old = engine.guesses.draft
        try:
            if old is None or old.name != request.draft or old.closed:
                engine.attach(request.draft, self._load_draft(request))
            self._pipe.reply(request_id, Attached(memory_bytes=mx.get_active_memory()))
        except ModelInvalid as error:
            told = f"{request.draft} cannot be a draft model: {error.message}"
            self._pipe.fail(request_id, InvalidParams(told, **error.details | {"field": "draft_model"}))
        except RpcError as error:
            self._pipe.fail(request_id, error)
        mx.clear_cache()

    def _load_draft(self, request: Attach) -> LoadedModel:
        lost: list[EngineLost] = []

        def between(fraction: float) -> None:
            try:
                self._turn(0.0)
            except EngineLost as error:  # `load` takes what it does not know for a fault of the folder
                lost.append(error)
                raise PipeClosed("the engine is lost") from error

        try:
            return load(request.path, between)
        except PipeClosed:
            raise (lost[0] if lost else PipeClosed("the daemon is gone")) from None

    def _progress(self, fraction: float) -> None:
        """Between two parts of a load: say how far it got, and notice whether it is still wanted."""
        self._pipe.notify("progress", {"progress": fraction})
        self._pulse.beat()
        self._pipe.flush()
        for message in self._pipe.receive(0.0):
            if message.get("method") == "stop":
                raise Stopped
            self._early.append(message)

    def _generate(self, request_id: int, params: Any) -> None:
        self._loaded().submit(request_id, _convert(params, Generate))

    def _count(self, request_id: int, params: Any) -> None:
        request = _convert(params, CountTokens)
        if (request.text is None) == (request.messages is None):
            raise InvalidParams("count takes either text or messages", field="text")
        self._pipe.reply(request_id, {"tokens": self._loaded().count(request)})

    def _encode(self, request_id: int, params: Any) -> None:
        self._pipe.reply(request_id, self._loaded().encode(_convert(params, EncodeText)))

    def _decode(self, request_id: int, params: Any) -> None:
        self._pipe.reply(request_id, {"text": self._loaded().decode(_convert(params, DecodeTokens))})

    def _embed(self, request_id: int, params: Any) -> None:
        self._loaded().embed(request_id, _convert(params, EmbedTexts))

    def _loaded(self) -> Engine:
        if self._engine is None:
            raise LoadFailed("no model is loaded in this worker")
        return self._engine

    def _send(self, outcome: Outcome) -> None:
        if outcome.others:
            self._pipe.notify("step", {"pieces": outcome.pieces, "others": outcome.others})
        elif outcome.pieces:
            self._pipe.notify("step", {"pieces": outcome.pieces})
        for request_id, end in outcome.ended:
            if isinstance(end, RpcError):
                self._pipe.fail(request_id, end)
            else:
                self._pipe.reply(request_id, end)


def limits(wished: LoadModel) -> dict[str, int]:
    """How much the engine does at a time, as wished and as the device allows.

    A GPU reads several prompts nearly as fast as one. A CPU takes as long as there are tokens: where they begin one
    after the other, the first is done sooner and short ones need no padding; and its steps must be small for a cancel
    to work soon.
    """
    if mx.default_device() == mx.Device(mx.gpu):
        return {"max_batch": wished.max_batch, "prefill_step": wished.prefill_step, "prefill_joins": 8}
    return {"max_batch": wished.max_batch, "prefill_step": min(wished.prefill_step, 128), "prefill_joins": 1}


def find_guard() -> Callable[[str, str], tuple[str, ...]] | None:
    """The check for invented words, where this installation has it."""
    try:
        fidelity = importlib.import_module("mlxd.fidelity")
    except ModuleNotFoundError:
        return None
    guard: Callable[[str, str], tuple[str, ...]] = fidelity.invented
    return guard


def _convert(params: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(params, kind)
    except msgspec.ValidationError as error:
        raise InvalidParams(str(error)) from None
