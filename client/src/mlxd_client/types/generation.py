"""`process` and `chat`, their options and answers; tokens; cancelling."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from .base import MAX_INTEGER, FinishReason, KeepAlive, ModelRef, Name, Params, Result

Role = Literal["system", "user", "assistant", "tool"]


class TextPart(Params, kw_only=True, tag_field="type", tag="text"):
    """Some of a turn's text."""

    text: str


class ImagePart(Params, kw_only=True, tag_field="type", tag="image"):
    """An image, where the turn speaks of it: the `path` of a file, absolute, or its bytes as `data` (base64 in JSON).
    PNG, JPEG, WebP or GIF, of one frame."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)] | UnsetType = UNSET
    data: Annotated[bytes, Meta(min_length=1)] | UnsetType = UNSET


class ImageUrl(Params, kw_only=True):
    """`url` is a `data:` URL with base64. Nothing is fetched. `detail` is for others: images are read as the model
    reads them."""

    url: Annotated[str, Meta(min_length=1)]
    detail: Literal["auto"] | UnsetType = UNSET


class ImageUrlPart(Params, kw_only=True, tag_field="type", tag="image_url"):
    """An image as OpenAI's clients send it."""

    image_url: ImageUrl


Part = TextPart | ImagePart | ImageUrlPart


class Message(Params, kw_only=True):
    """One turn. `content` is text, or parts: texts and images in the order in which they are read.

    `tool_calls` are an assistant turn's: {id, name, arguments}, as a Completion has them, or {id, type: "function",
    function: {name, arguments}}, whose arguments may be JSON text. A `tool` turn brings what one of them returned:
    `tool_call_id` says which. Such turns follow the assistant turn that made the calls.
    """

    role: Role
    content: str | Annotated[list[Part], Meta(max_length=1024)] = ""
    name: Name | UnsetType = UNSET
    tool_calls: list[dict[str, Any]] | UnsetType = UNSET
    tool_call_id: Name | UnsetType = UNSET


Stop = Annotated[str, Meta(min_length=1, max_length=1024)]


class Options(Params, kw_only=True):
    """What requests may say of how they are answered, and personas by default. Unset means: the model's own default,
    else the daemon's: `temperature` 0.7, `top_p` 0.8, `repetition_penalty` 1.15, `thinking` off, `max_tokens` 150 for
    `process` and 2,048 for `chat`.

    `timeout_s` is the deadline of the whole request, waiting and loading included. `keep_alive`: for how many seconds
    the model stays loaded afterwards; -1 for ever, 0 not at all. `cache_prompt` false neither uses nor keeps what was
    computed of prompts. `stop` ends the answer before any of these texts. `logprobs` adds each token's log probability,
    and so many alternatives. `logit_bias` adds to the scores of tokens, by their numbers.

    `schema` makes the answer JSON that fits a JSON Schema; true stands for any JSON. `grammar` makes it fit a grammar
    in the dialect of Lark that llguidance reads. They are enforced token by token; at most one of them can be given.

    `thinking_budget` bounds the thought, in tokens, and turns thinking on: a thought that has used it up is ended, and
    the answer begins. `n` answers are made from one prompt, which is read once: see Completion.alternatives. With a
    `seed`, the first is what `n` 1 would give; the others have draws of their own, so that a `temperature` of 0 makes
    them all alike. Where one fails, all do. There is one answer where there are `tools`.
    `xtc_probability` is how often, for each token, all but the least likely of those above `xtc_threshold` (0.1) are
    left out; ends of lines and of the answer are spared.

    `adapter` is a LoRA or DoRA folder, absolute, or the id of one from the hub that is on this machine; unset means the
    one that the model was loaded with, and `none` the model alone. `speculation`: `auto`, the default,
    guesses ahead where that pays, by the model's draft model if it has one, else by looking up what the prompt says;
    neither changes the answer. `lookup` and `draft` guess by that means whenever the request decodes alone, whether it
    pays or not; `off` never.

    `context_policy` says what becomes of a prompt that is too long: `refuse` (the default), `drop_oldest` (whole
    messages go, oldest first, until there is room for `max_tokens`, half of the context at most, and a quarter where
    that is unset; the system's and the last user's stay), `rotate` (the answer may go on for ever; the oldest tokens
    fall out of sight). `kv_bits` keeps the KV cache in so many bits. `deterministic` makes the answer depend on nothing
    else that runs, at the price of running by itself; without a `seed` it draws with seed 0.
    """

    model: ModelRef | UnsetType = UNSET
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | UnsetType = UNSET
    temperature: Annotated[float, Meta(ge=0, le=5)] | UnsetType = UNSET
    top_p: Annotated[float, Meta(gt=0, le=1)] | UnsetType = UNSET
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | UnsetType = UNSET
    min_p: Annotated[float, Meta(ge=0, le=1)] | UnsetType = UNSET
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | UnsetType = UNSET
    presence_penalty: Annotated[float, Meta(ge=-10, le=10)] | UnsetType = UNSET
    frequency_penalty: Annotated[float, Meta(ge=-10, le=10)] | UnsetType = UNSET
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-1000, le=1000)]], Meta(max_length=1024)] | UnsetType = (
        UNSET
    )
    seed: Annotated[int, Meta(ge=0, le=MAX_INTEGER)] | UnsetType = UNSET
    stop: Annotated[list[Stop], Meta(max_length=16)] | UnsetType = UNSET
    logprobs: Annotated[int, Meta(ge=0, le=20)] | UnsetType = UNSET
    schema: dict[str, Any] | bool | UnsetType = UNSET
    grammar: Annotated[str, Meta(min_length=1)] | UnsetType = UNSET
    thinking: bool | UnsetType = UNSET
    keep_alive: KeepAlive | UnsetType = UNSET
    timeout_s: Annotated[float, Meta(gt=0, le=86_400)] | UnsetType = UNSET
    cache_prompt: bool | UnsetType = UNSET
    xtc_probability: Annotated[float, Meta(ge=0, le=1)] | UnsetType = UNSET
    xtc_threshold: Annotated[float, Meta(ge=0, le=0.5)] | UnsetType = UNSET
    thinking_budget: Annotated[int, Meta(ge=0, le=1_000_000)] | UnsetType = UNSET
    n: Annotated[int, Meta(ge=1, le=16)] | UnsetType = UNSET
    adapter: ModelRef | UnsetType = UNSET
    speculation: Literal["auto", "off", "lookup", "draft"] | UnsetType = UNSET
    context_policy: Literal["refuse", "drop_oldest", "rotate"] | UnsetType = UNSET
    kv_bits: Literal[4, 8] | UnsetType = UNSET
    deterministic: bool | UnsetType = UNSET


class GenerateParams(Options, kw_only=True):
    """The options that `process` and `chat` share. `stream` sends the answer as it is made. `priority` `batch` makes
    way for `interactive`. `persona` names one of the settings: its system turn, its model and its options hold where
    the request says nothing of its own."""

    stream: bool = False
    priority: Literal["interactive", "batch"] = "interactive"
    persona: Name | UnsetType = UNSET


class ProcessParams(GenerateParams, kw_only=True):
    """One prompt in, one text out. `template` names one of the settings: `prompt` goes where it says `{text}`, and
    `values` are for its other placeholders."""

    prompt: Annotated[str, Meta(min_length=1)]
    system: str | UnsetType = UNSET
    template: Name | UnsetType = UNSET
    values: Annotated[dict[Name, str], Meta(max_length=64)] | UnsetType = UNSET


class ChatParams(GenerateParams, kw_only=True):
    """`tools` are the functions that the model may call: {type: "function", function: {name, description, parameters}},
    where `parameters` is a JSON Schema of an object. `tool_choice` is `auto` (the default), `none`, `required`, or the
    one to call: {name} or {type: "function", function: {name}}. The last two are enforced token by token; with them
    there can be no `schema` or `grammar`.
    """

    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)]
    tools: list[dict[str, Any]] | UnsetType = UNSET
    tool_choice: str | dict[str, Any] | UnsetType = UNSET


class Usage(Result, kw_only=True):
    """`reasoning_tokens` of `completion_tokens` were the thought's, its markers not counted."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class Timings(Result, kw_only=True):
    """Where the time of one request went, in seconds since it was accepted or, for parts, their own length."""

    queue_s: float = 0.0
    load_s: float = 0.0
    prompt_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0


class Speculation(Result, kw_only=True):
    """What guessing ahead came to: of `drafted_tokens` that were guessed, `accepted_tokens` were what the model would
    have said anyway. `kind` says who guessed: `draft` is the draft model, `lookup` what was said before."""

    kind: Literal["lookup", "draft"]
    drafted_tokens: int
    accepted_tokens: int


class ToolCall(Result, kw_only=True):
    """A whole call of one of the request's tools; `arguments` fit the tool's `parameters`. `id` is unique among the
    calls of one answer."""

    id: str
    name: str
    arguments: dict[str, Any]


class MalformedToolCall(Result, kw_only=True):
    """What the model wrote where a call was to be: no call, an unknown tool, arguments that do not fit, or a call that
    was cut short. `text` is what it wrote, without the markers."""

    text: str
    reason: str
    name: str | None = None


class TokenLogprob(Result, kw_only=True):
    """One generated token's natural-log probability, and the most likely alternatives, best first."""

    token: str
    token_id: int
    logprob: float
    top: list[tuple[str, float]] = []


class Alternative(Result, kw_only=True):
    """A further answer to the same prompt, where `n` were asked; its fields are as in Completion."""

    text: str
    finish_reason: FinishReason
    completion_tokens: int
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    structured: Any = None
    logprobs: list[TokenLogprob] | None = None
    invented: list[str] | None = None


class Completion(Result, kw_only=True):
    """`invented` names the words of the answer that its prompt does not account for; only models that promise to
    rewrite faithfully (see `guard` in their mlxd.json) are checked. Whoever needs certainty keeps the prompt then.
    `structured` is the parsed answer where a `schema` was asked and the answer is whole; null, and what the wire cannot
    carry, are in `text` only. `alone`: `context_policy` rotate or `deterministic` had this request served by itself.
    `speculation` is set where any token was guessed ahead. `adapter` is the id of the adapter that the model had.
    `finish_reason` is `tool_calls` where the answer ended by itself with whole calls in it.

    `alternatives` are the answers after the first, where `n` were asked: `usage.completion_tokens` is of all together,
    the other fields are the first one's. `dropped_messages` is how many `context_policy` left out."""

    model: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    malformed_tool_calls: list[MalformedToolCall] | None = None
    structured: Any = None
    logprobs: list[TokenLogprob] | None = None
    invented: list[str] | None = None
    adapter: str | None = None
    speculation: Speculation | None = None
    alternatives: list[Alternative] | None = None
    dropped_messages: int = 0
    alone: bool = False


class Stream(Result, kw_only=True):
    """A `stream` notification: the next piece of the answer to request `id`. `seq` counts from 0 without gaps, over all
    answers where `n` were asked; `index` says which one this belongs to, and is absent for the first. A tool call is in
    the piece in which it was completed."""

    id: int | str
    seq: int
    index: int = 0
    text: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    malformed_tool_calls: list[MalformedToolCall] | None = None
    phase: Literal["queued", "downloading", "loading", "prompt"] | None = None
    progress: float | None = None


class TokensParams(Params, kw_only=True):
    """Either `text`, or `messages` with the `tools` that `chat` would get with them."""

    model: ModelRef | UnsetType = UNSET
    text: str | UnsetType = UNSET
    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)] | UnsetType = UNSET
    tools: list[dict[str, Any]] | UnsetType = UNSET


class TokensResult(Result, kw_only=True):
    tokens: int


class CancelParams(Params, kw_only=True):
    """`id` of a request on the same connection."""

    id: int | str


class CancelResult(Result, kw_only=True):
    """Whether there was such a request to cancel; its own response says how it ended."""

    cancelled: bool
