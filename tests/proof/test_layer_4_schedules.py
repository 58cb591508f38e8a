"""Layer 4: every order in which items, commits and reads can end, where they are few; by dice beyond."""

from __future__ import annotations

import pytest

from . import report
from .engine_mutants import MUTANTS, is_shown
from .parallel import in_processes
from .schedules import FAMILIES, LONG_FAMILIES, Family, Seeds, Tally, explore, first_violation, live_by_seeds, pieces

ORDERS_OF_EIGHT_ON_FOUR = 4**5 * 3 * 2  # what ends next is any of those in flight: 4 until the last three
CI_EXHAUSTIVE, CI_SEEDED = 25_000, 20_000
LONG_FACTOR = 20
SEEDS_AT_ONCE = 400
JOBS = 11_200  # of about 1.8 processes each


def enumerate_all(families: list[Family]) -> Tally:
    """Every schedule of the families."""
    total = Tally()
    for tally in in_processes(explore, [piece for family in families for piece in pieces(family)]):
        total += tally
    report.add(4, "schedules enumerated", total.schedules, violations=len(total.violations))
    assert total.violations == []
    return total


def by_dice(first: int, jobs: int) -> int:
    """That many jobs; the number of their processes, each of which had a schedule of its own."""
    total = Tally()
    for tally in in_processes(
        live_by_seeds, [Seeds(n, SEEDS_AT_ONCE) for n in range(first, first + jobs, SEEDS_AT_ONCE)]
    ):
        total += tally
    report.add(4, "by dice", total.lives, violations=len(total.violations))
    assert total.violations == []
    return total.lives


def test_no_order_of_events_breaks_an_invariant() -> None:
    """Eight items on four workers in every order, six with a cancellation anywhere: every invariant holds."""
    total = enumerate_all(FAMILIES)
    assert total.schedules >= CI_EXHAUSTIVE
    assert sum(family == "eight-on-four" for family, *_ in total.orders) == ORDERS_OF_EIGHT_ON_FOUR


def test_no_schedule_by_dice_breaks_an_invariant() -> None:
    """With windows, bounds on bytes, failures, slow disks and stops drawn by dice, every invariant holds."""
    assert by_dice(0, JOBS) >= CI_SEEDED


def test_every_mutant_is_caught() -> None:
    """Each defect of engine, collector, cursor and watermark that is put in on purpose breaks an invariant."""
    names = [mutant.name for mutant in MUTANTS if mutant.layer == 4]
    found = dict(zip(names, in_processes(first_violation, names), strict=True))
    for name, violation in found.items():
        print(f"{name}: {violation[:160]}")
        report.control(4, caught=is_shown(violation))
    assert [name for name, violation in found.items() if not is_shown(violation)] == []


@pytest.mark.slow
def test_no_order_of_more_events_breaks_an_invariant() -> None:
    """The same for other windows, for commits after each item, and for all that can follow a cancellation."""
    assert enumerate_all([*LONG_FAMILIES, *FAMILIES]).schedules >= LONG_FACTOR * CI_EXHAUSTIVE


@pytest.mark.slow
def test_none_of_many_schedules_by_dice_breaks_an_invariant() -> None:
    """The same for other seeds."""
    assert by_dice(JOBS, LONG_FACTOR * JOBS) >= LONG_FACTOR * CI_SEEDED
