"""What an answer must look like, compiled: a JSON Schema or a grammar becomes a matcher of llguidance's, or a refusal.

Compiling runs on a thread of its own, without Python's lock, so that others decode meanwhile. Its limits are
llguidance's, one on the size of the text, and a trial in a process of its own where those are not enough. What was
compiled is kept, and each request gets a copy.
"""

from __future__ import annotations

import copy
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from mlxd_client.errors import InternalError, InvalidParams, RpcError, Unsupported

from ..childwire import MAX_RULE_BYTES
from .trial import LIMITS, ends

# Compiling takes time in proportion to the square of an object's properties.
MAX_PROPERTIES = 1_000
# What is kept for later requests: this many, and this much text of theirs.
KEPT, KEPT_BYTES = 32, 2 * 1024 * 1024
# Compiled ones are tried on so many tokens: what ends nowhere shows there.
PROBE_TOKENS = 3

# No white space but one optional space after a comma or colon: an answer cannot run away in it.
_JSON: Any = {
    "item_separator": ", ?",
    "key_separator": ": ?",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
}
# Compiling is tried elsewhere first where several regular expressions may have to match at once, and where a text is
# long enough for chains of references that take more stack than there is. The trial has less of it.
SAFE_CHARACTERS = 8_192
STACK_BYTES = 64 * 1024 * 1024
_RISKY = {"schema": re.compile(r'"pattern'), "grammar": re.compile(r'[&~]|"pattern'), "tools": re.compile(r'"pattern')}
# What llguidance says where JSON Schema has a way to say something and it has none to enforce it.
_NOT_ENFORCED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r'Unimplemented keys: \["([^"]+)"'), ""),
    (re.compile(r"oneOf constraints are not supported"), "oneOf"),
    (re.compile(r"Unknown format"), "format"),
    (re.compile(r"look-around|backreferences"), "pattern"),
    (re.compile(r"Failed to generate regex for (?:float|integer|int) range"), "minimum"),
)


@dataclass(frozen=True, slots=True)
class Rule:
    """What was asked: `text` is a JSON Schema as JSON, or a grammar in llguidance's dialect of Lark; that of `tools`
    was made from the request's tools."""

    kind: Literal["schema", "grammar", "tools"]
    text: str


@dataclass(frozen=True, slots=True)
class Compiled:
    """`fresh` gives a matcher at the start of the answer. They share what their regular expressions have become so far,
    and its limit, which is why a rule that failed is to be forgotten."""

    rule: Rule
    tokenizer: LLTokenizer
    fresh: Callable[[], LLMatcher]


def read_rule(schema: Any, grammar: str | None) -> Rule | None:
    """What a request asks for under `schema` (an object, True for any JSON, or None) or `grammar`; None for nothing.

    Raises:
        InvalidParams: both, `false`, or more than can be compiled; details.field says which.
    """
    if schema is not None and grammar is not None:
        raise InvalidParams("give either schema or grammar: an answer follows one of them", field="grammar")
    if grammar is not None:
        return sized(Rule("grammar", grammar))
    if schema is None:
        return None
    if schema is False:
        raise InvalidParams("schema: no value fits the schema false", field="schema")
    # `x-guidance` would set llguidance's own options, which are not the caller's.
    plain = {} if schema is True else {name: value for name, value in schema.items() if name != "x-guidance"}
    rule = sized(Rule("schema", json.dumps(plain, ensure_ascii=False, separators=(",", ":"))))
    check_schema(plain, "schema")
    return rule


def check_schema(schema: dict[str, Any], field: str) -> None:
    """Raises InvalidParams for what would take too long to compile, or has no end."""
    _check_properties(schema, field)
    if _Ends(schema).endless(schema):
        raise InvalidParams(f"{field}: it has no end: every value that fits it holds another one", field=field)


def sized(rule: Rule) -> Rule:
    """The rule. Raises InvalidParams where it is too long."""
    size = len(rule.text.encode("utf-8", "surrogatepass"))
    if size > MAX_RULE_BYTES:
        told = f"{rule.kind}: {size} bytes are over the limit of {MAX_RULE_BYTES}"
        raise InvalidParams(told, field=rule.kind, limit_bytes=MAX_RULE_BYTES)
    return rule


def _check_properties(schema: Any, field: str) -> None:
    stack = [schema]
    while stack:
        top = stack.pop()
        if isinstance(top, dict):
            properties = top.get("properties")
            if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
                told = f"{field}: an object with {len(properties)} properties is over the limit of {MAX_PROPERTIES}"
                raise InvalidParams(told, field=field, keyword="properties")
            stack.extend(top.values())
        elif isinstance(top, list):
            stack.extend(top)


class _Ends:
    """Looks for a schema whose every value would be endless, as an object that must hold one of its own kind."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._path: set[int] = set()  # a value that ends never needs the same schema twice on the way down
        self._ending: set[int] = set()
        self._left = 20_000

    def endless(self, schema: Any) -> bool:
        self._left -= 1
        if not isinstance(schema, dict) or id(schema) in self._ending:
            return False
        if self._left < 0 or len(self._path) > 100:  # none that anyone wrote
            return False
        if id(schema) in self._path:
            return True
        self._path.add(id(schema))
        found = self._has_endless_part(schema)
        self._path.discard(id(schema))
        if not found:
            self._ending.add(id(schema))
        return found

    def _has_endless_part(self, schema: dict[str, Any]) -> bool:
        reference = schema.get("$ref")
        parts = [self._resolve(reference)] if isinstance(reference, str) else []
        parts += _list(schema.get("allOf"))
        if schema.get("type") == "object" and isinstance(properties := schema.get("properties"), dict):
            parts += [properties.get(name) for name in _list(schema.get("required")) if isinstance(name, str)]
        if schema.get("type") == "array" and isinstance(least := schema.get("minItems"), int) and least > 0:
            parts += _list(schema.get("prefixItems"))[:least] or [schema.get("items")]
        if any(self.endless(part) for part in parts):
            return True
        choices = [_list(schema[name]) for name in ("anyOf", "oneOf") if schema.get(name)]
        return any(all(self.endless(choice) for choice in several) for several in choices)

    def _resolve(self, reference: str) -> Any:
        found: Any = self._root
        for part in unquote(reference.removeprefix("#")).split("/")[1:] if reference.startswith("#") else ():
            part = part.replace("~1", "/").replace("~0", "~")
            found = found.get(part) if isinstance(found, dict) else None
        return found if reference.startswith("#") else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def can_constrain(tokenizer: Any) -> bool:
    """Whether llguidance can tell which bytes each token of mlx_lm's `tokenizer` stands for: byte-level tokenizers,
    and those that fall back to bytes, as sentencepiece's do."""
    try:
        decoder = json.loads(backend(tokenizer).decoder.__getstate__())
    except (AttributeError, TypeError, ValueError):
        return False
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else []
    return decoder.get("type") == "ByteLevel" or any(part.get("type") == "ByteFallback" for part in parts)


def backend(tokenizer: Any) -> Any:
    """The tokenizer of the `tokenizers` library that mlx_lm's wraps; None where it wraps another kind."""
    return getattr(getattr(tokenizer, "_tokenizer", tokenizer), "backend_tokenizer", None)


class Compiler:
    """Compiles for one model, and keeps what it compiled, least recently used first to go.

    Args:
        tokenizer: mlx_lm's TokenizerWrapper.
        vocabulary: how many tokens the model gives logits for.
        eos: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: set[int]) -> None:
        self._usable = can_constrain(tokenizer)
        self._source = backend(tokenizer)
        self._vocabulary = vocabulary
        self._eos = sorted(eos)
        self._tokenizer: LLTokenizer | None = None
        self._markers: list[str] = []  # what spells one special token where a text is tokenized as a whole
        self._kept: OrderedDict[Rule, Future[Compiled]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
        before = threading.stack_size(STACK_BYTES)
        self._thread.submit(int)  # begins the thread
        threading.stack_size(before)

    def compile(self, rule: Rule) -> Future[Compiled]:
        """A future of the compiled rule; done already where it was asked for before. It fails with an RpcError.

        Raises:
            Unsupported: nothing can be enforced with this model's tokenizer.
        """
        if not self._usable:
            told = f"this model's tokenizer does not tell its tokens' bytes, so that {rule.kind} cannot be enforced"
            raise Unsupported(told, option=rule.kind)
        found = self._kept.get(rule)
        if found is None:
            found = self._kept[rule] = self._thread.submit(self._compile, rule)
        self._kept.move_to_end(rule)
        while len(self._kept) > KEPT or sum(len(kept.text) for kept in self._kept) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return found

    def forget(self, rule: Rule) -> None:
        """Compile it anew for the next who asks."""
        self._kept.pop(rule, None)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    # --- on the thread

    def _compile(self, rule: Rule) -> Compiled:
        try:
            if self._tokenizer is None:
                self._tokenizer = self._read_tokenizer(rule)
            forcing = not any(marker in rule.text for marker in self._markers)
            source = _source(rule, forcing)
            if (len(rule.text) > SAFE_CHARACTERS or _RISKY[rule.kind].search(rule.text)) and not ends(source):
                told = (
                    f"{rule.kind}: it is too complex: compiling it takes too long, too much memory, or too deep a stack"
                )
                raise InvalidParams(told, field=rule.kind)
            matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=LIMITS)
            self._probe(rule, matcher)
        except RpcError:
            raise
        except ValueError as error:
            raise refusal(rule, str(error)) from None
        except Exception as error:
            raise InternalError(f"{rule.kind} could not be compiled: {type(error).__name__}: {error}") from error
        return Compiled(rule, self._tokenizer, matcher.deep_copy)

    def _read_tokenizer(self, rule: Rule) -> LLTokenizer:
        try:
            source = self._source
            known = source.get_vocab_size()
            size = max(self._vocabulary, known)  # added tokens may lie beyond the model's
            eos = [token for token in self._eos if token < known]
            if source.padding is not None or source.truncation is not None:
                source = copy.copy(source)
                source.no_padding()
                source.no_truncation()
            self._markers = [token.content for token in source.get_added_tokens_decoder().values()]
            return LLTokenizer(source.to_str(), n_vocab=size, eos_token=eos or None)
        except Exception as error:
            told = f"this model's tokenizer cannot be used to enforce {rule.kind}: {error}"
            raise Unsupported(told, option=rule.kind) from None

    def _probe(self, rule: Rule, matcher: LLMatcher) -> None:
        """Try the first tokens, as far as there is no choice. Raises an RpcError where that leads nowhere."""
        trial = matcher.deep_copy()
        for number in range(PROBE_TOKENS):
            bits = np.unpackbits(np.frombuffer(trial.compute_bitmask(), np.uint8), bitorder="little")
            if trial.is_error():
                raise refusal(rule, trial.get_error())
            allowed = [int(token) for token in np.flatnonzero(bits)[: len(self._eos) + 2]]
            if number == 0 and not set(allowed) - set(self._eos):
                raise InvalidParams(f"{rule.kind}: it matches nothing", field=rule.kind)
            if len(allowed) != 1 or not trial.consume_token(allowed[0]) or trial.is_stopped():
                break
        if trial.is_error():
            raise refusal(rule, trial.get_error())


def _source(rule: Rule, forcing: bool) -> str:
    """The rule as llguidance takes it. With `forcing`, text without a choice gets the tokens that it would have in a
    prompt, which is what models know best; but a marker in it would become the special token, which is no text."""
    if rule.kind == "schema" and forcing:
        return LLMatcher.grammar_from_json_schema(rule.text, overrides=_JSON)
    lark = f"start: %json {rule.text}" if rule.kind == "schema" else rule.text
    return LLMatcher.grammar_from_lark(_compact(lark) + ("" if forcing else '\n%llguidance {"no_forcing": true}'))


def _compact(grammar: str) -> str:
    """The grammar, with the JSON Schemas within it held to the same white space, unless they say otherwise."""
    parts, end = [], 0
    for found in re.finditer(r"%json\s*(?=\{)", grammar):
        if found.start() < end:
            continue
        try:
            schema, after = json.JSONDecoder().raw_decode(grammar, found.end())
        except (ValueError, RecursionError):
            continue
        schema.setdefault("x-guidance", _JSON)
        parts += [grammar[end : found.end()], json.dumps(schema)]
        end = after
    return "".join([*parts, grammar[end:]])


def refusal(rule: Rule, reason: str) -> RpcError:
    """Why a rule cannot be compiled, or followed any further, from what llguidance says."""
    told = reason.replace("<non-verbose/>", "").strip()[:500]
    for pattern, keyword in _NOT_ENFORCED:
        found = pattern.search(told)
        if found is not None:
            name = keyword or found[1]
            return Unsupported(f"{rule.kind}: {name} cannot be enforced here: {told}", option=rule.kind, keyword=name)
    if "Default retriever" in told:
        told = f"{told.split(' is not present')[0]} is elsewhere; references are followed within the schema only"
    elif told == "NoExtensionBias":
        told = "it matches nothing"
    elif "ff_tokens" in told:
        told = "it has no end, or none within reach"
    elif any(sign in told for sign in ("Too many items", "Current row has", "too many", "too large", "TooComplex")):
        told = f"it is too complex: {told}"
    return InvalidParams(f"{rule.kind}: {told}", field=rule.kind)
