"""Laws of a live session: any bytes leave the server serving; every request gets exactly one response."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxd.server.limits import ServerLimits
from mlxd_client import codec
from mlxd_client.codec import Encoding
from support.fake_runtime import FakeTicket
from support.loops import run
from support.serving import RawClient, serving

ENCODINGS = st.sampled_from(list(Encoding))
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# --- any bytes ----------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | VALUES,
        "id": st.integers(0, 3) | VALUES,
        "method": st.sampled_from(["ping", "hello", "process", "cancel", "events.subscribe", "models.load"]) | VALUES,
        "params": st.dictionaries(st.sampled_from(["prompt", "model", "id", "stream", "topics"]), VALUES) | VALUES,
    },
)


@st.composite
def junk(draw: st.DrawFn) -> bytes:
    """Frames of odd requests, plain noise, and either with bytes cut out or flipped."""
    encoding = draw(ENCODINGS)
    parts = draw(
        st.lists(REQUESTS.map(lambda message: codec.encode(message, encoding)) | st.binary(max_size=40), max_size=5)
    )
    data = bytearray(b"".join(parts))
    for at in draw(st.lists(st.integers(0, 400), max_size=3)):
        if at < len(data):
            data[at] ^= draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, 500))])


@QUICK
@given(st.lists(junk(), min_size=1, max_size=8))
def test_no_bytes_end_the_server(connections: list[bytes]) -> None:
    async def main() -> None:
        async with serving(ServerLimits(in_flight=4)) as served:
            for data in connections:
                client = await served.connect()
                client.send_bytes(data)
                client.writer.write_eof()
                other = await served.connect()
                assert await other.call("ping") == {}
                client.writer.transport.abort()
            assert not served.log.named("request_failed_by_bug")

    run(main())


# --- exactly one response -----------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("process"), st.booleans()),
        st.tuples(st.sampled_from(["ping", "echo", "load", "refused", "unknown", "invalid"]), st.none()),
        st.tuples(st.sampled_from(["cancel", "notify", "piece", "finish", "fail", "release"]), st.integers(0, 9)),
        st.tuples(st.sampled_from(["turn", "duplicate"]), st.integers(0, 9)),
    ),
    max_size=60,
)


class Scenario:
    """Sends requests and cancels at random, and knows which ids must be answered once."""

    def __init__(self, client: RawClient, runtime: Any) -> None:
        self.client = client
        self.runtime = runtime
        self.expected: list[int] = []
        self.refusals = 0

    def request(self, method: str, params: Any = None) -> None:
        self.expected.append(self.client.request(method, params))

    def pick(self, number: int) -> FakeTicket | None:
        tickets = [ticket for ticket in self.runtime.tickets if not ticket.ended]
        return tickets[number % len(tickets)] if tickets else None

    async def step(self, kind: str, argument: Any) -> None:
        match kind:
            case "process":
                self.request("process", {"prompt": "long", "stream": argument})
            case "ping":
                self.request("ping")
            case "echo":
                self.request("process", {"prompt": "words a b", "stream": True})
            case "load":
                self.request("models.load", {"model": "fake/model"})
            case "refused":
                self.request("process", {"prompt": "busy"})
            case "unknown":
                self.request("nope")
            case "invalid":
                self.request("process", {"prompt": 7})
            case "cancel" if self.expected:
                self.request("cancel", {"id": self.expected[argument % len(self.expected)]})
            case "notify" if self.expected:
                target = self.expected[argument % len(self.expected)]
                self.client.send({"jsonrpc": "2.0", "method": "cancel", "params": {"id": target}})
            case "turn":
                for _ in range(argument):
                    await asyncio.sleep(0)
            case "release":
                future = self.runtime.waits["fake/model"]
                if not future.done():
                    future.set_result(None)
            case "piece" | "finish" | "fail":
                self.act(kind, self.pick(argument))

    def act(self, kind: str, ticket: FakeTicket | None) -> None:
        if ticket is None:
            return
        if kind == "piece":
            ticket.piece("x")
        else:
            ticket.done("stop" if kind == "finish" else "cancelled")


@QUICK
@given(STEPS, ENCODINGS, st.booleans(), st.integers(1, 5))
def test_every_request_gets_exactly_one_response(
    steps: list[tuple[str, Any]], encoding: Encoding, hold_cancels: bool, turn: int
) -> None:
    async def main() -> None:
        async with serving(ServerLimits(in_flight=8, turn_messages=turn)) as served:
            served.runtime.hold_cancels = hold_cancels
            served.runtime.waits["fake/model"] = asyncio.get_running_loop().create_future()
            client = await served.connect(encoding)
            scenario = Scenario(client, served.runtime)
            for kind, argument in steps:
                await scenario.step(kind, argument)
            last = client.request("ping")
            await client.answer(last)  # so that the server has read everything
            await scenario.step("release", None)
            for ticket in served.runtime.tickets:
                if not ticket.ended:
                    ticket.done()
            client.request("ping", id="end")
            client.writer.write_eof()
            messages = await client.closed()
            answered = Counter(message["id"] for message in messages if "method" not in message)
            assert answered == Counter([*scenario.expected, "end"])
            assert served.server.working == 0
            _check_streams(messages)

    run(main())


def _check_streams(messages: list[dict[str, Any]]) -> None:
    """Pieces come in order, before their answer, and add up to its text."""
    texts: dict[Any, str] = {}
    counts: Counter[Any] = Counter()
    for message in messages:
        if message.get("method") == "stream":
            piece = message["params"]
            assert piece["seq"] == counts[piece["id"]]
            counts[piece["id"]] += 1
            texts[piece["id"]] = texts.get(piece["id"], "") + piece.get("text", "")
        elif message["id"] in texts:
            text = texts.pop(message["id"])
            if "result" in message:
                assert text == message["result"]["text"]
            else:
                assert text == message["error"]["data"]["details"]["text"]
    assert not texts


@QUICK
@given(st.integers(1, 200), ENCODINGS)
def test_leaving_cancels_everything(count: int, encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            for _ in range(count):
                client.request("process", {"prompt": "long", "stream": True})
            for _ in range(count):
                await served.runtime.asked.get()
            client.writer.transport.abort()
            assert await served.runtime.gone.get() == 1
            assert all(ticket.cancelled.is_set() for ticket in served.runtime.tickets)
            assert served.server.working == 0

    run(main())
