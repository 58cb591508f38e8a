"""SIGKILL of a job whose output is a SQLite database: between any two statements, and at random moments."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import pytest

from async_recovery import sqlite
from async_recovery.sqlite import SqliteLedger
from tests.proof.forks import Inside, Prepare, nothing, quick_folder
from tests.proof.parallel import in_processes
from tests.support.commands import Folder
from tests.support.database_kills import SIGKILLED, DatabaseKiller, read_database, run_fork
from tests.support.jobs import MODULE


def killing(at: int | None) -> Prepare:
    """A process that kills itself just before its statement of that number, or tells how many it had."""

    def prepare(inside: Inside) -> None:
        count = 0

        class Counting(sqlite3.Connection):
            def execute(self, *words: Any) -> sqlite3.Cursor:
                nonlocal count
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                if at is None:
                    inside.report(words[0].split()[0])
                return super().execute(*words)

        connect = sqlite3.connect
        sqlite.sqlite3.connect = lambda *given, **named: connect(*given, factory=Counting, **named)  # type: ignore[attr-defined]

    return prepare


@contextlib.contextmanager
def current_folder() -> Iterator[Folder]:
    """A folder in memory, which is the current one: a relative address is that of the process as of its forks."""
    with quick_folder() as path, Folder(path) as folder, contextlib.chdir(path):
        yield folder


def kill_between_statements(step: int, mutant: Prepare = nothing) -> int:
    """A small job that is done anew in a database which has a complete one; returns how many kills there were.

    :param step: 1: before each statement, else before every so manieth.
    :raises AssertionError: if one of them breaks an invariant.
    """
    options = ("--concurrency", "6", "--batch-size", "2")
    with current_folder() as folder:
        killer = DatabaseKiller(folder, "sqlite:///out.db", 6, *options, worker="item_0_last", mutant=mutant)
        assert killer.run().code == 0
        killer.forget()
        at = 0
        while killer.run(killing(at)).code == SIGKILLED:
            assert killer.run().code == 0
            killer.check_records()
            killer.forget()
            at += step
        killer.check_published()
    return killer.kills


def without_transaction(inside: Inside) -> None:
    """The ledger of an author who forgot the transaction: each statement is durable by itself."""

    @contextlib.contextmanager
    def autocommit(self: SqliteLedger) -> Iterator[None]:
        yield

    SqliteLedger._transaction = autocommit  # type: ignore[method-assign]


def found_without_transaction(step: int) -> str:
    """What these kills find wrong with that ledger, if anything."""
    try:
        kill_between_statements(step, without_transaction)
    except AssertionError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_between_any_two_statements(step: int) -> None:
    """Killed before any statement: the same line ends the job, and until then a reader sees the last complete run."""
    (kills,) = in_processes(kill_between_statements, [step])
    print(f"{kills} kills")
    assert kills > 30 / step


def test_a_forgotten_transaction_is_caught() -> None:
    """The control: without the transaction one of these kills leaves what is found to be wrong."""
    (found,) = in_processes(found_without_transaction, [2])
    print(found)
    assert re.search("records, .* were written|committed item ran again|not whole", found)


MOODY = """

async def moody(item):
    dice = began(item)
    if int(item) % 2 and not os.path.exists("go"):
        raise ValueError("not yet")
    return result(item, dice)
"""


def kill_retry_between_statements(step: int) -> int:
    """The failed items of a run are run again, killed and resumed; returns how many kills there were."""
    words = ["--worker", "jobs:moody", "--concurrency", "6", "--batch-size", "2"]
    run = ["run", "--input", "items.txt", *words, "--output"]
    retry = ["retry-failed", "sqlite:///out.db", *words]
    with current_folder() as folder:
        folder.write("jobs.py", MODULE + MOODY)
        folder.write_items(9)
        failed = run_fork(folder.path, [*run, "sqlite:///out.db", "--on-error", "record"])
        assert failed.code == 3, failed.err
        folder.write("go", "")
        assert run_fork(folder.path, [*run, "expected.jsonl"]).code == 0
        (folder / "out.db").rename(folder / "failed.db")
        before, expected = read_database("sqlite:///failed.db")[1], (folder / "expected.jsonl").read_bytes()
        at = 0
        while True:
            for name in sqlite.NAMES:
                (folder / f"out.db{name}").unlink(missing_ok=True)
            shutil.copy(folder / "failed.db", folder / "out.db")
            code = run_fork(folder.path, retry, killing(at)).code
            found = read_database("sqlite:///out.db")[1]
            assert found in (before, expected), "a reader sees a run that is not whole"
            if code != SIGKILLED:
                assert (code, found) == (0, expected)
                return at // step
            again = run_fork(folder.path, retry)
            assert again.code == 0, again.err
            assert read_database("sqlite:///out.db")[1] == expected, (
                "the records are not those of a run that never failed"
            )
            at += step


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_between_any_two_statements_of_a_retry(step: int) -> None:
    """Killed before any statement: the failures stand where they were, or all new records do; the same line goes on."""
    (kills,) = in_processes(kill_retry_between_statements, [step])
    print(f"{kills} kills")
    assert kills > 30 / step


def kill_at_random(work: tuple[int, str]) -> None:
    """One job after the other, until there were so many kills, at moments that follow from the seed."""
    kills, dice = work[0], random.Random(work[1])
    options = ("--concurrency", "8", "--checkpoint-interval", "0.02")
    with current_folder() as folder:
        killer = DatabaseKiller(folder, "sqlite:///out.db", 600, *options)
        while killer.kills < kills:
            code = SIGKILLED
            while code == SIGKILLED:
                code = (killer.run_and_kill(dice) if killer.kills < kills else killer.run()).code
            killer.check_published()
            killer.forget()


@pytest.mark.parametrize("kills", [12, pytest.param(2_000, marks=pytest.mark.slow)])
def test_kills_at_random_moments(kills: int) -> None:
    """After each kill the same line goes on; in the end the records are those of an undisturbed run."""
    seed = os.environ.get("KILL_SEED") or str(time.time_ns() % 1_000_000)
    print(f"to repeat these moments: KILL_SEED={seed}")
    assert list(in_processes(kill_at_random, [(kills, seed)])) == [None]
