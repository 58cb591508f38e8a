"""Layer 7: SIGKILL of the real command line at random moments, again and again, until the job is done."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest

from async_recovery.checkpoint import Replay
from async_recovery.file_ledger import FileLedger
from async_recovery.files import write_all
from async_recovery.output_file import OutputFile

from . import report
from .forks import Inside, Prepare
from .killer import JOBS, Tally, kill_job
from .parallel import in_processes

CI_KILLS, MANY_KILLS = 300, 10_000
AT_ONCE = 4  # a killed job sleeps most of the time


def check_kills(kills: int) -> None:
    """All jobs, each in a process of its own; `KILL_SEED` in the environment repeats the moments."""
    seed = os.environ.get("KILL_SEED") or str(time.time_ns() % 1_000_000)
    print(f"to repeat these moments: KILL_SEED={seed}")
    work = partial(kill_job, seed, kills // len(JOBS) + 1)
    total = sum(in_processes(work, range(len(JOBS)), at_once=AT_ONCE), Tally())
    print(total)
    report.add(7, "kills", total.kills)
    assert total.kills >= kills
    assert all(total.met[aim] for aim in ("start", "work", "finish")), "no kill met one of the phases"
    assert total.again <= total.kills * max(job.window for job in JOBS)


def test_output_survives_kills_at_random_moments() -> None:
    """After kills at random moments, the output is that of an undisturbed run, and nothing committed ran again."""
    check_kills(CI_KILLS)


@pytest.mark.slow
def test_output_survives_ten_thousand_kills() -> None:
    """The same for 10,000 kills."""
    check_kills(MANY_KILLS)


# Controls


def records_late(inside: Inside) -> None:
    """The journal says that records are written which are written only with the next ones."""
    held: list[tuple[bytes, int]] = []
    verify = OutputFile.verify

    def settle(self: OutputFile) -> None:
        for data, offset in held:
            write_all(self._files, self._only_descriptor, data, offset)
        held.clear()

    def write(self: OutputFile, parts: Iterable[bytes]) -> None:
        settle(self)
        for data in parts:
            held.append((data, self._crc.offset))
            self._crc.update(data)

    def settle_and_verify(self: OutputFile) -> None:
        settle(self)
        verify(self)

    OutputFile._write = write  # type: ignore[method-assign]
    OutputFile.verify = settle_and_verify  # type: ignore[method-assign]


def ahead_forgotten(inside: Inside) -> None:
    """What had finished ahead of the mark is not known any more at the next start."""
    Replay.ahead = property(lambda self: {})  # type: ignore[assignment, method-assign]


def published_early(inside: Inside) -> None:
    """The output has its own name from the beginning."""
    init = OutputFile.__init__

    def init_published(self: OutputFile, path: str, *given: Any) -> None:
        init(self, path, *given)
        self.partial = path

    OutputFile.__init__ = init_published  # type: ignore[assignment, method-assign]


def starts_anew(inside: Inside) -> None:
    """Whatever is there is not looked at."""
    init = FileLedger.__init__

    def init_fresh(self: FileLedger, *given: Any, **named: Any) -> None:
        init(self, *given, **{**named, "fresh": True})

    FileLedger.__init__ = init_fresh  # type: ignore[method-assign]


MUTANTS: dict[str, tuple[Prepare, str]] = {
    "records late": (records_late, "bytes, .* were written|is missing"),
    "ahead forgotten": (ahead_forgotten, "a committed item ran again"),
    "published early": (published_early, "the output has its name, and is not whole"),
    "starts anew": (starts_anew, "a committed item ran again"),
}
CONTROL_KILLS = 60


def killed(name: str) -> str:
    """What kills of a job with that mutant find wrong, if anything."""
    try:
        kill_job(name, CONTROL_KILLS, 0, MUTANTS[name][0])
    except AssertionError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def findings() -> dict[str, str]:
    """All mutants."""
    return dict(zip(MUTANTS, in_processes(killed, MUTANTS, at_once=AT_ONCE), strict=True))


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(findings: dict[str, str], name: str) -> None:
    """Kills of a command with a defect break an invariant."""
    caught = re.search(MUTANTS[name][1], findings[name]) is not None
    report.control(7, caught=caught)
    assert caught, findings[name]
    print(findings[name][-300:])
