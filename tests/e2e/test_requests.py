"""What one request can ask, through a real daemon: several answers, shortened conversations, tokens, vectors."""

from __future__ import annotations

import array
import asyncio
import base64
import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxd_client import AsyncClient, Client, errors
from mlxd_client.types import EmbedResult
from support import tiny_model
from support.daemon import PATIENCE_S, Daemon, until
from support.hub import Hub, model_files

pytestmark = pytest.mark.model

DRAWN: dict[str, Any] = {"temperature": 1.5, "top_p": 1.0, "seed": 3, "max_tokens": 12}
SHORT = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.build(tmp_path_factory.mktemp("models") / "tiny").resolve())


@pytest.fixture(scope="module")
def daemon(model: str) -> Iterator[Daemon]:
    with Daemon(default_model=model, context_length=json.dumps({"mlxd/cleanup": SHORT})) as one, one.client() as client:
        client.load(model, keep_alive=-1)
        yield one


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as one:
        yield one


# --- several answers ------------------------------------------------------------------------------------------------


def test_several_answers_stream_beside_each_other_and_are_answered_together(client: Client) -> None:
    alone = client.chat("hello", **DRAWN)
    with client.stream_chat("hello", n=4, **DRAWN) as stream:
        pieces = list(stream.pieces())
        made = stream.result
    assert made.alternatives is not None
    texts = [made.text, *(answer.text for answer in made.alternatives)]
    for index, text in enumerate(texts):
        assert "".join(piece.text or "" for piece in pieces if piece.index == index) == text
    assert [piece.seq for piece in pieces] == list(range(len(pieces)))
    assert made.text == alone.text
    assert len(set(texts)) == 4
    assert made.usage.prompt_tokens == alone.usage.prompt_tokens
    ours = alone.usage.completion_tokens
    assert made.usage.completion_tokens == ours + sum(answer.completion_tokens for answer in made.alternatives)
    assert client.chat("hello", **DRAWN).alternatives is None


def test_the_text_of_a_stream_is_the_first_answers(daemon: Daemon, client: Client) -> None:
    with client.stream_chat("hello", n=3, **DRAWN) as stream:
        assert "".join(stream) == stream.result.text

    async def main() -> None:
        async with AsyncClient(daemon.socket) as other, other.stream_chat("hello", n=3, **DRAWN) as stream:
            assert "".join([text async for text in stream]) == stream.result.text

    asyncio.run(main())


def test_cancelling_ends_all_answers(client: Client) -> None:
    with client.events() as events:
        with client.stream_chat("hello", n=4, temperature=1.0, max_tokens=400) as stream:
            next(stream.pieces())
        with pytest.raises(errors.Cancelled):
            _ = stream.result
        until(events, "queue", active=0)
    assert client.chat("hello", **DRAWN).usage.completion_tokens > 0


# --- conversations that are too long --------------------------------------------------------------------------------


def test_old_messages_are_dropped_and_said_to_be(client: Client) -> None:
    turns = [{"role": "system", "content": "the rules"}]
    for number in range(60):
        turns += [{"role": "user", "content": f"word {number}"}, {"role": "assistant", "content": "yes"}]
    turns.append({"role": "user", "content": "last"})
    with pytest.raises(errors.ContextExceeded) as caught:
        client.chat(turns, max_tokens=5)
    assert caught.value.details["prompt_tokens"] >= caught.value.details["context_length"] == 512
    made = client.chat(turns, context_policy="drop_oldest", max_tokens=5)
    assert 0 < made.dropped_messages < 120
    assert made.usage.prompt_tokens <= 507


def test_a_setting_shortens_a_models_context(client: Client) -> None:
    assert client.model("mlxd/cleanup").context_length == SHORT
    with pytest.raises(errors.ContextExceeded) as caught:
        client.process("word " * 200, model="mlxd/cleanup")
    assert caught.value.details["context_length"] == SHORT
    assert caught.value.details["prompt_tokens"] >= SHORT
    made = client.process("word " * 20, model="mlxd/cleanup", max_tokens=1000)
    assert made.usage.prompt_tokens + made.usage.completion_tokens <= SHORT
    assert client.model("mlxd/cleanup").context_length == SHORT


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "hello there", "Grüße 你好 😀", "<|im_start|>user\n", "\x00\x07 tab\t"])
def test_texts_become_tokens_and_come_back(client: Client, text: str) -> None:
    made = client.encode_tokens(text, pieces=True)
    assert client.decode_tokens(made.tokens) == text
    assert len(made.tokens) == client.count_tokens(text)
    assert made.pieces is not None
    assert len(made.pieces) == len(made.tokens)
    assert client.encode_tokens(text).pieces is None
    if text.isascii():
        assert "".join(made.pieces) == text


def test_many_tokens_at_once_and_too_many(client: Client) -> None:
    many = client.encode_tokens("a" * 100_000).tokens
    assert client.decode_tokens(many) == "a" * 100_000
    with pytest.raises(errors.InvalidParams) as caught:
        client.encode_tokens("😺" * 50_000)
    assert caught.value.details["tokens"] == 150_000
    assert caught.value.details["limit"] < 150_000
    with pytest.raises(errors.InvalidParams):
        client.encode_tokens("x" * 2_000_001)


@pytest.mark.parametrize(
    ("tokens", "field"),
    [([1, 400], "tokens[1]"), ([2**31], "tokens[0]"), ([-1], "tokens[0]"), (["x"], "tokens[0]"),
     ([True], "tokens[0]"), ("x", "tokens"), ([1] * 120_001, "tokens")],
)  # fmt: skip
def test_tokens_that_are_none_are_named(client: Client, tokens: Any, field: str) -> None:
    with pytest.raises(errors.InvalidParams) as caught:
        client.call("tokens.decode", {"tokens": tokens})
    assert caught.value.details["field"] == field
    assert client.decode_tokens([1]) != ""


# --- vectors --------------------------------------------------------------------------------------------------------


def close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 2e-5 for a, b in zip(one, other, strict=True))


def test_vectors_come_as_lists_and_as_base64(daemon: Daemon, client: Client) -> None:
    texts = ["hello", "the quick brown fox", "a"]
    made = client.embed(texts)
    assert made.usage.prompt_tokens == sum(client.count_tokens(text) for text in texts)
    assert [len(vector) for vector in made.vectors] == [64] * 3 == [made.dimensions] * 3
    assert all(math.isclose(sum(x * x for x in vector), 1, abs_tol=1e-5) for vector in made.vectors)
    for text, vector in zip(texts, made.vectors, strict=True):
        assert close(client.embed(text).vectors[0], vector)
    lists = client.call("embed", {"input": texts, "encoding": "float"}, EmbedResult)
    assert [array.array("f", vector).tolist() for vector in lists.vectors] == lists.vectors
    raw = client.call("embed", {"input": texts, "encoding": "base64"}, EmbedResult)
    for text, vector, other in zip(raw.base64, made.vectors, lists.vectors, strict=True):
        assert close(array.array("f", base64.b64decode(text)).tolist(), vector)
        assert close(other, vector)

    async def main() -> None:
        async with AsyncClient(daemon.socket) as other:
            assert close(
                (await other.embed(texts, dimensions=8)).vectors[1], client.embed(texts, dimensions=8).vectors[1]
            )

    asyncio.run(main())


def test_vectors_over_json_lines(daemon: Daemon, client: Client) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(PATIENCE_S)
        raw.connect(str(daemon.socket))
        raw.sendall(b'{"jsonrpc":"2.0","id":1,"method":"embed","params":{"input":["hello"]}}\n')
        answer = json.loads(raw.makefile("rb").readline())
    assert close(answer["result"]["vectors"][0], client.embed("hello").vectors[0])


def test_many_vectors_and_too_many(client: Client) -> None:
    made = client.embed(["a"] * 2048)
    assert len(made.vectors) == 2048
    assert made.vectors[0] == pytest.approx(
        made.vectors[2047], rel=1e-5, abs=1e-6
    )  # of another pass, on more or fewer threads
    with pytest.raises(errors.InvalidParams) as caught:
        client.call("embed", {"input": ["a"] * 2048})
    assert caught.value.details["field"] == "input"
    assert 1000 < caught.value.details["limit"] < 2048
    assert len(client.call("embed", {"input": ["a"] * 2048, "dimensions": 50})["vectors"]) == 2048


@pytest.mark.parametrize(
    ("params", "error", "field"),
    [
        ({"input": []}, errors.InvalidParams, "input"),
        ({"input": ["a"] * 2049}, errors.InvalidParams, "input"),
        ({"input": "a"}, errors.InvalidParams, "input"),
        ({"input": [3]}, errors.InvalidParams, "input[0]"),
        ({"input": ["a", ""]}, errors.InvalidParams, "input[1]"),
        ({"input": ["x" * 2_000_001]}, errors.InvalidParams, "input[0]"),
        ({"input": ["a", "word " * 2000]}, errors.ContextExceeded, "input[1]"),
        ({"input": ["a"], "dimensions": 0}, errors.InvalidParams, "dimensions"),
        ({"input": ["a"], "dimensions": 65}, errors.InvalidParams, "dimensions"),
        ({"input": ["a"], "encoding": "int8"}, errors.InvalidParams, "encoding"),
        ({"input": ["a"], "normalize": 1}, errors.InvalidParams, "normalize"),
        ({"input": ["a"], "user": "x"}, errors.InvalidParams, "user"),
    ],
)
def test_what_is_wrong_with_a_wish_for_vectors_is_named(
    client: Client, params: dict[str, Any], error: type[errors.RpcError], field: str
) -> None:
    with pytest.raises(error) as caught:
        client.call("embed", params)
    assert caught.value.details["field"] == field


def test_an_answer_streams_while_vectors_are_made_and_giving_up_ends_them(daemon: Daemon, client: Client) -> None:
    texts = [f"word {number} " * 60 for number in range(600)]

    async def main() -> None:
        async with AsyncClient(daemon.socket) as one, AsyncClient(daemon.socket) as two:
            made = asyncio.create_task(one.embed(texts))
            async with two.stream_chat("hello", temperature=0, max_tokens=40) as stream:
                text = "".join([piece async for piece in stream])
                assert text == stream.result.text
            assert not made.done(), "the vectors were there too soon for this to show anything"
            made.cancel()
            await asyncio.wait([made])
            assert made.cancelled()
            with pytest.raises(errors.DeadlineExceeded) as caught:
                await one.embed(texts, timeout_s=0.05)
            assert caught.value.details["phase"] == "embedding"
            assert close((await one.embed("hello")).vectors[0], client.embed("hello").vectors[0])

    asyncio.run(main())


def test_a_worker_that_dies_ends_a_wish_for_vectors_and_the_next_has_another(daemon: Daemon, client: Client) -> None:
    async def main() -> None:
        async with AsyncClient(daemon.socket) as one:
            made = asyncio.create_task(one.embed([f"word {number} " * 60 for number in range(600)]))
            async with one.stream_chat("hello", max_tokens=400) as stream:
                async for piece in stream.pieces():
                    if piece.text is None:
                        continue
                    for worker in daemon.children():
                        worker.kill()  # they have taken both
                    break
                with pytest.raises(errors.WorkerDied):
                    await made

    asyncio.run(main())
    assert len(client.embed("hello").vectors) == 1


def test_a_model_is_unloaded_as_asked_once_its_vectors_are_made(daemon: Daemon, client: Client) -> None:
    with client.events() as events:
        assert client.embed("hello", model="mlxd/cleanup", keep_alive=0).model == "mlxd/cleanup"
        until(events, "unloaded")
    assert client.model("mlxd/cleanup").state == "Downloaded"


def test_a_model_of_the_hub_brings_how_its_vectors_are_made(tmp_path: Path) -> None:
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{name}"}
        for name, path in (("Transformer", ""), ("Pooling", "1_Pooling"))
    ]
    files = model_files() | {
        "modules.json": json.dumps(modules).encode(),
        "1_Pooling/config.json": json.dumps({"pooling_mode_mean_tokens": True}).encode(),
        "1_Pooling/other.json": b"{}",
    }
    with Hub() as hub:
        hub.commit("org/vectors", files)
        with Daemon(env=hub.env()) as daemon, daemon.client() as client:
            assert client.wait_job(client.download("org/vectors")).state == "done"
            assert client.verify("org/vectors").ok
            names = {str(file.relative_to(daemon.home)) for file in (daemon.home / "hub").rglob("*_Pooling/*")}
            assert [name.rpartition("/")[2] for name in names] == ["config.json"]
            made = client.embed(["hello"], model="org/vectors").vectors[0]
            assert not math.isclose(sum(x * x for x in made), 1, abs_tol=1e-3)
            client.unload("org/vectors")
            assert client.delete("org/vectors") > 0
    import mlx.core as mx
    from mlx_lm.utils import load

    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    loaded, tokenizer = load(str(tmp_path))[:2]
    wanted: Any = loaded.model(mx.array([tokenizer.encode("hello")]))[0].mean(axis=0).tolist()
    assert all(abs(a - b) < 1e-3 for a, b in zip(made, wanted, strict=True))
