"""Kills jobs of the real command line at random moments, round after round, and checks what each kill leaves."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from tests.support.commands import Committed, Ended, Folder, end_of, indices_of, kill, read_committed, wait_until
from tests.support.jobs import LOG, MODULE, count_of_runs, runs_in

from .forks import Fork, Inside, Prepare, nothing, quick_folder

SIGKILLED = -9


@dataclass(frozen=True)
class Job:
    """A job to be killed, and how the moments of its kills are chosen.

    :ivar slowness: factor on the latencies of the items.
    :ivar aims: which moments, with their weights: "start" before the process begins an item, "work" after it has begun
        one, "finish" after every item has been begun.
    :ivar forked: its processes are forks of one that has imported all there is; else each is started as a user does it,
        and takes half a second to begin.
    """

    items: int
    output: str
    concurrency: int
    window: int
    batch_size: int | None
    interval_s: float
    slowness: float
    aims: dict[str, int]
    forked: bool = True

    def words(self) -> list[str]:
        words = ["run", "--input", "items.txt", "--output", self.output, "--worker", "jobs:random_latency"]
        words += ["--concurrency", str(self.concurrency), "--window", str(self.window)]
        words += ["--checkpoint-interval", str(self.interval_s)]
        return words + (["--batch-size", str(self.batch_size)] if self.batch_size else [])


THROUGHOUT, AT_THE_ENDS = {"start": 3, "work": 17}, {"start": 3, "finish": 7}
JOBS = [
    Job(3000, "out.jsonl", 8, 3000, None, 0.02, 1, THROUGHOUT),
    Job(20, "out.jsonl", 4, 10, 3, 0.05, 0.01, AT_THE_ENDS, forked=False),
    Job(3000, "out.json", 16, 64, 10, 0.03, 1, THROUGHOUT),
    Job(20, "out.json", 20, 20, None, 0.02, 0.01, AT_THE_ENDS),
    Job(1000, "out.jsonl", 4, 6, 1, 0.05, 1, THROUGHOUT),
    Job(2000, "out.json", 64, 400, 7, 0, 1, THROUGHOUT),
]


@dataclass
class Tally:
    """What the kills met.

    :ivar met: how many kills met a process in each of the phases that are aimed at.
    :ivar left: how many left a job without a commit, unfinished, complete but not cleared away, or all done.
    :ivar again: runs of items that had run before.
    """

    kills: int = 0
    items: int = 0
    again: int = 0
    most_lost: int = 0
    met: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.kills + other.kills,
            self.items + other.items,
            self.again + other.again,
            max(self.most_lost, other.most_lost),
            self.met + other.met,
            self.left + other.left,
        )

    def __str__(self) -> str:
        met, left = (", ".join(f"{count} {name}" for name, count in sorted(c.items())) for c in (self.met, self.left))
        return (
            f"{self.kills} kills ({met}; left behind: {left}); of {self.items} items {self.again} runs were repeated, "
            f"at most {self.most_lost} for one kill"
        )


class Process(Protocol):
    """A run that has been started."""

    @property
    def has_ended(self) -> bool: ...

    def kill(self) -> Ended:
        """SIGKILL, whatever it is doing; it may have ended by itself before."""
        ...

    def end(self) -> Ended:
        """Wait for its end."""
        ...


class Forked:
    """A fork of this process."""

    def __init__(self, fork: Fork) -> None:
        self._fork = fork

    @property
    def has_ended(self) -> bool:
        return self._fork.ends_within(0)

    def kill(self) -> Ended:
        self._fork.send(signal.SIGKILL)
        return self.end()

    def end(self) -> Ended:
        with self._fork as fork:
            return fork.end()


class Spawned:
    """A process as a user starts it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> Ended:
        return kill(self._process)

    def end(self) -> Ended:
        return end_of(self._process)


class Killer:
    """Kills one job at random moments, round after round, and checks what each kill leaves.

    :param mutant: puts a defect into each process that is to be killed.
    """

    def __init__(self, folder: Folder, job: Job, seed: str, mutant: Prepare = nothing) -> None:
        self.folder, self.job = folder, job
        self.dice = random.Random(seed)
        self.mutant = mutant
        self.log = folder / LOG
        self.output = folder / job.output
        self.journal = folder / f"{job.output}.checkpoint"
        self.tally = Tally()
        self.committed = Committed()
        self.seen = 0
        folder.write("jobs.py", MODULE)
        folder.write_items(job.items)
        self.expected, self.start_s, self.finish_s = self._measured()

    def run(self, kills: int) -> Tally:
        while self.tally.kills < kills:
            self.committed, self.seen, code = Committed(), 0, SIGKILLED
            while not self._is_published():
                code = self._live(undisturbed=self.tally.kills >= kills)
            self._check_finished(code)
            self.output.unlink()
            self.log.unlink()
        return self.tally

    def _start(self, slowness: float, mutant: Prepare = nothing) -> Process:
        if not self.job.forked:
            return Spawned(self.folder.start(*self.job.words(), env={"SLOWNESS": str(slowness)}))

        def prepare(inside: Inside) -> None:
            os.environ["SLOWNESS"] = str(slowness)
            mutant(inside)

        return Forked(Fork(self.folder.path, self.job.words(), prepare))

    def _measured(self) -> tuple[bytes, float, float]:
        """The output of undisturbed runs; seconds to the begin of the first item, and from the last one to the end."""
        expected, times_s = b"", []
        for _ in range(2):
            moments = [time.monotonic()]
            process = self._start(0)
            for begun in (1, self.job.items):
                self._wait_for(process, begun)
                moments.append(time.monotonic())
            ended = process.end()
            assert ended.code == 0, ended.err
            times_s.append((moments[1] - moments[0], time.monotonic() - moments[2]))
            expected = self.output.read_bytes()
            assert indices_of(self.output) == list(range(self.job.items))
            self.output.unlink()
            self.log.unlink()
        start_s, finish_s = map(min, zip(*times_s, strict=True))
        return expected, start_s, finish_s

    def _live(self, *, undisturbed: bool) -> int:
        """One process, from its start to its end."""
        process = self._start(self.job.slowness, self.mutant)
        if undisturbed:
            ended = process.end()
        else:
            aim = self.dice.choices(list(self.job.aims), list(self.job.aims.values()))[0]
            delay_s = self._reach(aim, process)
            time.sleep(delay_s)
            ended = process.kill()
        assert ended.code in (0, SIGKILLED), ended.err
        self._check_life(killed=ended.code == SIGKILLED)
        return ended.code

    def _reach(self, aim: str, process: Process) -> float:
        """Wait for the phase to kill in, and return the delay after it."""
        if aim == "work":
            self._wait_for(process, self.seen + 1)
            return self.dice.uniform(0, 0.25)
        if aim == "finish" and not self._all_begun():
            wait_until(lambda: self._all_begun() or process.has_ended)
            return self.finish_s / math.exp2(self.dice.uniform(0, 6))  # it varies much, and is short
        if aim == "start":
            return self.dice.uniform(0, self.start_s)
        return self.dice.uniform(0, 1.2 * (self.start_s + self.finish_s))

    def _wait_for(self, process: Process, begun: int) -> None:
        """Until so many items have been begun, or it has ended."""
        wait_until(lambda: count_of_runs(self.log) >= begun or process.has_ended)

    def _all_begun(self) -> bool:
        return count_of_runs(self.log) >= self.job.items and len(set(runs_in(self.log))) == self.job.items

    def _check_life(self, *, killed: bool) -> None:
        before, now = self.committed, read_committed(self.journal)
        runs = runs_in(self.log)
        mine = runs[self.seen :]
        assert not [index for index in mine if before.has(index)], "a committed item ran again"
        assert len(set(mine)) == len(mine), "an item ran twice in one process"
        if self.output.exists():
            assert self.output.read_bytes() == self.expected, "the output has its name, and is not whole"
        if not self._is_published():
            assert now.mark >= before.mark, "the mark went back"
            assert all(now.has(index) for index in before.ahead), "what was committed ahead of the mark is lost"
            assert set(range(now.mark)) | now.ahead <= set(runs), "an item is committed that never ran"
            written = self.folder / f"{self.job.output}.partial"
            partial = written.read_bytes()[: now.offset] if now.offset and written.exists() else b""
            assert self.expected.startswith(partial), "the committed output is not the first records"
            lost = sum(not now.has(index) for index in mine)
            assert lost <= self.job.window, "more was lost than the window holds"
            self.tally.most_lost = max(self.tally.most_lost, lost)
        if killed:
            self.tally.kills += 1
            everything = len(set(runs)) == self.job.items
            self.tally.met["finish" if everything else "work" if mine else "start"] += 1
            self.tally.left[self._left(now)] += 1
        self.committed, self.seen = now, len(runs)

    def _left(self, now: Committed) -> str:
        if self._is_published():
            return "all done"
        if now.complete:
            return "complete"
        return "unfinished" if now.begun else "without a commit"

    def _is_published(self) -> bool:
        return self.output.exists() and not self.journal.exists()

    def _check_finished(self, code: int) -> None:
        assert self.output.read_bytes() == self.expected, "the output differs from that of an undisturbed run"
        runs = Counter(runs_in(self.log))
        assert sorted(runs) == list(range(self.job.items)), "an item was skipped"
        left = {path.name for path in self.folder.path.iterdir()} - {"items.txt", "jobs.py", LOG, self.job.output}
        assert left <= ({f"{self.job.output}.lock"} if code == SIGKILLED else set()), "something is left behind"
        self.tally.items += self.job.items
        self.tally.again += sum(runs.values()) - self.job.items


def kill_job(seed: str, kills: int, number: int, mutant: Prepare = nothing) -> Tally:
    """That many kills of the job of that number.

    :raises AssertionError: if one of them breaks an invariant.
    """
    with quick_folder() as path, Folder(path) as folder:
        return Killer(folder, JOBS[number], f"{seed}-{number}", mutant).run(kills)
