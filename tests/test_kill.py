"""SIGKILL of the real command: behind a straggler, between any two steps. (At random moments: layer 7 of the proof.)

Each with the items in its own process, and on a cluster, whose processes live on (`test_dask_kills.py` kills those).
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from tests.support.commands import Folder, indices_of, kill, read_committed, wait_until
from tests.support.dask_cluster import running_cluster
from tests.support.fork_server import ForkServer, Reply
from tests.support.jobs import LOG, MODULE, runs_in

SIGKILLED = -9


@contextmanager
def executor(folder: Path, name: str) -> Iterator[list[str]]:
    """What chooses it on the command line; if it is a cluster, its processes run in that folder."""
    if name == "process":
        yield []
        return
    folder.mkdir(exist_ok=True)
    (folder / "jobs.py").write_text(MODULE)
    with running_cluster(folder) as cluster:
        cluster.wait_for_workers()
        yield ["--executor", cluster.executor]


@pytest.mark.parametrize("where", ["process", pytest.param("cluster", marks=pytest.mark.slow)])
def test_straggler_stalls_nothing_and_alone_runs_again(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    there = tmp_path if where == "process" else tmp_path / "cluster"
    log, journal = there / LOG, tmp_path / "out.jsonl.checkpoint"
    monkeypatch.setenv("STRAGGLER_S", "10")
    with Folder(tmp_path) as folder, executor(there, where) as chosen:
        folder.write("jobs.py", MODULE)
        folder.write_items(count)
        process = folder.start(*words, *chosen)
        wait_until(lambda: runs_in(log), process)
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

    monkeypatch.setenv("STRAGGLER_S", "0")
    with Folder(tmp_path) as folder, executor(there, where) as chosen:
        before = len(runs_in(log))
        resumed = folder.run(*words, *chosen)
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

    :param log: where items say that they run.
    :param chosen: the executor, as words of the command line. With one, how many commits there are is a matter of the
        moments at which results arrive: a step is not at the same place in each run, and a run may end before it.
    :ivar steps: the operations of an undisturbed run.
    """

    def __init__(
        self,
        folder: Folder,
        server: ForkServer,
        output: str,
        log: Path,
        chosen: list[str],
        *,
        keep: bool,
        input_: str,
    ) -> None:
        self.folder, self.server, self.log, self.keep = folder, server, log, keep
        self.steps_move = bool(chosen)
        self.spool = folder / f"{output}.input" if input_ == "-" else None
        self.output, self.journal = folder / output, folder / f"{output}.checkpoint"
        self.words = ["run", "--input", input_, "--output", output, "--worker", "jobs:item_0_last"]
        self.words += ["--concurrency", "6", "--batch-size", "2", *(["--keep-checkpoint"] if keep else []), *chosen]
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
        again = kill_at is None and self.spool is not None and self.spool.exists()
        stdin = os.devnull if again else self.folder / "items.txt"
        return self.server.run(self.folder.path, *self.words, kill_at=kill_at, when=when, stdin=stdin)

    def kill(self, kill_at: int, when: str = "after") -> str:
        """A run that is killed at that step; returns which it was, or nothing if it ended before."""
        killed = self.run(kill_at, when)
        if self.steps_move and killed.code == 0:
            return ""
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
        kept = {self.journal.name} | ({self.spool.name} if self.spool else set())
        assert left == (kept if self.keep else set())
        if self.keep:
            inode, third = self.output.stat().st_ino, self.run()
            assert msgspec.json.decode(third.out)["executed"] == 0
            assert (self.output.stat().st_ino, self.output.read_bytes()) == (inode, self.expected)


@contextmanager
def step_killer(
    path: Path, where: str, output: str, *, keep: bool = False, input_: str = "items.txt"
) -> Iterator[StepKiller]:
    """The job in ``job`` below `path`; the cluster, if it is one, beside it."""
    job, there = path / "job", path / "cluster"
    job.mkdir()
    log = (job if where == "process" else there) / LOG
    with Folder(job) as folder, ForkServer() as server, executor(there, where) as chosen:
        yield StepKiller(folder, server, output, log, chosen, keep=keep, input_=input_)


@pytest.mark.parametrize(
    ("output", "keep", "input_", "where"),
    [
        ("out.jsonl", False, "items.txt", "process"),
        ("out.jsonl", False, "items.txt", "cluster"),
        # layer 6 has that one on each change
        pytest.param("out.json", True, "items.txt", "process", marks=pytest.mark.slow),
        pytest.param("out.json", True, "items.txt", "cluster", marks=pytest.mark.slow),
        ("out.json", False, "-", "process"),
        pytest.param("out.json", False, "-", "cluster", marks=pytest.mark.slow),
        pytest.param("out.jsonl", True, "-", "process", marks=pytest.mark.slow),
    ],
)
def test_kill_between_any_two_steps(tmp_path: Path, output: str, keep: bool, input_: str, where: str) -> None:
    """A kill between any two operations on files, or in the middle of a write: the same line ends the job.

    Where the items came from standard input, nothing has to be given there again once all of it was kept.
    """
    met: Counter[str] = Counter()
    with step_killer(tmp_path, where, output, keep=keep, input_=input_) as killer:
        for number, step in enumerate(killer.steps):
            for when in ("middle", "after") if step == "pwrite" else ("after",):
                met[f"{when} {killer.kill(number, when)}"] += 1
                killer.check_the_same_line_again()
                killer.reset()
    print(f"{met.total()} kills: {dict(met)}")
    kept = 1 if input_ == "-" else 0
    renames = kept + (3 if keep else 2)  # of spool, journal, output, and the journal that is kept
    unlinks = 0 if keep else 1 + kept
    if where == "process":
        assert (met["after rename"], met["after unlink"]) == (renames, unlinks)
    else:
        assert met["after rename"]
        assert met["middle pwrite"]


@pytest.mark.parametrize(
    ("first", "where"),
    [
        ("in the middle", "process"),
        ("in the middle", "cluster"),
        ("before the complete line", "process"),
        ("before the output is renamed", "process"),
    ],
)
def test_kill_between_any_two_steps_of_a_resume(tmp_path: Path, first: str, where: str) -> None:
    """A second kill, at any step of the run that resumes, changes nothing of that."""
    with step_killer(tmp_path, where, "out.json") as killer:
        writes = [number for number, step in enumerate(killer.steps) if step == "pwrite"]
        renames = [number for number, step in enumerate(killer.steps) if step == "rename"]
        moments = {
            "in the middle": writes[2],
            "before the complete line": writes[-1] - 1,
            "before the output is renamed": renames[-1] - 1,
        }
        while not killer.kill(moments[first]):
            killer.reset()
        job = killer.folder.path
        shutil.copytree(job, tmp_path / "left")
        resumed = killer.run()
        assert resumed.code == 0, resumed.err
        for number, _ in enumerate(resumed.steps):
            shutil.copytree(tmp_path / "left", job, dirs_exist_ok=True)
            killer.kill(number)
            killer.check_the_same_line_again()
            killer.reset()
