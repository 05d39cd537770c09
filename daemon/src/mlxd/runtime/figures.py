"""What became of requests goes into the statistics and, where it took long, into the log; and what they come to."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mlxd_client import errors, types

from .. import childwire as wire
from ..generation import Generation, timings, usage
from ..stats import Finished, Gauges, Statistics

if TYPE_CHECKING:
    from ..server.runtime_api import Log
    from ..settings import Settings

# A part of a request's time below this is not worth a field in the log.
_NOISE_S = 0.0005


class Figures:
    """Of one daemon.

    Attributes:
        statistics: for those who have more to add to them.
    """

    def __init__(self, settings: Settings, log: Log) -> None:
        self.statistics = Statistics()
        self._settings = settings
        self._log = log

    def ended(self, request: Generation, how: str, made: wire.Generated | None) -> None:
        """A generation has ended.

        Args:
            how: its finish reason, or the kind of its error.
            made: what its worker said of it, if anything; also of one that was cancelled.
        """
        spent = timings(request, made)
        first = spent.first_token_s if made is not None and made.timings.first_token_s else None
        # One of a batch waits for as long as others want the model: that is no news, and no measure for the others.
        urgent = request.params.priority != "batch"
        slow = urgent and self._is_slow(spent.total_s, first)
        waited = request.dispatched_at is not None or (how == "deadline_exceeded" and request.model != "")
        answered = made is not None and how == made.finish_reason and how != "cancelled"
        self.statistics.finished(
            Finished(
                request.model, request.kind, how, queue_s=spent.queue_s if waited and urgent else None,
                first_token_s=first if urgent else None, decode_s=spent.decode_s if answered else 0.0,
                total_s=spent.total_s if answered and urgent else None,
                usage=None if made is None else usage(made), speculation=None if made is None else made.speculation,
                slow=slow,
            )
        )  # fmt: skip
        if slow:
            self._tell_slow(request, how, made, spent)

    def _is_slow(self, total_s: float, first_token_s: float | None = None) -> bool:
        settings = self._settings
        if 0 < settings.slow_request_s <= total_s:
            return True
        return 0 < settings.slow_first_token_s <= (total_s if first_token_s is None else first_token_s)

    def _tell_slow(self, request: Generation, how: str, made: wire.Generated | None, spent: types.Timings) -> None:
        """One line for one that was slow: where its time went, and which part took most. Never what was said."""
        found_s = (request.found_at or time.monotonic()) - request.accepted_at
        parts = {"downloading": found_s, "queued": spent.queue_s - found_s, "loading": spent.load_s}
        if made is not None:
            parts |= {"prompt": spent.prompt_s, "decoding": spent.decode_s}
        parts["answering"] = spent.total_s - sum(parts.values())  # what the others do not account for
        phase = max(parts, key=lambda name: parts[name])
        told = {f"{name}_s": round(took, 4) for name, took in parts.items() if took >= _NOISE_S}
        if made is not None:
            told["first_token_s"] = round(spent.first_token_s, 4)
            told |= {name: getattr(made, name) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")}
        self._log.warning(
            "slow request", request=request.sink.request_name, model=request.model, method=request.kind, how=how,
            phase=phase, total_s=round(spent.total_s, 4), **told,
        )  # fmt: skip

    def told(self, gauges: Gauges, only: str | None = None) -> types.Stats:
        return self.statistics.told(gauges, time.monotonic(), only)

    def counting(self, method: str) -> Counting:
        return Counting(self, method)

    def asked(self, method: str, model: str, outcome: str, took_s: float, prompt_tokens: int) -> None:
        """A question that is no generation has ended."""
        slow = self._is_slow(took_s)
        spent = types.Usage(prompt_tokens=prompt_tokens, completion_tokens=0) if prompt_tokens else None
        self.statistics.finished(Finished(model, method, outcome, usage=spent, slow=slow))
        if slow:
            self._log.warning("slow request", model=model, method=method, how=outcome, total_s=round(took_s, 4))


class Counting:
    """`with figures.counting("embed") as counted:` counts what is done there by how it ends.

    Attributes:
        model: to be set once it is known.
        prompt_tokens: to be set where it is known.
    """

    def __init__(self, figures: Figures, method: str) -> None:
        self.model = ""
        self.prompt_tokens = 0
        self._figures, self._method = figures, method
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            outcome = "done"
        elif isinstance(error, errors.RpcError):
            outcome = error.kind
        else:
            outcome = "cancelled" if isinstance(error, asyncio.CancelledError) else "internal_error"
        took_s = time.monotonic() - self._began
        self._figures.asked(self._method, self.model, outcome, took_s, self.prompt_tokens)
