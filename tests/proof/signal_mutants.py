"""Ways to obey signals wrongly, each of which the scenarios have to notice, and one in which it shows."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

from async_recovery.cursor import Cursor
from async_recovery.engine import Run
from async_recovery.file_ledger import FileLedger
from async_recovery.lock import Lock
from async_recovery.signals import Signals


class Mutant(NamedTuple):
    """A defect.

    :ivar patch: makes it.
    :ivar shows: the scenario in which it shows, and `says` what the violation has to say.
    """

    patch: Callable[[], AbstractContextManager[Any]]
    shows: str
    says: str


def instead(owner: type, method: str, broken: Callable[..., Any]) -> Callable[[], AbstractContextManager[Any]]:
    """`broken` in the place of `owner.method`."""
    return lambda: mock.patch.object(owner, method, broken)


def ends_at_once(self: Signals, number: int, frame: Any) -> None:
    os._exit(128 + number)


def never_ends_at_once(self: Signals, number: int, frame: Any) -> None:
    self.exit_code = 128 + number
    self._count += 1
    assert self._loop is not None
    self._loop.call_soon_threadsafe(self._stop if self._count == 1 else self._cancel)


def keeps_the_first_code(self: Signals, number: int, frame: Any) -> None:
    _receive(self, 2, frame)


def hands_out_more(self: Cursor) -> None:
    self.wake()


def hands_out_late_pages(self: Cursor) -> tuple[int, Any] | None:
    """As it was before layer 14 found it."""
    while self._collector.held < self._max_buffer_bytes or self._goes_out_anyway:
        index = self._watermark.take(self._stop)
        if index is not None:
            return index, self._items[index - self._first]
        if self._watermark.frontier < self._stop or not self._ready:
            return None
        self._turn_page()
    return None


def stops_by_cancelling(self: Run) -> None:
    _stop(self)
    if self._begun:
        self._pool.cancel()


async def commits_nothing_once_stopped(self: Run) -> None:
    if not self._stopping:
        await _commit(self)


def leaves_its_lock(self: Lock) -> None:
    self.forget()


def finishes_in_part(self: FileLedger, bookmark: Any, summary: Any) -> None:
    assert self._file is not None
    self._file.publish()
    _finish(self, bookmark, summary)


def nothing(self: Any) -> None:
    pass


_receive, _stop, _commit, _finish = Signals._receive, Run.stop, Run._commit, FileLedger._finish

MUTANTS = {
    "the first signal ends it, without a commit": Mutant(
        instead(Signals, "_receive", ends_at_once), "work/INT/at once", "it does not say that it was stopped"
    ),
    "the third signal waits for the loop": Mutant(
        instead(Signals, "_receive", never_ends_at_once),
        "an item blocks the loop/INT INT INT/at once",
        "the third signal did not end it",
    ),
    "every signal is SIGINT": Mutant(
        instead(Signals, "_receive", keeps_the_first_code), "work/TERM/at once", "exit code 130, not 143"
    ),
    "a stop hands out further items": Mutant(
        instead(Cursor, "stop", hands_out_more), "full window/INT/at once", "items begun when it was stopped"
    ),
    "a stop does not stop a page that is still to come": Mutant(
        instead(Cursor, "take", hands_out_late_pages), "a page is read/INT/at once", "items begun when it was stopped"
    ),
    "a stop does not drain": Mutant(instead(Run, "stop", stops_by_cancelling), "work/INT/at once", "finished are"),
    "the second signal does nothing": Mutant(
        instead(Signals, "_cancel", nothing), "work/INT INT/at once", "neither ended nor went on"
    ),
    "what drains is not committed": Mutant(
        instead(Run, "_commit", commits_nothing_once_stopped), "work/TERM/at once", "committed are"
    ),
    "a stop leaves its lock behind": Mutant(
        instead(Lock, "release", leaves_its_lock), "work/INT INT/one by one", "left are"
    ),
    "the output is published before it is whole": Mutant(
        instead(FileLedger, "_finish", finishes_in_part),
        "finish 1, the bracket: pwrite/INT INT INT/at once",
        "the output is short or torn",
    ),
}
