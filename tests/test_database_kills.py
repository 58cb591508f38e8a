"""SIGKILL of a job whose output is a SQLite database: between any two statements, and at random moments."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import pytest

from async_recovery import sqlite
from async_recovery.sqlite import SqliteLedger
from tests.proof.forks import Inside, Prepare, nothing, quick_folder
from tests.support.commands import Folder
from tests.support.database_kills import SIGKILLED, DatabaseKiller


@pytest.fixture(autouse=True)
def _no_blocking_on_the_loop() -> None:
    """The workers write to a log of their own, in processes of their own."""


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


def kill_between_statements(folder: Folder, step: int, mutant: Prepare = nothing) -> int:
    """A small job that is done anew in a database which has a complete one; returns how many kills there were.

    :param step: 1: before each statement, else before every so manieth.
    :raises AssertionError: if one of them breaks an invariant.
    """
    options = ("--concurrency", "6", "--batch-size", "2")
    killer = DatabaseKiller(folder, "sqlite:///out.db", 6, *options, worker="item_0_last", mutant=mutant)
    assert killer.run().code == 0
    killer.forget()
    at = 0
    while True:
        if killer.run(killing(at)).code != SIGKILLED:
            break
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


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_between_any_two_statements(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Killed before any statement: the same line ends the job, and until then a reader sees the last complete run."""
    with quick_folder() as path, Folder(path) as folder:
        monkeypatch.chdir(path)
        kills = kill_between_statements(folder, step)
    print(f"{kills} kills")
    assert kills > 30 / step


def test_a_forgotten_transaction_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the transaction one of these kills leaves what is found to be wrong."""
    with quick_folder() as path, Folder(path) as folder:
        monkeypatch.chdir(path)
        with pytest.raises(AssertionError, match=r"records, .* were written|committed item ran again|not whole"):
            kill_between_statements(folder, 2, without_transaction)


def kill_at_random(folder: Folder, kills: int) -> None:
    """One job after the other, until there were so many kills; `KILL_SEED` in the environment repeats the moments."""
    seed = os.environ.get("KILL_SEED") or str(time.time_ns() % 1_000_000)
    print(f"to repeat these moments: KILL_SEED={seed}")
    dice = random.Random(seed)
    options = ("--concurrency", "8", "--checkpoint-interval", "0.02")
    killer = DatabaseKiller(folder, "sqlite:///out.db", 600, *options)
    while killer.kills < kills:
        code = SIGKILLED
        while code == SIGKILLED:
            code = (killer.run_and_kill(dice) if killer.kills < kills else killer.run()).code
        killer.check_published()
        killer.forget()


def test_kills_at_random_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each kill the same line goes on; in the end the records are those of an undisturbed run."""
    with quick_folder() as path, Folder(path) as folder:
        monkeypatch.chdir(path)
        kill_at_random(folder, 12)


@pytest.mark.slow
def test_many_kills_at_random_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for 2,000 kills."""
    with quick_folder() as path, Folder(path) as folder:
        monkeypatch.chdir(path)
        kill_at_random(folder, 2_000)
