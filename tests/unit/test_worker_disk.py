"""Prefixes on disk, with real, tiny models of several families: another engine takes them up and says the same."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mlxd import promptfiles
from mlxd.childwire import Generate, Generated, Prewarm
from mlxd.worker.diskcache import BLOCK, DiskCache, open_disk
from mlxd.worker.engine import Engine
from mlxd.worker.load import LoadedModel, load
from mlxd_client.errors import Unsupported
from support import tiny_model
from support.families import WINDOW

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 12}
AMPLE = 1 << 28
# One for each way of keeping caches: cut anywhere, windows beside that, states alone, beside and in its stead.
FAMILIES = ("qwen3", "gemma3_text", "gpt_oss", "mamba2", "falcon_h1", "qwen3_next")
SYSTEM = "the quick brown fox jumps over the lazy dog and then it rests " * 6
QUESTION = "so i think we should meet on monday at 3 pm " * 6
# What the template writes behind the last turn, in tokens, is another turn's in the next prompt.
ASKING = 12

Messages = list[dict[str, str]]


class Home:
    """A model, a folder of prompt files, and engines that use both one after the other."""

    def __init__(self, path: Path, model: Path) -> None:
        self.root = path / "cache" / "prompts"
        self.model = model
        self.loaded: LoadedModel = load(str(model), lambda fraction: None)
        self.loaded.tokenizer.eos_token_ids = []  # answers have the length that is asked for

    def engine(self, *, disk: int = AMPLE, memory: int = AMPLE, name: str = "org/m") -> Engine:
        engine = Engine(self.loaded, max_batch=8, prefill_step=64, prefill_joins=1, cache_bytes=memory)
        facts, row = promptfiles.identity(self.model), engine.warm_up()
        assert engine.cache is not None
        if disk:
            engine.disk = open_disk(
                engine.cache, row, root=str(self.root), model=name, path=str(self.model), identity=facts,
                budget_bytes=disk,
            )  # fmt: skip
            assert engine.disk is not None
        return engine

    def entries(self) -> list[Path]:
        return sorted(self.root.glob("*/*.kv"), key=lambda path: (-path.stat().st_mtime_ns, path.name))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    class Models(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = tiny_model.build(tmp_path_factory.mktemp(family), family=family, context=2048)
            return self[family]

    return Models()


@pytest.fixture
def home(tmp_path: Path, models: dict[str, Path]) -> Home:
    return Home(tmp_path, models["qwen3"])


def turns(*contents: str, system: str = SYSTEM) -> Messages:
    said = [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *said]


def answer(engine: Engine, messages: Messages, **options: Any) -> Generated:
    engine.submit(1, Generate(kind="chat", messages=messages, options=GREEDY | options))
    return drain(engine)


def drain(engine: Engine) -> Generated:
    ends: dict[int, Any] = {}
    while engine.busy:
        ends.update(engine.step().ended)
    if isinstance(ends[1], Exception):
        raise ends[1]
    return ends[1]  # type: ignore[no-any-return]


def prewarm(engine: Engine, system: str) -> Generated:
    engine.prewarm(1, Prewarm(system=system))
    return drain(engine)


def disk_of(engine: Engine) -> DiskCache:
    assert engine.disk is not None
    return engine.disk


def save(engine: Engine) -> None:
    while disk_of(engine).due:
        disk_of(engine).save(0.0)  # as little at a time as there is


def told(engine: Engine) -> tuple[int, int]:
    return disk_of(engine).hits, disk_of(engine).failures


def filled(home: Home, messages: Messages) -> Generated:
    """Have a first engine answer, write what it keeps, and go."""
    engine = home.engine()
    first = answer(engine, messages)
    save(engine)
    assert told(engine) == (0, 0)
    return first


# --- all families -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_another_engine_goes_on_with_a_conversation(tmp_path: Path, models: dict[str, Path], family: str) -> None:
    home = Home(tmp_path, models[family])
    messages = turns(QUESTION)
    first = filled(home, messages)
    assert first.cached_tokens == 0
    engine, plain = home.engine(), home.engine(disk=0)
    for turn in range(2):
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": f"and then {turn}"}]
        got, wanted = answer(engine, messages), answer(plain, messages, cache_prompt=False)
        assert got.text == wanted.text
        assert got.cached_tokens >= first.prompt_tokens - ASKING - BLOCK
        assert told(engine) == (1, 0)  # from then on memory has it
        first = got
    # The system turn serves others, too: up to a block, or just where it ends.
    other = home.engine()
    got = answer(other, turns("numbers like 1 2 3"))
    assert got.text == answer(plain, turns("numbers like 1 2 3"), cache_prompt=False).text
    assert got.cached_tokens >= (first.prompt_tokens - got.prompt_tokens > 0) * BLOCK
    assert told(other) == (1, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_system_turn_is_ready(tmp_path: Path, models: dict[str, Path], family: str) -> None:
    home = Home(tmp_path, models[family])
    engine, plain = home.engine(), home.engine(disk=0)
    assert prewarm(engine, SYSTEM).cached_tokens == 0
    got = answer(engine, turns(QUESTION))
    assert got.text == answer(plain, turns(QUESTION), cache_prompt=False).text
    rest = answer(plain, [{"role": "user", "content": QUESTION}], cache_prompt=False).prompt_tokens
    assert got.cached_tokens >= got.prompt_tokens - rest - 2
    assert prewarm(engine, SYSTEM).cached_tokens > 0
    save(engine)
    again = home.engine()
    assert prewarm(again, SYSTEM).cached_tokens >= BLOCK
    assert told(again) == (1, 0)


def test_windows_that_are_not_full_yet(tmp_path: Path) -> None:
    """One mark in memory serves wherever it can be cut to; on disk there is one where the next turn goes on."""
    model = tiny_model.build(tmp_path / "m", family="gpt_oss", context=2048, config={"sliding_window": 1024})
    home = Home(tmp_path, model)
    assert WINDOW < 1024
    messages = turns(QUESTION)
    first = filled(home, messages)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "and then"}]
    engine, plain = home.engine(), home.engine(disk=0)
    got = answer(engine, messages)
    assert got.text == answer(plain, messages, cache_prompt=False).text
    assert got.cached_tokens >= first.prompt_tokens - ASKING
    assert told(engine) == (1, 0)


# --- what is written, and what matches --------------------------------------------------------------------------------


def test_short_prompts_are_not_written_unless_several_begin_alike(home: Home) -> None:
    engine = home.engine()
    system = "numbers like 1 2 3 10 100 and signs " * 5
    assert BLOCK < answer(engine, turns("monday", system=system)).prompt_tokens < 256 - 12
    save(engine)
    assert home.entries() == []
    answer(engine, turns("tuesday", system=system))
    save(engine)
    assert 1 <= len(home.entries()) <= 3


def test_what_several_begin_with_is_written_once(home: Home) -> None:
    engine = home.engine()
    first = answer(engine, turns(QUESTION))
    save(engine)
    before = len(home.entries())
    assert before == (first.prompt_tokens + first.completion_tokens - 1) // BLOCK
    second = answer(engine, turns("numbers like 1 2 3 " * 20))
    save(engine)
    grown = len(home.entries())
    shared = second.cached_tokens // BLOCK
    assert shared > 1
    assert grown == before + (second.prompt_tokens + second.completion_tokens - 1) // BLOCK - shared
    save(engine)
    assert len(home.entries()) == grown


def test_nothing_is_shared_between_namespaces_models_and_weights(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(home, turns(QUESTION))
    engine = home.engine()
    monkeypatch.setattr("mlxd.worker.requests.NAMESPACE", b"an adapter")
    assert answer(engine, turns(QUESTION)).cached_tokens == 0
    monkeypatch.undo()
    assert answer(home.engine(name="org/other"), turns(QUESTION)).cached_tokens == 0
    assert answer(home.engine(), turns(QUESTION)).cached_tokens > 0
    other = Home(tmp_path, tiny_model.build(tmp_path / "other", context=2048, seed=1))
    assert answer(other.engine(), turns(QUESTION)).cached_tokens == 0
    assert home.entries() == []  # nobody can use them any more: it is the same model, with other weights


def test_weights_that_change_while_they_are_loaded_are_none(home: Home) -> None:
    engine = Engine(home.loaded, max_batch=8, prefill_step=64, cache_bytes=AMPLE)
    assert engine.cache is not None
    facts = {"root": str(home.root), "model": "org/m", "path": str(home.model), "budget_bytes": AMPLE}
    assert open_disk(engine.cache, engine.warm_up(), identity=b"before", **facts) is None  # type: ignore[arg-type]


def test_the_budget_holds_and_the_latest_stays(home: Home) -> None:
    filled(home, turns(QUESTION))
    size = home.entries()[0].stat().st_size
    taken = len(home.entries()) + 1
    budget = taken * (-(-size // promptfiles.PAGE) * promptfiles.PAGE)
    engine = home.engine(disk=budget)
    second = turns("numbers like 1 2 3 " * 20, system="and then it rests " * 20)
    answer(engine, second)
    save(engine)
    assert sum(path.stat().st_size for path in home.root.rglob("*")) <= budget
    assert answer(home.engine(disk=budget), second).cached_tokens >= 256
    assert told(engine) == (0, 0)


def test_memory_bounds_what_is_read(home: Home) -> None:
    first = filled(home, turns(QUESTION))
    layout = disk_of(home.engine())._layout
    room = 3 * BLOCK * (layout.token_bytes + 4) + 1000
    engine = home.engine(memory=room)
    got = answer(engine, turns(QUESTION))
    assert got.text == first.text
    assert engine.cache is not None
    assert engine.cache.nbytes <= room
    assert got.cached_tokens in range(BLOCK, 4 * BLOCK)


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 2, -1])
@pytest.mark.parametrize("how", ["damaged", "gone", "swapped", "folder"])
def test_what_cannot_be_read_is_computed(home: Home, how: str, which: int) -> None:
    first = filled(home, turns(QUESTION))
    engine = home.engine()  # it has looked at what is there
    entries = home.entries()
    path = entries[which]
    if how == "damaged":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "swapped":
        path.write_bytes(entries[which - 1].read_bytes())
    else:
        path.unlink()
    if how == "folder":
        path.mkdir()
    got = answer(engine, turns(QUESTION))
    assert got.text == first.text
    assert got.cached_tokens == entries.index(path) * BLOCK
    assert disk_of(engine).failures == (how != "gone")
    if how != "folder":
        save(engine)
        assert len(home.entries()) == len(entries)  # it is there again


@pytest.mark.parametrize("family", ["gemma3_text", "mamba2"])
def test_a_mark_that_cannot_be_read(tmp_path: Path, models: dict[str, Path], family: str) -> None:
    home = Home(tmp_path, models[family])
    first = filled(home, turns(QUESTION))
    marks = [path for path in home.entries() if "-" in path.name]
    engine = home.engine()
    for path in marks:
        path.write_bytes(path.read_bytes()[:-100])
    assert answer(engine, turns(QUESTION)).text == first.text
    hits, failures = told(engine)
    assert hits == 0
    assert failures >= 1


def test_names_that_mean_nothing(home: Home) -> None:
    first = filled(home, turns(QUESTION))
    (folder,) = {path.parent for path in home.entries()}
    digest = home.entries()[0].stem
    for name in ("x", "-", f"{digest}-xx-{digest}", f"{digest}-99-{digest}", "é" * 32, digest.upper()):
        (folder / f"{name}.kv").write_bytes(b"x")
    got = answer(home.engine(), turns(QUESTION))
    assert got.text == first.text
    assert got.cached_tokens >= BLOCK


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_is_no_ones_trouble(home: Home, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    engine = home.engine()
    first = answer(engine, turns(QUESTION))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        save(engine)
    assert told(engine) == (0, 1)
    assert home.entries() == []
    assert not list(home.root.rglob("*.new"))
    assert answer(engine, turns(QUESTION)).text == first.text
    assert not disk_of(engine).due  # it rests


def test_clearing_forgets_memory_and_disk(home: Home) -> None:
    engine = home.engine()
    answer(engine, turns(QUESTION))
    save(engine)
    memory, disk = engine.clear_cache()
    assert memory > 0
    assert disk >= len(home.entries()) == 0
    assert engine.cache is not None
    assert engine.cache.nbytes == 0
    assert answer(engine, turns(QUESTION)).cached_tokens == 0
    save(engine)
    assert len(home.entries()) > 0


def test_a_cancelled_request_while_files_are_read(home: Home) -> None:
    filled(home, turns(QUESTION))
    engine = home.engine()
    engine.submit(1, Generate(kind="chat", messages=turns(QUESTION), options=GREEDY))
    ((number, ended),) = engine.cancel(1).ended
    assert number == 1
    assert isinstance(ended, Generated)
    assert ended.finish_reason == "cancelled"
    assert engine.cancel(1).ended == []
    while engine.busy:
        assert engine.step().ended == []
    assert told(engine) == (1, 0)  # the next one need not wait for it
    assert answer(engine, turns(QUESTION)).cached_tokens > 0


def test_several_that_begin_alike_read_it_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(home, turns(QUESTION))
    engine, read = home.engine(), []
    plain = promptfiles.read

    def counting(path: Path, *rest: Any) -> memoryview:
        read.append(path)
        return plain(path, *rest)

    monkeypatch.setattr(promptfiles, "read", counting)
    for number in range(4):
        asked = turns(QUESTION, "words", f"and then {number}")
        engine.submit(number, Generate(kind="chat", messages=asked, options=GREEDY))
    ends: dict[int, Any] = {}
    while engine.busy:
        ends.update(engine.step().ended)
    assert all(end.cached_tokens >= 4 * BLOCK for end in ends.values())
    assert len(read) == len(set(read))


def test_a_system_turn_that_cannot_be_kept(home: Home) -> None:
    with pytest.raises(Unsupported, match="no room"):
        prewarm(home.engine(memory=2000), SYSTEM)
    engine = Engine(home.loaded, max_batch=8, prefill_step=64, cache_bytes=0)
    with pytest.raises(Unsupported) as caught:
        prewarm(engine, SYSTEM)
    assert caught.value.details["option"] == "system"
