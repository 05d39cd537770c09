"""Chats of several people at once, who share a long system turn, against `mlx_lm.server` with the same BLAS.

One script for both sides: each client begins a little after the one before, says its turns one after the other, each
after the answer to the last and a pause of its own, and has the whole conversation so far in every prompt. Answers are
short. Every round has a system turn of its own, so that no side has seen it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from string import ascii_lowercase
from typing import Any

from mlxd_client import AsyncClient

from .effort import Scale
from .generation_rows import GREEDY, Messages, alternate
from .prefix_rows import conversation
from .processes import Daemon, http_server
from .table import Row, paired

# Seconds between the first turns of two clients, and the longest pause before a turn.
ARRIVAL_S, PAUSE_S = 0.25, 0.1
# Asks for one answer: the conversation and how many tokens. Gives its pieces of text as they come.
Ask = Callable[[Messages, int], AsyncIterator[str]]


@dataclass(frozen=True, slots=True)
class Script:
    """What the clients say, and how long each pauses before it does."""

    system: str
    turns: list[list[tuple[float, str]]]
    tokens: int


def mixed_rows(label: str, daemon: Daemon, temp: Path, model: Path, scale: Scale) -> Iterator[Row]:
    source = random.Random(0)
    with daemon.client() as client, http_server(model, temp) as port:

        def script() -> Script:
            system = conversation(client, model, scale.mixed_prompt, source)[0]["content"]
            return write(system, scale.mixed_clients, scale.mixed_turns, scale.mixed_tokens, source)

        # Each pair plays one script.
        scripts = iter([made for _ in range(scale.mixed_rounds + 1) for made in [script()] * 2])
        runs = alternate(
            scale.mixed_rounds + 1,
            lambda: asyncio.run(play(next(scripts), lambda: ours(daemon.socket, model))),
            lambda: asyncio.run(play(next(scripts), lambda: theirs(port))),
        )[1:]  # the first pair warms up
    name = f"mixed/{model.name}"
    what = f"{label}: {scale.mixed_clients} chats that share {scale.mixed_prompt} tokens"
    rates = [(a["rate"], b["rate"]) for a, b in runs]
    yield paired(name, f"{what}; mlx_lm.server", rates, "tokens/s", (">=", 1.3))
    firsts = [(a["first_ms"], b["first_ms"]) for a, b in runs]
    yield paired(name, f"{what}, 95 % of first tokens within; mlx_lm.server", firsts, "ms", ("<=", 0.5))


def write(system: str, clients: int, turns: int, tokens: int, source: random.Random) -> Script:
    def said() -> str:
        return " " + " ".join("".join(source.choices(ascii_lowercase, k=3)) for _ in range(12))

    made = [[(source.uniform(0, PAUSE_S), said()) for _ in range(turns)] for _ in range(clients)]
    return Script(system, made, tokens)


async def play(script: Script, side: Callable[[], AbstractAsyncContextManager[Ask]]) -> dict[str, float]:
    """Tokens per second over the whole script, and the time in which 95 % of the first tokens came."""
    began = time.perf_counter()
    chats = [chat(script, number, side) for number in range(len(script.turns))]
    firsts = [first for made in await asyncio.gather(*chats) for first in made]
    total_s = time.perf_counter() - began
    within = quantiles(firsts, n=20, method="inclusive")[-1] if len(firsts) > 1 else firsts[0]
    return {"rate": len(firsts) * script.tokens / total_s, "first_ms": within * 1e3}


async def chat(script: Script, number: int, side: Callable[[], AbstractAsyncContextManager[Ask]]) -> list[float]:
    """One client's turns. Returns how long each first token took, in seconds."""
    messages = [{"role": "system", "content": script.system}]
    firsts = []
    await asyncio.sleep(number * ARRIVAL_S)
    async with side() as ask:
        for pause_s, said in script.turns[number]:
            await asyncio.sleep(pause_s)
            messages.append({"role": "user", "content": said})
            began, first, text = time.perf_counter(), 0.0, []
            async for piece in ask(messages, script.tokens):
                first = first or time.perf_counter() - began
                text.append(piece)
            if not first:
                raise RuntimeError("an answer without text")
            firsts.append(first)
            messages.append({"role": "assistant", "content": "".join(text)})
    return firsts


@asynccontextmanager
async def ours(socket: Path, model: Path) -> AsyncIterator[Ask]:
    async with AsyncClient(socket, name="bench mixed") as client:

        async def ask(messages: Messages, tokens: int) -> AsyncIterator[str]:
            async with client.stream_chat(messages, model=str(model), max_tokens=tokens, **GREEDY) as stream:
                async for piece in stream:
                    yield piece
                check_whole(stream.result.usage.completion_tokens, tokens)

        yield ask


@asynccontextmanager
async def theirs(port: int) -> AsyncIterator[Ask]:
    async def ask(messages: Messages, tokens: int) -> AsyncIterator[str]:
        request = {
            "model": "default_model", "messages": messages, "max_tokens": tokens, "temperature": 0.0, "stream": True,
            "stream_options": {"include_usage": True}, "chat_template_kwargs": {"enable_thinking": False},
        }  # fmt: skip
        body = json.dumps(request).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            usage: dict[str, Any] = {}
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    told = json.loads(line[6:])
                    usage = told.get("usage") or usage
                    for choice in told.get("choices", ()):
                        if text := choice.get("delta", {}).get("content"):
                            yield text
                elif line.startswith(b"data: [DONE]"):
                    break
            check_whole(int(usage.get("completion_tokens", 0)), tokens)
        finally:
            writer.close()

    yield ask


def check_whole(made: int, wanted: int) -> None:
    if made != wanted:
        raise RuntimeError(f"asked for {wanted} tokens, got {made}")
