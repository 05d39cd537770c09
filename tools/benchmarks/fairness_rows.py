"""The longest time that a stream waits for its next token while eight long prompts are read, against the usual time.

Between two tokens of the stream the worker reads a part of the prompts; that is the usual time. The prompts differ, so
that none is spared.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median

from mlxd_client import Client

from .effort import STREAMS, Scale
from .generation_rows import GREEDY
from .prefix_rows import conversation
from .processes import Daemon
from .table import Row, paired

# More than the stream gets to.
STREAM_TOKENS = 1_000


def fairness_rows(label: str, daemon: Daemon, model: Path, scale: Scale) -> Iterator[Row]:
    source = random.Random(1)
    with daemon.client() as client:
        prompts = [conversation(client, model, scale.fairness_tokens, source)[0]["content"] for _ in range(STREAMS)]
        arrived, done_at = stream_beside(client, daemon, model, prompts)
    gaps = [later - earlier for earlier, later in pairwise(arrived) if earlier < done_at]
    what = f"{label}: longest wait of a stream while {STREAMS} x {scale.fairness_tokens} tokens are read; usual one"
    yield paired(f"fairness/{model.name}", what, [(max(gaps) * 1e3, median(gaps) * 1e3)], "ms", ("<=", 3.0))


def stream_beside(client: Client, daemon: Daemon, model: Path, prompts: list[str]) -> tuple[list[float], float]:
    """When the pieces of a stream came, from when the prompts did, and when all of these were read."""
    stream = client.stream_process("hello", model=str(model), max_tokens=STREAM_TOKENS, **GREEDY)
    pieces = iter(stream)
    next(pieces)
    with ThreadPoolExecutor(len(prompts)) as readers:
        reading = [readers.submit(read, daemon, model, prompt) for prompt in prompts]
        arrived = [time.perf_counter()]
        done_at = 0.0
        for _ in pieces:
            arrived.append(time.perf_counter())
            if all(one.done() for one in reading):
                done_at = arrived[-1]
                stream.close()
                break
        for one in reading:
            one.result()
    if not done_at:
        raise RuntimeError("the stream ended before the prompts were read")
    return arrived, done_at


def read(daemon: Daemon, model: Path, prompt: str) -> None:
    with daemon.client() as client:
        client.process(prompt, model=str(model), max_tokens=1, cache_prompt=False, **GREEDY)
