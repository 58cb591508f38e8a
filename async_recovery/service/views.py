"""A job as it is told over HTTP."""

from __future__ import annotations

from typing import Any

import msgspec

from .jobs import Event, Job, JobOptions, State
from .samples import Sample


class InputView(msgspec.Struct, frozen=True):
    """Where the items come from: their name for people, and how many bytes there were when the job was made."""

    kind: str
    name: str
    bytes: int


class JobView(msgspec.Struct, frozen=True):
    """A job. Times are in seconds since the epoch.

    :ivar reason: why it is in its state, where that is not plain.
    :ivar retrying: its failed items run again.
    :ivar sample: where it stands, if it is loaded.
    :ivar events: what happened to it; not in lists.
    """

    id: str
    worker: str
    state: State
    reason: str | None
    retrying: bool
    created: float
    started: float | None
    ended: float | None
    input: InputView
    options: JobOptions
    sample: Sample | None
    summary: dict[str, Any] | None
    events: tuple[Event, ...]


def view_of(job: Job, sample: Sample | None = None, *, events: bool = True) -> JobView:
    """The view of a job."""
    return JobView(
        id=job.id,
        worker=job.worker,
        state=job.state,
        reason=job.reason,
        retrying=job.retries_of is not None and not job.has_ended,
        created=job.created,
        started=job.started,
        ended=job.ended,
        input=InputView(job.input.kind, job.input.name, job.input.bytes),
        options=job.options,
        sample=sample,
        summary=job.summary,
        events=job.events if events else (),
    )


def as_json(job: Job) -> bytes:
    """The view of a job for those who watch it."""
    return msgspec.json.encode(view_of(job))
