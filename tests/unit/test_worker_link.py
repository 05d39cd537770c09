"""The daemon's end of a worker: whoever asks one that has ended is told so, and does not wait for ever."""

from __future__ import annotations

from typing import Any

from mlxd import childwire as wire
from mlxd.children.death import Death
from mlxd.workers import WorkerLink
from mlxd_client import errors


class Nowhere:
    """A child that has ended: what is sent there comes to nobody. Also whom the link reports to."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def request(self, method: str, params: Any) -> int:
        self.sent.append(method)
        return len(self.sent)

    def notify(self, method: str, params: Any) -> None:
        self.sent.append(method)

    def worker_exited(self, worker: int, death: Death) -> None: ...


def test_who_asks_too_late_is_told_at_once() -> None:
    """As when all caches are cleared: workers are listed, and each is asked a turn of the loop later."""
    child: Any = Nowhere()
    link = WorkerLink(1, wire.LoadModel(model="org/one", path="/nowhere"), child, child, load_s=1.0)
    link.child = child
    told: list[Any] = []
    link.ask("cache", {}, told.append)
    assert told == []
    link.on_exit(child, Death(cause="stopped", kind="worker", name="org/one"))
    number = link.ask("clear", {}, told.append)
    assert [type(one) for one in told] == [errors.WorkerDied, errors.WorkerDied]
    link.give_up(number)
    assert child.sent == ["cache"]
