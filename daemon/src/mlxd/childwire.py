"""What the daemon and its children say to each other: the structs of their frames. Data only.

The frames are those of the public wire (4-byte big-endian length, one msgpack map, JSON-RPC 2.0 members), over a
socketpair whose child end is file descriptor number `--fd`. The daemon asks, the child answers.

Daemon → worker, requests (id, method, params), each answered once by a result or an error:
    load      LoadModel      → Loaded
    attach    Attach         → Attached         a draft model for the loaded one, in place of the one it has
    generate  Generate       → Generated        with `step` notifications on the way
    count     CountTokens    → {tokens}
    adapt     Adapt          → Adapted          once the adapter is read; the one before it stays until then
    encode    EncodeText     → Packed, of types.EncodeResult
    decode    DecodeTokens   → {text}
    embed     EmbedTexts     → Embedded
    prewarm   Prewarm        → Generated        of no text: the beginning of prompts with a system turn is kept then
    cache     {}             → PromptCacheStats, or {} where nothing is kept
    clear     {}             → Cleared          what is kept of prompts, in memory and on disk
Daemon → fetcher, requests; each answered once by a result or an error; one fetcher gets one of them:
    plan      PlanFetch      → FetchPlan
    fetch     Fetch          → Fetched          with `fetching` notifications on the way
    verify    Verify         → Verified
    latest    {repos}        → {commits: {repo: commit}}, of those that the hub knows
Daemon → child, notifications:
    allow     {kv_bytes}     see LoadModel; from now on
    trim      {keep}         memory that no request needs goes back; of what is kept of prompts, this share may stay;
                             1 says that there is memory again
    cancel    {id}           the request of that id ends at the next step, with finish_reason "cancelled"
    stop      {}             finish nothing, exit 0
Child → daemon, notifications:
    ready     Ready          once, first of all: the interpreter runs and the heavy imports are done
    heartbeat Heartbeat      at least every HEARTBEAT_S, from the loop that does the work
    progress  {progress}     a load got so far, 0 to 1
    fetching  Fetching       how far a download got; at most ten a second
    step      Step           what one decode step brought, for all requests at once
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from mlxd_client import types

HEARTBEAT_S = 1.0
# A client's largest request has to fit, with what the daemon puts around it.
MAX_FRAME_BYTES = types.MAX_FRAME_BYTES + 65_536
MAX_DEPTH = types.MAX_DEPTH + 4
# A schema, as JSON, or a grammar may be this long: compiling takes time and memory.
MAX_RULE_BYTES = 256 * 1024
# How many images a request may bring.
MAX_IMAGES = 16
# So long may the tools of a request be, as JSON: each schema is checked, and all are in the prompt.
MAX_TOOLS, MAX_TOOLS_BYTES = 128, 256 * 1024
# Options that no worker honours.
NOT_YET = ("draft_model",)


class Ready(msgspec.Struct, omit_defaults=True):
    """`kind` is what the child is (`worker`, `fetcher`); `versions` of what it runs on, for logs and reports."""

    pid: int
    kind: str
    versions: dict[str, str] = {}


class PromptCacheStats(msgspec.Struct, omit_defaults=True):
    """What became of the prefix cache since the model was loaded: requests that found a prefix and that found none,
    tokens that were not computed; `bytes` is what it holds now. `disk_hits` requests took up `disk_tokens` from files;
    `disk_failures` files could not be read or written."""

    hits: int = 0
    misses: int = 0
    saved_tokens: int = 0
    bytes: int = 0
    disk_hits: int = 0
    disk_tokens: int = 0
    disk_failures: int = 0


class Heartbeat(msgspec.Struct, omit_defaults=True):
    """`memory_bytes` is what the child's model and caches hold now, as MLX counts it. `prompt_cache` is missing where
    no prefixes are kept. `made_tokens` is how many it has generated since it began; it never falls."""

    active: int = 0
    waiting: int = 0
    memory_bytes: int = 0
    made_tokens: int = 0
    prompt_cache: PromptCacheStats | None = None


class Attach(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`draft` is a model, `path` its verified local folder."""

    draft: str
    path: str


class LoadModel(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`path` is a verified local folder. `max_batch` bounds how many requests decode together; `cache_bytes` what
    their KV caches and the prefixes that are kept hold together, where 0 keeps none. `kv_bytes` is what they may hold
    at all: requests wait, or are refused, so that it is enough; 0 is no bound. `kv_bits` is for requests that say
    nothing; 0 leaves their KV caches as they are. `context_length` is how many tokens prompt and answer may have, where
    it is not 0. The model is loaded also where `draft` cannot be its draft model. `disk_cache` is the folder of all
    models' prefixes on disk, `disk_cache_bytes` what they may hold together."""

    model: str
    path: str
    max_batch: int = 32
    prefill_step: int = 512
    cache_bytes: int = 0
    disk_cache: str = ""
    disk_cache_bytes: int = 0
    draft: Attach | None = None
    context_length: int = 0
    kv_bytes: int = 0
    kv_bits: int = 0


class Loaded(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`no_draft` says why the model has no draft model, where one was wished."""

    context_length: int
    memory_bytes: int
    load_s: float
    capabilities: list[str] = []
    no_draft: str | None = None


class Attached(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`memory_bytes` is what the worker holds now, as MLX counts it."""

    memory_bytes: int


class Generate(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One request. `messages` are chat turns as on the public wire, images included, as are `tools` and `tool_choice`;
    `options` the sampling options that were set, under the public wire's names; what is not set falls to the model's
    defaults, then the worker's. `priority` as on the public wire: where requests wait inside the worker, interactive
    ones go first. `adapter`: an absolute folder."""

    kind: str  # "process" | "chat"
    messages: list[dict[str, Any]]
    options: dict[str, Any] = {}
    stream: bool = False
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None
    priority: str = "interactive"
    adapter: str | None = None


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """What a name was found to stand for: `id` is said to clients; to workers the absolute folder `path` is."""

    id: str
    path: str


class Adapt(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`adapter` is an absolute folder; that adapter is kept in memory, whatever else is read. None lets go of it."""

    adapter: str | None = None


class Adapted(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What the adapters hold now."""

    adapters_bytes: int = 0


class WorkerTimings(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Seconds. `first_token_s` counts from the worker's receipt of the request."""

    prompt_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0


class Answer(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A further answer to the same prompt; see Generated."""

    text: str
    finish_reason: str
    completion_tokens: int
    reasoning: str | None = None
    logprobs: list[dict[str, Any]] | None = None
    invented: list[str] | None = None
    structured: Any = None


class Generated(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`alone`: it was served by itself, as what it asked for wants it. `speculation` is missing where nothing was
    guessed. `alternatives` are the second and further ones of several answers; `completion_tokens` is of all of them.
    `dropped_messages` did not fit into the context."""

    text: str
    finish_reason: str  # stop | length | tool_calls | cancelled
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    timings: WorkerTimings = msgspec.field(default_factory=WorkerTimings)
    reasoning: str | None = None
    logprobs: list[dict[str, Any]] | None = None
    invented: list[str] | None = None
    structured: Any = None
    reasoning_tokens: int = 0
    tool_calls: list[types.ToolCall] | None = None
    malformed_tool_calls: list[types.MalformedToolCall] | None = None
    speculation: types.Speculation | None = None
    alternatives: list[Answer] | None = None
    dropped_messages: int = 0
    alone: bool = False


class CountTokens(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Either plain `text`, or `messages` and `tools` through the chat template."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = []


class Calls(msgspec.Struct, omit_defaults=True):
    """The tool calls that one decode step completed for the streaming request `id`."""

    id: int
    tool_calls: list[types.ToolCall] = []
    malformed_tool_calls: list[types.MalformedToolCall] = []


class EncodeText(msgspec.Struct, omit_defaults=True, kw_only=True):
    """See types.EncodeParams."""

    text: str
    special: bool = False
    pieces: bool = False


class DecodeTokens(msgspec.Struct, omit_defaults=True, kw_only=True):
    tokens: list[int]


class Packed(msgspec.Struct, kw_only=True):
    """A result of many values, as msgpack of its own: the walk that frames are checked by does not enter it."""

    packed: bytes


class EmbedTexts(msgspec.Struct, omit_defaults=True, kw_only=True):
    """See types.EmbedParams. `most_values` is how many numbers may come back in all."""

    input: list[str]
    most_values: int
    dimensions: int | None = None
    normalize: bool | None = None
    truncate: bool = False


class Embedded(msgspec.Struct, kw_only=True):
    """`vectors` are little-endian 32-bit floats, `dimensions` for each text, one text after the other."""

    vectors: bytes
    dimensions: int
    prompt_tokens: int


class Prewarm(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The text of a system turn; `adapter` as in Generate."""

    system: str
    adapter: str | None = None


class Cleared(msgspec.Struct, omit_defaults=True, kw_only=True):
    memory_bytes: int = 0
    disk_bytes: int = 0


class Step(msgspec.Struct, omit_defaults=True):
    """`pieces` holds (request id, text, reasoning) for each streaming request that got new text; `calls` is of those
    that completed tool calls. `others` holds (request id, number, text, reasoning) of the second and further answers to
    requests that asked for several."""

    pieces: list[tuple[int, str, str]] = []
    calls: list[Calls] = []
    others: list[tuple[int, int, str, str]] = []


# --- fetchers -----------------------------------------------------------------------------------------------------


class Where(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A repository at a revision, and the Hugging Face cache it belongs in. `repo` is a valid repository id; `revision`
    a branch, tag or commit; `pin`: the revision keeps a ref of its own name, so that no update removes it."""

    repo: str
    cache: str
    revision: str = "main"
    pin: bool = False


class PlanFetch(msgspec.Struct, omit_defaults=True, kw_only=True):
    where: Where
    context_length: int | None = None


class FetchPlan(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`download_bytes` of `size_bytes` are not on disk yet. The others are as in store.folder.Folder, from metadata and
    config.json alone; `kv_bytes` for the context that was asked for, or that a load reserves."""

    kind: Literal["model", "adapter"] = "model"
    commit: str
    size_bytes: int
    download_bytes: int
    weights_bytes: int
    resident_bytes: int
    kv_bytes: int
    memory_bytes: int
    context_length: int


class Fetch(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`connections` at once, over all files; `rate_bytes_s` bounds all of them together, 0 is no bound. An attempt that
    brings less than `floor_bytes_s` over `stall_s` seconds has failed. `attempts` is how often each file is tried.
    `repair`: files that are there are checked, too."""

    where: Where
    connections: int = 8
    rate_bytes_s: int = 0
    floor_bytes_s: int = 4096
    stall_s: float = 30.0
    attempts: int = 3
    repair: bool = False


class Fetching(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`phase`: planning, downloading, verifying, retrying. `attempts`: the most that any file has needed.
    `fetched_bytes` crossed the network so far."""

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_s: float = 0.0
    fetched_bytes: int = 0
    attempts: int = 1


class Fetched(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`fetched_bytes` crossed the network for it; the rest of `size_bytes` was there."""

    commit: str
    size_bytes: int
    fetched_bytes: int


class Verify(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`snapshot` is an absolute folder; where its files are links into a Hugging Face cache, their names are hashes."""

    snapshot: str


class Verified(msgspec.Struct, omit_defaults=True, kw_only=True):
    bad_files: list[types.BadFile] = []
