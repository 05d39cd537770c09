"""The reducer: a snapshot and the events after it become the daemon's state. Pure; it does no reading of its own."""

from __future__ import annotations

from .types import Event, Job, Model, PressureLevel, Snapshot

__all__ = ["Mirror"]

_ENDED = ("done", "failed", "cancelled")


class Mirror:
    """The state that a subscription covers, kept current by its events.

        with client.events() as events:
            mirror = Mirror(events.snapshot)
            for event in events:
                mirror.apply(event)

    Models and jobs are replaced, never changed in place: what a caller took out stays as it was. A subscription whose
    topics leave out `queue` has the activity fields of its models at their defaults, here as in its snapshots.

    Attributes:
        models: by id.
        jobs: by id, those that have not ended.
        stopping: whether the daemon drains and takes no new work.
        memory_pressure: how short of memory the machine is.
    """

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self.models: dict[str, Model] = {}
        self.jobs: dict[str, Job] = {}
        self.stopping = False
        self.memory_pressure: PressureLevel = "normal"
        if snapshot is not None:
            self.replace(snapshot)

    def replace(self, snapshot: Snapshot) -> None:
        """Forget everything held and hold this."""
        self.models = {model.id: model for model in snapshot.models}
        self.jobs = {job.job: job for job in snapshot.jobs}
        self.stopping = snapshot.stopping
        self.memory_pressure = snapshot.memory_pressure

    def apply(self, event: Event) -> None:
        """Take one event, in order of arrival. A snapshot (`lagged`, `resync`) replaces everything."""
        if event.snapshot is not None:
            self.replace(event.snapshot)
            return
        if event.name == "model_lost":
            lost = event.model_id if event.model_id is not None else event.model.id if event.model else ""
            self.models.pop(lost, None)
        elif event.model is not None:
            self.models[event.model.id] = event.model
        if event.job is not None:
            if event.job.state in _ENDED:
                self.jobs.pop(event.job.job, None)
            else:
                self.jobs[event.job.job] = event.job
        if event.name == "daemon_stopping":
            self.stopping = True
        if event.name == "memory_pressure" and event.details is not None:
            self.memory_pressure = event.details.get("level", self.memory_pressure)

    def snapshot(self) -> Snapshot:
        """The state held, in the order of ids."""
        return Snapshot(
            models=[self.models[id] for id in sorted(self.models)],
            jobs=[self.jobs[id] for id in sorted(self.jobs)],
            stopping=self.stopping,
            memory_pressure=self.memory_pressure,
        )
