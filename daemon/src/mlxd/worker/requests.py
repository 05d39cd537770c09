"""A request, read: its options are completed, its prompt is built, how its tokens are chosen is settled; or it is
refused. Nothing is computed here, and nothing is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from mlxd_client.errors import InvalidParams, Unsupported

from ..childwire import CountTokens, Generate, Prewarm
from .answers import reportable
from .calls import Toolbox, ToolUse
from .constraint import Constraint, Thought
from .faults import typed
from .grammar import Compiled
from .images import Picture, Source, take_images
from .kvcache import PromptCache
from .lanes import PLAIN, Lanes
from .load import LoadedModel
from .options import Choices, resolve
from .prompt import Prompt, PromptBuilder
from .running import PREWARM, Running
from .sampling import Sampling, other_key
from .shorten import shortened
from .sights import check_options
from .speculation import Guesses
from .text import TextStream, make_machine
from .vision import Sight
from .waits import Reuse

# What shares prefixes: all that the base model computes, and all that an adapter of one content does.
NAMESPACE = b""


@dataclass(slots=True)
class Asked:
    """A request whose options are complete; `sources` are its images, which may still have to be read."""

    id: int
    request: Generate
    choices: Choices
    turns: list[dict[str, Any]]
    sources: list[Source]
    received_at: float


class Requests:
    """Reads the requests of one model.

    Args:
        prompts: builds their prompts.
        guesses: who guesses for them.
        lanes: where they will decode.
        cache: what keeps their prefixes; None where nothing is kept.
        defaults: what requests have that say nothing.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: PromptBuilder,
        guesses: Guesses,
        lanes: Lanes,
        cache: PromptCache | None,
        defaults: Mapping[str, Any],
    ) -> None:
        self._loaded = loaded
        self._prompts = prompts
        self._guesses = guesses
        self._lanes = lanes
        self._cache = cache
        self._defaults = defaults
        tokenizer = loaded.tokenizer
        self.eos: set[int] = set(tokenizer.eos_token_ids)
        self.toolbox = Toolbox(tokenizer, self.eos)
        # As mlx_lm's command line has it: what ends lines and texts is never left out.
        spared = {*tokenizer.encode("\n", add_special_tokens=False), *self.eos}
        self.spared = tuple(sorted(token for token in spared if token < loaded.vocabulary))
        self._think = (tokenizer.think_start, tokenizer.think_end) if tokenizer.has_thinking else None

    # --- what is asked

    def read(self, request_id: int, request: Generate) -> Asked:
        """Raises RpcError for options that cannot be honoured, and for what can be no images."""
        received_at = time.perf_counter()
        choices = resolve(request.kind, request.options, self._defaults, self._loaded.vocabulary)
        turns, sources = take_images(request.messages, blind=self._loaded.blind)
        if sources and self._loaded.vision is not None:
            check_options(request)
            choices = replace(choices, lane=PLAIN)  # whatever the model's default is
            request = msgspec.structs.replace(request, messages=[])  # the images' bytes go once they are read
        return Asked(request_id, request, choices, turns, sources, received_at)

    def accept(self, asked: Asked, pictures: list[Picture]) -> Running:
        """The request with its prompt, its images read. Raises RpcError, and what a tokenizer or a template does."""
        request = asked.request
        tools = self.toolbox.use(request)
        choices = self._complete(asked.choices, tools)
        apart = choices.bound or choices.lane != PLAIN
        guess = None if pictures else self._guesses.guess(choices.speculation, apart=apart)
        self._lanes.check(choices.lane)
        if self._cache is None and request.options.get("cache_prompt") is True:
            raise Unsupported("no prompt caches are kept of this model", option="cache_prompt")
        urgent = request.priority != "batch"
        reuse = Reuse(NAMESPACE, urgent=urgent) if self._cache is not None and choices.cache_prompt else None
        sight: Sight | None = None
        if pictures:
            prompt, sight = self._build_seeing(request.kind, asked.turns, choices, pictures)
            reuse = Reuse(sight.namespace, urgent=urgent) if reuse is not None else None
        else:
            cut = reuse is not None and self._cache is not None and self._cache.marked
            prompt = self._build(request.kind, asked.turns, choices, cut, tools)
        if reuse is not None:
            reuse.cuts = prompt.cuts
        if choices.bound and choices.thinking:
            prompt = self._prompts.open_thought(prompt)
        choices = self._fit(choices, prompt)
        text = self._text(choices, prompt, tools)
        return Running(
            asked.id, request, prompt, choices, text, asked.received_at, reuse, sight=sight, tools=tools, guess=guess
        )

    def prewarm(self, request_id: int, request: Prewarm) -> Running:
        """A request that has the beginning of prompts with a system turn kept. Raises as `accept` does."""
        if self._cache is None:
            raise Unsupported("no prompt caches are kept of this model", option="system")
        choices = resolve("chat", {"max_tokens": 1, "temperature": 0.0}, self._defaults, self._loaded.vocabulary)
        if choices.lane != PLAIN:
            raise Unsupported("this model's KV caches are of a kind of which nothing is kept", option="system")
        prompt = self._prompts.system(request.system, thinking=choices.thinking)
        choices = self._fit(choices, prompt)
        text = TextStream(self._loaded.tokenizer.detokenizer, make_machine((), None))
        asked, reuse = Generate(kind=PREWARM, messages=[]), Reuse(NAMESPACE, prompt.cuts)
        return Running(request_id, asked, prompt, choices, text, time.perf_counter(), reuse)

    def count(self, request: CountTokens) -> int:
        """Raises RpcError."""
        turns = request.messages
        if turns is not None:
            turns, sources = take_images(turns, blind=self._loaded.blind)
            if sources:
                told = "tokens of images cannot be counted"
                raise Unsupported(told, option="messages", field=sources[0].field)
        try:
            shown = self.toolbox.read(request.tools).shown if request.tools else None
            return self._prompts.count(text=request.text, messages=turns, tools=shown)
        except Exception as error:
            raise typed(error) from error

    # --- its parts

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

    def _text(self, choices: Choices, prompt: Prompt, tools: ToolUse | None) -> TextStream:
        tokenizer = self._loaded.tokenizer
        think = self._think if not choices.bound or prompt.in_reasoning else None
        call = tools.syntax.markers if tools is not None else None
        machine = make_machine(choices.stop, think, once=choices.bound, call=call, thought_calls=choices.rule is None)
        marker = len(tokenizer.think_end_tokens or (0,))
        return TextStream(tokenizer.detokenizer, machine, in_reasoning=prompt.in_reasoning, marker_tokens=marker)

    # --- the rows of its answers

    def rows(self, running: Running) -> list[Running]:
        """One for each of its answers, itself the first."""
        return [running, *(self._another(running, number) for number in range(1, running.choices.answers))]

    def _another(self, first: Running, number: int) -> Running:
        """A further answer to a request. It takes up nothing by itself: it shares the first one's prefill."""
        prompt, reuse = first.prompt, first.reuse
        kept = None if reuse is None else Reuse(reuse.namespace, cached=len(prompt.tokens))
        text = self._text(first.choices, prompt, None)
        return replace(first, text=text, reuse=kept, guess=None, logprobs=[], number=number)

    def sampling(self, running: Running, compiled: Compiled | None) -> Sampling:
        """How the tokens of one answer are chosen: by the request's choices, a key and a constraint of its own."""
        sampling = replace(running.choices.sampling, guess=running.guess, adapter=running.adapter)
        if running.number:
            sampling = replace(sampling, key=other_key(sampling.key, running.number))
        if sampling.xtc_probability > 0:
            sampling = replace(sampling, spared=self.spared)
        if running.choices.bound:
            thought = self._thought(running, compiled) if running.prompt.in_reasoning else None
            vocabulary = self._loaded.vocabulary
            running.constraint = Constraint(compiled, eos=self.eos, thought=thought, vocabulary=vocabulary)
            sampling = replace(sampling, constraint=running.constraint)
        return sampling

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
