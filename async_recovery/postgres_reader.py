"""A run in a PostgreSQL database as it lies there, read without touching it, also while a run goes on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from .database import Left, Snapshot
from .errors import AsyncRecoveryError, StorageFailed, describe
from .ledgers import split_address
from .lock import Holder
from .postgres_session import FAILED, Session, told
from .postgres_tables import has_tables, holder_of, joined, look

T = TypeVar("T")


class PostgresSnapshot:
    """See `Snapshot`: one read transaction in a session of its own.

    :param address: of the database, with the name of the run.
    """

    def __init__(self, address: str) -> None:
        self.run = split_address(address)[1]
        self.left = Left()
        self.runs: list[str] = []
        self.holder: Holder | None = None
        self._session = Session(address)
        self._lives: tuple[int | None, int | None] = (None, None)

    async def look_through(self, look: Callable[[Snapshot], Awaitable[T]]) -> T:
        """Begin the transaction, and let `look` see it."""
        try:
            await self._session.run(self._open)
            return await look(self)
        finally:
            await self._session.stop()

    async def joined(self, first: int, end: int, *, complete: bool) -> bytes:
        """See `Snapshot.joined`."""
        try:
            return await self._session.run(
                lambda: joined(self._session.connection, self._lives[complete], first, end),
            )
        except FAILED as error:
            raise StorageFailed(f"{self._session.shown} can not be read: {describe(error)}. Try again") from error

    async def _open(self) -> None:
        try:
            connection = await self._session.connect()
            await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            if not await has_tables(connection, self._session.shown):
                return
            names = "SELECT DISTINCT name FROM async_recovery_run WHERE name IS NOT NULL ORDER BY name"
            self.runs = [name for (name,) in await connection.fetch(names)]
            working, complete, self.left = await look(connection, self.run)
            self._lives = working, complete
            self.holder = await holder_of(connection, self.run)
        except AsyncRecoveryError:
            raise
        except (ValueError, *FAILED) as error:
            raise told(error, self._session.shown) from error


async def look_at(address: str, look: Callable[[Snapshot], Awaitable[T]]) -> T:
    """Let `look` see a run in the database at `address`.

    :raises UsageError: if it can not be read.
    """
    return await PostgresSnapshot(address).look_through(look)
