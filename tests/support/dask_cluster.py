"""A real cluster of Dask: a scheduler and workers as processes of their own, on ports that nobody else has.

It is loaded by the tests of the cluster alone: whatever else is tested does without `distributed`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .commands import children_of

POLL_S = 0.02
STARTS_WITHIN_S = 60.0
CONFIG = {
    "DASK_DISTRIBUTED__WORKER__DAEMON": "False",
    "DASK_DISTRIBUTED__ADMIN__LOG_FORMAT": "%(name)s %(message)s",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class DaskCluster:
    """The processes. What still runs when the `with` ends is killed.

    :param folder: where the workers run.
    :param python_path: where they find modules; None: there too.
    :param nanny: each worker has a process beside it that starts it anew when it dies.
    :param options: more words for scheduler and workers.
    :ivar address: of the scheduler.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nanny: bool = False,
        options: tuple[str, ...] = (),
        scheme: str = "tcp",
        python_path: Path | None = None,
    ) -> None:
        self.folder, self._nanny, self._options = folder, nanny, options
        self._python_path = python_path or folder
        self._port = free_port()
        self.address = f"{scheme}://127.0.0.1:{self._port}"
        self.executor = f"dask://127.0.0.1:{self._port}"
        self.scheduler: subprocess.Popen[bytes]
        self.workers: list[subprocess.Popen[bytes]] = []
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> DaskCluster:
        log = self.folder / "worker.log"
        self._said_before = log.stat().st_size if log.exists() else 0
        self.start_scheduler()
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._started:
            process.wait()

    def start_scheduler(self) -> None:
        """The scheduler; another one at the same address when that has died."""
        words = ["--host", self.address.rpartition(":")[0], "--port", str(self._port), "--no-dashboard", "--no-show"]
        words += ["--dashboard-address", "127.0.0.1:0"]  # its HTTP server is there all the same
        self.scheduler = self._start("scheduler", *words)

    def start_worker(self, *, python_path: Path | None = None, named: str = "") -> subprocess.Popen[bytes]:
        """One more worker, of one thread.

        :param python_path: where it finds modules, instead of in the folder.
        :param named: what its environment has as ``NAMED``.
        """
        words = [self.address, "--nthreads", "1", "--no-dashboard", "--local-directory", str(self.folder)]
        words += ["--nanny" if self._nanny else "--no-nanny", "--death-timeout", "20"]
        worker = self._start("worker", *words, python_path=python_path, named=named)
        self.workers.append(worker)
        return worker

    def start_workers(self, count: int) -> None:
        """So many more."""
        for _ in range(count):
            self.start_worker()

    def wait_for_workers(self) -> None:
        """Until the scheduler knows all that have been started."""
        log = self.folder / "worker.log"
        wait_for(lambda: log.read_bytes()[self._said_before :].count(b"Registered") == len(self.workers))

    def worker_pids(self) -> list[int]:
        """The processes that run items: with nannies, their children."""
        living = [worker.pid for worker in self.workers if worker.poll() is None]
        return [child for pid in living for child in _children(pid)] if self._nanny else living

    def _start(
        self, what: str, *words: str, python_path: Path | None = None, named: str = ""
    ) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{what}.log").open("ab")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{what}", *words, *self._options],
                cwd=python_path or self.folder,
                env={**os.environ, **CONFIG, "PYTHONPATH": str(python_path or self._python_path), "NAMED": named},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process


def _children(pid: int) -> list[int]:
    """Those that run items, and not the one that only keeps an eye on them."""
    return [child for child in children_of(pid) if b"spawn_main" in _command_of(child)]


def _command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@contextlib.contextmanager
def running_cluster(folder: Path, workers: int = 2, *, nanny: bool = False) -> Iterator[DaskCluster]:
    """A scheduler, and workers that will be there when it is."""
    with DaskCluster(folder, nanny=nanny) as cluster:
        cluster.start_workers(workers)
        yield cluster


def wait_for(look: Callable[[], bool], within_s: float = STARTS_WITHIN_S) -> None:
    """Look again and again until that is so."""
    deadline = time.monotonic() + within_s
    while not look():
        assert time.monotonic() < deadline, f"that was not seen within {within_s} s"
        time.sleep(POLL_S)
