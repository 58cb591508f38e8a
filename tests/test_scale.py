"""The tables of scale that are counts hold in any run; and what the others make of their figures is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from async_recovery import journal
from tests.benchmarks import bytes_written, growth, loop_gaps, progress


@pytest.mark.parametrize("row", bytes_written.BOUNDS)
def test_the_bytes_written_are_within_their_bound(row: str, tmp_path: Path) -> None:
    """Five seconds of the virtual clock already show how often a byte is written."""
    value, _ = bytes_written.written_for(row, 5.0, tmp_path)
    assert 1.0 < value <= bytes_written.BOUNDS[row]


def test_a_journal_that_is_replaced_by_every_commit_is_not_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: written anew each time, what is ahead of the mark grows beyond the bound."""
    monkeypatch.setattr(journal, "worth_compacting", lambda size, live: True)
    row = "everything behind one straggler"
    value, _ = bytes_written.written_for(row, 5.0, tmp_path)
    assert value > bytes_written.BOUNDS[row]


def test_drawing_that_costs_more_is_seen_and_noise_makes_it_unsure() -> None:
    """The median of the pairs' ratios is what is told, with how far it may be off."""
    assert progress.difference([(1.03 * cost, cost) for cost in range(1, 61)]) == pytest.approx((0.03, 0.0))
    median, uncertainty = progress.difference([(1.0 + (number % 7 - 3) / 10, 1.0) for number in range(63)])
    assert median == 0.0
    assert uncertainty > progress.BOUND


def test_a_percentile_is_a_gap_that_was_seen() -> None:
    """The largest of a few; one of the few largest of many."""
    assert loop_gaps.at_share_ms([0.001, 0.02]) == 20.0
    assert loop_gaps.at_share_ms([0.001] * 9995 + [0.5] * 5) == 1.0
    assert loop_gaps.at_share_ms([0.001] * 9985 + [0.5] * 15) == 500.0


def test_growth_is_of_what_lies_between_two_commits() -> None:
    """Each cost an item, whatever there was before."""
    start, end = growth.Moment(100, 1.0, 1.0, 5000), growth.Moment(300, 2.0, 1.5, 25000)
    assert list(growth.an_item(start, end).values()) == [1 / 200, 0.5 / 200, 100.0]
