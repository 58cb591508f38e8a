"""All that the engine asks of the outside: where items come from, and where records and progress become durable."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from .checkpoint import JSON, Bookmark, Checkpoint, Commit, Job
from .progress import Progress


class Page(msgspec.Struct, frozen=True):
    """A run of items, read at once.

    :ivar position: re-reads the source from this page on, and says what `Source.check` needs to know that the
        source is still the same; None where a source has no positions and counts from its beginning.
    :ivar items: the items, in order; may be empty.
    :ivar crcs: CRC-32 of each raw item.
    """

    position: JSON
    items: Sequence[Any]
    crcs: Sequence[int]


class RunSummary(msgspec.Struct, frozen=True):
    """What a finished run did.

    :ivar total_items: items in the input.
    :ivar processed: items finished, by all runs together.
    :ivar checkpoint_cleared: whether the checkpoint was removed, so that the same line starts anew.
    :ivar resumed_from: the mark at which the last run began; 0 for a fresh start.
    :ivar executed: worker runs in this process, each attempt counted: with retries they can be more than the items.
    :ivar failed: recorded failures in the output.
    :ivar elapsed_s: seconds that the last run took.
    :ivar output: path of the output, or None.
    """

    total_items: int
    processed: int
    checkpoint_cleared: bool
    resumed_from: int
    executed: int
    failed: int
    elapsed_s: float
    output: str | None


@runtime_checkable
class Source(Protocol):
    """Where items come from, in pages: a position costs nothing per item, and any paged API fits.

    :ivar kind: what it is, in one word of the job's identity.
    :ivar path: where it lies, for people; or None.
    """

    @property
    def kind(self) -> str: ...

    @property
    def path(self) -> str | None: ...

    def pages(self, position: JSON) -> AsyncIterator[Page]:
        """The pages from `position` on (None: the start), in order; the same items each time.

        A source with positions ends with an empty page whose position is the end.
        """
        ...

    async def check(self, position: JSON, *, whole: bool) -> None:
        """Compare what lies before `position` with what it remembers.

        :param position: None: only see that the source is there.
        :param whole: every byte of it, slowly; otherwise what can be compared before the first item of a resume.
        :raises InputChanged: if it differs.
        :raises UsageError: if there is no such source.
        """
        ...

    def share(self, position: JSON) -> float | None:
        """Share of the source before `position`, 0 to 1; None where that is not known."""
        ...


@runtime_checkable
class Ledger(Protocol):
    """Where records and progress become durable together. One kind of output each; it owns its lock.

    The engine calls one method at a time, except `audit`, which runs beside the others. A call that has begun should
    come to its end even when its task is cancelled; where `commit` does not, nothing more is committed in that run.

    :ivar form: the form of the output in one word, for the job's identity. ``"none"`` (records are not kept) and
        ``"records"`` (a consumer takes them) mean something to the engine: say another.
    :ivar output: where the records go, for the summary; None if they are not kept.
    :ivar keeps_checkpoint: whether a finished job leaves its checkpoint behind.
    """

    form: str
    output: str | None
    keeps_checkpoint: bool

    async def open(self, job: Job) -> Checkpoint:
        """Take the lock and read what was left. Writes nothing that matters until the first commit.

        :returns: the state of the last commit (`Commit.state`), what is ahead and what was spent; an empty `Checkpoint`
            if there is none, also after `finish`, unless the ledger keeps its checkpoint.
        :raises AlreadyRunning: if another run holds the lock.
        :raises Mismatch: if what is there can not be resumed by `job`; nothing was changed.
        """
        ...

    async def audit(self) -> None:
        """Compare, slowly, all that `open` took on trust. Can be cancelled between any two reads.

        :raises OutputChanged: if something differs; later commits then fail as well.
        """
        ...

    async def commit(self, commit: Commit) -> None:
        """Make `commit` durable: all of it or nothing. The first commit of a fresh job has the mark 0.

        Each generation is one more than the last, and the records go from the last mark up to the new one.

        :raises StorageFailed: if that can not be known to have happened; every later call fails too.
        """
        ...

    async def show(self, progress: Progress) -> None:
        """Let others see where the run stands. Never durable, never fails."""
        ...

    async def finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        """Everything is committed: check the output once more and publish it, all of it at once.

        Until then, readers have what the last complete job left, if any.

        :raises OutputChanged: if the output is not what was written.
        :raises StorageFailed: as for `commit`.
        """
        ...

    async def close(self) -> None:
        """Give up the lock, once all that was begun has ended. Can be called at any time, and more than once.

        A job of which nothing is done yet may leave no trace.
        """
        ...


@runtime_checkable
class Patient(Protocol):
    """A ledger that waits for storage that is away. It need not, and most do not."""

    def hasten(self) -> None:
        """The run was asked to stop, and nothing is left but to make durable what finished: wait for seconds at most.

        Called on the loop of the run, also while another call is under way, and more than once.
        """
        ...
