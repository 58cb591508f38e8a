"""Layer 3: an fsync gives EIO once, the cache goes on showing what the disk lost, and the job is started again."""

from __future__ import annotations

from .cases import CASES
from .explorer import Explorer, Tally

CI_STATES = 4_000
COVERED = ("fresh-start", "no-output", "damaged")


def test_a_failed_fsync_loses_nothing_that_was_acknowledged() -> None:
    """No write follows the failure; a restart in the same boot, cut at any operation, recovers what the disk has."""
    total = Tally()
    for case in CASES:
        if case.name in COVERED:
            total += Explorer(case, "ext4", 1).fail_each_sync()
    print(f"{total.enumerated} states, {total.distinct} distinct")
    assert total.violations == []
    assert total.distinct >= CI_STATES
