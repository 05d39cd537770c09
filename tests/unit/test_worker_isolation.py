"""One request's fault is its own: faults in every place that a request brings something to, and in what all share.

In each test a bystander is in the middle of its answer; it ends with the text that it has alone.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxd.childwire import CountTokens
from mlxd.worker import prompt as prompts
from mlxd.worker.batch import RowGenerator
from mlxd.worker.constraint import Constraint
from mlxd.worker.decoding import MAX_FAILED_STEPS
from mlxd.worker.engine import Engine
from mlxd.worker.faults import EngineLost
from mlxd.worker.load import LoadedModel, load
from mlxd.worker.sampling import Plan
from mlxd_client.errors import InternalError, InvalidParams, ModelInvalid, RpcError, Unsupported
from support import tiny_model
from support.engines import GREEDY, Watched, answer, ask, drain, step

pytestmark = pytest.mark.model

BYSTANDER, VICTIM = 1, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("models") / "tiny", heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def plain(folder: Path) -> LoadedModel:
    return load(str(folder), lambda fraction: None)


@pytest.fixture
def loaded(plain: LoadedModel) -> LoadedModel:
    """With a model whose calls can be made to fail."""
    return replace(plain, model=Watched(plain.model))


@pytest.fixture
def engine(loaded: LoadedModel) -> Engine:
    return Engine(loaded, max_batch=8, prefill_step=32, cache_bytes=2**24)


class Scene:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.wanted = answer(engine, "the quick brown fox", max_tokens=16, cache_prompt=False, **GREEDY).text
        self.ends: dict[int, Any] = {}

    def begin(self) -> None:
        self.engine.submit(BYSTANDER, ask("the quick brown fox", max_tokens=16, cache_prompt=False, **GREEDY))
        while not self.engine._generator.plain.decoding:
            step(self.engine, self.ends)

    def end(self) -> None:
        drain(self.engine, self.ends)
        assert self.ends[BYSTANDER].text == self.wanted
        assert self.engine._generator._homes == {}
        assert self.engine._generator.plain.prompt_cache_nbytes == 0

    def running(self) -> Any:
        return next(one for one in self.engine._running.values() if one.id == VICTIM)


@pytest.fixture
def scene(engine: Engine) -> Scene:
    made = Scene(engine)
    made.begin()
    return made


# --- what a request brings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("{{ raise_exception('not this') }}", InvalidParams),
        ("{{ messages[0].content.nothing.at_all }}", ModelInvalid),
        ("{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}", ModelInvalid),
        ("{{ 1 / 0 }}", ModelInvalid),
        (None, Unsupported),
    ],
)
def test_a_template(
    folder: Path, plain: LoadedModel, monkeypatch: pytest.MonkeyPatch, template: str | None, kind: type[RpcError]
) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_LIMIT_S", 0.2)
    loaded = replace(plain, tokenizer=load(str(folder), lambda fraction: None).tokenizer)
    scene = Scene(Engine(loaded, max_batch=8, prefill_step=32))
    scene.begin()
    if template is None:
        loaded.tokenizer.has_chat_template = False
    loaded.tokenizer._tokenizer.chat_template = template
    with pytest.raises(kind):
        scene.engine.submit(VICTIM, ask("hello"))
    scene.end()


def test_a_tokenizer(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_more: Any) -> None:
        raise KeyError("a byte that is in no table")

    with monkeypatch.context() as patch:
        patch.setattr(scene.engine._prompts, "_encode", broken)
        patch.setattr(scene.engine._prompts, "count", broken)
        with pytest.raises(InternalError, match="a byte"):
            scene.engine.submit(VICTIM, ask("hello"))
        with pytest.raises(InternalError, match="a byte"):
            scene.engine.count(CountTokens(text="hello"))
    scene.end()


@pytest.mark.parametrize("place", ["add_token", "finalize"])
def test_a_detokenizer(scene: Scene, place: str) -> None:
    class Broken:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            if name == place:
                raise ArithmeticError(place)
            return getattr(self.inner, name)

    scene.engine.submit(VICTIM, ask("hello", max_tokens=5, **GREEDY))
    text = scene.running().text
    text._detokenizer = Broken(text._detokenizer)
    scene.end()
    assert isinstance(scene.ends[VICTIM], InternalError)
    assert place in scene.ends[VICTIM].message


def test_a_constraint(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: Constraint, _token: int) -> Any:
        raise OverflowError("the rule is lost")

    scene.engine.submit(VICTIM, ask("hello", max_tokens=20, schema={"type": "integer"}))
    while VICTIM not in scene.engine._decoding.uids:
        step(scene.engine, scene.ends)
    monkeypatch.setattr(Constraint, "follow", broken)
    scene.end()
    assert "the rule is lost" in scene.ends[VICTIM].message


def test_what_reports_log_probabilities(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any) -> Any:
        raise UnicodeError("no such token")

    monkeypatch.setattr(scene.engine._results, "report", broken)
    scene.engine.submit(VICTIM, ask("hello", max_tokens=5, logprobs=2))
    scene.end()
    assert "no such token" in scene.ends[VICTIM].message


def test_the_guard_of_one_answer(loaded: LoadedModel) -> None:
    def broken(_source: str, _answer: str) -> Any:
        raise RuntimeError("in the guard")

    scene = Scene(Engine(replace(loaded, faithful=True), max_batch=8, prefill_step=32, guard=broken))
    scene.begin()
    request = ask("hello", max_tokens=5)
    request.kind = "process"
    scene.engine.submit(VICTIM, request)
    scene.end()
    assert "in the guard" in scene.ends[VICTIM].message


# --- what all share -------------------------------------------------------------------------------------------------


def once(scene: Scene, error: Exception) -> Any:
    def fault(*_args: Any, **_more: Any) -> None:
        scene.engine._loaded.model.fault = None
        raise error

    return fault


def assert_clean(scene: Scene) -> None:
    """Both had a typed error, and who comes next is served as ever."""
    drain(scene.engine, scene.ends)
    assert {type(scene.ends[number]) for number in (BYSTANDER, VICTIM)} == {InternalError}
    scene.ends.clear()
    scene.begin()
    scene.end()


def test_a_forward_pass_that_raises_once(scene: Scene) -> None:
    scene.engine.submit(VICTIM, ask("hello", max_tokens=5))
    while scene.engine.waiting:
        step(scene.engine, scene.ends)
    scene.engine._loaded.model.fault = once(scene, ValueError("shapes"))
    assert_clean(scene)


def test_sampling_that_raises_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.engine.submit(VICTIM, ask("hello", max_tokens=5))
    while scene.engine.waiting:
        step(scene.engine, scene.ends)

    def broken(*_args: Any) -> Any:
        raise ValueError("in sampling")

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "sample", broken)
        while VICTIM not in scene.ends:
            step(scene.engine, scene.ends)
    assert_clean(scene)


def test_a_row_that_cannot_be_taken_out(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.engine.submit(VICTIM, ask("hello", max_tokens=5))
    with monkeypatch.context() as patch:
        patch.setattr(scene.engine._generator.plain, "remove", lambda uids: [][1])
        scene.ends.update(scene.engine.cancel(VICTIM).ended)
    assert_clean(scene)


def test_of_a_lane_that_failed_nothing_is_held(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(loaded, max_batch=8, prefill_step=32)
    for number in (1, 2):
        engine.submit(number, ask("hello", max_tokens=20, kv_bits=8))
    while engine.waiting or not engine._generator._homes[engine._decoding.uids[1]].rows.decoding:
        engine.step()
    rows = weakref.ref(engine._generator._homes[engine._decoding.uids[1]].rows)
    with monkeypatch.context() as patch:
        patch.setattr(RowGenerator, "remove", lambda self, uids: [][1])
        ends = dict(engine.cancel(1).ended)
    assert {type(end) for end in ends.values()} == {InternalError}
    assert (len(ends), engine.busy) == (2, False)
    gc.collect()
    assert rows() is None


def test_a_forward_pass_that_always_raises_loses_the_engine(scene: Scene) -> None:
    def fault(*_args: Any, **_more: Any) -> None:
        raise ValueError("always")

    scene.engine._loaded.model.fault = fault
    for number in range(10, 10 + MAX_FAILED_STEPS):
        while scene.engine.busy:
            step(scene.engine, scene.ends)
        scene.engine.submit(number, ask("hello"))
    with pytest.raises(EngineLost, match="always"):
        drain(scene.engine, scene.ends)
    assert isinstance(scene.ends[BYSTANDER], InternalError)


@pytest.mark.parametrize("tried", [False, True])
def test_a_device_that_is_gone_loses_the_engine_at_once(scene: Scene, tried: bool) -> None:
    scene.engine._loaded.model.fault = once(scene, RuntimeError("[METAL] Command buffer execution failed"))
    if tried:  # the first of its kind: the model is tried out with it
        with pytest.raises(EngineLost):
            scene.engine.submit(VICTIM, ask("hello", kv_bits=8))
    else:
        with pytest.raises(EngineLost):
            scene.engine.step()


@pytest.mark.parametrize(("told", "lost"), [("[METAL] Command buffer execution failed", True), ("shapes", False)])
def test_what_raises_when_a_request_has_what_it_waited_for(loaded: LoadedModel, told: str, lost: bool) -> None:
    """The first request where memory is counted has the model tried out, here once its rule is compiled."""
    engine = Engine(loaded, max_batch=8, prefill_step=32, kv_bytes=2**30)

    def fault(*_args: Any, **_more: Any) -> None:
        loaded.model.fault = None
        raise RuntimeError(told)

    loaded.model.fault = fault
    engine.submit(VICTIM, ask("hello", max_tokens=5, schema={"type": "boolean"}))
    if lost:
        with pytest.raises(EngineLost, match="METAL"):
            drain(engine)
    else:
        assert isinstance(drain(engine)[VICTIM], InternalError)
        assert not engine.busy
