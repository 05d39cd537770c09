"""One change of a TOML text that keeps its comments. As a process, it reads what is to be done and answers in JSON.

tomlkit is imported where it is used: a daemon that only starts this has none of it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

__all__ = ["answer"]


def answer(order: dict[str, Any]) -> dict[str, str]:
    """What becomes of an order.

    Args:
        order: the `text`; `values`, each a name, a key of its table or None, and a value; what is to be `unset`, each a
            name and a key or None; and how large the text may become, `most_bytes`.

    Returns: the new `text`, which says what was asked and all that it said before; or an `error`, a sentence.
    """
    import tomllib

    from tomlkit.exceptions import TOMLKitError

    try:
        return _edited(order)
    except (tomllib.TOMLDecodeError, TOMLKitError, RecursionError, ValueError, TypeError) as error:
        return {"error": str(error)}


def _edited(order: dict[str, Any]) -> dict[str, str]:
    import tomllib

    import tomlkit

    wanted, document = tomllib.loads(order["text"]), tomlkit.parse(order["text"])
    for target in (wanted, document):
        for name, key in order["unset"]:
            _take_out(target, name, key)
        for name, key, value in order["values"]:
            _put_in(target, name, key, value)
    made = document.as_string()
    if len(made.encode()) > order["most_bytes"]:
        return {"error": f"it would be larger than {order['most_bytes']} bytes"}
    if tomllib.loads(made) != wanted:
        return {"error": "it is written in a way that cannot be changed here: edit it by hand"}
    return {"text": made}


def _take_out(target: Any, name: str, key: str | None) -> None:
    if key is None:
        _remove(target, name)
    elif isinstance(table := target.get(name), dict):
        _remove(table, key)
        if not table:
            _remove(target, name)


def _remove(table: Any, key: str) -> None:
    """Take an entry out of a table, or of tomlkit's likeness of one. To that, comments above the next table belong to
    the one before, and would go with it."""
    from tomlkit.container import Container
    from tomlkit.items import Whitespace

    if key not in table:
        return
    container = table if isinstance(table, Container) else getattr(table, "value", None)
    if not isinstance(container, Container):
        del table[key]
        return
    places = [at for at, (known, _) in enumerate(container.body) if known is not None and known.key == key]
    tail = _tail(container.body[places[-1]][1])
    table.remove(key)
    if "#" in tail:
        container.body[places[-1]] = (None, Whitespace(tail))


def _tail(item: Any) -> str:
    """What stands behind the last entry of a table."""
    from tomlkit.items import AbstractTable, InlineTable

    tail = ""
    if isinstance(item, AbstractTable) and not isinstance(item, InlineTable):
        for key, one in reversed(item.value.body):
            if key is not None:
                return _tail(one) + tail
            tail = one.as_string() + tail
    return tail


def _put_in(target: Any, name: str, key: str | None, value: Any) -> None:
    if key is None:
        target[name] = value
    elif isinstance(table := target.get(name), dict):
        table[key] = value
    else:
        target[name] = {key: value}


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
