"""What a fetcher is asked for: a plan, a download, a check, the newest revisions. Each runs on a thread of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from mlxd_client.errors import InvalidParams, ModelInvalid, Unsupported

from ..childwire import Fetch, Fetched, Fetching, FetchPlan, PlanFetch, Verified, Verify, Where
from ..store import adapter
from ..store import hub as names
from ..store.folder import RESERVED_TOKENS, Folder, estimate
from ..store.folder import adapter as adapter_like
from ..store.layout import RepoCache
from ..store.verify import check_bytes, verify_snapshot
from .disk import disk_error, require_room
from .hub import Hub
from .listing import CONFIG, INDEX, File, Listing, choose, parse_object
from .parts import held
from .report import Report
from .transfer import Transfer

LATEST_S = 8.0
LATEST_THREADS = 8


def plan(hub: Hub, order: PlanFetch, report: Report) -> FetchPlan:
    where = order.where
    hub.require_online()
    cache = RepoCache(Path(where.cache), where.repo)
    listing, weights, others = survey(hub, cache, where, {})
    files = unique([*weights, *others])
    size = sum(file.size for file in [*weights, *others])
    folder = foresee(hub, cache, listing, size, sum(file.size for file in weights))
    reserved = folder.kv_token_bytes * min(folder.context_length, RESERVED_TOKENS)
    kv = folder.kv_token_bytes * min(folder.context_length, order.context_length or RESERVED_TOKENS)
    return FetchPlan(
        commit=listing.commit,
        size_bytes=size,
        download_bytes=sum(
            file.size - held(cache, file.oid, file.size) for file in files if not cache.has_blob(file.oid, file.size)
        ),
        weights_bytes=folder.weights_bytes,
        resident_bytes=folder.resident_bytes,
        kv_bytes=kv,
        memory_bytes=folder.memory_bytes - reserved + kv,
        context_length=folder.context_length,
        kind=folder.kind,
    )


def foresee(hub: Hub, cache: RepoCache, listing: Listing, size: int, weights_bytes: int) -> Folder:
    """What will be here once it is fetched."""
    if adapter.is_adapter(listing.files):
        return adapter_like(size, weights_bytes)
    config = parse_object(content(hub, cache, listing, CONFIG, {}), CONFIG)
    return estimate(dict(config), size, weights_bytes)


def fetch(hub: Hub, order: Fetch, report: Report) -> Fetched:
    """1. ask what there is; 2. see what is missing, and whether it fits; 3. fetch it; 4. let the snapshot appear."""
    where = order.where
    hub.require_online()
    report.progress = lambda: Fetching(phase="planning")
    cache = RepoCache(Path(where.cache), where.repo)
    known: dict[str, bytes] = {}
    listing, weights, others = survey(hub, cache, where, known)
    files = unique([*others, *weights])
    try:
        bad = rotten(cache, files, report) if order.repair else frozenset()
        missing = [file for file in files if file.oid in bad or not cache.has_blob(file.oid, file.size)]
        require_room(cache, missing)
        transfer = Transfer(order, hub, hub.connect(), cache, listing.commit, files, force=bad, known=known)
        report.progress = transfer.progress
        fetched = transfer.run() + sum(map(len, known.values()))
        is_commit = names.is_commit(where.revision)
        refs = [] if is_commit and not where.pin else [where.revision]
        cache.publish(listing.commit, {file.name: file.oid for file in [*others, *weights]}, refs=refs)
    except OSError as error:
        raise disk_error(error, cache, ()) from None
    size = sum(file.size for file in [*weights, *others])
    return Fetched(commit=listing.commit, size_bytes=size, fetched_bytes=fetched)


def verify(hub: Hub, order: Verify, report: Report) -> Verified:
    try:
        return Verified(bad_files=verify_snapshot(Path(order.snapshot)))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelInvalid(f"the folder cannot be read: {reason}", folder=order.snapshot) from None


def latest(hub: Hub, repos: list[str], report: Report) -> dict[str, Any]:
    """Who does not answer in time is left out: this only tells whether there is something newer."""
    hub.require_online()
    pool = ThreadPoolExecutor(LATEST_THREADS)
    asked = {pool.submit(hub.newest, repo, LATEST_S): repo for repo in repos}
    answered, _ = wait(asked, timeout=2 * LATEST_S)
    pool.shutdown(wait=False, cancel_futures=True)
    return {"commits": {asked[future]: commit for future in answered if (commit := future.result()) is not None}}


# --- what plans and downloads share ---------------------------------------------------------------------------------


def survey(hub: Hub, cache: RepoCache, where: Where, known: dict[str, bytes]) -> tuple[Listing, list[File], list[File]]:
    """What the revision holds, and of that the weights and the other files that a model, or an adapter, needs."""
    listing = hub.listing(where.repo, where.revision)
    index = content(hub, cache, listing, INDEX, known) if INDEX in listing.files else None
    weights, others = choose(listing, index)
    if adapter.is_adapter(listing.files):
        _check_adapter(content(hub, cache, listing, adapter.CONFIG, known), weights[0])
    return listing, weights, others


def _check_adapter(config: bytes, weights: File) -> None:
    """Refuse one that cannot be used before its weights come. Raises ModelInvalid."""
    format = adapter.format_of([weights.name])
    assert format is not None
    try:
        adapter.check_config(config, format)
    except (InvalidParams, Unsupported) as error:
        raise ModelInvalid(error.message, file=adapter.CONFIG) from None


def content(hub: Hub, cache: RepoCache, listing: Listing, name: str, known: dict[str, bytes]) -> bytes:
    """A small file's verified content, from the disk where it is there; what had to be fetched is added to `known`."""
    file = listing.files.get(name)
    if file is None:
        raise ModelInvalid(f"the repository has no {name}", file=name)
    try:
        if cache.has_blob(file.oid, file.size) and check_bytes(cache.blob(file.oid), file.oid, file.size) is None:
            return cache.blob(file.oid).read_bytes()
    except OSError:
        pass  # then it is fetched
    known[file.oid] = hub.small(cache.repo, listing.commit, file)
    return known[file.oid]


def unique(files: list[File]) -> list[File]:
    """Each content once: files that are equal share a blob."""
    return list({file.oid: file for file in files}.values())


def rotten(cache: RepoCache, files: list[File], report: Report) -> frozenset[str]:
    """Oids of files that are there with other bytes than they should have."""
    there = [file for file in files if cache.has_blob(file.oid, file.size)]
    done, total = 0, sum(file.size for file in files)

    def count(more: int) -> None:
        nonlocal done
        done += more

    report.progress = lambda: Fetching(phase="verifying", done_bytes=done, total_bytes=total)
    return frozenset(
        file.oid for file in there if check_bytes(cache.blob(file.oid), file.oid, file.size, count) is not None
    )
