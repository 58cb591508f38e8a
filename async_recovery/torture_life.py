"""A process that is to be killed: one run of the job, which tells what it does, and dies at the step it is told to.

What it tells goes to a file, a line with one system call each: whatever had been said survives a SIGKILL. A line that
is torn was not yet said, and what it was to announce had not yet begun.

Nothing of this is seen by the job: its identity and its output are those that it has without.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, cast

import anyio
import msgspec

from .admission import Admission
from .checkpoint import JSON, Bookmark, Checkpoint, Commit, Job
from .contracts import Ledger, Page, RunSummary, Source
from .cursor import aclose
from .engine import Run
from .errors import shorten
from .files import Files
from .options import Options
from .pool import Pool
from .workers import AsyncWorker, Worker

LATENCIES_S = (0.001, 0.004, 0.002, 0.0005, 0.003)  # items take so much longer: some finish ahead, some are in flight
CHANGING = ("open", "pwrite", "chmod", "truncate", "fdatasync", "fsync", "rename", "unlink")
UNTRACED = ("builtins", "typing", "abc", "async_recovery.file_ledger", "async_recovery.contracts")


class Orders(msgspec.Struct, frozen=True):
    """What a process is told.

    :ivar diary: the file for what it tells.
    :ivar items: how many items of the input it takes.
    :ivar batch_size: how many items make a commit, and half of a window, where the job does not say.
    :ivar kill_at: the step at which it dies, and how often it has reached that one before; None: at none.
    """

    diary: str
    items: int
    batch_size: int
    kill_at: tuple[str, int] | None = None


class Told(msgspec.Struct):
    """What a process has told before its end.

    :ivar began: the items that it began, by index, as text.
    :ivar committed: indices that it found committed, or whose commit it acknowledged.
    :ivar steps: the steps that it reached.
    :ivar was_cut: the input has more items than it took.
    """

    began: dict[int, str] = {}
    committed: set[int] = set()
    steps: list[str] = []
    was_cut: bool = False


def read_diary(path: Path) -> Told:
    """What was told."""
    told = Told()
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for kind, *what in map(msgspec.json.decode, lines):
        if kind == "began":
            told.began[what[0]] = what[1]
        elif kind == "committed":
            told.committed.update(range(what[0]), what[1])
        elif kind == "step":
            told.steps.append(what[0])
        else:
            told.was_cut = True
    return told


class Watch:
    """Follows the one run of this process."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.inside_ledger = 0
        # O_NONBLOCK means nothing for a file, but to a tool that finds calls which block the loop: this one is meant.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
        self._diary = os.open(orders.diary, flags)
        self._reached: Counter[str] = Counter()
        self._one_step = threading.RLock()

    def tell(self, *what: JSON) -> None:
        """Say it."""
        os.write(self._diary, msgspec.json.encode(what) + b"\n")

    def step(self, label: str) -> None:
        """A step is reached."""
        with self._one_step:
            self.tell("step", label)
            if (label, self._reached[label]) == self.orders.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self._reached[label] += 1

    def follow(self, ledger: Ledger) -> WatchedLedger:
        """Follow the steps of this ledger: the calls of the seam, and the lines of one that somebody else wrote."""
        self._follow_files()
        sources = {source for kind in type(ledger).__mro__ if (source := _source_of(kind))}
        if sources:
            self._follow_lines(sources)
        return WatchedLedger(ledger, self, has_steps=bool(sources))

    def _follow_files(self) -> None:
        names: dict[int, str] = {}

        def wrap(name: str) -> None:
            operation: Callable[..., Any] = getattr(Files, name)

            def call(files: Files, first: int | str, *rest: Any) -> Any:
                what = names.get(first, "a file") if isinstance(first, int) else first
                label = f"{name} of {Path(what).name}"
                changes = name != "open" or rest[0] & os.O_CREAT
                if changes:
                    self.step(f"before {label}")
                found = operation(files, first, *rest)
                if name == "open":
                    names[found] = "the folder" if rest[0] & os.O_DIRECTORY else what
                elif name == "rename":
                    names.update({descriptor: rest[0] for descriptor, path in names.items() if path == first})
                if changes:
                    self.step(f"after {label}")
                return found

            setattr(Files, name, call)

        for name in CHANGING:
            wrap(name)

    def _follow_lines(self, sources: set[str]) -> None:
        def enter(frame: FrameType, event: str, argument: Any) -> Any:
            return line if frame.f_code.co_filename in sources else None

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "line" and self.inside_ledger:
                path, number = frame.f_code.co_filename, frame.f_lineno
                self.step(f"before {Path(path).name}:{number}: {linecache.getline(path, number).strip()}")
            return line

        threading.settrace(enter)
        sys.settrace(enter)


def _source_of(kind: type) -> str | None:
    try:
        return None if kind.__module__ in UNTRACED else inspect.getsourcefile(kind)
    except (TypeError, OSError):
        return None


class WatchedLedger:
    """A ledger, and what it has acknowledged."""

    def __init__(self, ledger: Ledger, watch: Watch, *, has_steps: bool) -> None:
        self._ledger, self._watch, self._has_steps = ledger, watch, has_steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    async def open(self, job: Job) -> Checkpoint:
        found: Checkpoint = await self._inside(self._ledger.open(job))
        mark = found.state.mark if found.state is not None else 0
        if found.complete is not None:
            mark = found.complete.summary["total_items"]
        # What a process before this one made durable, and did not live to acknowledge, is committed as well.
        self._watch.tell("committed", mark, list(found.ahead))
        return found

    async def commit(self, commit: Commit) -> None:
        await self._inside(self._ledger.commit(commit))
        self._watch.tell("committed", commit.mark, [item.index for item in commit.ahead])
        self._end("commit")

    async def finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        await self._inside(self._ledger.finish(bookmark, summary))
        self._end("finish")

    async def _inside(self, call: Any) -> Any:
        self._watch.inside_ledger += 1
        try:
            return await call
        finally:
            self._watch.inside_ledger -= 1

    def _end(self, call: str) -> None:
        if self._has_steps:
            self._watch.step(f"after {call}")


class WatchedRun(Run):
    """The run of a process that is watched. It takes the place of the run wherever one is made.

    :cvar watch: who watches.
    """

    watch: ClassVar[Watch]

    def __init__(self, worker: Worker, source: Source, ledger: Ledger, options: Options) -> None:
        orders = self.watch.orders
        if options.batch_size is None:
            options = msgspec.structs.replace(options, batch_size=orders.batch_size)
        if options.limits.window is None:  # else quick items would all have begun before the first commit is over
            limits = msgspec.structs.replace(options.limits, window=2 * orders.batch_size)
            options = msgspec.structs.replace(options, limits=limits)
        retry = options.retrying
        if retry is not None and retry.quarantine_after is not None:  # our kills say nothing about an item
            retry = msgspec.structs.replace(retry, quarantine_after=None)
            options = msgspec.structs.replace(options, retry=retry)
        watched = cast(Ledger, self.watch.follow(ledger))
        super().__init__(worker, First(source, orders.items, self.watch), watched, options)

    def _set_up_workers(self, checkpoint: Checkpoint) -> None:
        super()._set_up_workers(checkpoint)
        assert isinstance(self._pool, Pool)  # no executor: see `torture_command`
        self._pool._admission = cast(Admission, WatchedAdmission(self._admission, self.watch))
        self._pool._worker = _later(self._pool._worker)


class WatchedAdmission:
    """Hands out attempts, and says so before."""

    def __init__(self, admission: Admission, watch: Watch) -> None:
        self._admission, self._watch = admission, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._admission, name)

    def take(self) -> tuple[int, Any] | None:
        return self._told(self._admission.take())

    async def wait(self) -> tuple[int, Any] | None:
        return self._told(await self._admission.wait())

    def _told(self, taken: tuple[int, Any] | None) -> tuple[int, Any] | None:
        if taken is not None:
            self._watch.tell("began", taken[0], shorten(taken[1]))
        return taken


def _later(worker: AsyncWorker) -> AsyncWorker:
    latencies_s = itertools.cycle(LATENCIES_S)

    async def later(item: Any) -> Any:
        await anyio.sleep(next(latencies_s))
        return await worker(item)

    return later


class First:
    """The first items of a source. A position is that of the source, with the index of its first item."""

    def __init__(self, source: Source, items: int, watch: Watch) -> None:
        self.kind, self.path = source.kind, source.path
        self._source, self._items, self._watch = source, items, watch

    async def pages(self, position: JSON) -> AsyncIterator[Page]:
        index, at = (0, None) if position is None else position
        pages = self._source.pages(at)
        try:
            async for page in pages:
                items = page.items[: self._items - index]
                if len(items) < len(page.items):
                    self._watch.tell("cut")
                where = None if page.position is None else [index, page.position]
                if items or not page.items:
                    yield Page(where, items, page.crcs[: len(items)])
                index += len(items)
                if len(items) < len(page.items):
                    return
        finally:
            await aclose(pages)

    async def check(self, position: JSON, *, whole: bool) -> None:
        await self._source.check(None if position is None else position[1], whole=whole)

    def share(self, position: JSON) -> float | None:
        return None
