"""An engine of the worker without its process: requests go in, steps are taken, results come out."""

from __future__ import annotations

from typing import Any

from mlxd.childwire import Generate, Generated
from mlxd.worker.engine import Engine
from mlxd.worker.running import Outcome

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0}


def ask(text: str, kind: str = "chat", system: str | None = None, **options: Any) -> Generate:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return Generate(kind=kind, messages=[*messages, {"role": "user", "content": text}], options=options, stream=True)


class Collected:
    """What steps brought: `ends` by request id, `pieces` by request id and number of the answer."""

    def __init__(self) -> None:
        self.ends: dict[int, Any] = {}
        self.pieces: dict[tuple[int, int], str] = {}

    def take(self, outcome: Outcome) -> None:
        for request_id, text, _ in outcome.pieces:
            self._add(request_id, 0, text)
        for request_id, number, text, _ in outcome.others:
            self._add(request_id, number, text)
        for request_id, end in outcome.ended:
            assert request_id not in self.ends, "it ended twice"
            self.ends[request_id] = end

    def _add(self, request_id: int, number: int, text: str) -> None:
        self.pieces[request_id, number] = self.pieces.get((request_id, number), "") + text


def drain(engine: Engine, collected: Collected | None = None) -> Collected:
    """Step until nobody is left."""
    collected = collected or Collected()
    while engine.busy:
        collected.take(engine.step())
    return collected


def alone(engine: Engine, request: Generate) -> Generated:
    engine.submit(0, request)
    return drain(engine).ends[0]  # type: ignore[no-any-return]


def texts(result: Generated) -> list[str]:
    """The first answer and the others."""
    return [result.text, *(answer.text for answer in result.alternatives or ())]
