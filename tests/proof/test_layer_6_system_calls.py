"""Layer 6: every call of the real command line on its own files, broken below Python, and the same line again."""

from __future__ import annotations

import itertools
import re

import pytest

from tests.support.fork_server import Preparation

from . import fault_mutants, report
from .fault_jobs import JOBS, LEFT_BY_A_KILL, named, place_for
from .fault_mutants import MUTANTS, FaultMutant
from .faults import Tally, sweep
from .parallel import in_processes
from .shim import KINDS, Fault, compiler

CI_CYCLES = 3_000
IN_CI = [
    *(
        job.name for job in JOBS if job.name != "lines"
    ),  # which is as "elsewhere", with the checkpoint beside the output
    "compaction+before.43",
    "lines+middle.6",
    "lines+middle.5+middle.2",
    "elsewhere+after.44",
]
TWICE = ("compaction", "elsewhere", "keep", "lines", "damaged", "folders")


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if compiler() is None:
        report.missing(6, "there is no gcc to build the shim with")


def sweep_named(name: str) -> Tally:
    return sweep(named(name))


def sweep_each(names: list[str]) -> Tally:
    """Everything of these jobs, counted for the table."""
    total = Tally()
    for tally in in_processes(sweep_named, names):
        total += tally
    print(f"{total.cycles.total()} cycles: {dict(total.cycles)}")
    report.add(6, "cycles", total.cycles.total(), violations=len(total.violations))
    return total


def crashes_of(name: str) -> list[str]:
    """The job after each kill of it, but for those that leave the same files as one before."""
    job = named(name)
    seen: set[object] = set()
    found = []
    with place_for(job) as place:
        for kind in ("before", "middle"):
            for at in itertools.count():
                place.reset()
                if place.run(job.words(fresh=job.fresh), Fault(kind, at)).code == job.code:
                    break
                left = {file: content for file, content in place.left().items() if not file.endswith(".lock")}
                key = (frozenset(left.items()), frozenset(map(str, place.path.rglob("*"))))
                if key not in seen and (place.journal.exists() or not place.output.exists()):
                    found.append(f"{name}+{kind}.{at}")
                seen.add(key)
    return found


def caught(mutant: FaultMutant) -> list[str]:
    """What the sweep finds."""
    broken: Preparation = (f"{fault_mutants.__name__}:{mutant.name}", [])
    return sweep(named(mutant.job), (mutant.kind,), broken).violations


def test_no_fault_of_a_call_breaks_an_invariant() -> None:
    """Killed or failed at any call of any job, the line says so, leaves nothing wrong, and finishes the next time."""
    total = sweep_each(IN_CI)
    assert total.violations == []
    assert total.cycles.total() >= CI_CYCLES
    assert set(total.cycles) == set(KINDS)


def test_every_mutant_is_caught() -> None:
    """Each broken durable path breaks the invariant that it should, at a fault of its kind."""
    for mutant, violations in zip(MUTANTS, in_processes(caught, MUTANTS), strict=True):
        print(mutant.name, *violations)
        noticed = any(re.search(rf" \d+: {mutant.broken}: ", violation) for violation in violations)
        report.control(6, caught=noticed)
        assert noticed, (mutant, violations)


@pytest.mark.slow
def test_no_fault_at_any_call_of_any_job_breaks_an_invariant() -> None:
    """The same for every job, and for what the kills leave that CI leaves out."""
    assert sweep_each([*(job.name for job in JOBS), *LEFT_BY_A_KILL]).violations == []


@pytest.mark.slow
def test_no_fault_in_any_recovery_breaks_an_invariant() -> None:
    """The same for the run that resumes, after a kill at any call of the run before."""
    names = [name for names in in_processes(crashes_of, TWICE) for name in names]
    assert len(names) > 100
    assert sweep_each(names).violations == []
