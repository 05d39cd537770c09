"""Many streams at once: against an in-process BatchGenerator with the same BLAS, and against the BLAS that MLX brings.

As many clients, each with a connection of its own, begin at once. Tokens per second are of all of them together, from
the first request to the last token. Nothing is guessed ahead: a BatchGenerator does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from .effort import Scale
from .generation_rows import Prompts, alternate, batch_ours, stream_ours
from .prefix_rows import conversation
from .processes import Daemon, Reference
from .table import Row, paired


def load_rows(label: str, daemon: Daemon, reference: Reference, model: Path, scale: Scale) -> Iterator[Row]:
    prompts = Prompts(model)

    def ours(streams: int, tokens: int = scale.load_tokens) -> float:
        return together(daemon, model, prompts, streams, tokens)

    def theirs(streams: int, tokens: int = scale.load_tokens) -> float:
        run = reference.ask("batch", prompts=[prompts.one() for _ in range(streams)], tokens=tokens)
        return whole(run["tokens"], streams * tokens) / float(run["total_s"])

    for streams in scale.load_streams:
        ours(streams, 2), theirs(streams, 2)  # each number of rows has kernels of its own
        pairs = alternate(scale.load_rounds, lambda n=streams: ours(n), lambda n=streams: theirs(n))
        what = f"{label}: {streams} streams; BatchGenerator"
        yield paired(f"load/{model.name}", what, pairs, "tokens/s", (">=", 0.95))


def blas_rows(label: str, daemon: Daemon, model: Path, scale: Scale) -> Iterator[Row]:
    """The same daemon and worker twice, but for the library that multiplies."""
    prompts, name = Prompts(model), f"blas/{model.name}"
    with Daemon(MLXD_BLAS="bundled") as other:
        with other.client() as client:
            client.load(str(model), keep_alive=-1)
        for streams in scale.blas_streams:
            pairs = alternate(
                scale.blas_rounds,
                lambda n=streams: together(daemon, model, prompts, n, scale.blas_tokens),
                lambda n=streams: together(other, model, prompts, n, scale.blas_tokens),
            )
            target = (">=", 2.0) if streams >= 8 else None
            yield paired(name, f"{label}: {streams} streams; MLX's own BLAS", pairs, "tokens/s", target)
        with daemon.client() as fast, other.client() as slow:
            messages = conversation(fast, model, scale.blas_prompt, prompts.random)
            firsts = alternate(
                scale.blas_rounds,
                lambda: stream_ours(fast, model, messages, 2, cache_prompt=False)["first_s"] * 1e3,
                lambda: stream_ours(slow, model, messages, 2, cache_prompt=False)["first_s"] * 1e3,
            )
    what = f"{label}: first token after {scale.blas_prompt} tokens; MLX's own BLAS"
    yield paired(name, what, firsts, "ms", ("<=", 0.5))


def together(daemon: Daemon, model: Path, prompts: Prompts, streams: int, tokens: int) -> float:
    """Tokens per second of so many streams of the daemon."""
    asked = [prompts.one() for _ in range(streams)]
    run = asyncio.run(batch_ours(daemon.socket, model, asked, tokens, speculation="off"))
    return whole(run["tokens"], streams * tokens) / float(run["total_s"])


def whole(made: int, wanted: int) -> float:
    if made != wanted:
        raise RuntimeError(f"asked for {wanted} tokens, got {made}")
    return float(made)
