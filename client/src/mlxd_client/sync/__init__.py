"""The blocking shell around rpc.py: `Client`, its streams, leases and events. Threads may share a client."""

from .client import Client, ModelLease, Stream
from .events import EventStream

__all__ = ["Client", "EventStream", "ModelLease", "Stream"]
