"""The service as a process of its own, and a client that asks it one thing after the other."""

from __future__ import annotations

import http.client
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec

from .commands import Ended, Folder, end_of, kill, wait_until

ENDED = ("complete", "failed", "cancelled")


class Answer(NamedTuple):
    """The answer to a request, its headers by their names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """What the body says."""
        return msgspec.json.decode(self.body)


class Served:
    """`async-recovery serve` in a folder, on a port of its own that stays the same over restarts.

    :param words: options besides ``--data`` and ``--listen``.
    :ivar process: the one that serves now.
    """

    process: subprocess.Popen[str]

    def __init__(self, folder: Folder, *words: str, data: str = "data", env: Mapping[str, str] | None = None) -> None:
        self._folder, self._words, self._data, self._env = folder, words, data, env
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        words = ("serve", "--data", self._data, "--listen", f"127.0.0.1:{self.port}", *self._words)
        log = (self._folder / "serve.log").open("a")
        begin = log.tell()
        with log:
            self.process = self._folder.start(*words, stdout=log, stderr=log, env=self._env)
        self.port = int(wait_until(lambda: _port_in(self.log[begin:]), self.process))

    @property
    def log(self) -> str:
        """What all its processes have said."""
        return (self._folder / "serve.log").read_text()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}/"

    def path_of(self, path: str) -> str:
        """Where a path of the service is on the server."""
        return path

    def kill(self) -> None:
        """SIGKILL."""
        kill(self.process)

    def stop(self, number: int = signal.SIGTERM) -> Ended:
        """A signal, and what came of it."""
        self.process.send_signal(number)
        return end_of(self.process)

    def ask(
        self,
        method: str,
        path: str,
        json: object = None,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request on a connection of its own."""
        sent = dict(headers or {})
        if json is not None:
            body, sent["Content-Type"] = msgspec.json.encode(json), "application/json"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, self.path_of(path), body, sent)
            response = connection.getresponse()
            return Answer(
                response.status, {name.lower(): text for name, text in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def submit(self, worker: str, items: object, **options: Any) -> str:
        """The id of a new job: `items` is the input, or a list of items."""
        given = items if isinstance(items, dict) else {"items": items}
        answer = self.ask("POST", "/jobs", {"worker": worker, "input": given, "options": options})
        assert answer.status == 201, answer
        return str(answer.json["id"])

    def job(self, job: str) -> Any:
        """A job as it is told."""
        answer = self.ask("GET", f"/jobs/{job}")
        assert answer.status == 200, answer
        return answer.json

    def when(self, job: str, *states: str) -> Any:
        """The job, once it is in one of these states."""
        return wait_until(lambda: found if (found := self.job(job))["state"] in states else None, self.process)

    def output(self, job: str) -> bytes:
        """The output, as far as it is committed."""
        answer = self.ask("GET", f"/jobs/{job}/output")
        assert answer.status == 200, answer
        return answer.body

    @contextmanager
    def events(self, job: str, last_id: str | None = None) -> Iterator[Iterator[tuple[str, str, Any]]]:
        """The events of a job as they come: id, kind, data."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            headers = {} if last_id is None else {"Last-Event-ID": last_id}
            connection.request("GET", self.path_of(f"/jobs/{job}/events"), headers=headers)
            response = connection.getresponse()
            assert response.status == 200
            yield _events_in(response)
        finally:
            connection.close()


def _port_in(log: str) -> str:
    return log.partition(" at http://127.0.0.1:")[2].partition("/")[0]


def _events_in(response: http.client.HTTPResponse) -> Iterator[tuple[str, str, Any]]:
    found: dict[str, str] = {}
    while line := response.readline():
        name, _, value = line.decode().rstrip("\r\n").partition(": ")
        if name and value:
            found[name] = value
        elif not name and "data" in found:
            yield found["id"], found["event"], msgspec.json.decode(found["data"])
            found = {}
