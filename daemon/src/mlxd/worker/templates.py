"""Chat templates are programs from a model's folder: what they may build is bounded, as no time limit can.

transformers compiles them in jinja's sandbox, which bounds `range` and nothing else: one `'x' * 10**10` is a single
call that cannot be interrupted, and takes all memory there is. Here every operation that makes a text or a list longer
than what it is made of is measured before it is done. The sandbox is put in place of transformers' own when this is
imported; every rendering happens in `rendering`.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from mlxd_client.errors import ModelInvalid

from .timelimit import time_limit

__all__ = ["MAX_BUILT", "MAX_TEXT", "rendering"]

# Characters of one text, or items of one list, that a template may build; a frame's worth of messages is far below.
MAX_TEXT = 64 * 1024 * 1024
# The same, of all that one rendering builds, thrown away or not.
MAX_BUILT = 1024 * 1024 * 1024
# A value that is written out may hold so many others, and is looked through as far.
MAX_VALUES = 1_000_000
# Numbers may have so many bits.
MAX_BITS = 4096
_WIDTH = re.compile(r"\d{8,}")
_built = 0


@contextlib.contextmanager
def rendering(limit_s: float = 5.0) -> Iterator[None]:
    """For as long as one text is rendered. Raises ModelInvalid where that takes too long, or builds too much."""
    global _built
    _built = 0
    with time_limit(limit_s):
        yield


def _allow(size: int) -> None:
    """So many characters, or items, are built next."""
    global _built
    _built += size
    if size > MAX_TEXT or _built > MAX_BUILT:
        raise ModelInvalid(f"the model's chat template builds a text of more than {MAX_TEXT} characters")


def _weight(value: Any, times: int = 1) -> int:
    """About how long a value is when it is written out. Raises ModelInvalid where that is too long."""
    total, values, seen = 0, [value], 0
    while values:
        one = values.pop()
        seen += 1
        if seen > MAX_VALUES:
            _allow(MAX_TEXT + 1)
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, dict):
            values += [*one.keys(), *one.values()]
            total += 4 * len(one)
        elif isinstance(one, (list, tuple, set)):
            values += one
            total += 2 * len(one)
        else:
            total += 8
        if total * times > MAX_TEXT:
            _allow(total * times)
    return total


def _refuse_numbers(values: Iterable[Any]) -> None:
    """Widths, counts and the like are small."""
    if any(isinstance(value, int) and abs(value) > MAX_TEXT for value in values):
        _allow(MAX_TEXT + 1)


def _check_format(pattern: str, mark: str, values: Any) -> None:
    flat = values if isinstance(values, (list, tuple)) else (values,)
    _refuse_numbers([*flat, *(part for one in flat if isinstance(one, dict) for part in one.values())])
    if _WIDTH.search(pattern):
        _allow(MAX_TEXT + 1)
    places = pattern.count(mark)
    widths = sum(map(int, re.findall(r"\d+", pattern)))
    stars = sum(abs(value) for value in values if isinstance(value, int)) if isinstance(values, (list, tuple)) else 0
    _allow(len(pattern) + widths + stars * ("*" in pattern or mark == "{") + places * _weight(values, places))


def _size(value: str | bytes | list[Any] | tuple[Any, ...]) -> int:
    """An item of a list takes as much as some characters."""
    return len(value) * (8 if isinstance(value, (list, tuple)) else 1)


def _check_operator(operator: str, left: Any, right: Any) -> None:
    sized = (str, bytes, list, tuple)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (right if operator == "**" else 1) + (right.bit_length() if operator == "*" else 0)
        if operator in ("*", "**") and bits > MAX_BITS:
            _allow(MAX_TEXT + 1)
    elif operator == "*" and isinstance(right, int) and isinstance(left, sized):
        _allow(_size(left) * max(right, 0))
    elif operator == "*" and isinstance(left, int) and isinstance(right, sized):
        _allow(_size(right) * max(left, 0))
    elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        _allow(_size(left) + _size(right))
    elif operator == "%" and isinstance(left, (str, bytes)):
        _check_format(str(left), "%", right)


def _check_replace(text: str, old: str, new: str) -> None:
    _allow(len(text) + text.count(old) * len(new))


def _check_method(text: str, name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """A method of a text that may give a longer one. Returns its arguments, an iterator's items taken out of it."""
    _refuse_numbers(values)
    if name == "replace" and len(values) >= 2:
        _check_replace(text, str(values[0]), str(values[1]))
    elif name == "join" and values:
        items = list(values[0])
        _allow(_weight(items) + len(text) * len(items))
        return (items, *values[1:])
    elif name in ("ljust", "rjust", "center", "zfill", "expandtabs"):
        width = next((value for value in values if isinstance(value, int)), 8)
        _allow(len(text) + max(width, 0) * (text.count("\t") if name == "expandtabs" else 1))
    elif name in ("translate", "encode"):
        _allow(MAX_TEXT + 1 if name == "translate" else len(text))
    return values


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at what it is given first."""

    @functools.wraps(function)
    def guarded(*values: Any, **named: Any) -> Any:
        given = [*values, *named.values()]
        _refuse_numbers(given)
        texts = [value for value in given if isinstance(value, str)]
        if name == "replace" and len(texts) >= 3:
            _check_replace(*texts[:3])
        elif name == "format" and texts:
            _check_format(texts[0], "%", tuple(given[1:]))
        elif name in ("indent", "wordwrap", "urlize") and texts:
            more = sum(value for value in given[1:] if isinstance(value, int)) + sum(map(len, texts[1:])) + 8
            _allow(len(texts[0]) + (texts[0].count("\n") + 1 if name == "indent" else len(texts[0])) * max(more, 0))
        elif name == "join":
            parts = next((value for value in values if isinstance(value, (list, tuple))), ())
            _allow(_weight(parts) + len(parts) * sum(map(len, texts)))
        elif name in ("tojson", "pprint", "string", "urlencode", "xmlattr"):
            indent = max((value for value in given[1:] if isinstance(value, int)), default=0)
            _allow(_weight(given) * (1 + max(indent, 0)))
        return function(*values, **named)

    return guarded


class _Filters(dict[str, Callable[..., Any]]):
    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _guarded(name, function))


class _Code(CodeGenerator):
    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        self.write("environment.join_texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of chat templates; see the top of this file."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    code_generator_class = _Code

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        given, self.filters = self.filters, _Filters()
        for name, function in given.items():
            self.filters[name] = function

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *values: Any, **named: Any) -> Any:
        own = getattr(function, "__self__", None)
        if isinstance(own, str):
            values = _check_method(own, getattr(function, "__name__", ""), values)
        else:
            _refuse_numbers([*values, *named.values()])
        return super().call(context, function, *values, **named)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        safe = super().wrap_str_format(value)
        if safe is None:
            return None
        pattern = value.__self__

        def checked(*values: Any, **named: Any) -> str:
            _check_format(pattern, "{", (*values, *named.values()))
            return safe(*values, **named)

        return checked

    def concat(self, parts: Iterable[str]) -> str:
        made = []
        total = 0
        for part in parts:
            made.append(part)
            total += len(part)
            if total > MAX_TEXT:
                break
        _allow(total)
        return "".join(made)

    def join_texts(self, parts: Iterable[Any]) -> str:
        """What `~` is compiled to."""
        return self.concat([part if isinstance(part, str) else str(part) for part in parts])


chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
