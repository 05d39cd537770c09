"""The requests in flight: each joins the batch, grows by a token a step, and ends in exactly one result or error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import msgspec
from mlx_lm.generate import StopSequences
from mlx_lm.sample_utils import make_logits_processors

from mlxd_client.errors import Cancelled, InternalError, InvalidParams, ModelInvalid, RpcError, Unsupported

from ..childwire import (
    Adapt,
    Adapted,
    Calls,
    CountTokens,
    DecodeTokens,
    Embedded,
    EmbedTexts,
    EncodeText,
    Generate,
    Generated,
    Packed,
    Prewarm,
    PromptCacheStats,
    WorkerTimings,
)
from .adapters import Adapter, Adapters
from .answers import Answers, reportable
from .batch import MOST_PREFILLS, NOT_FINITE, RowFailure
from .calls import Toolbox, ToolUse, news
from .constraint import Constraint, Thought
from .diskcache import DiskCache, Fetched
from .draft import Draft, check_pair
from .embed import ALONE_S, BESIDE_S, Embedder
from .grammar import Compiled, Compiler
from .images import Picture, take_images
from .kvcache import PromptCache, RowView
from .lanes import PLAIN, Lanes
from .load import LoadedModel
from .options import Choices, resolve
from .prompt import Prompt, PromptBuilder
from .sampling import Sampling, other_key, warm_up
from .shorten import shortened
from .sights import Seen, Sights, check_options
from .speculation import Guess, Guesses
from .text import TextStream, make_machine
from .tokens import decode, encode
from .vision import Sight
from .waits import LEAST, Reuse

# What shares prefixes: all that the base model computes, and all that an adapter of one content does.
NAMESPACE = b""
# The kind of a request that is of this worker's own: its prompt is to be kept, its answer is of no use.
PREWARM = "prewarm"
# After this many failed steps in a row, no further batch is tried.
MAX_FAILED_STEPS = 2
# How long a step waits where all there is to wait for is a rule that is being compiled, or an image's file.
COMPILING_S = 0.01
# Of the prompt cache's budget, for what was seen in images: a share of it, and bytes.
SIGHT_SHARE, MOST_SIGHT_BYTES = 8, 256 * 1024 * 1024
# A device that said this does not compute again in this process.
_FATAL = ("[METAL]", "command buffer", "[CUDA]")


class EngineLost(Exception):
    """The device, or MLX's state in this process, can no longer be trusted: the process must end."""


@dataclass(slots=True)
class Running:
    """One request in flight. Times are of `time.perf_counter`, in seconds; 0 where not reached yet."""

    id: int
    request: Generate
    prompt: Prompt
    choices: Choices
    text: TextStream
    received_at: float
    reuse: Reuse | None = None
    tokens: int = 0
    prompt_at: float = 0.0
    first_at: float = 0.0
    constraint: Constraint | None = None
    sight: Sight | None = None
    tools: ToolUse | None = None
    guess: Guess | None = None
    adapter: Adapter | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    number: int = 0  # among the answers to its request


@dataclass(slots=True)
class Outcome:
    """What one step brought: `pieces`, `calls` and `others` as in childwire.Step, and the requests that ended."""

    pieces: list[tuple[int, str, str]] = field(default_factory=list)
    calls: list[Calls] = field(default_factory=list)
    others: list[tuple[int, int, str, str]] = field(default_factory=list)
    ended: list[tuple[int, Generated | Embedded | Adapted | RpcError]] = field(default_factory=list)

    def add(self, running: Running, text: str, reasoning: str) -> None:
        """New text of a request that streams."""
        if running.number:
            self.others.append((running.id, running.number, text, reasoning))
        else:
            self.pieces.append((running.id, text, reasoning))


class Engine:
    """Decodes any number of requests in one batch.

    Args:
        loaded: the model.
        max_batch: how many decode together; further ones wait their turn.
        prefill_step: how many tokens of a prompt are read between two decode steps.
        prefill_joins: how many prompts begin to be read in one step.
        cache_bytes: bounds the prefixes that are kept and what the batch holds, together; 0 keeps nothing.
        kv_bytes: what the KV caches of all requests may hold; 0 is no bound. See `allow`.
        kv_bits: what requests have that say nothing; 0 leaves their KV caches as they are.
        guard: (source, answer) → words the answer invents; used for models that promise to rewrite faithfully.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_batch: int,
        prefill_step: int,
        prefill_joins: int = 8,
        cache_bytes: int = 0,
        kv_bytes: int = 0,
        kv_bits: int = 0,
        guard: Callable[[str, str], tuple[str, ...]] | None = None,
    ) -> None:
        self._loaded = loaded
        sight_bytes = min(cache_bytes // SIGHT_SHARE, MOST_SIGHT_BYTES) if loaded.vision is not None else 0
        cache = PromptCache(loaded.model, cache_bytes - sight_bytes)
        self.cache = cache if cache_bytes > 0 and cache.usable else None
        self._limits: dict[str, Any] = {
            "max_batch": 1 if loaded.batching == "alone" else max_batch,
            "prefill_step": prefill_step,
            "prefill_joins": prefill_joins,
            "prompt_cache": self.cache,
            "window": loaded.context_length,
            "kv_bytes": kv_bytes,
        }
        if loaded.batching == "decode":
            self._limits["most_prefills"] = 1
        self._cache_bytes = cache_bytes - sight_bytes
        self._defaults = loaded.defaults | ({"kv_bits": kv_bits} if kv_bits else {})
        self._guard = guard
        sees = loaded.vision is not None
        self._prompts = PromptBuilder(loaded.tokenizer, loaded.context_length, loaded.vocabulary, parts=sees)
        self._sights: Sights | None = None
        if loaded.vision is not None:
            loaded.vision.features.budget_bytes = sight_bytes
            self._sights = Sights(loaded.model, loaded.vision, self.cache, step=prefill_step)
        self._generator = Lanes(loaded.model, **self._limits)
        self.allow(kv_bytes)
        self._eos: set[int] = set(loaded.tokenizer.eos_token_ids)
        self._stops = StopSequences([(token,) for token in self._eos])
        tokenizer = loaded.tokenizer
        # As mlx_lm's command line has it: what ends lines and texts is never left out.
        spared = {*tokenizer.encode("\n", add_special_tokens=False), *self._eos}
        self._spared = tuple(sorted(token for token in spared if token < loaded.vocabulary))
        self._think = (tokenizer.think_start, tokenizer.think_end) if tokenizer.has_thinking else None
        self.guesses = Guesses(loaded.model)
        self._running: dict[int, Running] = {}  # by the generator's uid
        self._uids: dict[int, int] = {}  # request id → uid
        self._several: dict[int, Answers] = {}  # by request id, of those that asked for several answers
        self._failed_steps = 0
        self._compiler = Compiler(tokenizer, loaded.vocabulary, self._eos)
        self._toolbox = Toolbox(tokenizer, self._eos)
        self._compiling: dict[int, tuple[Running, Future[Compiled]]] = {}  # by request id
        self.adapters = Adapters(loaded.model)
        self._adapting: dict[int, Running] = {}  # by request id; their adapter is not read yet
        self._keeping: dict[int, Adapter] = {}  # by request id
        self._embedder = Embedder(loaded, most_tokens=MOST_PREFILLS * prefill_step)
        self.disk: DiskCache | None = None
        # By request id; without a request where that was cancelled.
        self._fetching: dict[int, tuple[Running | None, Future[Fetched | None]]] = {}

    # --- requests

    @property
    def busy(self) -> bool:
        """There is something left to do for `step`."""
        return self._generating or self._embedder.busy

    @property
    def _generating(self) -> bool:
        waiting = self._compiling or self._fetching or self._adapting or self._keeping or self.adapters.pending
        return bool(self._running or waiting or self._sights) or (self.cache is not None and self.cache.pending)

    @property
    def active(self) -> int:
        """Requests that hold a place in the batch, the ones whose prompt is being read included."""
        return self._generator.active

    @property
    def waiting(self) -> int:
        fetching = sum(running is not None for running, _ in self._fetching.values())
        waiting = len(self._compiling) + len(self._adapting) + len(self._sights or ())
        return self._generator.waiting + waiting + fetching

    @property
    def exact(self) -> bool:
        """A request is here whose answer may depend on nothing else, not even on how many threads compute it."""
        held = (
            *self._running.values(),
            *self._adapting.values(),
            *(running for running, _ in self._compiling.values()),
        )
        return any(running.choices.lane.deterministic for running in held)

    def submit(self, request_id: int, request: Generate) -> None:
        """Take a request into the batch; it starts at the next step, or once its rule is compiled and what disk has of
        its prompt is read.

        Raises:
            RpcError: it cannot be honoured. Nothing of it remains.
            EngineLost: see `step`.
        """
        try:
            self._submit(request_id, request)
        except RpcError:
            raise
        except Exception as error:  # a tokenizer's or a template's own; it is this request's alone
            _check_alive(error)
            raise _typed(error) from error

    def _submit(self, request_id: int, request: Generate) -> None:
        received_at = time.perf_counter()
        choices = resolve(request.kind, request.options, self._defaults, self._loaded.vocabulary)
        turns, sources = take_images(request.messages, blind=self._loaded.blind)
        if sources and self._sights is not None:
            check_options(request)
            choices = replace(choices, lane=PLAIN)  # whatever the model's default is
            request = msgspec.structs.replace(request, messages=[])  # the images' bytes go once they are read
            self._sights.add(
                request_id,
                sources,
                lambda pictures: self._accept(request_id, request, choices, turns, received_at, pictures),
            )
        else:
            self._accept(request_id, request, choices, turns, received_at, [])

    def _accept(
        self,
        request_id: int,
        request: Generate,
        choices: Choices,
        turns: list[dict[str, Any]],
        received_at: float,
        pictures: list[Picture],
    ) -> None:
        tools = self._toolbox.use(request)
        choices = self._complete(choices, tools)
        apart = choices.bound or choices.lane != PLAIN
        guess = None if pictures else self.guesses.guess(choices.speculation, apart=apart)
        self._generator.check(choices.lane)
        if self.cache is None and request.options.get("cache_prompt") is True:
            raise Unsupported("no prompt caches are kept of this model", option="cache_prompt")
        urgent = request.priority != "batch"
        reuse = Reuse(NAMESPACE, urgent=urgent) if self.cache is not None and choices.cache_prompt else None
        sight: Sight | None = None
        if pictures:
            prompt, sight = self._build_seeing(request.kind, turns, choices, pictures)
            reuse = Reuse(sight.namespace, urgent=urgent) if reuse is not None else None
        else:
            cut = reuse is not None and self.cache is not None and self.cache.marked
            prompt = self._build(request.kind, turns, choices, cut, tools)
        if reuse is not None:
            reuse.cuts = prompt.cuts
        if choices.bound and choices.thinking:
            prompt = self._prompts.open_thought(prompt)
        choices = self._fit(choices, prompt)
        text = self._text(choices, prompt, tools)
        running = Running(
            request_id, request, prompt, choices, text, received_at, reuse, sight=sight, tools=tools, guess=guess
        )
        self._start(running, request.adapter)

    def prewarm(self, request_id: int, request: Prewarm) -> None:
        """Have the beginning of prompts with a system turn kept; ends as a request without text.

        Raises:
            RpcError: it cannot be kept.
            EngineLost: see `step`.
        """
        try:
            self._prewarm(request_id, request)
        except RpcError:
            raise
        except Exception as error:
            _check_alive(error)
            raise _typed(error) from error

    def _prewarm(self, request_id: int, request: Prewarm) -> None:
        if self.cache is None:
            raise Unsupported("no prompt caches are kept of this model", option="system")
        choices = resolve("chat", {"max_tokens": 1, "temperature": 0.0}, self._defaults, self._loaded.vocabulary)
        if choices.lane != PLAIN:
            raise Unsupported("this model's KV caches are of a kind of which nothing is kept", option="system")
        prompt = self._prompts.system(request.system, thinking=choices.thinking)
        choices = self._fit(choices, prompt)
        text = TextStream(self._loaded.tokenizer.detokenizer, make_machine((), None))
        asked, reuse = Generate(kind=PREWARM, messages=[]), Reuse(NAMESPACE, prompt.cuts)
        running = Running(request_id, asked, prompt, choices, text, time.perf_counter(), reuse)
        self._start(running, request.adapter)

    def _is_warm(self, running: Running) -> bool:
        """Whether what was asked to be kept is kept."""
        assert self.cache is not None
        assert running.reuse is not None
        self._generator.settle()
        (cut,) = running.prompt.cuts
        return self.cache.tree.peek(running.reuse.namespace, running.prompt.tokens[:cut], cut) == cut

    def _start(self, running: Running, adapter: str | None) -> None:
        """A request is on its way: its adapter is read, then what disk has of its prompt, then its rule is compiled;
        then it joins the batch. What is there already keeps nobody waiting."""
        if adapter is not None:
            running.adapter = self.adapters.want(adapter)
            if not running.adapter.ready:
                self._adapting[running.id] = running
                return
        self._fetch(running)

    def _fetch(self, running: Running) -> None:
        """Begin with a request, or have what disk has of its prompt read first."""
        if running.adapter is not None and running.reuse is not None:
            running.reuse.namespace = running.adapter.identity
        # Prompts with images depend on more than disk knows of.
        plain = running.choices.lane == PLAIN and running.sight is None
        reading, reuse = None, running.reuse if plain else None
        if self.disk is not None and self.cache is not None and reuse is not None:
            self.cache.tree.fit(self._generator.live_bytes())
            reading = self.disk.fetch(reuse.namespace, running.prompt.tokens)
        if reading is not None:
            self._fetching[running.id] = running, reading
        else:
            self._begin(running)

    def _begin(self, running: Running) -> None:
        rule = running.choices.rule
        if rule is None:
            self._join(running)
            return
        compiled = self._compiler.compile(rule)
        if compiled.done():
            self._join(running, compiled.result())
        else:
            self._compiling[running.id] = running, compiled

    def _build_seeing(
        self, kind: str, turns: list[dict[str, Any]], choices: Choices, pictures: list[Picture]
    ) -> tuple[Prompt, Sight]:
        assert self._loaded.vision is not None
        vision, sights = self._loaded.vision, []

        def expand(text: str) -> list[int]:
            sights.append(vision.prepare(text, pictures, keep=choices.cache_prompt))
            return sights[0].tokens

        prompt = self._prompts.build(kind, turns, thinking=choices.thinking, encode=expand)
        return prompt, sights[0]

    def _build(
        self, kind: str, turns: list[dict[str, Any]], choices: Choices, cut: bool, tools: ToolUse | None
    ) -> Prompt:
        thinking, shown = choices.thinking, tools.tools.shown if tools is not None else None
        if choices.context_policy != "drop_oldest":
            return self._prompts.build(kind, turns, thinking=thinking, cut=cut, tools=shown)
        context = self._loaded.context_length
        wished = choices.max_tokens if choices.asked_tokens else min(choices.max_tokens, context // 4)
        room = min(wished, context // 2)
        if choices.bound and choices.thinking:  # see open_thought
            room += len(self._loaded.tokenizer.think_start_tokens or ())
        return shortened(self._prompts, kind, turns, thinking=thinking, cut=cut, room=room, tools=shown)

    def _text(self, choices: Choices, prompt: Prompt, tools: ToolUse | None) -> TextStream:
        tokenizer = self._loaded.tokenizer
        think = self._think if not choices.bound or prompt.in_reasoning else None
        call = tools.syntax.markers if tools is not None else None
        machine = make_machine(choices.stop, think, once=choices.bound, call=call, thought_calls=choices.rule is None)
        marker = len(tokenizer.think_end_tokens or (0,))
        return TextStream(tokenizer.detokenizer, machine, in_reasoning=prompt.in_reasoning, marker_tokens=marker)

    def _fit(self, choices: Choices, prompt: Prompt) -> Choices:
        """With `max_tokens` fitted to the context, and to what one result can report. Raises InvalidParams where more
        than that was asked for."""
        most = choices.max_tokens
        if not choices.lane.rotate:
            most = min(most, self._loaded.context_length - len(prompt.tokens))
        logprobs = choices.sampling.logprobs
        if logprobs < 0:
            return replace(choices, max_tokens=most)
        fitting = reportable(choices.answers, logprobs, parsed=choices.rule is not None)
        if most > fitting:
            if choices.asked_tokens:
                told = f"logprobs {logprobs} of {choices.answers} x {most} tokens are too many for one result"
                raise InvalidParams(f"{told}: set max_tokens to {fitting} at most", field="logprobs", limit=fitting)
            most = fitting
        return replace(choices, max_tokens=most)

    def _join(self, running: Running, compiled: Compiled | None = None) -> None:
        choices, prompt = running.choices, running.prompt
        rows = [running]
        if choices.answers > 1:
            rows += [self._another(running, number) for number in range(1, choices.answers)]
        samplings = [self._sampling(row, compiled) for row in rows]
        lane, length = choices.lane, len(prompt.tokens)
        shared = len(rows) if lane == PLAIN else 1
        most = self._generator.fit(lane, length, choices.max_tokens, asked=choices.asked_tokens, rows=shared)
        processors = make_logits_processors(choices.logit_bias)
        urgent = running.request.priority != "batch"

        def add(reuse: Reuse | None) -> int:
            uids = self._generator.add_all(
                prompt.tokens, most, samplings, processors, self._stops, reuse, key=lane, urgent=urgent
            )
            self._running.update(zip(uids, rows, strict=True))
            self._uids[running.id] = uids[0]
            if len(rows) > 1:
                self._several[running.id] = Answers(dict(enumerate(uids)))
            return uids[0]

        if running.sight is not None and self._sights is not None:
            self._sights.see(running.id, Seen(running.sight, prompt.tokens, running.reuse, add, running))
            running.sight = None  # its images go as soon as they have served
        else:
            add(running.reuse)

    def _another(self, first: Running, number: int) -> Running:
        """A further answer to a request. It takes up nothing by itself: it shares the first one's prefill."""
        prompt, reuse = first.prompt, first.reuse
        kept = None if reuse is None else Reuse(reuse.namespace, cached=len(prompt.tokens))
        text = self._text(first.choices, prompt, None)
        return replace(first, text=text, reuse=kept, guess=None, logprobs=[], number=number)

    def _sampling(self, running: Running, compiled: Compiled | None) -> Sampling:
        """How the tokens of one answer are chosen: by the request's choices, a key and a constraint of its own."""
        sampling = replace(running.choices.sampling, guess=running.guess, adapter=running.adapter)
        if running.number:
            sampling = replace(sampling, key=other_key(sampling.key, running.number))
        if sampling.xtc_probability > 0:
            sampling = replace(sampling, spared=self._spared)
        if running.choices.bound:
            thought = self._thought(running, compiled) if running.prompt.in_reasoning else None
            vocabulary = self._loaded.vocabulary
            running.constraint = Constraint(compiled, eos=self._eos, thought=thought, vocabulary=vocabulary)
            sampling = replace(sampling, constraint=running.constraint)
        return sampling

    def _complete(self, choices: Choices, tools: ToolUse | None) -> Choices:
        """What a request's tools and its thought's bound change in its options. Raises InvalidParams, Unsupported."""
        tokenizer = self._loaded.tokenizer
        if choices.thinking_budget is not None:
            close = tokenizer.think_end_tokens if tokenizer.has_chat_template else None
            if not close or max(close) >= self._loaded.vocabulary:
                raise Unsupported("this model has no thinking mode", option="thinking_budget")
        if tools is None:
            return choices
        if choices.answers > 1:
            raise Unsupported("with tools there is one answer", option="n")
        if choices.rule is not None and (tools.rule is not None or (choices.rule.kind == "schema" and tools.may_call)):
            told = f"give either {choices.rule.kind} or tools to call: an answer follows one rule"
            raise InvalidParams(told, field="tool_choice" if tools.rule is not None else choices.rule.kind)
        bias = choices.logit_bias
        if tools.banned is not None and tools.banned < self._loaded.vocabulary:
            bias = {**(bias or {}), tools.banned: -1000.0}
        return replace(choices, rule=tools.rule or choices.rule, logit_bias=bias)

    def _thought(self, running: Running, compiled: Compiled | None) -> Thought:
        tokenizer = self._loaded.tokenizer
        ends = [tokenizer.think_end]
        if running.tools is not None and compiled is None:
            ends.append(running.tools.syntax.markers[0])
        return Thought(
            (lambda token: bytes(compiled.tokenizer.decode_bytes([token])))
            if compiled is not None
            else (lambda token: str(tokenizer.decode([token])).encode()),
            ends,
            close=tokenizer.think_end_tokens,
            budget=running.choices.thinking_budget,
        )

    def cancel(self, request_id: int) -> Outcome:
        """End a request now, with the text it has. One that has ended already, or never was, changes nothing."""
        outcome = Outcome()
        uid = self._uids.get(request_id)
        if request_id in self._fetching:
            waiting, reading = self._fetching[request_id]
            if waiting is not None:
                self._fetching[request_id] = None, reading  # the next one may be glad of it
                outcome.ended.append((request_id, self._result(waiting, "cancelled")))
        elif request_id in self._compiling:
            running, _ = self._compiling.pop(request_id)
            outcome.ended.append((request_id, self._result(running, "cancelled")))
        elif request_id in self._adapting:
            outcome.ended.append((request_id, self._result(self._adapting.pop(request_id), "cancelled")))
        elif request_id in self._several:
            self._drop_all(list(self._several[request_id].uids.values()), outcome)
        elif uid is not None:
            self._drop_all([uid], outcome)
        elif self._embedder.cancel(request_id):
            outcome.ended.append((request_id, Cancelled("the request was cancelled")))
        elif self._sights is not None:
            with contextlib.suppress(KeyError):
                owner = self._sights.drop(request_id)
                nothing = Generated(text="", finish_reason="cancelled", prompt_tokens=0, completion_tokens=0)
                outcome.ended.append((request_id, nothing if owner is None else self._result(owner, "cancelled")))
        return outcome

    def adapt(self, request_id: int, request: Adapt) -> Outcome:
        """Read an adapter and keep it; None lets go of the one that was kept. Raises as Adapters.want does."""
        if request.adapter is not None:
            self._keeping[request_id] = self.adapters.want(request.adapter)
            return Outcome()
        self.adapters.kept = None
        return Outcome(ended=[(request_id, Adapted(adapters_bytes=self.adapters.nbytes))])

    def _drop_all(self, uids: list[int], outcome: Outcome) -> None:
        """Cancel rows."""
        try:
            for uid in uids:
                if uid in self._running:  # one answer that cannot be told takes the others with it
                    self._drop(uid, "cancelled", outcome)
        except Exception as error:
            self._fail_all(error, outcome)

    def _drop(self, uid: int, reason: str, outcome: Outcome) -> None:
        """End a row that is in the batch, or on its way there."""
        self._keep(self._running[uid], *self._generator.drop(uid))
        self._end(uid, reason, outcome)

    def allow(self, kv_bytes: int) -> None:
        """Have the KV caches of all requests, and the prefixes that are kept, hold no more than this; 0 is no bound.
        What is running goes on."""
        self._generator.allow(kv_bytes)
        if self.cache is not None:
            self.cache.tree.budget_bytes = min(self._cache_bytes, kv_bytes) if kv_bytes else self._cache_bytes

    def count(self, request: CountTokens) -> int:
        """Raises RpcError."""
        turns = request.messages
        if turns is not None:
            turns, sources = take_images(turns, blind=self._loaded.blind)
            if sources:
                told = "tokens of images cannot be counted"
                raise Unsupported(told, option="messages", field=sources[0].field)
        try:
            shown = self._toolbox.read(request.tools).shown if request.tools else None
            return self._prompts.count(text=request.text, messages=turns, tools=shown)
        except Exception as error:
            raise _typed(error) from error

    def attach(self, name: str, draft: LoadedModel) -> None:
        """Have a draft model guess from now on, in place of the one before. What is running goes on without any.

        Raises:
            InvalidParams, Unsupported: it cannot guess for this model. The one before stays.
        """
        if not self.guesses.usable:
            raise Unsupported("nothing can be guessed for this model: it takes no draft model", option="draft_model")
        check_pair(self._loaded, draft)
        made = Draft(
            name, draft, vocabulary=self._loaded.vocabulary, pace=self.guesses.pace, step=self._limits["prefill_step"]
        )
        made.warm_up()
        if self.guesses.draft is not None:
            self.guesses.draft.closed = True
        self.guesses.draft = made

    def encode(self, request: EncodeText) -> Packed:
        """Raises RpcError."""
        try:
            return encode(self._loaded.tokenizer, request)
        except Exception as error:
            raise _typed(error) from error

    def decode(self, request: DecodeTokens) -> str:
        """Raises RpcError."""
        try:
            return decode(self._loaded.tokenizer, self._loaded.vocabulary, request)
        except Exception as error:
            raise _typed(error) from error

    def embed(self, request_id: int, request: EmbedTexts) -> None:
        """Take texts to make vectors of; the steps that follow do, a part at a time. Raises RpcError."""
        try:
            self._embedder.submit(request_id, request)
        except Exception as error:
            _check_alive(error)
            raise _typed(error) from error

    # --- steps

    def step(self) -> Outcome:
        """One decode step for all, one prefill step for those whose prompts are still being read, and a part of the
        vectors that are asked for.

        Raises:
            EngineLost: no further step can work; every request in flight is lost with the process.
        """
        outcome = Outcome()
        if self._adapting or self._keeping or self.adapters.pending:
            self._read_adapters(outcome)
        if self._sights:
            self._see(self._sights, outcome)
        if self._fetching:
            self._begin_fetched(outcome)
        if self._embedder.busy:
            self._embed(outcome)
            if not self._generating:
                return outcome
        if self._compiling:
            self._join_compiled(outcome)
        if not self._running and (self._compiling or self._fetching):
            return outcome
        for uid, error in self._generator.refuse():
            self._fail(uid, error, outcome, in_batch=False)
        try:
            self._generator.settle()
            prompts, responses = self._generator.next()
        except Exception as error:
            return self._fail_all(error, outcome)
        self._failed_steps = 0
        try:
            self._take(prompts, responses, outcome)
        except Exception as error:  # a row could not be looked at, or taken out
            return self._fail_all(error, outcome)
        return outcome

    def _take(self, prompts: list[Any], responses: list[Any], outcome: Outcome) -> None:
        """What a step made goes to its requests. Whatever a request brought that raises costs that request only."""
        now = time.perf_counter()
        for progress in prompts:
            running = self._running.get(progress.uid)
            if running is not None and progress.end_of_prompt:
                running.prompt_at = now
            elif running is not None and progress.end_of_segment:
                self._keep_cut(progress.uid, running)
        while responses:
            for response in responses:
                running = self._running.get(response.uid)
                if running is None:
                    continue
                try:
                    self._advance(running, response, now, outcome)
                except Exception as error:
                    self._fail(response.uid, error, outcome, in_batch=response.finish_reason is None)
            responses = self._generator.rest()

    def _see(self, sights: Sights, outcome: Outcome) -> None:
        """Go on with prompts that have images, as far as that goes between two decode steps."""
        failed = sights.take_read(wait_s=0.0 if self._running else COMPILING_S)
        lost = sights.step(self._generator)
        for request_id, error in [*failed, *([lost] if lost is not None else [])]:
            _check_alive(error)
            outcome.ended.append((request_id, _typed(error)))

    def _embed(self, outcome: Outcome) -> None:
        try:
            with mx.stream(self._generator.plain.stream):
                outcome.ended += self._embedder.step(BESIDE_S if self._running else ALONE_S)
        except Exception as error:
            _check_alive(error)
            outcome.ended += self._embedder.fail(_typed(error))

    def _begin_fetched(self, outcome: Outcome) -> None:
        """Requests go on for which what disk had was read by now."""
        assert self.disk is not None
        assert self.cache is not None
        if not (self._running or self._compiling or self._sights or self._embedder.busy):
            wait([reading for _, reading in self._fetching.values()], COMPILING_S, "FIRST_COMPLETED")
        for request_id, (running, reading) in list(self._fetching.items()):
            if reading.done():
                del self._fetching[request_id]
                self.cache.tree.fit(self._generator.live_bytes())
                with mx.stream(self._generator.plain.stream):
                    self.disk.take_up(reading)
                try:
                    if running is not None:
                        self._begin(running)
                except Exception as error:
                    outcome.ended.append((request_id, _typed(error)))

    def _join_compiled(self, outcome: Outcome) -> None:
        """Requests whose rule is compiled by now join the batch."""
        if not self._running:
            wait([compiled for _, compiled in self._compiling.values()], COMPILING_S, "FIRST_COMPLETED")
        for request_id, (running, compiled) in list(self._compiling.items()):
            if compiled.done():
                del self._compiling[request_id]
                try:
                    self._join(running, compiled.result())
                except Exception as error:
                    outcome.ended.append((request_id, _typed(error)))

    def _read_adapters(self, outcome: Outcome) -> None:
        """Adapters are read on; requests whose adapter is there now join the batch."""
        on_their_way = (*self._compiling.values(), *self._fetching.values())
        waiting = [*self._adapting.values(), *(running for running, _ in on_their_way if running is not None)]
        used = {each.adapter for each in (*self._running.values(), *waiting) if each.adapter is not None}
        self.adapters.read(used | set(self._keeping.values()))
        for request_id, adapter in list(self._keeping.items()):
            if adapter.ready or adapter.error is not None:
                del self._keeping[request_id]
                self.adapters.kept = adapter if adapter.ready else self.adapters.kept
                outcome.ended.append((request_id, adapter.error or Adapted(adapters_bytes=self.adapters.nbytes)))
        for request_id, running in list(self._adapting.items()):
            assert running.adapter is not None
            if running.adapter.ready or running.adapter.error is not None:
                del self._adapting[request_id]
                try:
                    if running.adapter.error is not None:
                        raise running.adapter.error
                    self._fetch(running)
                except Exception as error:
                    outcome.ended.append((request_id, _typed(error)))

    def _advance(self, running: Running, response: Any, now: float, outcome: Outcome) -> None:
        token, note = response.token, response.logprobs
        if note is not None:
            if note is NOT_FINITE:
                raise ModelInvalid("the model computed values that are no finite numbers")
            if isinstance(note, RowFailure):
                raise note.cause
        running.tokens += 1
        if running.tokens == 1:
            running.first_at = now
            self._keep_prompt(response, running)
        if token not in self._eos:
            if note is not None:
                running.logprobs.append(self._report(running.choices.sampling.logprobs, token, note))
            text, reasoning = running.text.add(token)
            if (text or reasoning) and running.request.stream:
                outcome.add(running, text, reasoning)
            if running.text.calls:
                self._take_calls(running, outcome)
        stopped = running.text.stopped or (running.constraint is not None and running.constraint.finished)
        if response.finish_reason is not None:
            self._keep(running, response.prompt_cache, response.all_tokens)
            self._end(response.uid, "stop" if stopped else response.finish_reason, outcome)
        elif stopped:
            self._drop(response.uid, "stop", outcome)

    def _take_calls(self, running: Running, outcome: Outcome, reason: str | None = None) -> None:
        """Read the tool calls that have ended now, as all have with the answer, whose `reason` to end that is."""
        texts, running.text.calls = running.text.calls, []
        assert running.tools is not None
        for text, whole in texts:
            told = news(running.id, *running.tools.take(text, whole, reason))
            if told is not None and running.request.stream:
                outcome.calls.append(told)

    def _end(self, uid: int, reason: str, outcome: Outcome) -> None:
        """Say how an answer ended. It has left the batch already."""
        running = self._running.pop(uid)
        several = self._several.get(running.id)
        if several is None:
            self._uids.pop(running.id, None)
        try:
            text, reasoning = running.text.finish()
            if (text or reasoning) and running.request.stream:
                outcome.add(running, text, reasoning)
            if running.request.kind == PREWARM and reason != "cancelled" and not self._is_warm(running):
                raise Unsupported("the prompt cache has no room for this system turn", option="system")
            if running.text.calls:
                self._take_calls(running, outcome, reason)
            result = self._result(running, reason)
            if several is not None:
                joined = several.end(running.number, result)
                if joined is None:
                    return
                self._forget(running.id)
                result = joined
            outcome.ended.append((running.id, result))
        except Exception as error:
            outcome.ended.append((running.id, _typed(error)))
            self._forget(running.id)

    def _forget(self, request_id: int) -> None:
        """A request has its last word: what is left of its answers goes."""
        self._uids.pop(request_id, None)
        several = self._several.pop(request_id, None)
        for uid in several.uids.values() if several is not None else ():
            if self._running.pop(uid, None) is not None:
                self._generator.drop(uid)

    def _result(self, running: Running, reason: str) -> Generated:
        text = "".join(running.text.text)
        invented = None
        rewritten = running.request.kind == "process" and running.choices.rule is None  # a rule has words of its own
        if self._guard is not None and self._loaded.faithful and rewritten:
            invented = list(self._guard(running.prompt.source, text)) or None
        structured = None
        if running.constraint is not None and reason == "stop" and not running.text.stopped:
            structured = running.constraint.value(text)
        calls = running.tools.calls if running.tools is not None else []
        malformed = running.tools.malformed if running.tools is not None else []
        now = time.perf_counter()
        start, first = running.received_at, running.first_at
        return Generated(
            text=text,
            finish_reason="tool_calls" if calls and reason == "stop" else reason,
            prompt_tokens=len(running.prompt.tokens),
            completion_tokens=running.tokens,
            cached_tokens=running.reuse.cached if running.reuse is not None else 0,
            timings=WorkerTimings(
                prompt_s=(running.prompt_at or now) - start,
                first_token_s=first - start if first else 0.0,
                decode_s=now - first if first else 0.0,
            ),
            reasoning="".join(running.text.reasoning) or None,
            logprobs=running.logprobs if running.choices.sampling.logprobs >= 0 else None,
            invented=invented,
            structured=structured,
            reasoning_tokens=running.text.reasoning_tokens,
            tool_calls=calls or None,
            malformed_tool_calls=malformed or None,
            speculation=running.guess.report() if running.guess is not None else None,
            dropped_messages=running.prompt.dropped,
            alone=running.choices.lane.alone,
        )

    def _report(self, count: int, token: int, note: tuple[mx.array, mx.array, mx.array]) -> dict[str, Any]:
        """One entry of `logprobs`, as in the wire's TokenLogprob."""
        parts: list[Any] = [part.tolist() for part in note]
        chosen, ids, values = parts
        decode = self._loaded.tokenizer.decode
        entry: dict[str, Any] = {"token": decode([token]), "token_id": token, "logprob": max(chosen, -1e9)}
        if count:
            best = zip(ids[:count], values[:count], strict=True)
            entry["top"] = [(decode([other]), value) for other, value in best if value > -1e9]
        return entry

    # --- the prompt cache

    def _keep(self, running: Running, row: RowView | None, tokens: list[int]) -> None:
        """Have what was computed for a request kept. The copying waits for the next step, behind the answer."""
        if self.cache is not None and running.reuse is not None:
            self.cache.keep(running.reuse.namespace, tokens, row)

    def _keep_cut(self, uid: int, running: Running) -> None:
        """A prompt was read up to a cut that was made for this."""
        if running.reuse is not None and running.reuse.cuts:
            row, tokens = self._generator.view(uid)
            if len(tokens) in running.reuse.cuts:
                self._keep(running, row, tokens)

    def _keep_prompt(self, response: Any, running: Running) -> None:
        """A prompt gave its first token: where much of it is new, others may use it while its own answer is made."""
        reuse, length = running.reuse, len(running.prompt.tokens)
        if self.cache is None or self.cache.marked or reuse is None or length - reuse.cached < LEAST:
            return
        if response.finish_reason is None:
            row, tokens = self._generator.view(response.uid)
            self._keep(running, row, tokens[:length])

    # --- failures

    def _fail(self, uid: int, error: Exception, outcome: Outcome, *, in_batch: bool) -> None:
        running = self._running.pop(uid, None)
        if running is None:
            return
        if running.choices.rule is not None:
            self._compiler.forget(running.choices.rule)
        outcome.ended.append((running.id, _typed(error)))
        if in_batch:
            self._generator.drop(uid)
        self._forget(running.id)

    def _fail_all(self, error: Exception, outcome: Outcome) -> Outcome:
        """The shared step raised: nobody's state in that lane can be trusted. End them all, and start a clean batch."""
        self._failed_steps += 1
        _check_alive(error)
        if self._failed_steps > MAX_FAILED_STEPS:
            raise EngineLost(f"{type(error).__name__}: {error}") from error
        for uid in self._generator.fail():
            running = self._running.pop(uid, None)
            if running is not None:
                outcome.ended.append((running.id, _typed(error)))
                self._forget(running.id)
        if self.cache is not None:
            self.cache.forget_pending()
        self.guesses.forget()
        mx.clear_cache()
        return outcome

    def warm_up(self) -> RowView | None:
        """Compile what the first request would otherwise wait for. Returns what caches hold for a prompt.

        Raises what the model raises.
        """
        sampling = Sampling(temperature=0.7, top_p=0.8, repetition=1.15)
        room = self._loaded.context_length
        with contextlib.suppress(RpcError):  # whom it refuses, it tells
            self._prompts.build("chat", [{"role": "user", "content": "x"}], thinking=False)
        prompt = [min(1, self._loaded.vocabulary - 1)] * max(1, min(8, room - 2))
        rows = self._generator.plain  # whatever memory there is for requests
        warm_up(sampling, self._loaded.vocabulary)
        started = time.perf_counter()
        row = None
        for choice in (sampling, Sampling()):
            rows.add(prompt, 2, choice, [], StopSequences())
            while rows.active or rows.waiting:
                for response in rows.next()[1]:
                    row = response.prompt_cache or row
            if time.perf_counter() - started > 1.0:  # a large model on a slow device: the rest can wait
                break
        return row

    # --- what is kept

    def cache_stats(self) -> PromptCacheStats | None:
        """What became of the prompt cache; None where nothing is kept."""
        if self.cache is None:
            return None
        stats = self.cache.stats()
        if self.disk is not None:
            disk = self.disk
            stats.disk_hits, stats.disk_tokens, stats.disk_failures = disk.hits, disk.saved_tokens, disk.failures
        return stats

    def clear_cache(self) -> tuple[int, int]:
        """Keep nothing of what is kept now. Returns the bytes that this freed in memory and on disk. Raises OSError."""
        if self.cache is None:
            return 0, 0
        freed = self.cache.nbytes
        self.cache.clear()
        mx.clear_cache()
        return freed, self.disk.clear() if self.disk is not None else 0


def _check_alive(error: Exception) -> None:
    """Raises EngineLost where an error says that the device is gone."""
    message = str(error)
    if any(sign.lower() in message.lower() for sign in _FATAL):
        raise EngineLost(f"{type(error).__name__}: {message}") from error


def _typed(error: Exception) -> RpcError:
    if isinstance(error, RpcError):
        return error
    return InternalError(f"the engine failed: {type(error).__name__}: {error}")
