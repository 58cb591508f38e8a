"""What runs in the scheduler and in the workers of a Dask cluster; it is sent there by name, never as code.

Bytes go both ways over the connections that are there anyway: client ⇄ scheduler ⇄ worker. They keep their order, and
arrive unless a connection breaks; then the scheduler says so. Nothing of it is a task of Dask, so that nothing is run
again behind the back of the coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import signal
import sys
from typing import Any

from distributed.comm.core import CommClosedError
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.worker import Worker

from . import __version__
from .chunk_host import Background, Host
from .errors import describe
from .workers import load

TOPIC = "async-recovery"
DOWN, UP, MESSAGE = "async-recovery-down", "async-recovery-up", "async-recovery"
IS_THERE, AWAKE_S = "async_recovery_is_there", 0.5
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
LEAVES = {"closing-worker", "close-worker"}  # what Dask logs of a worker that leaves in order
GOODBYE_S = 0.1  # until what has been said is on its way
GONE = {Status.closing, Status.closed, Status.failed}


def facts() -> dict[str, str]:
    """What has to be the same everywhere."""
    return {"python": PYTHON, "version": __version__}


# In the scheduler


class Relay(SchedulerPlugin):
    """Passes bytes on, and tells the clients that use it which workers come and go."""

    name = "async-recovery"

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._clients: dict[str, set[str]] = {}  # and the workers to which each has sent something, by their keys
        self.keys: dict[str, str] = {address: state.server_id for address, state in scheduler.workers.items()}
        self._leaving: set[str] = set()  # the addresses of those that are leaving in order
        scheduler.stream_handlers.update({DOWN: self._down, UP: self._up})
        scheduler.handlers[IS_THERE] = self._is_there
        self._keep_awake()

    def _keep_awake(self) -> None:
        """What is done here are no tasks of Dask, and it would take its cluster for idle."""
        if self._clients:
            self._scheduler.idle_since = None
        asyncio.get_running_loop().call_later(AWAKE_S, self._keep_awake)

    async def _is_there(self, client: str = "", worker: str = "") -> bool:
        """Whether that client is there still, so that the worker may begin to work for it; from then on it is told."""
        if client not in self._clients:
            return False
        self._clients[client].add(self.keys.get(worker, ""))
        return True

    def serve(self, client: str) -> dict[str, str]:
        """Tell that client of all that happens.

        :returns: the workers that are there: their addresses, and what names each among all that ever were.
        """
        self._clients.setdefault(client, set())
        return dict(self.keys)

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Dask calls it."""
        self.keys[worker] = scheduler.workers[worker].server_id
        for client in self._clients:
            self._tell(client, ("came", worker, self.keys[worker]))

    def remove_worker(self, scheduler: Any, worker: str, **_: Any) -> None:
        """Dask calls it."""
        key = self.keys.pop(worker, "")
        for client in self._clients:
            self._tell(client, ("went", worker, key, worker in self._leaving))
        self._leaving.discard(worker)

    def log_event(self, topic: str, msg: Any) -> None:
        """Dask calls it: a worker says that it is closing, or is told to, before it goes."""
        if topic in self.keys and isinstance(msg, dict):
            action = msg.get("action")
            if action in LEAVES or (action == "remove-worker" and msg.get("expected")):
                self._leaving.add(topic)

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Dask calls it: nobody waits for what the workers do for that client."""
        used = self._clients.pop(client, set())
        for address, key in self.keys.items():
            if key in used:  # another one would not know what to do with it, and end
                self._send(address, {"op": MESSAGE, "client": client, "run": "", "data": b""})

    def _down(self, client: str = "", address: str = "", key: str = "", run: str = "", data: bytes = b"") -> None:
        if self.keys.get(address) == key and client in self._clients:
            self._clients[client].add(key)
            self._send(address, {"op": MESSAGE, "client": client, "run": run, "data": data})

    def _up(self, worker: str = "", client: str = "", key: str = "", data: bytes = b"") -> None:
        self._tell(client, ("told", key, data))

    def _send(self, address: str, message: dict[str, Any]) -> None:
        _pass_on(self._scheduler.stream_comms.get(address), message)

    def _tell(self, client: str, what: tuple[Any, ...]) -> None:
        message = {"op": "event", "topic": TOPIC, "event": (0.0, what)}
        _pass_on(self._scheduler.client_comms.get(client), message)


def _pass_on(stream: Any, message: dict[str, Any]) -> None:
    """One end may have gone a moment ago: that must not break the connection that the message came from."""
    if stream is not None:
        with contextlib.suppress(CommClosedError):
            stream.send(message)


def open_relay(client: str, dask_scheduler: Any = None) -> dict[str, Any]:
    """Let the scheduler relay for that client. It stays with the scheduler, which has one for all.

    :returns: the facts of the scheduler, and its workers by their addresses.
    """
    relay = dask_scheduler.plugins.get(Relay.name)
    if relay is None:
        relay = Relay(dask_scheduler)
        dask_scheduler.add_plugin(relay, name=Relay.name)
    return {**facts(), "workers": relay.serve(client)}


# In a worker

_here: list[Background] = []


async def examine(given: bytes) -> dict[str, str]:
    """The facts of this process, and as ``trouble`` why it can not run that worker, if that is so."""
    beside = [worker for worker in Worker._instances if worker.status not in GONE]
    if len(beside) > 1:  # they would share one loop, and the name of the run on it
        why = f"there are {len(beside)} workers of Dask in its process: start each in a process of its own"
        return {**facts(), "trouble": f"{why} (of a LocalCluster: processes=True)"}
    return await asyncio.to_thread(_examined, given)  # a module may take its time


def _examined(given: bytes) -> dict[str, str]:
    found = facts()
    try:
        worker = pickle.loads(given)
        if isinstance(worker, str):
            load(worker)
    except Exception as error:
        found["trouble"] = str(error) or describe(error)
    return found


async def seat(assignment: bytes, client: str, turn: int, dask_worker: Any = None) -> dict[str, str]:
    """Work for a run in this process, until it says that it is over, or is gone. Asked again, it goes on.

    :param turn: counts the connections of that run: who asks by an earlier one is not heard any more.
    :returns: as `examine`.
    """
    told = pickle.loads(assignment)
    found = await examine(pickle.dumps(told.worker, 5))
    if "trouble" in found:
        return found
    key, send, loop = dask_worker.id, dask_worker.batched_send, dask_worker.loop

    def tell(data: bytes) -> None:
        loop.add_callback(pass_on, data)

    def pass_on(data: bytes) -> None:
        if dask_worker.status not in GONE:
            send({"op": UP, "client": client, "key": key, "data": data})

    _say_goodbye(dask_worker)
    dask_worker.stream_handlers[MESSAGE] = _hear
    if not await getattr(dask_worker.scheduler, IS_THERE)(client=client, worker=dask_worker.address):
        return found  # it took us so long that nobody waits for it any more
    background = _background()
    host = Host(told, tell, lambda: dask_worker.status not in GONE)
    await _there(background.begin(host, client, turn))
    return found


def _say_goodbye(dask_worker: Any) -> None:
    """A worker without a nanny that is told to end by a signal ends without a word: let it say one first."""
    before: Any = signal.getsignal(signal.SIGTERM)
    if getattr(before, "__module__", "") != "distributed._signals":
        return  # it ends as one that is killed, or we have been here

    def end(number: int, frame: Any) -> None:
        loop = dask_worker.loop.asyncio_loop
        said = {"action": "closing-worker", "reason": "signal"}
        loop.call_soon_threadsafe(dask_worker.log_event, dask_worker.address, said)
        loop.call_soon_threadsafe(loop.call_later, GOODBYE_S, before, number, frame)

    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, end)


async def unseat(run: str) -> None:
    """Work for that run no longer."""
    await _there(_background().end(run))


def _hear(client: str = "", run: str = "", data: bytes = b"") -> None:
    background = _background()
    if run:
        background.loop.call_soon_threadsafe(background.hear, run, data)
    else:
        asyncio.run_coroutine_threadsafe(background.end_of(client), background.loop)


def _background() -> Background:
    if not _here:
        _here.append(Background())
    return _here[0]


async def _there(what: Any) -> None:
    """Await it on the loop of the background, and nothing but the end of it here."""
    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(what, _background().loop))
