"""Adapters on real, tiny models: what mlx_lm computes with each alone is what rows of one batch get."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.tuner.utils import load_adapters

from mlxd.childwire import Generate
from mlxd.store.adapter import examine_adapter
from mlxd.worker.adapters import Adapters
from mlxd.worker.engine import Engine
from mlxd.worker.load import LoadedModel, load
from mlxd_client.errors import InvalidParams, ModelNotFound, RpcError, Unsupported
from support import tiny_adapter, tiny_model
from support.mix import held_bytes

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "logprobs": 0}
TEXTS = ["hello", "the quick brown fox", "So I think we should meet", "numbers 1 2 3", "a"]
TOKENS = 14
AMPLE = 1 << 26

BASES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3 in 4 bits": {"quantize": 4},
    "gemma3_text": {"family": "gemma3_text"},
    "gpt_oss": {"family": "gpt_oss"},  # biases; experts
    "qwen3_moe": {"family": "qwen3_moe"},
    "falcon_h1": {"family": "falcon_h1"},
}
LINEAR = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
WHOLE = {"keys": [*LINEAR, "model.embed_tokens", "lm_head"]}
# What is mixed in one batch, with the base model itself.
SETS: dict[str, list[dict[str, Any]]] = {
    "qwen3": [{"rank": 2}, {"kind": "dora", "rank": 5, "keys": LINEAR}, {"layers": 1, "scale": 6.0}, WHOLE],
    "qwen3 in 4 bits": [{}, {"kind": "dora", "keys": LINEAR}, {"layers": 1, "rank": 8}, WHOLE],
    "gemma3_text": [{}, {"keys": ["self_attn.q_proj", "model.embed_tokens"]}, {"kind": "dora"}],
    "gpt_oss": [{}, {"kind": "dora", "keys": ["self_attn.q_proj", "self_attn.o_proj"]}, {"layers": 1}],
    "qwen3_moe": [{}, {"rank": 2, "layers": 1}],
    "falcon_h1": [{}, {"kind": "dora", "keys": ["mamba.in_proj", "mamba.out_proj", "lm_head"]}],
}


class World:
    """One base model, its adapters, and what mlx_lm says with each of them; index 0 is the base model."""

    def __init__(self, folder: Path, name: str) -> None:
        self.base = tiny_model.build(folder / "base", **BASES[name])
        self.loaded = self.load()
        self.adapters: list[Path | None] = [None]
        for number, settings in enumerate(SETS[name]):
            self.adapters.append(tiny_adapter.build(folder / f"a{number}", self.base, seed=number, **settings))
        self._said: dict[tuple[int, str], list[int]] = {}
        self._references: dict[int, LoadedModel] = {}
        self._engine: Engine | None = None

    def load(self) -> LoadedModel:
        loaded = load(str(self.base), lambda fraction: None)
        loaded.tokenizer.eos_token_ids = []  # answers have the length that is asked for
        return loaded

    def engine(self, **limits: Any) -> Engine:
        """An engine on the base model as it was; the one before it is not used any more."""
        if self._engine is not None:
            for adapter in list(self._engine.adapters._kept.values()):
                self._engine.adapters._remove(adapter)
        self._engine = Engine(self.loaded, **{"max_batch": 8, "prefill_step": 16} | limits)
        return self._engine

    def reference(self, number: int, text: str) -> list[int]:
        if number not in self._references:
            loaded = self._references[number] = self.load()
            if self.adapters[number] is not None:
                load_adapters(loaded.model, str(self.adapters[number]))
                loaded.model.set_dtype(mx.float32)
                loaded.model.eval()
        if (number, text) not in self._said:
            loaded = self._references[number]
            prompt = loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, enable_thinking=False
            )
            made = stream_generate(loaded.model, loaded.tokenizer, prompt, max_tokens=TOKENS)
            self._said[number, text] = [part.token for part in made]
        return self._said[number, text]

    def ask(self, number: int, text: str, **options: Any) -> Generate:
        adapter = self.adapters[number]
        return ask(text, None if adapter is None else adapter, **options)


def ask(text: str, adapter: Path | str | None = None, **options: Any) -> Generate:
    return Generate(
        kind="chat",
        messages=[{"role": "user", "content": text}],
        options=GREEDY | {"max_tokens": TOKENS} | options,
        adapter=None if adapter is None else str(adapter),
    )


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    class Worlds(dict[str, World]):
        def __missing__(self, name: str) -> World:
            made = self[name] = World(tmp_path_factory.mktemp("world"), name)
            return made

    return Worlds()


@pytest.fixture
def world(worlds: dict[str, World]) -> World:
    return worlds["qwen3"]


def drain(engine: Engine, ends: dict[int, Any] | None = None) -> dict[int, Any]:
    ends = {} if ends is None else ends
    while engine.busy:
        ends.update(engine.step().ended)
    return ends


def answer(engine: Engine, request: Generate) -> Any:
    engine.submit(0, request)
    return drain(engine)[0]


def tokens(end: Any) -> list[int]:
    return [entry["token_id"] for entry in end.logprobs]


@pytest.mark.parametrize("name", BASES)
def test_rows_with_different_adapters_share_a_batch(worlds: dict[str, World], name: str) -> None:
    world = worlds[name]
    engine = world.engine()
    ends: dict[int, Any] = {}
    asked = [(row % len(world.adapters), text) for row, text in enumerate(TEXTS * 2)]
    most = 0
    for row, (number, text) in enumerate(asked):
        engine.submit(row, world.ask(number, text))
        ends.update(engine.step().ended)  # they join in mid-flight
        most = max(most, engine.active)
    drain(engine, ends)
    assert most >= 4
    for row, (number, text) in enumerate(asked):
        assert tokens(ends[row]) == world.reference(number, text), (number, text)
    assert len({tuple(world.reference(number, TEXTS[0])) for number in range(len(world.adapters))}) == len(
        world.adapters
    )


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_rows_with_adapters_take_places_that_others_left(worlds: dict[str, World], name: str) -> None:
    world = worlds[name]
    engine, draw = world.engine(max_batch=5), random.Random(3)
    rows = engine._generator.plain._generation_batch
    asked = [
        (draw.randrange(len(world.adapters)), draw.choice(TEXTS), draw.randrange(1, TOKENS + 1)) for _ in range(25)
    ]
    ends: dict[int, Any] = {}
    mixed = 0
    for row, (number, text, most) in enumerate(asked):
        engine.submit(row, world.ask(number, text, max_tokens=most))
        for _ in range(draw.randrange(1, 4)):
            ends.update(engine.step().ended)
            mixed += rows.open_places > 0 and rows._mix is not None
    drain(engine, ends)
    assert mixed > 3
    for row, (number, text, most) in enumerate(asked):
        assert tokens(ends[row]) == world.reference(number, text)[:most]
    for row, most in enumerate((4, 9, 9)):  # the last two end in one step, beside an open place
        engine.submit(row, world.ask(row % 2, "hello", max_tokens=most))
    drain(engine)
    assert rows._places is rows._mix is None


@pytest.mark.parametrize("name", ["qwen3", "qwen3 in 4 bits", "qwen3_moe"])
def test_one_adapter_for_all_rows(worlds: dict[str, World], name: str) -> None:
    world = worlds[name]
    engine = world.engine()
    for number in range(1, len(world.adapters)):
        for row, text in enumerate(TEXTS):
            engine.submit(row, world.ask(number, text))
        ends = drain(engine)
        assert [tokens(ends[row]) for row in range(len(TEXTS))] == [world.reference(number, text) for text in TEXTS]
    assert tokens(answer(engine, ask("hello"))) == world.reference(0, "hello")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_pefts_format(world: World, tmp_path: Path, kind: str) -> None:
    keys = [*LINEAR, "model.embed_tokens"] if kind == "lora" else LINEAR
    plain = tiny_adapter.build(tmp_path / "mlx", world.base, kind=kind, keys=keys, seed=7)
    peft = tiny_adapter.to_peft(plain, tmp_path / "peft")
    engine = world.engine()
    wanted = answer(engine, ask("hello", plain))
    assert tokens(answer(engine, ask("hello", peft))) == tokens(wanted) != world.reference(0, "hello")
    assert examine_adapter(str(peft)).scale == 4.0
    tiny_adapter.edit(peft, use_rslora=True)
    assert examine_adapter(str(peft)).scale == 4 * 4.0 / 4**0.5


def test_nothing_is_shared_between_adapters(world: World, tmp_path: Path) -> None:
    engine = world.engine(cache_bytes=AMPLE)
    text = "so i think we should meet on monday " * 3
    for number in range(len(world.adapters)):
        first = answer(engine, world.ask(number, text))
        assert first.cached_tokens == 0
        again = answer(engine, world.ask(number, text))
        assert again.cached_tokens > 20
        assert tokens(first) == tokens(again) == world.reference(number, text)
    # The content counts, not its place.
    copy = shutil.copytree(str(world.adapters[1]), tmp_path / "copy")
    assert answer(engine, ask(text, copy)).cached_tokens > 20


def test_adapters_in_every_lane(world: World) -> None:
    engine = world.engine()
    kinds: list[dict[str, Any]] = [{"deterministic": True}, {"context_policy": "rotate"}, {}]
    for row, options in enumerate(kinds):
        engine.submit(row, world.ask(2, "hello", **options))
    engine.submit(8, world.ask(2, "hello", n=3))
    engine.submit(9, ask("hello", deterministic=True))
    ends = drain(engine)
    assert tokens(ends[8]) == world.reference(2, "hello")
    assert [other.text for other in ends[8].alternatives] == [ends[8].text] * 2
    assert [tokens(ends[row]) for row in range(3)] == [world.reference(2, "hello")] * 3
    assert tokens(ends[9]) == world.reference(0, "hello")


def test_what_is_guessed_is_checked_with_the_adapter(world: World) -> None:
    engine = world.engine()
    request = world.ask(2, "monday " * 20, max_tokens=80)
    del request.options["logprobs"]
    ends = []
    for speculation in ("off", "lookup"):
        request.options["speculation"] = speculation
        ends.append(answer(engine, request))
    assert ends[1].text == ends[0].text
    assert ends[1].reasoning == ends[0].reasoning
    assert ends[1].speculation is not None


def test_rules_and_seeds_with_an_adapter(world: World) -> None:
    engine = world.engine()
    engine.submit(1, world.ask(1, "hello", schema={"type": "integer"}, max_tokens=40))
    engine.submit(2, world.ask(2, "hello", temperature=1.0, seed=3))
    ends = drain(engine)
    alone = answer(engine, world.ask(2, "hello", temperature=1.0, seed=3))
    assert ends[2].text == alone.text
    assert re.match(r"-?\d+", ends[1].text)


# --- their life -------------------------------------------------------------------------------------------------------


def many(world: World, folder: Path, count: int) -> list[Path]:
    keys = ["self_attn.q_proj"]
    return [tiny_adapter.build(folder / f"m{n}", world.base, keys=keys, seed=50 + n) for n in range(count)]


def bounded(world: World, **bounds: int) -> Engine:
    engine = world.engine()
    engine.adapters = engine._arrivals._adapters = Adapters(world.loaded.model, **bounds)
    return engine


def test_the_least_recently_used_goes(world: World, tmp_path: Path) -> None:
    folders = many(world, tmp_path, 3)
    wanted = answer(world.engine(), ask("hello", folders[1]))
    engine = bounded(world, most=2)
    for folder in (folders[0], folders[1], folders[0], folders[2]):
        answer(engine, ask("hello", folder))
    kept = {adapter.folder.path for adapter in engine.adapters._kept.values()}
    assert kept == {str(folders[0]), str(folders[2])}
    assert tokens(answer(engine, ask("hello", folders[1]))) == tokens(wanted)


def test_what_is_used_stays_and_others_wait(world: World, tmp_path: Path) -> None:
    engine = bounded(world, most=2)
    folders = many(world, tmp_path, 4)
    for number, folder in enumerate(folders):
        engine.submit(number, ask("hello", folder, max_tokens=10 + number))
    ends: dict[int, Any] = {}
    while engine.active < 2:
        ends.update(engine.step().ended)
    assert engine.waiting == 2
    assert not ends
    drain(engine, ends)
    alone = world.engine()
    for number, folder in enumerate(folders):
        assert ends[number].text == answer(alone, ask("hello", folder, max_tokens=10 + number)).text


def test_one_that_waits_is_cancelled(world: World, tmp_path: Path) -> None:
    engine = bounded(world, most=1)
    first, second = many(world, tmp_path, 2)
    engine.submit(1, ask("hello", first))
    engine.submit(2, ask("hello", second))
    while engine.active == 0:
        engine.step()
    outcome = engine.cancel(2)
    assert [(number, end.finish_reason) for number, end in outcome.ended] == [(2, "cancelled")]  # type: ignore[union-attr]
    assert drain(engine).keys() == {1}


def test_memory_is_counted_and_given_back(world: World, tmp_path: Path) -> None:
    engine = bounded(world, most=1)
    kinds = {name: type(module) for name, module in world.loaded.model.named_modules()}
    before = held_bytes()
    wide = tiny_adapter.build(tmp_path / "wide", world.base, rank=64)
    answer(engine, ask("hello", wide))
    assert engine.adapters.nbytes > 100_000
    assert held_bytes() - before >= 0.9 * engine.adapters.nbytes
    (held,) = engine.adapters._kept.values()
    engine.adapters._remove(held)
    assert held_bytes() - before < 50_000
    assert {name: type(module) for name, module in world.loaded.model.named_modules()} == kinds


def test_a_folder_that_changed_is_another_adapter(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(str(world.adapters[1]), folder)
    engine = world.engine()
    assert tokens(answer(engine, ask("hello", folder))) == world.reference(1, "hello")
    shutil.rmtree(folder)
    shutil.copytree(str(world.adapters[3]), folder)
    assert tokens(answer(engine, ask("hello", folder))) == world.reference(3, "hello")
    shutil.rmtree(folder)
    with pytest.raises(ModelNotFound) as caught:
        engine.submit(1, ask("hello", folder))
    assert caught.value.details["field"] == "adapter"


def test_others_decode_while_one_is_read(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxd.worker.adapters.READ_S", 0.0)  # one piece of it between two steps
    engine = world.engine()
    engine.submit(1, ask("hello", max_tokens=60))
    engine.step()
    engine.submit(2, world.ask(1, "hello"))
    steps = 0
    while not any(running.adapter for running in engine._running.values()):
        engine.step()
        steps += 1
    assert steps > 5
    ends = drain(engine)
    assert tokens(ends[2]) == world.reference(1, "hello")


# --- folders that are none ------------------------------------------------------------------------------------------


def arrays(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "adapters.safetensors"
    weights: Any = {name: mx.array(array) for name, array in mx.load(str(file)).items()}  # type: ignore[union-attr]
    mx.eval(weights)
    change(weights)
    file.unlink()
    mx.save_safetensors(str(file), weights)


def first(weights: dict[str, Any], ending: str) -> str:
    return next(name for name in weights if name.endswith(ending))


def replace(ending: str, make: Callable[[Any], Any]) -> Callable[[Path], Any]:
    return lambda f: arrays(f, lambda w: w.update({first(w, ending): make(w[first(w, ending)])}))


def rename(ending: str, name: str) -> Callable[[Path], Any]:
    return lambda f: arrays(f, lambda w: w.update({name: w.pop(first(w, ending))}))


PARAMETERS = {"rank": 4, "scale": 4.0, "dropout": 0.0}


def with_parameters(**changes: Any) -> Callable[[Path], Any]:
    return lambda f: tiny_adapter.edit(f, lora_parameters=PARAMETERS | changes)


BROKEN: dict[str, tuple[Callable[[Path], Any], type[RpcError], str]] = {
    "no folder": (shutil.rmtree, ModelNotFound, "no folder"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), ModelNotFound, "no folder"),
    "no weights": (lambda f: (f / "adapters.safetensors").unlink(), ModelNotFound, "holds no"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), InvalidParams, "missing"),
    "a pipe": (
        lambda f: ((f / "adapter_config.json").unlink(), os.mkfifo(f / "adapter_config.json")),
        InvalidParams,
        "no file",
    ),
    "a loop of links": (
        lambda f: (
            (f / "adapters.safetensors").unlink(),
            (f / "adapters.safetensors").symlink_to("adapters.safetensors"),
        ),
        InvalidParams,
        "missing",
    ),
    "config no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), InvalidParams, "no JSON"),
    "config too deep": (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), InvalidParams, "no JSON"),
    "config a list": (lambda f: (f / "adapter_config.json").write_text("[]"), InvalidParams, "no JSON object"),
    "no parameters": (lambda f: tiny_adapter.edit(f, lora_parameters=None), InvalidParams, "lora_parameters"),
    "an absurd rank": (with_parameters(rank=10**9), InvalidParams, "rank"),
    "rank no number": (with_parameters(rank="4"), InvalidParams, "rank"),
    "another rank": (with_parameters(rank=5), InvalidParams, "shape"),
    "scale nan": (with_parameters(scale=float("nan")), InvalidParams, "scale"),
    "scale infinite": (with_parameters(scale=float("inf")), InvalidParams, "scale"),
    "no scale": (with_parameters(scale=None), InvalidParams, "scale"),
    "a full one": (lambda f: tiny_adapter.edit(f, fine_tune_type="full"), Unsupported, "full"),
    "an unknown type": (lambda f: tiny_adapter.edit(f, fine_tune_type=["x"]), Unsupported, "type"),
    "truncated": (
        lambda f: (f / "adapters.safetensors").write_bytes((f / "adapters.safetensors").read_bytes()[:3000]),
        InvalidParams,
        "truncated",
    ),
    "no safetensors": (lambda f: (f / "adapters.safetensors").write_bytes(b"nope" * 99), InvalidParams, "header"),
    "empty": (lambda f: arrays(f, lambda w: w.clear()), InvalidParams, "no weights"),
    "nan weights": (replace("lora_b", lambda a: a * float("nan")), InvalidParams, "finite"),
    "whole numbers": (replace("lora_b", lambda a: a.astype(mx.int32)), InvalidParams, "floats"),
    "another width": (replace("lora_a", lambda a: mx.zeros((96, 4))), InvalidParams, "shape"),
    "one matrix": (lambda f: arrays(f, lambda w: w.pop(first(w, "lora_b"))), InvalidParams, "missing"),
    "an unknown layer": (rename("lora_b", "model.layers.9.self_attn.q_proj.lora_b"), InvalidParams, "no such layer"),
    "no layer": (rename("lora_b", "model.norm.lora_b"), InvalidParams, "no adapter"),
    "the whole model": (
        lambda f: arrays(f, lambda w: w.update({".lora_a": mx.zeros((64, 4)), ".lora_b": mx.zeros((4, 64))})),
        InvalidParams,
        "no adapter",
    ),
    "other names": (rename("lora_b", "model.layers.0.weight"), InvalidParams, "nothing that"),
    "magnitudes of no dora": (rename("lora_b", "model.layers.0.self_attn.q_proj.m"), InvalidParams, "nothing that"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_refused_and_harms_nobody(world: World, tmp_path: Path, name: str) -> None:
    folder = tiny_adapter.build(tmp_path / "adapter", world.base, keys=["self_attn.q_proj"])
    change, kind, words = BROKEN[name]
    change(folder)
    engine = world.engine()
    engine.submit(1, ask("hello"))
    engine.step()
    error = answer_or_error(engine, ask("hello", folder))
    assert isinstance(error, kind)
    assert words in error.message
    assert error.details["field"] == "adapter"
    assert engine.adapters.nbytes == 0
    assert tokens(drain(engine)[1]) == world.reference(0, "hello")


def answer_or_error(engine: Engine, request: Generate) -> Any:
    try:
        engine.submit(2, request)
    except RpcError as error:
        return error
    ends: dict[int, Any] = {}
    while 2 not in ends:
        ends.update(engine.step().ended)
    return ends[2]


def test_one_of_another_base(world: World, tmp_path: Path) -> None:
    other = tiny_model.build(tmp_path / "other", hidden=96)
    folder = tiny_adapter.build(tmp_path / "adapter", other)
    error = answer_or_error(world.engine(), ask("hello", folder))
    assert isinstance(error, InvalidParams)
    assert "made for other" in error.message
    assert "shape" in error.message


def test_one_that_is_too_large(world: World) -> None:
    engine = bounded(world, most_bytes=1000)
    with pytest.raises(InvalidParams, match="bytes") as caught:
        engine.submit(1, world.ask(1, "hello"))
    assert caught.value.details["field"] == "adapter"
    assert not engine.busy


def test_one_that_changes_while_it_is_read(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(str(world.adapters[1]), folder)
    engine = world.engine()
    engine.submit(1, ask("hello", folder))
    os.utime(folder / "adapters.safetensors", ns=(0, 0))
    error = drain(engine)[1]
    assert isinstance(error, InvalidParams)
    assert "changed" in error.message


PEFT: dict[str, tuple[dict[str, Any], type[RpcError]]] = {
    "another type": ({"peft_type": "IA3"}, Unsupported),
    "biases": ({"bias": "all"}, Unsupported),
    "whole modules": ({"modules_to_save": ["lm_head"]}, Unsupported),
    "ranks by layer": ({"rank_pattern": {"q_proj": 3}}, Unsupported),
    "no rank": ({"r": None}, InvalidParams),
    "rank 0": ({"r": 0}, InvalidParams),
    "alpha nan": ({"lora_alpha": float("nan")}, InvalidParams),
}


@pytest.mark.parametrize("name", PEFT)
def test_what_peft_can_and_we_cannot(world: World, tmp_path: Path, name: str) -> None:
    plain = tiny_adapter.build(tmp_path / "mlx", world.base, keys=LINEAR)
    changes, kind = PEFT[name]
    folder = tiny_adapter.edit(tiny_adapter.to_peft(plain, tmp_path / "peft"), **changes)
    with pytest.raises(kind) as caught:
        examine_adapter(str(folder))
    assert caught.value.details["field"] == "adapter"


def test_links_lead_nowhere_else(world: World, tmp_path: Path) -> None:
    inside = tmp_path / "cache"
    folder = inside / "adapter"
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapters.safetensors"):
        (folder / name).symlink_to(Path(str(world.adapters[1])) / name)
    assert examine_adapter(str(folder)).kind == "lora"
    with pytest.raises(InvalidParams, match="outside"):
        examine_adapter(str(folder), (inside,))
    assert json.loads((folder / "adapter_config.json").read_text())["model"] == "base"
