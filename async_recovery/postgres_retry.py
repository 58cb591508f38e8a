"""The failed items of a complete run in a PostgreSQL database, run again; as `sqlite_retry` does it.

The lock is that of the run itself: nobody does it anew meanwhile.
"""

from __future__ import annotations

from typing import Any, Literal
from zlib import crc32

import msgspec

from .checkpoint import Bookmark, encode_line
from .contracts import RunSummary
from .database import slices
from .errors import Mismatch, OutputChanged, UsageError
from .failures import whole_of
from .postgres import PostgresLedger
from .postgres_tables import joined, look
from .sqlite_retry import failures_in


class PostgresRetryLedger(PostgresLedger):
    """New records for the failures of a complete run.

    :param address: of the database, with the name of that run.
    :param fresh: start the retry anew, whatever is left of an earlier one.
    :param on_damage: as for `PostgresLedger`, for what is left of an earlier retry.
    """

    is_retry = True

    def __init__(
        self, address: str, *, fresh: bool = False, on_damage: Literal["restart", "refuse"] = "restart"
    ) -> None:
        super().__init__(address, fresh=fresh, on_damage=on_damage)
        self._given = f"{self._target!r} in {self._session.shown}"

    # What follows runs on the session's loop.

    async def _look_around(self, connection: Any) -> None:
        """Only a run that is complete, and is not being done anew, has failed items to be run again."""
        _, _, left = await look(connection, self._target)
        if left.line is not None:
            raise Mismatch(f"the run {self._given} is not finished: its failed items can be run again when it is")
        if left.complete_line is None:
            raise UsageError(f"there is no complete run {self._given}: name the finished output of a job")

    async def _finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        async def write(connection: Any) -> None:
            if summary.total_items:
                await self._merge(connection, bookmark, summary)
            await connection.execute("UPDATE async_recovery_run SET name = NULL WHERE id = $1", self._life)

        await self._durably(write, summary.total_items)
        self._nothing_done = False
        await self._sweep()

    async def _merge(self, connection: Any, bookmark: Bookmark, summary: RunSummary) -> None:
        """Put the new records in the places of the failures, in order."""
        _, life, left = await look(connection, self._target)
        complete = left.complete
        if complete is None or (complete.size, complete.crc) != whole_of(bookmark.position):
            raise self._target_changed()
        replace = 'UPDATE async_recovery_record SET record = $3 WHERE run = $1 AND "index" = $2'
        old_crc = size = crc = number = 0
        for first, end in slices(complete.summary["total_items"], complete.size or 0):
            lines = await joined(connection, life, first, end)
            old_crc = crc32(lines, old_crc)
            failed = [index for index, _, _ in failures_in(lines, first)]
            new = (await joined(connection, self._life, number, number + len(failed))).split(b"\n")[:-1]
            if len(new) != len(failed):
                raise self._target_changed()
            renumbered = [
                b'{"index":%d%b' % (index, record.removeprefix(b'{"index":%d' % at))
                for at, (index, record) in enumerate(zip(failed, new, strict=True), number)
            ]
            rows = [(life, index, record.decode()) for index, record in zip(failed, renumbered, strict=True)]
            await connection.executemany(replace, rows)
            number += len(new)
            lines = await joined(connection, life, first, end) if new else lines
            size, crc = size + len(lines), crc32(lines, crc)
        if old_crc != complete.crc or number != summary.total_items:
            raise self._target_changed()
        told = {**complete.summary, "failed": summary.failed}
        line = encode_line(msgspec.structs.replace(complete, size=size, crc=crc, summary=told)).rstrip(b"\n").decode()
        await connection.execute("UPDATE async_recovery_run SET checkpoint = $2 WHERE id = $1", life, line)

    def _target_changed(self) -> OutputChanged:
        return OutputChanged(
            f"the records of {self._given} are not what they were when the retry began: restore them to go on, or "
            "start the retry anew with --fresh (fresh=True)"
        )
