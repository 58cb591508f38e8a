"""Power cuts: the real command line on a real file system that is shut down under it, mounted again, and checked.

A round is one job: cut at a random moment, again and again, until the same line has finished it. A round's name is
``kind/job/seed``; its moments follow from the name (the machine's own timing does not). Replay it::

    .venv/bin/python -m tests.proof.power_cuts xfs/compaction/4711.3
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from async_recovery.files import DISK
from async_recovery.output_file import framing_of
from tests.support.commands import Committed, Ended, Folder, read_committed
from tests.support.file_jobs import names_in, replay_of
from tests.support.fork_server import TemporaryStreams, preload
from tests.support.jobs import LOG, MODULE, runs_in

from .disks import KINDS, Disk, enter_own_namespace
from .watched_command import Hold, Told, Watched

PATIENCE_S = 60.0
SIGKILLED = -signal.SIGKILL
OLD_ITEMS_FROM = 5000

WORKERS = (
    MODULE
    + '''

async def bulky(item):
    """Records from some bytes to some pages."""
    dice = began(item)
    await asyncio.sleep(dice.expovariate(1000))
    return {"number": int(item), "text": f"{item} " * dice.choice((1, 100, 2000, 9000))}
'''
)


class Violation(AssertionError):
    """An invariant does not hold; the message names it."""


@dataclass(frozen=True)
class Job:
    """A job to be cut.

    :ivar reach: a cut of the work comes after at most so many file operations of a process.
    :ivar aims: which moments, with their weights: "start": among the first operations, "work": anywhere, "finish":
        while the output is published.
    :ivar over: what lies there before: a "finished" output of another job, or an "unfinished" job (then `--fresh`).
    """

    items: int
    output: str
    concurrency: int
    window: int
    batch_size: int | None
    interval_s: float
    aims: dict[str, int]
    reach: int = 50
    worker: str = "random_latency"
    keep: bool = False
    compacts: bool = False
    over: str = ""

    @property
    def journal(self) -> str:
        return f"{self.output}.checkpoint"


THROUGHOUT, AT_THE_ENDS = {"start": 3, "work": 15, "finish": 2}, {"start": 6, "work": 4, "finish": 10}
JOBS = {
    "lines": Job(400, "out.jsonl", 8, 400, None, 0.004, THROUGHOUT),
    "array": Job(400, "out.json", 16, 64, 10, 0.05, THROUGHOUT),
    "tiny-commits": Job(150, "out.jsonl", 4, 8, 1, 0.05, THROUGHOUT, reach=100),
    "compaction": Job(300, "out.jsonl", 32, 300, 5, 0.05, THROUGHOUT, reach=60, compacts=True),
    "bulky": Job(100, "out.json", 16, 100, 8, 0.05, THROUGHOUT, worker="bulky"),
    "keep": Job(20, "out.jsonl", 4, 16, 5, 0.05, AT_THE_ENDS, reach=20, keep=True),
    "over-finished": Job(20, "out.json", 4, 16, 5, 0.05, AT_THE_ENDS, reach=20, over="finished"),
    "fresh-over-unfinished": Job(60, "out.jsonl", 8, 60, 5, 0.05, AT_THE_ENDS, reach=30, over="unfinished"),
}


class Moment(NamedTuple):
    """When and how the power goes.

    :ivar steps: so many file operations after the process has begun, or has begun to finish (`aim`); None: after its
        end.
    :ivar mode: see `disks.SHUTDOWNS`.
    :ivar kills: the process is killed with it; otherwise it runs into the dead file system.
    """

    aim: str
    steps: int | None
    delay_s: float
    mode: str
    kills: bool


@dataclass
class Life:
    """One process, as seen from outside the file system.

    :ivar told: what it said.
    :ivar held: it reached the moment that was chosen on purpose.
    :ivar ended_first: it ended before the power went; `left_in_peace`: the power did not go at all.
    :ivar runs: the indices of the items that it ran.
    """

    told: list[Told] = field(default_factory=list)
    held: bool = False
    ended_first: bool = False
    left_in_peace: bool = False
    ended: Ended = field(default_factory=lambda: Ended(0, "", ""))
    runs: list[int] = field(default_factory=list)

    @property
    def acknowledged(self) -> list[Told]:
        return [told for told in self.told if told.what == "acknowledged"]

    @property
    def phase(self) -> str:
        """Where the cut met it."""
        if self.ended_first or self.ended.code == 0:
            return "end"
        if any(told.what == "finish" for told in self.told):
            return "finish"
        return "work" if self.runs else "start"


@dataclass
class Tally:
    """What the cuts met. `again`: runs of items that had run before."""

    cuts: int = 0
    rounds: int = 0
    again: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: Tally) -> Tally:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def __str__(self) -> str:
        counters = {name: value for name, value in vars(self).items() if isinstance(value, Counter)}
        parts = [f"{self.cuts} cuts in {self.rounds} rounds, {self.again} items ran again"]
        parts += [
            f"{name}: " + ", ".join(f"{n} {what}" for what, n in sorted(c.items())) for name, c in counters.items()
        ]
        return "\n  ".join(parts)


class Line:
    """One command, its input, and the output that it has to end with."""

    def __init__(self, job: Job, version: str, first: int) -> None:
        self.job, self.version, self.first = job, version, first
        self.whole = b""
        self._records: list[bytes] = []
        self._framing = framing_of(job.output)

    def words(self, *, fresh: bool) -> list[str]:
        job = self.job
        words = [
            "run",
            "--input",
            f"{self.version}.txt",
            "--output",
            f"disk/{job.output}",
            "--job-version",
            self.version,
        ]
        words += ["--worker", f"jobs:{job.worker}", "--concurrency", str(job.concurrency), "--window", str(job.window)]
        words += ["--checkpoint-interval", str(job.interval_s)]
        words += ["--batch-size", str(job.batch_size)] if job.batch_size else []
        return words + ["--keep-checkpoint"] * job.keep + ["--fresh"] * fresh

    def expect(self, whole: bytes) -> None:
        """Take the output of an undisturbed run as the right one."""
        self.whole = whole
        lines = whole.splitlines()
        self._records = [line.rstrip(b",") for line in lines[1:-1]] if self.job.output.endswith(".json") else lines
        indices = [msgspec.json.decode(record)["index"] for record in self._records]
        assert indices == list(range(self.job.items))

    def up_to(self, mark: int) -> bytes:
        """The first `mark` records as the output holds them."""
        return self._framing.join(self._records[:mark], 0)

    def indices(self, numbers: list[int]) -> list[int]:
        """Which of its items these are."""
        return [number - self.first for number in numbers if 0 <= number - self.first < self.job.items]


class Bench:
    """A disk, a folder outside of it for all that must survive a cut, and the lines of one job."""

    def __init__(
        self, disk: Disk, folder: Folder, job: Job, mutant: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self.disk, self.folder, self.job, self.mutant = disk, folder, job, mutant
        self.old, self.new = Line(job, "old", OLD_ITEMS_FROM), Line(job, "new", 0)
        folder.write("jobs.py", WORKERS)
        for line in (self.old, self.new) if job.over else (self.new,):
            folder.write(f"{line.version}.txt", "".join(f"{line.first + n}\n" for n in range(job.items)))
            ended = self.live(line, None, fresh=False, mutant=contextlib.nullcontext()).ended
            assert ended.code == 0, ended.err
            line.expect((disk.point / job.output).read_bytes())
            self.clear()

    def clear(self) -> None:
        """An empty disk, durably."""
        for name in names_in(self.disk.point) - {"lost+found"}:
            (self.disk.point / name).unlink()
        DISK.fsync_directory(str(self.disk.point))
        (self.folder / LOG).write_bytes(b"")

    def live(
        self,
        line: Line,
        moment: Moment | Hold | None,
        *,
        fresh: bool,
        mutant: AbstractContextManager[object] | None = None,
    ) -> Life:
        """One process, and the cut that ends it (None: it is left in peace)."""
        life = Life()
        seen = len(runs_in(self.folder / LOG))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with TemporaryStreams() as streams, ours:
            child = os.fork()
            if child == 0:
                ours.close()
                streams.take()
                hold = moment if isinstance(moment, Hold) else None
                watched = Watched(theirs, hold, compacts=self.job.compacts)
                watched.run(self.folder.path, line.words(fresh=fresh), mutant or self.mutant())
            theirs.close()
            ours.settimeout(PATIENCE_S)
            try:
                self._follow(life, ours, child, moment)
            except BaseException:
                os.kill(child, signal.SIGKILL)
                raise
            finally:
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            life.ended = Ended(code, *streams.texts()[:2])
        if moment is None:
            life.ended_first = life.left_in_peace = True
        else:
            self.disk.remount()
        life.runs = line.indices(runs_in(self.folder / LOG)[seen:])
        return life

    def _follow(self, life: Life, link: socket.socket, child: int, moment: Moment | Hold | None) -> None:
        if moment is not None:
            life.held = _reach(moment, link, life.told)
            life.ended_first = not life.held
            if isinstance(moment, Moment):
                time.sleep(moment.delay_s)  # the moment of the cut, not synchronisation
                self.disk.cut(moment.mode)
            else:
                self.disk.cut("NOLOGFLUSH", settles=not moment.kills)
            if moment.kills:
                os.kill(child, signal.SIGKILL)
            elif isinstance(moment, Hold) and life.held:
                link.send(b"!")
        life.told += _rest(link)


def _rest(link: socket.socket) -> Iterator[Told]:
    """What is said until the end of the process."""
    while message := link.recv(1 << 16):
        yield msgspec.json.decode(message, type=Told)


def _reach(moment: Moment | Hold, link: socket.socket, told: list[Told]) -> bool:
    """Wait for the moment; False if the process ended before."""
    steps = moment.steps if isinstance(moment, Moment) else None
    counting = isinstance(moment, Moment) and moment.aim != "finish"
    while steps is None or not counting or steps > 0:
        message = link.recv(1 << 16)
        if not message:
            return False
        told.append(msgspec.json.decode(message, type=Told))
        what = told[-1].what
        if what == "held":
            return True
        counting = counting or what == "finish"
        if counting and steps is not None and what == "step":
            steps -= 1
    return True


class Round:
    """One job, from an empty disk to its end; after each cut, all that must hold is checked.

    :ivar line: whose the state on the disk is, as far as it was acknowledged.
    :ivar committed: what must not be lost, nor run again.
    """

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name
        self.dice = random.Random(name)
        self.line = bench.new
        self.committed = Committed()
        self.tally = Tally(rounds=1)
        self.lives: list[str] = []
        self._output: bytes | None = None
        bench.clear()

    def run(self) -> Tally:
        """:raises Violation: with the round's name, and all that it did."""
        job = self.bench.job
        if job.over == "finished":
            self._put_finished()
        elif job.over == "unfinished":
            self.line = self.bench.old
            self._cut(self.bench.old, self._moment("work"), fresh=False)
        for _ in range(self.dice.randrange(2, 12)):
            if self._is_published():
                break
            aim = self.dice.choices(list(job.aims), list(job.aims.values()))[0]
            self._cut(self.bench.new, self._moment(aim), fresh=self._fresh)
        if not self._is_published():
            self._finish()
        self._count_runs()
        return self.tally

    def hold(self, hold: Hold) -> None:
        """A cut at a moment chosen on purpose; then the same line again."""
        if not self._cut(self.bench.new, hold, fresh=self._fresh).held:
            raise RuntimeError(f"{self.name}: the process never came to {hold}")
        if not self._is_published():
            self._finish()

    def cut_in_the_work(self) -> None:
        """One cut while commits are made; the process is not killed."""
        moment = self._moment("work")._replace(mode="NOLOGFLUSH", kills=False)
        self._cut(self.bench.new, moment, fresh=self._fresh)

    @property
    def _fresh(self) -> bool:
        """Whether the old job must still be given up: until the new one has acknowledged something."""
        return self.line is self.bench.old

    def _put_finished(self) -> None:
        """The finished output of an old job."""
        self._output = self.bench.old.whole
        with (self.bench.disk.point / self.bench.job.output).open("wb") as file:
            file.write(self._output)
            file.flush()
            os.fsync(file.fileno())
        DISK.fsync_directory(str(self.bench.disk.point))

    def _moment(self, aim: str) -> Moment:
        dice = self.dice
        last = {"start": 14, "work": self.bench.job.reach, "finish": 15}[aim]
        delay_s = dice.expovariate(1 / 0.0005) if dice.random() < 0.9 else dice.uniform(0, 0.02)
        mode = dice.choices(("NOLOGFLUSH", "LOGFLUSH", "DEFAULT"), (8, 1, 1))[0]
        return Moment(aim, dice.randrange(last + 1), delay_s, mode, dice.random() < 0.7)

    def _finish(self) -> None:
        """The same line, left in peace; the power goes, or does not, when it has said that all is done."""
        after_the_end = Moment("work", None, 0, "NOLOGFLUSH", kills=False)
        life = self._cut(self.bench.new, after_the_end if self.dice.random() < 0.5 else None, fresh=self._fresh)
        self._require(life.ended.code == 0, f"I3: the same line did not finish: {life.ended}")
        if life.left_in_peace:
            self._check_clean()
        if self.bench.job.keep:
            again = self.bench.live(self.bench.new, None, fresh=False)
            self._require(again.ended.code == 0 and again.ended.summary["executed"] == 0, f"kept, but {again.ended}")

    def _check_clean(self) -> None:
        """Nothing is left behind but a temporary file of a process that was cut."""
        job = self.bench.job
        left = names_in(self.bench.disk.point) - {"lost+found", job.output, f"{job.journal}.tmp"}
        self._require(left == ({job.journal} if job.keep else set()), f"I6: left behind are {sorted(left)}")

    def _cut(self, line: Line, moment: Moment | Hold | None, *, fresh: bool) -> Life:
        life = self.bench.live(line, moment, fresh=fresh)
        marks = [told.mark for told in life.acknowledged]
        self.lives.append(
            f"{line.version} {moment}: {life.phase}, exit {life.ended.code}, {len(life.told)} told, "
            f"acknowledged {len(marks)} commits up to {marks[-1:]}, {len(life.runs)} items ran"
        )
        self._check_process(life)
        self._acknowledge(line, life, fresh=fresh)
        self._check_left(line, life)
        if moment is not None:
            self._count(life, moment)
        return life

    def _check_process(self, life: Life) -> None:
        """The process ended as it should, and ran nothing twice."""
        code, err = life.ended.code, life.ended.err
        allowed = {0, SIGKILLED, 74} | (set() if life.told else {2})  # 2: a dead disk can look like a forbidden one
        self._require(code in allowed, f"I3: refused or broken: {life.ended}")
        self._require("Traceback" not in err and "Traceback" not in life.ended.out, f"a traceback: {life.ended}")
        errors = [line for line in err.splitlines() if line.startswith("Error: ")]
        one_line = len(errors) <= 1 if code == SIGKILLED else len(errors) == (code != 0)
        self._require(one_line, f"not one clear line: {life.ended}")
        self._require(len(set(life.runs)) == len(life.runs), "I5: an item ran twice in one process")

    def _acknowledge(self, line: Line, life: Life, *, fresh: bool) -> None:
        """What the process said from outside the file system counts from now on."""
        mine = self.committed if line is self.line and not fresh else Committed()
        ran = [index for index in life.runs if mine.has(index)]
        self._require(not ran, f"I5: committed items ran again: {ran}")
        if life.acknowledged:
            self.line = line
            mark = max(mine.mark, life.acknowledged[-1].mark)
            ahead = mine.ahead.union(*(told.ahead for told in life.acknowledged))
            self.committed = Committed(begun=True, mark=mark, ahead=frozenset(i for i in ahead if i >= mark))

    def _check_left(self, line: Line, life: Life) -> None:
        """Everything on the disk is as it must be, before anything is opened again."""
        job, point = self.bench.job, self.bench.disk.point
        names = names_in(point) - {"lost+found"}
        known = {job.output, job.journal, *(f"{job.output}{end}" for end in (".partial", ".lock", ".checkpoint.tmp"))}
        self._require(names <= known, f"I6: left behind are {sorted(names - known)}")
        output = (point / job.output).read_bytes() if job.output in names else None
        self._require(output in (self._output, line.whole), f"I2: the output has {len(output or b'')} bytes")
        self._output = output
        now = read_committed(point / job.journal)
        if job.journal in names:
            self._require(now.begun, "I3: nothing of the journal can be read")
            self._check_journal(now)
        else:
            lost = self.committed.begun and not self._is_published(line)
            self._require(not lost, f"I3: the journal is gone, acknowledged was {self.committed}")
            self.committed = Committed()
        if life.ended.code == 0:
            self._require(output == line.whole, "I1: it has finished, but its output is not there")
            done = now.complete if job.keep else job.journal not in names
            self._require(
                done or (now.complete and not life.ended_first), f"I6: it has finished, but the journal has {now}"
            )
            self._require(f"{job.output}.partial" not in names, "I6: it has finished, and left a partial output")

    def _check_journal(self, now: Committed) -> None:
        job, point = self.bench.job, self.bench.disk.point
        replay = replay_of(point / job.journal)
        found = replay.complete or replay.state
        assert found is not None
        line = self.bench.new if found.job.version == "new" else self.bench.old
        if line is self.line:
            lost = {index for index in self.committed.ahead if not now.has(index)}
            self._require(
                now.mark >= self.committed.mark, f"I3: mark {now.mark}, {self.committed.mark} was acknowledged"
            )
            self._require(not lost, f"I3: ahead of the mark {now.mark}, {sorted(lost)} were acknowledged and are gone")
        else:
            self._require(line is self.bench.new, "I3: the old job is back")
        partial = point / f"{job.output}.partial"
        if now.complete:
            written = partial if partial.exists() else point / job.output
            self._require(
                written.exists() and written.read_bytes() == line.whole, "I1: complete, but the output is not"
            )
        else:
            written_bytes = partial.read_bytes()[: now.offset] if partial.exists() else b""
            self._require(written_bytes == line.up_to(now.mark), f"I4: the output is not that of the mark {now.mark}")
        runs = set(line.indices(runs_in(self.bench.folder / LOG)))
        self._require(set(range(now.mark)) | now.ahead <= runs, "an item is committed that never ran")
        self.line, self.committed = line, now

    def _is_published(self, line: Line | None = None) -> bool:
        """Whether the job of `line` (the new one) is done: its output lies there, and its journal is put away."""
        point, job = self.bench.disk.point, self.bench.job
        there = point / job.output
        kept = read_committed(point / job.journal)
        put_away = kept.complete if job.keep else not kept.begun
        return (
            put_away
            and not (point / f"{job.output}.partial").exists()
            and (there.exists() and there.read_bytes() == (line or self.bench.new).whole)
        )

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            there = {name: (self.bench.disk.point / name).stat().st_size for name in names_in(self.bench.disk.point)}
            lives = "\n  ".join(self.lives)
            raise Violation(
                f"{self.name}: {otherwise}\n  on the disk: {there}\n  {lives}\n"
                f"replay: .venv/bin/python -m tests.proof.power_cuts {self.name}"
            )

    def _count(self, life: Life, moment: Moment | Hold) -> None:
        tally, kind, job = self.tally, *self.name.split("/")[:2]
        tally.phases[life.phase] += 1
        if life.phase != "end":
            tally.cuts += 1
            tally.kinds[kind] += 1
            tally.jobs[job] += 1
            tally.modes[moment.mode if isinstance(moment, Moment) else "NOLOGFLUSH"] += 1
            tally.ends["killed" if life.ended.code == SIGKILLED else f"exit {life.ended.code}"] += 1
        now = self.committed
        left = "complete" if now.complete else "unfinished" if now.begun else "nothing"
        tally.left["published" if self._is_published() else left] += 1
        tally.left["a temporary file"] += (self.bench.disk.point / f"{self.bench.job.journal}.tmp").exists()

    def _count_runs(self) -> None:
        runs = self.bench.new.indices(runs_in(self.bench.folder / LOG))
        self._require(set(runs) == set(range(self.bench.job.items)), "I1: an item was skipped")
        self.tally.again += len(runs) - len(set(runs))


@contextlib.contextmanager
def bench(kind: str, job: Job, mutant: Callable[[], AbstractContextManager[object]]) -> Iterator[Bench]:
    """A new disk of that kind, in a namespace of this process's own."""
    preload()
    enter_own_namespace()
    with tempfile.TemporaryDirectory(prefix="power-cuts-") as path:
        point = Path(path) / "disk"
        point.mkdir()
        with Disk(kind, point) as disk, Folder(Path(path)) as folder:
            yield Bench(disk, folder, job, mutant)


class Unit(NamedTuple):
    """Rounds of one job on one kind of disk, until there were so many cuts."""

    kind: str
    job: str
    seed: str
    cuts: int


def cut_many_times(unit: Unit) -> Tally:
    """In a process of its own.

    :raises Violation: at the first one.
    """
    total = Tally()
    with bench(unit.kind, JOBS[unit.job], contextlib.nullcontext) as there:
        while total.cuts < unit.cuts:
            total += Round(there, f"{unit.kind}/{unit.job}/{unit.seed}.{total.rounds}").run()
    return total


def units(seed: str, cuts: int) -> list[Unit]:
    """All jobs on all kinds of disks, the slowest first, for at least so many cuts together."""
    each = -(-cuts // (len(KINDS) * len(JOBS)))
    return [Unit(kind, job, seed, each) for kind in KINDS for job in JOBS]


def replay(name: str, times: int = 50) -> None:
    """The round of that name, again and again: the moments are the same, the machine's timing is not."""
    kind, job, _ = name.split("/")
    total = Tally()
    with bench(kind, JOBS[job], contextlib.nullcontext) as there:
        for _ in range(times):
            total += Round(there, name).run()
    print(total, f"{times} times, and nothing was found", sep="\n")


if __name__ == "__main__":
    replay(sys.argv[1])
