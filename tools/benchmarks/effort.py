"""How much is measured: a full run for the docs, a quick one while working, a smoke that only shows that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STREAMS = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """One model's share: `tokens` of each answer (of `prefix`, and where it says `prompt`, of the prompt), how many
    streams there are, and how many pairs of runs each comparison gets. Answers with guesses (`guess`) have models of
    their own; `shape` says how much of them."""

    stream_tokens: int
    stream_rounds: int
    batch_tokens: int
    batch_rounds: int
    http_rounds: int
    prefix_tokens: int
    prefix_rounds: int
    guess_tokens: int = 0
    guess_rounds: int = 0
    load_streams: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    load_tokens: int = 48
    load_rounds: int = 5
    blas_streams: tuple[int, ...] = (1, 8, 32)
    blas_tokens: int = 12
    blas_prompt: int = 500
    blas_rounds: int = 3
    mixed_clients: int = 8
    mixed_turns: int = 4
    mixed_tokens: int = 16
    mixed_prompt: int = 500
    mixed_rounds: int = 5
    job_items: int = 200
    job_tokens: int = 16
    job_rounds: int = 5
    fairness_tokens: int = 3_000
    profile_tokens: int = 64
    profile_rounds: int = 8


@dataclass(frozen=True, slots=True)
class Effort:
    """
    Attributes:
        pings: round trips in one run; a comparison has `ping_rounds` pairs of runs.
        pipelined: pings in one pipelined run.
        download_mb, download_rounds: the size of a download, in MB, and how many pairs each comparison gets.
        width, layers: of the larger random-weight model.
        dense_width, dense_layers: of the one that is not quantised.
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
    dense: Scale
    dense_width: int = 512
    dense_layers: int = 9


_FEW: dict[str, Any] = {
    "job_items": 60, "job_rounds": 1,
    "load_streams": (1, 8, 32), "load_tokens": 16, "load_rounds": 2, "blas_streams": (8,), "blas_tokens": 6,
    "blas_prompt": 200, "blas_rounds": 1, "mixed_clients": 4, "mixed_turns": 2, "mixed_tokens": 8, "mixed_prompt": 200,
    "mixed_rounds": 1, "fairness_tokens": 1_000, "profile_tokens": 24, "profile_rounds": 3,
}  # fmt: skip
_LEAST: dict[str, Any] = _FEW | {
    "job_items": 12, "job_tokens": 2,
    "load_streams": (2,), "load_tokens": 4, "load_rounds": 1, "blas_tokens": 2, "blas_prompt": 20, "mixed_clients": 2,
    "mixed_tokens": 2, "mixed_prompt": 70, "fairness_tokens": 200, "profile_tokens": 8, "profile_rounds": 1,
}  # fmt: skip
# The larger model has 0.1 B parameters; see models.py.
FULL = Effort(
    15, 400, 20_000, 768, 14,
    Scale(192, 15, 96, 5, 5, 2_000, 5), Scale(16, 5, 8, 3, 7, 2_000, 1, 250, 5), 2_000, 5,
    Scale(64, 5, 32, 5, 5, 500, 3),
)  # fmt: skip
QUICK = Effort(
    7, 200, 5_000, 768, 14,
    Scale(96, 3, 24, 2, 2, 2_000, 3, **_FEW), Scale(8, 1, 6, 1, 1, 500, 1, 150, 2), 1_000, 3,
    Scale(16, 1, 8, 1, 1, 200, 1, **_FEW),
)  # fmt: skip
SMOKE = Effort(
    2, 10, 100, 64, 2,
    Scale(8, 1, 4, 1, 1, 200, 1, **_LEAST), Scale(8, 1, 4, 1, 1, 200, 1, 16, 1), 4, 1,
    Scale(8, 1, 4, 1, 1, 200, 1, **_LEAST), 64, 2,
)  # fmt: skip
