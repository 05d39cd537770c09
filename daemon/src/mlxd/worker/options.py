"""What a request asks for, completed by defaults and checked; what cannot be honoured is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from mlxd_client.errors import InvalidParams, ModelInvalid, Unsupported
from mlxd_client.types import UNSET, GenerateParams

from ..childwire import NOT_YET
from .grammar import Rule, read_rule
from .lanecaches import PLAIN, LaneKey
from .sampling import Sampling, make_key

# What a request gets that says nothing, on a model whose folder says nothing.
DEFAULTS: dict[str, Any] = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.15}
DEFAULT_MAX_TOKENS = {"process": 150, "chat": 2048}
DEFAULT_XTC_THRESHOLD = 0.1  # mlx_lm's

# What a model's folder may set. The rest is the daemon's business or each request's own.
MODEL_DEFAULTS = frozenset(
    "max_tokens temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty stop".split()
)


@dataclass(frozen=True, slots=True)
class Choices:
    """A request's options, complete. `max_tokens` is not yet fitted to the context; `asked_tokens` says that it is the
    request's own number."""

    sampling: Sampling
    max_tokens: int
    asked_tokens: bool = False
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] | None = None
    thinking: bool = False
    thinking_budget: int | None = None
    cache_prompt: bool = True
    rule: Rule | None = None
    speculation: str = "auto"
    answers: int = 1
    context_policy: str = "refuse"
    lane: LaneKey = PLAIN

    @property
    def bound(self) -> bool:
        """There are tokens that may not come: by a rule, or a thought that has a budget."""
        return self.rule is not None or self.thinking_budget is not None


def resolve(kind: str, options: dict[str, Any], defaults: Mapping[str, Any], vocabulary: int) -> Choices:
    """Complete and check what a request set.

    Args:
        kind: "process" or "chat".
        options: under the wire's names; only what was set.
        defaults: the model's own, as `check_defaults` returned them.
        vocabulary: how many tokens the model has; bounds what `logit_bias` may name.

    Raises:
        Unsupported: an option that this engine cannot honour; details.option names it.
        InvalidParams: an unknown option, a value out of range, or a rule that nothing could follow.
    """
    if kind not in DEFAULT_MAX_TOKENS:
        raise InvalidParams(f"a request is of kind process or chat, not {kind!r}", field="kind")
    refuse_unsupported(options)
    given = DEFAULTS | {"max_tokens": DEFAULT_MAX_TOKENS[kind]} | dict(defaults) | options
    try:
        params = msgspec.convert(given, GenerateParams)
    except msgspec.ValidationError as error:
        raise InvalidParams(str(error), **_field(error)) from None
    if params.thinking is False and params.thinking_budget is not UNSET:
        raise InvalidParams("a thinking_budget turns thinking on; give no `thinking`", field="thinking_budget")
    lane = _lane(params)
    if options.get("xtc_threshold") is not None and "xtc_probability" not in options:
        raise InvalidParams("xtc_threshold does nothing without xtc_probability", field="xtc_threshold")
    return Choices(
        sampling=Sampling(
            temperature=_or(params.temperature, 0.0),
            top_p=_or(params.top_p, 1.0),
            top_k=_or(params.top_k, 0),
            min_p=_or(params.min_p, 0.0),
            xtc_probability=_or(params.xtc_probability, 0.0),
            xtc_threshold=_or(params.xtc_threshold, DEFAULT_XTC_THRESHOLD),
            repetition=_or(params.repetition_penalty, 1.0),
            presence=_or(params.presence_penalty, 0.0),
            frequency=_or(params.frequency_penalty, 0.0),
            logprobs=_or(params.logprobs, -1),
            key=make_key(_or(params.seed, 0 if lane.deterministic else None)),
        ),
        max_tokens=_or(params.max_tokens, DEFAULT_MAX_TOKENS[kind]),
        asked_tokens="max_tokens" in options,
        stop=tuple(_or(params.stop, [])),
        logit_bias=_bias(_or(params.logit_bias, {}), vocabulary),
        thinking=_or(params.thinking, params.thinking_budget is not UNSET),
        thinking_budget=_or(params.thinking_budget, None),
        cache_prompt=_or(params.cache_prompt, True) and lane == PLAIN,
        rule=read_rule(_or(params.schema, None), _or(params.grammar, None)),
        speculation=_or(params.speculation, "auto"),
        answers=_or(params.n, 1),
        context_policy=_or(params.context_policy, "refuse"),
        lane=lane,
    )


def _lane(params: GenerateParams) -> LaneKey:
    """Raises Unsupported for what no lane can do."""
    policy = _or(params.context_policy, "refuse")
    lane = LaneKey(_or(params.kv_bits, 0), policy == "rotate", _or(params.deterministic, False))
    if lane != PLAIN and _or(params.cache_prompt, None) is True:
        raise Unsupported(
            "prefixes are kept of plain requests only: not with kv_bits, context_policy rotate or deterministic",
            option="cache_prompt",
        )
    return lane


def refuse_unsupported(options: Mapping[str, Any]) -> None:
    """Raises Unsupported for the first option that exists on the wire and cannot be honoured here; InvalidParams for
    one that comes beside the options."""
    for name in NOT_YET:
        if name in options:
            raise Unsupported(f"this engine cannot honour {name} yet", option=name)
    if "adapter" in options:
        raise InvalidParams("an adapter is named beside the options", field="adapter")


def check_defaults(raw: Any) -> dict[str, Any]:
    """The usable part of the `defaults` that a model's folder brings. Unknown names are ignored.

    Raises:
        ModelInvalid: a known name with a value that no request could set.
    """
    if not isinstance(raw, dict):
        raise ModelInvalid("mlxd.json: defaults must be an object", file="mlxd.json")
    known = {name: value for name, value in raw.items() if name in MODEL_DEFAULTS}
    try:
        msgspec.convert(known, GenerateParams)
    except msgspec.ValidationError as error:
        raise ModelInvalid(f"mlxd.json: {error}", file="mlxd.json") from None
    return known


def _bias(raw: Mapping[str, float], vocabulary: int) -> dict[int, float] | None:
    bias = {}
    for name, value in raw.items():
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else -1
        if not 0 <= token < vocabulary:
            raise InvalidParams(
                f"logit_bias names token {name!r}; this model has tokens 0 to {vocabulary - 1}", field="logit_bias"
            )
        bias[token] = value
    return bias or None


def _or(value: Any, default: Any) -> Any:
    return default if value is UNSET else value


def _field(error: msgspec.ValidationError) -> dict[str, Any]:
    """msgspec ends a message with the path of what it refuses, as in "Expected … - at `$.top_p`"."""
    message = str(error)
    if "`$." in message:
        return {"field": message.rpartition("`$.")[2].rstrip("`")}
    parts = message.split("`")
    return {"field": parts[1]} if len(parts) == 3 else {}
