"""One model and all that is asked of it: what arrives, what decodes, what is kept. Each step goes on with all of it."""

from __future__ import annotations

import mlx.core as mx

from mlxd_client.errors import Cancelled, Unsupported

from ..childwire import (
    Adapt,
    Adapted,
    CountTokens,
    DecodeTokens,
    EmbedTexts,
    EncodeText,
    Generate,
    Generated,
    Packed,
    Prewarm,
    PromptCacheStats,
)
from .adapters import Adapters
from .arrivals import Arrivals
from .batch import MOST_PREFILLS
from .decoding import Decoding
from .diskcache import DiskCache
from .draft import Draft, check_pair
from .embed import ALONE_S, BESIDE_S, Embedder
from .faults import check_alive, own, typed
from .givingback import give_back, relax
from .grammar import Compiler
from .keeping import Keeping
from .kvcache import PromptCache, RowView
from .lanes import Lanes
from .load import LoadedModel
from .prompt import PromptBuilder
from .requests import Requests
from .results import Guard, Results
from .running import Outcome
from .sights import Sights
from .speculation import Guesses
from .tokens import decode, encode
from .warming import warm_up

# Of the prompt cache's budget, for what was seen in images: a share of it, and bytes.
SIGHT_SHARE, MOST_SIGHT_BYTES = 8, 256 * 1024 * 1024


class Engine:
    """One model, which decodes any number of requests in one batch.

    Args:
        loaded: the model.
        max_batch: how many decode together; further ones wait their turn.
        prefill_step: how many tokens of a prompt are read between two decode steps.
        prefill_joins: how many prompts begin to be read in one step.
        cache_bytes: bounds the prefixes that are kept and what the batch holds, together; 0 keeps nothing.
        kv_bytes: what the KV caches of all requests may hold; 0 is no bound. See `allow`.
        kv_bits: what requests have that say nothing; 0 leaves their KV caches as they are.
        guard: see Results.
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
        guard: Guard | None = None,
    ) -> None:
        self._loaded = loaded
        self._prefill_step = prefill_step
        sight_bytes = min(cache_bytes // SIGHT_SHARE, MOST_SIGHT_BYTES) if loaded.vision is not None else 0
        cache = PromptCache(loaded.model, cache_bytes - sight_bytes)
        self.cache = cache if cache_bytes > 0 and cache.usable else None
        self._generator = Lanes(
            loaded.model,
            **_batching(loaded, max_batch),
            prefill_step=prefill_step,
            prefill_joins=prefill_joins,
            prompt_cache=self.cache,
            window=loaded.context_length,
            kv_bytes=kv_bytes,
        )
        self._keeping = Keeping(self.cache, self._generator, cache_bytes - sight_bytes)
        self.allow(kv_bytes)
        self.guesses = Guesses(loaded.model)
        self.adapters = Adapters(loaded.model)
        sees = loaded.vision is not None
        self._prompts = PromptBuilder(loaded.tokenizer, loaded.context_length, loaded.vocabulary, parts=sees)
        self._embedder = Embedder(loaded, MOST_PREFILLS * prefill_step, self._prompts.longest_token)
        defaults = loaded.defaults | ({"kv_bits": kv_bits} if kv_bits else {})
        self._requests = Requests(loaded, self._prompts, self.guesses, self._generator, self.cache, defaults)
        self._compiler = Compiler(loaded.tokenizer, loaded.vocabulary, self._requests.eos)
        self._results = Results(loaded, guard)
        self._decoding = Decoding(
            self._generator, self._requests, self._keeping, self._results, self._compiler, self.guesses
        )
        self._running = self._decoding.running
        self._arrivals = Arrivals(
            self._requests,
            adapters=self.adapters,
            keeping=self._keeping,
            compiler=self._compiler,
            sights=self._make_sights(sight_bytes),
            lanes=self._generator,
            decoding=self._decoding,
        )

    def _make_sights(self, budget_bytes: int) -> Sights | None:
        loaded = self._loaded
        if loaded.vision is None:
            return None
        loaded.vision.features.budget_bytes = budget_bytes
        return Sights(loaded.model, loaded.vision, self.cache, step=self._prefill_step)

    # --- requests

    @property
    def busy(self) -> bool:
        """There is something left to do for `step`."""
        return self._generating or self._embedder.busy

    @property
    def _generating(self) -> bool:
        return bool(self._running) or self._arrivals.busy or self._keeping.pending

    @property
    def active(self) -> int:
        """Requests that hold a place in the batch, the ones whose prompt is being read included."""
        return self._generator.active

    @property
    def waiting(self) -> int:
        return self._generator.waiting + self._arrivals.waiting

    @property
    def made_tokens(self) -> int:
        """What the requests in the batch have generated so far."""
        return sum(running.tokens for running in self._running.values())

    @property
    def exact(self) -> bool:
        """A request is here whose answer may depend on nothing else, not even on how many threads compute it."""
        return self._arrivals.exact or self._decoding.exact

    def submit(self, request_id: int, request: Generate) -> None:
        """Take a request; it begins at the next step, or once all that it needs is there.

        Raises:
            RpcError: it cannot be honoured. Nothing of it remains.
            EngineLost: see `step`.
        """
        with own():
            self._arrivals.submit(request_id, request)

    def prewarm(self, request_id: int, request: Prewarm) -> None:
        """Have the beginning of prompts with a system turn kept; ends as a request without text.

        Raises:
            RpcError: it cannot be kept.
            EngineLost: see `step`.
        """
        with own():
            self._arrivals.prewarm(request_id, request)

    def cancel(self, request_id: int) -> Outcome:
        """End a request now, with the text it has. One that has ended already, or never was, changes nothing."""
        outcome = Outcome()
        if self._decoding.cancel(request_id, outcome):
            return outcome
        if self._embedder.cancel(request_id):
            outcome.ended.append((request_id, Cancelled("the request was cancelled")))
            return outcome
        try:
            running = self._arrivals.drop(request_id)
        except KeyError:
            return outcome
        result = Generated(text="", finish_reason="cancelled", prompt_tokens=0, completion_tokens=0)
        outcome.ended.append((request_id, result if running is None else self._results.result(running, "cancelled")))
        return outcome

    # --- what is no generation

    def embed(self, request_id: int, request: EmbedTexts) -> None:
        """Take texts to make vectors of; the steps that follow do, a part at a time. Raises RpcError."""
        with own():
            self._embedder.submit(request_id, request)

    def count(self, request: CountTokens) -> int:
        """Raises RpcError."""
        return self._requests.count(request)

    def encode(self, request: EncodeText) -> Packed:
        """Raises RpcError."""
        try:
            return encode(self._loaded.tokenizer, request)
        except Exception as error:
            raise typed(error) from error

    def decode(self, request: DecodeTokens) -> str:
        """Raises RpcError."""
        try:
            return decode(self._loaded.tokenizer, self._loaded.vocabulary, request)
        except Exception as error:
            raise typed(error) from error

    def adapt(self, request_id: int, request: Adapt) -> Outcome:
        """Read an adapter and keep it; None lets go of the one that was kept. Raises as Adapters.want does."""
        if request.adapter is not None:
            self._arrivals.keep_adapter(request_id, request.adapter)
            return Outcome()
        self.adapters.kept = None
        return Outcome(ended=[(request_id, Adapted(adapters_bytes=self.adapters.nbytes))])

    def attach(self, name: str, draft: LoadedModel) -> None:
        """Have a draft model guess from now on, in place of the one before. What is running goes on without any.

        Raises:
            InvalidParams, Unsupported: it cannot guess for this model. The one before stays.
        """
        if not self.guesses.usable:
            raise Unsupported("nothing can be guessed for this model: it takes no draft model", option="draft_model")
        check_pair(self._loaded, draft)
        made = Draft(name, draft, vocabulary=self._loaded.vocabulary, pace=self.guesses.pace, step=self._prefill_step)
        made.warm_up()
        if self.guesses.draft is not None:
            self.guesses.draft.closed = True
        self.guesses.draft = made

    # --- memory

    def allow(self, kv_bytes: int) -> None:
        """Have the KV caches of all requests, and the prefixes that are kept, hold no more than this; 0 is no bound.
        What is running goes on."""
        self._generator.allow(kv_bytes)
        self._keeping.allow(kv_bytes)

    def trim(self, keep: float) -> None:
        """Give back memory that no request needs; of the prefixes that are kept, this share may stay. 1: there is again
        memory."""
        if keep >= 1:
            relax()
            return
        self._keeping.trim(keep)
        give_back()

    def warm_up(self) -> RowView | None:
        """See warming.py."""
        return warm_up(self._loaded, self._prompts, self._generator.plain)  # whatever memory there is for requests

    @property
    def disk(self) -> DiskCache | None:
        """Where prefixes go beyond this process; None where they do not."""
        return self._keeping.disk

    @disk.setter
    def disk(self, disk: DiskCache | None) -> None:
        self._keeping.disk = disk

    def cache_stats(self) -> PromptCacheStats | None:
        """What became of the prompt cache; None where nothing is kept."""
        return self._keeping.stats()

    def clear_cache(self) -> tuple[int, int]:
        """Keep nothing of what is kept now. Returns the bytes that this freed in memory and on disk. Raises OSError."""
        return self._keeping.clear()

    # --- steps

    def step(self) -> Outcome:
        """One decode step for all, one prefill step for those whose prompts are still being read, and a part of the
        vectors that are asked for.

        Raises:
            EngineLost: no further step can work; every request in flight is lost with the process.
        """
        outcome = Outcome()
        if self._embedder.busy:
            self._embed(outcome)
            if not self._generating:
                return outcome
        if self._arrivals.busy:
            self._arrivals.step(outcome, patient=not self._embedder.busy)
            if not self._running and self._arrivals.imminent:
                return outcome
        self._decoding.step(outcome)
        return outcome

    def _embed(self, outcome: Outcome) -> None:
        try:
            with mx.stream(self._generator.plain.stream):
                outcome.ended += self._embedder.step(BESIDE_S if self._running else ALONE_S)
        except Exception as error:
            check_alive(error)
            outcome.ended += self._embedder.fail(typed(error))


def _batching(loaded: LoadedModel, wished: int) -> dict[str, int]:
    """How many requests decode together, and have their prompts read together, as far as the architecture can."""
    most_prefills = {"most_prefills": 1} if loaded.batching == "decode" else {}
    return {"max_batch": 1 if loaded.batching == "alone" else wished, **most_prefills}
