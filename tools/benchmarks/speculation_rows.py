"""Guessing ahead against not doing so, and against mlx_lm's own.

`copy`: a model that was made to say its prompt again, with a tenth of its words replaced, at the cost of all its layers
(see speculation_models.py): what lookups are worth on a long edit. `clean-ups`: real ones, by the built-in model, which
is so small that there is little to gain: it must not be slower. `draft`: a pair that mostly agrees; the same pair
through mlx_lm, with the number of guesses at a time that serves it best. Greedy; the answers are compared, too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from mlxd_client import Client

from . import speculation_models
from .effort import Scale
from .generation_rows import GREEDY, Messages, alternate
from .processes import Daemon, Reference
from .table import Row, paired

CLEANUP = "mlxd/cleanup"
SENTENCES = (
    "um so i think we should uh meet on monday at 3 pm if that works for you",
    "hey maria can you send me the the report by friday please",
    "so basically the meeting got moved to tuesday and john wont be there",
    "please remind me to call the dentist tomorrow morning at nine thirty",
    "she said that she would be there at five but i think shes going to be late",
    "what do you think about the new design i mean the colors are nice but the font is too small",
)


def speculation_rows(wanted: set[str], daemon: Daemon, temp: Path, scale: Scale) -> Iterator[Row]:
    with daemon.client() as client:
        if "speculation/copy" in wanted:
            yield copy_row(client, speculation_models.make("copier", temp), scale)
        if "speculation/clean-ups" in wanted:
            yield cleanup_row(client, scale)
        if "speculation/draft" in wanted:
            yield from draft_rows(client, temp, speculation_models.make("target", temp), scale)


def rate(client: Client, model: Path | str, messages: Messages, tokens: int, **options: Any) -> tuple[float, str]:
    """Tokens per second after the first one, and the answer."""
    made = client.chat(messages, model=str(model), max_tokens=tokens, cache_prompt=False, **GREEDY, **options)
    return (made.usage.completion_tokens - 1) / made.timings.decode_s, made.text


def both(client: Client, model: Path | str, messages: Messages, tokens: int, rounds: int) -> list[tuple[float, float]]:
    """Rates with and without, in pairs; the answers have to be the same."""
    sides = alternate(
        rounds,
        lambda: rate(client, model, messages, tokens),
        lambda: rate(client, model, messages, tokens, speculation="off"),
    )
    if any(ours[1] != theirs[1] for ours, theirs in sides):
        raise RuntimeError("guessing ahead changed an answer")
    return [(ours[0], theirs[0]) for ours, theirs in sides]


def copy_row(client: Client, model: Path, scale: Scale) -> Row:
    source, half = random.Random(0), speculation_models.SOURCE // 2
    client.load(str(model), keep_alive=-1)
    pairs = []
    for turn in range(1 + scale.guess_rounds):
        text = "".join(word(source) + " " for _ in range(half))
        messages = [{"role": "user", "content": text}]
        if turn == 0:
            check_copy(rate(client, model, messages, scale.guess_tokens)[1], text)
        pairs += both(client, model, messages, scale.guess_tokens, 1)
    client.unload(str(model))
    what = "edit of a text, 0.04 B: looked up; without"
    return paired("speculation/copy", what, pairs[1:], "tokens/s", (">=", 1.5))


def word(source: random.Random) -> str:
    """Three letters that are one token: a byte-pair encoding joins the first two first if they come first in the
    alphabet."""
    first, second = sorted(source.sample(ascii_lowercase, k=2))
    return first + second + source.choice(ascii_lowercase)


def check_copy(answer: str, text: str) -> None:
    """It is the edit that it should be: of the words most are the source's."""
    said, words = answer.split(), text.split()
    same = sum(one == other for one, other in zip(said, words, strict=False))
    if not 0.6 * len(said) < same < len(said) + (len(said) < 20):
        raise RuntimeError(f"the copier does not copy: {same} of {len(said)} words")


def cleanup_row(client: Client, scale: Scale) -> Row:
    client.load(CLEANUP, keep_alive=-1)
    pairs = []
    for turn in range(1 + scale.guess_rounds):
        for sentence in SENTENCES:
            made = both(client, CLEANUP, [{"role": "user", "content": sentence}], 150, 1)
            pairs += made if turn else []
    what = "clean-ups by the built-in model: guessing where that pays; without"
    return paired("speculation/clean-ups", what, pairs, "tokens/s", (">=", 0.95))


def draft_rows(client: Client, temp: Path, target: Path, scale: Scale) -> Iterator[Row]:
    draft, tokens = Path(f"{target}-draft"), scale.guess_tokens
    source = random.Random(1)
    words = " ".join("".join(source.choices(ascii_lowercase, k=3)) for _ in range(8))
    messages = [{"role": "user", "content": words}]
    with Reference(target, temp) as reference:

        def theirs(guesses: int) -> float:
            made = reference.ask("guess", messages=messages, tokens=tokens, draft=str(draft), guesses=guesses)
            return float((made["tokens"] - 1) / made["decode_s"])

        theirs(4)
        best = max((2, 4, 8), key=theirs)
        client.load(str(target), keep_alive=-1, draft_model=str(draft))
        both(client, target, messages, tokens, 1)
        plain = both(client, target, messages, tokens, scale.guess_rounds)
        pairs = alternate(scale.guess_rounds, lambda: rate(client, target, messages, tokens)[0], lambda: theirs(best))
        client.unload(str(target))
    what = f"draft model of 2 layers for 12, 0.05 B: ours; mlx_lm's with {best} guesses"
    yield paired("speculation/draft", what, pairs, "tokens/s", (">=", 0.95))
    yield paired("speculation/draft", "the same pair: with; without", plain, "tokens/s")
