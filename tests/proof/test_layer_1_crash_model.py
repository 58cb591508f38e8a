"""Layer 1: every crash of the file ledger that a file system in memory can show, and every crash of the recovery."""

from __future__ import annotations

import pytest

from .cases import CASES
from .explorer import Explorer, Tally

CI_STATES = 150_000
EVERYTHING = [(case, rules) for case in CASES for rules in ("posix", "ext4")]


def explored(depth: int, *, shut_down: bool = False) -> Tally:
    """All cases under both sets of rules."""
    total = Tally()
    for case, rules in EVERYTHING:
        explorer = Explorer(case, "posix" if rules == "posix" else "ext4", depth)
        total += explorer.shut_down() if shut_down else explorer.explore()
    print(f"{total.points} points, {total.enumerated} states, {total.distinct} distinct, {total.lives} whole lives")
    return total


def test_no_crash_breaks_an_invariant() -> None:
    """After a crash anywhere, and one more anywhere in what follows, every state recovers and every invariant holds."""
    total = explored(2)
    assert total.violations == []
    assert total.distinct >= CI_STATES


def test_no_shutdown_of_the_file_system_breaks_an_invariant() -> None:
    """What was acknowledged is there after a shutdown that a directory's fsync does not report, as on XFS."""
    total = explored(1, shut_down=True)
    assert total.violations == []
    assert total.distinct > 1000


@pytest.mark.slow
def test_no_three_crashes_break_an_invariant() -> None:
    """After three crashes, each anywhere in the life that the one before left, every invariant holds."""
    assert explored(3).violations == []
