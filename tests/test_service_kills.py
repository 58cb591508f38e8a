"""The service under SIGKILL, with many jobs at once."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import msgspec
import pytest

from .support.commands import Committed, Folder, read_committed
from .support.jobs import LOG, runs_in
from .support.service_process import ENDED, Served

JOBS = 20
APART = 100_000  # the items of each job are numbers of their own


def expected(items: list[int]) -> bytes:
    """The output of `random_latency` for these items."""
    lines = []
    for index, item in enumerate(items):
        dice = random.Random(item)
        _ = dice.expovariate(1 / 0.004) if dice.random() < 0.97 else dice.uniform(0.05, 0.15)
        record = {"index": index, "number": item, "text": "é" * dice.randrange(40), "square": item**2}
        lines.append(msgspec.json.encode(record) + b"\n")
    return b"".join(lines)


class Kill:
    """One of them: what each job had committed, and how many runs of items had begun."""

    def __init__(self, folder: Folder, jobs: list[str]) -> None:
        self.begun = len(runs_in(folder / LOG))
        paths = [Path(folder / "data" / "jobs" / job / "output.jsonl.checkpoint") for job in jobs]
        self.committed: list[Committed] = [read_committed(path) for path in paths]


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_service_that_is_killed_again_and_again_loses_nothing_of_twenty_jobs(folder: Folder, kills: int) -> None:
    """All complete by themselves, every output is right, and no item whose outcome was committed runs again."""
    count, dice = 250 * kills, random.Random(kills)
    served = Served(folder, "--worker=random_latency=jobs:random_latency", "--max-jobs", str(JOBS))
    items = [[APART * job + n for n in range(count)] for job in range(JOBS)]
    options = {"concurrency": 2, "checkpoint_interval": 0.05}
    jobs = [served.submit("random_latency", [str(item) for item in mine], **options) for mine in items]
    seen: list[Kill] = []
    while len(seen) < kills:
        time.sleep(dice.uniform(0.0, 0.7))  # the moment of the kill
        served.kill()
        seen.append(Kill(folder, jobs))
        served.start()
    unfinished = sum(served.job(job)["state"] not in ENDED for job in jobs)
    assert unfinished, "the last kill was in the middle of it"
    for job, mine in zip(jobs, items, strict=True):
        served.ask("PATCH", f"/jobs/{job}", {"concurrency": 100})
        found = served.when(job, *ENDED)
        assert found["state"] == "complete", found["reason"]
        assert served.output(job) == expected(mine)
    runs = runs_in(folder / LOG)
    for kill in seen:
        again = [(item // APART, item % APART) for item in runs[kill.begun :]]
        assert not [where for where in again if kill.committed[where[0]].has(where[1])]
    print(f"{kills} kills, {JOBS} jobs of {count} items: {len(runs) - JOBS * count} runs were repeated")


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_while_jobs_are_made_and_deleted_leaves_whole_jobs(folder: Folder, seed: int) -> None:
    """What was answered with 201 is there after it, what was answered with 204 is gone; nothing half remains."""
    dice = random.Random(seed)
    served = Served(folder, "--worker=quick=jobs:quick", "--max-jobs", "20")
    made: set[str] = set()
    deleted: set[str] = set()
    ends_at = time.monotonic() + dice.uniform(0.05, 0.4)
    while time.monotonic() < ends_at:
        made.add(served.submit("quick", ["1"]))
        for job in sorted(made - deleted)[:1]:
            if served.ask("DELETE", f"/jobs/{job}").status == 204:
                deleted.add(job)
    served.process.send_signal(9)
    asked = None
    with contextlib.suppress(OSError):  # it may still be answered, or not
        asked = served.submit("quick", ["2"])
    served.kill()
    served.start()
    there = {job["id"] for job in served.ask("GET", "/jobs?limit=500").json["jobs"]}
    assert there - {asked} >= made - deleted
    assert not there & deleted
    for job in there:
        assert served.when(job, *ENDED)["state"] == "complete"
    assert {path.name for path in (folder / "data" / "jobs").iterdir()} == there
