"""The asyncio client against a scripted daemon on a real socket."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlxd_client import connect, errors, types
from mlxd_client.aio import AsyncClient
from mlxd_client.rpc import MOST_MOVES
from mlxd_client.sync import Client
from support.scripted_daemon import NOTHING, PATIENCE_S, Connection, ScriptedDaemon, completion, leaves_twice, model


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
def daemon(path: str) -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon(path) as made:
        yield made


def play(daemon: ScriptedDaemon, scene: Callable[[AsyncClient], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run a scene with a connected client, within the time that any test may take."""

    async def run() -> None:
        async with AsyncClient(daemon.path, name="test", timeout_s=PATIENCE_S, **options) as client:
            await asyncio.wait_for(scene(client), PATIENCE_S)

    asyncio.run(run(), debug=True)


async def until(wait: Callable[[], Any]) -> Any:
    """A blocking wait of the scripted daemon's, beside the loop."""
    return await asyncio.to_thread(wait)


def talk(*pieces: str) -> Callable[[Connection, dict[str, Any]], Any]:
    def reply(connection: Connection, request: dict[str, Any]) -> Any:
        connection.stream(request["id"], 0, phase="prompt", progress=1.0)
        for seq, piece in enumerate(pieces, 1):
            connection.stream(request["id"], seq, text=piece)
        return completion("".join(pieces))

    return reply


def stalled(connection: Connection, request: dict[str, Any]) -> Any:
    connection.stream(request["id"], 0, text="one")

    def cancelled() -> None:
        if connection.cancel_of(request["id"]).wait(PATIENCE_S):
            connection.fail(request["id"], errors.Cancelled("cancelled"))

    threading.Thread(target=cancelled, daemon=True).start()
    return NOTHING


def subscribed(epoch: str, rev: int, **fields: Any) -> types.SubscribeResult:
    return types.SubscribeResult(subscription=1, epoch=epoch, rev=rev, **fields)


def test_both_shells_have_the_same_surface() -> None:
    def names(of: type) -> set[str]:
        return {name for name in dir(of) if not name.startswith("_")}

    assert names(Client) == names(AsyncClient)


def test_calls(daemon: ScriptedDaemon) -> None:
    daemon.on("models.list", types.ModelsResult(models=[model()]))
    daemon.on("chat", completion("Hi."))

    async def scene(client: AsyncClient) -> None:
        assert await client.models() == [model()]
        assert (await client.chat("hello", max_tokens=5)).text == "Hi."
        assert (await client.connect()) == daemon.hello == client.hello
        with pytest.raises(errors.MethodNotFound):
            await client.call("nonsense")
        with pytest.raises(TypeError):
            await client.process("x", temprature=1)  # type: ignore[call-arg]

    play(daemon, scene)
    assert daemon.connection().chunks[0] == 2, "hello travels with the first request"


def test_many_calls_at_once(daemon: ScriptedDaemon) -> None:
    daemon.on("echo", lambda _connection, request: request["params"])

    async def scene(client: AsyncClient) -> None:
        made = await asyncio.gather(*[client.call("echo", {"n": n}) for n in range(300)])
        assert made == [{"n": n} for n in range(300)]

    play(daemon, scene)
    assert len(daemon.connections) == 1


def test_two_tasks_may_connect_at_once(daemon: ScriptedDaemon) -> None:
    async def scene(client: AsyncClient) -> None:
        assert await asyncio.gather(client.connect(), client.connect()) == [daemon.hello, daemon.hello]

    play(daemon, scene)


def test_timeouts_and_cancelled_tasks_cancel_on_the_wire(daemon: ScriptedDaemon) -> None:
    daemon.on("process", NOTHING)

    async def scene(client: AsyncClient) -> None:
        with pytest.raises(errors.RequestTimeout):
            await client.process("x", wait_s=0.02)
        task = asyncio.create_task(client.process("y"))
        requests = await until(lambda: daemon.connection().wait_for("process", 2))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for request in requests:
            assert await until(lambda id=request["id"]: daemon.connection().cancel_of(id).wait(PATIENCE_S))
        daemon.connection().reply(requests[0]["id"], {"late": True})
        await client.ping()

    play(daemon, scene)


@pytest.mark.parametrize("end", ["drop", "garbage"])
def test_what_is_in_flight_ends_and_is_never_sent_again(daemon: ScriptedDaemon, end: str) -> None:
    def die(connection: Connection, request: dict[str, Any]) -> Any:
        connection.raw(b"\x00\x00\x00\x02\xc1\xc1") if end == "garbage" else connection.drop()
        return NOTHING

    daemon.on("process", die)

    async def scene(client: AsyncClient) -> None:
        with pytest.raises(errors.ProtocolError if end == "garbage" else errors.ConnectionLost):
            await client.process("x")
        await client.ping()

    play(daemon, scene)
    assert len(daemon.connections) == 2
    assert daemon.connections[1].requests("process") == []


def test_a_client_waits_for_a_restarting_daemon(daemon: ScriptedDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    delays = iter([lambda: None, lambda: None, daemon.start])

    def next_s(_: connect.Backoff) -> float:
        next(delays)()
        return 0.0

    async def scene(client: AsyncClient) -> None:
        await client.ping()
        await until(daemon.stop)
        monkeypatch.setattr(connect.Backoff, "next_s", next_s)
        link = client._link
        assert link is not None
        await link.gone
        await client.ping()

    play(daemon, scene)


def test_a_client_that_shall_not_reconnect(daemon: ScriptedDaemon) -> None:
    async def scene(client: AsyncClient) -> None:
        await client.ping()
        daemon.connection().drop()
        for _ in range(2):
            with pytest.raises(errors.ConnectionLost):
                await client.ping()

    play(daemon, scene, reconnect=False)


def test_a_coroutine_function_may_start_the_daemon(path: str) -> None:
    daemon = ScriptedDaemon(path)

    async def start() -> None:
        daemon.start()

    async def scene(client: AsyncClient) -> None:
        await client.ping()

    play(daemon, scene, start=start)
    daemon.stop()


def test_a_stream_is_an_iterator_of_text(daemon: ScriptedDaemon) -> None:
    daemon.on("chat", talk("Good ", "", "day."))

    async def scene(client: AsyncClient) -> None:
        async with client.stream_chat("hello") as stream:
            assert [piece async for piece in stream] == ["Good ", "day."]
            assert stream.result.text == "Good day."
        assert [p.phase async for p in client.stream_chat("x").pieces()] == ["prompt", None, None, None]
        assert (await client.stream_chat("again").wait()).text == "Good day."

    play(daemon, scene)
    assert daemon.connection().requests("cancel") == []


def test_leaving_a_stream_early_cancels_it(daemon: ScriptedDaemon) -> None:
    daemon.on("chat", stalled)

    async def scene(client: AsyncClient) -> None:
        async with client.stream_chat("hello") as stream:
            async for piece in stream:
                assert piece == "one"
                break
        with pytest.raises(errors.Cancelled):
            _ = stream.result
        assert len(daemon.connection().requests("cancel")) == 1

    play(daemon, scene)


def test_a_stream_that_nobody_holds_is_cancelled(daemon: ScriptedDaemon) -> None:
    daemon.on("chat", stalled)

    async def scene(client: AsyncClient) -> None:
        stream = client.stream_chat("hello")
        async with asyncio.timeout(PATIENCE_S):
            await stream._sent()
        id = stream.request_id
        del stream
        gc.collect()
        assert await until(lambda: daemon.connection().cancel_of(id).wait(PATIENCE_S))

    play(daemon, scene)


def test_a_stream_fails_by_raising(daemon: ScriptedDaemon) -> None:
    daemon.on("chat", stalled)

    async def scene(client: AsyncClient) -> None:
        async with client.stream_chat("hello", wait_s=0.05) as stream:
            with pytest.raises(errors.RequestTimeout):
                _ = [piece async for piece in stream]
        async with client.stream_chat("hello") as stream:
            daemon.connection().drop()
            with pytest.raises(errors.ConnectionLost):
                _ = [piece async for piece in stream]

    play(daemon, scene)


def test_a_lease_is_awaited_or_entered(daemon: ScriptedDaemon) -> None:
    daemon.on("models.acquire", types.Lease(lease="l1", model=model()))
    daemon.on("models.release", {})

    async def scene(client: AsyncClient) -> None:
        async with client.acquire("org/m") as lease:
            assert lease.held
            assert lease.model.id == "org/m"
        lease = await client.acquire("org/m")
        await lease.release()
        await lease.release()
        assert not lease.held

    play(daemon, scene)
    assert len(daemon.connection().requests("models.release")) == 2


def test_events_survive_a_reconnect_without_loss_or_repetition(daemon: ScriptedDaemon) -> None:
    log = list(range(1, 40))

    def subscribe(connection: Connection, request: dict[str, Any]) -> Any:
        since = request["params"].get("since")
        begin = since["rev"] if since else 0
        snapshot = None if since else types.Snapshot()
        connection.reply(request["id"], msgspec.to_builtins(subscribed("e1", begin, snapshot=snapshot)))
        for rev in log[begin : begin + 7]:
            connection.event(rev, "queue")
        if begin + 7 < len(log):
            connection.drop()
        return NOTHING

    daemon.on("events.subscribe", subscribe)

    async def scene(client: AsyncClient) -> None:
        async with client.events() as events:
            assert events.snapshot == types.Snapshot()
            assert [(await anext(events)).rev for _ in log] == log
            with pytest.raises(errors.RequestTimeout):
                await events.get(wait_s=0.01)

    play(daemon, scene)


def test_a_daemon_that_goes_while_events_are_asked_for_is_followed(daemon: ScriptedDaemon) -> None:
    daemon.on("events.subscribe", leaves_twice(subscribed("e1", 1, snapshot=types.Snapshot(models=[model()]))))

    async def scene(client: AsyncClient) -> None:
        async with client.events() as events:
            assert events.snapshot == types.Snapshot(models=[model()])

    play(daemon, scene)
    assert daemon.asked("events.subscribe") == 3


@pytest.mark.parametrize(("reconnect", "asked"), [(True, MOST_MOVES), (False, 1)])
def test_events_are_not_asked_for_without_end(daemon: ScriptedDaemon, reconnect: bool, asked: int) -> None:
    def go(*_: Any) -> Any:
        raise errors.ShuttingDown("connect anew", reconnect=True)

    daemon.on("events.subscribe", go)

    async def scene(client: AsyncClient) -> None:
        with pytest.raises(errors.ShuttingDown):
            await anext(client.events())

    play(daemon, scene, reconnect=reconnect)
    assert daemon.asked("events.subscribe") == asked


def test_a_restarted_daemon_begins_anew_with_resync(daemon: ScriptedDaemon) -> None:
    daemon.on("events.subscribe", subscribed("e1", 5, snapshot=types.Snapshot()))
    fresh = types.Snapshot(models=[model()])

    async def scene(client: AsyncClient) -> None:
        async with client.events() as events:
            await until(daemon.stop)
            daemon.on("events.subscribe", subscribed("e2", 1, snapshot=fresh, resync=True))
            daemon.start()
            event = await anext(events)
            assert (event.name, event.snapshot, events.epoch) == ("resync", fresh, "e2")

    play(daemon, scene)


def test_events_that_nobody_takes_are_left_in_the_socket(daemon: ScriptedDaemon) -> None:
    count, written = 5_000, threading.Event()

    def subscribe(connection: Connection, request: dict[str, Any]) -> Any:
        connection.reply(request["id"], msgspec.to_builtins(subscribed("e1", 0, snapshot=types.Snapshot())))
        for rev in range(1, count + 1):
            connection.event(rev, "queue")
        written.set()
        return NOTHING

    daemon.on("events.subscribe", subscribe)

    async def scene(client: AsyncClient) -> None:
        async with client.events() as events:
            assert (await anext(events)).rev == 1
            await client.ping()
            assert not written.is_set(), "the daemon must feel that nobody reads"
            assert [(await anext(events)).rev for _ in range(count - 1)] == list(range(2, count + 1))

    play(daemon, scene)


def test_closing_ends_an_iteration_in_another_task(daemon: ScriptedDaemon) -> None:
    daemon.on("events.subscribe", subscribed("e1", 0, snapshot=types.Snapshot()))

    async def scene(client: AsyncClient) -> None:
        events = client.events()
        async with events:
            task = asyncio.create_task(events.get())
            await asyncio.sleep(0)
            await events.aclose()
            assert await task is None

    play(daemon, scene)
