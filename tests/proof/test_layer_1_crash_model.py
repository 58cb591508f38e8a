"""Layer 1: every crash of the file ledger that a file system in memory can show, and every crash of the recovery.

Its negative controls are the mutants of layer 2.
"""

from __future__ import annotations

import functools

import pytest

from . import report
from .cases import CASES, case_named
from .crash_model import RULES
from .disturbances import Disturber
from .explorer import Explorer, Tally
from .parallel import in_processes

CI_STATES = 150_000
LARGEST_FIRST = [case.name for case in sorted(CASES, key=lambda case: -len(case.finished))]
ONCE_IN_CI = ["in-lines"]  # a write a line: a third of all states of two crashes
LEFT_TO_THE_LONG_FORM = ["compaction-elsewhere", "elsewhere", "damaged-elsewhere"]  # their parts are in others
IN_CI = [name for name in LARGEST_FIRST if name not in [*ONCE_IN_CI, *LEFT_TO_THE_LONG_FORM]]


def crashed(depth: int, name: str) -> Tally:
    """One case under both sets of rules, `depth` crashes deep."""
    total, in_peace = Tally(), set[object]()
    for rules in RULES:
        total += Explorer(case_named(name), rules, depth, in_peace).explore()
    return total


def shut_down(name: str) -> Tally:
    """One case, the file system shut down before each operation."""
    total = Tally()
    for rules in RULES:
        total += Disturber(case_named(name), rules, 1).shut_down()
    return total


def check_crashes(depth: int, names: list[str]) -> Tally:
    """The cases of those names."""
    total = sum(in_processes(functools.partial(crashed, depth), names), Tally())
    print(f"{total.points} points, {total.enumerated} states, {total.distinct} distinct, {total.lives} whole lives")
    report.add(1, "states", total.distinct, violations=len(total.violations))
    assert total.violations == []
    return total


def test_no_crash_breaks_an_invariant() -> None:
    """After a crash anywhere, and one more anywhere in what follows, every state recovers and every invariant holds."""
    assert check_crashes(2, IN_CI).distinct >= CI_STATES
    check_crashes(1, ONCE_IN_CI)


def test_no_shutdown_of_the_file_system_breaks_an_invariant() -> None:
    """What was acknowledged is there after a shutdown that a directory's fsync does not report, as on XFS."""
    total = sum(map(shut_down, LARGEST_FIRST), Tally())
    print(f"{total.enumerated} states, {total.distinct} distinct")
    report.add(1, "states after a shutdown", total.distinct, violations=len(total.violations))
    assert total.violations == []
    assert total.distinct > 1000


@pytest.mark.slow
def test_no_three_crashes_break_an_invariant() -> None:
    """After three crashes, each anywhere in the life that the one before left, every invariant holds."""
    check_crashes(3, LARGEST_FIRST)
