"""How much is measured: a full run for the docs, a quick one while working, a smoke that only shows that it runs."""

from __future__ import annotations

from dataclasses import dataclass

STREAMS = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """One model's share: `tokens` of each answer (of `prefix`, of the prompt), and how many pairs of runs each
    comparison gets. Answers with guesses (`guess`) have models of their own; `shape` says how much of them."""

    stream_tokens: int
    stream_rounds: int
    batch_tokens: int
    batch_rounds: int
    http_rounds: int
    prefix_tokens: int
    prefix_rounds: int
    guess_tokens: int = 0
    guess_rounds: int = 0


@dataclass(frozen=True, slots=True)
class Effort:
    """
    Attributes:
        pings: round trips in one run; a comparison has `ping_rounds` pairs of runs.
        pipelined: pings in one pipelined run.
        download_mb, download_rounds: the size of a download, in MB, and how many pairs each comparison gets.
        width, layers: of the larger random-weight model.
    """

    ping_rounds: int
    pings: int
    pipelined: int
    width: int
    layers: int
    cleanup: Scale
    shape: Scale
    download_mb: int
    download_rounds: int


# The larger model has 0.1 B parameters; see models.py.
_FULL_SHAPE, _QUICK_SHAPE = Scale(16, 5, 8, 3, 7, 2_000, 1, 250, 5), Scale(8, 1, 6, 1, 1, 500, 1, 150, 2)
FULL = Effort(15, 400, 20_000, 768, 14, Scale(192, 15, 96, 5, 5, 2_000, 5), _FULL_SHAPE, 2_000, 5)
QUICK = Effort(7, 200, 5_000, 768, 14, Scale(96, 3, 24, 2, 2, 2_000, 3), _QUICK_SHAPE, 1_000, 3)
SMOKE = Effort(2, 10, 100, 64, 2, Scale(8, 1, 4, 1, 1, 200, 1), Scale(8, 1, 4, 1, 1, 200, 1, 16, 1), 4, 1)
