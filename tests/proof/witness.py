"""What must hold at every step of a run, seen from outside: by the workers, by the ledger, and while nothing can run.

The witness knows what has finished and what is durable from its own books, and never from the engine's. It
notices (I: the invariants of RELIABILITY.md; P: the promises of DESIGN.md):

* P1, I3: a commit holds exactly what has finished when it is taken and was not durable, in order; its bookmark is that
  of its mark; it does not change while it is under way. The mark never goes back.
* I2: nothing is published that is not whole, durable and compared.
* P3, I5: an item runs once in a process, and never again once its outcome is durable.
* P5: nothing starts outside of window and bytes; nothing waits that could start.
* P7: when a run has ended, nothing of it is left, and what finished is durable.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

import msgspec

from async_recovery.checkpoint import Ahead, Bookmark, Checkpoint, Commit
from async_recovery.contracts import RunSummary
from async_recovery.engine import Run
from async_recovery.options import Limits, Options

from .scheduled_loop import ScheduledLoop

NEVER_S = 1e6
ALL_BYTES = 1 << 30


@dataclass(frozen=True)
class Plan:
    """How one process runs the job.

    :ivar source: "list", "async" (each item is awaited) or "text" (pages with positions, each read is awaited).
    """

    items: int
    concurrency: int
    window: int = 100
    max_buffer_bytes: int = ALL_BYTES
    batch_size: int | None = None
    interval_s: float = NEVER_S
    drain_s: float = 1.0
    source: str = "list"

    def options(self) -> Options:
        return Options(
            concurrency=self.concurrency,
            limits=Limits(window=self.window, max_buffer_bytes=self.max_buffer_bytes),
            batch_size=self.batch_size,
            checkpoint_interval=self.interval_s,
            drain_timeout=self.drain_s,
        )


class Items:
    """The items of a job, and what a run has to make of them.

    :ivar text: the lines of the input.
    :ivar crcs: CRC-32 of each raw item; `offsets`: where its line begins in the text, then the end of all.
    :ivar records: of each item.
    """

    def __init__(self, count: int, source: str) -> None:
        self.names = [f"{index}" + "." * (index * 5 % 7) for index in range(count)]
        self.text = "".join(f"{name}\n" for name in self.names).encode()
        raw = [name.encode() if source == "text" else json.dumps(name).encode() for name in self.names]
        self.crcs = [crc32(item) for item in raw]
        self.offsets = [0]
        for name in self.names:
            self.offsets.append(self.offsets[-1] + len(name) + 1)
        self.records = [b'{"index":%d,"x":"%s"}' % (index, b"x" * self._size(index)) for index in range(count)]

    def result(self, index: int) -> dict[str, str]:
        """What the worker returns."""
        return {"x": "x" * self._size(index)}

    def _size(self, index: int) -> int:
        return index * 7 % 5

    def complaint(self, bookmark: Bookmark, mark: int) -> str | None:
        """What is wrong with a bookmark of that mark."""
        first = bookmark.first_index
        if not 0 <= first <= mark:
            return f"it begins at item {first}"
        if bookmark.items_crc != crc32(struct.pack(f"<{mark - first}I", *self.crcs[first:mark])):
            return "its CRC is not that of the items up to the mark"
        offset = 0 if bookmark.position is None else bookmark.position.get("offset", 0)
        return None if offset == self.offsets[first] else f"its position is {offset}, not {self.offsets[first]}"


@functools.cache
def items_of(count: int, source: str) -> Items:
    """The items of a job of that many items."""
    return Items(count, "text" if source == "text" else "iterable")


class Past(NamedTuple):
    """What all processes so far have done.

    :ivar committed: the items whose outcome was acknowledged as durable; `mark` and `generation` likewise.
    :ivar finished: the items whose worker has returned.
    :ivar published: the finish was acknowledged.
    """

    mark: int = 0
    generation: int = 0
    committed: frozenset[int] = frozenset()
    finished: frozenset[int] = frozenset()
    published: bool = False


class Witness:
    """Sees one process from its start to its end.

    :param plan: how it runs.
    :param past: what is known to be done.
    :param loop: where violations are told, and the story.
    :param trusting: commits are taken as they come: what they hold shows in the next process alone.

    :ivar excused: the errors with which the run may end.
    :ivar poisoned: the storage has failed: nothing may be written any more.
    :ivar began: the items that this process has begun.
    :ivar told: called when something was acknowledged.
    """

    run: Run

    def __init__(self, plan: Plan, past: Past, loop: ScheduledLoop, *, trusting: bool = False) -> None:
        self.plan = plan
        self.items = items_of(plan.items, plan.source)
        self.loop = loop
        self.excused: set[type[BaseException]] = set()
        self.poisoned = False
        self.began: list[int] = []
        self.told: Callable[[], None] = lambda: None
        self.resumed_from: int | None = None
        self._past = past
        self._trusting = trusting
        self._found_ahead: frozenset[int] = frozenset()
        self._compared = True
        self._known: set[int] = set()
        self._in_flight: set[int] = set()
        self._taken: frozenset[int] = frozenset()
        self._under_way: tuple[Commit, bytes] | None = None

    @property
    def past(self) -> Past:
        """What has been done up to now."""
        return self._past

    def opened(self, found: Checkpoint) -> None:
        """The ledger was opened: nothing that was acknowledged is lost, and nothing is there that never was."""
        past, state, demand = self._past, found.state, self._demand
        if found.complete is not None:
            demand(len(past.finished) == self.plan.items, "I2: complete, but only {} have finished", past.finished)
            self.resumed_from = self.plan.items
            self._acknowledge(past._replace(published=True))
            return
        mark, ahead = (0 if state is None else state.mark), found.ahead
        there = frozenset(range(mark)) | ahead.keys()
        demand(mark >= past.mark, "I3: the mark is {}, acknowledged was {}", mark, past.mark)
        demand(past.committed <= there, "I3: {} were acknowledged, found is {}", past.committed, there)
        demand(there <= past.finished, "I2: {} are committed, finished are {}", there, past.finished)
        demand(all(self._is_ahead(item, mark) for item in ahead.values()), "I4: wrong records are ahead: {}", ahead)
        if state is not None:
            demand(state.generation >= past.generation, "I3: the generation went back to {}", state.generation)
            self._check_bookmark(state.source, mark)
            self._compared = False
        self._found_ahead, self._known = frozenset(ahead), set(there)
        self.resumed_from = mark
        generation = 0 if state is None else state.generation
        self._acknowledge(Past(mark, generation, there, past.finished))

    def started(self, index: int) -> None:
        """A worker begins with an item."""
        self.loop.story.append(f"{index} begins")
        began, demand = self.began, self._demand
        demand(index not in began, "I5: item {} runs twice", index)
        demand(index not in self._known, "I5: item {} runs again, and its outcome is known", index)
        demand(not began or index > began[-1], "P1: item {} comes after {}", index, began)
        demand(not self.run._stopping, "P7: item {} starts after the stop", index)
        demand(self._is_let_through(index, starts=True), "P5: item {} starts outside of the window or the bytes", index)
        began.append(index)
        self._in_flight.add(index)
        demand(len(self._in_flight) <= self.plan.concurrency, "P5: {} are worked on at once", self._in_flight)

    def finished(self, index: int) -> None:
        """A worker is about to return the result of an item."""
        self._in_flight.discard(index)
        self._known.add(index)
        self._past = self._past._replace(finished=self._past.finished | {index})

    def let_go(self, index: int) -> None:
        """A worker has failed, or was cancelled."""
        self._in_flight.discard(index)

    def taken(self) -> None:
        """A commit is taken at this moment: it has to hold what has finished now, whenever it is written."""
        self._taken = frozenset(self._known)

    def commit_begins(self, commit: Commit) -> None:
        """The ledger gets a commit."""
        demand = self._demand
        self.loop.story.append(f"commit {commit.generation}: mark {commit.mark}, ahead {_indices(commit)}")
        demand(self._under_way is None, "P1: a commit begins while another is under way")
        demand(not self.poisoned, "I9: a commit begins after the storage has failed")
        if not self._trusting:
            self._check_commit(commit)
        self._under_way = commit, msgspec.json.encode(commit)

    def _check_commit(self, commit: Commit) -> None:
        """It is exactly what had finished when it was taken, and was not durable yet."""
        past, mark, taken, demand = self._past, commit.mark, self._taken, self._demand
        demand(commit.generation == past.generation + 1, "P1: generation {} after {}", commit.generation, past)
        demand(mark >= past.mark, "I3: the mark goes back from {} to {}", past.mark, mark)
        prefix = _unbroken(taken)
        demand(mark <= prefix, "P1: the mark {} passes {}, which has not finished", mark, prefix)
        held_back = set(range(mark, prefix)) - self._found_ahead
        demand(not held_back, "P1: the mark {} does not pass {}, which have finished", mark, held_back)
        demand(commit.records == self.items.records[past.mark : mark], "P1: the records are {}", commit.records)
        given, ahead = _indices(commit), sorted(index for index in taken - past.committed if index >= mark)
        demand(given == ahead, "P3: {} are ahead of the mark, and {} are committed as such", ahead, given)
        demand(all(self._is_ahead(item, mark) for item in commit.ahead), "P3: wrong records are ahead: {}", given)
        demand(mark > past.mark or bool(ahead) or not past.generation, "P4: an empty commit")
        demand((commit.window, commit.failed) == (self.plan.window, 0), "P6: wrong window or counter: {}", commit)
        self._check_bookmark(commit.bookmark, mark)

    def acknowledged(self) -> None:
        """The ledger says that the commit is durable."""
        assert self._under_way is not None
        commit, as_it_was = self._under_way
        self._demand(msgspec.json.encode(commit) == as_it_was, "P1: the commit changed while it was under way")
        self._under_way = None
        self._acknowledge(Past(commit.mark, commit.generation, self._taken, self._past.finished))

    def failed(self, error: BaseException) -> None:
        """A commit or a finish ended with an error: whether it is durable is not known."""
        self.excused.add(type(error))
        self._under_way, self.poisoned = None, True

    def compared(self) -> None:
        """What was there before has been compared with what is remembered."""
        self._compared = True

    def finish_begins(self, bookmark: Bookmark, summary: RunSummary) -> None:
        """The ledger is told to publish: the output is whole, durable and compared."""
        count, past, demand = self.plan.items, self._past, self._demand
        self.loop.story.append("finish")
        demand(not self.poisoned and self._under_way is None, "I9: a finish in a commit, or after a failure")
        demand(len(self._known) == count, "I2: published, and only {} have finished", self._known)
        demand((past.mark, len(past.committed)) == (count, count), "I2: published, and only {} is durable", past)
        demand(self._compared, "I2: published before all was compared")
        self._check_bookmark(bookmark, count)
        found = (summary.total_items, summary.processed, summary.executed, summary.resumed_from, summary.failed)
        expected = (count, count, len(self.began), self.resumed_from, 0)
        demand(found == expected, "P6: the summary says {}, not {}", found, expected)

    def finish_ended(self) -> None:
        """The ledger says that the output is published."""
        self._acknowledge(self._past._replace(published=True))

    def look(self) -> None:
        """Nothing can run: then nothing waits that could start."""
        run = self.run
        if not run._begun or run._stopping or run._pool.ended or len(self._in_flight) == self.plan.concurrency:
            return
        index = max(self.began[-1] + 1 if self.began else 0, self.resumed_from or 0)
        while index in self._found_ahead:
            index += 1
        held_back = run._cursor._held_back  # the last page waits for the next one, in a resume
        given = run._cursor.total_items - (len(held_back[1]) if held_back else 0)
        if index < given and self._is_let_through(index):
            self.loop.fail(f"P5: item {index} waits, and so does a worker")

    def ended(self, outcome: RunSummary | BaseException, *, published: bool) -> None:
        """The run has ended, and everything that finished is durable; unless a commit failed, or was cut."""
        demand = self._demand
        if isinstance(outcome, BaseException):
            demand(type(outcome) in self.excused, "P6: it ends with {!r}", outcome)
        else:
            demand(published, "I2: it ends as if it were done, and nothing is published")
        as_told = published == self._past.published
        demand(as_told or self.poisoned, "I2: published without a finish, or not in spite of it")
        left = [task for task in self.loop.tasks if not task.done()]
        demand(not left, "P7: the run has ended, and {} have not", left)
        if not published and not self.poisoned:
            lost = self._known - self._past.committed
            demand(not lost, "P7: {} have finished, and are not durable", lost)

    def _acknowledge(self, past: Past) -> None:
        self._past = past
        self.told()

    def _is_let_through(self, index: int, *, starts: bool = False) -> bool:
        """Whether it has to start; or, where it `starts`, whether it may, as the first that is not finished may."""
        records, mark = self.items.records, self._past.mark
        if index >= mark + self.plan.window:
            return False
        if index == _unbroken(self._known) and (starts or index == mark):
            return True
        if sum(map(len, records[mark:])) < self.plan.max_buffer_bytes:
            return True
        held = sum(len(records[i]) for i in self._known if i >= mark)
        return held < self.plan.max_buffer_bytes or index <= max(self._found_ahead, default=-1)

    def _is_ahead(self, item: Ahead, mark: int) -> bool:
        index, items = item.index, self.items
        return index >= mark and (item.item_crc, item.record) == (items.crcs[index], items.records[index])

    def _check_bookmark(self, bookmark: Bookmark, mark: int) -> None:
        complaint = self.items.complaint(bookmark, mark)
        self._demand(complaint is None, "P1: {} is not that of the mark {}: {}", bookmark, mark, complaint)

    def _demand(self, holds: bool, otherwise: str, *values: object) -> None:
        if not holds:
            self.loop.fail(otherwise.format(*values))


def _indices(commit: Commit) -> list[int]:
    return [item.index for item in commit.ahead]


def _unbroken(finished: AbstractSet[int]) -> int:
    """How far the items are finished without a gap."""
    mark = 0
    while mark in finished:
        mark += 1
    return mark
