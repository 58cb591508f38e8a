"""Power cuts under a SQLite ledger: it commits and says so, the file system is shut down, mounted again, and read.

What a commit holds follows from its number alone: so all that lies there after a cut is known from one number.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import msgspec

from async_recovery import SqliteLedger
from async_recovery.checkpoint import Ahead, Bookmark, Commit, Job
from async_recovery.contracts import RunSummary
from async_recovery.database import Snapshot
from async_recovery.errors import AsyncRecoveryError
from async_recovery.ledgers import NoSuchRun, look_at

from .disks import SHUTDOWNS, Disk, die_with_parent, enter_own_namespace

COMMITS = 40
RECORDS = 3  # that each commit but the first adds
TOTAL = RECORDS * (COMMITS - 1)
SUMMARY = RunSummary(
    total_items=TOTAL,
    processed=TOTAL,
    checkpoint_cleared=True,
    resumed_from=0,
    executed=TOTAL,
    failed=0,
    elapsed_s=1.0,
    output=None,
)
JOB = Job("iterable", "tests:worker", None, "table")


class Unit(NamedTuple):
    """So many cuts on a disk of that kind; `healthy`: with the settings of the ledger, else with synchronous=NORMAL."""

    kind: str
    seed: str
    cuts: int
    healthy: bool = True


@dataclass
class Tally:
    """What the cuts met: the phase of the job, and how the process ended."""

    cuts: int = 0
    lost: list[str] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: Tally) -> Tally:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


@functools.cache
def record(version: int, index: int) -> bytes:
    """From some bytes to some pages, another one in each version of the job."""
    text = f"{version} " * random.Random(index).choice((1, 20, 400, 3_000))
    return msgspec.json.encode({"index": index, "text": text})


def commit_of(version: int, number: int) -> Commit:
    """The commit of that number, from 1 on."""
    mark = RECORDS * (number - 1)
    ahead = mark + 1 + number % (2 * RECORDS)
    return Commit(
        generation=number,
        mark=mark,
        window=100,
        bookmark=Bookmark(None, 0, number),
        records=[record(version, index) for index in range(max(0, mark - RECORDS), mark)],
        ahead=[Ahead(ahead, ahead, record(version, ahead))] if number > 1 and ahead < TOTAL else [],
        failed=0,
    )


def ahead_after(version: int, number: int) -> dict[int, Ahead]:
    """What is ahead once the commits up to that number are durable."""
    items = (item for n in range(1, number + 1) for item in commit_of(version, n).ahead)
    found = {item.index: item for item in items if item.index >= RECORDS * (number - 1)}
    return dict(sorted(found.items()))


@functools.cache
def lines_of(version: int, count: int) -> bytes:
    return b"".join(record(version, index) + b"\n" for index in range(count))


async def work(path: Path, version: int, tell: int) -> None:
    """One process: from what it finds to the end of the job, a message for each commit that is acknowledged."""
    ledger = SqliteLedger(path)
    try:
        found = await ledger.open(JOB)
        await ledger.audit()
        for number in range((found.state.generation if found.state else 0) + 1, COMMITS + 1):
            await ledger.commit(commit_of(version, number))
            os.write(tell, b"%d\n" % number)
        await ledger.finish(Bookmark(None, TOTAL, 0), SUMMARY)
        os.write(tell, b"%d\n" % (COMMITS + 1))
    finally:
        await ledger.close()


def child(path: Path, version: int, tell: int, *, healthy: bool) -> None:
    """The process of `work`; it does not return."""
    code = 1
    try:
        die_with_parent()
        with contextlib.nullcontext() if healthy else normal():
            asyncio.run(work(path, version, tell))
        code = 0
    except AsyncRecoveryError as error:
        code = error.exit_code
    finally:
        os._exit(code)


@contextlib.contextmanager
def normal() -> Iterator[None]:
    """The control: a ledger that does not sync the log at each commit."""

    def configure(self: SqliteLedger) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")

    with mock.patch.object(SqliteLedger, "_configure", configure):
        yield


class Found(NamedTuple):
    """What a reader sees after a cut: the number of the last commit, and the version of the complete run (-1: none)."""

    number: int
    complete: int


def check(path: Path, version: int) -> Found:
    """Read all that is there; it must be exactly what one number of a commit, and one version, explain.

    :raises AssertionError: if it is not.
    """

    async def look(snapshot: Snapshot) -> tuple[int, bytes]:
        state = snapshot.left.state
        assert state is not None or snapshot.left.line is None, "what is remembered can not be read"
        if state is not None:
            assert state.mark == RECORDS * (state.generation - 1), "the mark is not that of the commit"
            assert snapshot.left.whole_ahead == ahead_after(version, state.generation), "what is ahead is not"
            assert len(snapshot.left.ahead) == len(snapshot.left.whole_ahead), "a row ahead is damaged"
            lines = await snapshot.joined(0, 1 << 30, complete=False)
            assert lines == lines_of(version, state.mark), "the records are not those below the mark"
        return state.generation if state else 0, await snapshot.joined(0, 1 << 30, complete=True)

    try:
        number, lines = asyncio.run(look_at(f"sqlite:///{path}", look, whole=True))
    except NoSuchRun:
        return Found(0, -1)
    if not lines:
        return Found(number, -1)
    complete = next((v for v in (version, version - 1) if lines == lines_of(v, TOTAL)), None)
    assert complete is not None, "a reader sees a run that is not whole"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        assert connection.execute("SELECT count(*) FROM async_recovery_results").fetchone() == (TOTAL,)
    return Found(number, complete)


def cut_many_times(unit: Unit) -> Tally:
    """One job after the other in one database, each cut until it is complete. In a process of its own.

    :raises AssertionError: if something acknowledged is lost, or what lies there is no state of the job; with the
        control, what was lost is in the tally.
    """
    enter_own_namespace()
    tally = Tally()
    dice = random.Random(f"{unit.kind}/{unit.seed}")
    with tempfile.TemporaryDirectory(prefix="sqlite-cuts-") as folder:
        point = Path(folder) / "disk"
        point.mkdir()
        with Disk(unit.kind, point) as disk:
            version = 0
            while tally.cuts < unit.cuts:
                found = Found(0, -1 if version == 0 else version - 1)
                while found.complete != version and tally.cuts < unit.cuts:
                    found = cut_once(disk, point / "out.db", version, found, dice, tally, healthy=unit.healthy)
                version += 1
    return tally


def cut_once(
    disk: Disk, path: Path, version: int, before: Found, dice: random.Random, tally: Tally, *, healthy: bool
) -> Found:
    """One process, and the cut that ends it; all that it leaves is checked."""
    listen, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(listen)
        child(path, version, tell, healthy=healthy)
    os.close(tell)
    told = b""
    aim = dice.choice((0, 0, 1, *range(1, COMMITS + 1)))
    while told.count(b"\n") < aim and (more := os.read(listen, 1 << 16)):
        told += more
    time.sleep(dice.uniform(0, 0.0015))  # the moment of the cut, not synchronisation
    disk.cut(dice.choice(list(SHUTDOWNS)) if healthy else "NOLOGFLUSH")
    if dice.random() < 0.6:
        os.kill(pid, signal.SIGKILL)
    while more := os.read(listen, 1 << 16):
        told += more
    os.close(listen)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    # SIGBUS: a page of the index in shared memory that the disk did not give; it ends the process as SIGKILL does.
    assert code in (0, 74, -signal.SIGKILL, -signal.SIGBUS), f"exit code {code}"
    disk.remount()
    acknowledged = max(map(int, told.split()), default=before.number)
    found = check(path, version)
    tally.cuts += 1
    tally.ends[str(code)] += 1
    tally.phases["start" if not told else "work" if acknowledged < COMMITS else "finish"] += 1
    number = COMMITS + 1 if found.complete == version else found.number
    if number < acknowledged and not (acknowledged == 1 and number == 0):  # with nothing done nothing may be left
        lost = f"the commit {acknowledged} was acknowledged, {number} is there"
        assert not healthy, lost
        tally.lost.append(lost)
    assert found.complete >= before.complete or not healthy, "the last complete run is lost"
    return found
