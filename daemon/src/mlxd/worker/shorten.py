"""`context_policy: drop_oldest`: a conversation that is too long loses its oldest messages, whole ones only.

What stays is the system's messages, the last user turn with the last that came after it, and of the rest as much as
fits, from some user turn on. Where all that came before the last user turn is not enough, what followed on it goes,
too, oldest first. The results of tools stay with the calls that they belong to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlxd_client.errors import ContextExceeded

from .prompt import Prompt, PromptBuilder, Tools

Messages = list[dict[str, Any]]


def shortened(
    builder: PromptBuilder,
    kind: str,
    messages: Messages,
    *,
    thinking: bool,
    cut: bool,
    room: int,
    tools: Tools | None = None,
) -> Prompt:
    """The prompt of as many of the latest messages as leave `room` tokens, or of the fewest if they leave at least one.

    Prompts are made of few, then of more messages, so that this takes no longer than the context is long.

    Raises: what PromptBuilder.build raises; ContextExceeded where even the fewest do not fit, with their numbers.
    """

    def build(kept: Messages, *, cut: bool = False) -> Prompt:
        prompt = builder.build(kind, kept, thinking=thinking, cut=cut, tools=tools)
        return replace(prompt, dropped=len(messages) - len(kept)) if len(kept) < len(messages) else prompt

    def fits(kept: Messages) -> bool:
        try:
            return len(build(kept).tokens) + room <= builder.context_length
        except ContextExceeded:
            return False

    try:
        whole = build(messages, cut=cut)
        if len(whole.tokens) + room <= builder.context_length:
            return whole
    except ContextExceeded:
        whole = None
    starts = beginnings(messages)
    if not starts:
        return whole or build(messages)
    return build(_kept(messages, starts[_longest(starts, lambda start: fits(_kept(messages, start)))]), cut=cut)


def _longest(starts: list[int], fits: Callable[[int], bool]) -> int:
    """The first of `starts` that fits, where all after one that fits do; the last where none does."""
    good, step = len(starts) - 1, 1
    if not fits(starts[good]):
        return good
    bad = -1
    while good > 0:
        tried = max(0, good - step)
        if not fits(starts[tried]):
            bad = tried
            break
        good, step = tried, step * 2
    while good - bad > 1:
        middle = (bad + good) // 2
        good, bad = (middle, bad) if fits(starts[middle]) else (good, middle)
    return good


def beginnings(messages: Messages) -> list[int]:
    """After which messages a shorter conversation may begin, besides with the system's: indices, in order. One beyond
    the last user turn means that this turn stays, too."""
    head = _head(messages)
    users = [at for at in range(head, len(messages)) if messages[at]["role"] == "user"]
    if not users:
        return []
    answers = [at for at in range(users[-1] + 1, len(messages)) if messages[at]["role"] == "assistant"]
    bound = _bound(messages)
    return [at for at in (*users, *answers[1:]) if at > head and not bound[at]]


def _kept(messages: Messages, start: int) -> Messages:
    head = _head(messages)
    last = max(at for at in range(head, len(messages)) if messages[at]["role"] == "user")
    return [*messages[:head], *(messages[last : last + 1] if start > last else ()), *messages[start:]]


def _head(messages: Messages) -> int:
    """How many of the system's messages come first."""
    return next((at for at, turn in enumerate(messages) if turn["role"] != "system"), len(messages))


def _bound(messages: Messages) -> list[bool]:
    """For each message, whether a tool's result at or after it belongs to a call before it."""
    called: dict[Any, int] = {}
    latest = None
    edges = [0] * (len(messages) + 1)
    for at, turn in enumerate(messages):
        for call in turn.get("tool_calls") or ():
            latest = at
            if isinstance(call, dict) and isinstance(call.get("id"), str):
                called[call["id"]] = at
        if turn["role"] == "tool":
            caller = called.get(turn.get("tool_call_id"), latest)
            if caller is not None:
                edges[caller + 1] += 1
                edges[at + 1] -= 1
    return [depth > 0 for depth in itertools.accumulate(edges[:-1])]
