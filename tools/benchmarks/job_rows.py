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
from .generation_rows import GREEDY, Messages, Prompts, alternate, stream_ours
from .processes import Daemon
from .table import Row, paired

# Items of the job that an interactive stream is measured beside; it is not to end first.
BESIDE = 64
# A stream that decodes alone may be guessed ahead, which is another comparison.
ROW: dict[str, Any] = {"speculation": "off"}


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
        beside = alternate(
            scale.job_rounds + 1,
            lambda: stream_beside(client, model, prompts, scale.stream_tokens),
            lambda: stream_ours(client, model, prompts.one(), scale.stream_tokens, **ROW),
        )[1:]
    what = f"{label}: a batch job of {scale.job_items} chats; {STREAMS} clients by hand"
    yield paired(f"jobs/{model.name}", what, runs, "items/s", (">=", 0.95))
    firsts = [(a["first_s"] * 1e3, b["first_s"] * 1e3) for a, b in beside]
    yield paired(
        f"jobs/{model.name}", f"{label}: first token of a stream beside a batch job; alone", firsts, "ms", ("<=", 5)
    )
    rates = [(a["tokens"] / a["decode_s"], b["tokens"] / b["decode_s"]) for a, b in beside]
    yield paired(f"jobs/{model.name}", f"{label}: its further tokens; alone", rates, "tokens/s", (">=", 0.2))


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


def stream_beside(client: Client, model: Path, prompts: Prompts, tokens: int) -> dict[str, Any]:
    """One interactive stream while a batch job fills its slots with answers that are as long."""
    params = {"model": str(model), "max_tokens": tokens, **GREEDY}
    items = [{"method": "chat", "params": {"messages": prompts.one(), **params}} for _ in range(BESIDE)]
    with client.events(["job"]) as events:
        job = client.submit_items(items)
        while client.batch(job.job).done_items == 0:
            events.get(60)
    made = stream_ours(client, model, prompts.one(), tokens, **ROW)
    if client.batch(job.job).ended_at is not None:
        raise RuntimeError("the job ended first: it takes more items")
    with client.events(["queue"]) as events:
        client.delete_batch(job.job, cancel=True)
        while client.model(str(model)).active:
            events.get(60)
    return made


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
