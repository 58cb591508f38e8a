"""What all ledgers over a database have in common: the rules. How a database is spoken to is each ledger's own.

A run has a name, and in its database at most two lives: one that is being worked on, and the last one that was
finished, whose records stay readable until the next one is complete. What is remembered of a life is the very line
that a journal would have (`checkpoint`), with its own checksum. It counts the records as the JSON Lines that they would
be in a file, and has the CRC-32 of those bytes: so a table that was changed is found, and an export of it is proven.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, ClassVar, Literal, Protocol
from zlib import crc32

import msgspec

from .checkpoint import (
    FORMAT,
    Ahead,
    Bookmark,
    Checkpoint,
    Commit,
    Complete,
    Job,
    OutputState,
    Spent,
    State,
    decode_line,
    encode_line,
    printable,
    unfinished,
)
from .contracts import RunSummary
from .errors import (
    AsyncRecoveryError,
    CheckpointUnusable,
    JobMismatch,
    OutputChanged,
    StorageFailed,
    UsageError,
    storage_failed,
)
from .file_ledger import differences, retry_of
from .lock import Holder

logger = logging.getLogger("async_recovery.ledger")

SCHEMA = 1
FORM = "table"
DEFAULT_RUN = "default"
RUN_CHARACTERS = 200
SLICE_BYTES = 1 << 20
NOTHING_WRITTEN = OutputState(0, 0, (0, 0))

Joined = Callable[[int, int], Awaitable[bytes]]
"""The records from one index up to another, in order, each with a line end; fewer if they are not there."""


AheadRow = tuple[int, int, bytes, int]
"""A record ahead of the mark as a table has it: its index, the CRC-32 of its item, itself, the CRC-32 of all three."""


class Left(msgspec.Struct, frozen=True):
    """What a run has left in a database.

    :ivar line: what is remembered of the life that is being worked on; None if there is none.
    :ivar records: how many records it has, and `last` the highest index of one (-1: none).
    :ivar complete_line: what is remembered of the life that was finished last; None if there is none.
    :ivar kept: that job was told to remember that it is complete.
    """

    line: bytes | None = None
    records: int = 0
    last: int = -1
    ahead: list[AheadRow] = []
    spent: list[Spent] = []
    complete_line: bytes | None = None
    kept: bool = False

    @property
    def state(self) -> State | None:
        """The last commit of the life that is being worked on; None if there is none, or it can not be read."""
        line = None if self.line is None else decode_line(self.line)
        return line if isinstance(line, State) else None

    @property
    def complete(self) -> Complete | None:
        """What was finished last; None if nothing was, or it can not be read."""
        line = None if self.complete_line is None else decode_line(self.complete_line)
        return line if isinstance(line, Complete) else None

    @property
    def whole_ahead(self) -> dict[int, Ahead]:
        """What is ahead, by ascending index, without the rows that were damaged."""
        return {row[0]: Ahead(*row[:3]) for row in sorted(self.ahead) if row[3] == _crc_of_ahead(*row[:3])}


class Snapshot(Protocol):
    """A run as it lay in its database at one moment, read without touching anything.

    :ivar run: its name.
    :ivar left: what it has left; nothing at all if there is no such run.
    :ivar runs: the names of all runs in the database.
    :ivar holder: who works on this run now; None if nobody does.
    """

    run: str
    left: Left
    runs: list[str]
    holder: Holder | None

    async def joined(self, first: int, end: int, *, complete: bool) -> bytes:
        """See `Joined`: of the complete life, or of the one that is being worked on."""
        ...


def ahead_row(item: Ahead) -> AheadRow:
    """The row of a record that is ahead, with its checksum."""
    record = item.record or b""
    return item.index, item.item_crc, record, _crc_of_ahead(item.index, item.item_crc, record)


def _crc_of_ahead(index: int, item_crc: int, record: bytes) -> int:
    return crc32(record, crc32(b"%d %d " % (index, item_crc)))


def after(written: OutputState, records: list[bytes]) -> OutputState:
    """What is written when these records follow."""
    if not records:
        return written
    lines = b"\n".join(records) + b"\n"
    return OutputState(written.offset + len(lines), crc32(lines, written.crc), (0, 0))


def written_of(complete: Complete) -> OutputState:
    """What was written when a job was complete."""
    return OutputState(complete.size or 0, complete.crc or 0, (0, 0))


async def is_whole(joined: Joined, records: int, written: OutputState) -> bool:
    """Whether the first `records` records are those that were written. Reads about a MiB at a time."""
    size = crc = 0
    for first, end in slices(records, written.offset):
        lines = await joined(first, end)
        size, crc = size + len(lines), crc32(lines, crc)
    return (size, crc) == (written.offset, written.crc)


def slices(records: int, size: int, begin: int = 0) -> Iterator[tuple[int, int]]:
    """The records from `begin` on, in slices of about a MiB: first index and end of each. All have `size` bytes."""
    most = max(1, SLICE_BYTES * records // max(1, size))
    for first in range(begin, records, most):
        yield first, min(first + most, records)


class DatabaseLedger:
    """The part of a ledger that does not depend on which database it is.

    :param output: what to call it in the summary: the address, without a password.
    :param run: the run's name in the database.
    :param input: the input's path, for people.
    :param fresh: start anew, whatever is there.
    :param keep_checkpoint: remember that the job is complete.
    :param on_damage: what is remembered of a run can not be read: ``"restart"`` puts it aside under another name, and
        starts anew; ``"refuse"`` raises.
    :raises UsageError: if an argument can not be used.
    """

    form = FORM
    is_retry: ClassVar[bool] = False  # of the failed items of the complete run of that name

    def __init__(
        self,
        output: str,
        run: str = DEFAULT_RUN,
        *,
        input: str | None = None,
        fresh: bool = False,
        keep_checkpoint: bool = False,
        on_damage: Literal["restart", "refuse"] = "restart",
    ) -> None:
        if on_damage not in ("restart", "refuse"):
            raise UsageError(f"on_damage is {on_damage!r}: it must be 'restart' or 'refuse'")
        check_run(run)
        if run.endswith(retry_of("")) and not self.is_retry:
            raise UsageError(
                f"run is {run!r}: a name that ends in {retry_of('')} is that of a retry of failed items; name "
                "another (?run=NAME), or run `async-recovery retry-failed`"
            )
        self.output: str | None = output
        self.address = output  # with a password, where there is one
        self._target = run
        self.run = retry_of(run) if self.is_retry else run
        self.keeps_checkpoint = keep_checkpoint
        self._where = f"the run {self.run!r} in {output}"
        self._shown_input = None if input is None else printable(input)
        self._fresh = fresh
        self._on_damage = on_damage
        self._poison: AsyncRecoveryError | None = None
        self._durable_mark: int | None = None
        self._written = self._resumed = NOTHING_WRITTEN
        self._resumed_mark = 0
        self._damaged = self._nothing_done = False
        self._job: Job

    async def check_writable(self) -> None:
        """See that the run can be written, as far as that can be told without touching anything.

        :raises UsageError: if it can not; `open` would say so, too.
        """

    def _decide(self, left: Left) -> Checkpoint:
        """What to do with what is there, as the file ledger does. Changes nothing."""
        if self._fresh:
            return Checkpoint()
        if left.line is not None:
            state = left.state
            if state is None:
                return self._begin_after_damage("what is remembered of it can not be read")
            self._refuse_other_job(state.job)
            return self._resume(left, state)
        if left.kept:
            complete = left.complete
            if complete is None:
                return self._begin_after_damage("what is remembered of its end can not be read")
            self._refuse_other_job(complete.job)
            if self.keeps_checkpoint:
                self._resumed_mark = complete.summary["total_items"]
                self._resumed = written_of(complete)
                return Checkpoint(complete=complete, kept=True)
        return Checkpoint()

    def _resume(self, left: Left, state: State) -> Checkpoint:
        if (left.records, left.last) != (state.mark, state.mark - 1):
            raise self._changed(f"it has {left.records} records, {state.mark} were written")
        ahead = left.whole_ahead
        if len(ahead) < len(left.ahead):
            logger.warning(
                "%s: damaged rows ahead of the mark: %d; they are done again",
                self._where,
                len(left.ahead) - len(ahead),
            )
        self._written = self._resumed = state.output or NOTHING_WRITTEN
        self._durable_mark = self._resumed_mark = state.mark
        self._nothing_done = state.mark == 0 and not left.ahead
        spent = unfinished({item.index: item for item in left.spent}, state.mark, ahead)
        return Checkpoint(state, ahead, spent=spent)

    def _begin_after_damage(self, what: str) -> Checkpoint:
        if self._on_damage == "refuse":
            raise CheckpointUnusable(f"{self._where}: {what}. Restore it, or start anew with --fresh (fresh=True)")
        logger.warning("%s: %s; it is put aside under another name, and the job starts anew", self._where, what)
        self._damaged = True
        return Checkpoint()

    def _refuse_other_job(self, found: Job) -> None:
        if found != self._job:
            raise JobMismatch(
                f"{self._where} is of another job: it has {differences(found, self._job)}. Run that job to its end, "
                "choose another name (?run=…), or start anew with --fresh (fresh=True)"
            )

    async def _refuse_change(self, joined: Joined, records: int, written: OutputState) -> None:
        """:raises OutputChanged: if these records are not those that were written; later commits then fail too."""
        if not await is_whole(joined, records, written):
            self._poison = self._changed(f"the first {records} records are not those that were written")
            raise self._poison

    def _changed(self, what: str) -> OutputChanged:
        return OutputChanged(
            f"{self._where} was changed: {what}. Restore it to go on, or start anew with --fresh (fresh=True)"
        )

    def _state_line(self, commit: Commit) -> bytes:
        """What is remembered once `commit` is durable."""
        self._written = after(self._written, commit.records)
        state = commit.state(self._job, input=self._shown_input, output=self._written)
        return encode_line(state).rstrip(b"\n")

    def _complete_line(self, bookmark: Bookmark, summary: RunSummary) -> bytes:
        """What is remembered of the finished job."""
        size, crc = self._written.offset, self._written.crc
        complete = Complete(FORMAT, self._job, self._shown_input, bookmark, size, crc, msgspec.to_builtins(summary))
        return encode_line(complete).rstrip(b"\n")

    def _refuse_if_poisoned(self) -> None:
        if self._poison is not None:
            raise self._poison

    def _failed(self, what: str) -> StorageFailed:
        """From here on nothing is written any more."""
        self._poison = error = storage_failed(f"{self.output}: {what}", self._durable_mark)
        return error


def check_run(run: Any) -> None:
    """:raises UsageError: if that can be no run's name."""
    if not isinstance(run, str) or not run.isprintable() or not 0 < len(run) <= RUN_CHARACTERS:
        raise UsageError(f"run is {run!r}: give the run a name of 1 to {RUN_CHARACTERS} printable characters")
