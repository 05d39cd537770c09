"""The requests in flight: each joins the batch, grows by a token a step, and ends in exactly one result or error."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import StopSequences
from mlx_lm.sample_utils import make_logits_processors

from mlxd_client.errors import InternalError, ModelInvalid, RpcError, Unsupported

from ..childwire import CountTokens, Generate, Generated, WorkerTimings
from .batch import NOT_FINITE, RowFailure
from .constraint import Constraint
from .draft import Draft, check_pair
from .grammar import Compiled, Compiler
from .kvcache import PromptCache, RowView
from .lanes import Lanes
from .load import LoadedModel
from .options import Choices, resolve
from .prompt import Prompt, PromptBuilder
from .sampling import Sampling
from .speculation import Guess, Guesses
from .text import TextStream, make_machine
from .waits import LEAST, Reuse

# What shares prefixes: all that the base model computes.
NAMESPACE = b""
# After this many failed steps in a row, no further batch is tried.
MAX_FAILED_STEPS = 2
# How long a step waits where all there is to wait for is a rule that is being compiled.
COMPILING_S = 0.01
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
    guess: Guess | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """What one step brought: `pieces` as in childwire.Step, and the requests that ended."""

    pieces: list[tuple[int, str, str]] = field(default_factory=list)
    ended: list[tuple[int, Generated | RpcError]] = field(default_factory=list)


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
        cache = PromptCache(loaded.model, cache_bytes)
        self.cache = cache if cache_bytes > 0 and cache.usable else None
        self._limits: dict[str, Any] = {
            "max_batch": max_batch,
            "prefill_step": prefill_step,
            "prefill_joins": prefill_joins,
            "prompt_cache": self.cache,
            "window": loaded.context_length,
            "kv_bytes": kv_bytes,
        }
        self._cache_bytes = cache_bytes
        self._defaults = loaded.defaults | ({"kv_bits": kv_bits} if kv_bits else {})
        self._guard = guard
        self._prompts = PromptBuilder(loaded.tokenizer, loaded.context_length, loaded.vocabulary)
        self._generator = Lanes(loaded.model, **self._limits)
        self.allow(kv_bytes)
        self._eos: set[int] = set(loaded.tokenizer.eos_token_ids)
        self._stops = StopSequences([(token,) for token in self._eos])
        tokenizer = loaded.tokenizer
        self._think = (tokenizer.think_start, tokenizer.think_end) if tokenizer.has_thinking else None
        self.guesses = Guesses(loaded.model)
        self._running: dict[int, Running] = {}  # by the generator's uid
        self._uids: dict[int, int] = {}  # request id → uid
        self._failed_steps = 0
        self._compiler = Compiler(tokenizer, loaded.vocabulary, self._eos)
        self._compiling: dict[int, tuple[Running, Future[Compiled]]] = {}  # by request id

    # --- requests

    @property
    def busy(self) -> bool:
        """There is something left to do for `step`."""
        return bool(self._running or self._compiling) or (self.cache is not None and self.cache.pending)

    @property
    def active(self) -> int:
        """Requests that hold a place in the batch, the ones whose prompt is being read included."""
        return self._generator.active

    @property
    def waiting(self) -> int:
        return self._generator.waiting + len(self._compiling)

    def submit(self, request_id: int, request: Generate) -> None:
        """Take a request into the batch; it starts at the next step, or once its rule is compiled.

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
        self._generator.check(choices.lane)
        guess = self.guesses.guess(choices.speculation, constrained=choices.rule is not None)
        if self.cache is None and request.options.get("cache_prompt") is True:
            raise Unsupported("no prompt caches are kept of this model", option="cache_prompt")
        urgent = request.priority != "batch"
        reuse = Reuse(NAMESPACE, urgent=urgent) if self.cache is not None and choices.cache_prompt else None
        cut = reuse is not None and self.cache is not None and self.cache.marked
        prompt = self._prompts.build(request.kind, request.messages, thinking=choices.thinking, cut=cut)
        if reuse is not None:
            reuse.cuts = prompt.cuts
        think = self._think
        if choices.rule is not None:
            if choices.thinking:
                prompt = self._prompts.open_thought(prompt)
            think = self._think if prompt.in_reasoning else None
        machine = make_machine(choices.stop, think, once=choices.rule is not None)
        text = TextStream(self._loaded.tokenizer.detokenizer, machine, in_reasoning=prompt.in_reasoning)
        running = Running(request_id, request, prompt, choices, text, received_at, reuse, guess=guess)
        if choices.rule is None:
            self._join(running)
            return
        compiled = self._compiler.compile(choices.rule)
        if compiled.done():
            self._join(running, compiled.result())
        else:
            self._compiling[request_id] = running, compiled

    def _join(self, running: Running, compiled: Compiled | None = None) -> None:
        choices, prompt = running.choices, running.prompt
        sampling = replace(choices.sampling, guess=running.guess)
        if compiled is not None:
            thought = self._loaded.tokenizer.think_end if prompt.in_reasoning else None
            running.constraint = Constraint(compiled, eos=self._eos, thought=thought)
            sampling = replace(sampling, constraint=running.constraint)
        lane, most = choices.lane, choices.max_tokens
        if not lane.rotate:
            most = min(most, self._loaded.context_length - len(prompt.tokens))
        most = self._generator.fit(lane, len(prompt.tokens), most, asked=choices.asked_tokens)
        processors = make_logits_processors(choices.logit_bias)
        urgent = running.request.priority != "batch"
        uid = self._generator.add(
            prompt.tokens, most, sampling, processors, self._stops, running.reuse, key=lane, urgent=urgent
        )
        self._running[uid] = running
        self._uids[running.id] = uid

    def cancel(self, request_id: int) -> Outcome:
        """End a request now, with the text it has. One that has ended already, or never was, changes nothing."""
        outcome = Outcome()
        uid = self._uids.get(request_id)
        if request_id in self._compiling:
            running, _ = self._compiling.pop(request_id)
            outcome.ended.append((request_id, self._result(running, "cancelled")))
        elif uid is not None:
            try:
                self._keep(self._running[uid], *self._generator.drop(uid))
            except Exception as error:
                return self._fail_all(error, outcome)
            self._end(uid, "cancelled", outcome)
        return outcome

    def allow(self, kv_bytes: int) -> None:
        """Have the KV caches of all requests, and the prefixes that are kept, hold no more than this; 0 is no bound.
        What is running goes on."""
        self._generator.allow(kv_bytes)
        if self.cache is not None:
            self.cache.tree.budget_bytes = min(self._cache_bytes, kv_bytes) if kv_bytes else self._cache_bytes

    def count(self, request: CountTokens) -> int:
        """Raises RpcError."""
        try:
            return self._prompts.count(text=request.text, messages=request.messages)
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
        if self.guesses.draft is not None:
            self.guesses.draft.closed = True
        self.guesses.draft = Draft(
            name, draft, vocabulary=self._loaded.vocabulary, pace=self.guesses.pace, step=self._limits["prefill_step"]
        )

    # --- steps

    def step(self) -> Outcome:
        """One decode step for all, and one prefill step for those whose prompts are still being read.

        Raises:
            EngineLost: no further step can work; every request in flight is lost with the process.
        """
        outcome = Outcome()
        if self._compiling and not self._join_compiled(outcome):
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

    def _join_compiled(self, outcome: Outcome) -> bool:
        """Requests whose rule is compiled by now join the batch. Returns whether there is a batch."""
        if not self._running:
            wait([compiled for _, compiled in self._compiling.values()], COMPILING_S, "FIRST_COMPLETED")
        for request_id, (running, compiled) in list(self._compiling.items()):
            if compiled.done():
                del self._compiling[request_id]
                try:
                    self._join(running, compiled.result())
                except Exception as error:
                    outcome.ended.append((request_id, _typed(error)))
        return bool(self._running)

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
                outcome.pieces.append((running.id, text, reasoning))
        stopped = running.text.stopped or (running.constraint is not None and running.constraint.finished)
        if response.finish_reason is not None:
            self._keep(running, response.prompt_cache, response.all_tokens)
            self._end(response.uid, "stop" if stopped else response.finish_reason, outcome)
        elif stopped:
            self._keep(running, *self._generator.drop(response.uid))
            self._end(response.uid, "stop", outcome)

    def _end(self, uid: int, reason: str, outcome: Outcome) -> None:
        """Say how a request ended. It has left the batch already."""
        running = self._running.pop(uid)
        self._uids.pop(running.id, None)
        try:
            text, reasoning = running.text.finish()
            if (text or reasoning) and running.request.stream:
                outcome.pieces.append((running.id, text, reasoning))
            outcome.ended.append((running.id, self._result(running, reason)))
        except Exception as error:
            outcome.ended.append((running.id, _typed(error)))

    def _result(self, running: Running, reason: str) -> Generated:
        text = "".join(running.text.text)
        invented = None
        rewritten = running.request.kind == "process" and running.constraint is None  # a rule has words of its own
        if self._guard is not None and self._loaded.faithful and rewritten:
            invented = list(self._guard(running.prompt.source, text)) or None
        structured = None
        if running.constraint is not None and reason == "stop" and not running.text.stopped:
            structured = running.constraint.value(text)
        now = time.perf_counter()
        start, first = running.received_at, running.first_at
        return Generated(
            text=text,
            finish_reason=reason,
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
            alone=running.choices.lane.alone,
            speculation=running.guess.report() if running.guess is not None else None,
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
        self._uids.pop(running.id, None)
        if running.choices.rule is not None:
            self._compiler.forget(running.choices.rule)
        outcome.ended.append((running.id, _typed(error)))
        if in_batch:
            self._generator.drop(uid)

    def _fail_all(self, error: Exception, outcome: Outcome) -> Outcome:
        """The shared step raised: nobody's state in that lane can be trusted. End them all, and start a clean batch."""
        self._failed_steps += 1
        _check_alive(error)
        if self._failed_steps > MAX_FAILED_STEPS:
            raise EngineLost(f"{type(error).__name__}: {error}") from error
        for uid in self._generator.fail():
            running = self._running.pop(uid, None)
            if running is not None:
                self._uids.pop(running.id, None)
                outcome.ended.append((running.id, _typed(error)))
        if self.cache is not None:
            self.cache.forget_pending()
        self.guesses.forget()
        mx.clear_cache()
        return outcome

    def warm_up(self) -> None:
        """Compile what the first request would otherwise wait for. Raises what the model raises."""
        sampling = Sampling(temperature=0.7, top_p=0.8, repetition=1.15)
        room = self._loaded.context_length
        prompt = [min(1, self._loaded.vocabulary - 1)] * max(1, min(8, room - 2))
        rows = self._generator.plain  # whatever memory there is for requests
        started = time.perf_counter()
        for choice in (sampling, Sampling()):
            rows.add(prompt, 2, choice, [], StopSequences())
            while rows.active or rows.waiting:
                rows.next()
            if time.perf_counter() - started > 1.0:  # a large model on a slow device: the rest can wait
                return


def _check_alive(error: Exception) -> None:
    """Raises EngineLost where an error says that the device is gone."""
    message = str(error)
    if any(sign.lower() in message.lower() for sign in _FATAL):
        raise EngineLost(f"{type(error).__name__}: {message}") from error


def _typed(error: Exception) -> RpcError:
    if isinstance(error, RpcError):
        return error
    return InternalError(f"the engine failed: {type(error).__name__}: {error}")
