"""SIGKILL of the real command line while items fail, pauses are asked for and the rate is limited."""

from __future__ import annotations

import os
import re
import time
from functools import partial
from typing import Any

import pytest

from async_recovery.admission import Admission
from async_recovery.checkpoint import Replay, Spent
from async_recovery.engine import Run
from async_recovery.policies import Gate, RateLimit, Retry
from tests.proof.failing_jobs import JOBS, Tally, kill_job
from tests.proof.forks import Inside, Prepare
from tests.proof.parallel import in_processes

KILLS, MANY_KILLS, CONTROL_KILLS = 72, 2000, 100
AT_ONCE = 5  # a killed job sleeps most of the time


def check_kills(kills: int) -> None:
    """All jobs, each in a process of its own; `KILL_SEED` in the environment repeats the moments."""
    seed = os.environ.get("KILL_SEED") or str(time.time_ns() % 1_000_000)
    print(f"to repeat these moments: KILL_SEED={seed}")
    order = sorted(range(len(JOBS)), key=lambda number: JOBS[number].rate is None)  # the one with a rate is the longest
    total = sum(in_processes(partial(kill_job, seed, kills), order, at_once=AT_ONCE), Tally())
    print(total)
    assert total.kills >= kills
    assert total.ended >= len(JOBS)
    assert total.lost
    assert total.pauses
    assert all(total.met[phase] for phase in ("before an attempt", "at work", "with spent attempts"))


def test_failures_survive_kills_at_random_moments() -> None:
    """The output is that of an undisturbed run, committed items and failures count, pauses and the rate hold."""
    check_kills(KILLS)


@pytest.mark.slow
def test_failures_survive_two_thousand_kills() -> None:
    """The same for 2,000 kills."""
    check_kills(MANY_KILLS)


# Controls


def spent_is_not_written(inside: Inside) -> None:
    """No commit says which attempts have failed."""

    def take_spent(self: Admission) -> list[Spent]:
        self.changed.clear()
        return []

    Admission.take_spent = take_spent  # type: ignore[method-assign]


def spent_is_not_read(inside: Inside) -> None:
    """The next process does not look at what was spent."""
    Replay.spent = property(lambda self: {})  # type: ignore[assignment, method-assign]


def one_too_many(inside: Inside) -> None:
    """An item is tried once more than it may be."""
    next_attempt = Retry.next_attempt

    def one_more(self: Retry, spent: int, *given: float) -> float | None:
        return next_attempt(self, spent - 1, *given)

    Retry.next_attempt = one_more  # type: ignore[assignment]


def pause_spends_an_attempt(inside: Inside) -> None:
    """A pause counts as a failure of the item that asked for it."""
    slow_down = Admission.slow_down

    def spends(self: Admission, index: int, *given: Any) -> None:
        self.spent[index] = self.spent.get(index, 0) + 1
        self.changed.add(index)
        slow_down(self, index, *given)

    Admission.slow_down = spends  # type: ignore[assignment, method-assign]


def pause_holds_one_item(inside: Inside) -> None:
    """The others go on."""

    def waits(self: Admission, index: int, item: Any, error: Any) -> None:
        self._try_again(self._loop.time() + error.seconds, index, item, error)

    Admission.slow_down = waits  # type: ignore[method-assign]


def failures_start_at_0(inside: Inside) -> None:
    """A resumed run counts its own recorded failures alone."""
    restore = Run._restore

    def forgets(self: Run, *given: Any) -> None:
        restore(self, *given)
        self._failed = 0

    Run._restore = forgets  # type: ignore[assignment, method-assign]


def rate_starts_anew(inside: Inside) -> None:
    """A resumed run takes the last second for a quiet one."""
    init = Gate.__init__

    def forgets(self: Gate, limit: RateLimit, now: float, *, spent: bool, after: Gate | None = None) -> None:
        init(self, limit, now, spent=False, after=after)

    Gate.__init__ = forgets  # type: ignore[method-assign]


MISCOUNTED = r"attempts, \d were left|is in the journal, .* before it is not|spent: "
MUTANTS: dict[str, tuple[Prepare, int, str]] = {
    "rate starts anew": (rate_starts_anew, 4, "the rate is 60"),
    "spent is not written": (spent_is_not_written, 0, MISCOUNTED),
    "spent is not read": (spent_is_not_read, 1, MISCOUNTED),
    "one too many": (one_too_many, 2, MISCOUNTED),
    "pause spends an attempt": (pause_spends_an_attempt, 0, MISCOUNTED),
    "pause holds one item": (pause_holds_one_item, 0, "is in a pause"),
    "failures start at 0": (failures_start_at_0, 0, "miscount"),
}


def killed(name: str) -> str:
    """What kills of a job with that mutant find wrong, if anything."""
    mutant, number, _ = MUTANTS[name]
    for seed in (name, f"{name}, again"):  # a machine that is busy may start no process within the second that counts
        try:
            kill_job(seed, CONTROL_KILLS, number, mutant)
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
    assert re.search(MUTANTS[name][2], findings[name]), findings[name]
    print(findings[name][-300:])
