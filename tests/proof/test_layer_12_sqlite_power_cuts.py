"""Layer 12: the power goes at random moments under a SQLite ledger, until its job is complete."""

from __future__ import annotations

import os
import time

import pytest

from . import report
from .disks import KINDS, lacking
from .parallel import in_processes
from .sqlite_cuts import Tally, Unit, cut_many_times

CI_CUTS, LONG_CUTS, CONTROL_CUTS = 150, 2_000, 17


@pytest.fixture(autouse=True)
def _root_with_disks() -> None:
    why = lacking(*KINDS)
    if why is not None:
        report.missing(12, why)


def cut(cuts: int, *, healthy: bool = True) -> Tally:
    """That many cuts on each kind of disk."""
    seed = os.environ.get("CUT_SEED") or str(time.time_ns() % 1_000_000)
    print(f"to repeat these moments: CUT_SEED={seed}")
    total = Tally()
    for tally in in_processes(cut_many_times, [Unit(kind, seed, cuts, healthy) for kind in KINDS]):
        total += tally
    print(total)
    return total


def check_cuts(cuts: int) -> None:
    """At least that many cuts."""
    total = cut(-(-cuts // len(KINDS)))
    report.add(12, "cuts", total.cuts)
    assert total.cuts >= cuts
    assert all(total.phases[phase] for phase in ("start", "work", "finish")), "no cut met one of the phases"
    assert all(total.ends[end] for end in ("-9", "74"))


def test_no_power_cut_loses_what_was_acknowledged() -> None:
    """What lies there after a cut is one commit, whole, not before the last acknowledged; a complete run stays."""
    check_cuts(CI_CUTS)


@pytest.mark.slow
def test_two_thousand_power_cuts_lose_nothing() -> None:
    """The same for 2,000 cuts."""
    check_cuts(LONG_CUTS)


def test_without_a_sync_at_each_commit_some_are_lost() -> None:
    """The control: with synchronous=NORMAL, commits that were acknowledged are gone after a cut."""
    lost = cut(CONTROL_CUTS, healthy=False).lost
    report.control(12, caught=bool(lost))
    assert lost
