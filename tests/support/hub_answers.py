"""What the hub answers: its routes, the metadata in its JSON, files and redirects as the true hub has them.

A file of a repository lies under `/{repo}/resolve/{revision}/{file}`. A small one is there; an LFS one is a redirect to
another host name, where the token of the hub has no business.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import msgspec

from support import hub_faults
from support.hub_send import Answer, Gone, Sender
from support.hub_state import File, Repo, State
from support.hub_wire import Data, Request

RANGE = re.compile(r"bytes=(\d*)-(\d*)")
REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("refs", re.compile(f"/api/models/{REPO}/refs")),
    ("tree", re.compile(f"/api/models/{REPO}/tree/(?P<revision>[^/]+)")),
    ("info", re.compile(f"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?")),
    ("cached", re.compile(f"/api/resolve-cache/models/{REPO}/(?P<revision>[^/]+)/(?P<file>.+)")),
    ("lfs", re.compile(f"/lfs/{REPO}/(?P<revision>[^/]+)/(?P<file>.+)")),
    ("resolve", re.compile(f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")),
]


class Route(msgspec.Struct):
    kind: str = "nothing"
    repo: str | None = None
    revision: str = "main"
    file: str | None = None


def route_of(path: str) -> Route:
    for kind, pattern in ROUTES:
        if (match := pattern.fullmatch(path)) is not None:
            named = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            return Route(kind, **named)
    return Route()


class Answers:
    def __init__(self, state: State, port: int) -> None:
        self.state = state
        self.port = port

    def answer(self, sock: socket.socket, method: str, target: str, headers: dict[str, str]) -> bool:
        """Answer one request; False where the connection is to end."""
        path, _, query = target.partition("?")
        route = route_of(path)
        record = Request(
            number=-1,
            method=method,
            host=headers.get("host", ""),
            path=path,
            query=query,
            range=headers.get("range"),
            had_authorization="authorization" in headers,
            accept_encoding=headers.get("accept-encoding", ""),
            user_agent=headers.get("user-agent", ""),
            repo=route.repo,
            file=route.file,
            where=[],
        )
        sender = Sender(self.state, sock, record)
        answer = self._make(route, record, headers)
        record.where = self._where(route, record, answer)
        self.state.begin(record)
        try:
            self._send(sender, answer, lambda: self._make(route, record, headers))
        except Gone as gone:
            self.state.note(record, ended=str(gone) or "cut")
            return False
        except OSError:
            self.state.note(record, ended="client")
            return False
        self.state.note(record, ended="whole")
        return headers.get("connection", "").lower() != "close"

    def _send(self, sender: Sender, answer: Answer, again: Any) -> None:
        record = sender.record
        faults = self.state.fire(record, lambda fault: hub_faults.applies(fault, answer, record))
        early = [fault for fault in faults if hub_faults.is_early(fault)]
        for fault in early:
            sender.act(fault)
        if early:  # the world may have changed meanwhile
            answer = again()
        for fault in faults:
            hub_faults.shape(fault, answer, record)
        sender.head(answer)
        hub_faults.after_head(faults, record, self.state)
        if record.method != "HEAD":
            sender.body(answer, [f for f in faults if f.kind in hub_faults.IN_BODY and f not in early])

    @staticmethod
    def _where(route: Route, record: Request, answer: Answer) -> list[str]:
        serves = record.method == "GET" and route.file is not None and answer.status in (200, 206)
        return [route.kind, *(["body"] if serves else [])]

    # --- what is asked for ---

    def _make(self, route: Route, record: Request, headers: dict[str, str]) -> Answer:
        with self.state.lock:
            repo = self.state.repos.get(route.repo or "")
            if record.method not in ("GET", "HEAD"):
                return problem(405, None, "Method Not Allowed")
            if repo is None:
                return unknown_repo(headers)
            if route.kind != "lfs" and (refused := self._gate(repo, route, headers)) is not None:
                return refused
            commit = repo.resolve(route.revision)
            if route.kind == "refs":
                return as_json(refs(repo))
            if commit is None:
                return problem(404, "RevisionNotFound", f"Invalid rev id: {route.revision}")
            if route.kind == "info":
                return as_json(info(repo, commit, "blobs" in parse_qs(record.query)))
            if route.kind == "tree":
                return as_json(tree(repo.commits[commit]))
            file = repo.commits[commit].get(route.file or "")
            if file is None:
                return problem(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return self._file(route, record, commit, file)

    def _gate(self, repo: Repo, route: Route, headers: dict[str, str]) -> Answer | None:
        gate = repo.gate
        given = headers.get("authorization")
        if gate is None or given == f"Bearer {gate.token}":
            return None
        if gate.private and given is None:
            return unknown_repo(headers)
        if gate.private:
            return problem(401, None, "Invalid credentials in Authorization header")
        if route.kind in ("info", "tree", "refs") and not gate.closed:
            return None
        told = f"Access to model {repo.name} is restricted"
        return problem(401 if given is None else 403, "GatedRepo", told)

    def _file(self, route: Route, record: Request, commit: str, file: File) -> Answer:
        name = quote(route.file or "", safe="")  # whatever the name, it stays one part of the path
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if route.kind == "resolve" and file.sha256 is not None:
            signature = hashlib.sha1(f"{commit}/{name}".encode()).hexdigest()
            location = f"http://localhost:{self.port}/lfs/{route.repo}/{commit}/{name}?X-Amz-Signature={signature}"
            linked = {"X-Linked-Size": str(file.content.size), "X-Linked-ETag": f'"{file.sha256}"'}
            return redirect(302, location, headers | linked)
        if route.kind == "resolve" and self.state.relative_redirects:
            size = {"X-Linked-Size": str(file.content.size), "X-Linked-ETag": f'"{file.oid}"'}
            location = f"/api/resolve-cache/models/{route.repo}/{commit}/{name}"
            return redirect(307, location, headers | size)
        if route.kind == "lfs":
            del headers["X-Repo-Commit"]
        headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
        return ranged(record.range, Answer(200, headers, file.content, 0, file.content.size))


def ranged(asked: str | None, answer: Answer) -> Answer:
    """The part of `answer` that a Range header asks for; all of it where the header asks for nothing sensible."""
    size = answer.body.size
    match = RANGE.fullmatch(asked or "")
    if match is None or match.groups() == ("", ""):
        return answer
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= size or stop <= start:
        return problem(416, None, "Range Not Satisfiable", {"Content-Range": f"bytes */{size}"})
    answer.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Answer(206, answer.headers, answer.body, start, stop)


def as_json(value: Any) -> Answer:
    body = Data(json.dumps(value).encode())
    return Answer(200, {"Content-Type": "application/json; charset=utf-8"}, body, 0, body.size)


def redirect(status: int, location: str, headers: dict[str, str]) -> Answer:
    body = Data(f"Found. Redirecting to {location}".encode())
    return Answer(status, headers | {"Location": location, "Content-Type": "text/plain"}, body, 0, body.size)


def problem(status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> Answer:
    answer = as_json({"error": message})
    answer.status = status
    answer.headers |= {"X-Error-Message": message, **(headers or {})}
    if code is not None:
        answer.headers["X-Error-Code"] = code
    return answer


def unknown_repo(headers: dict[str, str]) -> Answer:
    """As the hub has it: whom it does not know, it asks who they are."""
    if "authorization" in headers:
        return problem(404, "RepoNotFound", "Repository not found")
    return problem(401, "RepoNotFound", "Invalid username or password.")


def info(repo: Repo, commit: str, blobs: bool) -> dict[str, Any]:
    gated = repo.gate is not None and not repo.gate.private
    return {
        "_id": commit[:24],
        "id": repo.name,
        "modelId": repo.name,
        "sha": commit,
        "lastModified": "2025-01-01T00:00:00.000Z",
        "createdAt": "2025-01-01T00:00:00.000Z",
        "private": repo.gate is not None and repo.gate.private,
        "gated": "manual" if gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": ["mlx"],
        "siblings": [sibling(name, file) if blobs else {"rfilename": name} for name, file in files_of(repo, commit)],
    }


def files_of(repo: Repo, commit: str) -> list[tuple[str, File]]:
    return sorted(repo.commits[commit].items())


def sibling(name: str, file: File) -> dict[str, Any]:
    member: dict[str, Any] = {"rfilename": name, "size": file.content.size, "blobId": file.oid}
    if file.sha256 is not None:
        member["lfs"] = {"sha256": file.sha256, "size": file.content.size, "pointerSize": file.pointer_bytes}
    return member


def tree(files: dict[str, File]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name, file in sorted(files.items()):
        entry: dict[str, Any] = {"type": "file", "path": name, "size": file.content.size, "oid": file.oid}
        if file.sha256 is not None:
            entry["lfs"] = {"oid": file.sha256, "size": file.content.size, "pointerSize": file.pointer_bytes}
        entries.append(entry)
    return entries


def refs(repo: Repo) -> dict[str, Any]:
    def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in sorted(names.items())]

    return {"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []}
