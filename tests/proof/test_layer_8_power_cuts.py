"""Layer 8: the power goes at random moments under the real command line, until the same line has finished its job."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import pytest

from async_recovery.file_ledger import FileLedger
from async_recovery.files import Files
from async_recovery.journal import Journal
from async_recovery.output_file import OutputFile

from . import report
from .disks import KINDS, lacking
from .lost_appends import left_after_two_cuts, left_without_clearing
from .mutants import Patch, instead, silent
from .parallel import in_processes
from .power_cuts import JOBS, Round, Tally, Violation, bench, cut_many_times, units
from .test_layer_2_mutants import journal_first
from .watched_command import Hold

CI_CUTS, LONG_CUTS = 1000, 20_000


@pytest.fixture(autouse=True)
def _root_with_disks() -> None:
    why = lacking(*KINDS)
    if why is not None:
        report.missing(8, why)


def check_cuts(cuts: int) -> None:
    """That many cuts, over all jobs and kinds of disks."""
    seed = os.environ.get("CUT_SEED") or str(time.time_ns() % 1_000_000)
    print(f"to repeat these moments: CUT_SEED={seed}")
    total = Tally()
    try:
        for tally in in_processes(cut_many_times, units(seed, cuts)):
            total += tally
    except Violation:
        report.add(8, "cuts", total.cuts, violations=1)
        raise
    print(total)
    report.add(8, "cuts", total.cuts)
    assert total.cuts >= cuts
    assert total.kinds.keys() == KINDS.keys()
    assert total.jobs.keys() == JOBS.keys()
    for counter, names in [
        (total.phases, ("start", "work", "finish", "end")),
        (total.modes, ("NOLOGFLUSH", "LOGFLUSH", "DEFAULT")),
        (total.ends, ("killed", "exit 74")),
        (total.left, ("nothing", "unfinished", "complete", "published", "a temporary file")),
    ]:
        assert all(counter[name] for name in names), f"no cut met one of {names}: {counter}"


def test_no_power_cut_loses_what_was_acknowledged() -> None:
    """After power cuts at random moments nothing acknowledged is lost or run again, and the output is the right one."""
    check_cuts(CI_CUTS)


@pytest.mark.slow
def test_twenty_thousand_power_cuts_lose_nothing() -> None:
    """The same for 20,000 cuts."""
    check_cuts(LONG_CUTS)


# One item at a time: each commit has a record, and none is ahead of the mark.
CONTROL_JOB = dataclasses.replace(JOBS["tiny-commits"], concurrency=1, compacts=True)


class Control(NamedTuple):
    """A broken durable path, the moment at which the power goes to show it, and where that shows."""

    patch: Patch
    hold: Hold
    kinds: tuple[str, ...] = tuple(KINDS)


CONTROLS = {
    "records not synced": Control(
        silent(OutputFile, "_write", "fdatasync", files=Files), Hold("acknowledged", 4, "after")
    ),
    "journal not synced": Control(
        silent(Journal, "_append", "fdatasync", files=Files), Hold("acknowledged", 4, "after")
    ),
    "journal before records": Control(instead(FileLedger, "_commit", journal_first), Hold("fdatasync", 1, "after")),
    "temporary file not synced": Control(
        silent(Journal, "_replace", "fsync", 0, files=Files),
        Hold("fsync_directory", 4, "after"),  # at the first compaction, before the fsync that comes after the rename
        ("xfs", "ext4-noauto_da_alloc"),  # by default ext4 writes a file before it is renamed over another
    ),
    "no fsync after the rename": Control(
        silent(Journal, "_replace", "fsync", 2, files=Files),
        Hold("fsync", 7, "before", kills=False),  # the directory's at the first compaction
        ("xfs",),
    ),
}


def shown(run: tuple[str, str]) -> list[str | None]:
    """The violation that a control shows on this kind of disk: with the defect, and without."""
    name, kind = run
    patch, hold, _ = CONTROLS[name]
    found: list[str | None] = []
    with bench(kind, CONTROL_JOB, contextlib.nullcontext) as there:
        for there.mutant in (patch, contextlib.nullcontext):
            try:
                Round(there, f"{kind}/tiny-commits/control").hold(hold)
                found.append(None)
            except Violation as violation:
                found.append(str(violation).splitlines()[0])
    return found


def test_every_control_is_seen() -> None:
    """Each broken durable path loses something at the moment chosen for it; the healthy one loses nothing there."""
    runs = [(name, kind) for name in CONTROLS for kind in CONTROLS[name].kinds]
    for (name, kind), (broken, healthy) in zip(runs, in_processes(shown, runs), strict=True):
        print(f"{name} on {kind}: {broken}")
        report.control(8, caught=broken is not None)
        assert broken is not None, f"{name} was not seen on {kind}"
        assert healthy is None


def test_an_append_that_was_lost_does_not_come_back() -> None:
    """Its bytes on the disk are no commit, also when a second cut leaves of the next append the length alone."""
    assert list(in_processes(left_after_two_cuts, KINDS)) == [1] * len(KINDS)
    report.add(8, "cuts", 2 * len(KINDS))


def test_an_append_that_was_lost_comes_back_where_nothing_clears_it() -> None:
    """On ext4, where a start that finds nothing to cut off goes on at once, as ours did."""
    left = list(in_processes(left_without_clearing, ["ext4", "ext4-noauto_da_alloc"]))
    report.control(8, caught=left == [2, 2])
    assert left == [2, 2]


@contextlib.contextmanager
def fdatasync_believed() -> Iterator[None]:
    def believing(files: Files, descriptor: int) -> None:
        files.fdatasync(descriptor)

    with (
        mock.patch("async_recovery.journal.make_durable", believing),
        mock.patch("async_recovery.output_file.make_durable", believing),
    ):
        yield


def cuts_until_seen(most: int) -> int | None:
    """How many cuts of a process that believes each fdatasync it takes until something acknowledged is lost."""
    with bench("ext4", JOBS["tiny-commits"], contextlib.nullcontext) as there:
        there.mutant = fdatasync_believed
        for number in range(1, most + 1):
            cut_round = Round(there, f"ext4/tiny-commits/believed.{number}")
            try:
                cut_round.cut_in_the_work()
            except Violation as violation:
                print(violation)
                return number
    return None


@pytest.mark.slow
def test_an_fdatasync_that_is_believed_is_seen() -> None:
    """Without the look after it, what is acknowledged while the file system shuts down is lost: in one of ten cuts."""
    (cuts,) = in_processes(cuts_until_seen, [1000])
    print(f"seen after {cuts} cuts")
    report.control(8, caught=cuts is not None)
    assert cuts is not None
