"""A programmable Hugging Face hub on loopback: a real HTTP server in a process of its own, that errs on demand.

    with Hub() as hub:
        commit = hub.commit("org/name", {"config.json": b"{}", "model.safetensors": Sparse(1 << 30)})
        hub.fault("org/name", "drop", file="model.safetensors", after=1000, times=2)
        subprocess.run([...], env=os.environ | hub.env(cache))
        assert hub.requests()[0].had_authorization

huggingface_hub works against `hub.endpoint` as against the true one. Methods may be called from any thread; those that
wait raise TimeoutError after `PATIENCE_S`.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from support.hub_wire import Content, Data, Fault, OnDisk, Reply, Request, Sparse, sparse_safetensors

__all__ = ["EVIL_ETAGS", "EVIL_NAMES", "Fault", "Hub", "Request", "Sparse", "sparse_safetensors"]

PATIENCE_S = 60.0
LFS = ("*.safetensors", "*.bin", "*.gguf")

# Names that a repository may claim its files have, none of which may become a path.
EVIL_NAMES = (
    "../../x",
    "/etc/x",
    "a/../../b",
    "a/./b",
    "a//b",
    "..",
    ".",
    "nul\0byte.json",
    "n" * 5000 + ".json",
    "back\\..\\..\\slash.json",
    "C:x.json",
    "C:\\x.json",
    ".git/x",
    ".git/hooks/post-checkout",
    "line\nbreak.json",
    "escape\x1b[2J.json",
    "modeling_evil.py",
    "pytorch_model.bin",
    "model.pt",
    "data.pkl",
)
EVIL_ETAGS = ("../../../x", "/etc/x", "a/b", "..", "", "x" * 5000, "%2e%2e%2fx", "C:x", "nul\0byte")


class Hub:
    """The process and its remote control."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._secret = ""
        self.port = 0

    def __enter__(self) -> Hub:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.hub_server"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        words = self._process.stdout.readline().split()
        if len(words) != 2:
            self.__exit__()
            raise RuntimeError("the hub's process did not start")
        self.port, self._secret = int(words[0]), words[1].decode()
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def env(self, cache: Path | str | None = None) -> dict[str, str]:
        """What a process needs in its environment to take this hub for the true one. Proxies are switched off."""
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
        env = dict.fromkeys(names, "") | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return env | ({} if cache is None else {"HF_HUB_CACHE": str(cache)})

    # --- repositories ---

    def commit(
        self,
        repo: str,
        files: Mapping[str, bytes | Path | Sparse],
        *,
        branch: str = "main",
        lfs: Iterable[str] = LFS,
        tag: str | None = None,
    ) -> str:
        """Make `files` all that `branch` has, and return the commit (40 hex digits, the same for the same files).

        Args:
            files: contents by name, whatever the name. A Path's file must stay as it is.
            lfs: patterns of the names that are kept in LFS: known by their sha256, and served from another host name.
            tag: a tag to set on the commit.
        """
        contents = {name: _content(content) for name, content in files.items()}
        return str(self._call("commit", repo=repo, files=contents, branch=branch, lfs=list(lfs), tag=tag))

    def move(self, repo: str, commit: str, *, branch: str = "main") -> None:
        """Let a branch point to another commit that the repository has."""
        self._call("move", repo=repo, branch=branch, commit=commit)

    def tag(self, repo: str, name: str, commit: str) -> None:
        self._call("tag", repo=repo, name=name, commit=commit)

    def remove(self, repo: str) -> None:
        self._call("remove", repo=repo)

    def etags(self, repo: str, commit: str) -> dict[str, str]:
        """Each file's etag: the sha256 of an LFS file, the git oid of another; the names of blobs in a cache."""
        return dict(self._call("etags", repo=repo, commit=commit))

    def gate(self, repo: str, token: str, *, private: bool = False, closed: bool = False) -> None:
        """Files only for those who have the token: 401 without one, 403 with another (X-Error-Code: GatedRepo).

        Args:
            private: 401 in both cases, metadata too; without a token the repository seems not to exist.
            closed: refuse the metadata of a gated repository too. The true hub shows it to all.
        """
        self._call("gate", repo=repo, gate={"token": token, "private": private, "closed": closed})

    def ungate(self, repo: str) -> None:
        self._call("gate", repo=repo, gate=None)

    def relative_redirects(self, on: bool = True) -> None:
        """Serve small files from another path of the same host, by a relative redirect, as the true hub does."""
        self._call("relative_redirects", on=on)

    def model(self, repo: str, *, shards: int = 1, branch: str = "main", **build: Any) -> str:
        """Commit a genuine small model that mlx_lm loads, in as many safetensors files as asked for, at most one a
        tensor. `build` goes to tiny_model.build. Returns the commit."""
        return self.commit(repo, model_files(shards, **build), branch=branch)

    def synthetic(
        self, repo: str, *, shards: int = 1, shard_bytes: int = 1 << 20, hashed: bool = True, branch: str = "main"
    ) -> str:
        """Commit what looks like a model (config, tokenizer, index, valid safetensors) without MLX, of any size.

        Args:
            hashed: False gives the shards made-up sha256: the commit is there at once, but never verifies.
        """
        return self.commit(repo, synthetic_files(shards, shard_bytes, hashed=hashed), branch=branch)

    # --- misbehaviour ---

    def fault(self, repo: str, kind: str, **how: Any) -> int:
        """Put a fault in force and return its id. `repo` may be `*`.

        Which requests: `file` (a pattern), `where` (a list: see hub_faults.KINDS for those that a kind has by default;
        `info`, `tree`, `refs`, `resolve`, `cached`, `lfs` by route, and `body`: every GET that gives bytes of a file),
        `method`, `skip` (spare so many first), `times` (then befall so many; for ever by default).

        Where in the body: `after` bytes of this answer, or `at` an offset of the file (answers that do not reach it
        are spared). Neither: `drop`, `reset`, `stall` and `hold` act before anything is answered, others at its start.

        Kinds, with what they take:
            drop        the connection ends there
            reset       what was sent arrives, then the connection breaks
            stall       nothing more comes, until the client goes
            hold        nothing more comes, until `release` (or `clear`)
            trickle     `bytes_per_s` from there on
            flip        the byte there differs by the bits of `by` (default 1)
            short       the last `by` bytes never come, and the connection ends
            short_length    the same, and Content-Length fits: the file is just shorter
            ignore_range    200 and all of the file where a range was asked for
            wrong_range     206 with the range `by` bytes after the one asked for; the bytes are of the range it says
            wrong_total     206 with another total (`value`, or `by` more) in Content-Range
            chunked     no Content-Length
            gzip        chunked, and compressed if the client accepts that; no ranges
            status      `status`, with `retry_after` (text) and `code` (X-Error-Code)
            etag        ETag and X-Linked-ETag become `value` (default: zeros of the same length)
            header      `value` is a mapping: headers set, or taken away by None
            commit      X-Repo-Commit and the metadata's sha become `value`; `tag` makes that a revision that exists
            redirect    to `value` (default: to itself, for ever), with `status` (default 302)
            size        the metadata's sizes and X-Linked-Size of `file` become `value`; the body stays
            oid         the metadata's hash of `file` becomes `value`
            strip       members (`value`: a list, as `lfs` or `lfs.sha256`) are missing in the metadata of `file`
            sibling     `value` is merged into the metadata of `file`
            patch       `value` is merged into the metadata
            json raw    the metadata is `value`, as JSON or as bytes
            huge        the metadata is a valid document of `value` bytes
            moves       once the metadata is answered, main points to the commit `value`
        """
        return int(self._call("fault", fault=Fault(kind=kind, repo=repo, **how)))

    def fired(self, fault: int) -> int:
        """How often a fault befell a request."""
        return int(self._call("fired", id=fault))

    def clear(self, fault: int | None = None, *, repo: str | None = None) -> None:
        """Take one fault out of force, those of a repository, or all."""
        self._call("clear", id=fault, repo=repo)

    def release(self, *, repo: str | None = None, file: str | None = None, keep: bool = False) -> None:
        """Let all that is held go on, and hold no more. `repo` and `file` are those given to the fault.

        Args:
            keep: let go what is held now, all of it, but hold what comes next.
        """
        self._call("release", repo=repo, file=file, keep=keep)

    def throttle(self, bytes_per_s: float | None) -> None:
        """All bodies together, at most so fast. None: as fast as it goes."""
        self._call("throttle", bytes_per_s=float(bytes_per_s or 0.0))

    def pause(self) -> None:
        """No body goes on, until `resume`."""
        self._call("pause", on=True)

    def resume(self) -> None:
        self._call("pause", on=False)

    # --- what happened ---

    def requests(self, **which: Any) -> list[Request]:
        """The requests so far, in order of arrival, whose members are as said: `path` and `file` are patterns, `where`
        is one of the places, `ended="*"` is any end."""
        return self.wait_requests(0, **which)

    def forget(self) -> None:
        """Start the records anew."""
        self._call("forget")

    def sent(self, file: str, *, repo: str | None = None) -> int:
        """Bytes of a file that were sent, in all answers together. `file` is a pattern."""
        return int(self._call("sent", file=file, repo=repo))

    def wait_requests(self, count: int, *, timeout_s: float = PATIENCE_S, **which: Any) -> list[Request]:
        """Those requests, once there are `count`."""
        found = self._call("wait_requests", count=count, which=which, timeout_s=timeout_s)
        return msgspec.convert(found, list[Request])

    def wait_held(self, count: int = 1, *, timeout_s: float = PATIENCE_S, **which: Any) -> list[Request]:
        """Those requests whose answers are held, once there are `count`."""
        return self.wait_requests(count, timeout_s=timeout_s, held=True, **which)

    def wait_bytes(self, file: str, at_least: int, *, repo: str | None = None, timeout_s: float = PATIENCE_S) -> int:
        """Wait until so many bytes of a file were sent, in all answers together; how many they are."""
        return int(self._call("wait_bytes", file=file, at_least=at_least, repo=repo, timeout_s=timeout_s))

    def _call(self, method: str, **params: Any) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10 * PATIENCE_S)
        try:
            body = msgspec.msgpack.encode({"method": method, "params": params})
            connection.request("POST", f"/{self._secret}", body)
            reply = msgspec.msgpack.decode(connection.getresponse().read(), type=Reply)
        finally:
            connection.close()
        if reply.timed_out:
            raise TimeoutError(reply.error)
        if reply.error is not None:
            raise ValueError(reply.error)
        return reply.result


def _content(content: bytes | Path | Sparse) -> Content:
    if isinstance(content, bytes):
        return Data(content)
    if isinstance(content, Path):
        return OnDisk(os.fspath(content.absolute()), content.stat().st_size)
    return content


# --- models ---


def model_files(shards: int = 1, **build: Any) -> dict[str, bytes]:
    """The files of a genuine small model. Building it imports MLX."""
    return dict(_model_files(shards, json.dumps(build, sort_keys=True)))


@lru_cache(maxsize=16)
def _model_files(shards: int, build: str) -> dict[str, bytes]:
    from support import tiny_model

    options = json.loads(build)
    options.setdefault("layers", max(2, -(-(shards - 3) // 11)))  # a layer has 11 tensors; 3 are in none
    with tempfile.TemporaryDirectory() as folder:
        tiny_model.build(Path(folder), **options)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return files if shards == 1 else files | split(files.pop("model.safetensors"), shards)


def split(safetensors: bytes, shards: int) -> dict[str, bytes]:
    """One safetensors file as several, and the index that says which tensor is where."""
    header_bytes = int.from_bytes(safetensors[:8], "little")
    header = json.loads(safetensors[8 : 8 + header_bytes])
    metadata = header.pop("__metadata__", {})
    data = safetensors[8 + header_bytes :]
    names = sorted(header)
    if shards > len(names):
        raise ValueError(f"{len(names)} tensors do not fill {shards} files")
    files: dict[str, bytes] = {}
    weight_map: dict[str, str] = {}
    for number in range(shards):
        shard = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        parts = [data[slice(*header[name]["data_offsets"])] for name in mine]
        files[shard] = _joined(mine, parts, header, metadata)
        weight_map |= dict.fromkeys(mine, shard)
    index = {"metadata": {"total_size": len(data)}, "weight_map": weight_map}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def _joined(names: list[str], parts: list[bytes], header: dict[str, Any], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, part in zip(names, parts, strict=True):
        entries[name] = header[name] | {"data_offsets": [position, position + len(part)]}
        position += len(part)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def synthetic_files(shards: int, shard_bytes: int, *, hashed: bool = True) -> dict[str, bytes | Sparse]:
    """What looks like a model, of any size: valid in form, no model in fact."""
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
    files: dict[str, bytes | Sparse] = {
        "config.json": json.dumps(config | {"vocab_size": 400, "intermediate_size": 192}).encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "tokenizer.json": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    }
    weight_map: dict[str, str] = {}
    for number in range(shards):
        shard = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        declared = None if hashed else f"{number + 1:064x}"
        files[shard] = sparse_safetensors(shard_bytes, seed=number, name=f"weight.{number}", sha256=declared)
        weight_map[f"weight.{number}"] = shard
    if shards > 1:
        index = {"metadata": {"total_size": shards * shard_bytes}, "weight_map": weight_map}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files
