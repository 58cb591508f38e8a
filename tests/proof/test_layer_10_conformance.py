"""Layer 10: what the seam is told is what the kernel is told; and what a crash can leave of it is loaded from files."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from . import report, seam_mutants
from .conformance import Outcome, Traced, accounts_of, differences, load_all, outcome_of, outside_the_locks, swapped
from .fault_jobs import JOBS, LEFT_BY_A_KILL, named, place_for
from .parallel import in_processes
from .seam_mutants import MUTANTS, SeamMutant
from .shim import compiler
from .system_calls import calls_of, from_kernel, tracer

CI_LOADS = 5_000
IN_CI = [*(job.name for job in JOBS), "compaction+before.43", "lines+middle.6"]
LOADED_IN_CI = ("compaction", "lines+middle.6")
OVER_OTHERS = ("fresh", "over-kept", "kept", "damaged", "fails")  # there is more than one job's rightful state


@pytest.fixture(autouse=True)
def _tracer() -> None:
    if compiler() is None:
        report.missing(10, "there is no gcc to build the shim with")
    program = tracer()
    if program is None:
        report.missing(10, "there is no strace")
    if subprocess.run([program, "-o", "/dev/null", "true"], check=False, capture_output=True).returncode != 0:
        report.missing(10, "strace may not trace here")


class Task(NamedTuple):
    """A job to be traced, and whether states of it are loaded."""

    name: str
    loads: bool


def traced(task: Task) -> Outcome:
    return outcome_of(task.name, loads=task.loads)


def trace(tasks: list[Task]) -> list[Outcome]:
    """All of it, counted for the table."""
    outcomes = list(in_processes(traced, sorted(tasks, key=lambda task: not task.loads)))
    wrong = sum(len(outcome.wrong) for outcome in outcomes)
    report.add(10, "operations", sum(len(outcome.kernel) for outcome in outcomes), violations=wrong)
    report.add(10, "loads", sum(outcome.loads for outcome in outcomes))
    return outcomes


def mutated(mutant: SeamMutant) -> list[str]:
    """The differences that it makes."""
    with place_for(named("lines"), (f"{seam_mutants.__name__}:{mutant.name}", []), serve=Traced) as place:
        accounts = accounts_of(place)
        return differences(outside_the_locks(accounts.kernel), accounts.seam)


def test_the_seam_is_told_what_the_kernel_is() -> None:
    """The same operations on the same files in the same order, with the same bytes, and none besides; on one thread.

    Every state that a crash can leave of the kernel's account is loaded as what was acknowledged by then.
    """
    outcomes = trace([Task(name, name in LOADED_IN_CI) for name in IN_CI])
    assert [line for outcome in outcomes for line in outcome.wrong] == []
    assert all(len(outcome.kernel) > 5 for outcome in outcomes)
    assert sum(outcome.loads for outcome in outcomes) >= CI_LOADS


def test_a_descriptor_given_out_again_is_that_of_its_new_file(tmp_path: Path) -> None:
    """One thread closes a descriptor, another one opens a folder as the same before the first is told so."""
    account = tmp_path / "account"
    account.write_text(
        f'1 openat(AT_FDCWD, "{_hex("/in/old")}", O_RDONLY|O_CLOEXEC) = 9\n'
        f'2 openat(AT_FDCWD, "{_hex("/in")}", O_RDONLY|O_CLOEXEC <unfinished ...>\n'
        "1 close(9 <unfinished ...>\n2 <... openat resumed>) = 9\n1 <... close resumed>) = 0\n"
        "2 fsync(9) = 0\n2 close(9) = 0\n"
    )
    found = from_kernel(calls_of(account), [Path("/in")], Path("/"))
    assert [(op.name, op.thread) for op in found if op.file == "/in#1"] == [("fsync", 2), ("close", 2)]


def _hex(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def test_every_difference_to_the_seam_is_noticed() -> None:
    """A write past the seam, one behind its back, a swapped order and an fsync not done each show."""
    for mutant, found in zip(MUTANTS, in_processes(mutated, MUTANTS), strict=True):
        print(mutant.name, *found)
        noticed = bool(found) and mutant.shows in found[0]
        report.control(10, caught=noticed)
        assert noticed, (mutant, found)


def test_the_control_of_the_loads() -> None:
    """States of an account in which each fdatasync comes before its write have lost what was acknowledged."""
    with place_for(named("elsewhere"), serve=Traced) as place:
        kernel = outside_the_locks(accounts_of(place).kernel)
        loads, none = load_all(place, kernel, "sectors")
        _, violations = load_all(place, swapped(kernel), "sectors")
    assert (loads > 50, none) == (True, [])
    caught = "I3: " in " ".join(violations)
    report.control(10, caught=caught)
    assert caught, violations


def test_looking_on_changes_nothing() -> None:
    """The command as a user starts it, with nothing written down, does the same operations."""
    with place_for(named("folders"), serve=Traced) as place:
        assert isinstance(place.server, Traced)
        watched = outside_the_locks(accounts_of(place).kernel)
        place.server.plain = True
        plain = outside_the_locks(accounts_of(place).kernel)
    assert len(plain) > 20
    assert [(op.name, op.file) for op in plain] == [(op.name, op.file) for op in watched]


@pytest.mark.slow
def test_every_state_that_a_crash_of_any_job_leaves_is_loaded() -> None:
    """The same for what every kill has left, with the states of every job that is alone in its folder."""
    names = [*(job.name for job in JOBS), *LEFT_BY_A_KILL]
    outcomes = trace([Task(name, name not in OVER_OTHERS) for name in names])
    assert [line for outcome in outcomes for line in outcome.wrong] == []
