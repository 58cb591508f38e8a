"""A run on a cluster of Dask: the coordinator's end of it (extra ``dask``).

Dask starts processes, finds them, notices that one is gone, and carries bytes. Which item runs where, and again, is
decided by the run alone: none of it is a task of Dask.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import anyio

from . import __version__
from .chunk_pool import ChunkPool
from .errors import NoWorkers, UsageError, check_number, describe, shorten
from .executors import SIGN_OF_LIFE_S, Assignment, Listener, Work, WorkerPool
from .workers import SessionWorker, Worker, identity, load

if TYPE_CHECKING:
    from distributed import Security

logger = logging.getLogger("async_recovery")

LOOK_S, SEAT_AGAIN_S = 0.1, 5.0
EXAMINES_S = 3.0
CALL_S = 10.0  # what a process of the cluster may take to answer
LEAST_CONNECT_S = 0.5  # and a scheduler to be connected to
CLOSES_WITHIN_S = 5.0
LEAST_LEASE_S = 4 * SIGN_OF_LIFE_S
LATELY_S = 1.2  # who has said nothing for so long is not waited for in the end
TLS = {"tls_ca": "tls_ca_file", "tls_cert": "tls_client_cert", "tls_key": "tls_client_key"}
HAS_PASSWORD = (
    "the address of the scheduler has a user or a password: Dask knows none; give HOST:PORT alone, and TLS certificates"
)
OPTIONS: list[tuple[str, str, Callable[[str], float]]] = [
    ("workers", "workers", int),
    ("lease", "lease_s", float),
    ("patience", "patience_s", float),
]
WRITE = "write dask://HOST:PORT, or dask:// alone for a cluster of this machine"


class DaskExecutor:
    """Runs the worker on a Dask cluster::

        await run_resumable(fetch, "urls.txt", output="pages.jsonl", executor=DaskExecutor("tcp://scheduler:8786"))

    :param address: of the scheduler; None: a cluster on this machine, for the length of the run.
    :param workers: processes of a cluster on this machine; None: one for each processor.
    :param security: a ``distributed.Security``: TLS, as Dask knows it.
    :param lease_s: seconds that a worker process may be silent before what it has is given out again: 2 at least, some
        signs of life. One that blocks its event loop is silent.
    :param patience_s: seconds without any worker until the run ends with `NoWorkers`, resumable.
    :raises UsageError: if an argument can not be used, or ``distributed`` is not installed.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int | None = None,
        security: Security | None = None,
        lease_s: float = 60.0,
        patience_s: float = 60.0,
    ) -> None:
        check_number("workers", workers, least=1, optional=True)
        check_number("lease_s", lease_s, least=LEAST_LEASE_S, kind=(int, float))
        check_number("patience_s", patience_s, least=0, kind=(int, float))
        if address is not None and workers is not None:
            raise UsageError("workers with the address of a scheduler: they are started there; leave one of them out")
        given: Any = address
        if isinstance(given, str) and "@" in given:
            raise UsageError(HAS_PASSWORD)
        if given is not None and not (isinstance(given, str) and urlsplit(given).hostname):
            raise UsageError(f"the scheduler is {shorten(address)}: give its address, such as tcp://HOST:8786")
        if not _is_installed():
            raise UsageError("a Dask cluster needs distributed: pip install 'async-recovery[dask]'")
        self.address = address
        self._workers, self._security = workers, security
        self._lease_s, self._patience_s = lease_s, patience_s
        self._is_used = False
        self._given: Any = None
        self._starting: asyncio.Future[Any] | None = None
        self._cluster: Any = None  # distributed's own types leave half of what is used here untyped
        self._client: Any = None
        self._stream: Any = None  # to the scheduler, as long as it is this one
        self._turn = 1
        self._assignment: Assignment | None = None
        self._listener: Listener
        self._addresses: dict[str, str] = {}
        self._heard: dict[str, float] = {}
        self._refused: set[str] = set()  # what has been said of those that are not fit
        self._unfit: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    # What the run asks

    async def connect(self, worker: Worker) -> None:
        """Reach the scheduler, and see that each worker process can run `worker`.

        :raises UsageError: if one can not, the worker can not be named, or another run has this executor.
        :raises NoWorkers: if there is no scheduler, or no worker process.
        """
        if self._is_used:
            raise UsageError("another run has this executor, and one runs one job at a time: make one for each run")
        self._given, self._is_used = _to_give(worker), True
        try:
            await self._connect()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.close()
            raise

    async def _connect(self) -> None:
        await asyncio.to_thread(_import_distributed)
        if self.address is None:
            self._starting = asyncio.ensure_future(asyncio.to_thread(self._start_cluster))
            self._cluster = await asyncio.shield(self._starting)  # a stop leaves none behind: see `close`
        deadline, workers = time.monotonic() + self._patience_s, dict[str, str]()
        while not workers:
            try:
                self._client = self._client or await self._new_client()
                workers = await self._open_relay()
                trouble = f"the scheduler {self._where} had no worker for {self._patience_s:g} s: start some"
            except (OSError, TimeoutError) as error:
                await self._drop_client()
                trouble = f"the scheduler {self._where} can not be reached ({describe(error)}): start it"
            except UsageError:
                raise
            except (TypeError, ValueError) as error:  # what Dask says of an address that it can not use
                raise UsageError(
                    f"the scheduler {self._where} can not be used ({describe(error)}): give its address, such as "
                    "tcp://HOST:8786, or tls://HOST:8786 with security"
                ) from error
            if not workers and time.monotonic() >= deadline:
                raise NoWorkers(f"{trouble}, or check the address, and run the same line again")
            await asyncio.sleep(0 if workers else LOOK_S)
        await self._examine_all(workers)

    def pool(self, work: Work) -> WorkerPool:
        """What runs the worker for one run."""
        return ChunkPool(self, work, self._given, lease_s=self._lease_s, patience_s=self._patience_s)

    async def close(self) -> None:
        """End what still runs on the cluster, and leave it."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        if self._client is not None and self._assignment is not None and self._client.status == "running":
            await self._unseat_all(self._assignment.run)
        await self._drop_client()
        self._assignment = None
        self._addresses, self._heard, self._refused, self._unfit = {}, {}, set(), set()
        starting, self._starting, self._cluster = self._starting, None, None
        try:
            if starting is not None:
                with contextlib.suppress(Exception):
                    await asyncio.to_thread((await starting).close, CLOSES_WITHIN_S)
        finally:
            self._is_used = False

    # What its pool asks

    async def begin(self, assignment: Assignment, listener: Listener) -> None:
        """Seat the run on each worker process that is there, and on each that comes."""
        self._assignment, self._listener = assignment, listener
        self._do(self._stay())

    def send(self, seat: str, message: bytes) -> None:
        """Send bytes to a seat."""
        client, address = self._client, self._addresses.get(seat)
        if client is not None and address is not None and self._assignment is not None:
            with contextlib.suppress(Exception):  # the connection is gone, which `_stay` finds out
                client._send_to_scheduler(
                    {"op": _relay().DOWN, "address": address, "key": seat, "run": self._assignment.run, "data": message}
                )

    # Inside

    def _start_cluster(self) -> Any:
        """Scheduler and processes on this machine, looked after by a loop in a thread of Dask's own."""
        import distributed

        start: Any = distributed.LocalCluster
        with _without_ctrl_c():
            return start(
                n_workers=self._workers or len(os.sched_getaffinity(0)),
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",
                security=self._security,
                silence_logs=logging.CRITICAL,
            )

    async def _new_client(self) -> Any:
        import distributed

        connect: Any = distributed.Client
        address = self.address if self._cluster is None else self._cluster.scheduler_address
        timeout = min(CALL_S, max(LEAST_CONNECT_S, self._patience_s))
        options = {"asynchronous": True, "set_as_default": False, "security": self._security}
        client = connect(address, timeout=timeout, **options)
        try:
            found = await asyncio.wait_for(client, timeout + LEAST_CONNECT_S)  # who accepts and is mute is none
        except BaseException:
            await _close(client)
            raise
        found.subscribe_topic(_relay().TOPIC, self._hear)
        self._stream = found.scheduler_comm
        return found

    async def _open_relay(self) -> dict[str, str]:
        """The workers that are there, by their addresses; from now on we hear of those that come and go."""
        assert self._client is not None
        where = f"the scheduler {self._where}"
        try:
            told = await asyncio.wait_for(
                self._client.run_on_scheduler(_relay().open_relay, self._client.id), timeout=CALL_S
            )
        except (ImportError, AttributeError) as error:
            raise UsageError(_not_installed(where, error)) from error
        _check_facts(where, told)
        found: dict[str, str] = told["workers"]
        return found

    async def _examine_all(self, addresses: Iterable[str]) -> None:
        """All that answer soon, or else the first; who is slow to import the module is examined when it is seated."""
        tasks = [asyncio.ensure_future(self._examine(address)) for address in addresses]
        try:
            done, _ = await asyncio.wait(tasks, timeout=EXAMINES_S)
            if not done:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _examine(self, address: str) -> None:
        where = f"the worker {address}"
        try:
            told = await self._call(address, _relay().examine, pickle.dumps(self._given, 5))
        except Exception as error:
            if _lacks_us(error):
                raise UsageError(_not_installed(where, error)) from error
            logger.warning("%s does not answer (%s)", where, describe(error))  # it is gone, or hangs: others work
            return
        _check_facts(where, told)

    async def _call(self, address: str, function: Any, *args: Any) -> Any:
        assert self._client is not None
        told = await asyncio.wait_for(self._client.run(function, *args, workers=[address]), timeout=CALL_S)
        return told[address]

    async def _stay(self) -> None:
        """Keep the run seated; also when the connection to the scheduler breaks, and there is another one later."""
        while True:
            try:
                if self._client is None:
                    self._client, self._turn = await self._new_client(), self._turn + 1
                for address, key in (await self._open_relay()).items():
                    self._do(self._seat(address, key))
            except UsageError as error:
                self._refuse("", error)
            except Exception as error:  # it breaks, hangs, or ends in a way of Dask's own: see below
                logger.debug("the scheduler %s does not answer (%s)", self._where, describe(error))
            seat_again_at = time.monotonic() + SEAT_AGAIN_S  # who did not answer
            while self._is_connected and time.monotonic() < seat_again_at:  # noqa: ASYNC110  Dask tells nobody
                await asyncio.sleep(LOOK_S)
            if not self._is_connected:
                if self._addresses:
                    logger.warning("the connection to the scheduler is lost")
                for key in list(self._addresses):
                    self._left(key, died=False)  # as far as anyone knows
                await self._drop_client()
                await asyncio.sleep(LOOK_S)

    @property
    def _is_connected(self) -> bool:
        """Dask's client connects again by itself: then the scheduler has told the workers that we are gone."""
        client = self._client
        return client is not None and client.status == "running" and client.scheduler_comm is self._stream

    @property
    def _where(self) -> str:
        return self.address or "of this machine"

    async def _drop_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await _close(client)

    async def _seat(self, address: str, key: str) -> None:
        assert self._assignment is not None
        if self._client is None or key in self._addresses or key in self._unfit:
            return
        self._addresses[key] = address
        try:
            assignment = pickle.dumps(self._assignment, 5)
            told = await self._call(address, _relay().seat, assignment, self._client.id, self._turn)
            _check_facts(f"the worker {address}", told)
        except UsageError as error:
            self._refuse(key, error)
        except Exception as error:
            if _lacks_us(error) and self._is_connected:
                self._refuse(key, UsageError(_not_installed(f"the worker {address}", error)))
            elif self._addresses.pop(key, None) is not None:  # it hangs, or is gone: it is asked again later
                logger.warning("the worker %s does not answer (%s)", address, describe(error))
        else:
            if key in self._addresses:
                self._heard[key] = time.monotonic()
                self._listener.joined(key, address)

    def _refuse(self, key: str, error: UsageError) -> None:
        self._addresses.pop(key, None)
        self._unfit.add(key)
        if str(error) not in self._refused:
            self._refused.add(str(error))
            logger.error("%s; it gets no items", error)

    def _hear(self, event: tuple[float, tuple[Any, ...]]) -> None:
        kind, *told = event[1]
        if self._assignment is None:
            return
        if kind == "told":
            self._heard[told[0]] = time.monotonic()
            self._listener.heard(told[0], told[1])
        elif kind == "came":
            self._do(self._seat(told[0], told[1]))
        elif kind == "went":
            self._left(told[1], died=not told[2])

    def _left(self, key: str, *, died: bool) -> None:
        self._addresses.pop(key, None)
        self._heard.pop(key, None)
        self._listener.left(key, died=died)

    def _do(self, what: Any) -> None:
        task = asyncio.ensure_future(what)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a worker of the cluster could not be seated: %s", describe(error))

    async def _unseat_all(self, run: str) -> None:
        lately = time.monotonic() - min(LATELY_S, self._lease_s)
        there = [
            self._addresses[key] for key, heard in self._heard.items() if heard > lately and key in self._addresses
        ]
        if there:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(
                    self._client.run(_relay().unseat, run, workers=there, on_error="ignore"), CLOSES_WITHIN_S
                )


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Threads and processes that are started in it, and theirs, get no SIGINT.

    A Ctrl-C in a terminal reaches all processes; what is to end then, and when, the run decides.
    """
    resource_tracker.ensure_running()  # where multiprocessing starts it, SIGINT is let in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def _close(client: Any) -> None:
    """Whatever has become of its connection."""
    with contextlib.suppress(Exception), anyio.CancelScope(shield=True):
        await asyncio.wait_for(client.close(timeout=1), 3)
    client.status = "closed"  # or it would try once more when it is collected, and warn


def executor_of(address: str) -> DaskExecutor:
    """The executor that the command line names: ``dask://``, ``dask://HOST:PORT``.

    Options follow a ``?``: ``workers``, ``lease``, ``patience``, and for TLS ``tls_ca``, ``tls_cert``, ``tls_key``.

    :raises UsageError: if it is no such address.
    """
    if "@" in address.partition("?")[0]:
        raise UsageError(f"--executor: {HAS_PASSWORD}")
    try:
        parts = urlsplit(address)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        has_port = parts.port is not None
    except ValueError as error:
        raise UsageError(f"--executor {shorten(address)}: {error}: {WRITE}") from None
    if parts.scheme != "dask" or parts.path not in ("", "/") or (parts.netloc and not has_port):
        raise UsageError(f"--executor {shorten(address)}: {WRITE}")
    query = dict(pairs)
    if twice := sorted({name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1}):
        raise UsageError(f"--executor {shorten(address)}: {', '.join(twice)} more than once: give it once")
    tls = {TLS[name]: query.pop(name) for name in list(query) if name in TLS}
    numbers: dict[str, Any] = {}
    for name, option, kind in OPTIONS:
        if name in query:
            try:
                numbers[option] = kind(query.pop(name))
            except ValueError:
                raise UsageError(f"--executor {shorten(address)}: {name} must be a number") from None
    if query:
        known = ", ".join([*(name for name, _, _ in OPTIONS), *TLS])
        raise UsageError(f"--executor {shorten(address)}: there is no option {', '.join(query)}; there are {known}")
    security = _security(tls) if tls and _is_installed() else None
    scheme = "tls" if tls else "tcp"
    return DaskExecutor(f"{scheme}://{parts.netloc}" if parts.netloc else None, security=security, **numbers)


def _security(tls: dict[str, str]) -> Security:
    """:raises UsageError: if these files are none that a connection can be made with."""
    if not {"tls_ca_file", "tls_client_cert"} <= set(tls):
        raise UsageError("TLS needs tls_ca and tls_cert, and tls_key if the key is not in the file of the certificate")
    for name, file in tls.items():
        if not Path(file).is_file():
            option = next(option for option, field in TLS.items() if field == name)
            raise UsageError(f"there is no file {shorten(file)}, which {option} names: give the path of a PEM file")
    _import_distributed()
    import distributed

    secure: Any = distributed.Security
    security: Security = secure(require_encryption=True, **tls)
    try:
        security.get_connection_args("client")  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UsageError(f"the files for TLS can not be used ({describe(error)}): give PEM files that fit") from None
    return security


def _to_give(worker: Worker) -> Any:
    """What the processes of a cluster are told of the worker: its name, or a worker of ours as it is."""
    if isinstance(worker, SessionWorker):
        return worker
    name = identity(worker, "named")
    module = name.partition(":")[0]
    found: object = None
    if module != "__main__":
        with contextlib.suppress(UsageError):
            found = load(name)
    if found is not worker:
        why = "lies in the program itself" if module == "__main__" else "is not what that name stands for"
        raise UsageError(
            f"the worker {name} {why}: processes of a cluster import it by its name. Write it as a function of a module"
        )
    return name


def _check_facts(where: str, told: dict[str, str]) -> None:
    """:raises UsageError: if a process of the cluster is not fit for the run."""
    ours = _relay().facts()
    for what, named in (("python", "Python"), ("version", "async-recovery")):
        if told[what] != ours[what]:
            raise UsageError(f"{where} has {named} {told[what]}, and this is {named} {ours[what]}: make them the same")
    if "trouble" in told:
        raise UsageError(f"{where} can not run the worker: {told['trouble']}")


def _lacks_us(error: Exception) -> bool:
    """Whether it says that this package is missing, or another, at the other end; Dask tells some errors as text."""
    return isinstance(error, ImportError | AttributeError) or "async_recovery" in str(error)


def _not_installed(where: str, error: Exception) -> str:
    return f"{where} can not work for us ({describe(error)}): install async-recovery[dask]=={__version__} there"


def _relay() -> Any:
    from . import dask_relay

    return dask_relay


def _is_installed() -> bool:
    try:
        return find_spec("distributed") is not None
    except ValueError:  # somebody has put None in its place
        return False


def _import_distributed() -> None:
    """Import it, and leave the user's logging as it was: it adds handlers to it."""
    with _logging_left_alone():
        import distributed  # noqa: F401

        from . import dask_relay  # noqa: F401


@contextlib.contextmanager
def _logging_left_alone() -> Iterator[None]:
    names = ("distributed", "distributed.client", "distributed.gc", "bokeh", "tornado", "tornado.application")
    before = {name: _setting(logging.getLogger(name)) for name in names}
    is_new = "distributed" not in sys.modules
    yield
    if is_new:
        for name, (handlers, level, propagate) in before.items():
            changed = logging.getLogger(name)
            changed.handlers[:], changed.propagate = handlers, propagate
            # What matters of it is said in our words; who wants all of it sets a level, before or after.
            changed.setLevel(logging.CRITICAL if level == logging.NOTSET and "." not in name else level)


def _setting(found: logging.Logger) -> tuple[list[logging.Handler], int, bool]:
    return list(found.handlers), found.level, found.propagate
