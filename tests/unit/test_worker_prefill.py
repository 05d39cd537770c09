"""How much of the prompts is read at a time: as much as the device gets through in PREFILL_S."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.generate import StopSequences
from mlx_lm.utils import load_model

from mlxd.worker import batch
from mlxd.worker.batch import RowGenerator
from mlxd.worker.sampling import Sampling
from support import tiny_model

pytestmark = pytest.mark.model

SECONDS_PER_TOKEN = 0.002


class SlowModel:
    """A model on a device that takes as long for each token, whichever way they are grouped.

    Attributes:
        widest: the most tokens of one prompt in one call.
    """

    def __init__(self, model: Any, seconds_per_token: float) -> None:
        self._model = model
        self._seconds_per_token = seconds_per_token
        self.layers = model.layers
        self.widest = 0

    def __call__(self, tokens: Any, **options: Any) -> Any:
        time.sleep(tokens.size * self._seconds_per_token)
        self.widest = max(self.widest, tokens.shape[1])
        return self._model(tokens, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tiny_model.build(tmp_path_factory.mktemp("model") / "tiny")
    return load_model(folder)[0]


def generate(model: Any, *, prompts: int, length: int) -> tuple[list[list[int]], float]:
    """The tokens of each prompt's answer, and the longest step in seconds."""
    generator = RowGenerator(model, max_batch=8, prefill_step=128)
    uids = [
        generator.add([(row * 7 + at) % 300 for at in range(length)], 4, Sampling(), [], StopSequences())
        for row in range(prompts)
    ]
    made: dict[int, list[int]] = {uid: [] for uid in uids}
    longest_s = 0.0
    while generator.active or generator.waiting:
        began = time.perf_counter()
        for response in generator.next()[1]:
            made[response.uid].append(response.token)
        longest_s = max(longest_s, time.perf_counter() - began)
    return [made[uid] for uid in uids], longest_s


def test_prompts_are_read_in_parts_that_the_device_gets_through_in_time(model: Any) -> None:
    slow = SlowModel(model, SECONDS_PER_TOKEN)
    answers, longest_s = generate(slow, prompts=8, length=120)
    # All at once they would take 8 · 120 · 2 ms, nearly two seconds.
    assert longest_s < 2 * batch.PREFILL_S
    assert slow.widest < 119
    assert answers == generate(model, prompts=8, length=120)[0]


def test_a_device_that_is_quick_reads_whole_steps_after_the_first(model: Any) -> None:
    quick = SlowModel(model, 0.0)
    generate(quick, prompts=1, length=400)
    assert quick.widest == 128


def test_however_slow_the_device_a_few_tokens_are_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "FIRST_PREFILL", 1)
    monkeypatch.setattr(batch, "PREFILL_S", 0.001)
    crawling = SlowModel(model, 0.005)
    generate(crawling, prompts=2, length=30)
    assert crawling.widest == batch.LEAST_PREFILL


def order_of_first_tokens(model: Any, lengths: list[int], *, joins: int) -> list[int]:
    """Which prompt's answer began first, second, and so on."""
    generator = RowGenerator(model, max_batch=8, prefill_step=16, prefill_joins=joins)
    uids = [generator.add([5] * length, 2, Sampling(), [], StopSequences()) for length in lengths]
    begun: list[int] = []
    while generator.active or generator.waiting:
        begun += [uids.index(made.uid) for made in generator.next()[1] if uids.index(made.uid) not in begun]
    return begun


def test_prompts_that_begin_one_by_one_are_done_one_by_one(model: Any) -> None:
    assert order_of_first_tokens(model, [12, 12, 12], joins=1) == [0, 1, 2]


def test_a_short_prompt_overtakes_a_long_one_that_is_being_read(model: Any) -> None:
    assert order_of_first_tokens(model, [200, 12, 12], joins=1) == [1, 2, 0]


def test_one_by_one_no_step_goes_by_without_reading(model: Any) -> None:
    generator = RowGenerator(model, max_batch=8, prefill_step=16, prefill_joins=1)
    for _ in range(4):
        generator.add([5] * 12, 64, Sampling(), [], StopSequences())
    steps = 0
    while generator.active < 4 or generator.waiting:
        generator.next()
        steps += 1
    assert steps == 4
