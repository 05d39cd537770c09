"""Children: spawning, watching and ending workers and fetchers. Nothing here knows what a child works on."""

from .breaker import Breaker, Breakers, BreakerSettings, BreakerState
from .child import Child
from .death import Cause, Death
from .interface import ChildHandler, ChildSettings, ChildSpec, Log
from .supervisor import Supervisor

__all__ = [
    "Breaker",
    "BreakerSettings",
    "BreakerState",
    "Breakers",
    "Cause",
    "Child",
    "ChildHandler",
    "ChildSettings",
    "ChildSpec",
    "Death",
    "Log",
    "Supervisor",
]
