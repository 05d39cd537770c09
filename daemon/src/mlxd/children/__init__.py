"""Children: spawning, watching and ending workers and fetchers. Nothing here knows what a child works on."""

from .child import Child
from .death import Cause, Death
from .interface import ChildHandler, ChildSettings, ChildSpec, Log
from .supervisor import Supervisor

__all__ = [
    "Cause",
    "Child",
    "ChildHandler",
    "ChildSettings",
    "ChildSpec",
    "Death",
    "Log",
    "Supervisor",
]
