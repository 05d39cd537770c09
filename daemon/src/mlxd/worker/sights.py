"""Prompts with images, on their way into the batch: files are read on threads, and all else goes in pieces between two
decode steps: one image is looked at, or some tokens are read up to the last image. What follows is read in the batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import msgspec

from mlxd_client.errors import Unsupported

from ..childwire import Generate
from .batch import FIRST_PREFILL, LEAST_PREFILL, PREFILL_S
from .images import Picture, Source, read_pictures
from .kvcache import PromptCache, take
from .lanes import Lanes
from .vision import LanguageModel, Sight, Vision
from .waits import Reuse

# Decoded images are large: so many requests have theirs read at a time. More than one, for a disk may be slow.
AHEAD = 2
THREADS = 8
# Options that change what becomes of a row's caches or of its prompt, with the values that do not.
NOT_WITH_IMAGES: dict[str, tuple[Any, ...]] = {
    "adapter": (),
    "context_policy": ("refuse",),
    "deterministic": (False,),
    "draft_model": (),
    "kv_bits": (),
    "n": (1,),
    "speculation": ("auto", "off"),
    "tool_choice": (),
    "tools": ([],),
}


def check_options(request: Generate) -> None:
    """Raises Unsupported for an option that a request with images cannot have."""
    asked = msgspec.structs.asdict(request) | request.options
    for name, harmless in NOT_WITH_IMAGES.items():
        if asked.get(name) not in (None, *harmless):
            raise Unsupported(f"{name} cannot be had together with images", option=name)


@dataclass(slots=True)
class Unread:
    """A request whose images are not read yet; `go_on` is called with them."""

    sources: list[Source]
    go_on: Callable[[list[Picture]], None]
    reading: Future[list[Picture]] | None = None


@dataclass(slots=True)
class Seen:
    """A prompt whose images were read; `join` puts it into the batch.

    Attributes:
        caches: hold the first `read` tokens.
    """

    sight: Sight
    tokens: list[int]
    reuse: Reuse | None
    join: Callable[[Reuse], int]
    owner: Any
    caches: list[Any] = field(default_factory=list)
    read: int = 0
    looked: bool = False


class Sights:
    """All prompts with images of one model, by request id. First come, first served.

    Args:
        step: how many tokens are read in one piece at most; see PREFILL_S.
    """

    def __init__(self, model: LanguageModel, vision: Vision, cache: PromptCache | None, *, step: int) -> None:
        self.vision = vision
        self._model = model
        self._cache = cache
        self._step = step
        self._rate = FIRST_PREFILL / PREFILL_S  # tokens per second
        self._unread: dict[int, Unread] = {}
        self._seen: deque[tuple[int, Seen]] = deque()
        self._joined = 0  # the uid of the one that was
        self._threads = ThreadPoolExecutor(THREADS, "images")

    def __len__(self) -> int:
        return len(self._unread) + len(self._seen)

    def add(self, request_id: int, sources: list[Source], go_on: Callable[[list[Picture]], None]) -> None:
        """Have images read; `go_on` is called by a later `take_read`, and may raise what the request deserves."""
        self._unread[request_id] = Unread(sources, go_on)

    def take_read(self, *, wait_s: float) -> list[tuple[int, Exception]]:
        """Go on with the requests whose images are read by now. Returns those that failed.

        Args:
            wait_s: how long to wait for one, in seconds, where none is.
        """
        for unread in list(self._unread.values())[:AHEAD]:
            if unread.reading is None:
                unread.reading = self._threads.submit(read_pictures, unread.sources)
        readings = [unread.reading for unread in self._unread.values() if unread.reading is not None]
        if readings and wait_s and not self._seen:
            wait(readings, wait_s, "FIRST_COMPLETED")
        failed: list[tuple[int, Exception]] = []
        for request_id, unread in list(self._unread.items()):
            if unread.reading is not None and unread.reading.done():
                del self._unread[request_id]
                try:
                    unread.go_on(unread.reading.result())
                except Exception as error:
                    failed.append((request_id, error))
        return failed

    def see(self, request_id: int, seen: Seen) -> None:
        """Have a prompt read up to its last image, and then join the batch."""
        self._seen.append((request_id, seen))

    def drop(self, request_id: int) -> Any:
        """Take a request out. Returns its owner, None where it was not yet a prompt; KeyError where it is not here."""
        if self._unread.pop(request_id, None) is not None:
            return None
        for entry in self._seen:
            if entry[0] == request_id:
                self._seen.remove(entry)
                return entry[1].owner
        raise KeyError(request_id)

    def step(self, rows: Lanes) -> tuple[int, Exception] | None:
        """One piece of work on the first prompt. Returns the request that failed by it, if one did.

        The next one is not begun while the last one, already read, waits for memory among `rows`.
        """
        if not self._seen or rows.holds_back(self._joined):
            return None
        request_id, seen = self._seen[0]
        try:
            done = self._go_on(seen, rows.live_bytes)
            if done:
                reuse = seen.reuse or Reuse(b"")
                reuse.begun = seen.caches, seen.read
                self._joined = seen.join(reuse)
        except Exception as error:
            self._seen.popleft()
            return request_id, error
        if done:
            self._seen.popleft()
        return None

    def _go_on(self, seen: Seen, live_bytes: Callable[[], int]) -> bool:
        sight, cache = seen.sight, self._cache
        if not seen.caches:
            if cache is not None and seen.reuse is not None and self._find(seen, cache):
                return True
            seen.caches = self._model.make_cache()
        if not seen.looked:
            seen.looked = not self.vision.look(sight)
            return False
        fitting = int(max(min(self._rate * PREFILL_S, self._step), min(LEAST_PREFILL, self._step)))
        end = min(seen.read + fitting, sight.end)
        started = time.perf_counter()
        self.vision.read(self._model, sight, seen.caches, seen.read, end)
        mx.eval([held.state for held in seen.caches])
        self._rate = (end - seen.read) / (time.perf_counter() - started)
        seen.read = end
        if cache is not None:
            cache.tree.fit(live_bytes() + sum(held.nbytes for held in seen.caches))
        if end < sight.end:
            return False
        if cache is not None and cache.marked and seen.reuse is not None:
            # Another question about the same images begins here.
            row = take([held.merge([held]) for held in seen.caches], 0, end)
            cache.keep(seen.reuse.namespace, seen.tokens[:end], row)
        return True

    def _find(self, seen: Seen, cache: PromptCache) -> bool:
        """Whether all images were read before, after the same tokens: then there is nothing to look at."""
        assert seen.reuse is not None
        if cache.tree.peek(seen.reuse.namespace, seen.tokens, len(seen.tokens) - 1) < seen.sight.end:
            cache.misses += 1
            return False
        found = cache.find(seen.reuse.namespace, seen.tokens)
        if found is None:
            return False
        seen.caches, seen.read = found
        seen.reuse.cached = seen.read
        return True
