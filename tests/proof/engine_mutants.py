"""Defects of the engine, each of which layer 4 (schedules) or layer 5 (crashes of schedules) has to notice."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import msgspec

from async_recovery.checkpoint import Checkpoint, Commit
from async_recovery.collector import Collector
from async_recovery.cursor import Cursor
from async_recovery.engine import Run
from async_recovery.file_ledger import FileLedger
from async_recovery.files import write_all
from async_recovery.journal import Journal
from async_recovery.watermark import Watermark

from .scheduled_loop import running

Patches = list[tuple[type, str, Any]]
Change = Callable[[Run, Commit], Commit]


class Mutant(NamedTuple):
    """A defect: what stands in the place of what, and where it is looked for: a family of layer 4, or by seeds."""

    name: str
    layer: int
    where: str
    patches: Patches


def mark_of_now(run: Run, commit: Commit) -> Commit:
    return msgspec.structs.replace(commit, mark=run._watermark.mark)


def ahead_of_now(run: Run, commit: Commit) -> Commit:
    ahead = [item for item in commit.ahead if item.index >= run._watermark.mark]
    return msgspec.structs.replace(commit, ahead=ahead)


def bookmark_of_now(run: Run, commit: Commit) -> Commit:
    return msgspec.structs.replace(commit, bookmark=run._cursor.bookmark(run._watermark.mark))


def after_an_await(change: Change) -> Patches:
    """The engine reads live state once more, after it has waited for something."""
    real = Run._commit

    async def broken(self: Run) -> None:
        commit = self._take_commit()
        await running().job("between")
        with mock.patch.object(self, "_take_commit", return_value=change(self, commit)):
            await real(self)

    return [(Run, "_commit", broken)]


def by_the_writer(change: Change) -> Patches:
    """The writer thread reads live state, while the workers go on."""
    real_take, real_commit, runs = Run._take_commit, FileLedger._commit, list[Run]()

    def take_commit(self: Run) -> Commit:
        runs[:] = [self]
        return real_take(self)

    def commit(self: FileLedger, commit: Commit) -> None:
        real_commit(self, change(runs[0], commit))

    return [(Run, "_take_commit", take_commit), (FileLedger, "_commit", commit)]


def bookmark_of_before(self: Run) -> Commit:
    before = self._bookmark
    return msgspec.structs.replace(real_take_commit(self), bookmark=before)


def advance_over_gaps(self: Watermark[bytes]) -> None:
    passed = sorted(index for index in self.ahead if index < self.frontier)
    self.released += [self.ahead.pop(index) for index in passed]
    self.mark += len(passed)


def complete_twice(self: Collector, index: int, record: bytes) -> bool:
    due = real_complete(self, index, record)
    if index < self.watermark.mark:
        self.watermark.released.append(record)
        self.watermark.mark += 1
    return due


def wake_one(self: Cursor, count: int | None = None) -> None:
    real_wake(self, 1 if count is None and self.gated and not self._stopped else count)


def acknowledge_the_mark_of_now(self: Collector, mark: int, records: list[bytes]) -> None:
    real_acknowledge(self, self.watermark.mark, records)


def pending_below_the_mark_alone(self: Collector) -> bool:
    return self.watermark.mark > self.watermark.durable


def exhausted_is_finished(self: Run) -> bool:
    return self._cursor.exhausted


async def compared_before_it_is(self: Run, checkpoint: Checkpoint) -> None:
    self._audited.set()
    await real_audit(self, checkpoint)


async def commit_without_doubt(self: Run) -> None:
    try:
        await real_commit(self)
    finally:
        self._in_doubt = False


def take_after_the_stop(self: Cursor) -> tuple[int, Any] | None:
    with mock.patch.object(self, "_stopped", new=False):
        return real_take(self)


def restore_without_ahead(self: Run, checkpoint: Checkpoint) -> None:
    real_restore(self, Checkpoint(checkpoint.state, {}, checkpoint.complete, checkpoint.kept))


def append_synced_late(self: Journal, parts: list[bytes]) -> None:
    assert self._descriptor is not None
    self._files.fdatasync(self._descriptor)
    for data in parts:
        write_all(self._files, self._descriptor, data, self._size)
        self._size += len(data)


def nothing(*_: object) -> None:
    pass


real_take_commit, real_commit, real_audit, real_restore = Run._take_commit, Run._commit, Run._audit, Run._restore
real_complete, real_acknowledge = Collector.complete, Collector.acknowledge
real_wake, real_take = Cursor.wake, Cursor.take
NEVER = property(lambda _: False)

MUTANTS = [
    Mutant("mark of a later moment", 4, "eight-on-four", after_an_await(mark_of_now)),
    Mutant("ahead of a later moment", 4, "eight-on-four", after_an_await(ahead_of_now)),
    Mutant("bookmark of a later moment", 4, "text", after_an_await(bookmark_of_now)),
    Mutant("the mark passes items in flight", 4, "eight-on-four", [(Watermark, "_advance", advance_over_gaps)]),
    Mutant("an outcome counts twice", 4, "eight-on-four", [(Collector, "complete", complete_twice)]),
    Mutant("after a commit one worker wakes", 4, "small-window", [(Cursor, "wake", wake_one)]),
    Mutant("a full window asks for no commit", 4, "seeds", [(Run, "_commit_if_it_helps", nothing)]),
    Mutant(
        "acknowledges the mark of now", 4, "small-window", [(Collector, "acknowledge", acknowledge_the_mark_of_now)]
    ),
    Mutant(
        "the end forgets what is ahead",
        4,
        "cancelled",
        [(Collector, "pending", property(pending_below_the_mark_alone))],
    ),
    Mutant("published before it is finished", 4, "cancelled", [(Run, "_is_finished", property(exhausted_is_finished))]),
    Mutant("published before it is compared", 4, "seeds", [(Run, "_audit", compared_before_it_is)]),
    Mutant("a commit after a failed one", 4, "seeds", [(Run, "_commit", commit_without_doubt)]),
    Mutant("handed out after the stop", 4, "seeds", [(Cursor, "take", take_after_the_stop)]),
    Mutant("the byte bound holds the mark", 5, "seeds", [(Cursor, "_goes_out_anyway", NEVER)]),
    Mutant("mark read by the writer", 5, "seeds", by_the_writer(mark_of_now)),
    Mutant("ahead read by the writer", 5, "seeds", by_the_writer(ahead_of_now)),
    Mutant("bookmark read by the writer", 5, "seeds", by_the_writer(bookmark_of_now)),
    Mutant("bookmark of the commit before", 5, "seeds", [(Run, "_take_commit", bookmark_of_before)]),
    Mutant("acknowledged before it is durable", 5, "seeds", [(Journal, "_append", append_synced_late)]),
    Mutant("a resume forgets what is ahead", 5, "seeds", [(Run, "_restore", restore_without_ahead)]),
]


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """With the defect of that name; None: without any."""
    found = [mutant for mutant in MUTANTS if mutant.name == name]
    assert bool(found) == bool(name), f"there is no mutant {name!r}"
    with contextlib.ExitStack() as stack:
        for mutant in found:
            for owner, attribute, broken in mutant.patches:
                stack.enter_context(mock.patch.object(owner, attribute, broken))
        yield


def is_shown(violation: str) -> bool:
    """Whether a violation is an invariant that does not hold, and not merely an exception out of the mutant."""
    by_exception = re.search(r"P6: it ends with (?!Input|Output|Incomplete|Checkpoint)", violation)
    return by_exception is None and re.search(r": ([IP]\d|deadlock): ", violation) is not None
