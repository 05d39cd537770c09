"""The generations under way: admitted, handed to a worker, and told their last word, all as the core says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from mlxd_client import errors, types
from mlxd_client.types import UNSET

from .. import childwire as wire
from ..core import actions as do
from ..core import events as ev
from ..core.core import Core
from ..generation import Generation, completion, refuse_unsupported, with_text, worker_params
from ..personas import completed
from ..workers import WorkerLink
from .figures import Figures
from .goals import Goals
from .supply import Supply

if TYPE_CHECKING:
    from ..server.runtime_api import Log, Sink
    from ..settings import Settings


class Generations:
    """All of them, by the core's number.

    Args:
        links: the workers, by the core's number.
    """

    def __init__(
        self,
        links: Mapping[int, WorkerLink],
        settings: Settings,
        core: Core,
        goals: Goals,
        supply: Supply,
        figures: Figures,
        tell: Callable[[ev.Event], None],
        log: Log,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._links = links
        self._settings = settings
        self._core = core
        self._goals = goals
        self._supply = supply
        self._figures = figures
        self._tell = tell
        self._log = log
        self._loop = loop
        self._open: dict[int, Generation] = {}
        self._resolving: set[asyncio.Task[None]] = set()

    def __bool__(self) -> bool:
        return bool(self._open or self._resolving)

    # --- admission ------------------------------------------------------------------------------------------------

    def generate(
        self,
        client: int,
        kind: Literal["process", "chat"],
        params: types.ProcessParams | types.ChatParams,
        sink: Sink,
        *,
        yields: bool = False,
    ) -> Generation:
        """Admit a generation; see runtime_api.py. The disk is asked only where the model is not loaded.

        Args:
            yields: it may have to step aside at any time; see ev.Submit.
        """
        params = completed(params, self._settings.personas, self._settings.templates)
        refuse_unsupported(params)
        ref = self._settings.default_model if params.model is UNSET else params.model
        request = Generation(self._tell, self._goals.number(), client, kind, params, sink, yields=yields)
        self._open[request.rid] = request
        known = self._supply.library.known(ref)
        if known is not None and params.adapter is UNSET:
            self._submit(request, known)
        else:
            task = request.waiting = self._loop.create_task(self._resolve_and_submit(request, ref))
            self._resolving.add(task)
            task.add_done_callback(lambda task: self._resolved(task, request))
        return request

    @property
    def adapters(self) -> list[wire.Adapter | None]:
        """Of all that are open."""
        return [request.adapter for request in self._open.values()]

    async def _resolve_and_submit(self, request: Generation, ref: str) -> None:
        limit_s = None if request.params.timeout_s is UNSET else request.params.timeout_s
        patience = asyncio.timeout(limit_s)
        try:
            async with patience:

                def watcher(progress: float | None) -> None:
                    request.sink.phase("downloading", progress)

                if request.params.adapter is not UNSET:
                    request.adapter = await self._supply.adapter(request.params.adapter, watcher)
                model = await self._supply.have(ref, watcher)
        except errors.RpcError as error:
            self._turn_away(request, error)
        except Exception as error:
            if patience.expired():  # a disk may raise TimeoutError, too
                told = f"not done within {limit_s:g} s (still downloading)"
                self._turn_away(request, errors.DeadlineExceeded(told, phase="downloading", timeout_s=limit_s))
                return
            # a bug, or a disk that fails in a new way: the caller must hear of it all the same
            self._log.error("resolving a model failed", request=request.sink.request_name, exc_info=error)
            self._turn_away(request, errors.InternalError(f"the model could not be looked up: {type(error).__name__}"))
        else:
            request.waiting = None
            self._submit(request, model)

    def _resolved(self, task: asyncio.Task[None], request: Generation) -> None:
        self._resolving.discard(task)
        if task.cancelled():  # it may not even have begun
            gave_up = errors.Cancelled("the request was cancelled")
            stopping = errors.ShuttingDown("the daemon stopped before this was done")
            self._turn_away(request, gave_up if request.gave_up else stopping)

    def _submit(self, request: Generation, model: str) -> None:
        if request.gave_up:
            self._turn_away(request, errors.Cancelled("the request was cancelled"))
            return
        params = request.params
        request.model, request.found_at = model, time.monotonic()
        loading = self._core.models[model].lifecycle.state != "Ready"
        self._tell(
            ev.Submit(
                request.rid, request.client, model, params.priority,
                timeout_s=None if params.timeout_s is UNSET else params.timeout_s,
                waited_s=time.monotonic() - request.accepted_at,
                keep_alive_s=None if params.keep_alive is UNSET else params.keep_alive,
                yields=request.yields,
            )
        )  # fmt: skip
        if request.dispatched_at is None and request.rid in self._open:
            request.sink.phase("loading" if loading else "queued", None)

    def abort(self) -> None:
        """Turn away those that are not with the core yet."""
        for task in self._resolving:
            task.cancel()

    # --- what the core wants --------------------------------------------------------------------------------------

    def dispatch(self, action: do.Dispatch) -> None:
        request = self._open[action.rid]
        link = self._links[action.worker]
        request.dispatched_at = time.monotonic()
        request.ready_at = link.ready_at or 0.0
        try:
            if request.params.adapter is UNSET:
                request.adapter = link.adapter
            link.generate(request.rid, worker_params(request.kind, request.params, request.adapter))
        except Exception as error:  # a bug; the caller must hear of it all the same
            self._log.error("handing a request over failed", request=request.sink.request_name, exc_info=error)
            request.outcome = errors.InternalError(f"the request could not be handed over: {type(error).__name__}")
            self._tell(ev.Done(action.rid))

    def deliver(self, action: do.Deliver) -> None:
        request = self._open.pop(action.rid)
        outcome = request.outcome
        if isinstance(outcome, wire.Generated) and outcome.finish_reason != "cancelled":
            self._finished(request, outcome.finish_reason, outcome)
            request.sink.done(completion(request, outcome))
        else:
            error = outcome if isinstance(outcome, errors.RpcError) else errors.Cancelled("the request was cancelled")
            self._refused(request, with_text(error, outcome))

    def fail(self, action: do.Fail) -> bool:
        """Returns whether it is one of these."""
        request = self._open.pop(action.rid, None)
        if request is not None:
            self._refused(request, with_text(action.error, request.outcome))
        return request is not None

    def loading(self, model: str, progress: float | None) -> None:
        """Tell those that wait for a model how far it is."""
        for queued in self._core.models[model].queue:
            self._open[queued.rid].sink.phase("loading", progress)

    def name(self, rid: int | None) -> str | None:
        """What logs and events call a request; None where it is no generation."""
        request = self._open.get(rid) if rid is not None else None
        return None if request is None else request.sink.request_name

    # --- last words -----------------------------------------------------------------------------------------------

    def _turn_away(self, request: Generation, error: errors.RpcError) -> None:
        del self._open[request.rid]
        self._refused(request, error)

    def _refused(self, request: Generation, error: errors.RpcError) -> None:
        made = request.outcome
        self._finished(request, error.kind, made if isinstance(made, wire.Generated) else None)
        request.sink.fail(error)

    def _finished(self, request: Generation, how: str, made: wire.Generated | None) -> None:
        self._figures.ended(request, how, made)
        took = round(time.monotonic() - request.accepted_at, 4)
        self._log.info("request ended", request=request.sink.request_name, how=how, took_s=took)

    # --- what workers say of them ---------------------------------------------------------------------------------

    def worker_piece(self, rid: int, text: str, reasoning: str, index: int = 0) -> None:
        request = self._open.get(rid)
        if request is not None:
            request.sink.piece(text, reasoning, index)

    def worker_calls(self, rid: int, calls: list[types.ToolCall], malformed: list[types.MalformedToolCall]) -> None:
        request = self._open.get(rid)
        if request is not None:
            request.sink.calls(calls, malformed)

    def worker_answered(self, rid: int, outcome: wire.Generated | errors.RpcError) -> None:
        request = self._open.get(rid)
        if request is not None:
            request.outcome = outcome
            self._tell(ev.Done(rid))
