"""Layer 3: an fsync gives EIO once, the cache goes on showing what the disk lost, and the job is started again."""

from __future__ import annotations

import functools
from typing import NamedTuple
from unittest import mock

import pytest

from async_recovery.file_ledger import FileLedger
from async_recovery.journal import Journal
from async_recovery.output_file import OutputFile

from . import report
from .cases import CASES, case_named
from .crash_model import RULES, MemoryFiles, Tearing
from .disturbances import Disturber
from .explorer import Tally
from .mutants import Patch, silent, together, tried_again
from .parallel import in_processes

CI_STATES = 4_000
LARGEST_FIRST = [case.name for case in sorted(CASES, key=lambda case: -len(case.finished))]
SMALL = [case.name for case in CASES if len(case.finished) < 8]


def failed(tearing: Tearing, resumed: bool, name: str) -> Tally:
    """One case under both sets of rules."""
    total = Tally()
    for rules in RULES:
        total += Disturber(case_named(name), rules, 1).fail_each_sync(tearing, resumed=resumed)
    return total


def check_failures(tearing: Tearing, names: list[str], *, resumed: bool = False) -> None:
    """All of these cases."""
    total = sum(in_processes(functools.partial(failed, tearing, resumed), names), Tally())
    print(f"{total.enumerated} states, {total.distinct} distinct")
    report.add(3, "states", total.distinct, violations=len(total.violations))
    assert total.violations == []
    assert total.distinct >= CI_STATES


def test_a_failed_fsync_loses_nothing_that_was_acknowledged() -> None:
    """No write follows the failure; a restart in the same boot, cut at any operation, recovers what the disk has."""
    check_failures("sectors", LARGEST_FIRST)


@pytest.mark.slow
def test_a_failed_fsync_of_a_resumed_run_loses_nothing_that_was_acknowledged() -> None:
    """The same for each fsync of the run that follows a kill after any operation."""
    check_failures("sectors", SMALL, resumed=True)


@pytest.mark.slow
def test_a_failed_fsync_that_tore_a_write_at_any_byte_loses_nothing() -> None:
    """The same where the disk has any number of the bytes that the failed fsync was for."""
    check_failures("bytes", LARGEST_FIRST)


@pytest.mark.slow
def test_a_failed_fsync_of_any_resumed_run_loses_nothing_that_was_acknowledged() -> None:
    """The same for the run that follows a kill of any of the jobs."""
    check_failures("sectors", LARGEST_FIRST, resumed=True)


class Mutant(NamedTuple):
    """A defect, the case that shows it, and what the violation says."""

    name: str
    case: str
    patch: Patch
    says: str


MUTANTS = [
    Mutant("journal's fsync tried again", "fresh-start", tried_again(Journal, "_append", "fdatasync"), "I3"),
    Mutant("output's fsync tried again", "fresh-start", tried_again(OutputFile, "_write", "fdatasync"), "I3"),
    Mutant("new journal's fsync tried again", "fresh-start", tried_again(Journal, "_replace", "fsync"), "I6"),
    Mutant("journal read from the cache", "fresh-start", silent(Journal, "load", "drop_cache"), "I3"),
    Mutant(
        "journal and output read from the cache, not synced",
        "fresh-start",
        together(
            silent(Journal, "load", "drop_cache"),
            silent(Journal, "load", "fsync"),
            silent(OutputFile, "resume", "drop_cache"),
            silent(OutputFile, "resume", "fsync"),
        ),
        "I3",
    ),
    Mutant("directory's fsync tried again", "fresh-start", tried_again(Journal, "_replace", "fsync_directory"), "I9"),
    Mutant("start's fsync tried again", "fresh-start", tried_again(FileLedger, "_open", "fsync_directory"), "I9"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught(mutant: Mutant) -> None:
    """A ledger that goes on after a failed fsync, or believes the cache, loses what it acknowledged, or breaks I9."""
    with mutant.patch():
        violations = Disturber(case_named(mutant.case), "ext4", 1).fail_each_sync("sectors").violations
    caught = violations != [] and f": {mutant.says}: " in violations[0]
    report.control(3, caught=caught)
    assert caught, violations
    print(violations[0][:160])


def test_names_that_the_disk_forgot_and_the_cache_shows_are_not_survived() -> None:
    """What is not promised, and that the layer would see it: the fsync of a directory fails, its new names are never
    written, a later fsync returns 0, and a start still sees them. (Journaling file systems are shut down instead.)
    """
    fsync_directory = MemoryFiles.fsync_directory

    def forgetful(files: MemoryFiles, path: str) -> None:
        try:
            fsync_directory(files, path)
        except OSError:
            files.world = files.world._replace(namings=())
            raise

    with mock.patch.object(MemoryFiles, "fsync_directory", forgetful):
        violations = Disturber(case_named("no-output"), "ext4", 1).fail_each_sync("sectors").violations
    assert "acknowledged, and nothing is found" in violations[0]
