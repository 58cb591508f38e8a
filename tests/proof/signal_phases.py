"""The phases of a run that signals arrive in: how a fork comes to wait there, and what must be done in the end."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import click

from async_recovery import engine, file_ledger, journal, sources, workers
from async_recovery.cursor import Cursor
from async_recovery.file_ledger import FileLedger
from async_recovery.files import Files
from async_recovery.journal import Journal
from async_recovery.lock import Lock
from async_recovery.output_file import OutputFile
from async_recovery.signals import Signals
from async_recovery.sources import TextSource

from .forks import Inside, Prepare

ITEMS = 8
HELD = (3, 6)
EVERYTHING = frozenset(range(ITEMS))
CANCELLED = EVERYTHING - {3, 6, 7}  # what has finished while the items 3 and 6 are held, two at a time
DRAINED = EVERYTHING - {7}


# Where a fork is held


def at(owner: Any, method: str, operation: str | None = None, *, middle: bool = False) -> Prepare:
    """When `owner.method` begins; or at its first `operation` on files, `middle`: with half of the bytes written."""

    def prepare(inside: Inside) -> None:
        whole, inner = getattr(owner, method), []

        def entered(*args: Any, **named: Any) -> Any:
            if operation is None:
                inside.hold("seam")
                return whole(*args, **named)
            inner.append(True)
            try:
                return whole(*args, **named)
            finally:
                inner.pop()

        setattr(owner, method, entered)
        if operation is not None:
            real = getattr(Files, operation)

            def step(files: Files, *given: Any) -> Any:
                if inner and middle:
                    descriptor, data, offset = given
                    real(files, descriptor, data[: len(data) // 2], offset)
                if inner:
                    inside.hold("seam")
                return real(files, *given)

            setattr(Files, operation, step)

    return prepare


def at_check(*, whole: bool) -> Prepare:
    """On the loop, when the source is compared."""

    def prepare(inside: Inside) -> None:
        check = TextSource.check

        async def held(self: TextSource, position: Any, *, whole: bool) -> None:
            if whole is wanted:
                await inside.hold_loosely("seam")
            await check(self, position, whole=whole)

        setattr(TextSource, "check", held)  # noqa: B010

    wanted = whole
    return prepare


def at_page(number: int) -> Prepare:
    """On the loop, before that page is given."""

    def prepare(inside: Inside) -> None:
        pages = TextSource.pages

        async def held(self: TextSource, position: Any) -> Any:
            given = 0
            if number == 0:
                await inside.hold_loosely("seam")
            async for page in pages(self, position):
                if given and given == number:
                    await inside.hold_loosely("seam")
                yield page
                given += 1

        setattr(TextSource, "pages", held)  # noqa: B010

    return prepare


def in_small_pages(inside: Inside) -> None:
    """The input comes two items at a time."""
    sources.PAGE_BYTES = 4


def at_flock(inside: Inside) -> None:
    """When the lock is taken, and its file does not say so yet."""
    flock = fcntl.flock

    def held(descriptor: Any, operation: int) -> None:
        flock(descriptor, operation)
        inside.hold("seam")

    fcntl.flock = held


def compacting(inside: Inside) -> None:
    """Every commit writes the journal anew."""
    journal.worth_compacting = lambda size, live: True  # type: ignore[attr-defined]


def in_small_blocks(inside: Inside) -> None:
    """The audit can be cancelled between any two records."""
    file_ledger.AUDIT_BYTES = 16


def showing(inside: Inside) -> None:
    """Progress is shown all the time."""
    engine.SHOW_INTERVAL_S = 0


def tell_of(owner: Any, method: str, word: str) -> Prepare:
    """Say a word whenever `owner.method` is called."""

    def prepare(inside: Inside) -> None:
        whole = getattr(owner, method)

        def telling(*args: Any) -> Any:
            inside.report(word)
            return whole(*args)

        setattr(owner, method, telling)

    return prepare


# The phases


@dataclass(frozen=True)
class Phase:
    """A moment of a run that signals arrive in.

    :ivar name: what it is called.
    :ivar prepare: how a fork comes to wait there.
    :ivar reached: what it says when it is there, and how often.
    :ivar then: what it has to say, when it is let go, before the items are.
    :ivar before: what lies in the folder when the run begins: see `Stage`.
    :ivar holds: the items that are held.
    :ivar ends: how a run ends that is stopped there.
    :ivar drained: what is done after one signal, and `cancelled` after two.
    :ivar blocks: it is the main thread that waits: a signal's handler runs, the loop does not.
    :ivar ends_after: so many signals end it although nobody lets it go.
    :ivar refuses: the items do not end when they are cancelled.
    :ivar stopped_before: a first signal came while items were in flight; the others come here.
    :ivar deaf: the end is decided, and signals mean nothing any more.
    """

    name: str
    prepare: Sequence[Prepare] = ()
    reached: dict[str, int] = field(default_factory=lambda: {"seam": 1})
    then: dict[str, int] = field(default_factory=dict)
    before: str = "fresh"
    words: Sequence[str] = ()
    worker: str = "work"
    holds: Sequence[int] = ()
    ends: Literal["at once", "stopped", "complete"] = "stopped"
    drained: frozenset[int] = frozenset()
    cancelled: frozenset[int] = frozenset()
    blocks: bool = False
    ends_after: int = 3
    refuses: bool = False
    stopped_before: bool = False
    deaf: bool = False


IN_FLIGHT = {"item": 2}
WORK: dict[str, Any] = {"holds": HELD, "drained": DRAINED, "cancelled": CANCELLED}
RESUMED: dict[str, Any] = {"before": "interrupted", "drained": CANCELLED, "cancelled": CANCELLED}


def steps(name: str, owner: type, method: str, *operations: str, prepare: Sequence[Prepare] = (), **more: Any) -> Any:
    """A phase for each of these operations of a method; ``half pwrite`` is one whose write is half done."""
    for operation in operations:
        middle, plain = operation.startswith("half "), operation.removeprefix("half ")
        yield Phase(f"{name}: {operation}", [*prepare, at(owner, method, plain, middle=middle)], **more)


def starts() -> Iterator[Phase]:
    """Before the first item."""
    yield Phase("the worker's module is imported", [at(workers, "load")], ends="at once", blocks=True)
    yield Phase("the lock is not tried yet", [at(Lock, "acquire")])
    yield Phase("the lock is just taken", [at_flock])
    yield Phase("the lock's file is written", [at(Lock, "show")])
    yield from steps("the journal is loaded", Journal, "load", "open", "fsync", "pread", **RESUMED)
    yield from steps("the output is compared", OutputFile, "resume", "open", "fsync", "pread", **RESUMED)
    torn = {**RESUMED, "before": "torn"}
    yield from steps("the output is cut back", OutputFile, "cut", "truncate", "fsync", **torn)
    yield from steps("the journal is cut back", Journal, "resume", "truncate", "fsync", **torn)
    for before, more in (("fresh", {}), ("resumed", RESUMED)):
        yield Phase(f"{before}: the rules are set up", [at(engine.Run, "_restore")], blocks=True, **more)
        yield Phase(f"{before}: the source is compared", [at_check(whole=False)], ends_after=1, **more)
        yield Phase(f"{before}: the first page is read", [at_page(0)], ends_after=1, **more)
    replaced = ("open", "pwrite", "half pwrite", "fsync", "rename", "fsync_directory")
    yield from steps("mark 0, journal", Journal, "begin", *replaced)
    yield from steps("mark 0, output", OutputFile, "begin", "open", "truncate", "fsync", "fsync_directory")


def works() -> Iterator[Phase]:
    """Items are in flight."""
    yield Phase("work", reached=IN_FLIGHT, **WORK)
    yield Phase(
        "full window",
        [tell_of(engine.Run, "_commit_if_it_helps", "full")],
        {"item": 1, "full": 1},
        words=("--window", "4"),
        holds=(0,),
        drained=frozenset({0, 1, 2, 3}),
        cancelled=frozenset({1, 2, 3}),
    )
    yield Phase(
        "a page is read",
        [in_small_pages, at_page(2), tell_of(Cursor, "add", "page")],
        {"seam": 1, **IN_FLIGHT},
        then={"page": 3},
        holds=(2, 3),
        drained=frozenset({0, 1, 2, 3}),
        cancelled=frozenset({0, 1}),
    )
    yield Phase("progress is shown", [showing, at(FileLedger, "_show")], {"seam": 1, **IN_FLIGHT}, **WORK)
    refusing: dict[str, Any] = {**WORK, "drained": CANCELLED, "reached": IN_FLIGHT, "refuses": True}
    yield Phase("items swallow their cancellation", **refusing)
    yield Phase("items block their threads", worker="plain", ends_after=2, **refusing)
    yield Phase("items wait for blocked threads", worker="waits_for_thread", ends_after=2, **refusing)
    first_four = frozenset({0, 1, 2, 3})
    yield Phase(
        "an item blocks the loop",
        reached={"item": 1},
        words=("--concurrency", "1"),
        holds=(3,),
        drained=first_four,
        cancelled=first_four,
        blocks=True,
    )
    busy: dict[str, Any] = {"reached": {"seam": 1, **IN_FLIGHT}, **WORK}
    yield from steps("commit, output", OutputFile, "append", "pwrite", "half pwrite", "fdatasync", **busy)
    yield from steps("commit, journal", Journal, "commit", "pwrite", "half pwrite", "fdatasync", **busy)
    rewritten = ("open", "pwrite", "half pwrite", "fsync", "rename", "fsync_directory", "close")
    yield from steps("compaction", Journal, "commit", *rewritten, prepare=[compacting], **busy)


def ends() -> Iterator[Phase]:
    """A resume is compared, everything is done, or the end has begun."""
    compared = {**RESUMED, **WORK}
    all_done = {**RESUMED, "drained": EVERYTHING, "cancelled": EVERYTHING, "reached": {"seam": 1, "idle": 2}}
    idle = tell_of(engine.Run, "_until_stopped", "idle")
    for what, prepare in (("input", at_check(whole=True)), ("output", at(OutputFile, "crc_of"))):
        yield Phase(f"the {what} is audited during work", [prepare], {"seam": 1, **IN_FLIGHT}, **compared)
    yield Phase("all but the input's audit is done", [idle, at_check(whole=True)], ends_after=1, **all_done)
    audited = [idle, at(OutputFile, "crc_of")]
    yield Phase("all but the output's audit is done", [in_small_blocks, *audited], **all_done)
    yield Phase("all but the audit's last block is done", audited, ends="complete", **all_done)
    done: dict[str, Any] = {"ends": "complete", "drained": EVERYTHING, "cancelled": EVERYTHING}
    yield from steps("finish 1, the bracket", OutputFile, "close_frame", "pwrite", "half pwrite", "fdatasync", **done)
    yield from steps("finish 2, verify", OutputFile, "verify", "stat", "lstat", "pread", **done)
    yield from steps("finish 3, the complete line", Journal, "complete", "pwrite", "half pwrite", "fdatasync", **done)
    yield from steps("finish 4, publish", OutputFile, "publish", "rename", "fsync_directory", **done)
    yield from steps("finish 5, the journal goes", Journal, "remove", "unlink", "fsync_directory", **done)
    rewritten = ("open", "pwrite", "half pwrite", "fsync", "rename", "fsync_directory", "close")
    keep = ("--keep-checkpoint",)
    yield from steps("finish 5, the journal is kept", Journal, "keep", *rewritten, words=keep, **done)
    published = {**done, "before": "complete"}
    yield from steps("published by the next start", OutputFile, "publish_complete", "fsync", "pread", **published)
    yield from steps("published by the next start", OutputFile, "publish", "rename", "fsync_directory", **published)
    kept: dict[str, Any] = {"before": "kept", "words": keep, "drained": EVERYTHING, "cancelled": EVERYTHING}
    yield Phase("a kept job is compared", [at_check(whole=True)], ends_after=1, **kept)
    yield Phase("complete: the ledger is closed", [at(FileLedger, "_close")], **done)
    yield Phase("complete: the lock is given up", [at(Lock, "release")], **done)
    yield Phase("complete: the end is not decided yet", [at(Signals, "ignore")], blocks=True, **done)
    yield Phase("complete: the summary is printed", [at(click, "echo")], blocks=True, deaf=True, **done)
    stopped: dict[str, Any] = {
        **WORK,
        "drained": CANCELLED,
        "words": ("--drain-timeout", "0", "--batch-size", "100"),
        "stopped_before": True,
    }
    yield from steps("last commit, output", OutputFile, "append", "pwrite", "half pwrite", "fdatasync", **stopped)
    yield from steps("last commit, journal", Journal, "commit", "pwrite", "half pwrite", "fdatasync", **stopped)
    yield Phase("stopped: the ledger is closed", [at(FileLedger, "_close")], **stopped)
    yield Phase("stopped: the lock is given up", [at(Lock, "release")], **stopped)
    yield Phase("stopped: the end is not decided yet", [at(Signals, "ignore")], blocks=True, **stopped)
    yield Phase("stopped: the resume line is printed", [at(click, "echo")], blocks=True, deaf=True, **stopped)


PHASES = {phase.name: phase for phase in (*starts(), *works(), *ends())}
