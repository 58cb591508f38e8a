"""Disturb a run on a real cluster in the middle, and see that nothing of it is lost, doubled, or paid for twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable

from .commands import Ended, Folder, end_of, kill, read_committed, wait_until
from .dask_cluster import DaskCluster
from .jobs import LOG, MODULE, count_of_runs, runs_in

ITEMS = 1_200
AT_ONCE = 24
EARLIEST, LATEST = 50, 1_000
JOB = ("run", "--input", "items.txt", "--worker", "jobs:random_latency", "--concurrency", str(AT_ONCE))
ENDS_WITHIN_S = 60.0
EXPECTED: list[bytes] = []  # what the job gives in one process, the same for all


class DisturbedJob:
    """A job in a folder, on a cluster.

    :param dice: when, and whom.
    :ivar longest_s: that a run took after it was disturbed.
    """

    def __init__(self, folder: Folder, cluster: DaskCluster, dice: random.Random) -> None:
        self.folder, self.cluster, self.dice = folder, cluster, dice
        self.output, self.journal, self.log = folder / "out.jsonl", folder / "out.jsonl.checkpoint", folder / LOG
        self.longest_s = 0.0
        folder.write("jobs.py", MODULE)
        folder.write_items(ITEMS)
        if not EXPECTED:
            undisturbed = folder.run(*JOB, "--output", "expected.jsonl", env={"SLOWNESS": "0"})
            assert undisturbed.code == 0, undisturbed.err
            EXPECTED.append((folder / "expected.jsonl").read_bytes())
        self.expected = EXPECTED[0]

    def start(self) -> subprocess.Popen[str]:
        """The line that is run, and run again."""
        executor = f"{self.cluster.executor}?lease=2&patience=20"
        words = ["--output", "out.jsonl", "--checkpoint-interval", "0.05", "--executor", executor]
        return self.folder.start(*JOB, *words)

    def disturb(self, how: Callable[[DisturbedJob, subprocess.Popen[str]], subprocess.Popen[str]]) -> Ended:
        """Run it once, and do that to it at a random moment.

        :param how: gets the running line, and returns the one that is to end well.
        """
        self.output.unlink(missing_ok=True)
        earlier, at = count_of_runs(self.log), self.dice.randrange(EARLIEST, LATEST)  # of runs of the job before
        process = self.start()
        wait_until(lambda: count_of_runs(self.log) >= earlier + at, process)
        committed, before = read_committed(self.journal), count_of_runs(self.log)
        began = time.monotonic()
        ended = end_of(how(self, process), ENDS_WITHIN_S)
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        assert ended.code == 0, ended.err
        assert self.output.read_bytes() == self.expected, f"disturbed at {at}"
        assert not self.journal.exists()
        ran = runs_in(self.log)
        assert set(ran[earlier:]) == set(range(ITEMS))
        assert not [index for index in ran[before:] if committed.has(index)], "a committed item ran again"
        return ended


def kill_worker(job: DisturbedJob, process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """SIGKILL one; its nanny starts another."""
    os.kill(job.dice.choice(job.cluster.worker_pids()), signal.SIGKILL)
    return process


def stop_worker(job: DisturbedJob, process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """SIGSTOP one; it is woken by `wake_workers`."""
    os.kill(job.dice.choice(job.cluster.worker_pids()), signal.SIGSTOP)
    return process


def wake_workers(cluster: DaskCluster) -> None:
    """SIGCONT to all."""
    for pid in cluster.worker_pids():
        os.kill(pid, signal.SIGCONT)


def kill_scheduler(job: DisturbedJob, process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """SIGKILL; another one is started in its place, with workers of its own, as those of the old one end with it."""
    job.cluster.scheduler.kill()
    job.cluster.scheduler.wait()
    job.cluster.start_scheduler()
    job.cluster.start_workers(2)
    return process


def kill_coordinator(job: DisturbedJob, process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """SIGKILL, and the same line again."""
    kill(process)
    return job.start()
