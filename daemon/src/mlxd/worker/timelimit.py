"""How long code may run that a model's folder brings, or that works on what a model wrote."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from mlxd_client.errors import ModelInvalid


class _Late(BaseException):
    """Interrupts the code: none that catches Exception for purposes of its own catches this."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str = "the model's chat template") -> Iterator[None]:
    """Interrupt Python code that runs longer. On any thread but the main one there is no limit.

    Args:
        what: ran too long, for the error's message.

    Raises:
        ModelInvalid: instead of what the code that ran too long would have returned.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(_number: int, _frame: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, give_up)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Late:
        raise ModelInvalid(f"{what} ran longer than {seconds:g} seconds") from None
    finally:
        signal.signal(signal.SIGALRM, before)
