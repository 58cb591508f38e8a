"""SIGKILL of the real command: at random moments, behind a straggler, between any two steps."""

from __future__ import annotations

import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from tests.support.commands import Committed, Folder, end_of, kill, read_committed, wait_until
from tests.support.fork_server import ForkServer, Reply
from tests.support.jobs import LOG, MODULE, runs_in

SIGKILLED = -9


@dataclass(frozen=True)
class Job:
    """A job to be killed, and how the moments of its kills are chosen.

    :ivar slowness: factor on the latencies of the items.
    :ivar aims: which moments, with their weights: "start" before the process begins an item, "work" after it has begun
        one, "finish" after every item has been begun.
    """

    items: int
    output: str
    concurrency: int
    window: int
    batch_size: int | None
    interval_s: float
    slowness: float
    aims: dict[str, int]

    def words(self, output: str | None = None) -> list[str]:
        words = ["run", "--input", "items.txt", "--output", output or self.output, "--worker", "jobs:random_latency"]
        words += ["--concurrency", str(self.concurrency), "--window", str(self.window)]
        words += ["--checkpoint-interval", str(self.interval_s)]
        return words + (["--batch-size", str(self.batch_size)] if self.batch_size else [])


THROUGHOUT, AT_THE_ENDS = {"start": 3, "work": 17}, {"start": 3, "finish": 7}
JOBS = [
    Job(3000, "out.jsonl", 8, 3000, None, 0.02, 1, THROUGHOUT),
    Job(20, "out.jsonl", 4, 10, 3, 0.05, 0.01, AT_THE_ENDS),
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

    def add(self, other: Tally) -> None:
        self.kills += other.kills
        self.items += other.items
        self.again += other.again
        self.most_lost = max(self.most_lost, other.most_lost)
        self.met += other.met
        self.left += other.left

    def __str__(self) -> str:
        met, left = (", ".join(f"{count} {name}" for name, count in sorted(c.items())) for c in (self.met, self.left))
        return (
            f"{self.kills} kills ({met}; left behind: {left}); of {self.items} items {self.again} runs were repeated, "
            f"at most {self.most_lost} for one kill"
        )


class Killer:
    """Kills one job at random moments, round after round, and checks what each kill leaves.

    :param times_s: how long a process takes until it begins an item, and from the last item to its end.
    """

    def __init__(self, folder: Folder, job: Job, seed: str, expected: bytes, times_s: tuple[float, float]) -> None:
        self.folder, self.job, self.expected = folder, job, expected
        self.dice = random.Random(seed)
        self.start_s, self.finish_s = times_s
        self.log = folder / LOG
        self.output = folder / job.output
        self.journal = folder / f"{job.output}.checkpoint"
        self.tally = Tally()
        self.committed = Committed()
        self.seen = 0

    def run(self, kills: int) -> Tally:
        while self.tally.kills < kills:
            self.committed, self.seen, code = Committed(), 0, SIGKILLED
            while not self._is_published():
                code = self._live(undisturbed=self.tally.kills >= kills)
            self._check_finished(code)
            self.output.unlink()
            self.log.unlink()
        return self.tally

    def _live(self, *, undisturbed: bool) -> int:
        """One process, from its start to its end."""
        process = self.folder.start(*self.job.words(), env={"SLOWNESS": str(self.job.slowness)})
        if undisturbed:
            ended = end_of(process)
        else:
            aim = self.dice.choices(list(self.job.aims), list(self.job.aims.values()))[0]
            delay_s = self._reach(aim, lambda: process.poll() is not None)
            time.sleep(delay_s)
            ended = kill(process)
        assert ended.code in (0, SIGKILLED), ended.err
        self._check_life(killed=ended.code == SIGKILLED)
        return ended.code

    def _reach(self, aim: str, has_ended: Callable[[], bool]) -> float:
        """Wait for the phase to kill in, and return the delay after it."""
        everything = self.job.items
        if aim == "work":
            wait_until(lambda: len(runs_in(self.log)) > self.seen or has_ended())
            return self.dice.uniform(0, 0.25)
        if aim == "finish" and len(set(runs_in(self.log))) < everything:
            wait_until(lambda: len(set(runs_in(self.log))) == everything or has_ended())
            return self.finish_s / math.exp2(self.dice.uniform(0, 6))  # it varies much, and is short
        if aim == "start":
            return self.dice.uniform(0, self.start_s)
        return self.dice.uniform(0, 1.2 * (self.start_s + self.finish_s))

    def _check_life(self, *, killed: bool) -> None:
        before, now = self.committed, read_committed(self.journal)
        runs = runs_in(self.log)
        mine = runs[self.seen :]
        assert not [index for index in mine if before.has(index)], "a committed item ran again"
        assert len(set(mine)) == len(mine), "an item ran twice in one process"
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


def indices_of(output: Path) -> list[int]:
    """The index of each record of a finished output."""
    data = output.read_bytes()
    records = msgspec.json.decode(data) if output.suffix == ".json" else msgspec.json.Decoder().decode_lines(data)
    return [record["index"] for record in records]


def measured(folder: Folder, job: Job) -> tuple[bytes, tuple[float, float]]:
    """The output of undisturbed runs; seconds until one begins an item, and from its last one to its end, at best."""
    log, output, expected, times_s = folder / LOG, folder / job.output, b"", []
    for _ in range(2):
        moments = [time.monotonic()]
        process = folder.start(*job.words(), env={"SLOWNESS": "0"})
        wait_until(lambda: runs_in(log), process)
        moments.append(time.monotonic())
        wait_until(lambda: len(runs_in(log)) == job.items, process)
        moments.append(time.monotonic())
        ended = end_of(process)
        assert ended.code == 0, ended.err
        times_s.append((moments[1] - moments[0], time.monotonic() - moments[2]))
        expected = output.read_bytes()
        assert indices_of(output) == list(range(job.items))
        output.unlink()
        log.unlink()
    start_s, finish_s = map(min, zip(*times_s, strict=True))
    return expected, (start_s, finish_s)


def kill_many_times(tmp_path: Path, kills: int) -> Tally:
    """Three jobs at a time."""
    seed = os.environ.get("KILL_SEED") or str(time.time_ns() % 1_000_000)
    print(f"to repeat these moments: KILL_SEED={seed}")

    def kill_job(number: int) -> Tally:
        job = JOBS[number]
        path = tmp_path / str(number)
        path.mkdir()
        with Folder(path) as folder:
            folder.write("jobs.py", MODULE)
            folder.write_items(job.items)
            return Killer(folder, job, f"{seed}-{number}", *measured(folder, job)).run(kills // len(JOBS) + 1)

    total = Tally()
    with ThreadPoolExecutor(3) as pool:
        for tally in pool.map(kill_job, range(len(JOBS))):
            total.add(tally)
    print(total)
    return total


def check_kills(tmp_path: Path, kills: int) -> None:
    total = kill_many_times(tmp_path, kills)
    assert total.kills >= kills
    assert all(total.met[aim] for aim in ("start", "work", "finish")), "no kill met one of the phases"
    assert total.again <= total.kills * max(job.window for job in JOBS)


def test_output_survives_kills_at_random_moments(tmp_path: Path) -> None:
    """After kills at random moments, the output is that of an undisturbed run, and nothing committed ran again."""
    check_kills(tmp_path, 200)


@pytest.mark.slow
def test_output_survives_two_thousand_kills(tmp_path: Path) -> None:
    """The same for 2,000 kills."""
    check_kills(tmp_path, 2000)


def test_straggler_stalls_nothing_and_alone_runs_again(tmp_path: Path) -> None:
    """While item 0 takes 10 s, the 19,999 others finish and are committed; after kill -9, item 0 alone runs again."""
    count = 20_000
    words = [
        "run",
        "--input",
        "items.txt",
        "--output",
        "out.jsonl",
        "--worker",
        "jobs:straggler",
        "--concurrency",
        "200",
    ]
    with Folder(tmp_path) as folder:
        folder.write("jobs.py", MODULE)
        folder.write_items(count)
        log, journal = folder / LOG, folder / "out.jsonl.checkpoint"
        process = folder.start(*words, env={"STRAGGLER_S": "10"})
        wait_until(log.exists, process)
        began = time.monotonic()
        wait_until(lambda: len(read_committed(journal).ahead) == count - 1, process, within_s=8.9)
        committed_s, commits = time.monotonic() - began, read_committed(journal).commits
        time.sleep(max(0.0, 9 - committed_s))  # what the property says: the moment of the kill, not synchronisation
        assert process.poll() is None
        assert kill(process).code == SIGKILLED
        killed = read_committed(journal)
        print(f"19,999 items were committed after {committed_s:.1f} s, in {killed.commits} commits")
        assert (killed.mark, killed.ahead) == (0, frozenset(range(1, count)))
        assert killed.commits == commits <= 15, "when nothing new has finished, nothing is committed"

        before = len(runs_in(log))
        resumed = folder.run(*words, env={"STRAGGLER_S": "0"})
        assert resumed.code == 0, resumed.err
        assert resumed.summary["executed"] == 1
        assert runs_in(log)[before:] == [0]
        assert Counter(runs_in(log)) == Counter([0, *range(count)])
        assert [line["index"] for line in map(msgspec.json.decode, lines_of(folder / "out.jsonl"))] == list(
            range(count)
        )


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


class StepKiller:
    """A small job that is killed at one step, and what must hold when the same line has run again.

    :ivar steps: the operations of an undisturbed run.
    """

    def __init__(self, folder: Folder, server: ForkServer, output: str, *, keep: bool) -> None:
        self.folder, self.server, self.keep = folder, server, keep
        self.output, self.journal, self.log = folder / output, folder / f"{output}.checkpoint", folder / LOG
        self.words = ["run", "--input", "items.txt", "--output", output, "--worker", "jobs:item_0_last"]
        self.words += ["--concurrency", "6", "--batch-size", "2", *(["--keep-checkpoint"] if keep else [])]
        folder.write("jobs.py", MODULE)
        folder.write_items(6)
        self.clean = {path.name for path in folder.path.iterdir()}
        undisturbed = self.run()
        assert undisturbed.code == 0, undisturbed.err
        self.steps, self.expected = undisturbed.steps, self.output.read_bytes()
        assert indices_of(self.output) == list(range(6))
        self.reset()

    def reset(self) -> None:
        for path in self.folder.path.iterdir():
            if path.name not in self.clean:
                path.unlink()

    def run(self, kill_at: int | None = None, when: str = "after") -> Reply:
        return self.server.run(self.folder.path, *self.words, kill_at=kill_at, when=when)

    def kill(self, kill_at: int, when: str = "after") -> str:
        """A run that is killed at that step; returns which it was."""
        killed = self.run(kill_at, when)
        assert killed.code == SIGKILLED, killed.err
        return killed.steps[-1]

    def check_the_same_line_again(self) -> None:
        """It finishes the job with the right bytes, runs nothing that was committed, and leaves nothing behind."""
        committed, before = read_committed(self.journal), len(runs_in(self.log))
        published = self.output.exists() and not self.journal.exists()
        again = self.run()
        assert again.code == 0, again.err
        assert self.output.read_bytes() == self.expected
        ran = runs_in(self.log)[before:]
        assert sorted(ran) == list(range(6)) if published else not any(map(committed.has, ran))
        left = {path.name for path in self.folder.path.iterdir()} - self.clean - {LOG, self.output.name}
        assert left == ({self.journal.name} if self.keep else set())
        if self.keep:
            inode, third = self.output.stat().st_ino, self.run()
            assert msgspec.json.decode(third.out)["executed"] == 0
            assert (self.output.stat().st_ino, self.output.read_bytes()) == (inode, self.expected)


@pytest.mark.parametrize(("output", "keep"), [("out.jsonl", False), ("out.json", True)])
def test_kill_between_any_two_steps(tmp_path: Path, output: str, keep: bool) -> None:
    """A kill between any two operations on files, or in the middle of a write: the same line ends the job."""
    met: Counter[str] = Counter()
    with Folder(tmp_path) as folder, ForkServer() as server:
        killer = StepKiller(folder, server, output, keep=keep)
        for number, step in enumerate(killer.steps):
            for when in ("middle", "after") if step == "pwrite" else ("after",):
                met[f"{when} {killer.kill(number, when)}"] += 1
                killer.check_the_same_line_again()
                killer.reset()
    print(f"{met.total()} kills: {dict(met)}")
    assert met["after rename"] == (3 if keep else 2), "of the journal, the output, and the journal that is kept"
    assert met["after unlink"] == (0 if keep else 1)


@pytest.mark.parametrize("first", ["in the middle", "before the complete line", "before the output is renamed"])
def test_kill_between_any_two_steps_of_a_resume(tmp_path: Path, first: str) -> None:
    """A second kill, at any step of the run that resumes, changes nothing of that."""
    with Folder(tmp_path / "killed") as folder, ForkServer() as server:
        folder.path.mkdir()
        killer = StepKiller(folder, server, "out.json", keep=False)
        writes = [number for number, step in enumerate(killer.steps) if step == "pwrite"]
        renames = [number for number, step in enumerate(killer.steps) if step == "rename"]
        moments = {
            "in the middle": writes[2],
            "before the complete line": writes[-1] - 1,
            "before the output is renamed": renames[-1] - 1,
        }
        killer.kill(moments[first])
        shutil.copytree(folder.path, tmp_path / "left")
        resumed = killer.run()
        assert resumed.code == 0, resumed.err
        for number, _ in enumerate(resumed.steps):
            shutil.copytree(tmp_path / "left", folder.path, dirs_exist_ok=True)
            killer.kill(number)
            killer.check_the_same_line_again()
            killer.reset()
