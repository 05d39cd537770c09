"""Forty clients whose answers are whole and right, while others send garbage and what no request may ask."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxd_client import Client, errors
from support import tiny_model
from support.daemon import PATIENCE_S, Daemon

pytestmark = pytest.mark.model

CLIENTS, EACH = 40, 3
GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 12}
PROMPTS = [f"{text} {number}" for number in range(4) for text in ("the quick brown fox", "meet on monday at", "hello")]
HOSTILE: list[dict[str, Any]] = [
    {"max_tokens": -1}, {"temperature": float("inf")}, {"temperature": "hot"}, {"schema": {"type": "nonsense"}},
    {"schema": {"$ref": "#/nowhere"}}, {"grammar": "start: ("}, {"stop": [""]}, {"logit_bias": {"x": 1}},
    {"logit_bias": {"99999999": 1}}, {"n": 17}, {"adapter": "/nowhere"}, {"messages": []}, {"nonsense": 1},
    {"messages": [{"role": "wizard", "content": "x"}]}, {"messages": [{"role": "user", "content": "x" * 60_000}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.build(tmp_path_factory.mktemp("models").resolve() / "tiny"))


class Crowd:
    """Threads that do something until they are told that it is over; what goes wrong in one is raised in the end."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.wrong: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def start(self, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.wrong.append(error)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()
        return self._threads[-1]

    def end(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        assert not self.wrong, self.wrong[:3]


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    crowd = Crowd()
    yield crowd
    crowd.over.set()


def ask(client: Client, model: str, prompt: str, *, stream: bool) -> str:
    turns = [{"role": "user", "content": prompt}]
    if not stream:
        return client.chat(turns, model=model, **GREEDY).text
    with client.stream_chat(turns, model=model, **GREEDY) as answer:
        pieces = "".join(answer)
        assert pieces == answer.wait().text
        return pieces


def test_forty_are_answered_rightly_among_garbage(model: str, crowd: Crowd, tmp_path: Path) -> None:
    garbage, refused = 0, 0
    with Daemon(max_batch=16) as daemon:
        with daemon.client() as client:
            known = {prompt: ask(client, model, prompt, stream=False) for prompt in PROMPTS}

        def one(number: int) -> None:
            draw = random.Random(number)
            with daemon.client() as client:
                for _ in range(EACH):
                    prompt = draw.choice(PROMPTS)
                    assert ask(client, model, prompt, stream=draw.random() < 0.5) == known[prompt], prompt

        def babble() -> None:
            nonlocal garbage
            draw = random.Random(0)
            while not crowd.over.wait(0.02):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                    sock.connect(str(daemon.socket))
                    sock.sendall(draw.choice((b"", b"{", b"\x00\x00\x01\x00")) + draw.randbytes(200))
                    garbage += 1

        def provoke() -> None:
            nonlocal refused
            with daemon.client() as client:
                while not crowd.over.is_set() or refused < len(HOSTILE):
                    params = {"model": model, "messages": [{"role": "user", "content": "x"}]}
                    with pytest.raises(errors.RpcError) as error:
                        client.call("chat", params | HOSTILE[refused % len(HOSTILE)])
                    assert not isinstance(error.value, errors.InternalError | errors.WorkerDied), error.value
                    refused += 1

        crowd.start(babble)
        crowd.start(provoke)
        for thread in [crowd.start(lambda number=number: one(number)) for number in range(CLIENTS)]:  # type: ignore[misc]
            thread.join(PATIENCE_S)
        crowd.end()
        assert garbage > 5
        with daemon.client() as client:
            status = client.status()
            assert (status.queue.running, status.queue.waiting, status.workers) == (0, 0, [])
