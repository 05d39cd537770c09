"""Real text from the built-in model through a real daemon: what streams is what is answered, whoever asks and how."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlxd_client import Client, errors
from mlxd_client.codec import Decoder, encode
from mlxd_client.sync import EventStream, Stream
from mlxd_client.types import Completion
from support.daemon import PATIENCE_S, Daemon, until

pytestmark = pytest.mark.model

SAID = [
    "um so i think we should uh meet on monday at three pm no sorry four pm",
    "can you uh can you send me the the report by friday",
    "the price is twenty five dollars and and fifty cents",
    "uh well lets see i guess its fine",
    "my email is jane dot doe at example dot com",
    "we need two no three more chairs for the meeting room",
    "i i really like this new keyboard you know",
    "please call me back tomorrow morning at nine thirty",
]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as one, one.client() as client:
        client.load("mlxd/cleanup", keep_alive=-1)
        yield one


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as one:
        yield one


def assert_sane(made: Completion) -> None:
    assert made.finish_reason in ("stop", "length")
    assert made.usage.prompt_tokens > 0
    assert made.usage.completion_tokens > 0
    times = made.timings
    assert times.queue_s >= 0
    assert times.load_s >= 0
    assert 0 < times.prompt_s <= times.first_token_s <= times.total_s
    assert 0 <= times.decode_s < times.total_s


def test_what_streams_is_what_is_answered(client: Client) -> None:
    with client.stream_process(SAID[0], temperature=0) as stream:
        pieces = list(stream.pieces())
        made = stream.result
    text = "".join(piece.text or "" for piece in pieces)
    assert text == made.text == client.process(SAID[0], temperature=0).text
    assert [piece.seq for piece in pieces] == list(range(len(pieces)))
    assert sum(bool(piece.text) for piece in pieces) > 3, "it came in one piece"
    assert_sane(made)
    assert made.usage.completion_tokens >= sum(bool(piece.text) for piece in pieces)


def test_eight_clients_at_once_get_what_each_gets_alone(daemon: Daemon, client: Client) -> None:
    alone = [client.process(text, temperature=0).text for text in SAID]
    clients = [daemon.client().__enter__() for _ in SAID]
    with ThreadPoolExecutor(len(SAID)) as pool, client.events() as events:
        made = list(pool.map(lambda each: each[0].process(each[1], temperature=0), zip(clients, SAID, strict=True)))
        together = max(e.model.active for e in until(events, "queue", active=0) if e.model is not None)
    assert [one.text for one in made] == alone
    assert together > 1, "they were not served together"
    for one in made:
        assert_sane(one)
    for one in clients:
        one.close()


def test_a_seed_gives_the_same_text_amid_other_traffic(client: Client) -> None:
    seeded = {"seed": 11, "temperature": 4.0, "top_p": 1.0, "max_tokens": 24}  # hot enough for a model that is sure
    alone = client.process(SAID[4], **seeded).text
    others = [client.stream_process(text, temperature=1.5) for text in SAID[:4]]
    assert client.process(SAID[4], **seeded).text == alone
    for other in others:
        other.close()
    assert client.process(SAID[4], **seeded | {"seed": 12}).text != alone


def test_json_lines_by_a_bare_socket(daemon: Daemon, client: Client) -> None:
    """As a shell script has it: a line in, end of input, lines out, end of output."""
    params = {"prompt": SAID[1], "temperature": 0, "stream": True}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(daemon.socket))
        sock.sendall(json.dumps({"jsonrpc": "2.0", "id": "a", "method": "process", "params": params}).encode() + b"\n")
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("r", encoding="utf-8") as file:
            *stream, last = [json.loads(line) for line in file]
    assert last["id"] == "a"
    assert "".join(message["params"].get("text", "") for message in stream) == last["result"]["text"]
    assert last["result"]["text"] == client.process(SAID[1], temperature=0).text


def test_pipelined_msgpack_requests_are_all_answered(daemon: Daemon, client: Client) -> None:
    """Forty requests in one write: each is answered once, with its own text."""
    wanted = {n: client.process(SAID[n % 4], temperature=0, max_tokens=8).text for n in range(4)}
    requests = [
        {"jsonrpc": "2.0", "id": n, "method": "process",
         "params": {"prompt": SAID[n % 4], "temperature": 0, "max_tokens": 8}}
        for n in range(40)
    ]  # fmt: skip
    answers: dict[int, str] = {}
    decoder = Decoder()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(daemon.socket))
        sock.sendall(b"".join(encode(request) for request in requests))
        while len(answers) < len(requests):
            decoder.feed(sock.recv(65_536))
            for message in decoder:
                assert isinstance(message, dict)
                assert message["id"] not in answers
                answers[message["id"]] = message["result"]["text"]
    assert answers == {n: wanted[n % 4] for n in range(40)}


def test_deadlines_that_are_over_at_once_are_kept_one_by_one(daemon: Daemon, client: Client) -> None:
    """Each is due before the loop turns, while the next request is read already."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(daemon.socket))
        params = {"prompt": SAID[0], "timeout_s": 1e-6}
        requests = [{"jsonrpc": "2.0", "id": n, "method": "process", "params": params} for n in range(20)]
        sock.sendall(b"".join(encode(request) for request in requests))
        decoder, kinds = Decoder(), []
        while len(kinds) < len(requests):
            decoder.feed(sock.recv(65_536))
            kinds += [message["error"]["data"]["kind"] for message in decoder]
    assert set(kinds) == {"deadline_exceeded"}
    assert client.process(SAID[1], temperature=0).text


def test_stopping_in_the_middle_leaves_the_others_alone(client: Client) -> None:
    alone = client.process(SAID[6], temperature=0).text
    long = client.stream_chat("Tell me everything.", max_tokens=2000, temperature=5.0, top_p=1.0)
    next(iter(long))
    kept = client.stream_process(SAID[6], temperature=0)
    long.close()
    with pytest.raises(errors.Cancelled):
        long.wait()
    assert kept.wait().text == alone


def test_limits_of_the_context(client: Client) -> None:
    context = client.model("mlxd/cleanup").context_length
    assert context is not None
    with pytest.raises(errors.ContextExceeded) as caught:
        client.process("word " * context)
    assert caught.value.details["context_length"] == context
    assert caught.value.details["prompt_tokens"] >= context
    with pytest.raises(errors.ContextExceeded):
        client.process("x" * 15_000_000)
    with pytest.raises(errors.ContextExceeded):
        client.process("x" * (16 * 1024 * 1024 - 80))  # all that a frame can hold
    words = 1
    while client.count_tokens(messages="hello " * 2 * words) < context:
        words *= 2
    most = client.process("hello " * words, max_tokens=1_000_000, temperature=5.0, top_p=1.0, stop=["e"])
    assert context // 4 < most.usage.prompt_tokens < context
    assert most.usage.prompt_tokens + most.usage.completion_tokens <= context
    assert client.status().workers == [], "no worker died of it"


def test_tokens_are_the_models_own(client: Client) -> None:
    assert client.count_tokens("") == 0
    assert client.count_tokens("hello there") >= 2
    made = client.chat("hello there", max_tokens=1)
    assert made.usage.prompt_tokens == client.count_tokens(messages="hello there")
    assert (made.usage.completion_tokens, made.finish_reason) == (1, "length")


def test_a_real_worker_killed_at_any_moment() -> None:
    """Idle, decoding, while it reads a prompt, while it loads: each time it is told at once, and the next one works."""
    with Daemon() as daemon, daemon.client() as client, client.events() as events:
        client.load("mlxd/cleanup")
        kill_worker(daemon, events)
        stream = client.stream_process(SAID[0], max_tokens=2000, logit_bias={"0": -1000})  # without an end
        next(iter(stream))
        kill_worker(daemon, events, stream)
        model = client.load("mlxd/cleanup")
        stream = client.stream_process("a " * ((model.context_length or 0) // 3))
        until(events, "generation_started")
        kill_worker(daemon, events, stream)
        stream = client.stream_process(SAID[0])
        until(events, "loading_started")
        kill_worker(daemon, events, stream)
        client.load("mlxd/cleanup")
        assert client.process(SAID[7], temperature=0).text


def kill_worker(daemon: Daemon, events: EventStream, stream: Stream | None = None) -> None:
    killed_at = time.monotonic()
    daemon.worker().send_signal(signal.SIGKILL)
    if stream is not None:
        with pytest.raises(errors.WorkerDied) as caught:
            stream.wait()
        assert time.monotonic() - killed_at < 1.0
        assert caught.value.details["signal"] == "SIGKILL"
    died = until(events, "worker_died")[-1]
    assert died.model is not None
    assert died.model.state == "Downloaded"
