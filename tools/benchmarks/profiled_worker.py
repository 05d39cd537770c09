"""A worker that says where its time goes: `python -m benchmarks.profiled_worker --fd N`, as the setting
`worker_command`.

The worker's own functions get a clock around them; the worker itself knows nothing of it. MLX is made to finish what
it is asked for before it returns, so that the time for numbers falls to what wanted them: parts add up, and nothing
runs beside anything else. Whenever the worker has nothing to do, the sums are written to $MLXD_BENCH_PROFILE, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxd.worker import __main__ as worker
from mlxd.worker.blas import Blas, use_blas

OUT = "MLXD_BENCH_PROFILE"
IDLE = "idle"


class Clock:
    """Seconds by part. Where one part is entered from another, the time is the inner one's."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._parts = ["loop"]
        self._at = time.perf_counter()

    def _pass(self) -> None:
        now = time.perf_counter()
        self.seconds[self._parts[-1]] += now - self._at
        self._at = now

    def around(self, place: Any, name: str, part: str | Callable[..., str], *, within: tuple[str, ...] = ()) -> None:
        """Put the clock around a function, found by name in a class or module. `part` may depend on its arguments.
        Called from one of the parts `within`, its time is theirs."""
        function: Callable[..., Any] = getattr(place, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            if self._parts[-1] in within:
                return function(*arguments, **options)
            self._pass()
            self._parts.append(part if isinstance(part, str) else part(*arguments, **options))
            try:
                return function(*arguments, **options)
            finally:
                self._pass()
                self.calls[self._parts.pop()] += 1

        setattr(place, name, timed)


def instrument(clock: Clock) -> None:
    import mlx.core as mx

    from mlxd.childside import Pipe
    from mlxd.worker import constraint, engine, kvcache, loop, prompt, rows, sampling, text

    wait_for = mx.eval
    mx.async_eval = lambda *arrays: wait_for(*arrays)  # type: ignore[assignment,method-assign]
    for place, name, part in (
        (prompt.PromptBuilder, "_apply", "template"),
        (prompt.PromptBuilder, "_encode", "tokenise"),
        (prompt.PromptBuilder, "_cuts", "tokenise"),
        (kvcache.PromptCache, "find", "prefix cache"),
        (kvcache.PromptCache, "settle", "prefix cache"),
        (rows.RowPrompts, "prompt", "prefill"),
        (rows.RowBatch, "_step", "sample"),
        (sampling.Plan, "__init__", "sample"),
        (constraint.Constraint, "follow", "constrain"),
        (text.TextStream, "add", "detokenise"),
        (text.TextStream, "finish", "detokenise"),
        (engine.Engine, "step", "batch"),
        (engine.Engine, "submit", "batch"),
        (Pipe, "notify", "encode"),
        (Pipe, "reply", "encode"),
        (Pipe, "flush", "pipe"),
    ):
        clock.around(place, name, part)

    load = loop.load

    def load_profiled(*arguments: Any) -> Any:
        loaded = load(*arguments)
        kind = type(loaded.model)
        call = kind.__call__

        def computed(*arguments: Any, **options: Any) -> Any:
            made = call(*arguments, **options)
            wait_for(made)
            return made

        kind.__call__ = computed
        clock.around(kind, "__call__", "forward", within=("prefill",))
        return loaded

    loop.load = load_profiled  # type: ignore[attr-defined]
    receive, out = Pipe.receive, Path(os.environ[OUT])

    def receive_or_write(pipe: Pipe, timeout_s: float) -> Any:
        if timeout_s > 0:
            write(clock, out)
        return receive(pipe, timeout_s)

    Pipe.receive = receive_or_write  # type: ignore[method-assign]
    clock.around(Pipe, "receive", lambda _pipe, timeout_s: IDLE if timeout_s > 0 else "pipe")


def write(clock: Clock, out: Path) -> None:
    made = out.with_suffix(".new")
    made.write_text(json.dumps({"seconds": clock.seconds, "calls": clock.calls}))
    made.replace(out)


def choose(wished: str) -> Blas:
    """What comes after it may import MLX."""
    blas = use_blas(wished)
    instrument(Clock())
    return blas


if __name__ == "__main__":
    worker.use_blas = choose  # type: ignore[attr-defined]
    code = worker.main()
    sys.stderr.flush()
    os._exit(code)
