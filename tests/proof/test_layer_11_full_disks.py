"""Layer 11: full and forbidden disks. In all: one clear line, the right code, nothing lost; with room it goes on."""

from __future__ import annotations

import shlex
import traceback
from collections.abc import Callable
from typing import NamedTuple

import pytest

from . import full_disks, report
from .disks import lacking
from .full_disks import JOBS, MUTANTS
from .parallel import in_processes


class Case(NamedTuple):
    """A function of `full_disks`, its job (or kind of disk), and the mutant that runs in it."""

    name: str
    job: str
    mutant: str = ""


CASES = [
    *(Case("limited_files", job) for job in JOBS),
    *(Case("few_pages", job) for job in JOBS),
    *(Case("growing_page_by_page", job) for job in JOBS),
    *(Case("full_in_the_middle", kind) for kind in ("xfs", "ext4", "tmpfs")),
    *(Case(name, job) for name in ("few_inodes", "forbidden_in_the_middle", "forbidden_files") for job in JOBS),
    Case("read_only", "lines"),
    Case("mounted_output", "array"),
    Case("forbidden_folder", "lines"),
]
CONTROLS = [
    Case(name, job, mutant)
    for mutant in MUTANTS
    if mutant
    for name, job in (("few_pages", "lines"), ("growing_page_by_page", "array"), ("limited_files", "lines"))
]
LEAST_RUNS = 300


@pytest.fixture(autouse=True)
def _root_with_disks() -> None:
    why = lacking("ext4", "xfs")
    if why is not None:
        report.missing(11, why)


def outcome(case: Case) -> int | str:
    """How many runs a case took, or what was wrong in it and how to see it again."""
    function: Callable[[str, str], int] = getattr(full_disks, case.name)
    try:
        return function(case.job, case.mutant)
    except AssertionError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        replay = shlex.join([".venv/bin/python", "-m", "tests.proof.full_disks", *filter(None, case)])
        return f"{where.line} (line {where.lineno}): {error}\nreplay: {replay}"


def test_nothing_is_lost_where_nothing_can_be_written() -> None:
    """Each run that can not write fails with one line and the right code; the same line finishes when it can."""
    outcomes = list(in_processes(outcome, CASES))
    wrong = [outcome for outcome in outcomes if isinstance(outcome, str)]
    runs = sum(outcome for outcome in outcomes if isinstance(outcome, int))
    report.add(11, "runs", runs, violations=len(wrong))
    assert wrong == []
    assert runs >= LEAST_RUNS


def test_every_control_is_noticed() -> None:
    """A seam that swallows the error of a write, and a ledger that goes on after one, are noticed in each case."""
    for case, found in zip(CONTROLS, in_processes(outcome, CONTROLS), strict=True):
        print(f"{case}: {str(found)[:200]}")
        report.control(11, caught=isinstance(found, str))
        assert isinstance(found, str), f"{case} was not noticed"
