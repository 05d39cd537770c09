"""A smaller model that guesses what the large one will say, on a KV cache of its own for the one row it guesses for."""

from __future__ import annotations

import time
from array import array
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxd_client.errors import InvalidParams, RpcError

from .load import LoadedModel
from .lookup import Odds
from .pace import Pace
from .prefix import common
from .sampling import Plan, Sampling

__all__ = ["Draft", "check_pair"]

# How likely a guess is believed to come true before any was made.
HOPE = 0.7
# Reading the prompt begins once the answer has taken this share of what that will take: short answers go without.
STAKE = 0.25
# Texts that tokenizers must cut alike.
_SAMPLES = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?\n\n  Indented: x = {'a': [1, 2.5]}\t// ok",
    "Größe, naïve, 你好世界, привет, 😀 — “quoted” … end.",
)


class Draft:
    """One draft model.

    Args:
        name: its id.
        loaded: as loaded by itself.
        vocabulary: how many tokens the large model has.
        pace: what the large model's passes take.
        step: how many tokens of a prompt are read at a time.

    Attributes:
        pace: what checking takes, by tokens, with the guessing before it.
        closed: it is not used any more.
    """

    def __init__(self, name: str, loaded: LoadedModel, *, vocabulary: int, pace: Pace, step: int) -> None:
        self.name = name
        self.pace = Pace(pace)
        self.closed = False
        self._model = loaded.model
        self._own = loaded.vocabulary
        self._vocabulary = vocabulary
        self._context = loaded.context_length
        self._step = step
        self._odds = Odds(start=(HOPE,))
        self._caches = make_prompt_cache(loaded.model)
        self._tokens: list[int] = []  # what the caches hold
        self._row: list[int] | None = None  # the tokens of the row that it guesses for, the very list
        self._guessed: mx.array | None = None
        self._token_s = 0.0  # what reading one token of a prompt takes; 0 where that is not known yet

    @property
    def nbytes(self) -> int:
        """What its KV caches hold."""
        return sum(cache.nbytes for cache in self._caches)

    def choose(self, most: int, *, always: bool) -> int:
        """How many tokens to guess; 0 for none."""
        return self.pace.choose(self._odds.chances * most, always=always)

    def ready(self, tokens: list[int], said: int, *, always: bool) -> bool:
        """Have the tokens read that the caches lack, a step at a time. Returns whether that is done.

        Args:
            tokens: all of a row so far but the newest. Another row than last time begins with what both share.
            said: how many of them the row has said since it could have been guessed for.
        """
        if self.closed or len(tokens) + 1 >= self._context:
            return False
        if tokens is not self._row:
            self._take_over(tokens)
        if not can_trim_prompt_cache(self._caches):
            return False
        lacking = len(tokens) - len(self._tokens)
        self._take_back(max(-lacking, 0))  # guesses that came true, and that the row was made to say anew
        if lacking > self._step:
            if not always and said * (self.pace.one or 0.0) < STAKE * lacking * self._token_s:
                return False
            self._read(tokens[len(self._tokens) : len(self._tokens) + self._step])
            return False
        return True

    def _take_over(self, tokens: list[int]) -> None:
        self._row = tokens
        same = common(array("I", self._tokens), array("I", tokens), 0)
        if can_trim_prompt_cache(self._caches):
            self._take_back(len(self._tokens) - same)
        else:  # a window that has slid cannot be taken back
            self._caches, self._tokens = make_prompt_cache(self._model), []

    def _read(self, tokens: list[int]) -> None:
        began = time.perf_counter()
        self._forward(mx.array(tokens))
        mx.eval([cache.state for cache in self._caches])
        self._tokens += tokens
        took = (time.perf_counter() - began) / len(tokens)
        self._token_s = 0.5 * (self._token_s + took) if self._token_s else took

    def propose(
        self, tokens: list[int], newest: int, count: int, row: Sampling, processors: tuple[Any, ...]
    ) -> list[int] | mx.array:
        """The newest token and `count` guesses: what the row itself would choose, were this model its own. With the
        row's own draws it comes to the same choice more often than by being likeliest."""
        lacking = [*tokens[len(self._tokens) :], newest]
        plan = Plan([replace(row, logprobs=-1, guess=None)], [tokens], mx.array([newest]))
        fed, newest_array = mx.array(lacking, dtype=mx.uint32), mx.array([newest], dtype=mx.uint32)
        made = [newest_array]
        for _ in range(count):
            logits = self._forward(fed)
            for processor in processors:
                logits = processor(None, logits)
            logits = plan.penalise(made[-1], logits)
            if row.temperature > 0:
                logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            fed = plan.sample(logits).astype(mx.uint32)
            mx.async_eval(fed)  # type: ignore[no-untyped-call]
            made.append(fed)
        self._tokens += lacking
        line = mx.concatenate(made)
        self._guessed = line
        # Penalties look at values: these have to be there before the checking can be described.
        return line.tolist() if row.penalised else line  # type: ignore[return-value]

    def _forward(self, tokens: mx.array) -> mx.array:
        """Logits of the last token, [1, vocabulary of the large model]."""
        if self._own < self._vocabulary:
            tokens = mx.minimum(tokens, self._own - 1)
        logits = self._model(tokens[None], cache=self._caches)[:, -1, : self._vocabulary]
        lacking = self._vocabulary - logits.shape[-1]
        return logits if lacking <= 0 else mx.pad(logits, [(0, 0), (0, lacking)], constant_values=-1e9)

    def checked(self, guessed: int, accepted: int) -> None:
        """What came of the last guesses: those that did not come true are taken back."""
        for number in range(min(accepted + 1, guessed)):
            self._odds.saw(0, number < accepted)
        assert self._guessed is not None
        values: Any = self._guessed.tolist()
        # The caches hold all guesses but the last one.
        self._tokens += values[1:-1]
        self._take_back(max(guessed - 1 - accepted, 0))

    def _take_back(self, count: int) -> None:
        trim_prompt_cache(self._caches, count)
        if count:
            del self._tokens[-count:]

    def warm_up(self) -> None:
        """Compile what the first guess would otherwise wait for. Raises InvalidParams where it does not run."""
        try:
            for length in (min(8, self._context), 1):
                mx.eval(self._forward(mx.zeros((length,), dtype=mx.uint32)))
        except Exception as error:
            raise _refusal(f"it does not run: {type(error).__name__}: {error}") from error
        self.forget()

    def forget(self) -> None:
        """Keep nothing of what was read."""
        self._row, self._tokens = None, []
        self._caches = make_prompt_cache(self._model)


def check_pair(target: LoadedModel, draft: LoadedModel) -> None:
    """Raises InvalidParams where the draft model can guess nothing for the other one."""
    if not {type(cache) for cache in make_prompt_cache(draft.model)} <= {KVCache, RotatingKVCache}:
        raise _refusal("what it computes cannot be taken back token by token")
    try:
        check_tokenizers(target.tokenizer, draft.tokenizer)
    except RpcError:
        raise
    except Exception as error:  # tokenizers come from anywhere, and raise nearly anything
        raise _refusal(f"its tokenizer fails: {type(error).__name__}: {error}") from error


def check_tokenizers(target: TokenizerWrapper, draft: TokenizerWrapper) -> None:
    """Same text, same tokens. One may know more added tokens than the other, and embeddings may be padded
    differently: within a family, they are."""
    ours, theirs = target.get_vocab(), draft.get_vocab()
    differing = next((text for text, token in ours.items() if theirs.get(text, token) != token), None)
    if differing is not None:
        told = f"{differing!r} is token {ours[differing]} of one and {theirs[differing]} of the other"
        raise _refusal(f"its tokenizer is another: {told}")
    added = set(target.get_added_vocab()) | set(draft.get_added_vocab())
    lacking = [text for text in ours.keys() ^ theirs.keys() if text not in added]
    if lacking:
        raise _refusal(f"its tokenizer is another: {len(lacking)} tokens are in one only, as {min(lacking)!r}")
    for text in _SAMPLES:
        if target.encode(text, add_special_tokens=False) != draft.encode(text, add_special_tokens=False):
            raise _refusal("its tokenizer is another: the same text has other tokens")


def _refusal(why: str) -> InvalidParams:
    return InvalidParams(f"that draft model cannot guess for this model: {why}", field="draft_model")
