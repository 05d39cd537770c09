"""One request under way: whom to answer, how to stop it, and the pieces of a stream that wait to be written.

The law: a call is answered on the wire exactly once, or its connection is gone. Ending it twice raises.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

from mlxd_client.errors import Cancelled, RpcError
from mlxd_client.types import Completion, MalformedToolCall, Stream, ToolCall

if TYPE_CHECKING:
    from .methods.table import Method
    from .runtime_api import Runtime, Ticket
    from .session import Session

__all__ = ["PENDING", "Call"]

Phase = Literal["queued", "downloading", "loading", "prompt"]


class _Pending:
    """What a handler returns whose answer comes later, through its call."""

    def __repr__(self) -> str:
        return "PENDING"


PENDING = _Pending()


class Call:
    """A request that was accepted. For generations also the runtime's `Sink`.

    Attributes:
        streaming: whether pieces go to the client before the answer.
        ticket: set while the runtime generates for this call.
        task: set while a coroutine handler runs for this call.
    """

    __slots__ = (
        "_calls",
        "_detached",
        "_ended",
        "_malformed",
        "_others",
        "_phase",
        "_progress",
        "_reasoning",
        "_seq",
        "_text",
        "id",
        "method",
        "session",
        "streaming",
        "task",
        "ticket",
    )

    def __init__(self, session: Session, request_id: int | str, method: Method) -> None:
        self.session = session
        self.id = request_id
        self.method = method
        self.streaming = False
        self.ticket: Ticket | None = None
        self.task: asyncio.Task[Any] | None = None
        self._ended = False
        self._detached = False
        self._seq = 0
        self._text: list[str] | None = None
        self._reasoning: list[str] | None = None
        self._calls: list[ToolCall] | None = None
        self._malformed: list[MalformedToolCall] | None = None
        self._phase: Phase | None = None
        self._progress: float | None = None
        self._others: dict[int, tuple[list[str], list[str]]] | None = None  # text and reasoning of further answers

    @property
    def client(self) -> int:
        """The connection's number."""
        return self.session.client

    @property
    def runtime(self) -> Runtime:
        return self.session.server.runtime

    @property
    def request_name(self) -> str:
        """Connection and request, e.g. `c12:7`; the same in log lines and events."""
        return f"c{self.session.client}:{self.id!s:.64}"

    # --- the answer -----------------------------------------------------------------------------------------------

    def reply(self, result: Any) -> None:
        """Answer with a result."""
        if self._end():
            self.session.send_result(self, result)

    def fail(self, error: RpcError) -> None:
        """Answer with an error."""
        if self._end():
            self.session.send_error(self, error)

    def done(self, completion: Completion) -> None:
        """Answer with a completion; one that was cancelled is an error that carries the text so far."""
        if completion.finish_reason != "cancelled":
            self.reply(completion)
            return
        details = {"text": completion.text} if completion.text else {}
        self.fail(Cancelled("the request was cancelled", **details))

    def _end(self) -> bool:
        if self._ended:
            raise RuntimeError(f"{self.request_name} ({self.method.name}) was answered twice")
        self._ended = True
        self.ticket = self.task = None  # they know this call: a circle would keep its texts until the next collection
        return not self._detached

    def attach(self, ticket: Ticket) -> None:
        """What stops the generation; it may have ended before its ticket came."""
        if not self._ended:
            self.ticket = ticket

    # --- stopping it ----------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ask whoever works on it to stop; the answer still comes from there."""
        if self.ticket is not None:
            self.ticket.cancel()
        elif self.task is not None:
            self.task.cancel()

    def detach(self) -> None:
        """Stop it, and let what still comes from it go nowhere: the client is gone, or was answered already."""
        self._detached = True
        self._text = self._reasoning = self._phase = self._calls = self._malformed = self._others = None
        self.cancel()

    # --- its stream -----------------------------------------------------------------------------------------------

    def piece(self, text: str, reasoning: str = "", index: int = 0) -> None:
        """More text; merged with what was not written yet."""
        if not self.streaming or self._detached:
            return
        if index:
            if self._others is None:
                self._others = {}
            texts, thoughts = self._others.setdefault(index, ([], []))
            texts.append(text)
            thoughts.append(reasoning)
            self.session.stream_waits(self)
            return
        if text:
            if self._text is None:
                self._text = []
            self._text.append(text)
        if reasoning:
            if self._reasoning is None:
                self._reasoning = []
            self._reasoning.append(reasoning)
        if text or reasoning:
            self.session.stream_waits(self)

    def calls(self, calls: list[ToolCall], malformed: list[MalformedToolCall]) -> None:
        """Tool calls that are complete; they go with the text that was not written yet."""
        if not self.streaming or self._detached or not (calls or malformed):
            return
        if calls:
            self._calls = [*(self._calls or ()), *calls]
        if malformed:
            self._malformed = [*(self._malformed or ()), *malformed]
        self.session.stream_waits(self)

    def phase(self, phase: Phase, progress: float | None = None) -> None:
        """What happens before the first text; only the newest is kept until it is written."""
        if not self.streaming or self._detached:
            return
        self._phase, self._progress = phase, progress
        self.session.stream_waits(self)

    def take_piece(self) -> Stream | None:
        """The next `stream` notification, of all that waits; None where nothing does."""
        if (
            self._text is None
            and self._reasoning is None
            and self._phase is None
            and self._calls is None
            and self._malformed is None
        ):
            return None if self._others is None else self._take_other(self._others)
        piece = Stream(
            id=self.id,
            seq=self._seq,
            text=None if self._text is None else "".join(self._text),
            reasoning=None if self._reasoning is None else "".join(self._reasoning),
            tool_calls=self._calls,
            malformed_tool_calls=self._malformed,
            phase=self._phase,
            progress=self._progress,
        )
        self._seq += 1
        self._text = self._reasoning = self._phase = self._progress = self._calls = self._malformed = None
        return piece

    def _take_other(self, others: dict[int, tuple[list[str], list[str]]]) -> Stream:
        index = next(iter(others))
        texts, thoughts = others.pop(index)
        if not others:
            self._others = None
        piece = Stream(
            id=self.id, seq=self._seq, index=index, text="".join(texts) or None, reasoning="".join(thoughts) or None
        )
        self._seq += 1
        return piece

    @property
    def more_pieces(self) -> bool:
        """Further answers have text that waits, after `take_piece` gave some."""
        return self._others is not None
