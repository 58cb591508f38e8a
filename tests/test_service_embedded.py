"""The service inside another application: its life with the lifespan of that one, and with the signals of uvicorn."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import msgspec
import pytest
from starlette.types import Message

from async_recovery import UsageError
from async_recovery.service import Service, create_service
from async_recovery.status import read_status

from .support.asgi_calls import Answer, call, piece, scope_of
from .support.commands import Folder, end_of, wait_until
from .support.jobs import LOG, runs_in
from .support.service_process import ENDED, Served

MOUNTED = """
from contextlib import asynccontextmanager

from fastapi import FastAPI

import jobs
from async_recovery.service import create_service

service = create_service("data", {"held": jobs.held_from_3, "quick": jobs.quick})


@asynccontextmanager
async def lifespan(app):
    async with service:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/recovery", service)


@app.get("/mine")
async def mine():
    return "mine"
"""
ALONE = """
import jobs
from async_recovery.service import create_service

app = create_service("data", {"held": jobs.held_from_3, "quick": jobs.quick})
"""


class Embedded(Served):
    """An application of the user's, run by uvicorn's own command."""

    def __init__(self, folder: Folder, app: str, prefix: str) -> None:
        folder.write("app.py", app)
        self._prefix = prefix
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.free_port = free.getsockname()[1]
        super().__init__(folder)

    def start(self) -> None:
        self.port = self.free_port
        log = (self._folder / "serve.log").open("a")
        begin = log.tell()
        words = ("-m", "uvicorn", "app:app", "--port", str(self.port))
        with log:
            self.process = self._folder.start(*words, command=(sys.executable,), stdout=log, stderr=log)
        wait_until(lambda: "Uvicorn running on" in self.log[begin:], self.process)

    def path_of(self, path: str) -> str:
        return self._prefix + path


@pytest.fixture(params=[(MOUNTED, "/recovery"), (ALONE, "")], ids=["in FastAPI", "alone"])
def embedded(request: pytest.FixtureRequest, folder: Folder) -> Embedded:
    return Embedded(folder, *request.param)


def output_of(folder: Folder, job: str) -> str:
    return str(folder / "data" / "jobs" / job / "output.jsonl")


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGINT]], ids=str)
def test_signals_to_uvicorn_do_not_skip_the_drain(embedded: Embedded, folder: Folder, signals: list[int]) -> None:
    """Not even a second one, by which uvicorn leaves out the end of the lifespan; nor a listener that stays."""
    job = embedded.submit("held", [str(n) for n in range(6)], concurrency=6, checkpoint_interval=1000, drain_timeout=60)
    wait_until(lambda: len(runs_in(folder / LOG)) == 6, embedded.process)
    with embedded.events(job) as events:
        next(events)
        for number in signals:
            embedded.process.send_signal(number)
            wait_until(lambda: "Shutting down" in embedded.log, embedded.process)
        if len(signals) == 1:
            folder.write("go", "")
        list(events)
    end_of(embedded.process)
    finished = 6 if len(signals) == 1 else 3
    status = read_status(output_of(folder, job))
    assert (status.state, status.mark) == ("complete" if finished == 6 else "interrupted", finished)
    folder.write("go", "")
    embedded.start()
    assert embedded.when(job, *ENDED)["state"] == "complete"
    assert len(runs_in(folder / LOG)) == 6 + (6 - finished)


def test_the_application_around_it_and_the_service_answer_side_by_side(folder: Folder) -> None:
    """Below its path everything is there: page, files of the page, description, jobs."""
    embedded = Embedded(folder, MOUNTED, "")
    assert embedded.ask("GET", "/mine").json == "mine"
    page = embedded.ask("GET", "/recovery/")
    assert b"assets/page.js" in page.body
    assert b'"/assets' not in page.body, "relative to where it was loaded"
    assert embedded.ask("GET", "/recovery/assets/page.js").status == 200
    made = embedded.ask("POST", "/recovery/jobs", {"worker": "quick", "input": {"items": ["1"]}})
    assert made.headers["location"] == f"/recovery/jobs/{made.json['id']}"
    assert embedded.ask("GET", made.headers["location"]).status == 200
    embedded.stop()


async def ask(service: Service, method: str, path: str, json: object = None) -> Answer:
    body = b"" if json is None else msgspec.json.encode(json)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    pieces = [piece(body)]

    async def receive() -> Message:
        return pieces.pop() if pieces else {"type": "http.disconnect"}

    return await call(service, scope_of(path, method, headers, host=b"localhost"), receive)


async def test_before_its_start_and_after_its_end_it_says_so(tmp_path: Path) -> None:
    """Also when an application has forgotten to start it; and it can start again."""

    async def double(item: int) -> int:
        return 2 * item

    service = create_service(tmp_path / "data", {"double": double})
    job = {"worker": "double", "input": {"items": [1]}}
    assert (await ask(service, "GET", "/readyz")).status == 503
    assert (await ask(service, "GET", "/healthz")).status == 200
    for count in (1, 2):
        async with service:
            assert (await ask(service, "POST", "/jobs", job)).status == 201
            assert len(msgspec.json.decode((await ask(service, "GET", "/jobs")).body)["jobs"]) == count
    assert (await ask(service, "GET", "/jobs")).status == 503


def test_workers_without_a_name_and_bounds_that_can_not_be_are_told_at_once(tmp_path: Path) -> None:
    """Before anything is made."""
    with pytest.raises(UsageError, match="lambda"):
        create_service(tmp_path / "data", {"nameless": lambda item: item})
    with pytest.raises(UsageError, match="max_jobs is 0"):
        create_service(tmp_path / "data", {"str": str}, max_jobs=0)
    assert not (tmp_path / "data").exists()
