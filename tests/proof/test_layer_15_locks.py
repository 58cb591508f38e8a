"""Layer 15: two runs of one job. One proceeds, as if it were alone; the other is told who does, and touches nothing."""

from __future__ import annotations

import functools
import os

import pytest

from . import report
from .lock_mutants import MUTANTS
from .lock_orders import LARGE, SMALL, Piece, explore, pieces
from .lock_scenarios import SCENARIOS, play, starts
from .parallel import in_processes

LAYER = 15
CI_STARTS, LONG_FORM_STARTS = 200, 2_000
CI_ORDERS, LONG_FORM_ORDERS = 7_000, 80_000


def test_a_second_run_is_refused_and_told_by_whom() -> None:
    """By whatever name it comes to the job of a run that works, is stopped, has forked or was killed: the first ends
    it, with the right bytes, each item run once; the second ends with code 75, changes nothing, and names the first.
    """
    violations = [line for lines in in_processes(play, SCENARIOS) for line in lines]
    report.add(LAYER, "scenarios", len(SCENARIOS), violations=len(violations))
    assert violations == []


def start_pairs(count: int) -> None:
    parts = os.cpu_count() or 1
    found = list(in_processes(starts, [range(number, count, parts) for number in range(parts)]))
    violations = [line for part in found for line in part.violations]
    pairs = sum(part.pairs for part in found)
    print(f"{sum(part.met for part in found)} of {pairs} pairs took the lock at the same time")
    report.add(LAYER, "simultaneous starts", pairs, violations=len(violations))
    assert violations == []
    assert pairs == count


def test_of_two_runs_that_start_at_once_exactly_one_proceeds() -> None:
    """Whoever it is: the other ends with code 75 and names it."""
    start_pairs(CI_STARTS)


@pytest.mark.slow
def test_of_many_pairs_that_start_at_once_exactly_one_proceeds() -> None:
    """Ten times as many."""
    start_pairs(LONG_FORM_STARTS)


def explore_orders(size: str) -> int:
    found = list(in_processes(explore, pieces(size)))
    violations = [line for _, lines in found for line in lines]
    count = sum(count for count, _ in found)
    report.add(LAYER, "orders of system calls", count, violations=len(violations))
    assert violations == []
    return count


def test_a_lock_has_one_holder_in_every_order_of_system_calls() -> None:
    """One gives it up, which removes its file, while two others open, lock and compare that file: every order."""
    assert explore_orders(SMALL) >= CI_ORDERS


@pytest.mark.slow
def test_a_lock_has_one_holder_in_every_order_of_more_system_calls() -> None:
    """Those that have taken it give it up again, each of them while others try."""
    assert explore_orders(LARGE) >= LONG_FORM_ORDERS


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_lock_is_noticed(name: str) -> None:
    """A lock that does not hold has a violation, and it says what is wrong."""
    mutant = MUTANTS[name]
    if mutant.shows is None:
        ((_, violations),) = in_processes(explore, [Piece(SMALL, mutant=name)])
    elif mutant.shows == "starts":
        ((*_, violations),) = in_processes(functools.partial(starts, mutant=name), [range(CI_STARTS)])
    else:
        (violations,) = in_processes(functools.partial(play, mutant=name), [mutant.shows])
    caught = any(mutant.says in line for line in violations)
    report.control(LAYER, caught=caught)
    assert caught, violations
