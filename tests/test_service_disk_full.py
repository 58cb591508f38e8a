"""A disk that is full in the middle of jobs of the service: a file system of its own, in memory, and small."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from .support.commands import Folder, wait_until
from .support.service_process import ENDED, Answer, Served

MODULE = """
async def large(item):
    return {"item": item, "pad": "x" * 2000}
"""


@pytest.fixture
def small(folder: Folder) -> Iterator[Path]:
    """A file system of 8 MiB, mounted where the service's folder is."""
    data = folder / "data"
    data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", data], check=True)
    try:
        yield data
    finally:
        subprocess.run(["umount", "--lazy", data], check=True)


def test_a_full_disk_stops_jobs_in_a_clear_state_and_they_go_on_when_there_is_room(folder: Folder, small: Path) -> None:
    """They wait in the queue and say why; nobody has to ask them to go on; every output is whole."""
    folder.write("work.py", MODULE)
    filler = small / "filler"
    filler.write_bytes(b"x" * (5 << 20))
    served = Served(folder, "--worker=large=work:large")
    options = {"rate": 400, "checkpoint_interval": 0.05}
    jobs = [served.submit("large", [f"{job}-{n}" for n in range(800)], **options) for job in range(2)]
    for job in jobs:
        wait_until(partial(waits_for_room, served, job), served.process)
    refused: list[Answer] = []
    while not refused:
        answer = served.ask("POST", "/jobs", _request())
        refused += [answer] if answer.status != 201 else []
    assert (refused[0].status, refused[0].json["title"]) == (507, "Insufficient Storage")
    assert served.ask("GET", f"/jobs/{jobs[0]}/output").body.endswith(b"}\n")
    assert served.ask("GET", "/healthz").status == 200
    filler.unlink()
    for number, job in enumerate(jobs):
        assert served.when(job, *ENDED)["state"] == "complete"
        lines = served.output(job).splitlines()
        assert [line.split(b'"')[5].decode() for line in lines] == [f"{number}-{n}" for n in range(800)]
    assert not [path for path in (small / "jobs").iterdir() if path.suffix == ".new"]


def test_a_service_that_is_killed_on_a_full_disk_goes_on_when_there_is_room(folder: Folder, small: Path) -> None:
    """Its state could not be written any more: what the database remembers is enough."""
    folder.write("work.py", MODULE)
    filler = small / "filler"
    filler.write_bytes(b"x" * (5 << 20))
    served = Served(folder, "--worker=large=work:large")
    job = served.submit("large", [str(n) for n in range(1500)], checkpoint_interval=0.05, rate=1000)
    wait_until(lambda: "No space left" in (served.job(job)["reason"] or ""), served.process)
    served.kill()
    filler.unlink()
    served.start()
    assert served.when(job, *ENDED)["state"] == "complete"
    assert served.output(job).count(b"\n") == 1500


def waits_for_room(served: Served, job: str) -> bool:
    found = served.job(job)
    return found["state"] == "queued" and "No space left on device" in (found["reason"] or "")


def _request() -> dict[str, object]:
    return {"worker": "large", "input": {"items": ["x" * 4000] * 100}, "options": {"rate": 1}}
