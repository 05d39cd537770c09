"""The model state machine: one data table of transitions, from which the docs' diagram is drawn, and what applies it.

An illegal transition raises with the model's story; nothing is repaired in silence.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from mlxd_client.types import ModelState


class Transition(NamedTuple):
    """`cause` happened in state `source`: the model is now in `target`, and `event` tells the subscribers."""

    source: ModelState
    cause: str
    target: ModelState
    event: str


TRANSITIONS: tuple[Transition, ...] = (
    Transition("NotDownloaded", "found", "Downloaded", "model_found"),
    Transition("NotDownloaded", "download", "Downloading", "download_started"),
    Transition("Downloading", "downloaded", "Downloaded", "download_completed"),
    Transition("Downloading", "download_failed", "NotDownloaded", "error"),
    Transition("Downloading", "download_cancelled", "NotDownloaded", "download_cancelled"),
    Transition("Downloaded", "load", "Loading", "loading_started"),
    Transition("Downloaded", "deleted", "NotDownloaded", "deleted"),
    Transition("Downloaded", "lost", "NotDownloaded", "model_lost"),
    Transition("Loading", "loaded", "Ready", "loading_completed"),
    Transition("Loading", "load_failed", "Downloaded", "error"),
    Transition("Loading", "load_cancelled", "Downloaded", "unloaded"),
    Transition("Loading", "worker_died", "Downloaded", "worker_died"),
    Transition("Ready", "unloaded", "Downloaded", "unloaded"),
    Transition("Ready", "recycled", "Downloaded", "unloaded"),
    Transition("Ready", "worker_died", "Downloaded", "worker_died"),
)

_BY_SOURCE_AND_CAUSE = {(t.source, t.cause): t for t in TRANSITIONS}


class IllegalTransition(Exception):
    """A cause that the table does not know in this state: a bug, told with what led to it.

    Attributes:
        story: the model's last transitions, oldest first, as sentences.
    """

    def __init__(self, model: str, state: ModelState, cause: str, story: tuple[str, ...]) -> None:
        self.story = story
        told = "; ".join(story) or "nothing happened to it before"
        super().__init__(f"{model} is {state}: {cause!r} is not possible there. Its story: {told}")


class Lifecycle:
    """One model's place in the machine. `state` is changed here and nowhere else."""

    __slots__ = ("_model", "_story", "state")

    def __init__(self, model: str, state: ModelState = "NotDownloaded") -> None:
        self._model = model
        self._story: deque[tuple[float, Transition]] = deque(maxlen=16)
        self.state: ModelState = state

    @property
    def steps(self) -> tuple[tuple[float, Transition], ...]:
        """Its last transitions, oldest first, and when each was."""
        return tuple(self._story)

    @property
    def story(self) -> tuple[str, ...]:
        return tuple(f"at {at:.3f} {t.cause}: {t.source} → {t.target}" for at, t in self._story)

    def apply(self, cause: str, now: float) -> Transition:
        """Follow the table. Raises IllegalTransition where it has no such entry."""
        transition = _BY_SOURCE_AND_CAUSE.get((self.state, cause))
        if transition is None:
            raise IllegalTransition(self._model, self.state, cause, self.story)
        self._story.append((now, transition))
        self.state = transition.target
        return transition


def diagram() -> str:
    """The table as a Mermaid state diagram, as it stands in the docs."""
    causes: dict[tuple[ModelState, ModelState], list[str]] = {}
    for t in TRANSITIONS:
        causes.setdefault((t.source, t.target), []).append(t.cause)
    lines = ["stateDiagram-v2", "    [*] --> NotDownloaded"]
    lines += [f"    {source} --> {target}: {', '.join(names)}" for (source, target), names in causes.items()]
    return "\n".join(lines) + "\n"
