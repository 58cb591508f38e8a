"""One moment of a job, as it is told to those who watch; and the history of such moments."""

from __future__ import annotations

import asyncio
import itertools
from bisect import bisect_right
from collections.abc import AsyncIterator
from operator import itemgetter

import msgspec

from ..progress import NOT_BEGUN, Progress
from ..status import Status
from .attempts import ErrorGroup, Latency
from .jobs import Job

MOST_SAMPLES = 300
SHOWN_ERRORS = 20
_numbers = itertools.count(1)


class Sample(msgspec.Struct, frozen=True):
    """Where a job stands at one moment: see `Progress`, and

    :ivar time: in seconds since the epoch.
    :ivar items_per_s: of the last seconds, as `remaining_s`.
    :ivar since_commit_s: seconds since the last commit of this run; None before there is one. `commit_s`: it took.
    :ivar latency: of the attempts of the last seconds.
    :ivar window: how far the frontier may run ahead, in items.
    :ivar errors: attempts that failed in this run, in groups.
    """

    time: float
    elapsed_s: float
    finished: int
    failed: int
    executed: int
    resumed_from: int
    mark: int
    durable_mark: int
    frontier: int
    ahead: int
    in_flight: int
    waiting: int
    retries: int
    commits: int
    held_by: int | None
    held_s: float
    held_attempt: int
    share: float | None
    items_per_s: float
    remaining_s: float | None
    since_commit_s: float | None
    commit_s: float | None
    latency: Latency | None
    paused: str | None
    window: int
    concurrency: int
    rate: float | None
    errors: list[ErrorGroup]


def sample_of(
    progress: Progress,
    recent: Progress,
    *,
    time: float,
    since_commit_s: float | None,
    latency: Latency | None,
    errors: list[ErrorGroup],
    window: int,
    concurrency: int,
    rate: float | None,
) -> Sample:
    """A sample.

    :param recent: the same as seen from the last seconds alone (`Progress.since`).
    """
    shared = {name: getattr(progress, name) for name in _SHARED}
    return Sample(
        time=time,
        items_per_s=recent.items_per_s,
        remaining_s=recent.remaining_s,
        since_commit_s=since_commit_s,
        commit_s=progress.commit_s if progress.commits else None,
        latency=latency,
        window=window,
        concurrency=concurrency,
        rate=rate,
        errors=errors[:SHOWN_ERRORS],
        **shared,
    )


def sample_of_status(status: Status, job: Job, time: float) -> Sample:
    """Where a job stands that does not run, by its checkpoint."""
    mark, finished = status.mark or 0, status.finished or 0
    progress = msgspec.structs.replace(
        NOT_BEGUN,
        resumed_from=mark,
        finished=finished,
        failed=status.failed or 0,
        mark=mark,
        durable_mark=mark,
        frontier=finished,
        ahead=status.ahead or 0,
    )
    return sample_of(
        progress,
        progress,
        time=time,
        since_commit_s=None,
        latency=None,
        errors=[],
        window=status.window or 0,
        concurrency=job.options.concurrency,
        rate=job.options.rate,
    )


_SHARED = [name for name in Sample.__struct_fields__ if name in Progress.__struct_fields__ and name != "commit_s"]


class Feed:
    """The messages about a job, as they go to those who listen: its newest state, and its samples.

    Of the samples 300 are kept: when there are more, each second of the older ones goes. The newest stay dense.
    Ids grow over all feeds of a process, so that they hold for a feed that was forgotten and is there again.

    :param boot: tells this process from others in the id of a message.
    :ivar listeners: how many listen now.
    """

    def __init__(self, boot: str) -> None:
        self._boot = boot
        self._job: tuple[int, bytes] | None = None
        self._samples: list[tuple[int, bytes]] = []
        self._changed = asyncio.Event()
        self._closed = False
        self.listeners = 0

    def tell_job(self, job: bytes) -> None:
        """The job has changed: `job` is its JSON."""
        self._job = self._message("job", job)

    def tell_sample(self, sample: bytes) -> None:
        """A moment has gone by: `sample` is its JSON."""
        self._samples.append(self._message("sample", sample))
        if len(self._samples) > MOST_SAMPLES:
            del self._samples[1 : 2 * MOST_SAMPLES // 3 : 2]

    def close(self) -> None:
        """Nothing more comes: those who listen are let go."""
        self._closed = True
        self._wake()

    async def messages(self, last_id: str | None) -> AsyncIterator[bytes]:
        """The messages after the one of that id; all that are kept, if it is not one of this process."""
        boot, _, number = (last_id or "").rpartition("-")
        is_ours = boot == self._boot and number.isascii() and number.isdecimal() and len(number) < 20
        seen = int(number) if is_ours else 0
        self.listeners += 1
        try:
            while True:
                changed = self._changed
                later = self._samples[bisect_right(self._samples, seen, key=itemgetter(0)) :]
                if self._job is not None and self._job[0] > seen:
                    later = sorted([*later, self._job])
                if later:
                    seen = later[-1][0]
                    yield b"".join(message for _, message in later)
                elif self._closed:
                    return
                else:
                    await changed.wait()
        finally:
            self.listeners -= 1

    def _message(self, kind: str, data: bytes) -> tuple[int, bytes]:
        number = next(_numbers)
        self._wake()
        return number, b"id: %b-%d\nevent: %b\ndata: %b\n\n" % (self._boot.encode(), number, kind.encode(), data)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
