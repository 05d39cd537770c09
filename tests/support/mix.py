"""Drives one engine with requests of every kind, mixed by chance, and holds it to the laws that no mix may break.

What an answer may depend on is the request alone: so each that is greedy or seeded is compared with what another
engine, of the same model and without any company or cache, says to it. Everything is decided by the seed.
"""

from __future__ import annotations

import copy
import gc
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxd import promptfiles
from mlxd.childwire import Adapt, Adapted, CountTokens, Embedded, EmbedTexts, Generate, Generated, Prewarm
from mlxd.worker.diskcache import open_disk
from mlxd.worker.engine import Engine, Outcome
from mlxd.worker.load import LoadedModel, load
from mlxd_client.errors import Cancelled, InsufficientMemory, RpcError
from support import tiny_adapter, tool_templates

# Heads are 32 wide: the least that MLX quantises.
SHAPE: dict[str, Any] = {"heads": 2, "kv_heads": 1}
CONTEXT = 700
TEXTS = [
    "hello", "numbers 1 2 3 10 100 " * 3, "So I think we should meet on Monday at 3 PM", "Grüße aus Köln 你好 😀",
    "the quick brown fox jumps over the lazy dog and then it rests " * 6, "a",
]  # fmt: skip
SYSTEMS = [None, "you are a helpful model that answers with words " * 8, "you are a helpful model"]
SCHEMAS: list[Any] = [
    {"type": "boolean"},
    {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1, "maxItems": 3},
]
GRAMMAR = 'start: "yes" | "no" | "maybe " /[a-c]{2}/'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "the weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "minLength": 2, "maxLength": 8}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "clock", "description": "the clock"}},
]
# After so many steps without news whoever is still here stays for ever.
MOST_STEPS = 5_000
# Small enough that rows have to wait for it, and some are refused.
TIGHT_BYTES = (60_000, 200_000, 400_000)
# What an engine keeps on purpose, from one request to the next: how much is bounded elsewhere.
KEPT = {"PrefixTree", "PromptCache", "Compiler", "Draft", "Odds", "Pace", "DiskCache", "FeatureCache", "Adapters"}
KEPT |= {"Toolsets", "Kinds"}
# The arrays of the last step, and a model's layers.
OF_LATEST = ("._current_logprobs", "._current_tokens", "._inner")


class Models:
    """The models of a mix, in a folder of its own: two copies of one in memory, as adapters change what they are of."""

    def __init__(self, folder: Path) -> None:
        self.path = tool_templates.build(folder / "model", "json_tools", context=CONTEXT, **SHAPE)
        draft = tool_templates.build(folder / "draft", "json_tools", context=CONTEXT, layers=1, seed=5, **SHAPE)
        self.adapters = [
            str(tiny_adapter.build(folder / f"adapter-{number}", self.path, seed=number)) for number in (1, 2)
        ]
        self.loaded, self.other = _load(self.path), _load(self.path)
        self.drafts = {"same": _load(self.path), "weak": _load(draft)}
        self.prompts = folder / "prompts"
        self._alone = Engine(self.other, max_batch=16, prefill_step=32)
        self._known: dict[str, Generated | RpcError] = {}
        self.vectors: dict[str, Any] = {}  # by text, as they came first

    def engine(self, *, disk: bool, max_batch: int) -> Engine:
        engine = Engine(self.loaded, max_batch=max_batch, prefill_step=32, prefill_joins=1, cache_bytes=1 << 22)
        row = engine.warm_up()
        if disk:
            assert engine.cache is not None
            facts = promptfiles.identity(self.path)
            engine.disk = open_disk(
                engine.cache, row, root=str(self.prompts), model="org/m", path=str(self.path), identity=facts,
                budget_bytes=1 << 24,
            )  # fmt: skip
        engine.attach("same", self.drafts["same"])
        return engine

    def alone(self, request: Generate) -> Generated | RpcError:
        """What a request comes to by itself, which nothing around it may change."""
        options = {name: value for name, value in request.options.items() if name != "cache_prompt"}
        if options.get("speculation") != "off":
            options.pop("speculation", None)
        plain = Generate(
            kind=request.kind, messages=request.messages, options=options, tools=request.tools,
            tool_choice=request.tool_choice, adapter=request.adapter,
        )  # fmt: skip
        name = json.dumps([plain.kind, plain.messages, options, plain.tools, plain.tool_choice, plain.adapter])
        if name not in self._known:
            self._known[name] = self._answer(copy.deepcopy(plain))
        return self._known[name]

    def _answer(self, request: Generate) -> Generated | RpcError:
        ends: list[Any] = []
        try:
            self._alone.submit(0, request)
        except RpcError as error:
            return error
        for _ in range(MOST_STEPS):
            if not self._alone.busy:
                break
            ends += self._alone.step().ended
        assert not self._alone.busy, f"by itself, this never ends: {request}"
        ((_, end),) = ends
        return end  # type: ignore[no-any-return]


def _load(path: Path) -> LoadedModel:
    return load(str(path), lambda fraction: None)


@dataclass
class Asked:
    """A request in flight, and what it was told so far."""

    request: Any
    fixed: bool = False  # its answer depends on nothing but itself
    cancelled: bool = False
    squeezed: bool = False  # less memory was allowed while it was here
    pieces: dict[int, list[str]] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)


class Mix:
    """One run.

    Args:
        models: what it runs on.
        seed: decides everything.
    """

    def __init__(self, models: Models, seed: int) -> None:
        self.models, self.seed = models, seed
        self.draw = random.Random(seed)
        self.engine = models.engine(disk=self.draw.random() < 0.4, max_batch=self.draw.choice((2, 4, 8)))
        self.flying: dict[int, Asked] = {}
        self.told: Counter[str] = Counter()
        self.number = 0
        self._tight = False
        self._sizes = sizes(self.engine)

    def run(self, requests: int, most: int = 10) -> Counter[str]:
        """Ask so many, at most `most` at a time, and check all. Raises AssertionError, with the seed in it."""
        try:
            while self.number < requests:
                if len(self.flying) < most and self.draw.random() < 0.5:
                    self.ask()
                self.disturb()
                self.take(self.engine.step())
            self.engine.allow(0)
            for _ in range(MOST_STEPS):
                if self.engine.busy:
                    self.take(self.engine.step())
            self.check_rest()
        except AssertionError as error:
            raise AssertionError(f"seed {self.seed}: {error}") from error
        except Exception as error:
            raise AssertionError(f"seed {self.seed}: {type(error).__name__}: {error}") from error
        return self.told

    # --- what is asked

    def ask(self) -> None:
        self.number += 1
        kind = self.draw.choices(("generate", "embed", "prewarm", "adapt"), (30, 3, 2, 1))[0]
        asked = Asked(None, squeezed=self._tight)
        try:
            getattr(self, f"_ask_{kind}")(asked)
        except RpcError as error:
            self.told[f"refused {error.kind}"] += 1
            self.check_refusal(asked, error)

    def _ask_generate(self, asked: Asked) -> None:
        asked.request, asked.fixed = self.request()
        self.engine.submit(self.number, copy.deepcopy(asked.request))
        self.flying[self.number] = asked

    def _ask_embed(self, asked: Asked) -> None:
        texts = self.draw.sample(TEXTS, self.draw.randint(1, 3))
        asked.request = EmbedTexts(input=texts, most_values=100_000)
        self.engine.embed(self.number, asked.request)
        self.flying[self.number] = asked

    def _ask_prewarm(self, asked: Asked) -> None:
        asked.request = Prewarm(system=SYSTEMS[1] or "", adapter=self.adapter())
        self.engine.prewarm(self.number, asked.request)
        self.flying[self.number] = asked

    def _ask_adapt(self, asked: Asked) -> None:
        asked.request = Adapt(adapter=self.adapter())
        self.flying[self.number] = asked
        self.take(self.engine.adapt(self.number, asked.request))

    def adapter(self) -> str | None:
        return self.draw.choice(self.models.adapters) if self.draw.random() < 0.25 else None

    def request(self) -> tuple[Generate, bool]:
        """A request of any options, most of which go together; and whether its answer depends on nothing else."""
        draw, options = self.draw, dict[str, Any]()
        fixed = draw.random() < 0.85
        options["max_tokens"] = draw.choice((1, 2, 5, 12, 25, 40))
        if draw.random() < 0.5:
            options |= {"temperature": 0.0}
        else:
            options |= {"temperature": draw.choice((0.7, 1.3)), "top_p": draw.choice((1.0, 0.9))}
            options |= {"seed": draw.randrange(4)} if fixed else {}
            fixed = "seed" in options
        fixed = fixed or options["temperature"] == 0
        for name, chance, values in (
            ("repetition_penalty", 0.5, (1.0, 1.2)), ("presence_penalty", 0.1, (0.5,)), ("top_k", 0.1, (5,)),
            ("frequency_penalty", 0.1, (0.3,)), ("min_p", 0.1, (0.05,)), ("logit_bias", 0.1, ({"70": 2.0},)),
            ("xtc_probability", 0.1, (0.5,)), ("logprobs", 0.15, (0, 2)), ("stop", 0.2, (["e"], ["qu", " "])),
            ("n", 0.12, (2, 3)), ("cache_prompt", 0.2, (False,)), ("deterministic", 0.06, (True,)),
            ("speculation", 0.5, ("lookup", "draft", "off")), ("kv_bits", 0.1, (8, 4)), ("thinking", 0.1, (True,)),
            ("context_policy", 0.15, ("drop_oldest", "rotate")),
        ):  # fmt: skip
            if draw.random() < chance:
                options[name] = draw.choice(values)
        more: dict[str, Any] = {}
        rule = draw.random()
        if rule < 0.1:
            options["schema"] = draw.choice(SCHEMAS)
        elif rule < 0.15:
            options["grammar"] = GRAMMAR
        elif rule < 0.25:
            more = {"tools": TOOLS, "tool_choice": draw.choice(("auto", "required", {"name": "clock"}, "none"))}
            options["max_tokens"] = draw.choice((12, 90))
        if draw.random() < 0.1:
            options |= {"thinking_budget": draw.choice((0, 1, 6))}
            options.pop("thinking", None)
        if rule < 0.25 or "thinking_budget" in options:
            apart = draw.random() < 0.8
            if apart:
                options.pop("speculation", None)
        made = Generate(
            kind="chat", messages=self.messages(), options=options, stream=draw.random() < 0.8,
            priority=draw.choice(("interactive", "batch")), adapter=self.adapter(), **more,
        )  # fmt: skip
        return made, fixed

    def messages(self) -> list[dict[str, Any]]:
        system = self.draw.choice(SYSTEMS)
        turns = [{"role": "system", "content": system}] if system is not None else []
        count = self.draw.choice((1, 1, 1, 3, 9))
        roles = ("user", "assistant")
        return [*turns, *({"role": roles[at % 2], "content": self.draw.choice(TEXTS)} for at in range(count))]

    # --- what comes between

    def disturb(self) -> None:
        chance = self.draw.random()
        if chance < 0.06 and self.flying:
            number = self.draw.choice(list(self.flying))
            asked = self.flying[number]
            if not isinstance(asked.request, Adapt):
                asked.cancelled = True
                self.take(self.engine.cancel(number))
        elif chance < 0.065:
            self.engine.clear_cache()
        elif chance < 0.08:
            self._tight = self.draw.random() < 0.6
            self.engine.allow(self.draw.choice(TIGHT_BYTES) if self._tight else 0)
            for asked in self.flying.values():
                asked.squeezed = True
        elif chance < 0.085:
            name = self.draw.choice(list(self.models.drafts))
            self.engine.attach(name, self.models.drafts[name])
        elif chance < 0.09 and self.engine.disk is not None:
            self.engine.disk.save(0.01)
        elif chance < 0.1:
            assert self.engine.count(CountTokens(messages=self.messages())) > 0
        elif chance < 0.105:
            self.engine.cancel(self.number + 1000)  # nobody's

    # --- the laws

    def take(self, outcome: Outcome) -> None:
        pieces = [*((number, 0, *rest) for number, *rest in outcome.pieces), *outcome.others]
        for request_id, number, text, _ in pieces:
            assert request_id in self.flying, f"a piece of {request_id}, which is not here"
            assert self.flying[request_id].request.stream, f"{request_id} does not stream"
            self.flying[request_id].pieces.setdefault(number, []).append(text)
        for call in outcome.calls:
            self.flying[call.id].calls += call.tool_calls
        for request_id, end in outcome.ended:
            assert request_id in self.flying, f"request {request_id} ended twice, or never was"
            asked = self.flying.pop(request_id)
            self.told[type(end).__name__] += 1
            try:
                self.check(asked, end)
            except AssertionError as error:
                raise AssertionError(f"{error}\n  asked: {asked}\n  ended: {end}") from error

    def check(self, asked: Asked, end: Any) -> None:
        if isinstance(end, RpcError):
            self.check_refusal(asked, end)
        elif isinstance(asked.request, Generate):
            assert isinstance(end, Generated)
            self.check_answer(asked, end)
        elif isinstance(asked.request, EmbedTexts):
            assert isinstance(end, Embedded)
            self.check_vectors(asked.request, end)
        else:
            assert isinstance(end, (Generated, Adapted))

    def check_refusal(self, asked: Asked, error: RpcError) -> None:
        """What is refused is refused to the request alone, too; but for memory, which others take, and cancels."""
        if isinstance(error, InsufficientMemory):
            assert asked.squeezed, f"there is memory: {error}"
        elif isinstance(error, Cancelled):
            assert asked.cancelled
        elif isinstance(asked.request, Generate):
            known = self.models.alone(asked.request)
            wish = asked.request.options.get("speculation")
            about = error.details.get("option") == "speculation"
            assert (about and wish in ("lookup", "draft")) or repr(known) == repr(error), f"{error!r}, alone {known!r}"
        else:
            assert isinstance(asked.request, Prewarm), f"{error!r}"
            assert (error.details.get("option"), asked.squeezed) == ("system", True), f"{error!r}"

    def check_answer(self, asked: Asked, end: Generated) -> None:
        options = asked.request.options
        answers = [end, *(end.alternatives or ())]
        assert 0 <= end.cached_tokens < max(end.prompt_tokens, 1)
        assert end.finish_reason != "cancelled" or asked.cancelled
        if end.finish_reason != "cancelled":
            assert len(answers) == options.get("n", 1)
        assert sum(end.completion_tokens for end in answers[1:]) <= end.completion_tokens
        assert end.completion_tokens <= options["max_tokens"] * options.get("n", 1)
        assert end.reasoning_tokens <= end.completion_tokens
        if "thinking_budget" in options:
            assert end.reasoning_tokens <= options["thinking_budget"] * options.get("n", 1)
        if end.speculation is not None:
            assert 0 <= end.speculation.accepted_tokens <= end.speculation.drafted_tokens
        if asked.request.stream:
            for number, answer in enumerate(answers):
                assert "".join(asked.pieces.get(number, ())) == answer.text, f"the pieces of answer {number} differ"
            assert asked.calls == (end.tool_calls or [])
        self.check_rule(asked, answers)
        if asked.fixed:
            self.check_same(asked, end)

    def check_rule(self, asked: Asked, answers: list[Any]) -> None:
        options = asked.request.options
        for answer in answers:
            if "schema" in options and answer.finish_reason == "stop" and "stop" not in options:
                value = json.loads(answer.text)
                first, second, third = SCHEMAS
                if options["schema"] == first:
                    assert isinstance(value, bool)
                elif options["schema"] == second:
                    assert value in ({"a": 1}, {"a": 2})
                else:
                    assert options["schema"] == third
                    assert 1 <= len(value) <= 3
                    assert all(0 <= item <= 9 for item in value)
                assert answer.structured == value
            if "grammar" in options and answer.finish_reason == "stop" and "stop" not in options:
                assert answer.text in ("yes", "no") or answer.text.startswith("maybe ")

    def check_same(self, asked: Asked, end: Generated) -> None:
        alone = self.models.alone(asked.request)
        assert isinstance(alone, Generated), f"alone it fails: {alone!r}"
        for ours, theirs in zip(
            [end, *(end.alternatives or ())], [alone, *(alone.alternatives or ())], strict=not asked.cancelled
        ):
            said = ours.text.rstrip("\N{REPLACEMENT CHARACTER}")  # a cancel may come in the middle of a character
            assert theirs.text.startswith(said) if asked.cancelled else ours.text == theirs.text, (
                f"alone it says {theirs.text!r}, here {ours.text!r}"
            )
            assert (theirs.reasoning or "").startswith(ours.reasoning or "")
        if end.finish_reason == "cancelled":
            return
        assert end.prompt_tokens == alone.prompt_tokens
        assert end.completion_tokens == alone.completion_tokens
        assert end.finish_reason == alone.finish_reason
        assert end.structured == alone.structured
        assert end.reasoning == alone.reasoning
        assert end.reasoning_tokens == alone.reasoning_tokens
        assert end.dropped_messages == alone.dropped_messages
        assert [call.name for call in end.tool_calls or ()] == [call.name for call in alone.tool_calls or ()]
        if end.logprobs is not None:
            assert alone.logprobs is not None
            for ours, theirs in zip(end.logprobs, alone.logprobs, strict=True):
                assert ours["token_id"] == theirs["token_id"]
                assert abs(ours["logprob"] - theirs["logprob"]) < 2e-3

    def check_vectors(self, request: EmbedTexts, end: Embedded) -> None:
        vectors = np.frombuffer(end.vectors, dtype="<f4").reshape(len(request.input), end.dimensions)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
        for text, vector in zip(request.input, vectors, strict=True):
            known = self.models.vectors.setdefault(text, vector)
            assert np.allclose(known, vector, atol=2e-3), f"the vector of {text!r} is another one"

    def check_rest(self) -> None:
        """Everybody has ended, and nothing of anybody is left."""
        assert not self.flying, f"these never ended: {sorted(self.flying)}"
        assert not self.engine.busy
        assert self.engine.active == self.engine.waiting == 0
        self.engine.clear_cache()
        grown = {name: size for name, size in sizes(self.engine).items() if size > self._sizes.get(name, 0)}
        assert not grown, f"these grew: {grown}"


def sizes(engine: Engine) -> dict[str, int]:
    """How many items every container of an engine holds that is not for keeping, by where it is."""
    found: dict[str, int] = {}
    for name, value in _inside("engine", engine, set()):
        if not name.endswith(OF_LATEST):
            found[name] = len(value)
    return found


def _inside(name: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(value) in seen or type(value).__name__ in KEPT:
        return
    seen.add(id(value))
    if isinstance(value, (dict, list, set)) or type(value).__name__ == "deque":
        yield name, value
        items = value.values() if isinstance(value, dict) else value
        for item in list(items)[:50]:
            if type(item).__module__.startswith("mlxd.worker"):
                yield from _inside(f"{name}[]", item, seen)
        return
    if not type(value).__module__.startswith("mlxd.worker") or isinstance(value, LoadedModel):
        return
    slots = [slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ())]
    for part in {*getattr(value, "__dict__", {}), *slots}:
        if hasattr(value, part):
            yield from _inside(f"{name}.{part}", getattr(value, part), seen)


def held_bytes() -> int:
    """What MLX holds, garbage aside."""
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()
