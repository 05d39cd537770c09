"""Models: what they are, loading, downloading, planning, the catalog, leases."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from .base import ErrorObject, KeepAlive, ModelRef, ModelState, Name, Params, Result


class Model(Result, kw_only=True):
    """One model as the daemon sees it.

    Lifecycle fields change with events of topic `models`; the activity fields (from `memory_bytes` on) with
    `queue`. `memory_bytes` is what its weights and caches hold by MLX's count, `footprint_bytes` all that its
    worker holds, by the system's. `phase` details a state: `queued` (a load that waits for memory, or a download
    for its turn), `loading`, `unloading`, `deleting`; of a download `planning`, `downloading`, `verifying`,
    `retrying`. An update is downloaded beside what is there: the state stays, `progress` is then the download's.
    `latest_revision` is set where the hub is known to have a newer one than `revision`. `draft_model` is the one
    that guesses for it, where its worker has one. An `adapter` is on the disk, and never loaded by itself: requests
    name it beside a model. Its `kind` is known once it is here.

    `pinned` and `preload` are what the settings say of it. While it is loaded, `adapter` is the id of the one that
    requests get that name none, and `capabilities` is what it can do: `process`, `chat` (it has a template for turns),
    `thinking`, `tools`, `vision`, `embed`, `structured` and `grammar`, `adapters`, `logprobs`, `seed`, `faithful`.
    `prewarmed` is how many system turns were computed ahead since it was loaded, see LoadParams.
    """

    id: str
    state: ModelState
    source: Literal["builtin", "hub", "path"]
    revision: str | None = None
    latest_revision: str | None = None
    size_bytes: int | None = None
    phase: str | None = None
    progress: float | None = None
    error: ErrorObject | None = None
    context_length: int | None = None
    memory_bytes: int | None = None
    footprint_bytes: int | None = None
    active: int = 0
    waiting: int = 0
    leases: int = 0
    idle_unload_at: float | None = None
    draft_model: str | None = None
    kind: Literal["model", "adapter"] = "model"
    pinned: bool = False
    preload: bool = False
    adapter: str | None = None
    capabilities: list[str] | None = None
    prewarmed: int = 0


ACTIVITY_FIELDS: tuple[str, ...] = (
    "memory_bytes", "footprint_bytes", "active", "waiting", "leases", "idle_unload_at",
)  # fmt: skip


class ModelParams(Params, kw_only=True):
    model: ModelRef


class OptionalModelParams(Params, kw_only=True):
    model: ModelRef | UnsetType = UNSET


class LoadParams(Params, kw_only=True):
    """`keep_alive` in seconds: -1 never unloads, 0 unloads at once when idle. `adapter` is what requests get that name
    none, from the answer to this until the model is unloaded; it is read beside the model, which is not loaded anew.
    `none` takes it away.

    `draft_model` is loaded beside the model, to guess for it, in place of the one it has; it goes when the model is
    unloaded. Where it cannot guess for the model the request fails, and the model stays loaded without it. `system`:
    what prompts with this system turn begin with is computed, too, and kept, so that the first of them need not;
    `unsupported` where nothing can be kept. `persona` does so with the system turn, and the adapter, of one of the
    settings; `system` goes before its."""

    model: ModelRef
    system: Annotated[str, Meta(min_length=1)] | UnsetType = UNSET
    persona: Name | UnsetType = UNSET
    keep_alive: KeepAlive | UnsetType = UNSET
    adapter: ModelRef | UnsetType = UNSET
    draft_model: ModelRef | UnsetType = UNSET


class StoryStep(Result, kw_only=True):
    """`cause` happened to a model in state `source`, and it was in `target` from then on."""

    at: float
    cause: str
    source: ModelState
    target: ModelState


class ModelStory(Result, kw_only=True):
    """The last steps of one model, oldest first."""

    model: str
    steps: list[StoryStep]


class StoriesResult(Result, kw_only=True):
    stories: list[ModelStory]


class ListParams(Params, kw_only=True):
    """`updates` asks the hub for each model's newest revision first; what it does not answer is left out."""

    updates: bool = False


class ModelsResult(Result, kw_only=True):
    models: list[Model]


Revision = Annotated[str, Meta(min_length=1, max_length=200)]


class DownloadParams(Params, kw_only=True):
    """`model` is a repository of the hub, an alias of one, or `org/name@revision`, which is what `revision` makes of
    it: a model of its own, that stays as it is. `repair` also checks the files that are there, and fetches bad ones
    anew."""

    model: ModelRef
    revision: Revision | UnsetType = UNSET
    repair: bool = False


class DownloadResult(Result, kw_only=True):
    """The job that fetches the model: a new one, or the one that does so already."""

    job: str


class PlanParams(Params, kw_only=True):
    """`context_length`, in tokens, is what KV cache is planned for; unset means what a load reserves."""

    model: ModelRef
    revision: Revision | UnsetType = UNSET
    context_length: Annotated[int, Meta(ge=1, le=16_777_216)] | UnsetType = UNSET


class Plan(Result, kw_only=True):
    """What having and running a model would take, before anything happens.

    `download_bytes` is what is not on disk yet; `disk_missing_bytes` must be freed before it can come, since some room
    is left to others. `weights_bytes` and `kv_bytes` are in memory. `fits` says whether the model can run beside
    what must stay; `evicts` names the models that would go to make room, in order. `load_s` is how long the last load
    took, where there was one. An `adapter` takes `weights_bytes` in the worker of its model, and of
    memory it says no more.
    """

    model: str
    download_bytes: int
    disk_free_bytes: int
    weights_bytes: int
    kv_bytes: int
    memory_bytes: int
    memory_available_bytes: int
    fits: bool
    revision: str | None = None
    evicts: list[str] = []
    load_s: float | None = None
    kind: Literal["model", "adapter"] = "model"
    disk_missing_bytes: int = 0


class DeleteResult(Result, kw_only=True):
    freed_bytes: int


class BadFile(Result, kw_only=True):
    """`reason`: `missing`, `size`, `hash` (other bytes than the hub has under this name), or `safetensors`."""

    file: str
    reason: str


class VerifyResult(Result, kw_only=True):
    ok: bool
    bad_files: list[BadFile] = []


class CatalogEntry(Result, kw_only=True):
    """A recommended model. `uses`: `general`, `light`, `coding`, `vision`, or a user's own word. `smallest_mac_gb` is
    the unified memory of the smallest Mac that runs it comfortably; sizes that are not known are 0. `state` is the
    model's on this machine; `fits` whether it can run here."""

    model: str
    uses: list[str]
    size_bytes: int
    memory_bytes: int
    smallest_mac_gb: int
    name: str = ""
    note: str = ""
    default: bool = False
    state: ModelState = "NotDownloaded"
    fits: bool = True


class CatalogResult(Result, kw_only=True):
    """`memory_bytes` is what all models together may take on this machine."""

    entries: list[CatalogEntry]
    memory_bytes: int


class Lease(Result, kw_only=True):
    lease: str
    model: Model


class LeaseParams(Params, kw_only=True):
    lease: Name
