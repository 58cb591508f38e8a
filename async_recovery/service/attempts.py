"""What the attempts of a job are like: how long they take, and why they fail. A worker that is watched tells how long,
the engine what failed.

Latencies are counted in buckets a tenth apart, of the last ten to twenty seconds; errors are grouped by what they say,
numbers left out, 50 groups at most.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import msgspec

from ..checkpoint import printable
from ..errors import SlowDown, describe, shorten
from ..workers import Session, SessionWorker, Worker, identity, is_async

SPAN_S = 10.0
LEAST_S = 1e-5
STEP = math.log(1.1)
BUCKETS = 1 + math.ceil(math.log(1e6 / LEAST_S) / STEP)
MOST_GROUPS = 50
LONGEST_ERROR = 300
_NUMBERS = re.compile(r"\d+")


class Latency(msgspec.Struct, frozen=True):
    """Seconds that half of the attempts took at most, 95 and 99 of a hundred."""

    p50: float
    p95: float
    p99: float


class ErrorGroup(msgspec.Struct):
    """Attempts that failed in the same way.

    :ivar error: of the first of them; `index` and `item`: of its item, shortened.
    """

    error: str
    count: int
    index: int
    item: str


def kind_of(error: str) -> str:
    """What errors of the same kind have in common: the text without its numbers."""
    return _NUMBERS.sub("0", error)


class Attempts:
    """The attempts of a run of a job. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._now, self._before = [0] * BUCKETS, [0] * BUCKETS
        self._turns_at = clock() + SPAN_S
        self._errors: dict[str, ErrorGroup] = {}

    def took(self, seconds: float) -> None:
        """An attempt has ended."""
        self._now[0 if seconds <= LEAST_S else min(BUCKETS - 1, int(math.log(seconds / LEAST_S) / STEP) + 1)] += 1

    def failed(self, index: int, item: Any, error: BaseException) -> None:
        """An attempt has failed. One that asks all to slow down has not."""
        if SlowDown.within(error) is not None:
            return
        text = printable(describe(error)[: 4 * LONGEST_ERROR])
        kind, text = kind_of(text)[:LONGEST_ERROR], text[:LONGEST_ERROR]
        if (group := self._errors.get(kind)) is not None:
            group.count += 1
        elif len(self._errors) < MOST_GROUPS:
            self._errors[kind] = ErrorGroup(text, 1, index, printable(shorten(item)))

    @property
    def errors(self) -> list[ErrorGroup]:
        """The groups, the largest first."""
        return sorted(self._errors.values(), key=lambda group: -group.count)

    def latency(self) -> Latency | None:
        """Of the last ten to twenty seconds; None if nothing has ended in them."""
        now = self.clock()
        if now >= self._turns_at:
            late = now >= self._turns_at + SPAN_S
            self._before, self._now = [0] * BUCKETS if late else self._now, [0] * BUCKETS
            self._turns_at = now + SPAN_S
        counts = [one + other for one, other in zip(self._now, self._before, strict=True)]
        total = sum(counts)
        if not total:
            return None
        return Latency(*(_quantile(counts, share * total) for share in (0.5, 0.95, 0.99)))


def _quantile(counts: list[int], rank: float) -> float:
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if seen >= rank and count:
            return float(f"{LEAST_S * math.exp(max(0.0, bucket - 0.5) * STEP):.3g}")  # the middle of the bucket
    return 0.0


def watched(worker: Worker, attempts: Attempts, version: str | None = None) -> Worker:
    """The same worker under the same name, which tells `attempts` how long each call takes."""
    if isinstance(worker, SessionWorker):
        return _WatchedSessions(worker, attempts)
    took, clock = attempts.took, attempts.clock

    async def watched_async(item: Any) -> Any:
        began = clock()
        try:
            return await worker(item)
        finally:
            took(clock() - began)

    def watched_plain(item: Any) -> Any:
        began = clock()
        try:
            return worker(item)
        finally:
            took(clock() - began)

    chosen: Worker = watched_async if is_async(worker) else watched_plain
    chosen.__module__, _, chosen.__qualname__ = identity(worker, version or "any").partition(":")
    return chosen


class _WatchedSessions(SessionWorker):
    def __init__(self, worker: SessionWorker, attempts: Attempts) -> None:
        self.name, self._worker, self._attempts = worker.name, worker, attempts

    def begin(self) -> Session:
        return _WatchedSession(self._worker.begin(), self._attempts)


class _WatchedSession(Session):
    def __init__(self, session: Session, attempts: Attempts) -> None:
        self._session = session
        self._call = watched(session.__call__, attempts)

    async def __call__(self, item: Any) -> Any:
        return await self._call(item)

    async def aclose(self) -> None:
        await self._session.aclose()
