"""What the first request of a model would otherwise wait for."""

from __future__ import annotations

import contextlib
import time

from mlx_lm.generate import StopSequences

from mlxd_client.errors import RpcError

from .batch import RowGenerator
from .kvcache import RowView
from .load import LoadedModel
from .prompt import PromptBuilder
from .sampling import Sampling, compile_draws

# A large model on a slow device takes longer for one way of choosing tokens; the other one can wait then.
ENOUGH_S = 1.0


def warm_up(loaded: LoadedModel, prompts: PromptBuilder, rows: RowGenerator) -> RowView | None:
    """Compile the template and the ways that most tokens are chosen. Returns what caches hold for a prompt.

    Raises what the model raises.
    """
    with contextlib.suppress(RpcError):  # whom it refuses, it tells
        prompts.build("chat", [{"role": "user", "content": "x"}], thinking=False)
    prompt = [min(1, loaded.vocabulary - 1)] * max(1, min(8, loaded.context_length - 2))
    usual = Sampling(temperature=0.7, top_p=0.8, repetition=1.15)
    compile_draws(usual, loaded.vocabulary)
    started = time.perf_counter()
    row = None
    for choice in (usual, Sampling()):
        rows.add(prompt, 2, choice, [], StopSequences())
        while rows.active or rows.waiting:
            for response in rows.next()[1]:
                row = response.prompt_cache or row
        if time.perf_counter() - started > ENOUGH_S:
            break
    return row
