"""The adapters that are loaded beside the base model: read when first asked for, kept while there is room.

Asking for one never blocks: it is read between decode steps, and requests wait for it. What has not been used for
longest goes first; what a request in flight uses, or the daemon asked to keep, stays.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from typing import Any

import mlx.core as mx

from mlxd_client.errors import InternalError, InvalidParams, RpcError

from ..store.adapter import AdapterFolder, examine_adapter, mark
from . import adapted
from .adapterfile import Content, misfit, read_adapter

__all__ = ["Adapter", "Adapters"]

# How many are kept, and how many bytes of them.
MOST = 16
MOST_BYTES = 1024 * 1024 * 1024
# How long reading may take between two decode steps, in seconds; one layer at least is read.
READ_S = 0.02


class Adapter(adapted.Slot):
    """One adapter of the base model. Before it is `ready` it has no slot; where `error` is set it never will be.

    Attributes:
        identity: a hash of its content; what was computed with it is shared with nothing else.
        nbytes: what it takes in memory; before it is read, on disk.
    """

    __slots__ = ("_content", "_reading", "error", "folder", "identity", "nbytes", "ready", "used_at")

    def __init__(self, folder: AdapterFolder) -> None:
        super().__init__(0)
        self.folder = folder
        self.identity = b""
        self.nbytes = folder.bytes
        self.ready = False
        self.error: RpcError | None = None
        self.used_at = 0.0
        self._content = Content()
        self._reading: Iterator[None] | None = None


class Adapters:
    """All adapters of one model.

    Args:
        model: its layers are changed when the first adapter is loaded, and back when the last one goes.
        most, most_bytes: bounds what is kept. One that is larger by itself is refused.
    """

    def __init__(self, model: Any, *, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._model = model
        self._most = most
        self._most_bytes = most_bytes
        self._kept: dict[tuple[str, Any], Adapter] = {}  # by folder and mark, those that are being read included
        self._unread: list[Adapter] = []
        self.kept: Adapter | None = None

    @property
    def pending(self) -> bool:
        return bool(self._unread)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._kept.values() if each.number)

    def want(self, path: str) -> Adapter:
        """The adapter in the folder `path`, which may still have to be read.

        Raises:
            RpcError: there is none that could be used; the message says why, `details.field` is adapter.
        """
        known = self._kept.get((path, mark(path)))
        if known is None:
            folder = examine_adapter(path)
            if folder.bytes > self._most_bytes:
                told = f"the adapter {path} has {folder.bytes} bytes; adapters may have {self._most_bytes}"
                raise InvalidParams(told, field="adapter", limit_bytes=self._most_bytes)
            known = self._kept[path, folder.mark] = Adapter(folder)
            self._unread.append(known)
        known.used_at = time.monotonic()
        return known

    def read(self, used: Collection[Adapter]) -> None:
        """Read on for a moment, where anything is to be read and there is room for it.

        Args:
            used: those that requests use or wait for; they stay.
        """
        deadline = time.monotonic() + READ_S
        while self._unread:
            adapter = self._unread[0]
            try:
                if adapter._reading is None and not self._admit(adapter, used):
                    return
                if self._read_on(adapter, deadline):
                    return
            except Exception as error:
                adapter.error = error if isinstance(error, RpcError) else _failed(error)
                self._remove(adapter)
            self._unread.pop(0)

    def _admit(self, adapter: Adapter, used: Collection[Adapter]) -> bool:
        """Give it a slot, at the cost of such as nobody uses. False: all that are there are used."""
        resident = sorted((each for each in self._kept.values() if each.number), key=lambda each: each.used_at)
        stay = [each for each in resident if each in used or each is self.kept]
        idle = [each for each in resident if each not in stay]
        while len(stay) + len(idle) >= self._most or self.nbytes + adapter.nbytes > self._most_bytes:
            if not idle and all(each is self.kept for each in stay):
                raise misfit(adapter.folder, "there is no room for it beside the one that was loaded with the model")
            if not idle:
                return False
            self._remove(idle.pop(0))
        taken = {each.number for each in self._kept.values()}
        adapter.number = next(number for number in range(1, self._most + 1) if number not in taken)
        adapter._reading = read_adapter(adapter.folder, self._model, adapter._content)
        return True

    def _read_on(self, adapter: Adapter, deadline: float) -> bool:
        """Returns whether there is more to read."""
        assert adapter._reading is not None
        for _ in adapter._reading:
            if time.monotonic() >= deadline:
                return True
        adapted.adapt(self._model, adapter.number, adapter._content.deltas)
        adapter.identity, adapter.nbytes = adapter._content.identity, adapter._content.nbytes
        adapter._reading, adapter._content, adapter.ready = None, Content(), True
        return False

    def _remove(self, adapter: Adapter) -> None:
        self._kept.pop((adapter.folder.path, adapter.folder.mark), None)
        if adapter.number:
            adapted.release(self._model, adapter.number)
            adapted.restore(self._model)
            adapter.number, adapter.ready = 0, False
            mx.clear_cache()


def _failed(error: Exception) -> RpcError:
    return InternalError(f"the adapter could not be loaded: {type(error).__name__}: {error}", field="adapter")
