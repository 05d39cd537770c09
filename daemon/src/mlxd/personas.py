"""Personas and prompt templates: what the settings say for requests that name them. Texts are put into texts; no code
runs in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from mlxd_client.errors import InvalidParams
from mlxd_client.types import (
    MAX_FRAME_BYTES,
    UNSET,
    ChatParams,
    GenerateParams,
    LoadParams,
    Message,
    Options,
    Persona,
    ProcessParams,
    Template,
)

__all__ = ["beginning", "check_persona", "check_template", "completed"]

P = TypeVar("P", bound=GenerateParams)

TEXT = "text"  # where a request's prompt goes
_PLACES = re.compile(r"\{\{|\}\}|\{([a-z][a-z0-9_]*)\}|[{}]")
# Of options that exclude each other: a request that has one of them wants none of the persona's.
_TOGETHER = (frozenset({"schema", "grammar"}), frozenset({"thinking", "thinking_budget"}))


# --- for the settings ---------------------------------------------------------------------------------------------


def check_persona(persona: Persona) -> None:
    """Raises ValueError, with a sentence, for options that could never be answered together."""
    if persona.schema is not UNSET and persona.grammar is not UNSET:
        raise ValueError("it has both a schema and a grammar: an answer follows one of them")
    if persona.thinking is False and persona.thinking_budget is not UNSET:
        raise ValueError("a thinking_budget turns thinking on, and `thinking` is false")


def check_template(template: Template) -> None:
    """Raises ValueError, with a sentence, unless each placeholder is declared and used."""
    declared = {TEXT, *template.placeholders}
    used = set()
    for place in _PLACES.finditer(template.prompt):
        if place[0] in ("{", "}"):
            near = template.prompt[place.start() : place.start() + 20]
            raise ValueError(f"a brace stands alone at {near!r}: write {{{{ and }}}} for braces")
        if place[1] is not None:
            if place[1] not in declared:
                raise ValueError(f"{{{place[1]}}} is not among its placeholders{_near(place[1], declared)}")
            used.add(place[1])
    for name in sorted(declared - used):
        raise ValueError(f"its prompt has no {{{name}}}")
    for name in template.defaults:
        if name not in declared - {TEXT}:
            raise ValueError(f"it has a default for {name!r}, which is not among its placeholders")


# --- for requests -------------------------------------------------------------------------------------------------


def completed(params: P, personas: Mapping[str, Persona], templates: Mapping[str, Template]) -> P:
    """The request, with what its persona and its template say. Raises InvalidParams for names that are none."""
    changes: dict[str, Any] = {}
    if params.persona is not UNSET:
        changes |= _of_persona(params, _named(params.persona, personas, "persona")) | {"persona": UNSET}
    if isinstance(params, ProcessParams):
        if params.template is not UNSET:
            changes["prompt"] = _filled(params, _named(params.template, templates, "template"))
            changes |= {"template": UNSET, "values": UNSET}
        elif params.values is not UNSET:
            raise InvalidParams("values are for a template's placeholders, and no template is named", field="values")
    return msgspec.structs.replace(params, **changes) if changes else params


def beginning(params: LoadParams, personas: Mapping[str, Persona]) -> tuple[str | None, str | None]:
    """The system turn whose prompts are to begin at once, and the adapter that its persona brings, if any.

    Raises InvalidParams for a persona that is none, or has no system turn where the request has none either.
    """
    if params.persona is UNSET:
        return None if params.system is UNSET else params.system, None
    persona = _named(params.persona, personas, "persona")
    system = persona.system if params.system is UNSET else params.system
    if system is UNSET:
        raise InvalidParams(f"the persona {params.persona!r} has no system turn to begin with", field="persona")
    return system, None if persona.adapter is UNSET else persona.adapter


def _named(name: str, known: Mapping[str, Any], kind: str) -> Any:
    if name not in known:
        raise InvalidParams(f"there is no {kind} {name!r}{_near(name, known)}", field=kind)
    return known[name]


def _near(name: str, known: Mapping[str, object] | set[str]) -> str:
    import difflib  # costs milliseconds, and only a mistake needs it

    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def _of_persona(params: GenerateParams, persona: Persona) -> dict[str, Any]:
    """What holds of a persona: all that the request says nothing of."""
    own = {name for name in Options.__struct_fields__ if getattr(params, name) is not UNSET}
    for together in _TOGETHER:
        if own & together:
            own |= together
    given = {name: getattr(persona, name) for name in Options.__struct_fields__ if name not in own}
    made = {name: value for name, value in given.items() if value is not UNSET}
    if persona.system is UNSET:
        return made
    if isinstance(params, ProcessParams) and params.system is UNSET:
        made["system"] = persona.system
    elif isinstance(params, ChatParams) and all(turn.role != "system" for turn in params.messages):
        made["messages"] = [Message(role="system", content=persona.system), *params.messages]
    return made


def _filled(params: ProcessParams, template: Template) -> str:
    """A template's prompt with what a request brings, which is not looked through for placeholders itself."""
    values = {} if params.values is UNSET else params.values
    known = set(template.placeholders) - {TEXT}
    for name in values:
        if name not in known:
            told = "goes in `prompt`" if name == TEXT else f"is no placeholder of the template{_near(name, known)}"
            raise InvalidParams(f"values: {name!r} {told}", field="values")
    missing = sorted(known - values.keys() - template.defaults.keys())
    if missing:
        raise InvalidParams(f"the template needs a value for {missing[0]!r}", field="values", missing=missing)
    texts = template.defaults | values | {TEXT: params.prompt}
    sizes = {name: len(text.encode("utf-8", "surrogatepass")) for name, text in texts.items()}
    size = len(template.prompt) + sum(sizes[place[1]] for place in _PLACES.finditer(template.prompt) if place[1])
    if size > MAX_FRAME_BYTES:
        told = f"the template makes a prompt of {size} bytes: the limit is {MAX_FRAME_BYTES}"
        raise InvalidParams(told, field="prompt", limit_bytes=MAX_FRAME_BYTES)
    return _PLACES.sub(lambda place: texts[place[1]] if place[1] else place[0][0], template.prompt)
