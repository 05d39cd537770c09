"""One generation between the wire and its worker: what was asked, when, and what came of it; no decisions, no IO."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import msgspec
from msgspec import UnsetType

from mlxd_client import errors, types
from mlxd_client.types import UNSET

from . import childwire as wire
from .core import events as ev

if TYPE_CHECKING:
    from .server.runtime_api import Sink

# What goes to the worker as it stands on the wire; the rest of the params is the daemon's own business.
_NOT_FOR_WORKERS = frozenset(
    {
        "model",
        "adapter",
        "stream",
        "messages",
        "prompt",
        "system",
        "keep_alive",
        "timeout_s",
        "priority",
        "persona",
        *wire.NOT_YET,
    }
)
_SAMPLING = tuple(f for f in types.GenerateParams.__struct_fields__ if f not in _NOT_FOR_WORKERS)


class Generation:
    """A generation that has had no last word yet. Also its caller's ticket."""

    __slots__ = (
        "accepted_at", "adapter", "client", "dispatched_at", "found_at", "gave_up", "kind", "model", "outcome",
        "params", "ready_at", "rid", "sink", "tell", "waiting", "yields",
    )  # fmt: skip

    def __init__(
        self,
        tell: Callable[[ev.Event], None],
        rid: int,
        client: int,
        kind: str,
        params: types.GenerateParams,
        sink: Sink,
        *,
        yields: bool = False,
    ):
        self.tell = tell
        self.rid = rid
        self.client = client
        self.kind = kind
        self.params = params
        self.sink = sink
        self.yields = yields
        self.accepted_at = time.monotonic()  # as fine as a token is short; the loop's own clock counts milliseconds
        self.found_at: float | None = None  # its model was here
        self.dispatched_at: float | None = None
        self.outcome: wire.Generated | errors.RpcError | None = None
        self.gave_up = False
        self.waiting: asyncio.Task[None] | None = None  # what looks for the model, and may fetch it, before the core
        self.model = ""
        self.adapter: wire.Adapter | None = None
        self.ready_at = 0.0

    def cancel(self) -> None:
        """The caller gave up: the sink hears so as soon as the worker has let go of it."""
        self.gave_up = True
        if self.waiting is not None:
            self.waiting.cancel()
        self.tell(ev.Cancel(self.rid))


def timings(request: Generation, made: wire.Generated | None) -> types.Timings:
    """Where its time went up to now, the daemon's own waiting counted in; `made` is what its worker said, if it did."""
    now = time.monotonic()
    dispatched = request.dispatched_at or now
    waited = dispatched - request.accepted_at
    load_s = max(0.0, min(request.ready_at, dispatched) - request.accepted_at)
    spent = types.Timings(queue_s=waited - load_s, load_s=load_s, total_s=now - request.accepted_at)
    if made is not None:
        spent.prompt_s, spent.decode_s = made.timings.prompt_s, made.timings.decode_s
        spent.first_token_s = waited + made.timings.first_token_s
    return spent


def usage(made: wire.Generated) -> types.Usage:
    return types.Usage(
        prompt_tokens=made.prompt_tokens, completion_tokens=made.completion_tokens, cached_tokens=made.cached_tokens,
        reasoning_tokens=made.reasoning_tokens,
    )  # fmt: skip


def completion(request: Generation, made: wire.Generated) -> types.Completion:
    """The wire's answer from the worker's."""
    return types.Completion(
        model=request.model, text=made.text, finish_reason=cast("types.FinishReason", made.finish_reason),
        usage=usage(made), timings=timings(request, made), reasoning=made.reasoning, invented=made.invented,
        logprobs=_logprobs(made.logprobs), structured=made.structured, dropped_messages=made.dropped_messages,
        alternatives=None if made.alternatives is None else [_alternative(answer) for answer in made.alternatives],
        tool_calls=made.tool_calls, malformed_tool_calls=made.malformed_tool_calls,
        alone=made.alone, speculation=made.speculation,
        adapter=None if request.adapter is None else request.adapter.id,
    )  # fmt: skip


def _alternative(answer: wire.Answer) -> types.Alternative:
    return types.Alternative(
        text=answer.text, finish_reason=cast("types.FinishReason", answer.finish_reason),
        completion_tokens=answer.completion_tokens, reasoning=answer.reasoning, structured=answer.structured,
        logprobs=_logprobs(answer.logprobs), invented=answer.invented,
    )  # fmt: skip


def _logprobs(entries: list[dict[str, Any]] | None) -> list[types.TokenLogprob] | None:
    return None if entries is None else msgspec.convert(entries, list[types.TokenLogprob])


def refuse_unsupported(params: types.GenerateParams) -> None:
    """Raises Unsupported, or InvalidParams, for what no worker honours, before a model is loaded for it."""
    for option in wire.NOT_YET:
        if getattr(params, option, UNSET) is not UNSET:
            raise errors.Unsupported(f"{option} is not supported by the models' backend", option=option)
    check_rule(params)
    if params.thinking is False and params.thinking_budget is not UNSET:
        raise errors.InvalidParams("a thinking_budget turns thinking on; give no `thinking`", field="thinking_budget")
    if isinstance(params, types.ChatParams):
        check_images(params.messages)
        check_tools(params.tools)
        if params.tool_choice is not UNSET and not params.tools:
            raise errors.InvalidParams("there are no tools to choose from", field="tool_choice")


def check_rule(params: types.GenerateParams) -> None:
    """Raises InvalidParams for a schema or grammar that no worker would compile, as far as that shows from outside."""
    schema, grammar = params.schema, params.grammar
    if schema is not UNSET and grammar is not UNSET:
        raise errors.InvalidParams("give either schema or grammar: an answer follows one of them", field="grammar")
    if schema is False:
        raise errors.InvalidParams("schema: no value fits the schema false", field="schema")
    for name, size in (
        ("schema", len(msgspec.json.encode(schema)) if isinstance(schema, dict) else 0),
        ("grammar", len(grammar.encode()) if isinstance(grammar, str) else 0),
    ):
        if size > wire.MAX_RULE_BYTES:
            told = f"{name}: {size} bytes are over the limit of {wire.MAX_RULE_BYTES}"
            raise errors.InvalidParams(told, field=name, limit_bytes=wire.MAX_RULE_BYTES)


def check_images(messages: list[types.Message]) -> int:
    """How many images there are. Raises InvalidParams for those that no worker would read, as far as that shows from
    outside: whether a file is there, and is an image, is for the worker to see."""
    count = 0
    for number, turn in enumerate(messages):
        for place, part in enumerate(turn.content if isinstance(turn.content, list) else ()):
            if isinstance(part, types.TextPart):
                continue
            count += 1
            field = f"messages[{number}].content[{place}]"
            if count > wire.MAX_IMAGES:
                told = f"{field}: a request brings {wire.MAX_IMAGES} images at most"
                raise errors.InvalidParams(told, field=field, limit=wire.MAX_IMAGES)
            if isinstance(part, types.ImageUrlPart):
                if not part.image_url.url[:5].lower() == "data:":
                    raise errors.InvalidParams(f"{field}: nothing is fetched; send a data: URL or a path", field=field)
            elif (part.path is UNSET) == (part.data is UNSET):
                raise errors.InvalidParams(f"{field}: an image is either a path or data", field=field)
            elif part.path is not UNSET and (not part.path.startswith("/") or "\0" in part.path):
                raise errors.InvalidParams(f"{field}: the path of an image is absolute", field=field)
    return count


def turn_params(messages: list[types.Message]) -> list[dict[str, Any]]:
    """Turns as their worker gets them."""
    return [msgspec.to_builtins(message, builtin_types=(bytes,)) for message in messages]


def check_tools(tools: list[dict[str, Any]] | UnsetType) -> None:
    """Raises InvalidParams for more tools than a worker takes."""
    if tools is UNSET:
        return
    if len(tools) > wire.MAX_TOOLS:
        told = f"tools: {len(tools)} are over the limit of {wire.MAX_TOOLS}"
        raise errors.InvalidParams(told, field="tools", limit=wire.MAX_TOOLS)
    size = len(msgspec.json.encode(tools))
    if size > wire.MAX_TOOLS_BYTES:
        told = f"tools: {size} bytes are over the limit of {wire.MAX_TOOLS_BYTES}"
        raise errors.InvalidParams(told, field="tools", limit_bytes=wire.MAX_TOOLS_BYTES)


def worker_params(kind: str, params: types.GenerateParams, adapter: wire.Adapter | None = None) -> wire.Generate:
    """The request as its worker gets it: turns, and the options that were set."""
    if isinstance(params, types.ChatParams):
        messages = turn_params(params.messages)
    else:
        assert isinstance(params, types.ProcessParams)
        messages = [] if params.system is UNSET else [{"role": "system", "content": params.system}]
        messages.append({"role": "user", "content": params.prompt})
    options = {name: value for name in _SAMPLING if (value := getattr(params, name)) is not UNSET}
    made = wire.Generate(kind=kind, messages=messages, options=options, stream=params.stream, priority=params.priority)
    made.adapter = None if adapter is None else adapter.path
    if isinstance(params, types.ChatParams) and params.tools:
        made.tools = params.tools
        made.tool_choice = None if params.tool_choice is UNSET else params.tool_choice
    return made


def characters(messages: list[types.Message]) -> int:
    """How much text turns have."""
    total = 0
    for turn in messages:
        if isinstance(turn.content, str):
            total += len(turn.content)
        else:
            total += sum(len(part.text) for part in turn.content if isinstance(part, types.TextPart))
    return total


def count_params(params: types.TokensParams) -> wire.CountTokens:
    if params.messages is not UNSET:
        return wire.CountTokens(messages=turn_params(params.messages), tools=params.tools or [])
    return wire.CountTokens(text=params.text or "")


def with_text(error: errors.RpcError, outcome: wire.Generated | errors.RpcError | None) -> errors.RpcError:
    """The error, with what was generated before it."""
    if isinstance(outcome, wire.Generated) and outcome.text:
        error.details.setdefault("text", outcome.text)
    return error
