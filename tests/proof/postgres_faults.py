"""A job over PostgreSQL that is hit at any statement, again and again, until it is done; what is left is checked.

The statements are counted, and a fault hits one of them: its connection is lost before it, while it is under way, or
after it was done and before that was known; the session, or the whole server, is ended; or another process takes the
run over while this one stands still. The first kinds are survived by the run that meets them, the last one ends it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from async_recovery import AlreadyRunning, ItemFailed, PostgresLedger, run_resumable
from async_recovery.checkpoint import Checkpoint, Job
from async_recovery.postgres_session import Session
from tests.support.database_kills import read_database
from tests.support.postgres import Server

ITEMS, CONCURRENCY = 24, 4
MOST_STATEMENTS_BETWEEN = 25
SURVIVED = ("before", "under way", "after", "session")
EXPECTED = b"".join(b'{"index":%d,"n":%d}\n' % (n, n) for n in range(ITEMS))
STATEMENTS = ("execute", "fetch", "fetchrow", "fetchval", "copy_records_to_table")


@dataclass
class Tally:
    """What was done.

    :ivar faults: of each kind.
    :ivar unknown: how many hit the end of a transaction.
    """

    faults: Counter[str] = field(default_factory=Counter)
    unknown: int = 0

    @property
    def total(self) -> int:
        return self.faults.total()


class Faulty:
    """A connection whose statements are hit by faults."""

    def __init__(self, connection: Any, faults: Faults) -> None:
        self._connection, self._faults = connection, faults

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._connection, name)
        if name not in STATEMENTS:
            return found

        async def hit(*given: Any, **named: Any) -> Any:
            return await self._faults.at(self._connection, lambda: found(*given, **named))

        return hit

    def transaction(self) -> FaultyTransaction:
        return FaultyTransaction(self._connection, self._faults)


class FaultyTransaction:
    """The end of a transaction is a statement like any other, and the one that counts."""

    def __init__(self, connection: Any, faults: Faults) -> None:
        self._connection, self._faults = connection, faults
        self._transaction = connection.transaction()

    async def __aenter__(self) -> None:
        await self._transaction.start()

    async def __aexit__(self, kind: Any, *error: Any) -> None:
        if kind is not None:
            if not self._connection.is_closed():
                await self._transaction.rollback()
            return
        await self._faults.at(self._connection, self._transaction.commit, is_end=True)


class Faults:
    """One job, its server and its dice.

    :param wakes: whether others take the run over, too.
    """

    def __init__(self, server: Server, seed: str, *, wakes: bool = True) -> None:
        self.server, self.dice, self.tally = server, random.Random(seed), Tally()
        self.name = server.new_database()
        self.address = server.address(self.name)
        self.kinds = (*SURVIVED, *(("taken over",) if wakes else ()))
        self._left = 0
        self._is_on = False
        self._taken_over = False

    async def at(self, connection: Any, statement: Any, *, is_end: bool = False) -> Any:
        """Do a statement, or what happens to it."""
        is_due = self._left <= 0 or (is_end and self.dice.random() < 0.2)
        if not self._is_on or not is_due or connection.is_closed():
            self._left -= 1
            return await statement()
        self._left = self.dice.randrange(MOST_STATEMENTS_BETWEEN)
        kind = self.dice.choice(self.kinds)
        self.tally.faults[kind] += 1
        self.tally.unknown += is_end
        if kind == "before":
            connection.terminate()
        elif kind == "under way":
            under_way = asyncio.ensure_future(statement())
            await asyncio.sleep(self.dice.choice([0, 0, 0.0005]))
            connection.terminate()
            await asyncio.wait({under_way})
            under_way.exception()
            raise ConnectionResetError("as the test says")
        elif kind == "after":
            await statement()
            connection.terminate()
            raise ConnectionResetError("as the test says")
        elif kind == "session":
            await asyncio.to_thread(self._end_session, connection.get_server_pid())
        else:
            await asyncio.to_thread(self._end_session, connection.get_server_pid())
            self._is_on = False
            await asyncio.to_thread(asyncio.run, self._take_over())
            self._taken_over = True
        return await statement()

    def _end_session(self, pid: int) -> None:
        self.server.sql("SELECT pg_terminate_backend($1)", pid)

    async def _take_over(self) -> None:
        """Another process does a part of the work, or all of it, while this one stands still."""
        last = self.dice.randrange(2 * ITEMS)

        async def worker(item: int) -> dict[str, int]:
            if item == last:
                raise ConnectionError
            return {"n": item}

        worker.__qualname__ = "worker"
        while True:
            try:
                await run_resumable(worker, range(ITEMS), output=PostgresLedger(self.address), checkpoint_interval=0)
            except ItemFailed:
                return
            except AlreadyRunning:  # the session is not gone yet
                continue
            return

    async def life(self) -> bool:
        """One process: until its job is done, or it was taken over. Whether it is done."""
        before, _ = await asyncio.to_thread(read_database, self.address)
        ran: list[int] = []

        async def worker(item: int) -> dict[str, int]:
            ran.append(item)
            await asyncio.sleep(self.dice.choice([0, 0.001, 0.003]))
            return {"n": item}

        worker.__qualname__ = "worker"
        self._taken_over = False
        ledger = PostgresLedger(self.address, sleep=lambda delay_s: asyncio.sleep(delay_s / 50))
        opened = ledger.open

        async def open_and_begin(job: Job) -> Checkpoint:
            found = await opened(job)
            self._is_on = True  # a start that fails is just another start
            return found

        ledger.open = open_and_begin  # type: ignore[method-assign]
        try:
            await run_resumable(
                worker, range(ITEMS), output=ledger, concurrency=CONCURRENCY, checkpoint_interval=0, drain_timeout=0
            )
        except AlreadyRunning:
            assert self._taken_over, "it stopped, and nobody had taken it over"
        finally:
            self._is_on = False
        assert len(set(ran)) == len(ran), "an item ran twice in one life"
        assert not [item for item in ran if before.has(item)], "a committed item ran again"
        now, published = await asyncio.to_thread(read_database, self.address)
        if published is not None:
            assert published == EXPECTED, "a reader sees a run that is not whole"
            return True
        assert now.mark >= before.mark, "the mark went back"
        return False


async def hit_until_done(faults: Faults) -> None:
    """One job from its beginning to its end."""
    while not await faults.life():
        pass
    faults.server.sql("DELETE FROM async_recovery_run", database=faults.name)
    for part in ("record", "ahead", "spent", "fence"):
        faults.server.sql(f"DELETE FROM async_recovery_{part}", database=faults.name)


def faulty_connections(monkeypatch: Any, faults: Faults) -> None:
    """From now on every connection of a ledger is hit."""
    connect = Session.connect

    async def connect_faulty(self: Session) -> Any:
        await connect(self)
        self._connection = Faulty(self._connection, faults)
        return self._connection

    monkeypatch.setattr(Session, "connect", connect_faulty)
