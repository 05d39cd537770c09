"""The faults: which there are, where each one strikes, and how it changes an answer."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from support.hub_send import Answer, place
from support.hub_state import State
from support.hub_wire import Data, Fault, Request

METADATA = ["info", "tree"]
FILES = ["resolve", "cached", "lfs"]
ANYWHERE = [*METADATA, "refs", *FILES]

# Where a kind strikes if the test does not say.
KINDS: dict[str, list[str]] = {
    "drop": ["body"],
    "reset": ["body"],
    "stall": ["body"],
    "hold": ["body"],
    "trickle": ["body"],
    "flip": ["body"],
    "short": ["body"],
    "short_length": ["body"],
    "ignore_range": ["body"],
    "wrong_range": ["body"],
    "wrong_total": ["body"],
    "chunked": ["body"],
    "gzip": ["body"],
    "status": ANYWHERE,
    "etag": FILES,
    "header": FILES,
    "commit": [*METADATA, *FILES],
    "redirect": ["resolve"],
    "size": [*METADATA, "resolve"],
    "oid": METADATA,
    "strip": METADATA,
    "sibling": METADATA,
    "patch": ["info"],
    "json": METADATA,
    "raw": METADATA,
    "huge": ["info"],
    "moves": ["info"],
}
IN_BODY = {"drop", "reset", "stall", "hold", "trickle", "flip", "short"}
ABOUT_SIBLINGS = {"size", "oid", "strip", "sibling"}
METADATA_KINDS = {*ABOUT_SIBLINGS, "patch", "commit", "json", "raw", "huge", "moves"}


def is_early(fault: Fault) -> bool:
    """Whether it happens before a byte is answered."""
    return fault.kind in ("drop", "reset", "stall", "hold") and fault.after is None and fault.at is None


def applies(fault: Fault, answer: Answer, record: Request) -> bool:
    """Whether a fault that matches the request has something to act on in its answer."""
    if fault.kind in ("ignore_range", "wrong_range", "wrong_total"):
        return answer.status == 206
    if fault.kind in METADATA_KINDS and record.file is None:
        return answer.status == 200
    if fault.kind == "gzip":
        return "gzip" in record.accept_encoding
    if fault.kind in IN_BODY and not is_early(fault):
        if record.method == "HEAD":
            return False
        reached = answer.start <= place(fault, answer) <= answer.stop
        return reached and (fault.kind != "flip" or place(fault, answer) < answer.stop)
    return True


def shape(fault: Fault, answer: Answer, record: Request) -> None:
    if (change := SHAPES.get(fault.kind)) is not None:
        change(fault, answer, record)


def after_head(faults: list[Fault], record: Request, state: State) -> None:
    for fault in faults:
        if fault.kind == "moves":
            with state.lock:
                state.repos[record.repo or ""].branches["main"] = fault.value


def _replace(answer: Answer, body: Any) -> None:
    answer.body, answer.start, answer.stop = body, 0, body.size


def _status(fault: Fault, answer: Answer, record: Request) -> None:
    answer.status = fault.status
    answer.headers = {"Content-Type": "application/json"}
    if fault.retry_after is not None:
        answer.headers["Retry-After"] = fault.retry_after
    if fault.code is not None:
        answer.headers["X-Error-Code"] = fault.code
    _replace(answer, Data(b'{"error": "as the test wished"}'))


# --- files ---


def _short_length(fault: Fault, answer: Answer, record: Request) -> None:
    answer.stop = max(answer.start, answer.stop - fault.by)


def _ignore_range(fault: Fault, answer: Answer, record: Request) -> None:
    answer.headers.pop("Content-Range", None)
    answer.status, answer.start, answer.stop = 200, 0, answer.body.size


def _wrong_range(fault: Fault, answer: Answer, record: Request) -> None:
    """Another part than was asked for, and said so: `by` bytes later, and shorter where the file ends."""
    answer.start = min(answer.start + fault.by, answer.stop - 1)
    answer.stop = min(answer.stop + fault.by, answer.body.size)
    answer.headers["Content-Range"] = f"bytes {answer.start}-{answer.stop - 1}/{answer.body.size}"


def _wrong_total(fault: Fault, answer: Answer, record: Request) -> None:
    total = answer.body.size + fault.by if fault.value is None else fault.value
    answer.headers["Content-Range"] = f"bytes {answer.start}-{answer.stop - 1}/{total}"


def _chunked(fault: Fault, answer: Answer, record: Request) -> None:
    answer.chunked = True


def _gzip(fault: Fault, answer: Answer, record: Request) -> None:
    whole = b"".join(bytes(piece) for piece in answer.body.pieces(0, answer.body.size))
    answer.headers.pop("Content-Range", None)
    answer.headers["Content-Encoding"] = "gzip"
    answer.status, answer.chunked = 200, True
    _replace(answer, Data(gzip.compress(whole, 1)))


def _etag(fault: Fault, answer: Answer, record: Request) -> None:
    for name in ("ETag", "X-Linked-ETag"):
        if name in answer.headers:
            digits = len(answer.headers[name]) - 2
            answer.headers[name] = f'"{"0" * digits if fault.value is None else fault.value}"'


def _header(fault: Fault, answer: Answer, record: Request) -> None:
    for name, value in fault.value.items():
        answer.headers = {key: old for key, old in answer.headers.items() if key.lower() != name.lower()}
        if value is not None:
            answer.headers[name] = value


def _redirect(fault: Fault, answer: Answer, record: Request) -> None:
    target = record.path + (f"?{record.query}" if record.query else "")
    answer.status = fault.status or 302
    answer.headers["Location"] = target if fault.value is None else fault.value
    _replace(answer, Data(b"Elsewhere."))


# --- metadata ---


def _json(answer: Answer, value: Any) -> None:
    _replace(answer, Data(value if isinstance(value, bytes) else json.dumps(value).encode()))


def _entries(answer: Answer, change: Callable[[dict[str, Any]], None], fault: Fault) -> None:
    """Change the file entries, of an `info` or a `tree`, whose names match the fault's."""
    value = json.loads(answer.body.data)
    for entry in value["siblings"] if isinstance(value, dict) else value:
        if fault.file is None or fnmatchcase(entry.get("rfilename") or entry.get("path"), fault.file):
            change(entry)
    _json(answer, value)


def _size(fault: Fault, answer: Answer, record: Request) -> None:
    def change(entry: dict[str, Any]) -> None:
        entry["size"] = fault.value
        if "lfs" in entry:
            entry["lfs"]["size"] = fault.value

    if "resolve" not in record.where:
        _entries(answer, change, fault)
    elif "X-Linked-Size" in answer.headers:
        answer.headers["X-Linked-Size"] = str(fault.value)


def _oid(fault: Fault, answer: Answer, record: Request) -> None:
    def change(entry: dict[str, Any]) -> None:
        holder, name = (entry, "blobId" if "rfilename" in entry else "oid")
        if "lfs" in entry:
            holder, name = entry["lfs"], "sha256" if "rfilename" in entry else "oid"
        holder[name] = fault.value

    _entries(answer, change, fault)


def _strip(fault: Fault, answer: Answer, record: Request) -> None:
    def change(entry: dict[str, Any]) -> None:
        for dotted in fault.value:
            *path, last = dotted.split(".")
            holder = entry
            for name in path:
                holder = holder.get(name, {})
            holder.pop(last, None)

    _entries(answer, change, fault)


def _sibling(fault: Fault, answer: Answer, record: Request) -> None:
    _entries(answer, lambda entry: entry.update(fault.value), fault)


def _patch(fault: Fault, answer: Answer, record: Request) -> None:
    _json(answer, json.loads(answer.body.data) | fault.value)


def _commit(fault: Fault, answer: Answer, record: Request) -> None:
    if "X-Repo-Commit" in answer.headers:
        answer.headers["X-Repo-Commit"] = str(fault.value)
    if "info" in record.where:
        _json(answer, json.loads(answer.body.data) | {"sha": fault.value})


def _instead(fault: Fault, answer: Answer, record: Request) -> None:
    _json(answer, fault.value)


class Huge:
    """A JSON document of about `size` bytes: metadata with more and more siblings."""

    ENTRY = b'{"rfilename":"a-file-that-nobody-has-ever-asked-for.safetensors","size":1},'
    TAIL = b'{"rfilename":"last.safetensors","size":1}]}'

    def __init__(self, size: int, sha: str) -> None:
        self.start = json.dumps({"id": "org/huge", "sha": sha}).encode()[:-1] + b',"siblings":['
        self.count = max(1, size // len(self.ENTRY))
        self.size = len(self.start) + self.count * len(self.ENTRY) + len(self.TAIL)

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        batch = 4096
        parts = [
            self.start,
            *([self.ENTRY * batch] * (self.count // batch)),
            self.ENTRY * (self.count % batch),
            self.TAIL,
        ]
        position = 0
        for part in parts:
            begin, end = max(start - position, 0), min(stop - position, len(part))
            if begin < end:
                yield memoryview(part)[begin:end]
            position += len(part)


def _huge(fault: Fault, answer: Answer, record: Request) -> None:
    _replace(answer, Huge(fault.value, json.loads(answer.body.data)["sha"]))


SHAPES: dict[str, Callable[[Fault, Answer, Request], None]] = {
    "status": _status,
    "short_length": _short_length,
    "ignore_range": _ignore_range,
    "wrong_range": _wrong_range,
    "wrong_total": _wrong_total,
    "chunked": _chunked,
    "gzip": _gzip,
    "etag": _etag,
    "header": _header,
    "redirect": _redirect,
    "size": _size,
    "oid": _oid,
    "strip": _strip,
    "sibling": _sibling,
    "patch": _patch,
    "commit": _commit,
    "json": _instead,
    "raw": _instead,
    "huge": _huge,
}
