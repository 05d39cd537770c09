"""Streams of tokens: one against `stream_generate`, eight against `BatchGenerator` and against `mlx_lm.server`; and
answers that follow a schema against free ones.

All sides get the same messages, decode greedily and make the same number of tokens. Neighbouring runs are of different
sides, never at the same time, and every prompt of a run is new, so that no side profits from a prompt it has seen.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from mlxd_client import AsyncClient, Client

from .effort import STREAMS, Scale
from .processes import Daemon, Reference, http_server
from .table import Row, paired

Messages = list[dict[str, str]]
# What a request says on our side, so that it decodes as mlx_lm does by default.
GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}
# No answer gets to the end of this one.
RECORDS: dict[str, Any] = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 16},
            "count": {"type": "integer", "minimum": 0, "maximum": 999},
            "kind": {"enum": ["word", "number", "sign"]},
        },
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
    },
}


class Prompts:
    """Short prompts that begin with random letters: dictated sentences for the model that was made for them, three
    such words for the other."""

    def __init__(self, model: Path) -> None:
        self.random = random.Random(0)
        self._sentence = "{} um so i think we should uh meet at {} or {} pm" if model.name == "cleanup" else "{} {} {}"

    def one(self) -> Messages:
        words = ("".join(self.random.choices(ascii_lowercase, k=3)) for _ in range(3))
        return [{"role": "user", "content": self._sentence.format(*words)}]

    def several(self) -> list[Messages]:
        return [self.one() for _ in range(STREAMS)]


def alternate(rounds: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> list[tuple[Any, Any]]:
    """Runs of both sides, side by side; who goes first changes each time."""
    pairs = []
    for turn in range(rounds):
        if turn % 2:
            b, a = theirs(), ours()
        else:
            a, b = ours(), theirs()
        pairs.append((a, b))
    return pairs


def warm_up(rounds: int, *sides: Callable[[int], Any]) -> None:
    """Batches of eight, and rows that join, have kernels of their own, which are compiled when first met."""
    if rounds > 1:
        for side in sides:
            side(2)


# --- one stream ---------------------------------------------------------------------------------------------------


def stream_ours(client: Client, model: Path, messages: Messages, tokens: int, **options: Any) -> dict[str, Any]:
    began = time.perf_counter()
    first: float | None = None
    text = []
    stream = client.stream_chat(messages, model=str(model), max_tokens=tokens, **GREEDY, **options)
    for piece in stream:
        if first is None:
            first = time.perf_counter()
        text.append(piece)
    ended = time.perf_counter()
    first = ended if first is None else first
    made = stream.result.usage.completion_tokens
    return {"first_s": first - began, "decode_s": ended - first, "tokens": made, "text": "".join(text)}


def stream_rows(label: str, daemon: Daemon, reference: Reference, model: Path, scale: Scale) -> Iterator[Row]:
    tokens, prompts = scale.stream_tokens, Prompts(model)
    with daemon.client() as client:
        check_same_text(client, reference, model, prompts.one(), tokens)
        pairs = alternate(
            scale.stream_rounds,
            lambda: stream_ours(client, model, prompts.one(), tokens),
            lambda: reference.ask("stream", messages=prompts.one(), tokens=tokens),
        )
    name = f"stream/{model.name}"
    rates = [((a["tokens"] - 1) / a["decode_s"], (b["tokens"] - 1) / b["decode_s"]) for a, b in pairs]
    yield paired(name, f"{label}: one stream; stream_generate", rates, "tokens/s", (">=", 0.95))
    firsts = [(a["first_s"] * 1e3, b["first_s"] * 1e3) for a, b in pairs]
    yield paired(name, f"{label}: first token; stream_generate", firsts, "ms", ("<=", 3.0), "difference")


def check_same_text(client: Client, reference: Reference, model: Path, messages: Messages, tokens: int) -> None:
    """Warms both sides up, and makes sure that they do the same work."""
    ours = stream_ours(client, model, messages, tokens)
    theirs = reference.ask("stream", messages=messages, tokens=tokens)
    if ours["tokens"] != tokens or theirs["tokens"] != tokens:
        raise RuntimeError(f"asked for {tokens} tokens, got {ours['tokens']} and {theirs['tokens']}")
    if ours["text"] != theirs["text"]:
        raise RuntimeError(f"the texts differ: {ours['text']!r} and {theirs['text']!r}")


# --- eight streams ------------------------------------------------------------------------------------------------


async def batch_ours(socket: Path, model: Path, prompts: list[Messages], tokens: int, **options: Any) -> dict[str, Any]:
    """Eight clients, each with a connection of its own, which begin at once."""
    clients = [AsyncClient(socket, name=f"bench {number}") for number in range(len(prompts))]
    try:
        await asyncio.gather(*(client.ping() for client in clients))
        began = time.perf_counter()
        made = await asyncio.gather(
            *(_consume(client, model, prompt, tokens, options) for client, prompt in zip(clients, prompts, strict=True))
        )
        return {"total_s": time.perf_counter() - began, "tokens": sum(made)}
    finally:
        await asyncio.gather(*(client.close() for client in clients))


async def _consume(client: AsyncClient, model: Path, messages: Messages, tokens: int, options: dict[str, Any]) -> int:
    async with client.stream_chat(messages, model=str(model), max_tokens=tokens, **GREEDY, **options) as stream:
        async for _ in stream:
            pass
        return stream.result.usage.completion_tokens


def batch_rows(label: str, daemon: Daemon, reference: Reference, model: Path, scale: Scale) -> Iterator[Row]:
    tokens, prompts = scale.batch_tokens, Prompts(model)

    def ours(tokens: int = tokens) -> float:
        return rate(asyncio.run(batch_ours(daemon.socket, model, prompts.several(), tokens)), tokens)

    def theirs(tokens: int = tokens) -> float:
        return rate(reference.ask("batch", prompts=prompts.several(), tokens=tokens), tokens)

    warm_up(scale.batch_rounds, ours, theirs)
    pairs = alternate(scale.batch_rounds, ours, theirs)
    what = f"{label}: {STREAMS} streams; BatchGenerator"
    yield paired(f"batch/{model.name}", what, pairs, "tokens/s", (">=", 0.92))


def schema_rows(label: str, daemon: Daemon, model: Path, scale: Scale) -> Iterator[Row]:
    """Answers that follow a schema against free ones, both ours, at one stream and at eight. Neither guesses ahead,
    which answers that follow a rule never do: what is compared is what the rule takes."""
    prompts, name = Prompts(model), f"schema/{model.name}"
    with daemon.client() as client:

        def one(tokens: int = scale.stream_tokens, **options: Any) -> float:
            run = stream_ours(client, model, prompts.one(), tokens, **options)
            return float((run["tokens"] - 1) / run["decode_s"])

        one(schema=RECORDS)  # compiled from here on
        pairs = alternate(scale.stream_rounds, lambda: one(schema=RECORDS), lambda: one(speculation="off"))
    yield paired(name, f"{label}: one stream, schema; free", pairs, "tokens/s", (">=", 0.93))

    def eight(tokens: int = scale.batch_tokens, **options: Any) -> float:
        return rate(asyncio.run(batch_ours(daemon.socket, model, prompts.several(), tokens, **options)), tokens)

    def constrained(tokens: int = scale.batch_tokens) -> float:
        return eight(tokens, schema=RECORDS)

    def free(tokens: int = scale.batch_tokens) -> float:
        return eight(tokens, speculation="off")

    warm_up(scale.batch_rounds, constrained, free)
    pairs = alternate(scale.batch_rounds, constrained, free)
    yield paired(name, f"{label}: {STREAMS} streams, schema; free", pairs, "tokens/s", (">=", 0.93))


def http_rows(label: str, daemon: Daemon, temp: Path, model: Path, scale: Scale) -> Iterator[Row]:
    tokens, prompts = scale.batch_tokens, Prompts(model)
    with http_server(model, temp) as port:

        def ours(tokens: int = tokens) -> float:
            return rate(asyncio.run(batch_ours(daemon.socket, model, prompts.several(), tokens)), tokens)

        def theirs(tokens: int = tokens) -> float:
            return rate(asyncio.run(batch_http(port, prompts.several(), tokens)), tokens)

        warm_up(scale.http_rounds, ours, theirs)
        pairs = alternate(scale.http_rounds, ours, theirs)
    what = f"{label}: {STREAMS} streams; mlx_lm.server"
    yield paired(f"http/{model.name}", what, pairs, "tokens/s", (">=", 1.0))


def rate(run: dict[str, Any], tokens: int) -> float:
    """Tokens per second over the whole run, prompts included; a side that made fewer tokens is no comparison."""
    if run["tokens"] != tokens * STREAMS:
        raise RuntimeError(f"asked for {tokens * STREAMS} tokens, got {run['tokens']}")
    return float(run["tokens"] / run["total_s"])


async def batch_http(port: int, prompts: list[Messages], tokens: int) -> dict[str, Any]:
    """Eight clients of mlx_lm.server that stream, each over a connection of its own, which begin at once."""
    links = [await asyncio.open_connection("127.0.0.1", port) for _ in prompts]
    try:
        began = time.perf_counter()
        made = await asyncio.gather(
            *(_consume_http(*link, prompt, tokens) for link, prompt in zip(links, prompts, strict=True))
        )
        return {"total_s": time.perf_counter() - began, "tokens": sum(made)}
    finally:
        for _, writer in links:
            writer.close()


async def _consume_http(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, messages: Messages, tokens: int
) -> int:
    request = {
        "model": "default_model", "messages": messages, "max_tokens": tokens, "temperature": 0.0, "stream": True,
        "stream_options": {"include_usage": True}, "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    body = json.dumps(request).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    usage: dict[str, Any] = {}
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            usage = json.loads(line[6:]).get("usage") or usage
        elif line.startswith(b"data: [DONE]"):
            break
    return int(usage.get("completion_tokens", 0))
