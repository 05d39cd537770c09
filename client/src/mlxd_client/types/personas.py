"""Personas and prompt templates: what the settings say for requests that name them."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from .base import Name, Params, Result
from .generation import Options

Placeholder = Annotated[str, Meta(pattern="^[a-z][a-z0-9_]{0,63}$")]
Words = Annotated[str, Meta(max_length=1000)]
LongText = Annotated[str, Meta(min_length=1, max_length=100_000)]


class Persona(Options, kw_only=True):
    """A manner of answering, by name: a `system` turn, a `model`, and options, which hold for requests that name it
    where they say nothing of their own. `description` is for people who choose among them."""

    system: LongText | UnsetType = UNSET
    description: Words | UnsetType = UNSET


class Template(Params, kw_only=True):
    """A prompt by name. In `prompt`, `{text}` and the other `placeholders` stand for what a request brings, each as it
    is and once; `{{` and `}}` are braces. `defaults` are for placeholders that a request says nothing of."""

    prompt: LongText
    placeholders: Annotated[list[Placeholder], Meta(max_length=64)] = []
    defaults: Annotated[dict[Placeholder, Annotated[str, Meta(max_length=100_000)]], Meta(max_length=64)] = {}
    description: Words | UnsetType = UNSET


class PersonasResult(Result, kw_only=True):
    """All that the settings have, by name."""

    personas: dict[Name, Persona]
    templates: dict[Name, Template]
