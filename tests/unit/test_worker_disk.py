"""Prefixes on disk, with real, tiny models of several families: another engine takes them up and says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlxd import promptfiles
from mlxd.childwire import Generate, Generated
from mlxd.worker.diskcache import open_disk
from mlxd.worker.engine import Engine
from mlxd.worker.load import LoadedModel, load
from support import tiny_model
from support.families import FAMILIES

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 12}
AMPLE = 1 << 28
SYSTEM = "the quick brown fox jumps over the lazy dog and then it rests " * 6
Messages = list[dict[str, str]]


class Home:
    """A folder of prompt files, and engines that use it one after the other."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.root = path / "cache" / "prompts"
        path.mkdir(exist_ok=True)
        self.folder = folder
        self.loaded: LoadedModel = load(str(folder), lambda fraction: None)
        self.loaded.tokenizer.eos_token_ids = []  # answers have the length that is asked for

    def engine(
        self, budget_bytes: int = AMPLE, *, disk: bool = True, model: str = "org/m", memory: int = AMPLE
    ) -> Engine:
        engine = Engine(self.loaded, max_batch=8, prefill_step=64, prefill_joins=1, cache_bytes=memory)
        facts = promptfiles.identity(self.folder)
        row = engine.warm_up()
        if disk and engine.cache is not None:
            engine.disk = open_disk(
                engine.cache, row, root=str(self.root), model=model, path=str(self.folder), identity=facts,
                budget_bytes=budget_bytes,
            )  # fmt: skip
        return engine

    def entries(self) -> list[Path]:
        return sorted(self.root.glob("*/*.kv"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    class Models(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = tiny_model.build(tmp_path_factory.mktemp(family), family=family, context=2048)
            return self[family]

    return Models()


def turns(*contents: str, system: str = SYSTEM) -> Messages:
    roles = ("user", "assistant")
    return [{"role": "system", "content": system}] + [
        {"role": roles[at % 2], "content": content} for at, content in enumerate(contents)
    ]


def answer(engine: Engine, messages: Messages, **options: Any) -> Generated:
    engine.submit(1, Generate(kind="chat", messages=messages, options=GREEDY | options))
    return drain(engine)  # type: ignore[no-any-return]


def drain(engine: Engine) -> Any:
    ends: dict[int, Any] = {}
    while engine.busy:
        ends.update(engine.step().ended)
    if isinstance(ends[1], Exception):
        raise ends[1]
    return ends[1]


def save(engine: Engine) -> None:
    assert engine.disk is not None
    while engine.disk.due:
        engine.disk.save(60.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_engine_goes_on_with_a_conversation(tmp_path: Path, models: dict[str, Path], family: str) -> None:
    home = Home(tmp_path, models[family])
    engine = home.engine()
    messages = turns("so i think we should meet on monday at 3 pm " * 6)
    first = answer(engine, messages)
    assert first.cached_tokens == 0
    save(engine)
    assert engine.disk is not None and engine.disk.failures == 0
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "and then"}]
    again, plain = home.engine(), home.engine(disk=False)
    got, wanted = answer(again, messages), answer(plain, messages)
    assert again.disk is not None
    print(
        family,
        first.prompt_tokens,
        got.cached_tokens,
        got.prompt_tokens,
        len(home.entries()),
        [p.name for p in home.entries()],
    )
    assert got.text == wanted.text
    assert wanted.cached_tokens == 0
    assert got.cached_tokens >= first.prompt_tokens - 12 - 64
    assert (again.disk.hits, again.disk.failures) == (1, 0)
