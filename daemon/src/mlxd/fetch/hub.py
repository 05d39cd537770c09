"""The hub through huggingface_hub: what a revision holds, who we are, what its refusals mean to people."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.utils import get_session

from mlxd_client.errors import DownloadFailed, ModelNotFound, PermissionDenied, RpcError, VerificationFailed

from ..store import hub as names
from ..store.verify import Hasher
from .http import Failure, Http, Route, reason_of, retry_after
from .listing import MAX_JSON_BYTES, File, Listing, read_listing
from .pace import delay_s

METADATA_BYTES = 8 * 1024 * 1024
METADATA_S = 60.0
TIMEOUT_S = 15.0
ATTEMPTS = 3
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}\Z")

T = TypeVar("T")


class Hub:
    """Everything that is asked of the hub. Methods block, and raise what the wire knows.

    Args:
        secrets: the variables with the hub's token, which the process's environment does not hold any more.
    """

    def __init__(self, secrets: dict[str, str]) -> None:
        self._secrets = secrets
        self._lock = threading.Lock()
        self._http: Http | None = None
        self._api: HfApi | None = None
        self._token: str | None = None
        self._bounds = _Bounds()
        self.endpoint = constants.ENDPOINT.rstrip("/")

    # --- who we are

    def require_online(self) -> None:
        """Raises DownloadFailed in offline mode."""
        if constants.HF_HUB_OFFLINE:
            raise DownloadFailed("the hub is not asked: offline mode is on (HF_HUB_OFFLINE)", reason="offline")

    def connect(self) -> Http:
        """The way to the hub's files. Raises DownloadFailed, PermissionDenied."""
        self.require_online()
        with self._lock:
            if self._http is None:
                session = get_session()
                self._token = self._find_token()
                self._api = HfApi(endpoint=self.endpoint, token=self._token or False)
                self._bounds.attach(session)
                self._http = Http(session, self.endpoint, self._token)
            return self._http

    def _find_token(self) -> str | None:
        """As huggingface_hub finds it; it may ask the hub to renew one."""
        if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            return None
        os.environ.update(self._secrets)
        try:
            token = get_token()
        except Exception as error:
            raise DownloadFailed(f"no token could be had from the hub: {type(error).__name__}") from None
        finally:
            for name in self._secrets:
                os.environ.pop(name, None)
        if token is not None and not _TOKEN.match(token):
            raise PermissionDenied("the token for the hub holds characters that no token has; log in: `hf auth login`")
        return token or None

    # --- metadata

    def listing(self, repo: str, revision: str) -> Listing:
        """What the revision holds. Raises ModelNotFound, PermissionDenied, DownloadFailed."""
        _check_names(repo, revision)
        info = self._metadata_of(repo, revision, files_metadata=True, timeout=TIMEOUT_S)
        found = read_listing(
            info.sha,
            (
                (it.rfilename, *((it.lfs.size, it.lfs.sha256) if it.lfs else (it.size, it.blob_id)))
                for it in info.siblings or ()
            ),
        )
        if names.is_commit(revision) and found.commit != revision:
            raise DownloadFailed("the hub's answer is about another commit than was asked for")
        return found

    def newest(self, repo: str, timeout_s: float) -> str | None:
        """The commit that the repository's `main` is at; None where the hub does not say."""
        try:
            self.connect()
            _check_names(repo, names.MAIN)
            with self._bounds:
                commit = self._require_api().model_info(repo, revision=names.MAIN, timeout=timeout_s).sha
        except Exception:
            return None
        return commit if isinstance(commit, str) and names.is_commit(commit) else None

    def _metadata_of(self, repo: str, revision: str, **how: Any) -> Any:
        self.connect()

        def ask() -> Any:
            try:
                with self._bounds:
                    return self._require_api().model_info(repo, revision=revision, **how)
            except Exception as error:
                raise self._judge(error, repo, revision) from None

        return self._patiently(ask)

    def _require_api(self) -> HfApi:
        assert self._api is not None
        return self._api

    # --- files

    def route(self, repo: str, name: str, commit: str) -> Route:
        return Route(hf_hub_url(repo, name, revision=commit, endpoint=self.endpoint))

    def small(self, repo: str, commit: str, file: File) -> bytes:
        """A file's verified content. Raises DownloadFailed, PermissionDenied."""
        if file.size > MAX_JSON_BYTES:
            raise DownloadFailed(f"{file.name} is larger than {MAX_JSON_BYTES} bytes", file=file.name)
        http, route = self.connect(), self.route(repo, file.name, commit)

        def get() -> bytes:
            deadline = time.monotonic() + METADATA_S
            raw = bytearray()
            with http.get(route, 0, file.size, file.size, TIMEOUT_S) as pieces:
                for piece in pieces:
                    raw += piece
                    if len(raw) > file.size:
                        raise Failure("more bytes came than were asked for")
                    if time.monotonic() > deadline:
                        raise Failure("it came too slowly")
            hasher = Hasher(file.oid, file.size)
            hasher.update(raw)
            if not hasher.matches():
                raise Failure("other bytes came than the hub has", wrong=True)
            return bytes(raw)

        if file.size == 0:
            return b""
        return self._patiently(get, file.name, repo)

    def _patiently(self, action: Callable[[], T], name: str = "", repo: str = "") -> T:
        """Try until it works, at most ATTEMPTS times. Raises what a Failure comes to, then."""
        failures = 0
        while True:
            try:
                return action()
            except Failure as failure:
                failures += 1
                if not failure.retry or failures >= ATTEMPTS:
                    raise self.explain(failure, name, repo, failures) from None
                time.sleep(delay_s(failures, failure.retry_after_s))

    # --- refusals, in words

    def explain(self, failure: Failure, name: str, repo: str, attempts: int) -> RpcError:
        """What becomes of a download that this was the last failure of."""
        if failure.refused:
            return self._refused(failure.status, repo, failure.gated)
        facts: dict[str, Any] = {"attempts": attempts, "reason": failure.reason}
        facts |= {key: value for key, value in (("file", name), ("host", failure.host)) if value}
        tries = f" (tried {attempts} times)" if attempts > 1 else ""
        if failure.wrong:
            return VerificationFailed(f"{name}: {failure.reason}{tries}", **facts)
        if not name:
            return DownloadFailed(f"the hub at {failure.host} could not be asked: {failure.reason}{tries}", **facts)
        return DownloadFailed(f"{name} could not be fetched from {failure.host}: {failure.reason}{tries}", **facts)

    def _judge(self, error: Exception, repo: str, revision: str) -> Exception:
        """What an exception of huggingface_hub's metadata calls means: an RpcError, or a Failure."""
        host = Route(self.endpoint).url.partition("://")[2].partition("/")[0].rpartition("@")[2]
        if isinstance(error, Failure):
            error.host = host
            return error
        response = getattr(error, "response", None)
        status, headers = getattr(response, "status_code", 0), getattr(response, "headers", {})
        if status in (401, 403):
            return self._refused(status, repo, gated=headers.get("x-error-code") == "GatedRepo")
        if status == 404:
            if headers.get("x-error-code") == "RevisionNotFound":
                return ModelNotFound(f"{repo} has no revision {revision}", model=repo, revision=revision)
            return ModelNotFound(f"the hub has no model {repo}, or no revision {revision} of it", model=repo)
        if status >= 400:
            retry = status >= 500 or status in (408, 425, 429)
            after = retry_after(headers.get("retry-after"))
            return Failure(f"HTTP {status}", host, retry=retry, retry_after_s=after, status=status)
        if isinstance(error, (TypeError, ValueError, KeyError, AttributeError, RecursionError)):
            return Failure("its answer makes no sense", host, retry=False)
        return Failure(reason_of(error), host)

    def _refused(self, status: int, repo: str, gated: bool = False) -> PermissionDenied:
        page = f"{self.endpoint}/{repo}"
        if gated:
            todo = f"{repo} is gated: accept its terms at {page}"
            todo += "" if self._token else ", then log in with `hf auth login` or set HF_TOKEN"
        elif self._token:
            todo = (
                f"the hub refuses {repo} to the token in use: it is private or gated ({page}), does not exist, or the "
                "token is not valid any more; `hf auth login` sets another"
            )
        else:
            todo = (
                f"the hub refuses {repo} to who is not logged in: it is private or gated ({page}), or does not exist; "
                "log in with `hf auth login` or set HF_TOKEN"
            )
        return PermissionDenied(todo, model=repo, status=status)


def _check_names(repo: str, revision: str) -> None:
    if not names.is_repo_id(repo):
        raise ModelNotFound(f"{repo[:120]!r} is no repository's id")
    if not names.is_revision(revision):
        raise ModelNotFound(f"{revision[:120]!r} is no name that a revision can have", model=repo)


class _Bounds:
    """Inside `with`, answers end after so many bytes or seconds: huggingface_hub reads them whole, however long."""

    def __init__(self) -> None:
        self._here = threading.local()

    def attach(self, session: Any) -> None:
        stream = sys.modules[type(session).__module__.partition(".")[0]].SyncByteStream

        class Bounded(stream):  # type: ignore[misc, valid-type]
            def __init__(self, inner: Any, deadline: float) -> None:
                self.close = inner.close
                self._pieces = _bounded(inner, deadline)

            def __iter__(self) -> Iterator[bytes]:
                return self._pieces

        def bind(response: Any) -> None:
            deadline: float | None = getattr(self._here, "deadline", None)
            if deadline is not None:
                response.stream = Bounded(response.stream, deadline)

        hooks = session.event_hooks
        session.event_hooks = {**hooks, "response": [*hooks["response"], bind]}

    def __enter__(self) -> None:
        self._here.deadline = time.monotonic() + METADATA_S

    def __exit__(self, *_: object) -> None:
        self._here.deadline = None


def _bounded(pieces: Iterable[bytes], deadline: float) -> Iterator[bytes]:
    count = 0
    for piece in pieces:
        count += len(piece)
        if count > METADATA_BYTES:
            raise Failure(f"its answer is longer than {METADATA_BYTES} bytes", retry=False)
        if time.monotonic() > deadline:
            raise Failure("its answer came too slowly")
        yield piece
