"""A session on a real socket: requests, refusals, streams, cancelling, limits; in both encodings."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from mlxd.server.limits import ServerLimits
from mlxd.server.methods.table import METHODS
from mlxd_client import codec
from mlxd_client.codec import Encoding
from mlxd_client.types import MalformedToolCall, ToolCall
from support.fake_runtime import completion
from support.loops import run
from support.serving import RawClient, serving

both = pytest.mark.parametrize("encoding", list(Encoding))


@both
def test_ping_and_hello(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            assert await client.call("ping") == {}
            hello = await client.call("hello", protocol=[1, 3], client={"name": "test", "version": "1"})
            assert hello["protocol"] == 1
            assert hello["epoch"] == "epoch-1"
            assert hello["server"]["name"] == "mlxd"
            assert hello["limits"]["requests_in_flight"] == 1024
            assert hello["capabilities"] == sorted(METHODS)

    run(main())


@both
def test_a_protocol_out_of_range_is_refused_and_closed(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            client.request("hello", {"protocol": [2, 9], "client": {"name": "from the future"}})
            client.request("ping")
            answers = await client.closed()
            assert [answer["error"]["data"]["kind"] for answer in answers] == ["unsupported"]
            other = await served.connect(encoding)
            assert (await other.refused("hello", {"protocol": [2, 1], "client": {"name": "x"}}))["code"] == -32602
            assert await other.call("ping") == {}

    run(main())


INVALID: list[tuple[str, Any, Any]] = [
    ("no version", {"id": 1, "method": "ping"}, 1),
    ("other version", {"jsonrpc": "1.0", "id": 1, "method": "ping"}, 1),
    ("no method", {"jsonrpc": "2.0", "id": 1}, 1),
    ("method no string", {"jsonrpc": "2.0", "id": "a", "method": 7}, "a"),
    ("a response", {"jsonrpc": "2.0", "id": 1, "result": {}}, 1),
    ("unknown member", {"jsonrpc": "2.0", "id": 1, "method": "ping", "parms": {}}, 1),
    ("null id", {"jsonrpc": "2.0", "id": None, "method": "ping"}, None),
    ("float id", {"jsonrpc": "2.0", "id": 1.5, "method": "ping"}, None),
    ("bool id", {"jsonrpc": "2.0", "id": True, "method": "ping"}, None),
    ("empty id", {"jsonrpc": "2.0", "id": "", "method": "ping"}, None),
    ("long id", {"jsonrpc": "2.0", "id": "x" * 257, "method": "ping"}, None),
    ("list id", {"jsonrpc": "2.0", "id": [1], "method": "ping"}, None),
    ("huge integer", {"jsonrpc": "2.0", "id": 4, "method": "ping", "params": {"a": 2**60}}, 4),
]


@both
@pytest.mark.parametrize(("message", "id"), [case[1:] for case in INVALID], ids=[case[0] for case in INVALID])
def test_an_invalid_request_is_refused_and_the_connection_goes_on(encoding: Encoding, message: Any, id: Any) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            client.send(message)
            answer = await client.next()
            assert answer["id"] == id
            assert answer["error"]["code"] == -32600
            assert answer["error"]["data"]["kind"] == "invalid_request"
            assert await client.call("ping") == {}

    run(main())


def test_a_batch_is_refused() -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(Encoding.JSON)
            assert await client.call("ping") == {}
            client.send_bytes(b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]\n')
            assert (await client.next())["error"]["code"] == -32600
            assert await client.call("ping") == {}

    run(main())


PARAMS: list[tuple[str, Any, str]] = [
    ("models.get", {}, "model"),
    ("models.get", None, "model"),
    ("models.get", [], "params"),
    ("models.get", ["fake/model"], "params"),
    ("models.get", {"model": 5}, "model"),
    ("models.get", {"model": None}, "model"),
    ("models.get", {"model": ""}, "model"),
    ("models.get", {"model": "x", "modle": "y"}, "modle"),
    ("ping", {"a": 1}, "a"),
    ("ping", [], "params"),
    ("hello", {"protocol": [1, 1], "client": {"name": "x", "colour": 1}}, "client.colour"),
    ("process", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ("process", {"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ("process", {"prompt": "x", "max_tokens": 10**12}, "max_tokens"),
    ("process", {"prompt": "x", "temperature": "hot"}, "temperature"),
    ("process", {"prompt": ""}, "prompt"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": [{"role": "user"}, {"role": "king"}]}, "messages[...].role"),
    ("tokens.count", {}, "text"),
    ("events.subscribe", {"topics": ["modles"]}, "topics"),
    ("cancel", {}, "id"),
]


@both
@pytest.mark.parametrize(("method", "params", "field"), PARAMS)
def test_wrong_params_name_the_field(encoding: Encoding, method: str, params: Any, field: str) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            error = await client.refused(method, params)
            assert error["code"] == -32602
            assert error["data"]["kind"] == "invalid_params"
            named = error["data"]["details"]["field"]
            assert named.replace("[1]", "[...]") == field
            assert await client.call("ping") == {}

    run(main())


@both
def test_unknown_methods_and_typed_errors(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            assert (await client.refused("models.paint", {"model": "x"}))["code"] == -32601
            assert (await client.refused("jobs.get", {"job": "x"}))["data"]["kind"] == "not_found"
            missing = await client.refused("models.get", {"model": "../etc"})
            assert missing["data"] == {"kind": "model_not_found", "details": {"model": "../etc"}}
            busy = await client.refused("process", {"prompt": "busy"})
            assert busy["data"]["details"] == {"retry_after_s": 1.5}
            assert (await client.refused("events.unsubscribe", {"subscription": 4}))["code"] == -32015

    run(main())


@both
@pytest.mark.parametrize(("method", "params"), [("process", {"prompt": "bug"}), ("tokens.count", {"text": "bug"})])
def test_a_bug_is_answered_with_a_reference_and_no_traceback(encoding: Encoding, method: str, params: Any) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            error = await client.refused(method, params)
            assert error["code"] == -32603
            assert "secret" not in str(error)
            (line,) = served.log.named("request_failed_by_bug")
            assert error["data"]["details"]["reference"] == line["reference"]
            assert "secret" in str(line["exc_info"][1])
            assert served.server.working == 0

    run(main())


@both
def test_pipelined_requests_are_answered_in_order(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            names = ["ping", "status", "jobs.list", "nope"]
            ids = [client.request(names[number % 4]) for number in range(1000)]
            answers = [await client.next() for _ in ids]
            assert [answer["id"] for answer in answers] == ids
            assert all(("error" in answer) == (answer["id"] % 4 == 0) for answer in answers)

    run(main())


@both
def test_bytes_one_by_one(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            client.writer.get_extra_info("socket")
            for byte in codec.encode({"jsonrpc": "2.0", "id": 1, "method": "ping"}, encoding):
                client.send_bytes(bytes([byte]))
                await asyncio.sleep(0)
            assert (await client.next())["result"] == {}

    run(main())


@both
def test_a_stream_brings_pieces_then_the_whole(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            id = client.request("chat", {"messages": [{"role": "user", "content": "hi"}], "stream": True}, id="s")
            ticket = await served.runtime.asked.get()
            assert ticket.sink.request_name == "c1:s"
            ticket.sink.phase("loading", 0.5)
            piece = await client.next()
            assert piece["method"] == "stream"
            assert piece["params"] == {"id": "s", "seq": 0, "phase": "loading", "progress": 0.5}
            ticket.piece("", "hm")
            assert (await client.next())["params"] == {"id": "s", "seq": 1, "reasoning": "hm"}
            ticket.piece("a")
            ticket.piece("b")
            assert (await client.next())["params"] == {"id": "s", "seq": 2, "text": "ab"}
            ticket.piece("c")
            call, none = ToolCall(id="1", name="clock", arguments={}), MalformedToolCall(text="x", reason="no call")
            for _ in range(2):
                ticket.calls([call], [none])
            ticket.done()
            assert (await client.next())["params"] == {
                "id": "s", "seq": 3, "text": "c", "tool_calls": [{"id": "1", "name": "clock", "arguments": {}}] * 2,
                "malformed_tool_calls": [{"text": "x", "reason": "no call"}] * 2,
            }  # fmt: skip
            answer = await client.next()
            assert answer["id"] == id
            assert answer["result"]["text"] == "abc"
            with pytest.raises(RuntimeError, match="answered twice"):
                ticket.done()

    run(main())


@both
def test_pieces_of_several_answers_come_apart_and_merge_each_by_itself(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            client.request("chat", {"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 3}, id="s")
            sink = (await served.runtime.asked.get()).sink
            for index, text, reasoning in ((2, "x", ""), (0, "a", ""), (1, "", "hm"), (2, "y", ""), (0, "b", "")):
                sink.piece(text, reasoning, index)
            got = [(await client.next())["params"] for _ in range(3)]
            assert got == [
                {"id": "s", "seq": 0, "text": "ab"},
                {"id": "s", "seq": 1, "index": 2, "text": "xy"},
                {"id": "s", "seq": 2, "index": 1, "reasoning": "hm"},
            ]
            sink.piece("z", "", 1)
            sink.done(completion("ab"))
            assert (await client.next())["params"] == {"id": "s", "seq": 3, "index": 1, "text": "z"}
            assert (await client.next())["result"]["text"] == "ab"

    run(main())


@both
def test_without_stream_no_pieces_come(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            client.request("process", {"prompt": "words a b c"})
            assert (await client.next())["result"]["text"] == "abc"

    run(main())


@both
def test_cancel_answers_both(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            id = client.request("process", {"prompt": "long", "stream": True})
            ticket = await served.runtime.asked.get()
            ticket.piece("so far")
            assert await client.call("cancel", id=id) == {"cancelled": True}
            answer = await client.answer(id)
            assert answer["error"]["code"] == -32800
            assert answer["error"]["data"] == {"kind": "cancelled", "details": {"text": "so far"}}
            assert client.parked[0]["params"]["text"] == "so far"
            assert await client.call("cancel", id=id) == {"cancelled": False}
            assert await client.call("cancel", id="nobody") == {"cancelled": False}

    run(main())


@both
def test_cancel_as_a_notification_and_of_a_coroutine(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            served.runtime.waits["fake/model"] = asyncio.get_running_loop().create_future()
            id = client.request("models.load", {"model": "fake/model"})
            await served.runtime.waiting.get()
            client.send({"jsonrpc": "2.0", "method": "nonsense"})
            client.send({"jsonrpc": "2.0", "method": "cancel", "params": {"id": id}})
            assert (await client.next())["error"]["code"] == -32800
            assert await served.runtime.gave_up.get() == "fake/model"
            assert served.log.named("notification_ignored") == [{"client": 1, "method": "nonsense"}]
            assert await client.call("ping") == {}
            assert served.server.working == 0

    run(main())


@both
def test_an_id_under_way_is_refused_without_disturbing_its_owner(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            client.request("process", {"prompt": "long"}, id=7)
            ticket = await served.runtime.asked.get()
            client.request("ping", id=7)
            refusal = await client.next()
            assert refusal["id"] is None
            assert refusal["error"]["code"] == -32600
            assert refusal["error"]["data"]["details"] == {"id": 7}
            client.request("ping", id="7")
            assert (await client.next())["id"] == "7"
            ticket.done()
            assert "result" in await client.answer(7)
            client.request("ping", id=7)
            assert "result" in await client.answer(7)

    run(main())


@both
def test_too_many_in_flight(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving(ServerLimits(in_flight=3)) as served:
            client = await served.connect(encoding)
            ids = [client.request("process", {"prompt": "long"}) for _ in range(4)]
            refusal = await client.answer(ids[3])
            assert refusal["error"]["data"] == {"kind": "queue_full", "details": {"limit": 3}}
            assert await client.call("ping") == {}
            assert await client.call("cancel", id=ids[0]) == {"cancelled": True}
            await client.answer(ids[0])
            id = client.request("process", {"prompt": "echo x"})
            assert (await client.answer(id))["result"]["text"] == "x"

    run(main())


def _garbage(encoding: Encoding) -> list[tuple[str, bytes]]:
    if encoding is Encoding.MSGPACK:
        deep = b"\x81\xa1a" * 70 + b"\xc0"
        return [
            ("oversized", (17 * 1024 * 1024).to_bytes(4, "big")),
            ("deep", len(deep).to_bytes(4, "big") + deep),
            ("no msgpack", b"\0\0\0\1\xc1"),
            ("truncated value", b"\0\0\0\2\x81\xa1"),
            ("http", b"GET / HTTP/1.1\r\n\r\n"),
        ]
    return [
        ("deep", b'{"a":' * 70 + b"1" + b"}" * 70 + b"\n"),
        ("no json", b"{what?}\n"),
        ("bad text", b'{"a":"\xff"}\n'),
    ]


@pytest.mark.parametrize(
    ("encoding", "data"), [(encoding, data) for encoding in Encoding for _, data in _garbage(encoding)]
)
def test_bytes_that_are_no_frame_close_the_connection_with_an_error(encoding: Encoding, data: bytes) -> None:
    async def main() -> None:
        async with serving() as served:
            client, other = await served.connect(encoding), await served.connect(encoding)
            client.request("process", {"prompt": "long"})
            ticket = await served.runtime.asked.get()
            client.send_bytes(data)
            (answer,) = await client.closed()
            assert answer["id"] is None
            assert answer["error"]["code"] == -32700
            assert ticket.cancelled.is_set()
            assert await other.call("ping") == {}
            assert await (await served.connect(encoding)).call("ping") == {}

    run(main())


def test_a_line_without_end_is_refused_at_the_limit() -> None:
    async def main() -> None:
        async with serving(ServerLimits(frame_bytes=100_000)) as served:
            client = await served.connect(Encoding.JSON)
            client.send_bytes(b"{" + b" " * 150_000)
            (answer,) = await client.closed()
            assert answer["error"]["code"] == -32700

    run(main())


@both
def test_a_frame_cut_off_by_the_end_is_an_error(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            client.send_bytes(codec.encode({"jsonrpc": "2.0", "id": 1, "method": "ping"}, encoding)[:-3])
            client.writer.write_eof()
            (answer,) = await client.closed()
            assert answer["error"]["code"] == -32700

    run(main())


@both
def test_who_only_finished_writing_gets_the_answers(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            client.request("process", {"prompt": "long"})
            last = codec.encode({"jsonrpc": "2.0", "id": 2, "method": "ping"}, encoding)
            client.send_bytes(last.removesuffix(b"\n"))
            client.writer.write_eof()
            ticket = await served.runtime.asked.get()
            assert await client.answer(2)
            ticket.text = "late"
            ticket.done()
            (answer,) = await client.closed()
            assert answer["result"]["text"] == "late"

    run(main())


@both
def test_who_finished_writing_and_then_leaves_is_noticed(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            client.request("process", {"prompt": "long"})
            client.writer.write_eof()
            ticket = await served.runtime.asked.get()
            client.writer.transport.abort()
            await ticket.cancelled.wait()

    run(main())


@both
def test_who_vanishes_mid_stream_is_cancelled_at_once(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            served.runtime.waits["fake/model"] = asyncio.get_running_loop().create_future()
            client.request("process", {"prompt": "long", "stream": True})
            client.request("models.acquire", {"model": "fake/model"})
            client.request("events.subscribe")
            ticket = await served.runtime.asked.get()
            await served.runtime.waiting.get()
            ticket.piece("a")
            await client.next()
            assert served.server.subscribers == 1
            client.writer.transport.abort()
            assert await served.runtime.gone.get() == 1
            assert ticket.cancelled.is_set()
            assert await served.runtime.gave_up.get() == "fake/model"
            assert (served.server.clients, served.server.subscribers, served.server.working) == (0, 0, 0)
            assert await (await served.connect(encoding)).call("ping") == {}

    run(main())


def test_late_answers_to_a_client_that_left_go_nowhere() -> None:
    async def main() -> None:
        async with serving() as served:
            served.runtime.hold_cancels = True
            client = await served.connect()
            client.request("process", {"prompt": "long", "stream": True})
            ticket = await served.runtime.asked.get()
            client.writer.transport.abort()
            await served.runtime.gone.get()
            ticket.piece("x")
            ticket.done("cancelled")
            assert await (await served.connect()).call("ping") == {}

    run(main())


def test_leases_end_with_their_connection() -> None:
    async def main() -> None:
        async with serving() as served:
            client, other = await served.connect(), await served.connect()
            lease = (await client.call("models.acquire", model="fake/model"))["lease"]
            assert (await other.refused("models.release", {"lease": lease}))["data"]["kind"] == "not_found"
            await client.close()
            assert await served.runtime.gone.get() == 1
            assert not served.runtime.leases

    run(main())


def test_another_user_is_closed_before_a_byte_is_read() -> None:
    async def main() -> None:
        async with serving(uid=4_000_000) as served:
            client = await served.connect()
            client.request("shutdown")
            assert await client.closed() == []
            (line,) = served.log.named("client_refused")
            assert line["reason"] == "another user"
            assert served.runtime.shutdowns == 0

    run(main())


@both
def test_a_connection_beyond_the_limit_is_told_so_and_closed(encoding: Encoding) -> None:
    """In the encoding that its first byte is in, where that had come."""

    async def main() -> None:
        async with serving(ServerLimits(connections=2)) as served:
            first, second = await served.connect(), await served.connect()
            assert await first.call("ping") == await second.call("ping") == {}
            with socket.socket(socket.AF_UNIX) as made:
                made.connect(str(served.path))
                made.sendall(codec.encode({"jsonrpc": "2.0", "id": 1, "method": "ping"}, encoding))
                made.setblocking(False)
                third = RawClient(*await asyncio.open_unix_connection(sock=made.dup()), encoding)
            (told,) = await third.closed()
            assert told["id"] is None
            assert told["error"]["data"] == {"kind": "queue_full", "details": {"limit": 2}}
            assert await first.call("ping") == {}
            await third.close()
            await second.close()
            assert await first.call("ping") == {}
            assert await (await served.connect(encoding)).call("ping") == {}

    run(main())


def _small_buffers(client: RawClient) -> None:
    sock = client.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]


@both
def test_who_never_reads_is_not_read_from_and_then_closed(encoding: Encoding) -> None:
    async def main() -> None:
        limits = ServerLimits(write_stall_s=0.2, reply_backlog_bytes=32_768)
        async with serving(limits) as served:
            client, other = await served.connect(encoding), await served.connect(encoding)
            _small_buffers(client)
            request = codec.encode({"jsonrpc": "2.0", "id": 1, "method": "rpc.discover"}, encoding)
            for _ in range(20_000):
                client.send_bytes(request)
            assert await other.call("ping") == {}
            assert await served.runtime.gone.get() == 1
            (line,) = served.log.named("write_stalled")
            assert 0 < line["unsent_bytes"] < 200_000  # and not 20,000 documents
            assert await other.call("ping") == {}

    run(main())


@both
def test_who_never_reads_the_refusal_of_its_bytes_is_cut_off(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving(ServerLimits(write_stall_s=0.2, reply_backlog_bytes=1 << 24)) as served:
            client = await served.connect(encoding)
            _small_buffers(client)
            for number in range(20):  # more than the kernel takes, less than would stop the server's reading
                client.request("rpc.discover", id=number + 1)
            client.send_bytes(b"\xff" * 100 + b"\n")
            assert await served.runtime.gone.get() == 1
            async with asyncio.timeout(5):
                await served.server._deserted.wait()
            assert served.log.named("client_bytes_refused")
            assert served.log.named("write_stalled")

    run(main())


@both
def test_who_is_being_cut_off_still_counts(encoding: Encoding) -> None:
    """A connection whose last words nobody reads holds a descriptor, too: there are no more of these than the limit."""

    async def main() -> None:
        limits = ServerLimits(write_stall_s=0.2, connections=2, reply_backlog_bytes=1 << 24)
        async with serving(limits) as served:
            first, second = await served.connect(encoding), await served.connect(encoding)
            assert await first.call("ping") == {}
            _small_buffers(second)
            for number in range(20):
                second.request("rpc.discover", id=number + 1)
            second.send_bytes(b"\xff" * 100 + b"\n")
            assert await served.runtime.gone.get() == 2
            assert served.server.clients == 1
            (told,) = await (await served.connect()).closed()  # it had said nothing
            assert told["error"]["data"] == {"kind": "queue_full", "details": {"limit": 2}}
            while len(served.server._transports) > 1:
                assert await first.call("ping") == {}
            assert await (await served.connect(encoding)).call("ping") == {}

    run(main())


@both
def test_closing_does_not_wait_for_who_never_reads(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving(ServerLimits(close_flush_s=0.1)) as served:
            client = await served.connect(encoding)
            _small_buffers(client)
            for _ in range(40):
                client.request("rpc.discover")
            other = await served.connect(encoding)
            assert await other.call("ping") == {}
            async with asyncio.timeout(5):
                await served.server.close()
            assert served.server.clients == 0

    run(main())


@both
def test_a_slow_reader_gets_a_stream_in_merged_pieces(encoding: Encoding) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect(encoding)
            client.request("process", {"prompt": "long", "stream": True}, id=1)
            ticket = await served.runtime.asked.get()
            steps = 4000
            for number in range(steps):
                ticket.piece(f"{number:0200d} ")
                await asyncio.sleep(0)
            ticket.done()
            pieces: list[dict[str, Any]] = []
            while "method" in (message := await client.next()):
                pieces.append(message["params"])
            assert [piece["seq"] for piece in pieces] == list(range(len(pieces)))
            assert len(pieces) < steps
            assert "".join(piece["text"] for piece in pieces) == message["result"]["text"] == ticket.text

    run(main())


def test_reading_goes_on_when_a_slow_reader_catches_up() -> None:
    async def main() -> None:
        async with serving(ServerLimits(reply_backlog_bytes=10_000, turn_messages=7)) as served:
            client = await served.connect()
            ids = [client.request("rpc.discover") for _ in range(60)]
            assert [(await client.next())["id"] for _ in ids] == ids
            assert await client.call("ping") == {}

    run(main())


def test_forty_clients() -> None:
    async def one(client: RawClient, number: int) -> None:
        for turn in range(5):
            prompt = f"words {number} {turn}"
            id = client.request("process", {"prompt": prompt, "stream": True}, id=f"{number}-{turn}")
            assert (await client.answer(id))["result"]["text"] == f"{number}{turn}"
            assert await client.call("ping") == {}

    async def main() -> None:
        async with serving() as served:
            clients = [await served.connect(list(Encoding)[number % 2]) for number in range(40)]
            await asyncio.gather(*(one(client, number) for number, client in enumerate(clients)))
            assert (await clients[0].call("status"))["clients"] == 40

    run(main())


def test_draining_refuses_work_and_waits_for_what_runs() -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect()
            id = client.request("process", {"prompt": "long"})
            ticket = await served.runtime.asked.get()
            assert await client.call("shutdown") == {}
            assert served.runtime.shutdowns == 1
            served.server.begin_drain()
            for method, params in [
                ("process", {"prompt": "x"}),
                ("chat", {"messages": [{"role": "user", "content": "x"}]}),
                ("models.load", {"model": "fake/model"}),
                ("models.acquire", {"model": "fake/model"}),
            ]:
                assert (await client.refused(method, params))["data"]["kind"] == "shutting_down"
            assert await client.call("ping") == {}
            assert await (await served.connect()).call("models.get", model="fake/model")
            assert not await served.server.drained(0.01)
            ticket.done()
            assert await served.server.drained(5)
            assert "result" in await client.answer(id)

    run(main())


def test_closing_answers_what_is_under_way() -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect()
            await client.call("events.subscribe")
            id = client.request("process", {"prompt": "long", "stream": True})
            ticket = await served.runtime.asked.get()
            ticket.piece("half")
            served.runtime.events.publish("daemon_stopping")
            await served.server.close()
            piece, answer, event = await client.closed()
            assert piece["params"]["text"] == "half"
            assert (answer["id"], answer["error"]["data"]["kind"]) == (id, "shutting_down")
            assert event["params"]["name"] == "daemon_stopping"
            assert ticket.cancelled.is_set()
            with pytest.raises(ConnectionRefusedError):
                await served.connect()

    run(main())
