"""Requests that nobody wants any more: cancelled, abandoned, or of clients that behave badly. The others go on."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from mlxd_client import Client, errors
from mlxd_client.codec import encode
from mlxd_client.sync import EventStream
from support.daemon import Daemon, active, until

CLEANUP = "mlxd/cleanup"


@pytest.fixture
def stepped() -> Iterator[tuple[Daemon, Client, EventStream]]:
    """A daemon whose generations go on as the test lets them, with one model loaded, and its events from now on."""
    with Daemon(bad_child="worker", steps=True, max_batch=2) as daemon, daemon.client() as client:
        client.load(CLEANUP)
        with client.events() as events:
            yield daemon, client, events


def bare(daemon: Daemon, *messages: dict) -> socket.socket:
    """A connection that sent these requests, by a client without manners."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(60)
    sock.connect(str(daemon.socket))
    for number, message in enumerate(messages, 1):
        sock.sendall(encode({"jsonrpc": "2.0", "id": number} | message))
    return sock


SLOW = {"method": "process", "params": {"prompt": "!slow 9", "stream": True}}


def test_cancel_frees_the_slot_and_disturbs_nobody(stepped) -> None:
    daemon, client, events = stepped
    with client.stream_process("!slow 3") as kept, client.stream_process("!slow 9") as given_up:
        waits = client.stream_process("!slow 3")  # the batch holds two
        active(events, 2, 1)
        daemon.step(0)
        assert next(iter(given_up)) == "piece0"
        assert client.cancel(given_up.request_id)
        with pytest.raises(errors.Cancelled) as caught:
            given_up.wait()
        assert caught.value.code == -32800
        assert caught.value.details["text"] == "piece0"
        active(events, 2)  # the one that waited has its place
        daemon.step(1, 2)
        assert kept.wait().text == waits.wait().text == "piece0 piece1 piece2"
        assert not client.cancel(given_up.request_id), "it has ended"
        assert not client.cancel(99_999)


def test_closing_a_stream_cancels_it(stepped) -> None:
    daemon, client, events = stepped
    with client.stream_process("!slow 9") as stream:
        daemon.step(0)
        next(iter(stream))
    active(events, 0)
    with pytest.raises(errors.Cancelled):
        stream.result  # noqa: B018


def test_a_waiting_request_is_cancelled_at_once(stepped) -> None:
    _daemon, client, events = stepped
    running = [client.stream_process("!slow 1") for _ in range(2)]
    waiting = client.stream_process("!slow 1")
    active(events, 2, 1)
    waiting.close()
    active(events, 2, 0)
    assert client.status().queue.running == 2
    for stream in running:
        stream.close()
    active(events, 0)


def test_a_client_that_vanishes_takes_its_requests_along(stepped) -> None:
    daemon, client, events = stepped
    with client.stream_process("!slow 2") as kept:
        sock = bare(daemon, SLOW, SLOW, SLOW)
        active(events, 2, 2)
        daemon.step(0)
        sock.close()
        active(events, 1)
        daemon.step(1)
        assert kept.wait().text == "piece0 piece1"
    active(events, 0)
    assert client.status().queue.waiting == 0


def test_a_client_that_vanishes_while_its_model_loads() -> None:
    """Its request goes at once; the load goes on for whoever comes next, and ends by itself when nobody does."""
    with (
        Daemon(bad_child="late", steps=True, keep_alive_s=0.2) as daemon,
        daemon.client() as client,
        client.events() as events,
    ):
        sock = bare(daemon, SLOW, {"method": "models.acquire", "params": {"model": CLEANUP}})
        active(events, 0, 1)
        sock.close()
        active(events, 0, 0)
        daemon.step(0)
        until(events, "loading_completed")
        until(events, "unloaded")
        assert client.model(CLEANUP).leases == 0


def test_a_client_that_never_reads_is_cut_off_and_slows_nobody() -> None:
    with Daemon(bad_child="worker", write_stall_s=0.5) as daemon, daemon.client() as client:
        client.load(CLEANUP)
        with client.events() as events:
            long = {"method": "process", "params": {"prompt": f"{'x' * 50_000} {'y' * 50_000}", "stream": True}}
            sock = bare(daemon)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(b"".join(encode({"jsonrpc": "2.0", "id": number} | long) for number in range(20)))
            assert client.process("others go on").text == "others go on"
            while client.status().clients > 2:  # this client and its events; woken by whatever is told
                events.get(60)
                client.process("more")
            sock.close()
            assert client.status().queue.running == 0


def test_a_client_that_says_nothing_costs_nothing(stepped) -> None:
    daemon, client, _events = stepped
    silent = [bare(daemon) for _ in range(5)]
    assert client.process("hello").text == "hello"
    for sock in silent:
        sock.close()
    assert client.process("hello").text == "hello"


def test_cancel_while_the_model_loads() -> None:
    with Daemon(bad_child="late", steps=True) as daemon, daemon.client() as client, client.events() as events:
        stream = client.stream_process("hello")
        until(events, "loading_started")
        stream.close()
        active(events, 0, 0)
        daemon.step(0)
        until(events, "loading_completed")
        assert client.status().queue.waiting == 0
        assert client.process("hello").text == "hello"


def test_forty_clients_at_once_of_every_kind() -> None:
    """Readers, quitters, cancellers, silent ones and talkers of nonsense; in the end the daemon is as before."""
    with Daemon(bad_child="worker", max_batch=4) as daemon, daemon.client() as client:
        client.load(CLEANUP)
        readers = [daemon.client().__enter__() for _ in range(16)]
        streams = [reader.stream_process(f"!slow {3 + n % 5}") for n, reader in enumerate(readers)]
        quitters = [bare(daemon, SLOW) for _ in range(8)]
        silent = [bare(daemon) for _ in range(8)]
        noise = [bare(daemon) for _ in range(8)]
        for sock in noise:
            sock.sendall(b"\xff\xff\xff\xffno frame at all")
        for sock in quitters:
            sock.close()
        for stream in streams[::4]:
            stream.close()
        for n, stream in enumerate(streams):
            if n % 4:
                assert stream.wait().usage.completion_tokens == 3 + n % 5
        with client.events() as events:
            while client.status().queue.running or client.status().queue.waiting:
                events.get(60)
        for sock in noise:
            while sock.recv(65_536):
                pass
        for each in (*readers, *silent, *noise):
            each.close()
        assert client.process("all is well").text == "all is well"
