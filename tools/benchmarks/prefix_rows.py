"""The second turn of a long conversation: with what the first one computed, and without.

Both sides are the same daemon and the same messages, one with `cache_prompt` off. Every conversation is new. Where the
daemon was restarted in between, what the first turn computed comes from disk; loading the model is not counted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase

from mlxd_client import Client

from .effort import Scale
from .generation_rows import GREEDY, Messages
from .processes import PATIENCE_S, Daemon
from .table import Row, paired

ANSWER = 8
# How many tokens an entry on disk holds.
BLOCK = 64


def prefix_rows(label: str, daemon: Daemon, model: Path, scale: Scale) -> Iterator[Row]:
    source = random.Random(0)
    with daemon.client() as client:
        pairs = [one_pair(client, model, conversation(client, model, scale.prefix_tokens, source))
                 for _ in range(scale.prefix_rounds)]  # fmt: skip
    what = f"{label}: first token of a second turn after {scale.prefix_tokens} tokens; without a cache"
    yield paired(f"prefix/{model.name}", what, pairs, "ms", ("<=", 0.08))


def restart_rows(label: str, model: Path, scale: Scale) -> Iterator[Row]:
    """With a daemon of its own, which ends meanwhile."""
    source = random.Random(1)
    with Daemon() as daemon:
        with daemon.client() as client:
            seconds = []
            for _ in range(scale.prefix_rounds):
                seconds.append(second_turn(client, model, conversation(client, model, scale.prefix_tokens, source)))
            wait_until_written(client, scale.prefix_rounds * (scale.prefix_tokens // BLOCK))
        daemon.restart()
        with daemon.client() as client:
            client.load(str(model))
            pairs = [pair(client, model, messages) for messages in seconds]
    what = f"{label}: first token of a second turn after {scale.prefix_tokens} tokens and a restart; without a cache"
    yield paired(f"restart/{model.name}", what, pairs, "ms", ("<=", 0.2))


def wait_until_written(client: Client, entries: int) -> None:
    """A worker writes where it has nothing to do."""
    until = time.monotonic() + PATIENCE_S
    while sum(one.disk.entries for one in client.cache().models if one.disk is not None) < entries:
        if time.monotonic() > until:
            raise RuntimeError("what was computed does not come to the disk")
        time.sleep(0.2)


def conversation(client: Client, model: Path, tokens: int, source: random.Random) -> Messages:
    """A first turn with this many tokens at least."""
    words: list[str] = []
    while True:
        words += ["".join(source.choices(ascii_lowercase, k=3)) for _ in range(max(1, tokens // 8))]
        messages = [{"role": "user", "content": " ".join(words)}]
        if client.count_tokens(messages=messages, model=str(model)) >= tokens:
            return messages


def one_pair(client: Client, model: Path, messages: Messages) -> tuple[float, float]:
    """Milliseconds to the second turn's first token, with the first turn's cache and without any."""
    return pair(client, model, second_turn(client, model, messages))


def second_turn(client: Client, model: Path, messages: Messages) -> Messages:
    """A conversation, with its first answer and what is said to that."""
    first = client.chat(messages, model=str(model), max_tokens=ANSWER, **GREEDY)
    return [*messages, {"role": "assistant", "content": first.text}, {"role": "user", "content": " and then"}]


def pair(client: Client, model: Path, messages: Messages) -> tuple[float, float]:
    cold = first_token_ms(client, model, messages, cache_prompt=False)
    return first_token_ms(client, model, messages, cache_prompt=True), cold


def first_token_ms(client: Client, model: Path, messages: Messages, *, cache_prompt: bool) -> float:
    began = time.perf_counter()
    stream = client.stream_chat(messages, model=str(model), max_tokens=ANSWER, cache_prompt=cache_prompt, **GREEDY)
    first = None
    for _ in stream:
        first = first or time.perf_counter()
    if (stream.result.usage.cached_tokens > 0) != cache_prompt:
        raise RuntimeError(f"{stream.result.usage.cached_tokens} tokens were cached")
    return ((first or time.perf_counter()) - began) * 1e3
