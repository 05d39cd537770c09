"""What a task tells the loop: how far it got, and how it ended."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from mlxd_client.errors import InternalError, RpcError

from ..childwire import Fetching


class Report:
    """Between the task's thread and the loop. `wake` is called once the task ended."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._ended: Any = None
        self.progress: Callable[[], Fetching] | None = None

    def end(self, outcome: Any) -> None:
        with self._lock:
            self._ended = outcome
        self._wake()

    @property
    def outcome(self) -> Any:
        """The result or an RpcError; None while it runs."""
        with self._lock:
            return self._ended


def internal(error: BaseException) -> RpcError:
    """A mistake of ours: its place goes to the log, its words do not, for they may hold what a server sent."""
    print(f"{type(error).__name__} in a fetcher:", *traceback.format_tb(error.__traceback__), sep="\n", file=sys.stderr)
    return InternalError(f"a fetcher failed: {type(error).__name__}")
