"""The two real halves together: mlxd_client against this server, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from mlxd.server.limits import ServerLimits
from mlxd_client import errors
from mlxd_client.aio import AsyncClient
from mlxd_client.mirror import Mirror
from mlxd_client.types import Model
from support.loops import run
from support.serving import serving


def test_calls_streams_and_errors() -> None:
    async def main() -> None:
        async with serving() as served, AsyncClient(served.path, name="test") as client:
            await client.ping()
            assert (await client.process("echo hi")).text == "hi"
            assert [model.id for model in await client.models()] == ["fake/model"]
            assert (await client.load("fake/model")).state == "Downloaded"
            pieces = [piece async for piece in client.stream_process("words a b c")]
            assert "".join(str(piece) for piece in pieces) == "abc"
            with pytest.raises(errors.QueueFull) as caught:
                await client.process("busy")
            assert caught.value.details["retry_after_s"] == 1.5
            with pytest.raises(errors.ModelNotFound):
                await client.model("nobody/nothing")
            document = await client.discover()
            assert len(document["methods"]) > 20
            assert (await client.status()).clients == 1

    run(main())


def test_giving_up_cancels() -> None:
    async def main() -> None:
        async with serving() as served, AsyncClient(served.path) as client:
            task = asyncio.create_task(client.process("long"))
            ticket = await served.runtime.asked.get()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await ticket.cancelled.wait()
            await client.ping()

    run(main())


def test_a_mirror_survives_a_dropped_connection() -> None:
    async def main() -> None:
        async with serving(ServerLimits(ring_events=50)) as served, AsyncClient(served.path) as client:
            events = client.events()
            async with events:
                mirror = Mirror(events.snapshot)
                for number in range(300):
                    served.runtime.change(Model(id=f"m{number % 7}", state="Ready", source="hub", active=number))
                    if number % 60 == 20:
                        for session in list(served.server._sessions.values()):
                            session.abort()
                    if number % 10 == 0:
                        while events.rev < served.runtime.events.rev:
                            event = await events.get(5)
                            assert event is not None
                            mirror.apply(event)
                        assert mirror.models == served.runtime.model_states

    run(main())


def test_a_slow_consumer_ends_up_right() -> None:
    async def main() -> None:
        async with serving(ServerLimits(subscriber_events=20)) as served, AsyncClient(served.path) as client:
            events = client.events()
            async with events:
                mirror = Mirror(events.snapshot)
                for number in range(3000):
                    model = Model(id=f"m{number % 7}", state="Ready", source="hub", active=number)
                    served.runtime.change(model, details={"words": "x" * 1000})
                    if number % 50 == 0:
                        await asyncio.sleep(0)
                names: set[str] = set()
                while events.rev < served.runtime.events.rev:
                    event = await events.get(5)
                    assert event is not None
                    names.add(event.name)
                    mirror.apply(event)
                assert "lagged" in names
                assert mirror.models == served.runtime.model_states

    run(main())
