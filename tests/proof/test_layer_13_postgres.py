"""Layer 13: a run over PostgreSQL loses its session, its server or itself, or is taken over while it stands still."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from functools import partial
from typing import Any

import pytest

from async_recovery.errors import StorageFailed
from async_recovery.postgres import PostgresLedger, _Fenced
from tests.support import postgres
from tests.support.commands import Folder, wait_until
from tests.support.database_kills import SIGKILLED, DatabaseKiller
from tests.support.jobs import count_of_runs
from tests.support.postgres import Server

from . import report
from .forks import Fork, quick_folder
from .parallel import in_processes
from .postgres_faults import SURVIVED, Faults, Tally, faulty_connections, hit_until_done

CI_FAULTS, LONG_FAULTS = 92, 1_500
CI_LOSSES, LONG_LOSSES = 8, 500
CONTROL_FAULTS = 120


@pytest.fixture(autouse=True)
def _no_blocking_on_the_loop() -> None:
    """The faults are part of the statements that they hit."""


def a_seed() -> str:
    """`FAULT_SEED` in the environment repeats the moments, as far as the server lets it."""
    seed = os.environ.get("FAULT_SEED") or str(time.time_ns() % 1_000_000)
    print(f"to repeat these moments: FAULT_SEED={seed}")
    return seed


async def hit(monkeypatch: pytest.MonkeyPatch, server: Server, faults: int) -> Tally:
    """At least that many faults."""
    found = Faults(server, a_seed())
    faulty_connections(monkeypatch, found)
    while found.tally.total < faults:
        await hit_until_done(found)
    return found.tally


async def check_faults(monkeypatch: pytest.MonkeyPatch, server: Server, faults: int) -> None:
    """The same, each kind of them, also where only the server knows whether the commit was done."""
    tally = await hit(monkeypatch, server, faults)
    print(tally)
    report.add(13, "faults at a statement", tally.total)
    assert set(tally.faults) == {*SURVIVED, "taken over"}
    assert tally.unknown > faults / 20


async def test_a_fault_at_any_statement_loses_and_doubles_nothing(
    monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """The run that meets it goes on and runs no item twice; one that was taken over meanwhile writes nothing more."""
    await check_faults(monkeypatch, server, CI_FAULTS)


@pytest.mark.slow
async def test_many_faults_lose_and_double_nothing(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """The same for 1,500 faults."""
    await check_faults(monkeypatch, server, LONG_FAULTS)


LOSSES = ("client", "server", "both", "sleeper")


def lose(losses: int) -> int:
    """Real processes of the command line, each of which loses something at a random moment; how many."""
    dice, server = random.Random(a_seed()), postgres.Server()
    try:
        with quick_folder() as path, Folder(path) as folder, contextlib.chdir(path):
            return lose_in(folder, server, server.new_database(), dice, losses)
    finally:
        server.close()


def lose_in(folder: Folder, server: Server, name: str, dice: random.Random, losses: int) -> int:
    """The same, in a folder and a database."""
    killer = DatabaseKiller(folder, server.address(name), 100, "--concurrency", "8", "--checkpoint-interval", "0.02")
    count = 0
    while count < losses:
        code = SIGKILLED
        while code != 0:
            kind = LOSSES[count % len(LOSSES)]
            count += 1
            if kind == "sleeper":
                code = overtake(killer, server, name, dice)
            else:
                # 74: it began just when there was no server
                codes = (StorageFailed.exit_code,) if kind == "server" else ()
                code = killer.run_and_lose(dice, partial(hurt, kind=kind, server=server), *codes).code
        killer.check_published()
        killer.forget()
    return count


def hurt(fork: Fork, kind: str, server: Server) -> None:
    """SIGKILL of the process, or the server is stopped at once, or SIGKILL of both; the server is started again."""
    if kind in ("client", "both"):
        fork.send(signal.SIGKILL)
    if kind == "server":
        server.stop_at_once()
    elif kind == "both":
        server.kill()
    if kind != "client":
        server.start()


def overtake(killer: DatabaseKiller, server: Server, name: str, dice: random.Random) -> int:
    """A process stands still, its session is ended, another one ends the job; then it wakes up, and has to stop."""
    aim = count_of_runs(killer.log) + dice.randrange(1, 30)
    with killer.another() as sleeper:
        wait_until(lambda: count_of_runs(killer.log) >= aim or sleeper.ends_within(0))
        sleeper.send(signal.SIGSTOP)
        mine = "application_name LIKE 'async-recovery %' AND datname = current_database()"
        server.sql(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {mine}", database=name)
        with killer.another() as other:
            ended = other.end()
        assert ended.code == 0, ended.err
        rows = "SELECT t::text FROM async_recovery_run AS t ORDER BY id"
        complete = server.sql(rows, database=name)
        sleeper.send(signal.SIGCONT)
        woken = sleeper.end()
    assert woken.code in (0, 75), woken.err  # 0: it had been done before
    assert woken.code == 0 or "was taken over by another process" in woken.err
    assert server.sql(rows, database=name) == complete, "who was taken over has written something"
    return ended.code


def test_kills_of_client_and_server_at_random_moments(server: Server) -> None:
    """SIGKILL of the client, the server, both, and a client that sleeps: the same line ends the job, as undisturbed."""
    report.add(13, "processes and servers lost", sum(in_processes(lose, [CI_LOSSES])))


@pytest.mark.slow
def test_many_kills_of_client_and_server(server: Server) -> None:
    """The same for 500 of them."""
    report.add(13, "processes and servers lost", sum(in_processes(lose, [LONG_LOSSES])))


# Controls


def without_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither epoch nor generation in the WHERE, and who was cut off goes on whoever has the run now."""

    async def pass_fence(self: PostgresLedger, connection: Any, mark: int, generation: int) -> None:
        await connection.execute(
            "INSERT INTO async_recovery_fence AS fence VALUES ($1, 1, $2, 1, $3, NULL) ON CONFLICT (name) DO UPDATE "
            "SET mark = $3, generation = fence.generation + 1",
            *(self.run, self._owner, mark),
        )

    async def reconnect(self: PostgresLedger, generation: int) -> None:
        connection = await self._session.connect()
        row = "SELECT generation FROM async_recovery_fence WHERE name = $1"
        if self._epoch is not None:
            self._generation = min(generation + 1, await connection.fetchval(row, self.run) or 0)

    monkeypatch.setattr(PostgresLedger, "_pass_fence", pass_fence)
    monkeypatch.setattr(PostgresLedger, "_reconnect", reconnect)


def repeats_without_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a lost connection the commit is made again, whatever the generation says."""
    reconnect = PostgresLedger._reconnect

    async def reconnect_blindly(self: PostgresLedger, generation: int) -> None:
        await reconnect(self, generation)
        self._generation = generation

    monkeypatch.setattr(PostgresLedger, "_reconnect", reconnect_blindly)


def generation_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit moves the mark alone: one of records ahead leaves nothing by which it can be told."""
    surviving = PostgresLedger._surviving

    async def pass_fence(self: PostgresLedger, connection: Any, mark: int, generation: int) -> None:
        if self._epoch is None:
            await connection.execute(
                "INSERT INTO async_recovery_fence VALUES ($1, 1, $2, 0, $3, NULL)", self.run, self._owner, mark
            )
        else:
            done = await connection.execute(
                "UPDATE async_recovery_fence SET mark = $1 WHERE name = $2 AND epoch = $3", mark, self.run, self._epoch
            )
            if done != "UPDATE 1":
                raise _Fenced

    async def surviving_anew(self: PostgresLedger, work: Any, *given: Any) -> Any:
        before = self._generation
        try:
            return await surviving(self, work, *given)
        finally:
            self._generation = before

    monkeypatch.setattr(PostgresLedger, "_pass_fence", pass_fence)
    monkeypatch.setattr(PostgresLedger, "_surviving", surviving_anew)


def mark_apart_from_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """The records are in the table for good before the mark is moved."""
    copy = PostgresLedger._copy

    async def copy_for_good(self: PostgresLedger, connection: Any, part: str, rows: Any, of: list[Any]) -> None:
        await copy(self, connection, part, rows, of)
        await connection.execute("COMMIT")
        await connection.execute("BEGIN")

    monkeypatch.setattr(PostgresLedger, "_copy", copy_for_good)


MUTANTS = [without_fence, repeats_without_looking, generation_stands_still, mark_apart_from_records]


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_every_mutant_is_caught(monkeypatch: pytest.MonkeyPatch, server: Server, mutant: Any) -> None:
    """Faults at statements of a ledger with a defect break an invariant."""
    mutant(monkeypatch)
    caught = ""
    try:
        await hit(monkeypatch, server, CONTROL_FAULTS)
    except Exception as error:
        caught = f"{type(error).__name__}: {error}"
    print(caught[:300])
    report.control(13, caught=bool(caught))
    assert caught
