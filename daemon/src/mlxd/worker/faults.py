"""Whose an error is: a request's own, which gets it typed, or the device's, which costs the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlxd_client.errors import InternalError, RpcError

# A device that said this does not compute again in this process.
_FATAL = ("[METAL]", "command buffer", "[CUDA]")


class EngineLost(Exception):
    """The device, or MLX's state in this process, can no longer be trusted: the process must end."""


def check_alive(error: Exception) -> None:
    """Raises EngineLost where an error says that the device is gone. A typed one may quote what a request says."""
    message = str(error)
    if not isinstance(error, RpcError) and any(sign.lower() in message.lower() for sign in _FATAL):
        raise EngineLost(f"{type(error).__name__}: {message}") from error


def typed(error: Exception) -> RpcError:
    if isinstance(error, RpcError):
        return error
    return InternalError(f"the engine failed: {type(error).__name__}: {error}")


@contextmanager
def own() -> Iterator[None]:
    """What is raised within is one request's alone, a tokenizer's or a template's own error too.

    Raises:
        RpcError: the typed form.
        EngineLost: it was the device after all.
    """
    try:
        yield
    except RpcError:
        raise
    except Exception as error:
        check_alive(error)
        raise typed(error) from error
