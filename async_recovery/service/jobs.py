"""A job of the service: what is remembered of it, and which step leads from which state to which.

Every step takes a job and gives the job that it becomes. What people ask for raises `NotNow` where it can not be, and
what has happened to a run changes nothing where the job has gone another way since: an ended job is only ever retried.

::

    queued ──▶ running ──▶ complete ──retry_failed──▶ queued
      ▲ │       │ ▲ │ └──▶ failed ────retry_failed──▶ queued
      │ ▼       ▼ │ │        (cancelled: from each of the three on the left)
      paused ◀──┘ │ └─ waits (storage, lock) ─▶ queued, with the reason
         └────────┘
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

import msgspec

from ..errors import UsageError, check_number
from ..options import MAX_CONCURRENCY, Limits, OnError, Options
from ..policies import RateLimit, Record, Retry

State = Literal["queued", "running", "paused", "complete", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
ENDED: frozenset[State] = frozenset({"complete", "failed", "cancelled"})
MOST_EVENTS = 1000


# What a request may say. Not a part of the types: what was remembered under other bounds must still be read.
LONGEST_S = 10**6
BOUNDS: dict[str, tuple[float, float]] = {
    "concurrency": (1, MAX_CONCURRENCY),
    "batch_size": (1, 10**9),
    "checkpoint_interval": (0.01, LONGEST_S),
    "retry": (1, 10**9),
    "timeout": (0.001, LONGEST_S),
    "rate": (0.001, 10**6),
    "burst": (1, 10**6),
    "window": (1, 10**6),  # what is ahead of one slow item is held in memory: 350 MB for so many small records
    "drain_timeout": (0, LONGEST_S),
    "attempts": (1, 10**9),
    "initial": (0, LONGEST_S),
    "maximum": (0, LONGEST_S),
    "deadline": (0.001, LONGEST_S),
    "breaker": (1, 10**9),
    "quarantine_after": (1, 10**9),
    "max_failures": (0, 10**12),
}
SHARE = r"([0-9]{1,2}(\.[0-9]{1,6})?|100)%"
LONGEST_VERSION = 200


class NotNow(Exception):
    """The state of the job does not allow that step. The message says which it is in, and which are needed."""


class RetryOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How often an item is tried; see `Retry`."""

    attempts: int = 3
    initial: float = 0.5
    maximum: float = 60.0
    deadline: float | None = None
    breaker: int | None = 50
    quarantine_after: int | None = None


class RecordOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many failures a job bears: a number, or a share such as ``"1%"``."""

    max_failures: int | str | None = None


class JobOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a job runs, as it is said over HTTP; see `run_resumable`.

    :ivar rate: attempts that may begin a second, ``burst`` of them at one moment.
    """

    concurrency: int = 16
    batch_size: int | None = None
    checkpoint_interval: float = 1.0
    retry: int | RetryOptions | None = None
    timeout: float | None = None
    on_error: Literal["stop", "record"] | RecordOptions = "stop"
    rate: float | None = None
    burst: int = 1
    window: int | None = None
    drain_timeout: float = 10.0
    version: str | None = None

    @property
    def rate_limit(self) -> RateLimit | None:
        """The rate in its long form. A burst beyond the rate of a later change is cut to it."""
        if self.rate is None:
            return None
        return RateLimit(per_second=self.rate, burst=min(self.burst, max(1, int(self.rate))))

    def of_a_run(self) -> Options:
        """The same for the engine.

        :raises UsageError: if a value can not be used.
        """
        retry = self.retry
        on_error: OnError | RecordOptions = self.on_error
        if isinstance(on_error, RecordOptions):
            on_error = Record(max_failures=on_error.max_failures)
        options = Options(
            concurrency=self.concurrency,
            batch_size=self.batch_size,
            checkpoint_interval=self.checkpoint_interval,
            retry=Retry(**msgspec.structs.asdict(retry)) if isinstance(retry, RetryOptions) else retry,
            timeout=self.timeout,
            on_error=on_error,
            rate_limit=self.rate_limit,
            limits=Limits(window=self.window),
            drain_timeout=self.drain_timeout,
            version=self.version,
        )
        options.check()
        return options


def check_bounds(options: msgspec.Struct) -> None:
    """:raises UsageError: if a number in options, or in what they hold, is beyond its bounds."""
    for name, value in msgspec.structs.asdict(options).items():
        if isinstance(value, msgspec.Struct):
            check_bounds(value)
        elif isinstance(value, str) and name == "max_failures":
            if not re.fullmatch(SHARE, value):
                raise UsageError(f"max_failures is {value!r}: it must be a number, or a share such as '1%'")
        elif isinstance(value, str) and name == "version":
            if len(value) > LONGEST_VERSION:
                raise UsageError(f"version has {len(value)} characters: at most {LONGEST_VERSION}")
        elif name in BOUNDS and isinstance(value, int | float):
            least, most = BOUNDS[name]
            check_number(name, value, least=least, most=most, kind=(int, float))


class Input(msgspec.Struct, frozen=True):
    """Where the items come from.

    :ivar path: relative to the service's folder.
    :ivar name: for people.
    :ivar bytes: its size when the job was made.
    """

    kind: Literal["path", "items", "upload"]
    path: str
    name: str
    bytes: int
    format: str | None = None


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a job, at a time in seconds since the epoch."""

    time: float
    what: str
    text: str | None = None


class Job(msgspec.Struct, frozen=True):
    """A job, as it is remembered.

    :ivar number: its place in the order of all jobs.
    :ivar reason: why it is in its state, where that is not plain.
    :ivar retries_of: which file the output was whose failed items run again; None: the job itself runs.
    :ivar key: the Idempotency-Key it was made with, and `asked`: the digest of what was asked with it.
    """

    number: int
    id: str
    worker: str
    input: Input
    options: JobOptions
    created: float
    state: State = "queued"
    reason: str | None = None
    retries_of: str | None = None
    started: float | None = None
    ended: float | None = None
    summary: dict[str, Any] | None = None
    events: tuple[Event, ...] = ()
    key: str | None = None
    asked: str | None = None

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    def _with(self, what: str, now: float, text: str | None = None, **changes: Any) -> Job:
        events = (*self.events, Event(now, what, text))
        if len(events) > MOST_EVENTS:  # the first one stays: when it was made
            events = (events[0], *events[2:])
        return msgspec.structs.replace(self, events=events, **changes)

    # Its life

    def made(self, now: float) -> Job:
        """It is new."""
        return self._with("created", now)

    def begun(self, now: float) -> Job:
        """A run of it begins, if it still waits for that."""
        if self.state != "queued":
            return self
        what = "started" if self.started is None else "resumed"
        return self._with(what, now, state="running", reason=None, started=self.started or now)

    def goes_on(self, now: float) -> Job:
        """It was paused, and has its place again."""
        if self.state != "queued":
            return self
        return msgspec.structs.replace(self, state="running", reason=None)

    def found_running(self, why: str = "the service was started again") -> Job:
        """It is found without a run: if it was running, it waits for its place again."""
        if self.state != "running":
            return self
        return msgspec.structs.replace(self, state="queued", reason=why)

    def waits(self, now: float, reason: str) -> Job:
        """It can not go on for a cause outside of it, and is tried again; one that is paused, when it is unpaused."""
        if self.has_ended:
            return self
        state: State = "paused" if self.state == "paused" else "queued"
        return self._with("waits", now, reason, state=state, reason=reason)

    def completed(self, now: float, summary: dict[str, Any]) -> Job:
        """Its output is published."""
        if self.has_ended:
            return self
        merged = summary
        if self.retries_of is not None and self.summary is not None:  # a retry counts the failures that it ran again
            merged = {**self.summary, "failed": summary["failed"], "executed": summary["executed"]}
        return self._with("complete", now, state="complete", reason=None, ended=now, summary=merged, retries_of=None)

    def has_failed(self, now: float, reason: str) -> Job:
        """It ended with an error."""
        if self.has_ended:
            return self
        return self._with("failed", now, reason, state="failed", reason=reason, ended=now)

    # What people ask of it

    def paused(self, now: float) -> Job:
        """Nothing of it begins until it is unpaused."""
        if self.state == "paused":
            return self
        self._refuse_unless("paused", "queued", "running")
        return self._with("paused", now, state="paused", reason=None)

    def unpaused(self, now: float) -> Job:
        """It takes its place in the queue again."""
        if self.state in ("queued", "running"):
            return self
        self._refuse_unless("unpaused", "paused")
        return self._with("unpaused", now, state="queued", reason=None)

    def cancelled(self, now: float) -> Job:
        """It ends, for good."""
        if self.state == "cancelled":
            return self
        self._refuse_unless("cancelled", "queued", "running", "paused")
        return self._with("cancelled", now, state="cancelled", reason=None, ended=now)

    def retried(self, now: float, output: str | None) -> Job:
        """The failed items of a complete job run again; a failed job goes on from its checkpoint.

        :param output: which file its output is; None: there is none.
        """
        self._refuse_unless("retried", "complete", "failed")
        if self.state == "complete":
            if not (self.summary or {}).get("failed"):
                raise NotNow("no item of the job has failed: there is nothing to run again")
            if output is None:
                raise NotNow("the output of the job is missing, with its failed items in it: restore it first")
            return self._with("retry", now, state="queued", reason=None, ended=None, retries_of=output)
        return self._with("retry", now, state="queued", reason=None, ended=None)

    def changed(self, now: float, text: str, options: JobOptions) -> Job:
        """It goes on with other options."""
        if self.has_ended:
            raise NotNow(f"the job is {self.state}: only a job that has not ended can be changed")
        return self._with("changed", now, text, options=options)

    def refuse_to_go(self) -> None:
        """:raises NotNow: if it has not ended."""
        if not self.has_ended:
            raise NotNow(f"the job is {self.state}: only an ended job can be deleted; cancel it first")

    def _refuse_unless(self, step: str, *states: State) -> None:
        if self.state not in states:
            raise NotNow(f"the job is {self.state}: only one that is {' or '.join(states)} can be {step}")


def queue_order(job: Job) -> tuple[bool, int]:
    """By which queued jobs come to their turn: those that have begun before the others, and then by age."""
    return (job.started is None, job.number)
