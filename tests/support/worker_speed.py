"""What the worker costs over mlx_lm in process, as ratios. In tests: `python -m support.worker_speed [folder]`.

Two ways are measured in turn, step by step with the device drained after each, so that whatever else the machine does
hits both alike; the ratio is the median over the pairs. Draining hides nothing: the engine's own work, which overlaps
with the device's in real use, counts in full.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generation_stream, stream_generate
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlxd.childwire import Generate
from mlxd.worker.engine import Engine
from mlxd.worker.load import LoadedModel, load
from support import tiny_model

TEXT = "So I think we should meet on Monday at 3 PM, if that is fine"
TOKENS = 80
WARM_UP_STEPS = 5

Way = Callable[[], Iterator[Any]]


class Ways:
    """The same generation, three ways. `drawn` uses a request's defaults, else it is greedy."""

    def __init__(self, loaded: LoadedModel, drawn: bool) -> None:
        self._loaded = loaded
        self._drawn = drawn
        loaded.tokenizer.eos_token_ids = []  # all generate equally much
        self._engine = Engine(loaded, max_batch=32, prefill_step=128)
        messages = [{"role": "user", "content": TEXT}]
        self._request = Generate(
            kind="chat",
            messages=messages,
            stream=True,
            options={"max_tokens": TOKENS} | ({} if drawn else {"temperature": 0, "repetition_penalty": 1.0}),
        )
        self._prompt = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
        self._sampler = make_sampler(0.7, 0.8) if drawn else None
        self._processors = make_logits_processors(None, 1.15) if drawn else []

    def engine(self, streams: int) -> Iterator[Any]:
        for number in range(streams):
            self._engine.submit(number, self._request)
        while self._engine.busy:
            yield self._engine.step()

    def stream_generate(self) -> Iterator[Any]:
        options: dict[str, Any] = {"sampler": self._sampler, "logits_processors": self._processors}
        yield from stream_generate(
            self._loaded.model, self._loaded.tokenizer, self._prompt, max_tokens=TOKENS, **options
        )

    def batch_generator(self, streams: int) -> Iterator[Any]:
        generator = BatchGenerator(self._loaded.model, sampler=self._sampler, logits_processors=self._processors)
        generator.insert([self._prompt] * streams, [TOKENS] * streams)
        while responses := generator.next_generated():
            yield responses


def compare(reference: Way, ours: Way, rounds: int) -> float:
    """Our tokens/s over the reference's."""
    ratios = []
    for _ in range(rounds):
        ways, took, step = (reference(), ours()), [0.0, 0.0], 0
        try:
            while True:
                for which in (0, 1) if step % 2 else (1, 0):
                    started = time.perf_counter()
                    next(ways[which])
                    mx.synchronize(generation_stream)
                    took[which] = time.perf_counter() - started
                step += 1
                if step > WARM_UP_STEPS:
                    ratios.append(took[0] / took[1])
        except StopIteration:
            for way in ways:
                for _ in way:
                    pass
    return statistics.median(ratios)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else tiny_model.build(Path(scratch), hidden=256, layers=4)
        for drawn in (False, True):
            ways = Ways(load(str(folder), lambda fraction: None), drawn)
            one = compare(ways.stream_generate, lambda ways=ways: ways.engine(1), 4)  # type: ignore[misc]
            eight = compare(lambda ways=ways: ways.batch_generator(8), lambda ways=ways: ways.engine(8), 3)  # type: ignore[misc]
            print(f"{'drawn ' if drawn else 'greedy'}  1 stream / stream_generate {one:.3f}", end="  ")
            print(f"8 streams / BatchGenerator {eight:.3f}", flush=True)


if __name__ == "__main__":
    main()
