"""SIGKILL of the real command: behind a straggler, between any two steps. (At random moments: layer 7 of the proof.)"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from tests.support.commands import Folder, indices_of, kill, read_committed, wait_until
from tests.support.fork_server import ForkServer, Reply
from tests.support.jobs import LOG, MODULE, runs_in

SIGKILLED = -9


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

    def __init__(
        self, folder: Folder, server: ForkServer, output: str, *, keep: bool, input_: str = "items.txt"
    ) -> None:
        self.folder, self.server, self.keep = folder, server, keep
        self.spool = folder / f"{output}.input" if input_ == "-" else None
        self.output, self.journal, self.log = folder / output, folder / f"{output}.checkpoint", folder / LOG
        self.words = ["run", "--input", input_, "--output", output, "--worker", "jobs:item_0_last"]
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
        again = kill_at is None and self.spool is not None and self.spool.exists()
        stdin = os.devnull if again else self.folder / "items.txt"
        return self.server.run(self.folder.path, *self.words, kill_at=kill_at, when=when, stdin=stdin)

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
        kept = {self.journal.name} | ({self.spool.name} if self.spool else set())
        assert left == (kept if self.keep else set())
        if self.keep:
            inode, third = self.output.stat().st_ino, self.run()
            assert msgspec.json.decode(third.out)["executed"] == 0
            assert (self.output.stat().st_ino, self.output.read_bytes()) == (inode, self.expected)


@pytest.mark.parametrize(
    ("output", "keep", "input_"),
    [
        ("out.jsonl", False, "items.txt"),
        pytest.param("out.json", True, "items.txt", marks=pytest.mark.slow),  # layer 6 has that one on each change
        ("out.json", False, "-"),
        pytest.param("out.jsonl", True, "-", marks=pytest.mark.slow),
    ],
)
def test_kill_between_any_two_steps(tmp_path: Path, output: str, keep: bool, input_: str) -> None:
    """A kill between any two operations on files, or in the middle of a write: the same line ends the job.

    Where the items came from standard input, nothing has to be given there again once all of it was kept.
    """
    met: Counter[str] = Counter()
    with Folder(tmp_path) as folder, ForkServer() as server:
        killer = StepKiller(folder, server, output, keep=keep, input_=input_)
        for number, step in enumerate(killer.steps):
            for when in ("middle", "after") if step == "pwrite" else ("after",):
                met[f"{when} {killer.kill(number, when)}"] += 1
                killer.check_the_same_line_again()
                killer.reset()
    print(f"{met.total()} kills: {dict(met)}")
    kept = 1 if input_ == "-" else 0
    assert met["after rename"] == kept + (3 if keep else 2), "of spool, journal, output, and the journal that is kept"
    assert met["after unlink"] == (0 if keep else 1 + kept)


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
