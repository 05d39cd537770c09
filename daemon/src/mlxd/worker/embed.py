"""Vectors for texts: their tokens, in batches of like length, through the model; a bounded part between two steps.

Rows of a batch are padded at their end. A causal model's states do not depend on what follows, so that the padding
changes nothing. A text that is longer than a step allows goes alone, in parts, on a cache as a prompt does.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxd_client.errors import ContextExceeded, InvalidParams, ModelInvalid, QueueFull, RpcError, Unsupported

from ..childwire import Embedded, EmbedTexts
from .load import LoadedModel
from .pooling import inner_of
from .prompt import PROBE_CHARACTERS

__all__ = ["Embedder", "hidden_states"]

# How long one step may take, as far as the last one tells, in seconds: with nobody else, and while answers decode,
# whose next tokens wait for it.
ALONE_S, BESIDE_S = 0.5, 0.05
# How many tokens are computed the first time, and at least.
FIRST_TOKENS, LEAST_TOKENS = 64, 8
MAX_JOBS = 256
# Text is cut off at first after so many characters for each token that there is room for.
_CUT_CHARACTERS = 8
# How many tokens a cut through a text may change at its end.
_CUT_TOKENS = 8

Ended = list[tuple[int, Embedded | RpcError]]


@dataclass(slots=True)
class _Job:
    """One request. `rows` are the tokens of its texts as far as they are known, `order` those that are to be computed,
    by length."""

    id: int
    request: EmbedTexts
    dimensions: int
    normalize: bool
    vectors: list[bytes]
    rows: list[list[int]] = field(default_factory=list)
    order: deque[int] = field(default_factory=deque)
    left: int = 0


@dataclass(slots=True)
class _Long:
    """A text that goes through the model in parts."""

    job: _Job
    index: int
    cache: list[Any]
    done: int = 0
    pooled: mx.array | None = None  # [width], as far as it goes


class Embedder:
    """The requests for vectors of one model.

    Args:
        loaded: the model.
        most_tokens: how many tokens one forward pass may have, padding included.
        longest_token: see PromptBuilder.
    """

    def __init__(self, loaded: LoadedModel, most_tokens: int, longest_token: int) -> None:
        self._loaded = loaded
        self._most_tokens = most_tokens
        self._rate = FIRST_TOKENS / ALONE_S  # tokens per second
        self._jobs: deque[_Job] = deque()
        self._long: _Long | None = None
        self._current: list[tuple[_Job, int]] = []  # what the step that is under way computes
        self._inner: Any = None
        self._width = 0
        self._around: tuple[list[int], list[int]] = ([], [])
        self._longest_token = longest_token

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def submit(self, request_id: int, request: EmbedTexts) -> None:
        """Take a request; its texts are read and computed by the steps that follow.

        Raises:
            Unsupported: this model gives no vectors.
            InvalidParams: more numbers than the model has, or than one answer can hold.
            QueueFull: too many such requests are under way.
        """
        self._prepare()
        dimensions = self._width if request.dimensions is None else request.dimensions
        if dimensions > self._width:
            told = f"dimensions is {dimensions}; this model's vectors have {self._width}"
            raise InvalidParams(told, field="dimensions", limit=self._width)
        count, most = len(request.input), request.most_values // dimensions
        if count > most:
            told = f"{count} vectors of {dimensions} numbers are too many for one answer: {most} are not"
            raise InvalidParams(told, field="input", limit=most, dimensions=dimensions)
        if len(self._jobs) >= MAX_JOBS:
            raise QueueFull(f"{MAX_JOBS} requests for vectors are under way", limit=MAX_JOBS)
        normalize = self._loaded.pooling.normalize if request.normalize is None else request.normalize
        self._jobs.append(_Job(request_id, request, dimensions, normalize, [b""] * count, left=count))

    def cancel(self, request_id: int) -> bool:
        """Forget a request. Returns whether there was one."""
        found = next((job for job in self._jobs if job.id == request_id), None)
        if found is not None:
            self._drop(found)
        return found is not None

    def _drop(self, job: _Job) -> None:
        self._jobs.remove(job)
        if self._long is not None and self._long.job is job:
            self._long = None

    def _prepare(self) -> None:
        """Once: find out how to get hidden states, and what belongs around a text."""
        if self._loaded.pooling.refusal is not None:
            raise Unsupported(f"this model gives no vectors: {self._loaded.pooling.refusal}", option="embed")
        if self._inner is None:
            self._inner, self._width = hidden_states(self._loaded.model)
            self._around = _around(self._loaded.tokenizer)

    # --- steps

    def step(self, limit_s: float) -> Ended:
        """Read texts, or compute, for about `limit_s` seconds. Raises what the device raises; see `fail`."""
        ended: Ended = []
        until = time.perf_counter() + limit_s / 2
        self._jobs.rotate(-1)
        for job in list(self._jobs):
            if len(job.rows) < len(job.request.input):
                self._read(job, until, ended)
                if time.perf_counter() >= until:
                    break
        most = int(max(min(self._rate * limit_s, self._most_tokens), LEAST_TOKENS))
        began = time.perf_counter()
        if self._long is not None:
            tokens = self._go_on(self._long, most, ended)
        else:
            batch = self._batch(most)
            if not batch:
                return ended
            if len(batch[0][0].rows[batch[0][1]]) > most:
                self._long = _Long(*batch[0], make_prompt_cache(self._loaded.model))
                tokens = self._go_on(self._long, most, ended)
            else:
                tokens = self._compute(batch, ended)
        self._current = []
        self._rate = tokens / max(time.perf_counter() - began, 1e-6)
        return ended

    def fail(self, error: RpcError) -> Ended:
        """The last step raised: what it worked on ends with this error."""
        jobs = {id(job): job for job, _ in self._current}.values()
        failed: Ended = [(job.id, error) for job in jobs if job in self._jobs]
        for job in jobs:
            if job in self._jobs:
                self._drop(job)
        self._long = None
        return failed

    def _batch(self, most: int) -> list[tuple[_Job, int]]:
        """The next texts, from all requests in turn, as many as make `most` tokens; or one that is longer."""
        ready = [job for job in self._jobs if job.order]
        batch: list[tuple[_Job, int]] = []
        longest, more = 0, True
        while more:
            more = False
            for job in ready:
                length = len(job.rows[job.order[0]]) if job.order else most + 1
                if (len(batch) + 1) * max(longest, length) <= most:
                    batch.append((job, job.order.popleft()))
                    longest, more = max(longest, length), True
        if not batch and ready:
            batch.append((ready[0], ready[0].order.popleft()))
        return batch

    def _compute(self, batch: list[tuple[_Job, int]], ended: Ended) -> int:
        """One forward pass. Returns how many tokens it had."""
        self._current = batch
        rows = [job.rows[index] for job, index in batch]
        longest = max(map(len, rows))
        tokens = mx.array([row + [0] * (longest - len(row)) for row in rows])
        states = self._inner(tokens, cache=None)
        mode = self._loaded.pooling.mode
        lengths = mx.array([len(row) for row in rows])
        if mode == "cls":
            pooled = states[:, 0]
        elif mode == "mean":
            real = (mx.arange(longest)[None] < lengths[:, None])[:, :, None]
            pooled = mx.where(real, states.astype(mx.float32), 0.0).sum(axis=1) / lengths[:, None]
        else:
            pooled = states[mx.arange(len(rows)), lengths - 1]
        self._place(batch, pooled, ended)
        return tokens.size

    def _go_on(self, long: _Long, most: int, ended: Ended) -> int:
        """The next part of a long text. Returns how many tokens that was."""
        self._current = [(long.job, long.index)]
        row = long.job.rows[long.index]
        part = row[long.done : long.done + most]
        states = self._inner(mx.array([part]), cache=long.cache)
        mode = self._loaded.pooling.mode
        if mode == "mean":
            summed = states[0].astype(mx.float32).sum(axis=0) / len(row)
            long.pooled = summed if long.pooled is None else long.pooled + summed
        elif mode == "lasttoken" or long.pooled is None:
            long.pooled = states[0, -1 if mode == "lasttoken" else 0]
        mx.eval(long.pooled, [cache.state for cache in long.cache])
        long.done += len(part)
        if long.done == len(row):
            assert long.pooled is not None
            self._long = None
            self._place(self._current, long.pooled[None], ended)
        return len(part)

    def _place(self, batch: list[tuple[_Job, int]], pooled: mx.array, ended: Ended) -> None:
        """Each row's vector goes where it belongs; requests that have all of theirs end."""
        values = np.array(pooled.astype(mx.float32))
        for (job, index), row in zip(batch, values, strict=True):
            vector = row[: job.dimensions]
            if job.normalize:
                vector = vector / max(float(np.linalg.norm(vector.astype(np.float64))), 1e-12)
            job.vectors[index] = vector.astype("<f4").tobytes()
            job.left -= 1
            broken = not np.isfinite(vector).all()
            if job in self._jobs and (broken or job.left == 0):
                self._drop(job)
                ended.append((job.id, _not_finite(index) if broken else _whole(job)))

    # --- texts

    def _read(self, job: _Job, until: float, ended: Ended) -> None:
        """Turn texts into tokens until it is time for something else; once all are, they are put in order."""
        texts = job.request.input
        while len(job.rows) < len(texts):
            try:
                job.rows.append(self._tokens(texts[len(job.rows)], len(job.rows), job.request.truncate))
            except Exception as error:
                self._drop(job)
                index = len(job.rows)
                typed = error if isinstance(error, RpcError) else InvalidParams(f"input[{index}]: {error}")
                ended.append((job.id, typed))
                return
            if time.perf_counter() >= until:
                break
        if len(job.rows) == len(texts):
            job.order.extend(sorted(range(len(texts)), key=lambda index: len(job.rows[index])))

    def _tokens(self, text: str, index: int, truncate: bool) -> list[int]:
        before, after = self._around
        limit = self._loaded.context_length - len(before) - len(after)
        text = self._shorter(text, limit) if truncate else text
        least = len(text) // self._longest_token
        if least <= limit and len(text) > PROBE_CHARACTERS:
            least = len(self._encode(text[:PROBE_CHARACTERS])) - _CUT_TOKENS
        tokens = self._encode(text) if least <= limit else []
        if truncate:
            tokens = tokens[:limit]
        count = max(least, len(tokens))
        if count > limit:
            count += len(before) + len(after)
            told = f"input[{index}] has {count} tokens or more; the model's context holds {self._loaded.context_length}"
            raise ContextExceeded(
                told, prompt_tokens=count, context_length=self._loaded.context_length, field=f"input[{index}]"
            )
        tokens = [*before, *tokens, *after]
        if not tokens:
            raise InvalidParams(f"input[{index}] is empty", field=f"input[{index}]")
        if max(tokens) >= self._loaded.vocabulary:
            raise Unsupported(f"input[{index}] holds a token that the model has no embedding for", option="input")
        return tokens

    def _shorter(self, text: str, limit: int) -> str:
        """The beginning of a text, as much as has `limit` tokens, and somewhat more."""
        size = max(limit, 1) * _CUT_CHARACTERS
        while size < len(text) and len(self._encode(text[:size])) < limit + _CUT_TOKENS:
            size *= 4
        return text[:size]

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._loaded.tokenizer.encode(text, add_special_tokens=False)
        return tokens


def hidden_states(model: Any) -> tuple[Any, int]:
    """What gives a model's last hidden states, called as inner(tokens, cache=…), and how wide they are.

    Raises:
        Unsupported: nothing in it does.
    """
    inner = inner_of(model)
    refused = Unsupported("this model gives no vectors: its hidden states cannot be had", option="embed")
    if inner is None:
        raise refused
    embeddings = getattr(inner, "embed_tokens", None) or getattr(inner, "wte", None)
    try:
        states = inner(mx.array([[0, 0]]), cache=None)
        width = states.shape[-1]
        expected = width if embeddings is None else embeddings(mx.array([[0]])).shape[-1]
        mx.eval(states)
    except Exception as error:
        raise refused from error
    if states.shape != (1, 2, width) or width != expected or not mx.issubdtype(states.dtype, mx.floating):
        raise refused
    return inner, width


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text."""
    plain: list[int] = tokenizer.encode("x", add_special_tokens=False)
    full: list[int] = tokenizer.encode("x", add_special_tokens=True)
    for at in range(len(full) - len(plain) + 1):
        if full[at : at + len(plain)] == plain:
            return full[:at], full[at + len(plain) :]
    return [], []


def _whole(job: _Job) -> Embedded:
    return Embedded(vectors=b"".join(job.vectors), dimensions=job.dimensions, prompt_tokens=sum(map(len, job.rows)))


def _not_finite(index: int) -> RpcError:
    return ModelInvalid(f"the model computed values that are no finite numbers for input[{index}]")
