"""Driving a worker's engine in the test's own process: asking, stepping, counting what the model is called for."""

from __future__ import annotations

from typing import Any

from mlxd.childwire import Generate
from mlxd.worker.engine import Engine
from mlxd.worker.running import Outcome

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0}


def ask(text: str, *, priority: str = "interactive", **options: Any) -> Generate:
    turns = [{"role": "user", "content": text}]
    return Generate(kind="chat", messages=turns, options=options, stream=True, priority=priority)


def step(engine: Engine, ends: dict[int, Any]) -> Outcome:
    outcome = engine.step()
    ends.update(outcome.ended)
    return outcome


def drain(engine: Engine, ends: dict[int, Any] | None = None) -> dict[int, Any]:
    """Step until nobody is left; {request id: result or error}."""
    ends = {} if ends is None else ends
    while engine.busy:
        step(engine, ends)
    return ends


def answer(engine: Engine, text: str, **options: Any) -> Any:
    engine.submit(0, ask(text, **options))
    return drain(engine)[0]


class Watched:
    """A model, with a look at what it is called for: (rows, tokens) of each call. `fault` may raise before a call."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.calls: list[tuple[int, int]] = []
        self.fault: Any = None

    def __call__(self, tokens: Any, **options: Any) -> Any:
        if self.fault is not None:
            self.fault(tokens, **options)
        self.calls.append(tokens.shape)
        return self.model(tokens, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
