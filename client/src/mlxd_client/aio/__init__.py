"""The asyncio shell around rpc.py: `AsyncClient`, its streams, leases and events. One event loop, many tasks."""

from .client import AsyncClient, AsyncModelLease, AsyncStream
from .events import AsyncEventStream

__all__ = ["AsyncClient", "AsyncEventStream", "AsyncModelLease", "AsyncStream"]
