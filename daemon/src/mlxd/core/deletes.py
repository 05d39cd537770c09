"""Deleting models: refused while one is in use; else its processes go first, then its files, then the record.

A model that is being deleted takes no work and no download, and what the disk is said to hold of it does not count
until FilesDeleted has come. What was begun is finished, also where its caller does not wait any more.
"""

from __future__ import annotations

from mlxd_client import errors
from mlxd_client.errors import RpcError

from . import actions as do
from . import events as ev
from .book import Book, error_object, in_use
from .jobs import repo_of
from .line import LoadLine
from .records import Goal, ModelRecord


class Deletes:
    """Takes the book's models from the disk. `line` stops their workers."""

    def __init__(self, book: Book, line: LoadLine) -> None:
        self._book = book
        self._line = line
        self._aborted = False

    def delete(self, event: ev.Delete, now: float) -> None:
        record = self._book.models.get(event.model)
        refusal = self._refusal(event.model, record)
        if refusal is not None:
            self._book.fail(event.rid, refusal)
            return
        if record is None:
            record = self._book.new_model(event.model)  # a download that was cut short may have left something
        record.deleting = True
        self._book.deleting[record.id] = False
        self._book.remains.pop(record.id, None)
        record.goals[event.rid] = Goal(event.rid, event.client, "delete")
        self._book.goals[event.rid] = record.id
        self._book.publish("deleting_started", record)
        if record.worker is not None:
            self._line.stop(record, now)

    def _refusal(self, model: str, record: ModelRecord | None) -> RpcError | None:
        if self._book.draining:
            return errors.ShuttingDown("the daemon is stopping and takes no new work")
        uses = {"downloading": sum(repo_of(name) == repo_of(model) for name in self._book.downloads)}
        if record is not None:
            if record.source != "hub":
                return errors.Unsupported("only models of the hub can be deleted", model=model)
            uses |= {"active": len(record.running), "waiting": len(record.queue), "leases": len(record.leases)}
            uses["loading"] = max(int(record.job is not None), sum(g.kind == "ensure" for g in record.goals.values()))
            uses["deleting"] = int(record.deleting)
        return in_use(model, uses) if any(uses.values()) else None

    def files_deleted(self, event: ev.FilesDeleted, now: float) -> None:
        if self._book.deleting.pop(event.model, None) is None:
            return
        book, record = self._book, self._book.models[event.model]
        record.deleting = False
        waiting = [goal.rid for goal in record.goals.values() if goal.kind == "delete"]
        for rid in waiting:
            del record.goals[rid], book.goals[rid]
        if event.error is not None:
            record.error = error_object(event.error)
            book.publish("error", record, error=record.error)
            if record.lifecycle.state == "NotDownloaded":
                book.remain(record, now)
            for rid in waiting:
                book.fail(rid, event.error)
            return
        if record.lifecycle.state == "Downloaded":
            book.move(record, "deleted", now)
        else:
            book.publish("deleted", record)
        book.lose(record)
        book.out.extend(do.Deleted(rid, event.freed_bytes) for rid in waiting)

    def abort(self) -> None:
        """Refuse those that wait, and begin no more; what was begun may still be finished."""
        self._aborted = True
        for name in self._book.deleting:
            record = self._book.models[name]
            for rid in [goal.rid for goal in record.goals.values() if goal.kind == "delete"]:
                del record.goals[rid], self._book.goals[rid]
                self._book.fail(rid, errors.ShuttingDown("the daemon stopped before this was done"))

    def settle(self) -> None:
        """Have the files removed of those whose processes are gone."""
        if self._aborted:
            return
        fetched = {repo_of(fetcher.model) for fetcher in self._book.by_fetcher.values()}
        for name, said in self._book.deleting.items():
            if not said and self._book.models[name].worker is None and repo_of(name) not in fetched:
                self._book.deleting[name] = True
                self._book.out.append(do.DeleteFiles(name))
