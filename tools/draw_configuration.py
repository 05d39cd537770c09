"""Writes the settings' part of docs/configuration.md from the struct that holds them, in daemon/src/mlxd/settings.

python3 tools/dev.py draw
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import msgspec

from mlxd.settings import Settings, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
OPENING, CLOSING = "<!-- generated: settings -->\n", "<!-- end -->"
# What a default is that depends on the machine.
RULES = {
    "home": "the platform's per-user place: `~/Library/Application Support/mlxd` on macOS, `$XDG_DATA_HOME/mlxd` or "
    "`~/.local/share/mlxd` on Linux",
    "socket": "`mlxd.sock` in `home`; where that path is too long for a socket, `/tmp/mlxd-UID/HASH.sock`",
    "memory_budget_bytes": f"{table.MEMORY_SHARE:.0%} of this machine's memory, or of what a container may have",
    "memory_reserve_bytes": f"{table.RESERVE_SHARE:.0%} of that memory, but no more than 2 GiB",
    "prompt_cache_bytes": f"{table.PROMPT_CACHE_SHARE:.0%} of the default of `memory_budget_bytes`",
    "worker_command": "this Python with `-m mlxd.worker`",
    "fetcher_command": "this Python with `-m mlxd.fetch`",
}
WHEN = {
    "now": "at once",
    "connection": "for new connections",
    "load": "for models that are loaded from then on",
    "download": "for downloads that begin from then on",
    "restart": "when the daemon starts next",
}
_WORDS = {"str": "text", "int": "whole number", "float": "number", "bool": "`true` or `false`"}
_BOUNDS = ((("ge", "≥ {}"), ("gt", "> {}")), (("le", "≤ {}"), ("lt", "< {}")))


def page(text: str) -> str:
    """The page with the part between its marks made anew."""
    before, opened, rest = text.partition(OPENING)
    _, closed, after = rest.partition(CLOSING)
    if not (opened and closed):
        raise ValueError(f"{PAGE} has no place for the settings")
    return f"{before}{OPENING}\n{part()}\n{CLOSING}{after}"


def part() -> str:
    """A section for each setting: what it does, then type, default, variable, and when a change takes effect."""
    told = descriptions()
    sections = []
    for field in msgspec.structs.fields(Settings):
        names, text = told[field.name]
        facts = [type_words(field.type), f"default: {default_words(field)}", f"`MLXD_{field.name.upper()}`"]
        facts.append(f"a change takes effect {WHEN[table.APPLIES[field.name]]}")
        together = f"{', '.join(f'`{name}`' for name in names)}: " if names[1:] else ""
        text = together + text if together else text[0].upper() + text[1:]
        sections.append(f"### `{field.name}`\n\n{text}\n\n{' · '.join(facts)}\n")
    return "\n".join(sections)


def descriptions() -> dict[str, tuple[list[str], str]]:
    """What the struct's docstring says of each setting: the names that share the sentence, and it as one paragraph."""
    entries: dict[str, tuple[list[str], str]] = {}
    _, _, attributes = inspect.cleandoc(Settings.__doc__ or "").partition("Attributes:\n")
    for entry in re.findall(r"^    (\w.*(?:\n      +.*)*)", attributes, re.MULTILINE):
        heads, _, text = " ".join(entry.split()).partition(": ")
        names = heads.split(", ")
        for name in names:
            entries[name] = (names, text)
    return entries


def type_words(kind: Any) -> str:
    """A type and its bounds in words."""
    return _words(msgspec.inspect.type_info(kind))


def _words(info: Any) -> str:
    name = type(info).__name__
    if name == "DictType":
        key, value = _words(info.key_type), _words(info.value_type)
        return f"table: {key} → {value}"
    if name == "ListType":
        return f"list of {_words(info.item_type)}s"
    if name == "LiteralType":
        return _one_of([f"`{value}`" for value in info.values])
    if name == "StructType":
        return "a table of its own"
    if name == "AnyType":
        return "any value"
    if name == "StrType":
        return _text_words(info)
    bounds = [
        words.format("2^53" if getattr(info, key) == 2**53 else f"{getattr(info, key):,}")
        for choices in _BOUNDS for key, words in choices
        if getattr(info, key, None) is not None
    ]  # fmt: skip
    return ", ".join([_WORDS.get(name.removesuffix("Type").lower(), name), *bounds])


def _text_words(info: Any) -> str:
    if info.pattern is None:
        return _WORDS["str"]
    ways = info.pattern.strip("^$()").split("|")
    return _one_of(["an absolute path" if way.startswith("/") else f"`{way}`" for way in ways])


def _one_of(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if words[1:] else words[0]


def default_words(field: msgspec.structs.FieldInfo) -> str:
    if field.name in RULES:
        return RULES[field.name]
    if field.default_factory is not msgspec.NODEFAULT and field.default_factory not in (dict, list):
        raise ValueError(f"the default of {field.name} is computed: say the rule in {Path(__file__).name}")
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value in ({}, []):
        return "empty"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = f"{value:,.15g}" if isinstance(value, float) else f"{value:,}"
        return number + _size(field.name, value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _size(name: str, value: float) -> str:
    """A size as people say it, where it is a round one."""
    if "_bytes" not in name:
        return ""
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if value >= size and value % size == 0:
            return f" ({value / size:g} {unit}{'/s' if name.endswith('_s') else ''})"
    return ""


def files() -> dict[Path, bytes]:
    return {PAGE: page(PAGE.read_text("utf-8")).encode()}
