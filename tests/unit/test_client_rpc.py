"""The sans-IO session: bytes out, bytes in, and which calls have news. No socket."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mlxd_client import errors, types
from mlxd_client.codec import Decoder, Encoding, encode
from mlxd_client.rpc import Cursor, Session
from support.scripted_daemon import HELLO, completion


def sent(data: bytes, encoding: Encoding = Encoding.MSGPACK) -> list[Any]:
    decoder = Decoder(encoding)
    decoder.feed(data)
    return list(decoder)


def answer(id: Any, result: Any) -> bytes:
    return encode({"jsonrpc": "2.0", "id": id, "result": result})


def error(id: Any, what: errors.RpcError) -> bytes:
    return encode({"jsonrpc": "2.0", "id": id, "error": what.to_wire()})


def note(method: str, **params: Any) -> bytes:
    return encode({"jsonrpc": "2.0", "method": method, "params": params})


@pytest.fixture
def session() -> Session:
    made = Session("test", "1")
    made.greet()
    made.receive(answer(0, msgspec.to_builtins(HELLO)))
    return made


def test_hello_comes_first_and_in_the_same_bytes_as_the_first_request() -> None:
    session = Session("app", "2.1")
    _, data = session.start("ping", None)
    hello, ping = sent(data)
    assert hello["method"] == "hello"
    assert hello["params"] == {"protocol": [1, 1], "client": {"name": "app", "version": "2.1"}}
    assert ping == {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    assert [m["method"] for m in sent(session.start("ping", None)[1])] == ["ping"]


@pytest.mark.parametrize("encoding", list(Encoding))
def test_replies_are_typed_in_both_encodings(encoding: Encoding) -> None:
    session = Session("app", encoding=encoding)
    call, data = session.start("models.get", types.ModelParams(model="m"), types.Model)
    assert sent(data, encoding)[1]["params"] == {"model": "m"}
    reply = {"jsonrpc": "2.0", "id": 1, "result": {"id": "m", "state": "Ready", "source": "hub", "new_field": 1}}
    assert session.receive(encode(reply, encoding)) == [call]
    assert call.outcome() == types.Model(id="m", state="Ready", source="hub")


def test_answers_in_any_order_find_their_calls(session: Session) -> None:
    one, two = session.start("a", {})[0], session.start("b", {})[0]
    touched = session.receive(answer(2, "second") + answer(1, "first"))
    assert touched == [two, one]
    assert (one.outcome(), two.outcome()) == ("first", "second")


def test_an_error_is_raised_as_its_class_each_time_anew(session: Session) -> None:
    call, _ = session.start("a", {})
    session.receive(error(1, errors.QueueFull("full", retry_after_s=2)))
    raised = []
    for _ in range(2):
        with pytest.raises(errors.QueueFull) as caught:
            call.outcome()
        assert caught.value.details == {"retry_after_s": 2}
        raised.append(caught.value)
    assert raised[0] is not raised[1]


def test_an_answer_of_the_wrong_shape_fails_its_call_alone(session: Session) -> None:
    wrong, _ = session.start("status", None, types.Status)
    right, _ = session.start("ping", None)
    session.receive(answer(1, {"version": 3}) + answer(2, {}))
    with pytest.raises(errors.ProtocolError, match="`status`"):
        wrong.outcome()
    assert right.outcome() == {}
    assert session.closed is None


@pytest.mark.parametrize("body", [{"jsonrpc": "2.0", "id": 1}, {"id": 1, "error": "x"}, {"id": 1, "result": 2**60}])
def test_an_odd_answer_fails_its_call_alone(session: Session, body: Any) -> None:
    call, _ = session.start("a", {})
    session.receive(encode(body))
    with pytest.raises(errors.MlxdError):
        call.outcome()
    assert session.closed is None


def test_late_and_unknown_answers_are_dropped_quietly(session: Session) -> None:
    call, _ = session.start("a", {})
    session.forget(call)
    late = answer(1, "late") + answer("x", 1) + answer(True, 1) + note("stream", id=1, seq=0) + note("newer", a=1)
    assert session.receive(late) == []
    assert session.closed is None


def test_cancel_names_the_request_and_its_answer_interests_nobody(session: Session) -> None:
    call, _ = session.start("chat", {})
    (message,) = sent(session.cancel(call))
    assert (message["method"], message["params"]) == ("cancel", {"id": 1})
    session.receive(answer(message["id"], {"cancelled": True}) + error(1, errors.Cancelled("cancelled")))
    with pytest.raises(errors.Cancelled):
        call.outcome()
    assert session.cancel(call) == b""


def test_a_stream_comes_in_order_before_its_result(session: Session) -> None:
    call, _ = session.start("chat", {}, types.Completion)
    session.receive(note("stream", id=1, seq=0, phase="prompt", progress=0.5) + note("stream", id=1, seq=1, text="a"))
    assert [piece.text for piece in call.pieces] == [None, "a"]
    assert call.news
    assert not call.done
    session.receive(answer(1, msgspec.to_builtins(completion("a"))))
    assert call.outcome().text == "a"


@pytest.mark.parametrize("seq", [0, 2, -1])
def test_a_gap_or_a_repetition_in_a_stream_ends_the_connection(session: Session, seq: int) -> None:
    call, _ = session.start("chat", {}, types.Completion)
    session.receive(note("stream", id=1, seq=0, text="a") + note("stream", id=1, seq=seq, text="b"))
    assert isinstance(session.closed, errors.ProtocolError)
    with pytest.raises(errors.ProtocolError):
        call.outcome()


def test_pieces_that_nobody_takes_are_joined_and_none_is_lost(session: Session) -> None:
    call, _ = session.start("chat", {}, types.Completion)
    count = 20_000
    for seq in range(count):
        session.receive(note("stream", id=1, seq=seq, text=f"{seq} "))
    assert len(call.pieces) < 1100
    assert "".join(piece.text or "" for piece in call.pieces) == "".join(f"{seq} " for seq in range(count))


def test_pieces_of_several_answers_are_joined_each_to_its_own(session: Session) -> None:
    call, _ = session.start("chat", {}, types.Completion)
    for seq in range(9_000):
        session.receive(note("stream", id=1, seq=seq, index=seq % 3, text=f"{seq} "))
    assert len(call.pieces) < 1100
    for index in range(3):
        joined = "".join(piece.text or "" for piece in call.pieces if piece.index == index)
        assert joined == "".join(f"{seq} " for seq in range(index, 9_000, 3))


def test_events_reach_their_subscription_from_the_answer_on(session: Session) -> None:
    call, _ = session.subscribe(types.SubscribeParams())
    result = {"subscription": 4, "epoch": "e1", "rev": 10, "snapshot": {"models": []}}
    events = b"".join(
        note("event", subscription=s, rev=r, name="queue", at=1.0) for s, r in [(4, 11), (5, 12), (4, 13)]
    )
    session.receive(answer(1, result) + events)
    assert [event.rev for event in call.events] == [11, 13]
    session.receive(note("event", subscription=4, rev=13, name="queue", at=1.0))
    assert len(call.events) == 2, "a repeated event is dropped"


def test_the_end_of_the_connection_ends_everything(session: Session) -> None:
    calls = [session.start("a", {})[0], session.start("b", {})[0]]
    subscription, _ = session.subscribe(types.SubscribeParams())
    session.receive(answer(3, {"subscription": 1, "epoch": "e", "rev": 0, "snapshot": {}}))
    assert session.busy
    assert set(session.lost()) == {*calls, subscription}
    for call in calls:
        with pytest.raises(errors.ConnectionLost):
            call.outcome()
    assert subscription.news
    with pytest.raises(errors.ConnectionLost):
        session.start("c", {})
    assert session.lost() == []
    assert session.receive(answer(1, 1)) == []
    assert not session.busy


@pytest.mark.parametrize("garbage", [b"\xff" * 8, b"\x00\x00\x00\x01\xc1", encode([1]), encode({"id": 9, 7: 7})])
def test_garbage_ends_the_connection_with_a_typed_error(session: Session, garbage: bytes) -> None:
    call, _ = session.start("a", {})
    assert session.receive(garbage) == [call]
    with pytest.raises(errors.ProtocolError):
        call.outcome()


def test_a_refused_hello_fails_what_was_sent_with_it() -> None:
    session = Session("app")
    call, _ = session.start("ping", None)
    session.receive(error(0, errors.Unsupported("protocol 7 to 9 is spoken here")))
    with pytest.raises(errors.Unsupported, match="7 to 9"):
        call.outcome()
    assert isinstance(session.closed, errors.Unsupported)


def test_an_error_without_id_is_the_connections(session: Session) -> None:
    call, _ = session.start("a", {})
    session.receive(error(None, errors.PermissionDenied("not yours")))
    with pytest.raises(errors.PermissionDenied):
        call.outcome()


@pytest.mark.parametrize("params", [{"prompt": "\ud800"}, {"n": 2**70}, {"x": object()}])
def test_params_that_cannot_be_sent_are_refused_here(session: Session, params: Any) -> None:
    with pytest.raises(errors.InvalidParams, match="`process`"):
        session.start("process", params)
    assert not session.busy


def test_a_request_over_the_daemons_limit_is_refused_here(session: Session) -> None:
    assert session.hello is not None
    session.hello.limits.frame_bytes = 100
    with pytest.raises(errors.InvalidRequest, match="100 is the limit"):
        session.start("process", {"prompt": "x" * 100})


def test_a_cursor_asks_for_what_follows_and_announces_a_new_start() -> None:
    cursor = Cursor(topics=["models"])
    assert cursor.params() == types.SubscribeParams(topics=["models"])
    first = types.SubscribeResult(subscription=1, epoch="e1", rev=5, snapshot=types.Snapshot())
    assert cursor.subscribed(first, 1.0) is None
    cursor.passed(types.Event(subscription=1, rev=8, name="queue", at=1.0))
    assert cursor.params().since == types.Since(epoch="e1", rev=8)
    assert cursor.subscribed(types.SubscribeResult(subscription=1, epoch="e1", rev=8), 2.0) is None
    fresh = types.Snapshot(stopping=True)
    again = types.SubscribeResult(subscription=1, epoch="e2", rev=3, snapshot=fresh, resync=True)
    event = cursor.subscribed(again, 9.0)
    assert event is not None
    assert (event.name, event.rev, event.at, event.snapshot) == ("resync", 3, 9.0, fresh)
    assert (cursor.epoch, cursor.rev, cursor.snapshot) == ("e2", 3, fresh)
