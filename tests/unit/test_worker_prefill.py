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
from mlxd.worker.kvcache import PromptCache
from mlxd.worker.sampling import Sampling
from mlxd.worker.waits import Reuse
from support import tiny_model

pytestmark = pytest.mark.model

SECONDS_PER_TOKEN = 0.002


class SlowModel:
    """A model on a device that takes as long for each token, whichever way they are grouped.

    Attributes:
        widest: the most tokens of one prompt in one call.
        busy_s: how long it has taken so far, whatever else went on beside.
    """

    def __init__(self, model: Any, seconds_per_token: float) -> None:
        self._model = model
        self._seconds_per_token = seconds_per_token
        self.layers = model.layers
        self.widest = 0
        self.busy_s = 0.0

    def __call__(self, tokens: Any, **options: Any) -> Any:
        time.sleep(tokens.size * self._seconds_per_token)
        self.busy_s += tokens.size * self._seconds_per_token
        self.widest = max(self.widest, tokens.shape[1])
        return self._model(tokens, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tiny_model.build(tmp_path_factory.mktemp("model") / "tiny")
    return load_model(folder)[0]


def generate(model: SlowModel, *, prompts: int, length: int) -> tuple[list[list[int]], float]:
    """The tokens of each prompt's answer, and for how many seconds the longest step kept the device busy."""
    generator = RowGenerator(model, max_batch=8, prefill_step=128)
    uids = [
        generator.add([(row * 7 + at) % 300 for at in range(length)], 4, Sampling(), [], StopSequences())
        for row in range(prompts)
    ]
    made: dict[int, list[int]] = {uid: [] for uid in uids}
    longest_s = 0.0
    while generator.active or generator.waiting:
        before = model.busy_s
        for response in generator.next()[1]:
            made[response.uid].append(response.token)
        longest_s = max(longest_s, model.busy_s - before)
    return [made[uid] for uid in uids], longest_s


def test_prompts_are_read_in_parts_that_the_device_gets_through_in_time(model: Any) -> None:
    slow = SlowModel(model, SECONDS_PER_TOKEN)
    answers, longest_s = generate(slow, prompts=8, length=120)
    # All at once they would take 8 · 120 · 2 ms, nearly two seconds.
    assert longest_s < 2 * batch.PREFILL_S
    assert slow.widest < 119
    assert answers == generate(SlowModel(model, 0.0), prompts=8, length=120)[0]


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


def steps_until_all_are_read(model: Any, lengths: list[int]) -> int:
    generator = RowGenerator(model, max_batch=8, prefill_step=16, prefill_joins=1)
    for length in lengths:
        generator.add([5] * length, 64, Sampling(), [], StopSequences())
    steps = 0
    while generator.active < len(lengths) or generator.waiting:
        generator.next()
        steps += 1
    return steps


def test_one_by_one_no_step_goes_by_without_reading(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "SHORT_S", 0.0)
    monkeypatch.setattr(batch, "SHORT_PREFILLS", 12)
    assert steps_until_all_are_read(model, [12] * 4) == 4


def test_prompts_that_are_short_together_are_read_together(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "SHORT_S", 0.0)
    monkeypatch.setattr(batch, "SHORT_PREFILLS", 24)
    assert steps_until_all_are_read(model, [12, 12, 6, 6, 6, 6]) == 2
    assert steps_until_all_are_read(model, [12, 13, 12]) == 3
    monkeypatch.setattr(batch, "SHORT_PREFILLS", 128)
    assert steps_until_all_are_read(model, [12] * 8) == 1


def test_on_a_quick_device_longer_prompts_are_short(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "SHORT_PREFILLS", 12)
    monkeypatch.setattr(batch, "SHORT_S", 0.5)
    monkeypatch.setattr(batch, "FIRST_PREFILL", 48)  # in PREFILL_S, half a second
    assert steps_until_all_are_read(model, [12] * 4) == 1


def test_short_prompts_do_not_join_a_long_one_together(model: Any) -> None:
    """Each would be as long as what is read of the long one."""
    generator = RowGenerator(model, max_batch=8, prefill_step=16, prefill_joins=1)
    generator.add([5] * 200, 64, Sampling(), [], StopSequences())
    generator.next()
    for _ in range(4):
        generator.add([5] * 12, 64, Sampling(), [], StopSequences())
    generator.next()
    assert (generator.active, generator.waiting) == (2, 3)


def test_what_is_kept_of_a_prompt_makes_it_a_short_one(model: Any) -> None:
    cache = PromptCache(model, 10**9)
    generator = RowGenerator(model, max_batch=8, prefill_step=512, prefill_joins=1, prompt_cache=cache)
    shared = [7] * 100
    first = generator.add([*shared, 8, 9], 1, Sampling(), [], StopSequences(), Reuse(b""))
    while generator.active or generator.waiting:
        for made in generator.next()[1]:
            assert made.uid == first
            cache.keep(b"", made.all_tokens, made.prompt_cache)
    generator.settle()
    for row in range(4):
        generator.add([*shared, *range(20 + row, 40 + row)], 64, Sampling(), [], StopSequences(), Reuse(b""))
    generator.next()
    assert (generator.active, generator.waiting) == (4, 0)


def test_prompts_that_waited_for_one_begin_together(model: Any) -> None:
    cache = PromptCache(model, 1 << 30)
    generator = RowGenerator(model, max_batch=8, prefill_step=128, prefill_joins=1, prompt_cache=cache)
    shared = [token % 300 for token in range(200)]
    prompts = [[*shared, 301 + row, *[5 + row] * 9] for row in range(5)]
    first, *others = (generator.add(prompt, 8, Sampling(), [], StopSequences(), Reuse(b"")) for prompt in prompts)
    while not any(response.uid == first for response in generator.next()[1]):
        assert generator.waiting == len(others)
    cache.keep(b"", *reversed(generator.view(first)))
    generator.settle()
    generator.next()
    assert (generator.active, generator.waiting) == (5, 0)
    assert cache.saved_tokens == len(others) * 200


def test_rows_that_all_go_on_together_are_read_as_alone(model: Any) -> None:
    together, _ = generate(SlowModel(model, 0.0), prompts=5, length=40)
    generator = RowGenerator(model, max_batch=1, prefill_step=128)
    alone: list[list[int]] = []
    for row in range(5):
        generator.add([(row * 7 + at) % 300 for at in range(40)], 4, Sampling(), [], StopSequences())
        alone.append([])
        while generator.active or generator.waiting:
            alone[row] += [response.token for response in generator.next()[1]]
    assert together == alone
