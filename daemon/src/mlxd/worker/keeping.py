"""What is kept of what was computed for requests: in memory, for as long as it is of use there, and beyond, on disk."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import mlx.core as mx

from ..childwire import PromptCacheStats
from .diskcache import DiskCache, Fetched
from .kvcache import PromptCache, RowView
from .lanes import PLAIN, Lanes
from .running import Running
from .waits import LEAST

Reading = Future[Fetched | None]


class Keeping:
    """What becomes of the prefixes of one model's requests.

    Args:
        cache: None where nothing is kept.
        lanes: where they are computed.
        budget_bytes: bounds what is kept and what the batch holds, together.

    Attributes:
        disk: what goes on beyond this process; None where nothing does.
    """

    def __init__(self, cache: PromptCache | None, lanes: Lanes, budget_bytes: int) -> None:
        self.cache = cache
        self.disk: DiskCache | None = None
        self._lanes = lanes
        self._budget_bytes = budget_bytes

    def allow(self, kv_bytes: int) -> None:
        """Keep no more than all KV caches may hold; 0 is no bound."""
        if self.cache is not None:
            self.cache.tree.budget_bytes = min(self._budget_bytes, kv_bytes) if kv_bytes else self._budget_bytes

    @property
    def pending(self) -> bool:
        """Something waits to be copied behind an answer."""
        return self.cache is not None and self.cache.pending

    # --- before a request begins

    def fetch(self, running: Running) -> Reading | None:
        """What disk has of a prompt, on its way; None where it would not help."""
        # Prompts with images depend on more than disk knows of.
        plain = running.choices.lane == PLAIN and running.sight is None
        reuse = running.reuse if plain else None
        if self.disk is None or self.cache is None or reuse is None:
            return None
        self.cache.tree.fit(self._lanes.live_bytes())
        return self.disk.fetch(reuse.namespace, running.prompt.tokens)

    def take_up(self, reading: Reading) -> None:
        """Have memory keep what was read."""
        assert self.disk is not None
        assert self.cache is not None
        self.cache.tree.fit(self._lanes.live_bytes())
        with mx.stream(self._lanes.plain.stream):
            self.disk.take_up(reading)

    # --- what it leaves

    def keep(self, running: Running, row: RowView | None, tokens: list[int]) -> None:
        """Have what was computed for a request kept. The copying waits for the next step, behind the answer."""
        if self.cache is not None and running.reuse is not None:
            self.cache.keep(running.reuse.namespace, tokens, row)

    def keep_cut(self, uid: int, running: Running) -> None:
        """A prompt was read up to a cut that was made for this."""
        if running.reuse is not None and running.reuse.cuts:
            row, tokens = self._lanes.view(uid)
            if len(tokens) in running.reuse.cuts:
                self.keep(running, row, tokens)

    def keep_prompt(self, response: Any, running: Running) -> None:
        """A prompt gave its first token: where much of it is new, others may use it while its own answer is made."""
        reuse, length = running.reuse, len(running.prompt.tokens)
        if self.cache is None or self.cache.marked or reuse is None or length - reuse.cached < LEAST:
            return
        if response.finish_reason is None:
            row, tokens = self._lanes.view(response.uid)
            self.keep(running, row, tokens[:length])

    def is_warm(self, running: Running) -> bool:
        """Whether the one cut of a prompt that was asked to be kept is kept."""
        assert self.cache is not None
        assert running.reuse is not None
        self._lanes.settle()
        (cut,) = running.prompt.cuts
        return self.cache.tree.peek(running.reuse.namespace, running.prompt.tokens[:cut], cut) == cut

    def forget_pending(self) -> None:
        """A step failed: what waits to be copied can no longer be trusted."""
        if self.cache is not None:
            self.cache.forget_pending()

    # --- for the daemon

    def trim(self, keep: float) -> None:
        """Let go of what is kept in memory, the least valuable first, but for this share of it."""
        if self.cache is not None:
            self.cache.tree.shrink(int(self.cache.nbytes * keep))

    def stats(self) -> PromptCacheStats | None:
        """What became of the prompt cache; None where nothing is kept."""
        if self.cache is None:
            return None
        stats = self.cache.stats()
        if self.disk is not None:
            disk = self.disk
            stats.disk_hits, stats.disk_tokens, stats.disk_failures = disk.hits, disk.saved_tokens, disk.failures
        return stats

    def clear(self) -> tuple[int, int]:
        """Keep nothing of what is kept now. Returns the bytes that this freed in memory and on disk. Raises OSError."""
        if self.cache is None:
            return 0, 0
        freed = self.cache.nbytes
        self.cache.clear()
        mx.clear_cache()
        return freed, self.disk.clear() if self.disk is not None else 0
