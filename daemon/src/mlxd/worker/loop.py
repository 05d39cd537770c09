"""The worker's one loop: read the pipe, take a decode step, write the pipe. MLX stays on the thread that runs it."""

from __future__ import annotations

import importlib
import signal
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import msgspec

from mlxd_client.errors import (
    InvalidParams,
    InvalidRequest,
    LoadFailed,
    MethodNotFound,
    ModelInvalid,
    PermissionDenied,
    RpcError,
)

from ..childside import Pipe, PipeClosed, Pulse, Stopped
from ..childwire import (
    Adapt,
    Attach,
    Attached,
    Cleared,
    CountTokens,
    DecodeTokens,
    EmbedTexts,
    EncodeText,
    Generate,
    Generated,
    Heartbeat,
    Loaded,
    LoadModel,
    Prewarm,
)
from ..promptfiles import identity
from .blas import Blas
from .diskcache import open_disk
from .engine import Engine
from .faults import EngineLost
from .givingback import give_back
from .load import LoadedModel, load
from .running import Outcome

# MLX keeps freed memory for reuse; a worker that was idle this long gives it back.
IDLE_TRIM_S = 5.0
# Prefixes go to disk once a worker was idle for so long, some at a time, so that no request waits for long.
SAVE_IDLE_S = 0.5
SAVE_STEP_S = 0.03
# How long one that has to go may still write; then the daemon's patience, where that ends itself, is not over yet.
SAVE_LAST_S = 1.2

T = TypeVar("T")


class Worker:
    """Serves one pipe. `run` returns on `stop` and raises PipeClosed when the daemon is gone.

    Args:
        pipe: to the daemon.
        blas: what MLX multiplies with.
        chosen: it was asked for by name. Where another had to be taken, no model is loaded.
    """

    def __init__(self, pipe: Pipe, blas: Blas, *, chosen: bool = False) -> None:
        self._pipe = pipe
        self._refusal = blas.problem if chosen else ""
        self._threads = blas.threads
        self._pulse = Pulse(pipe, self._vitals)
        self._engine: Engine | None = None
        self._early: list[dict[str, Any]] = []  # messages that came while a model was being loaded
        self._busy_at = time.monotonic()
        self._trimmed = True
        self._ended_tokens = self._made_tokens = 0
        self._attaches: deque[tuple[int, Attach, Engine]] = deque()
        self._methods: dict[str, Callable[[int, Any], None]] = {
            "load": self._load,
            "attach": self._attach,
            "generate": self._generate,
            "count": self._count,
            "adapt": self._adapt,
            "encode": self._encode,
            "decode": self._decode,
            "embed": self._embed,
            "prewarm": self._prewarm,
            "cache": self._cache,
            "clear": self._clear,
        }

    def run(self) -> None:
        while True:
            self._turn(self._pulse.rest_s)
            if self._attaches:
                self._attach_next()

    def _turn(self, patience_s: float) -> None:
        """Take in what has arrived, waiting for it so long where there is nothing else to do; then one step."""
        for message in self._receive(self._patience_s(patience_s)):
            self._handle(message)
        if self._threads is not None:
            self._threads.adapt(alone=self._engine is not None and self._engine.exact)
        if self._engine is not None and self._engine.busy:
            self._send(self._engine.step())
            self._busy_at, self._trimmed = time.monotonic(), False
        else:
            self._rest()
        self._pulse.beat()
        self._pipe.flush()

    def _patience_s(self, most_s: float) -> float:
        """How long to wait for a message, in seconds."""
        engine = self._engine
        if engine is None:
            return most_s
        if engine.busy:
            return 0.0
        if engine.disk is not None and engine.disk.due:
            return min(most_s, max(0.0, self._busy_at + SAVE_IDLE_S - time.monotonic()))
        return most_s

    def _rest(self) -> None:
        """What is done where there is nothing to do."""
        idle_s = time.monotonic() - self._busy_at
        if idle_s >= SAVE_IDLE_S:
            self._save(SAVE_STEP_S)
        if not self._trimmed and idle_s > IDLE_TRIM_S:
            mx.clear_cache()
            self._trimmed = True

    def _save(self, limit_s: float) -> None:
        if self._engine is not None and self._engine.disk is not None and self._engine.disk.due:
            self._engine.disk.save(limit_s)

    def _receive(self, timeout_s: float) -> list[dict[str, Any]]:
        if self._early:
            messages, self._early = self._early, []
            return messages
        return self._pipe.receive(timeout_s)

    def _vitals(self) -> Heartbeat:
        engine = self._engine
        if engine is None:
            return Heartbeat(memory_bytes=mx.get_active_memory())
        return Heartbeat(
            active=engine.active,
            waiting=engine.waiting,
            memory_bytes=mx.get_active_memory(),
            made_tokens=self._count_tokens(engine),
            prompt_cache=engine.cache_stats(),
        )

    def _count_tokens(self, engine: Engine) -> int:
        """What was generated so far. What a failed request had is lost from the sum, which must not fall for that."""
        self._made_tokens = max(self._made_tokens, self._ended_tokens + engine.made_tokens)
        return self._made_tokens

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
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it says the same, while this has a limit of its own
            self._save(SAVE_LAST_S)
            raise Stopped
        if method == "cancel" and self._engine is not None and isinstance(params, dict):
            self._send(self._engine.cancel(params.get("id", -1)))
        if method == "allow" and self._engine is not None and isinstance(params, dict):
            self._engine.allow(int(params["kv_bytes"]))
        if method == "trim" and self._engine is not None and isinstance(params, dict):
            self._engine.trim(min(1.0, max(0.0, float(params["keep"]))))

    def _load(self, request_id: int, params: Any) -> None:
        request = _convert(params, LoadModel)
        if self._engine is not None:
            raise InvalidRequest("a worker loads one model in its life")
        if self._refusal:
            raise LoadFailed(f"the setting `blas` names a library that cannot be used: {self._refusal}")
        started = time.perf_counter()
        facts = _identity(request)
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
            row = engine.warm_up()
        except Exception as error:
            raise ModelInvalid(f"the model loads but does not run: {type(error).__name__}: {error}") from error
        give_back(limit=False)  # what the daemon measures next is what running it takes
        if facts is not None and engine.cache is not None:
            engine.disk = open_disk(
                engine.cache, row, root=request.disk_cache, model=request.model, path=request.path, identity=facts,
                budget_bytes=request.disk_cache_bytes,
            )  # fmt: skip
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
        if self._threads is not None:
            self._threads.adapt()
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

    def _adapt(self, request_id: int, params: Any) -> None:
        self._send(self._loaded().adapt(request_id, _convert(params, Adapt)))

    def _encode(self, request_id: int, params: Any) -> None:
        self._pipe.reply(request_id, self._loaded().encode(_convert(params, EncodeText)))

    def _decode(self, request_id: int, params: Any) -> None:
        self._pipe.reply(request_id, {"text": self._loaded().decode(_convert(params, DecodeTokens))})

    def _embed(self, request_id: int, params: Any) -> None:
        self._loaded().embed(request_id, _convert(params, EmbedTexts))

    def _prewarm(self, request_id: int, params: Any) -> None:
        self._loaded().prewarm(request_id, _convert(params, Prewarm))

    def _cache(self, request_id: int, _params: Any) -> None:
        self._pipe.reply(request_id, self._loaded().cache_stats() or {})

    def _clear(self, request_id: int, _params: Any) -> None:
        try:
            memory, disk = self._loaded().clear_cache()
        except OSError as error:
            raise PermissionDenied(f"the prompt cache could not be removed: {error.strerror or error}") from None
        self._pipe.reply(request_id, Cleared(memory_bytes=memory, disk_bytes=disk))

    def _loaded(self) -> Engine:
        if self._engine is None:
            raise LoadFailed("no model is loaded in this worker")
        return self._engine

    def _send(self, outcome: Outcome) -> None:
        if outcome.calls or outcome.others:
            self._pipe.notify("step", {"pieces": outcome.pieces, "calls": outcome.calls, "others": outcome.others})
        elif outcome.pieces:
            self._pipe.notify("step", {"pieces": outcome.pieces})
        for request_id, end in outcome.ended:
            if isinstance(end, RpcError):
                self._pipe.fail(request_id, end)
            else:
                if isinstance(end, Generated):
                    self._ended_tokens += end.completion_tokens
                self._pipe.reply(request_id, end)


def _identity(request: LoadModel) -> bytes | None:
    """Which weights the folder holds now; None where nobody needs to know, or where it cannot be told."""
    if not request.disk_cache or request.disk_cache_bytes <= 0:
        return None
    try:
        return identity(Path(request.path))
    except OSError:
        return None


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
