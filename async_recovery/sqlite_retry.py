"""The failed items of a complete run in a SQLite database, run again: each new record takes the place of its failure.

The new records are a run of their own, ``NAME.retry``, which is never complete. When all of them are there, one
transaction puts them into the complete run and removes that run: a crash leaves the one or the other.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from typing import Literal
from zlib import crc32

import msgspec

from .checkpoint import JSON, Bookmark, Complete, encode_line
from .contracts import Page, RunSummary
from .database import Snapshot, is_whole, slices, written_of
from .errors import InputChanged, Mismatch, OutputChanged, UsageError
from .failures import FailuresSource, whole_of
from .ledgers import look_at, public, sqlite_path
from .records import FAILURE_MARK, Failure, read_failure
from .sqlite import SqliteLedger, joined, look

logger = logging.getLogger("async_recovery.ledger")


class DatabaseFailures:
    """The items of the recorded failures in a complete run, in order, as JSON gives them back.

    Each page is read in a transaction of its own, which is over before the page is worked on.

    :param address: of the database, with the name of the run.
    """

    kind = FailuresSource.kind

    def __init__(self, address: str) -> None:
        self._shown = public(address)
        self.path: str | None = self._shown
        self._address = address
        self._total = 0

    async def check(self, position: JSON, *, whole: bool) -> None:
        """See `Source.check`: also without a position all of it is compared with what is remembered of it."""

        async def compare(snapshot: Snapshot) -> None:
            complete = self._complete(snapshot, position)

            async def joined(first: int, end: int) -> bytes:
                return await snapshot.joined(first, end, complete=True)

            if whole or position is None:
                total, written = complete.summary["total_items"], written_of(complete)
                if not await is_whole(joined, total, written):
                    raise self._changed()

        await look_at(self._address, compare)

    async def pages(self, position: JSON) -> AsyncIterator[Page]:
        """See `Source.pages`."""
        first = 0 if position is None else _read_index(position)
        while True:

            async def read(snapshot: Snapshot, first: int = first, position: JSON = position) -> tuple[Page, int]:
                complete = self._complete(snapshot, position)
                total, size = complete.summary["total_items"], complete.size or 0
                self._total = total
                here = {"index": first, "whole": (size, complete.crc)}
                _, end = next(slices(total, size, first), (first, first))
                lines = await snapshot.joined(first, end, complete=True) if end > first else b""
                found = [(line, failure) for _, line, failure in failures_in(lines, first)]
                items = [failure.item for _, failure in found]
                return Page(here, items, [crc32(line) for line, _ in found]), end

            page, end = await look_at(self._address, read)
            yield page
            if end == first:
                return
            first, position = end, page.position

    def share(self, position: JSON) -> float | None:
        """See `Source.share`."""
        index = 0 if position is None else _read_index(position)
        return index / self._total if self._total else 1.0 if position is not None else 0.0

    def _complete(self, snapshot: Snapshot, position: JSON) -> Complete:
        complete = snapshot.left.complete
        if complete is None:
            raise UsageError(f"the run {self._shown} is not complete: run its own line again first")
        if position is not None and whole_of(position) != (complete.size, complete.crc):
            raise self._changed()
        return complete

    def _changed(self) -> InputChanged:
        return InputChanged(
            f"the records of {self._shown} have changed since the retry of its failed items began, or are not those "
            "that were written. Restore them to go on, or start the retry anew with --fresh (fresh=True)"
        )


class SqliteRetryLedger(SqliteLedger):
    """New records for the failures of a complete run.

    :param address: of the database, with the name of that run.
    :param fresh: start the retry anew, whatever is left of an earlier one.
    :param on_damage: as for `SqliteLedger`, for what is left of an earlier retry.
    """

    is_retry = True

    def __init__(
        self, address: str, *, fresh: bool = False, on_damage: Literal["restart", "refuse"] = "restart"
    ) -> None:
        path, run = sqlite_path(address)
        super().__init__(path, run, fresh=fresh, on_damage=on_damage)
        self.output = self._given = address

    # What follows runs on the writer thread.

    def _look_around(self) -> None:
        """Only a run that is complete, and is not being done anew, has failed items to be run again."""
        _, _, left = look(self._connection, self._target)
        if left.line is not None:
            raise Mismatch(f"the run {self._given} is not finished: its failed items can be run again when it is")
        if left.complete_line is None:
            raise UsageError(f"there is no complete run {self._given}: name the finished output of a job")

    def _finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        with self._transaction():
            if summary.total_items:
                self._merge(bookmark, summary)
            self._connection.execute("UPDATE async_recovery_run SET name = NULL WHERE id = ?", (self._life,))
        self._nothing_done = False
        self._sweep_at_last()

    def _merge(self, bookmark: Bookmark, summary: RunSummary) -> None:
        """Put the new records in the places of the failures, in order."""
        _, life, left = look(self._connection, self._target)
        complete = left.complete
        if complete is None or (complete.size, complete.crc) != whole_of(bookmark.position):
            raise self._target_changed()
        old_crc = size = crc = number = 0
        for first, end in slices(complete.summary["total_items"], complete.size or 0):
            lines = joined(self._connection, life, first, end)
            old_crc = crc32(lines, old_crc)
            failed = [index for index, _, _ in failures_in(lines, first)]
            new = joined(self._connection, self._life, number, number + len(failed)).split(b"\n")[:-1]
            if len(new) != len(failed):
                raise self._target_changed()
            rows = [
                (life, index, b'{"index":%d%b' % (index, record.removeprefix(b'{"index":%d' % at)))
                for at, (index, record) in enumerate(zip(failed, new, strict=True), number)
            ]
            self._insert("record", ((life, index, record.decode()) for life, index, record in rows))
            number += len(new)
            lines = joined(self._connection, life, first, end) if new else lines
            size, crc = size + len(lines), crc32(lines, crc)
        if old_crc != complete.crc or number != summary.total_items:
            raise self._target_changed()
        told = {**complete.summary, "failed": summary.failed}
        line = encode_line(msgspec.structs.replace(complete, size=size, crc=crc, summary=told)).rstrip(b"\n").decode()
        self._connection.execute("UPDATE async_recovery_run SET checkpoint = ? WHERE id = ?", (line, life))

    def _target_changed(self) -> OutputChanged:
        return OutputChanged(
            f"the records of {self._given} are not what they were when the retry began: restore them to go on, or "
            "start the retry anew with --fresh (fresh=True)"
        )


def failures_in(lines: bytes, first: int) -> Iterator[tuple[int, bytes, Failure]]:
    """The recorded failures among the records from index `first` on: the index, the record, and what it says."""
    if FAILURE_MARK not in lines:
        return
    for index, line in enumerate(lines.split(b"\n")[:-1], first):
        failure = read_failure(line) if FAILURE_MARK in line else None
        if failure is not None:
            yield index, line, failure


def _read_index(position: JSON) -> int:
    index = position.get("index") if isinstance(position, dict) else None
    if not isinstance(index, int):
        raise InputChanged(f"the checkpoint's position {position!r} is not one of a run in a database")
    return index
