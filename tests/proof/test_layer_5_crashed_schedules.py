"""Layer 5: crashes of schedules of the real engine and the real file ledger, each resumed by the whole pipeline."""

from __future__ import annotations

import pytest

from . import report
from .crashed_schedules import Tally, crash_by_seeds, first_violation
from .engine_mutants import MUTANTS, is_shown
from .parallel import in_processes
from .schedules import Seeds

CI_CYCLES = 8_000
LONG_FACTOR = 20
SEEDS_AT_ONCE = 100
JOBS = 1_750  # each of them is crashed about five times


def crash_jobs(first: int, jobs: int) -> int:
    """That many jobs; how often they were crashed and resumed."""
    total = Tally()
    for tally in in_processes(
        crash_by_seeds, [Seeds(n, SEEDS_AT_ONCE) for n in range(first, first + jobs, SEEDS_AT_ONCE)]
    ):
        total += tally
    print(f"{total.schedules} schedules; {total.finished} crashes left nothing to do")
    report.add(5, "crash and resume cycles", total.cycles, violations=len(total.violations))
    report.add(5, "of them crashes of a resume", total.again)
    assert total.violations == []
    return total.cycles


def test_no_crash_of_a_schedule_breaks_an_invariant() -> None:
    """Killed or cut off at any operation, with any state of the disk, a resume finishes the very output."""
    assert crash_jobs(0, JOBS) >= CI_CYCLES


def test_every_mutant_is_caught() -> None:
    """Each defect that is put in on purpose shows in a resume; what its commits hold is not looked at before."""
    names = [mutant.name for mutant in MUTANTS if mutant.layer == 5]
    found = dict(zip(names, in_processes(first_violation, names), strict=True))
    for name, violation in found.items():
        print(f"{name}: {violation[:160]}")
        report.control(5, caught=is_shown(violation))
    assert [name for name, violation in found.items() if not is_shown(violation)] == []


@pytest.mark.slow
def test_none_of_many_crashes_of_schedules_breaks_an_invariant() -> None:
    """The same for other seeds."""
    assert crash_jobs(JOBS, LONG_FACTOR * JOBS) >= LONG_FACTOR * CI_CYCLES
