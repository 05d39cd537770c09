"""One GET of a file's bytes, or of a range of them: redirects followed by hand, the token for the hub alone.

Nothing that a response says about names, types or hashes is believed; what it says about ranges has to be what was
asked. The client is that of huggingface_hub, so that proxies and certificates from the environment are honoured.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

MAX_REDIRECTS = 5
MAX_URL = 16_384
CONNECT_S = 10.0
READ_BYTES = 512 * 1024
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRY_AGAIN = frozenset({408, 416, 425, 429})
# How a signed address says that it is not good any more.
_EXPIRED = frozenset({400, 401, 403, 404, 410})
_CONTENT_RANGE = re.compile(r"bytes (\d{1,16})-(\d{1,16})/(\d{1,16}|\*)\Z")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Failure(Exception):
    """An attempt that brought less than was asked.

    Attributes:
        reason: a few words for people; holds no address, no token.
        host: of the server that failed.
        retry: whether trying again can help.
        retry_after_s: how long the server asks to wait.
        status: of the answer, where there was one.
        refused: the hub itself says that this user may not; `gated`: before its terms are accepted.
        wrong: all bytes came, and are not those that the hub has.
        slow: too few bytes came in the time they had; the server may not be to blame.
    """

    def __init__(
        self, reason: str, host: str = "", *, retry: bool = True, retry_after_s: float | None = None, status: int = 0,
        refused: bool = False, gated: bool = False, wrong: bool = False, slow: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(reason)
        self.reason, self.host, self.retry, self.retry_after_s = reason, host, retry, retry_after_s
        self.status, self.refused, self.gated, self.wrong, self.slow = status, refused, gated, wrong, slow


class Unranged(Exception):
    """The server knows no ranges and sends the file from its first byte."""


@dataclass(slots=True)
class Route:
    """Where a file is: at the hub's address `url`; `target` is where that led to last time."""

    url: str
    target: str | None = None


class Http:
    """
    Args:
        session: the client of huggingface_hub.
        endpoint: the hub's address; the token goes to its scheme, host and port only.
    """

    def __init__(self, session: Any, endpoint: str, token: str | None) -> None:
        self._session = session
        self._origin = origin(endpoint)
        self._token = token
        read_more_at_once()

    @contextlib.contextmanager
    def get(self, route: Route, start: int, stop: int, size: int, idle_s: float) -> Iterator[Iterator[bytes]]:
        """Ask for bytes `start` to `stop` of a file of `size`; gives their pieces, which may add up to less or more.

        Args:
            idle_s: seconds without any byte that are too many.

        Raises: Failure, also while the pieces are read; Unranged.
        """
        whole = start == 0 and stop == size
        response, host = self._follow(route, None if whole else f"bytes={start}-{stop - 1}", idle_s)
        try:
            check_answer(response.status_code, response.headers, None if whole else (start, stop), size, host)
            yield _pieces(response, host)
        except Failure as failure:  # also what its reader finds wrong with it
            failure.host = failure.host or host
            raise
        finally:
            response.close()

    def _follow(self, route: Route, ranged: str | None, idle_s: float) -> tuple[Any, str]:
        url = route.target or route.url
        for _ in range(MAX_REDIRECTS + 2):
            response = self._send(url, ranged, idle_s)
            host = urlsplit(url).hostname or ""
            status = response.status_code
            if status in (200, 206):
                route.target = url if url != route.url else None
                return response, host
            headers = response.headers
            response.close()
            if status in _EXPIRED and url == route.target:
                route.target, url = None, route.url
            elif status in _REDIRECTS:
                url = next_url(url, headers.get("location", ""))
            else:
                refused = status in (401, 403) and origin(url) == self._origin
                retry = status >= 500 or status in _TRY_AGAIN
                raise Failure(
                    f"HTTP {status}", host, retry=retry, retry_after_s=retry_after(headers.get("retry-after")),
                    status=status, refused=refused, gated=headers.get("x-error-code") == "GatedRepo",
                )  # fmt: skip
        raise Failure(f"more than {MAX_REDIRECTS} redirects", urlsplit(route.url).hostname or "")

    def _send(self, url: str, ranged: str | None, idle_s: float) -> Any:
        headers = {"Accept-Encoding": "identity"}
        if ranged:
            headers["Range"] = ranged
        if self._token and origin(url) == self._origin:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            request = self._session.build_request(
                "GET", url, headers=headers, timeout=(min(CONNECT_S, idle_s), idle_s, idle_s, None)
            )
            return self._session.send(request, stream=True, follow_redirects=False)
        except Exception as error:
            raise Failure(reason_of(error), urlsplit(url).hostname or "") from None


def _pieces(response: Any, host: str) -> Iterator[bytes]:
    try:
        yield from response.iter_raw()
    except Exception as error:
        raise Failure(reason_of(error), host, slow=type(error).__name__ == "ReadTimeout") from None


def check_answer(status: int, headers: Any, ranged: tuple[int, int] | None, size: int, host: str) -> None:
    """Whether this is the answer to what was asked. Raises Failure, Unranged."""
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise Failure("the answer is compressed, which was not asked for", host)
    length = headers.get("content-length")
    if ranged is None:
        if status != 200 or (length is not None and length != str(size)):
            raise Failure("the answer is not as long as the file", host)
        return
    if status == 200:
        raise Unranged
    start, stop = ranged
    match = _CONTENT_RANGE.match(headers.get("content-range", ""))
    if not match or (int(match[1]), int(match[2])) != (start, stop - 1) or match[3] not in ("*", str(size)):
        raise Failure("the answer is another range than was asked for", host)
    if length is not None and length != str(stop - start):
        raise Failure("the answer is not as long as the range", host)


def origin(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of an address; ("", "", 0) of one that is none."""
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError:
        return "", "", 0


def next_url(url: str, location: str) -> str:
    """Where a redirect leads. Raises Failure where it may not lead: only http(s), and never from https to http."""
    host = urlsplit(url).hostname or ""
    if not location or len(location) > MAX_URL or not location.isascii() or not location.isprintable():
        raise Failure("a redirect to nowhere", host)
    try:
        target = urlsplit(urljoin(url, location))
        sound = target.scheme in _DEFAULT_PORTS and target.hostname and target.port != 0
    except ValueError:
        sound = False
    if not sound or target.username is not None or target.password is not None:
        raise Failure("a redirect to what is no address", host)
    if urlsplit(url).scheme == "https" and target.scheme != "https":
        raise Failure("a redirect from https to http", host, retry=False)
    return target._replace(fragment="").geturl()


def retry_after(value: str | None) -> float | None:
    """Seconds; None where the header is absent or says no number of them."""
    value = (value or "").strip()
    return float(value) if value.isascii() and value.isdigit() and len(value) <= 9 else None


def reason_of(error: BaseException) -> str:
    """A few words about an error of the HTTP client, whose own words may hold addresses and headers."""
    name = type(error).__name__
    if "Timeout" in name:
        return "no connection in time" if "Connect" in name else "nothing came in time"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate was not accepted: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {cause.reason or 'unknown reason'}"
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
            return os.strerror(cause.errno)
        if isinstance(cause, OSError) and type(cause).__name__ == "gaierror":
            return "its name cannot be resolved"
        cause = cause.__cause__ or cause.__context__
    return {
        "ConnectError": "no connection", "ReadError": "the connection broke", "WriteError": "the connection broke",
        "RemoteProtocolError": "the connection broke off", "ProxyError": "the proxy refused",
    }.get(name, name)  # fmt: skip


def read_more_at_once() -> None:
    """Have the client read half a megabyte from a socket at a time, not 64 KB: it is Python code that runs for each.

    The constant is the HTTP library's own, a class attribute; where a later one has none, downloads are just slower.
    """
    for module in ("httpcore2._sync.http11", "httpcore._sync.http11"):
        connection = getattr(sys.modules.get(module), "HTTP11Connection", None)
        if connection is not None and isinstance(getattr(connection, "READ_NUM_BYTES", None), int):
            connection.READ_NUM_BYTES = READ_BYTES
