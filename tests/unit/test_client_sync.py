"""The blocking client against a scripted daemon on a real socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlxd_client import connect, errors, types
from mlxd_client.rpc import MOST_MOVES
from mlxd_client.sync import Client, link
from support.scripted_daemon import NOTHING, PATIENCE_S, Connection, ScriptedDaemon, completion, leaves_twice, model


@pytest.fixture(autouse=True)
def _keep_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_KEEP_S", 0.01)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
def daemon(path: str) -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon(path) as made:
        yield made


@pytest.fixture
def client(daemon: ScriptedDaemon) -> Iterator[Client]:
    with Client(daemon.path, name="test", timeout_s=PATIENCE_S) as made:
        yield made


class Thread(threading.Thread):
    """A thread whose result, or exception, `get` hands over."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work, self._result, self._error = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error

    def get(self) -> Any:
        self.join(PATIENCE_S)
        assert not self.is_alive(), "it hangs"
        if self._error is not None:
            raise self._error
        return self._result


def talk(*pieces: str) -> Callable[[Connection, dict[str, Any]], Any]:
    """A reply that streams `pieces`."""

    def reply(connection: Connection, request: dict[str, Any]) -> Any:
        connection.stream(request["id"], 0, phase="prompt", progress=1.0)
        for seq, piece in enumerate(pieces, 1):
            connection.stream(request["id"], seq, text=piece)
        return completion("".join(pieces))

    return reply


def stalled(connection: Connection, request: dict[str, Any]) -> Any:
    """A reply that streams one piece and then nothing, until it is cancelled."""
    connection.stream(request["id"], 0, text="one")

    def cancelled() -> None:
        if connection.cancel_of(request["id"]).wait(PATIENCE_S):
            connection.fail(request["id"], errors.Cancelled("cancelled"))

    threading.Thread(target=cancelled, daemon=True).start()
    return NOTHING


# --- connecting ---------------------------------------------------------------------------------------------------


def test_the_first_request_travels_with_hello(daemon: ScriptedDaemon, client: Client) -> None:
    assert client.hello is None
    client.ping()
    assert [m["method"] for m in daemon.connection().received] == ["hello", "ping"]
    assert daemon.connection().chunks == [2]
    assert client.hello == daemon.hello


def test_connect_returns_what_the_daemon_says_of_itself(daemon: ScriptedDaemon) -> None:
    with Client(daemon.path) as client:
        assert client.connect().server.name == "mlxd"
        assert client.connect() == client.hello
        assert len(daemon.connection().requests("hello")) == 1


def test_nobody_listens(path: str) -> None:
    with pytest.raises(errors.ConnectFailed, match="no mlxd listens"):
        Client(path).ping()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        with pytest.raises(errors.ConnectFailed, match="no mlxd listens"), Client(path):
            pass


def test_a_file_that_is_no_socket(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(errors.ConnectFailed):
        Client(tmp_path / "f").ping()


def test_a_listener_of_another_user_is_refused(daemon: ScriptedDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "peer_uid", lambda _: os.getuid() + 7)
    with pytest.raises(errors.ConnectFailed, match="another user"):
        Client(daemon.path).ping()
    monkeypatch.setattr(connect, "peer_uid", lambda _: None)
    with Client(daemon.path) as client:
        client.ping()


def test_the_peers_uid_is_read_from_the_socket(daemon: ScriptedDaemon) -> None:
    with connect.open_socket(daemon.path) as sock:
        assert connect.peer_uid(sock) == os.getuid()


def test_a_refused_hello_is_raised_by_the_call_and_by_connect(daemon: ScriptedDaemon) -> None:
    def refuse(*_: Any) -> Any:
        raise errors.Unsupported("speaks protocol 2 to 3")

    daemon.on("hello", refuse)
    with Client(daemon.path) as client:
        with pytest.raises(errors.Unsupported, match="2 to 3"):
            client.ping()
        with pytest.raises(errors.Unsupported):
            client.connect()


def test_a_closed_client_says_so(client: Client) -> None:
    client.ping()
    client.close()
    with pytest.raises(errors.ClientError, match="closed"):
        client.ping()


# --- calls --------------------------------------------------------------------------------------------------------


def test_methods_send_their_params_and_return_types(daemon: ScriptedDaemon, client: Client) -> None:
    ready = model()
    daemon.on("models.list", types.ModelsResult(models=[ready]))
    daemon.on("models.load", ready)
    daemon.on("tokens.count", {"tokens": 7})
    daemon.on("process", completion("Hello."))
    daemon.on("chat", completion("Hi."))
    assert client.models() == [ready]
    assert client.load("m", keep_alive=-1) == ready
    assert client.count_tokens("text") == 7
    assert client.process("hello", max_tokens=5, temperature=None, stop="x", system="s").text == "Hello."
    assert client.chat("hi", timeout_s=3).text == "Hi."
    client.chat([{"role": "user", "content": "a"}, types.Message(role="assistant", content="b")])
    sent = {m["method"]: m.get("params") for m in daemon.connection().received[:-1]}
    assert sent["models.load"] == {"model": "m", "keep_alive": -1}
    assert sent["process"] == {"prompt": "hello", "max_tokens": 5, "stop": ["x"], "system": "s"}
    assert sent["chat"] == {"messages": [{"role": "user", "content": "hi"}], "timeout_s": 3}
    assert "params" not in daemon.connection().requests("models.list")[0]
    assert len(daemon.connection().requests("chat")[1]["params"]["messages"]) == 2


def test_the_methods_of_downloads(daemon: ScriptedDaemon, client: Client) -> None:
    job = types.Job(job="d-1", kind="download", state="running", model="org/m", done_bytes=5, total_bytes=10)
    plan = types.Plan(
        model="org/m", download_bytes=1, disk_free_bytes=2, weights_bytes=3, kv_bytes=4, memory_bytes=5,
        memory_available_bytes=6, fits=True,
    )  # fmt: skip
    entry = types.CatalogEntry(model="org/m", uses=["light"], size_bytes=1, memory_bytes=2, smallest_mac_gb=8)
    bad = types.VerifyResult(ok=False, bad_files=[types.BadFile(file="a.json", reason="hash")])
    catalog = types.CatalogResult(entries=[entry], memory_bytes=9)
    daemon.on("models.list", types.ModelsResult(models=[model(latest_revision="new")]))
    daemon.on("models.download", {"job": "d-1"})
    daemon.on("jobs.cancel", job)
    daemon.on("models.delete", {"freed_bytes": 7})
    daemon.on("models.verify", bad)
    daemon.on("models.plan", plan)
    daemon.on("models.catalog", catalog)
    assert client.models(updates=True)[0].latest_revision == "new"
    assert client.download("org/m", revision="v1", repair=True) == "d-1"
    assert client.download("org/m") == "d-1"
    assert client.cancel_job("d-1", discard=True) == job
    assert client.delete("org/m") == 7
    assert client.verify("org/m") == bad
    assert client.plan("org/m", revision="v1", context_length=100) == plan
    assert client.catalog() == catalog
    sent = [(m["method"], m.get("params")) for m in daemon.connection().received[1:]]
    assert sent == [
        ("models.list", {"updates": True}),
        ("models.download", {"model": "org/m", "revision": "v1", "repair": True}),
        ("models.download", {"model": "org/m"}),
        ("jobs.cancel", {"job": "d-1", "discard": True}),
        ("models.delete", {"model": "org/m"}),
        ("models.verify", {"model": "org/m"}),
        ("models.plan", {"model": "org/m", "revision": "v1", "context_length": 100}),
        ("models.catalog", None),
    ]


def test_unknown_options_are_type_errors(client: Client) -> None:
    with pytest.raises(TypeError, match="temprature"):
        client.process("x", temprature=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="stream_chat"):
        client.chat("x", stream=True)  # type: ignore[call-arg]


def test_call_reaches_any_method(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("models.plan", {"fits": True})
    assert client.call("models.plan", {"model": "m"}) == {"fits": True}
    with pytest.raises(errors.MethodNotFound):
        client.call("nonsense")


def test_a_timeout_cancels_on_the_wire_and_leaves_the_connection_usable(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("process", NOTHING)
    with pytest.raises(errors.RequestTimeout, match=r"`process` within 0\.02 s"):
        client.process("x", wait_s=0.02)
    (request,) = daemon.connection().wait_for("process")
    assert daemon.connection().cancel_of(request["id"]).wait(PATIENCE_S)
    daemon.connection().reply(request["id"], {"late": True})
    client.ping()
    assert len(daemon.connections) == 1


def test_patience_by_kind_of_call() -> None:
    from mlxd_client.methods import Methods

    names = ("ping", "load", "process", "models", "verify", "delete", "plan", "download")
    build = {name: vars(Methods)[name].build for name in names}
    for name in ("verify", "delete", "plan"):  # they read whole models, or ask the hub
        assert build[name](None, "m").patience_s(30) is None
    assert build["models"](None, updates=True).patience_s(30) is None
    assert build["models"](None).patience_s(30) == 30
    assert build["download"](None, "m").patience_s(30) == 30
    assert build["ping"](None).patience_s(30) == 30
    assert build["ping"](None, wait_s=None).patience_s(30) is None
    assert build["load"](None, "m").patience_s(30) is None
    assert build["load"](None, "m", wait_s=5).patience_s(30) == 5
    assert build["process"](None, "p", timeout_s=10).patience_s(30) == 40
    assert build["process"](None, "p", timeout_s=10, wait_s=1).patience_s(30) == 1


def test_the_options_are_those_of_the_wire() -> None:
    from typing import get_type_hints

    from mlxd_client.methods import ChatOptions, ProcessOptions

    for options, params, own in (
        (ProcessOptions, types.ProcessParams, {"prompt"}),
        (ChatOptions, types.ChatParams, {"messages"}),
    ):
        assert set(get_type_hints(options)) == set(params.__struct_fields__) - own - {"stream"}


def test_threads_share_a_connection(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("echo", lambda _connection, request: request["params"])

    def many(start: int) -> None:
        for number in range(start, start + 50):
            assert client.call("echo", {"n": number}) == {"n": number}

    for thread in [Thread(lambda start=start: many(start)) for start in range(0, 800, 100)]:  # type: ignore[misc]
        thread.get()
    assert len(daemon.connections) == 1


def test_a_follower_gets_its_answer_while_the_leader_waits_and_takes_over_after(
    daemon: ScriptedDaemon, client: Client
) -> None:
    daemon.on("slow", NOTHING)
    client.ping()
    connection = daemon.connection()
    leader = Thread(lambda: client.call("slow", {"n": 1}))
    connection.wait_for("slow", 1)
    follower = Thread(lambda: client.call("slow", {"n": 2}))
    last = [connection.wait_for("slow", 2), Thread(lambda: client.call("slow", {"n": 3}))][1]
    first, second, third = (request["id"] for request in connection.wait_for("slow", 3))
    connection.reply(second, 2)
    assert follower.get() == 2
    connection.reply(first, 1)
    assert leader.get() == 1
    connection.reply(third, 3)
    assert last.get() == 3


def test_a_leader_that_gives_up_hands_over(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("slow", NOTHING)
    client.ping()
    leader = Thread(lambda: client.call("slow", wait_s=0.1))
    daemon.connection().wait_for("slow", 1)
    follower = Thread(lambda: client.call("slow"))
    ids = [request["id"] for request in daemon.connection().wait_for("slow", 2)]
    with pytest.raises(errors.RequestTimeout):
        leader.get()
    daemon.connection().reply(ids[1], "later")
    assert follower.get() == "later"


def test_a_request_larger_than_the_sockets_buffer(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("process", lambda _connection, request: completion(str(len(request["params"]["prompt"]))))
    assert client.process("x" * 5_000_000).text == "5000000"


# --- the connection's end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["drop", "garbage"])
def test_what_is_in_flight_ends_and_is_never_sent_again(daemon: ScriptedDaemon, client: Client, end: str) -> None:
    def die(connection: Connection, request: dict[str, Any]) -> Any:
        connection.raw(b"\x00\x00\x00\x02\xc1\xc1") if end == "garbage" else connection.drop()
        return NOTHING

    daemon.on("process", die)
    with pytest.raises(errors.ProtocolError if end == "garbage" else errors.ConnectionLost):
        client.process("x")
    client.ping()
    assert len(daemon.connections) == 2
    assert daemon.connections[1].requests("process") == []


def test_all_threads_learn_of_the_end(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("slow", NOTHING)
    client.ping()
    threads = [Thread(lambda: client.call("slow")) for _ in range(4)]
    daemon.connection().wait_for("slow", 4)
    daemon.connection().drop()
    for thread in threads:
        with pytest.raises(errors.ConnectionLost):
            thread.get()


def test_an_idle_connection_that_ended_is_replaced(daemon: ScriptedDaemon, client: Client) -> None:
    client.ping()
    daemon.stop()
    daemon.start()
    client.ping()
    assert len(daemon.connections) == 2


def test_a_client_waits_for_a_restarting_daemon(
    daemon: ScriptedDaemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.ping()
    daemon.stop()
    delays = iter([lambda: None, lambda: None, daemon.start])

    def next_s(_: connect.Backoff) -> float:
        next(delays)()
        return 0.0

    monkeypatch.setattr(connect.Backoff, "next_s", next_s)
    client.ping()


def test_a_client_that_shall_not_reconnect(daemon: ScriptedDaemon) -> None:
    with Client(daemon.path, reconnect=False) as client:
        client.ping()
        daemon.stop()
        daemon.start()
        with pytest.raises(errors.ConnectionLost):
            client.ping()
    assert len(daemon.connections) == 1


def test_a_connection_closed_before_its_first_use_is_replaced_in_any_case(daemon: ScriptedDaemon) -> None:
    with Client(daemon.path, reconnect=False, timeout_s=PATIENCE_S) as client:
        daemon.connection().drop()
        assert daemon.connection().ended.wait(PATIENCE_S)
        client.ping()
        assert client.connect() == daemon.hello


# --- streams ------------------------------------------------------------------------------------------------------


def test_a_stream_is_an_iterator_of_text(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("chat", talk("Good ", "", "day."))
    with client.stream_chat("hello", temperature=0) as stream:
        assert list(stream) == ["Good ", "day."]
        assert stream.result.text == "Good day."
    assert daemon.connection().requests("chat")[0]["params"]["stream"] is True
    assert daemon.connection().requests("cancel") == []
    assert client.stream_chat("again").wait().text == "Good day."


def test_the_pieces_of_a_stream_hold_its_phases(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("process", talk("a"))
    pieces = list(client.stream_process("x").pieces())
    assert [(piece.phase, piece.text) for piece in pieces] == [("prompt", None), (None, "a")]


def test_leaving_a_stream_early_cancels_it(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("chat", stalled)
    with client.stream_chat("hello") as stream:
        for piece in stream:
            assert piece == "one"
            with pytest.raises(RuntimeError):
                _ = stream.result
            break
    assert daemon.connection().cancel_of(stream.request_id).is_set()
    with pytest.raises(errors.Cancelled):
        _ = stream.result
    assert list(stream) == []
    stream.close()
    assert len(daemon.connection().requests("cancel")) == 1


def test_a_stream_that_nobody_holds_is_cancelled(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("chat", stalled)
    stream = client.stream_chat("hello")
    id = stream.request_id
    del stream
    assert daemon.connection().cancel_of(id).wait(PATIENCE_S)
    client.ping()


def test_a_stream_that_nobody_reads_is_still_taken_from_the_socket(daemon: ScriptedDaemon, client: Client) -> None:
    """More than fits the socket's buffers: the daemon's writes block until someone reads."""
    count, wrote = 5_000, threading.Event()

    def pour(connection: Connection, request: dict[str, Any]) -> Any:
        for seq in range(count):
            connection.stream(request["id"], seq, text="x" * 100)
        wrote.set()
        return completion("end")

    daemon.on("chat", pour)
    with client.stream_chat("hello") as stream:
        assert wrote.wait(PATIENCE_S)
        assert sum(map(len, stream)) == count * 100


def test_a_stream_that_fails_raises_from_its_iteration(daemon: ScriptedDaemon, client: Client) -> None:
    def die(connection: Connection, request: dict[str, Any]) -> Any:
        connection.stream(request["id"], 0, text="one")
        raise errors.WorkerDied("killed", cause="signal")

    daemon.on("chat", die)
    with client.stream_chat("hello") as stream, pytest.raises(errors.WorkerDied):
        list(stream)
    with pytest.raises(errors.WorkerDied):
        _ = stream.result


def test_a_stream_on_a_lost_connection(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("chat", stalled)
    with client.stream_chat("hello") as stream:
        pieces = iter(stream)
        assert next(pieces) == "one"
        daemon.connection().drop()
        with pytest.raises(errors.ConnectionLost):
            next(pieces)


def test_a_silent_stream_times_out_and_is_cancelled(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("chat", stalled)
    with client.stream_chat("hello", wait_s=0.05) as stream, pytest.raises(errors.RequestTimeout):
        list(stream)
    assert daemon.connection().cancel_of(stream.request_id).wait(PATIENCE_S)
    client.ping()


def test_streams_and_calls_share_a_connection(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("chat", talk(*[f"{number} " for number in range(200)]))
    expected = "".join(f"{number} " for number in range(200))
    threads = [Thread(lambda: "".join(client.stream_chat("x"))) for _ in range(4)]
    for _ in range(20):
        client.ping()
    assert [thread.get() for thread in threads] == [expected] * 4
    assert len(daemon.connections) == 1


# --- leases -------------------------------------------------------------------------------------------------------


def test_a_lease_is_released_once(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("models.acquire", types.Lease(lease="l1", model=model()))
    daemon.on("models.release", {})
    with client.acquire("org/m") as lease:
        assert lease.held
        assert lease.model.id == "org/m"
    assert not lease.held
    lease.release()
    assert [m["params"] for m in daemon.connection().requests("models.release")] == [{"lease": "l1"}]


def test_a_lease_ends_with_its_connection(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("models.acquire", types.Lease(lease="l1", model=model()))
    with client.acquire("org/m") as lease:
        daemon.connection().drop()
        client.ping()
        assert not lease.held
    assert daemon.connections[1].requests("models.release") == []


# --- events -------------------------------------------------------------------------------------------------------


def subscribed(epoch: str, rev: int, **fields: Any) -> types.SubscribeResult:
    return types.SubscribeResult(subscription=1, epoch=epoch, rev=rev, **fields)


def test_events_have_their_own_connection_and_a_snapshot(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("events.subscribe", subscribed("e1", 5, snapshot=types.Snapshot(models=[model()])))
    client.ping()
    with client.events(topics=["models"], models=["org/m"]) as events:
        assert (events.epoch, events.rev) == ("e1", 5)
        assert events.snapshot == types.Snapshot(models=[model()])
        connection = daemon.connection(1)
        assert connection.requests("events.subscribe")[0]["params"] == {"topics": ["models"], "models": ["org/m"]}
        connection.event(6, "loading_started", model_id="org/m")
        assert next(events).name == "loading_started"
        assert events.rev == 6
        with pytest.raises(errors.RequestTimeout):
            events.get(wait_s=0.01)
        connection.event(7, "unloaded")
        assert next(events).rev == 7


def test_events_survive_a_reconnect_without_loss_or_repetition(daemon: ScriptedDaemon, client: Client) -> None:
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
    with client.events() as events:
        assert [next(events).rev for _ in log] == log


def test_a_restarted_daemon_begins_anew_with_resync(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("events.subscribe", subscribed("e1", 5, snapshot=types.Snapshot()))
    with client.events() as events:
        daemon.stop()
        fresh = types.Snapshot(models=[model()])
        daemon.on("events.subscribe", subscribed("e2", 1, snapshot=fresh, resync=True))
        daemon.start()
        event = next(events)
        assert (event.name, event.snapshot, events.snapshot, events.epoch) == ("resync", fresh, fresh, "e2")
        assert daemon.connection(2).requests("events.subscribe")[0]["params"]["since"] == {"epoch": "e1", "rev": 5}


def test_a_daemon_that_goes_while_events_are_asked_for_is_followed(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("events.subscribe", leaves_twice(subscribed("e1", 1, snapshot=types.Snapshot(models=[model()]))))
    with client.events() as events:
        assert events.snapshot == types.Snapshot(models=[model()])
    assert daemon.asked("events.subscribe") == 3


def drop(connection: Connection, _: dict[str, Any]) -> Any:
    connection.drop()
    return NOTHING


def refuse(error: errors.RpcError) -> Callable[[Connection, dict[str, Any]], Any]:
    def reply(*_: Any) -> Any:
        raise error

    return reply


@pytest.mark.parametrize(
    ("reply", "reconnect", "asked"),
    [
        (drop, True, MOST_MOVES),
        (drop, False, 1),
        (refuse(errors.ShuttingDown("another comes", reconnect=True)), True, MOST_MOVES),
        (refuse(errors.ShuttingDown("another comes", reconnect=True)), False, 1),
        (refuse(errors.ShuttingDown("it ends")), True, 1),
    ],
)
def test_events_are_not_asked_for_without_end(daemon: ScriptedDaemon, reply: Any, reconnect: bool, asked: int) -> None:
    daemon.on("events.subscribe", reply)
    with (
        Client(daemon.path, reconnect=reconnect) as client,
        pytest.raises((errors.ConnectionLost, errors.ShuttingDown)),
    ):
        client.events()
    assert daemon.asked("events.subscribe") == asked


def test_a_position_from_an_earlier_run_is_resumed_or_announced(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("events.subscribe", subscribed("e0", 3))
    with client.events(since=("e0", 3)) as events:
        assert events.snapshot is None
    daemon.on("events.subscribe", subscribed("e1", 9, snapshot=types.Snapshot(), resync=True))
    with client.events(since=("e0", 3)) as events:
        assert next(events).name == "resync"


def test_wrong_topics_are_raised(daemon: ScriptedDaemon, client: Client) -> None:
    def refuse(*_: Any) -> Any:
        raise errors.InvalidParams("no such topic", field="topics")

    daemon.on("events.subscribe", refuse)
    with pytest.raises(errors.InvalidParams):
        client.events(topics=["nonsense"])
    assert daemon.connection(1).ended.wait(PATIENCE_S)


def test_closing_ends_an_iteration_in_another_thread(daemon: ScriptedDaemon, client: Client) -> None:
    daemon.on("events.subscribe", subscribed("e1", 0, snapshot=types.Snapshot()))
    events = client.events()
    began = threading.Event()

    def read() -> list[int]:
        began.set()
        return [event.rev for event in events]

    thread = Thread(read)
    assert began.wait(PATIENCE_S)
    daemon.connection(1).event(1, "queue")
    events.close()
    assert thread.get() in ([], [1])


# --- starting the daemon ------------------------------------------------------------------------------------------

SERVE = """
import sys
sys.path[:0] = {path!r}
from support.scripted_daemon import ScriptedDaemon
import os, threading
try:
    daemon = ScriptedDaemon(os.environ["MLXD_SOCKET"]).start()
except OSError:
    sys.exit(3)
daemon.on("shutdown", lambda *_: os._exit(0))
threading.Event().wait({life})
"""


def serving(life: float = 60.0) -> list[str]:
    return [sys.executable, "-c", SERVE.format(path=sys.path, life=life)]


def test_one_that_another_keeps_from_starting_is_started_again(path: str, tmp_path: Path) -> None:
    """As where the other one is about to end, and listens no more."""
    told = tmp_path / "refused"
    refused_once = f"import os, sys\nif not os.path.exists({str(told)!r}): open({str(told)!r}, 'x'); sys.exit(8)\n"
    command = [sys.executable, "-c", refused_once + serving()[-1]]
    with Client(path, start=command, timeout_s=PATIENCE_S) as client:
        client.ping()
        assert told.exists()
        with pytest.raises(errors.ConnectionLost):
            client.shutdown()


def test_a_daemon_is_started_on_demand_detached(path: str) -> None:
    with Client(path, start=serving(), timeout_s=PATIENCE_S) as client:
        client.ping()
        with pytest.raises(errors.ConnectionLost):
            client.shutdown()


def test_two_clients_may_start_it_at_once(path: str) -> None:
    def ask() -> Client:
        client = Client(path, start=serving(), timeout_s=PATIENCE_S)
        client.ping()
        return client

    one, two = [thread.get() for thread in [Thread(ask), Thread(ask)]]
    with pytest.raises(errors.ConnectionLost):
        one.shutdown()
    one.close()
    two.close()


def test_a_function_may_start_it(path: str) -> None:
    daemon = ScriptedDaemon(path)
    with Client(path, start=daemon.start, timeout_s=PATIENCE_S) as client:
        client.ping()
    daemon.stop()


def test_a_daemon_that_ends_at_once_is_reported(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "_AFTER_EXIT_S", 0.0)
    with pytest.raises(errors.ConnectFailed, match="ended with exit code 78"):
        Client(path, start=[sys.executable, "-c", "raise SystemExit(78)"]).ping()


def test_a_daemon_that_ends_at_once_has_its_last_words_told(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "_AFTER_EXIT_S", 0.0)
    wrong = "import sys; print('more', 'mlxd: the folder is gone', sep=chr(10), file=sys.stderr); sys.exit(2)"
    with pytest.raises(errors.ConnectFailed, match=r"ended with exit code 2: the folder is gone$"):
        Client(path, start=[sys.executable, "-c", wrong]).ping()


def test_a_daemon_that_never_listens_is_reported(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "START_DEADLINE_S", 0.0)
    with pytest.raises(errors.ConnectFailed, match="did not listen"):
        Client(path, start=[sys.executable, "-c", "import time; time.sleep(5)"]).ping()


def test_a_command_that_is_not_there(path: str) -> None:
    with pytest.raises(errors.ConnectFailed, match="cannot start"):
        Client(path, start=["/no/such/mlxd"]).ping()


def test_backoff_is_bounded_and_starts_over() -> None:
    backoff = connect.Backoff(1.0, 3.0, draw=lambda: 1.0)
    assert [backoff.next_s() for _ in range(4)] == [1.0, 2.0, 3.0, 3.0]
    backoff.reset()
    assert backoff.next_s() == 1.0
    assert connect.Backoff(1.0, draw=lambda: 0.0).next_s() == 0.0


# --- what it costs to import --------------------------------------------------------------------------------------


def test_the_blocking_client_imports_no_asyncio() -> None:
    code = (
        "import sys, mlxd_client, mlxd_client.sync; print(*[m for m in ('asyncio','subprocess') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = "import sys, mlxd_client; print(*[m for m in ('asyncio', 'msgspec', 'json') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there() -> None:
    import mlxd_client

    assert all(getattr(mlxd_client, name) is not None for name in mlxd_client.__all__)
    assert set(mlxd_client.__all__) <= set(dir(mlxd_client))
    with pytest.raises(AttributeError):
        _ = mlxd_client.nonsense  # type: ignore[attr-defined]
