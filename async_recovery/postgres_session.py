"""A session with a PostgreSQL server, in a thread and on a loop of its own: no worker delays it, nor it a worker.

Nothing here knows what is written. What went wrong is told in one line, and never with a password.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from .errors import AsyncRecoveryError, StorageFailed, UsageError, describe
from .files import WriterThread
from .ledgers import public, split_address

try:
    import asyncpg  # type: ignore[import-untyped]
except ImportError as error:
    raise UsageError(
        "a database of PostgreSQL needs the extra postgres: `pip install 'async-recovery[postgres]'`"
    ) from error

T = TypeVar("T")

PATIENCE_S = 300.0  # a failover or restart of a server takes less
HASTE_S = 5.0
CONNECT_S = 10.0
LONGEST_DELAY_S = 5.0

LOST = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # the server is being stopped, or has ended the session
    asyncpg.TransactionRollbackError,  # a deadlock: the transaction was not done
    asyncpg.LockNotAvailableError,
    asyncpg.TooManyConnectionsError,
    asyncpg.ReadOnlySQLTransactionError,  # a standby answers, that is not the server yet
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,  # TimeoutError is one
)
"""After these nothing is known but that the transaction was done as a whole or not at all: connect again, and look."""
FAILED = (asyncpg.PostgresError, *LOST)
"""All that the server, or the way to it, can fail with."""


def delays(patience_s: float) -> Iterator[float]:
    """How long to wait before each try, in seconds: more and more, and about `patience_s` together."""
    yield from (0.0, 0.0)  # the first one, and the first one with a new connection
    delay_s, waited_s = 0.1, 0.0
    while waited_s < patience_s:
        yield delay_s
        waited_s += delay_s
        delay_s = min(2 * delay_s, LONGEST_DELAY_S)


class Session:
    """At most one connection at a time.

    :param address: as asyncpg takes it; the name of a run in it does not matter here.
    :param name: what the server calls this session, for people.
    :ivar shown: the address without what is secret.
    :raises UsageError: if it is no address.
    """

    def __init__(self, address: str, name: str = "async-recovery") -> None:
        self.shown = public(address)
        self._address = _checked(address, self.shown)
        self._name = name
        self._thread = WriterThread()
        self._runner = asyncio.Runner()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: Any = None

    async def run(self, job: Callable[[], Awaitable[T]]) -> T:
        """Run `job` on the session's loop, to its end whatever happens to the waiting task."""
        return await self._thread.run(self._run, job)

    async def read(self, job: Callable[[], Awaitable[T]]) -> T:
        """The same for what only reads: a cancellation ends the wait at once."""
        return await self._thread.read(self._run, job)

    def _run(self, job: Callable[[], Awaitable[T]]) -> T:
        async def main() -> T:
            self._loop = asyncio.get_running_loop()
            return await job()

        return self._runner.run(main())

    def soon(self, call: Callable[[], object]) -> None:
        """Have the session's loop call that, in the midst of a job or before the next one; never after `stop`."""
        with contextlib.suppress(RuntimeError):  # it has been closed
            if self._loop is not None:
                self._loop.call_soon_threadsafe(call)

    async def stop(self) -> None:
        """Close the connection, and end the thread."""
        await self.run(self.close)
        await self._thread.run(self._runner.close)
        self._thread.stop()

    # What follows runs on the session's loop.

    @property
    def is_connected(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    @property
    def connection(self) -> Any:
        """The connection that there is."""
        if self._connection is None:
            raise asyncpg.InterfaceError("there is no connection")
        return self._connection

    async def connect(self) -> Any:
        """A new connection to a server that keeps what it acknowledges.

        :raises UsageError: if its settings are such that it does not.
        """
        self.drop()
        ours = {"application_name": self._name, "client_encoding": "UTF8"}  # whatever stands in the address
        self._connection = await asyncpg.connect(self._address, timeout=CONNECT_S, server_settings=ours)
        settings = await self._connection.fetchrow(
            "SELECT current_setting('fsync') AS fsync, current_setting('server_encoding') AS encoding, "
            "set_config('synchronous_commit', 'on', false)"  # also for an epoch that is raised
        )
        if settings["fsync"] != "on":
            raise UsageError(
                f"the server of {self.shown} has fsync=off, and would lose what it acknowledged: set fsync=on, or name "
                "another server"
            )
        if settings["encoding"] != "UTF8":
            raise UsageError(
                f"the database {self.shown} has the encoding {settings['encoding']}, which can not hold every record: "
                "make one with the encoding UTF8"
            )
        return self._connection

    def drop(self) -> None:
        """Forget the connection, if there is one, without a word to the server."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def close(self) -> None:
        """Say goodbye, as far as that can be done at once."""
        if self._connection is not None:
            try:
                await self._connection.close(timeout=2)
            except FAILED:
                self.drop()
            self._connection = None


def _checked(address: str, shown: str) -> str:
    """The address without the name of the run.

    :raises UsageError: if it is none.
    """
    address, _ = split_address(address)
    try:
        parts = urlsplit(address)
        hosts = parts.netloc.rpartition("@")[2]
        good = re.fullmatch(r"(\[[^]]*\]|[^:,]*)(:\d+)?(,(\[[^]]*\]|[^:,]*)(:\d+)?)*", hosts) is not None
        named = unquote(parts.path.removeprefix("/")) or dict(parse_qsl(parts.query)).get("dbname")
        good = good and bool(named) and "/" not in parts.path[1:] and not parts.fragment
    except ValueError:
        good = False
    if not good or not address.startswith(("postgresql://", "postgres://")):
        raise UsageError(
            f"the output {shown} is no address of a database: write postgresql://USER@HOST:PORT/DATABASE[?run=NAME], "
            "with %2F, %40, %3A, %23 and %3F for / @ : # ? in a name or password"
        )
    return address


def told(error: BaseException, shown: str) -> AsyncRecoveryError:
    """The error of a session that could not begin, for the user; nothing was changed."""
    what = f"{shown}: {describe(error)}"
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):  # a wrong password is one
        return UsageError(f"the server refuses the user or the password. {what}. Mend the address or PGPASSWORD")
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        return UsageError(f"there is no such database. {what}. Make it (`createdb`), or name another")
    if isinstance(error, asyncpg.InsufficientPrivilegeError | asyncpg.ReadOnlySQLTransactionError):
        return UsageError(f"the user may not do that. {what}. Grant it, or name another user")
    if isinstance(error, asyncpg.ClientConfigurationError | ValueError):
        return UsageError(f"the address {shown} can not be used ({type(error).__name__}): mend it")
    if isinstance(error, LOST):
        return StorageFailed(
            f"no server answers, or it has no room. {what}. Start it, or mend the address, then run the same line again"
        )
    return StorageFailed(f"the database failed. {what}. Nothing was changed; mend that, then run the same line again")
