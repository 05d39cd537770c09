"""The way of a request before it joins the batch. What a stage waits for is made between decode steps or on threads:

    images' files read → prompt built → adapter read → what disk has of it read → rule compiled → images seen → joined

What is there already keeps nobody waiting. A request that fails on its way ends alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

from ..childwire import Adapted, Generate, Prewarm
from .adapters import Adapter, Adapters
from .decoding import Decoding
from .faults import check_alive, typed
from .grammar import Compiled, Compiler
from .images import Picture
from .keeping import Keeping, Reading
from .lanes import Lanes
from .requests import Asked, Requests
from .running import Outcome, Running
from .sights import Seen, Sights

# How long a step waits where all there is to wait for is a rule that is being compiled, or a file.
PATIENCE_S = 0.01

T = TypeVar("T")


class Stage(Generic[T]):
    """Requests that wait for one thing each.

    Args:
        ready: whether a thing is there, or will never be.
        then: goes on with a request; may raise what that deserves.

    Attributes:
        waiting: requests with what each waits for, by request id.
    """

    def __init__(self, ready: Callable[[T], bool], then: Callable[[Running, T], None]) -> None:
        self.waiting: dict[int, tuple[Running, T]] = {}
        self._ready = ready
        self._then = then

    def take(self, running: Running, thing: T) -> None:
        """Raises what going on with it does, where there is nothing to wait for."""
        if self._ready(thing):
            self._then(running, thing)
        else:
            self.waiting[running.id] = running, thing

    def go_on(self, outcome: Outcome) -> None:
        """Requests that have what they waited for go on, or end. Raises EngineLost."""
        for request_id, (running, thing) in list(self.waiting.items()):
            if self._ready(thing):
                del self.waiting[request_id]
                try:
                    self._then(running, thing)
                except Exception as error:
                    check_alive(error)
                    outcome.ended.append((request_id, typed(error)))


class Arrivals:
    """All requests of one model that are on their way.

    Args:
        requests: reads them.
        keeping: what is kept of their prompts.
        sights: those with images; None where the model sees none.
        decoding: where it goes.
    """

    def __init__(
        self,
        requests: Requests,
        *,
        adapters: Adapters,
        keeping: Keeping,
        compiler: Compiler,
        sights: Sights | None,
        lanes: Lanes,
        decoding: Decoding,
    ) -> None:
        self._requests = requests
        self._adapters = adapters
        self._keeping = keeping
        self._compiler = compiler
        self._sights = sights
        self._lanes = lanes
        self._decoding = decoding
        self._to_keep: dict[int, Adapter] = {}  # by the id of the request to keep it
        self._unclaimed: list[Reading] = []  # of requests that were cancelled; the next one may be glad of them
        self._adapting = Stage[Adapter](lambda each: each.ready or each.error is not None, self._adapted)
        self._fetching = Stage[Reading](Future.done, self._fetched)
        self.compiling = Stage[Future[Compiled]](Future.done, lambda each, rule: self._join(each, rule.result()))

    # --- who is here

    @property
    def busy(self) -> bool:
        """There is something left to do for `step`."""
        return bool(self._adapting.waiting or self._to_keep or self._adapters.pending or self._sights or self.imminent)

    @property
    def imminent(self) -> bool:
        """There are requests that lack no more than a file or a rule, which a thread is at."""
        return bool(self.compiling.waiting or self._fetching.waiting or self._unclaimed)

    @property
    def waiting(self) -> int:
        stages = (self._adapting, self._fetching, self.compiling)
        return sum(len(stage.waiting) for stage in stages) + len(self._sights or ())

    @property
    def exact(self) -> bool:
        """One of them is to be computed where its answer may depend on nothing else."""
        stages = (self._adapting, self.compiling)
        return any(running.choices.lane.deterministic for stage in stages for running, _ in stage.waiting.values())

    # --- the way

    def submit(self, request_id: int, request: Generate) -> None:
        """Raises RpcError for what cannot be honoured, and what a tokenizer or a template raises."""
        asked = self._requests.read(request_id, request)
        if asked.sources and self._sights is not None:
            self._sights.add(request_id, asked.sources, lambda pictures: self._accept(asked, pictures))
        else:
            self._accept(asked, [])

    def _accept(self, asked: Asked, pictures: list[Picture]) -> None:
        self._begin(self._requests.accept(asked, pictures), asked.request.adapter)

    def prewarm(self, request_id: int, request: Prewarm) -> None:
        """Raises as `submit` does."""
        self._begin(self._requests.prewarm(request_id, request), request.adapter)

    def _begin(self, running: Running, adapter: str | None) -> None:
        if adapter is None:
            self._fetch(running)
        else:
            running.adapter = self._adapters.want(adapter)
            self._adapting.take(running, running.adapter)

    def _adapted(self, running: Running, adapter: Adapter) -> None:
        if adapter.error is not None:
            raise adapter.error
        if running.reuse is not None:
            running.reuse.namespace = adapter.identity
        self._fetch(running)

    def _fetch(self, running: Running) -> None:
        reading = self._keeping.fetch(running)
        if reading is not None:
            self._fetching.take(running, reading)
        else:
            self._compile(running)

    def _fetched(self, running: Running, reading: Reading) -> None:
        self._keeping.take_up(reading)
        self._compile(running)

    def _compile(self, running: Running) -> None:
        if running.choices.rule is None:
            self._join(running, None)
        else:
            self.compiling.take(running, self._compiler.compile(running.choices.rule))

    def _join(self, running: Running, compiled: Compiled | None) -> None:
        join = self._decoding.prepare(running, compiled)
        if running.sight is None or self._sights is None:
            join(running.reuse)
        else:
            self._sights.see(running.id, Seen(running.sight, running.prompt.tokens, running.reuse, join, running))
            running.sight = None  # its images go as soon as they have served

    # --- by the way

    def keep_adapter(self, request_id: int, path: str) -> None:
        """Have an adapter read that is to be kept whoever uses it. Raises as Adapters.want does."""
        self._to_keep[request_id] = self._adapters.want(path)

    def drop(self, request_id: int) -> Running | None:
        """Take a request out. None where it was not yet a prompt; KeyError where it is not here."""
        if request_id in self._fetching.waiting:
            running, reading = self._fetching.waiting.pop(request_id)
            self._unclaimed.append(reading)
            return running
        if request_id in self.compiling.waiting:
            return self.compiling.waiting.pop(request_id)[0]
        if request_id in self._adapting.waiting:
            return self._adapting.waiting.pop(request_id)[0]
        if self._sights is None:
            raise KeyError(request_id)
        owner: Running | None = self._sights.drop(request_id)
        return owner

    # --- steps

    def step(self, outcome: Outcome, *, patient: bool) -> None:
        """Go on with each as far as that goes now.

        Args:
            patient: there is nothing else to do, unless something decodes.

        Raises:
            EngineLost: the device is gone.
        """
        if self._adapting.waiting or self._to_keep or self._adapters.pending:
            self._read_adapters(outcome)
        if self._sights:
            self._see(self._sights, outcome)
        if self._fetching.waiting or self._unclaimed:
            if patient and not self.compiling.waiting and not self._sights:
                readings = (reading for _, reading in self._fetching.waiting.values())
                self._wait_for((*readings, *self._unclaimed))
            self._take_unclaimed()
            self._fetching.go_on(outcome)
        if self.compiling.waiting:
            if patient:
                self._wait_for(compiled for _, compiled in self.compiling.waiting.values())
            self.compiling.go_on(outcome)

    def _wait_for(self, futures: Iterable[Future[Any]]) -> None:
        if not self._decoding.running:
            wait(list(futures), PATIENCE_S, "FIRST_COMPLETED")

    def _read_adapters(self, outcome: Outcome) -> None:
        """Adapters are read on; those to be kept are, and requests whose adapter is there now go on."""
        stages = (self._adapting, self._fetching, self.compiling)
        waiting = (running for stage in stages for running, _ in stage.waiting.values())
        used = {each.adapter for each in (*self._decoding.running.values(), *waiting) if each.adapter is not None}
        self._adapters.read(used | set(self._to_keep.values()))
        for request_id, adapter in list(self._to_keep.items()):
            if adapter.ready or adapter.error is not None:
                del self._to_keep[request_id]
                self._adapters.kept = adapter if adapter.ready else self._adapters.kept
                outcome.ended.append((request_id, adapter.error or Adapted(adapters_bytes=self._adapters.nbytes)))
        self._adapting.go_on(outcome)

    def _see(self, sights: Sights, outcome: Outcome) -> None:
        """Go on with prompts that have images, as far as that goes between two decode steps."""
        failed = sights.take_read(wait_s=0.0 if self._decoding.running else PATIENCE_S)
        lost = sights.step(self._lanes)
        for request_id, error in [*failed, *([lost] if lost is not None else [])]:
            check_alive(error)
            outcome.ended.append((request_id, typed(error)))

    def _take_unclaimed(self) -> None:
        for reading in [each for each in self._unclaimed if each.done()]:
            self._unclaimed.remove(reading)
            self._keeping.take_up(reading)
