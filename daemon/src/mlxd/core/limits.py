"""What the settings say to the core: its bounds, and what is to become of single models. Both change while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Limits:
    """`budget_bytes` bounds all models together; `queue` all waiting requests; `max_batch` the running ones of a model
    that is loaded from then on; `downloads` all that move bytes at a time, `fetcher_starts` how often a fetcher that
    dies is started anew for one download: after `fetcher_backoff_s`, doubled each time. `batch_slots` bounds the items
    of batch jobs that run at a time, `batch_tries` how often one is tried that may have killed its worker,
    `batch_retry_s` is how long the last try waits; batch jobs that have ended are kept for `batch_keep_s`.

    `reserve_bytes` is what loads leave of the system's memory to others, `slack_bytes` what a worker may take past its
    share without notice; pressure is over once it was gone for `calm_s`."""

    budget_bytes: int
    queue: int = 512
    max_batch: int = 32
    keep_alive_s: float = 300.0
    downloads: int = 2
    fetcher_starts: int = 3
    fetcher_backoff_s: float = 1.0
    batch_slots: int = 8
    batch_tries: int = 3
    batch_retry_s: float = 60.0
    batch_keep_s: float = 2_592_000.0
    reserve_bytes: int = 0
    slack_bytes: int = 64 * 1024 * 1024
    calm_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Rules:
    """By model: `keep_alive_s`, where it is another than that of Limits; those that are `pinned`; those that are to be
    loaded by themselves (`preload`), in order."""

    keep_alive_s: Mapping[str, float] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    preload: tuple[str, ...] = ()
