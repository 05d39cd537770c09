"""One request in flight, and what a step brought to all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlxd_client.errors import RpcError

from ..childwire import Adapted, Calls, Embedded, Generate, Generated
from .adapters import Adapter
from .calls import ToolUse
from .constraint import Constraint
from .options import Choices
from .prompt import Prompt
from .speculation import Guess
from .text import TextStream
from .vision import Sight
from .waits import Reuse

# The kind of a request that is of this worker's own: its prompt is to be kept, its answer is of no use.
PREWARM = "prewarm"


@dataclass(slots=True)
class Running:
    """One request in flight. Times are of `time.perf_counter`, in seconds; 0 where not reached yet."""

    id: int
    request: Generate
    prompt: Prompt
    choices: Choices
    text: TextStream
    received_at: float
    reuse: Reuse | None = None
    tokens: int = 0
    prompt_at: float = 0.0
    first_at: float = 0.0
    constraint: Constraint | None = None
    sight: Sight | None = None
    tools: ToolUse | None = None
    guess: Guess | None = None
    adapter: Adapter | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    number: int = 0  # among the answers to its request


@dataclass(slots=True)
class Outcome:
    """What one step brought: `pieces`, `calls` and `others` as in childwire.Step, and the requests that ended."""

    pieces: list[tuple[int, str, str]] = field(default_factory=list)
    calls: list[Calls] = field(default_factory=list)
    others: list[tuple[int, int, str, str]] = field(default_factory=list)
    ended: list[tuple[int, Generated | Embedded | Adapted | RpcError]] = field(default_factory=list)

    def add(self, running: Running, text: str, reasoning: str) -> None:
        """New text of a request that streams."""
        if running.number:
            self.others.append((running.id, running.number, text, reasoning))
        else:
            self.pieces.append((running.id, text, reasoning))
