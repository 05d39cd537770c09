"""The requests in the batch: each grows by a token a step, and ends in exactly one result or error."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.generate import StopSequences
from mlx_lm.sample_utils import make_logits_processors

from mlxd_client.errors import ModelInvalid, Unsupported

from .answers import Answers
from .calls import news
from .faults import EngineLost, check_alive, typed
from .grammar import Compiled, Compiler
from .keeping import Keeping
from .lanes import PLAIN, Lanes
from .requests import Requests
from .results import Results
from .rows import NOT_FINITE, RowFailure
from .running import PREWARM, Outcome, Running
from .speculation import Guesses
from .waits import Reuse

# After this many failed steps in a row, no further batch is tried.
MAX_FAILED_STEPS = 2


class Decoding:
    """The requests of one model that have joined its batch.

    Args:
        lanes: the batch.
        requests: says how the tokens of each are chosen.
        keeping: gets what they computed.
        results: makes what they end in.
        compiler: forgets the rules of those that fail.
        guesses: who guesses for them.

    Attributes:
        running: by the batch's uid; several of a request that has several answers.
        uids: by request id, of the first answer.
        several: by request id, of those that asked for several answers.
    """

    def __init__(
        self,
        lanes: Lanes,
        requests: Requests,
        keeping: Keeping,
        results: Results,
        compiler: Compiler,
        guesses: Guesses,
    ) -> None:
        self.running: dict[int, Running] = {}
        self.uids: dict[int, int] = {}
        self.several: dict[int, Answers] = {}
        self._lanes = lanes
        self._requests = requests
        self._keeping = keeping
        self._results = results
        self._compiler = compiler
        self._guesses = guesses
        self._eos = requests.eos
        self._stops = StopSequences([(token,) for token in self._eos])
        self._failed_steps = 0

    @property
    def exact(self) -> bool:
        """One of them is computed where its answer may depend on nothing else."""
        return any(running.choices.lane.deterministic for running in self.running.values())

    def prepare(self, running: Running, compiled: Compiled | None) -> Callable[[Reuse | None], int]:
        """Settle how a request decodes, with a row for each of its answers. Returns what has it join the batch, and
        gives its uid. Raises RpcError: there will never be room for it."""
        choices, prompt = running.choices, running.prompt
        rows = self._requests.rows(running)
        samplings = [self._requests.sampling(row, compiled) for row in rows]
        lane, length = choices.lane, len(prompt.tokens)
        shared = len(rows) if lane == PLAIN else 1
        most = self._lanes.fit(lane, length, choices.max_tokens, asked=choices.asked_tokens, rows=shared)
        processors = make_logits_processors(choices.logit_bias)
        urgent = running.request.priority != "batch"

        def join(reuse: Reuse | None) -> int:
            uids = self._lanes.add_all(
                prompt.tokens, most, samplings, processors, self._stops, reuse, key=lane, urgent=urgent
            )
            self.running.update(zip(uids, rows, strict=True))
            self.uids[running.id] = uids[0]
            if len(rows) > 1:
                self.several[running.id] = Answers(dict(enumerate(uids)))
            return uids[0]

        return join

    def cancel(self, request_id: int, outcome: Outcome) -> bool:
        """End a request with the text it has. Returns whether it is one of these."""
        if request_id not in self.uids:
            return False
        several = self.several.get(request_id)
        try:
            for uid in [self.uids[request_id]] if several is None else list(several.uids.values()):
                if uid in self.running:  # one answer that cannot be told takes the others with it
                    self._drop(uid, "cancelled", outcome)
        except Exception as error:
            self._fail_all(error, outcome)
        return True

    # --- steps

    def step(self, outcome: Outcome) -> None:
        """One decode step for all, and one prefill step for those whose prompts are still being read.

        Raises:
            EngineLost: no further step can work.
        """
        for uid, error in self._lanes.refuse():
            self._fail(uid, error, outcome, in_batch=False)
        try:
            self._lanes.settle()
            prompts, responses = self._lanes.next()
        except Exception as error:
            self._fail_all(error, outcome)
            return
        self._failed_steps = 0
        try:
            self._take(prompts, responses, outcome)
        except Exception as error:  # a row could not be looked at, or taken out
            self._fail_all(error, outcome)

    def _take(self, prompts: list[Any], responses: list[Any], outcome: Outcome) -> None:
        """What a step made goes to its requests. Whatever a request brought that raises costs that request only."""
        now = time.perf_counter()
        for progress in prompts:
            running = self.running.get(progress.uid)
            if running is not None and progress.end_of_prompt:
                running.prompt_at = now
            elif running is not None and progress.end_of_segment:
                self._keeping.keep_cut(progress.uid, running)
        while responses:
            for response in responses:
                running = self.running.get(response.uid)
                if running is None:
                    continue
                try:
                    self._advance(running, response, now, outcome)
                except Exception as error:
                    self._fail(response.uid, error, outcome, in_batch=response.finish_reason is None)
            responses = self._lanes.rest()

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
            self._keeping.keep_prompt(response, running)
        if token not in self._eos:
            if note is not None:
                running.logprobs.append(self._results.report(running.choices.sampling.logprobs, token, note))
            text, reasoning = running.text.add(token)
            if (text or reasoning) and running.request.stream:
                outcome.add(running, text, reasoning)
            if running.text.calls:
                self._take_calls(running, outcome)
        stopped = running.text.stopped or (running.constraint is not None and running.constraint.finished)
        if response.finish_reason is not None:
            self._keeping.keep(running, response.prompt_cache, response.all_tokens)
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

    def _drop(self, uid: int, reason: str, outcome: Outcome) -> None:
        """End a row that is in the batch, or on its way there."""
        self._keeping.keep(self.running[uid], *self._lanes.drop(uid))
        self._end(uid, reason, outcome)

    def _end(self, uid: int, reason: str, outcome: Outcome) -> None:
        """Say how an answer ended. It has left the batch already."""
        running = self.running.pop(uid)
        several = self.several.get(running.id)
        if several is None:
            self.uids.pop(running.id, None)
        try:
            text, reasoning = running.text.finish()
            if (text or reasoning) and running.request.stream:
                outcome.add(running, text, reasoning)
            if running.request.kind == PREWARM and reason != "cancelled" and not self._keeping.is_warm(running):
                raise Unsupported("the prompt cache has no room for this system turn", option="system")
            if running.text.calls:
                self._take_calls(running, outcome, reason)
            result = self._results.result(running, reason)
            if several is not None:
                joined = several.end(running.number, result)
                if joined is None:
                    return
                self._forget(running.id)
                result = joined
            outcome.ended.append((running.id, result))
        except Exception as error:
            outcome.ended.append((running.id, typed(error)))
            self._forget(running.id)

    def _forget(self, request_id: int) -> None:
        """A request has its last word: what is left of its answers goes."""
        self.uids.pop(request_id, None)
        several = self.several.pop(request_id, None)
        for uid in several.uids.values() if several is not None else ():
            if self.running.pop(uid, None) is not None:
                self._lanes.drop(uid)

    # --- failures

    def _fail(self, uid: int, error: Exception, outcome: Outcome, *, in_batch: bool) -> None:
        running = self.running.pop(uid, None)
        if running is None:
            return
        if running.choices.rule is not None:
            self._compiler.forget(running.choices.rule)
        outcome.ended.append((running.id, typed(error)))
        if in_batch:
            self._lanes.drop(uid)
        self._forget(running.id)

    def _fail_all(self, error: Exception, outcome: Outcome) -> None:
        """The shared step raised: nobody's state in that lane can be trusted. End them all, and start a clean batch."""
        self._failed_steps += 1
        check_alive(error)
        if self._failed_steps > MAX_FAILED_STEPS:
            raise EngineLost(f"{type(error).__name__}: {error}") from error
        for uid in self._lanes.fail():
            running = self.running.pop(uid, None)
            if running is not None:
                outcome.ended.append((running.id, typed(error)))
                self._forget(running.id)
        self._keeping.forget_pending()
        self._guesses.forget()
        mx.clear_cache()
