"""A batch job, from its being put in to its end on disk, against the same requests from eight clients who each send the
next one when they have their answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxd_client import AsyncClient, Client

from .effort import STREAMS, Scale
from .generation_rows import GREEDY, Messages, Prompts, alternate
from .processes import Daemon
from .table import Row, paired


def job_rows(label: str, daemon: Daemon, model: Path, scale: Scale) -> Iterator[Row]:
    prompts = Prompts(model)
    options = {"model": str(model), "max_tokens": scale.job_tokens, **GREEDY}

    def requests() -> list[Messages]:
        return [prompts.one() for _ in range(scale.job_items)]

    with daemon.client() as client:
        runs = alternate(
            scale.job_rounds + 1,
            lambda: as_job(client, requests(), options),
            lambda: asyncio.run(by_hand(daemon, requests(), options)),
        )[1:]  # the first pair warms up
    what = f"{label}: a batch job of {scale.job_items} chats; {STREAMS} clients by hand"
    yield paired(f"jobs/{model.name}", what, runs, "items/s", (">=", 0.95))


def as_job(client: Client, requests: list[Messages], options: dict[str, Any]) -> float:
    """Items per second."""
    began = time.perf_counter()
    job = client.submit_items({"method": "chat", "params": {"messages": each, **options}} for each in requests)
    ended = client.wait_job(job.job)
    took_s = time.perf_counter() - began
    if ended.state != "done" or ended.failed_items:
        raise RuntimeError(f"the job came to {ended}")
    client.delete_batch(job.job)
    return len(requests) / took_s


async def by_hand(daemon: Daemon, requests: list[Messages], options: dict[str, Any]) -> float:
    """Items per second."""
    left = iter(requests)

    async def work(client: AsyncClient) -> None:
        for messages in left:
            await client.chat(messages, **options)

    async with AsyncClient(daemon.socket) as client:
        began = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(STREAMS)))
        return len(requests) / (time.perf_counter() - began)
