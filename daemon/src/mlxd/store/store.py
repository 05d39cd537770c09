"""From what a caller says to a folder on disk: built-in models, any absolute folder, whole models in the cache.

No string from a caller becomes a path outside these, except an absolute folder, which the same user may name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from mlxd_client.errors import ModelInvalid, ModelNotFound

from . import hub
from .adapter import PartOfAdapter, examine_adapter
from .folder import Folder, Incomplete, examine, fingerprint
from .layout import RepoCache

__all__ = ["Found", "FoundAdapter", "Store"]

Source = Literal["builtin", "hub", "path"]

BUILTIN_PREFIX = "mlxd/"
MAX_REF_BYTES = 4096

# Models in the cache that generate nothing; they are not listed, though naming one says what is wrong with it.
_OTHER_TASKS = (
    "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForCTC",
    "ForImageClassification", "BertModel", "CLIPModel",
)  # fmt: skip


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A whole model on this disk, or an adapter of the hub.

    Attributes:
        model: its id: `mlxd/<name>`, `<org>/<name>`, `<org>/<name>@<revision>` or the folder's real path.
        path: its folder, absolute.
        revision: the commit, for models from the hub.
        size_bytes: all files together.
        weights_bytes: tensor data on disk.
        memory_bytes: the memory that running it is expected to take.
        kv_token_bytes: what one token takes in the KV cache.
        context_length: tokens of prompt and answer together.
        kind: an adapter is here to be named as such; it is never loaded by itself.
    """

    model: str
    source: Source
    path: str
    size_bytes: int
    weights_bytes: int
    memory_bytes: int
    kv_token_bytes: int
    context_length: int
    revision: str | None = None
    kind: Literal["model", "adapter"] = "model"


class FoundAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter on this disk. `adapter` is its id, as a model's would be; `path` its folder, absolute."""

    adapter: str
    path: str


class Store:
    """Looks at the disk each time it is asked; folders that have not changed are not examined again.

    Not for use by several threads at a time.

    Args:
        aliases: further names, to ids or absolute folders.
        env: the environment, which says where the cache is.
        builtin: the folder of the models that came with this package.
    """

    def __init__(
        self, aliases: Mapping[str, str] | None = None, env: Mapping[str, str] | None = None,
        builtin: Path | None = None,
    ) -> None:  # fmt: skip
        self.aliases = dict(aliases or {})
        self.cache = hub.cache_folder(os.environ if env is None else env)
        self._builtin = Path(__file__).parents[1] / "models" if builtin is None else builtin
        self._examined: dict[Path, tuple[object, Folder]] = {}

    def resolve(self, ref: str) -> Found:
        """The model that `ref` names, or the adapter of the hub.

        1. a text that can name nothing is refused; 2. an alias is replaced, once; 3. an absolute folder is itself;
        4. `mlxd/...` is built in; 5. all else is a repository in the cache, with `@` a revision of it.

        Raises:
            ModelNotFound: there is none, or only a part of one; `details.near` may name similar ones.
            ModelInvalid: it is there and no usable model; the message says why, `details.file` where.
        """
        self._check_text(ref)
        name = self.aliases.get(ref, ref)
        try:
            if name.startswith("/"):
                return self._at_path(name)
            if name.startswith(BUILTIN_PREFIX):
                return self._at_builtin(name)
            return self._in_cache(name)
        except OSError as error:
            raise ModelInvalid(f"{name} cannot be read: {error.strerror}", model=name) from None

    def adapter(self, ref: str) -> FoundAdapter:
        """The adapter that `ref` names: an absolute folder, or a repository in the cache. Aliases are replaced, once.

        Raises:
            ModelNotFound: there is none.
            InvalidParams, Unsupported: it is there and cannot be used; `details.field` is adapter, as in all of them.
        """
        try:
            self._check_text(ref)
            name = self.aliases.get(ref, ref)
            if name.startswith("/"):
                path = os.path.realpath(name)
                examine_adapter(path)
                return FoundAdapter(adapter=path, path=path)
            repo, revision = hub.split_ref(name)
            if not hub.is_repo_id(repo) or not (revision is None or hub.is_revision(revision)):
                raise ModelNotFound(
                    f"{name} names no adapter: give an absolute folder, or one of the hub's repositories"
                )
            folder = hub.repo_folder(self.cache, repo)
            snapshot = hub.find_snapshot(folder, revision)
            if snapshot is None:
                raise ModelNotFound(f"there is no adapter {name} on this machine", adapter=name)
            try:
                examine_adapter(str(snapshot), (folder, self.cache / "blobs"))
            except PartOfAdapter as error:
                raise ModelNotFound(f"{name} is not complete: {error.message}", adapter=name, **error.details) from None
            return FoundAdapter(adapter=hub.join_ref(repo, revision), path=str(snapshot))
        except ModelNotFound as error:
            error.details.setdefault("field", "adapter")
            raise

    def scan(self) -> list[Found]:
        """All models that have a name: built in, or whole in the cache. What is broken is left out."""
        found = []
        for name in self._names():
            try:
                model = self.resolve(name)
            except (ModelNotFound, ModelInvalid):
                continue
            folder = self._examined[Path(model.path)][1]
            if not folder.architectures or not all(each.endswith(_OTHER_TASKS) for each in folder.architectures):
                found.append(model)
        return found

    def hub_repo(self, ref: str) -> tuple[str, str | None] | None:
        """(repository, revision) of the model of the hub that `ref` names, be it here or not; None if it can be none.

        The revision is None where `ref` names none, which means `main`. Aliases are replaced. Built-in models and
        folders are none of the hub's.
        """
        name = self.aliases.get(ref, ref)
        if name.startswith(("/", BUILTIN_PREFIX)):
            return None
        repo, revision = hub.split_ref(name)
        if not hub.is_repo_id(repo) or not (revision is None or hub.is_revision(revision)):
            return None
        return repo, revision

    def partial(self, ref: str) -> bool:
        """Whether a download of the repository that `ref` names was cut short, and left something to go on from."""
        named = self.hub_repo(ref)
        return named is not None and RepoCache(self.cache, named[0]).has_partial()

    # --- the three places -----------------------------------------------------------------------------------------

    def _at_path(self, name: str) -> Found:
        path = Path(os.path.realpath(name))
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except OSError:
            is_folder = False
        if not is_folder:
            raise ModelNotFound(f"there is no folder {name}", model=name)
        return self._found(str(path), "path", path)

    def _at_builtin(self, name: str) -> Found:
        short = name.removeprefix(BUILTIN_PREFIX)
        if not hub.is_repo_id(short) or "/" in short or not (self._builtin / short).is_dir():
            raise self._unknown(name)
        return self._found(name, "builtin", self._builtin / short)

    def _in_cache(self, name: str) -> Found:
        repo, revision = hub.split_ref(name)
        if not hub.is_repo_id(repo) or not (revision is None or hub.is_revision(revision)):
            raise self._unknown(name)
        folder = hub.repo_folder(self.cache, repo)
        snapshot = hub.find_snapshot(folder, revision)
        if snapshot is None:
            raise self._unknown(name)
        # huggingface_hub keeps what repositories share in <cache>/blobs, and links to it.
        inside = (folder, self.cache / "blobs")
        return self._found(hub.join_ref(repo, revision), "hub", snapshot, inside=inside, revision=snapshot.name)

    def _found(
        self, name: str, source: Source, path: Path, inside: tuple[Path, ...] = (), revision: str | None = None
    ) -> Found:
        try:
            folder = self._examine(path, inside)
        except Incomplete as error:
            if source == "path":
                raise ModelInvalid(f"{name} is no model: {error.message}", model=name, **error.details) from None
            raise ModelNotFound(f"{name} is not complete: {error.message}", model=name, **error.details) from None
        except ModelInvalid as error:
            raise ModelInvalid(f"{name} is no usable model: {error.message}", model=name, **error.details) from None
        if folder.kind == "adapter" and source != "hub":
            told = f"{name} is an adapter: name it as `adapter`, beside the model that it was made for"
            raise ModelInvalid(told, model=name)
        return Found(
            model=name, source=source, path=str(path), revision=revision, size_bytes=folder.size_bytes,
            weights_bytes=folder.weights_bytes, memory_bytes=folder.memory_bytes, kv_token_bytes=folder.kv_token_bytes,
            context_length=folder.context_length, kind=folder.kind,
        )  # fmt: skip

    def _examine(self, path: Path, inside: tuple[Path, ...]) -> Folder:
        """`examine`, unless the folder's files are those of the last time: headers of large models take a while."""
        marks = fingerprint(path)
        known = self._examined.get(path)
        if known is None or known[0] != marks:
            self._examined.pop(path, None)
            known = self._examined[path] = (marks, examine(path, inside))
        return known[1]

    # --- names ----------------------------------------------------------------------------------------------------

    def _check_text(self, ref: str) -> None:
        try:
            size = len(ref.encode())
        except UnicodeEncodeError:
            size = 0
        if not 0 < size <= MAX_REF_BYTES or not ref.isprintable():
            shown = ref[:60].encode("ascii", "backslashreplace").decode()
            raise ModelNotFound(f"{shown!r} is no name that a model can have")

    def _names(self) -> Iterator[str]:
        try:
            yield from (BUILTIN_PREFIX + name for name in sorted(os.listdir(self._builtin)) if hub.is_repo_id(name))
        except OSError:
            pass  # a package without built-in models
        for repo in hub.repositories(self.cache):
            yield repo
            names = (ref for ref in hub.refs(hub.repo_folder(self.cache, repo)) if ref != hub.MAIN)
            yield from (hub.join_ref(repo, ref) for ref in names if hub.is_revision(ref))

    def _there(self, name: str) -> bool:
        """Whether something of it is whole; the cache also has folders of downloads that came to nothing."""
        repo = name.partition("@")[0]
        return (
            name in self.aliases
            or name.startswith(BUILTIN_PREFIX)
            or bool(hub.snapshots(hub.repo_folder(self.cache, repo)))
        )

    def _unknown(self, name: str) -> ModelNotFound:
        """The error for a name that leads nowhere, with names that look alike."""
        import difflib  # costs milliseconds, and only a mistake needs it

        known = {full.lower(): full for full in (*self._names(), *self.aliases) if full != name}
        known |= {full.lower().rpartition("/")[2]: full for full in known.values()}
        alike = difflib.get_close_matches(name.lower(), known, n=3)
        near = list(dict.fromkeys(known[each] for each in alike if self._there(known[each])))
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return ModelNotFound(
            f"there is no model {name} on this machine{hint}", model=name, **({"near": near} if near else {})
        )
