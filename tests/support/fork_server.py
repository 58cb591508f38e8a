"""Runs of the command line in forks of one process that has imported it: the same command, started in a millisecond.

A run can be told to kill itself with SIGKILL at a given step, which is any call of `async_recovery.files.Files`: just
before it, in the middle of it (a write of which only half arrives), or just after it.

As a script it is the server: it reads one request a line from standard input, runs it in a fork, and answers with one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import msgspec

MODULE = "tests.support.fork_server"
PROJECT = Path(__file__).parents[2]


class Request(msgspec.Struct):
    """One run.

    :ivar kill_at: the number of the step, from 0 on, at which it kills itself; None: never.
    :ivar when: ``"before"``, ``"middle"`` or ``"after"``.
    """

    folder: str
    words: list[str]
    kill_at: int | None = None
    when: str = "before"


class Reply(msgspec.Struct):
    """How it ended.

    :ivar code: exit code, or minus the signal.
    :ivar steps: the operations that it began, in order; the last one is the one at which it was killed.
    """

    code: int
    out: str
    err: str
    steps: list[str]


class ForkServer:
    """The client: one server process for as long as the `with` lasts."""

    def __enter__(self) -> ForkServer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        return self

    def __exit__(self, *error: object) -> None:
        with self._process as process:
            process.kill()

    def run(self, folder: Path, *words: str, kill_at: int | None = None, when: str = "before") -> Reply:
        """Run the command with these words in `folder`."""
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None
        assert replies is not None
        requests.write(msgspec.json.encode(Request(str(folder), list(words), kill_at, when)) + b"\n")
        requests.flush()
        return msgspec.json.decode(replies.readline(), type=Reply)


def serve() -> None:
    """The server."""
    preload()
    for line in sys.stdin.buffer:
        request = msgspec.json.decode(line, type=Request)
        read_end, write_end = os.pipe()
        with open(read_end, "rb") as steps, TemporaryStreams() as streams:  # noqa: PTH123
            child = os.fork()
            if child == 0:
                streams.take()
                _run(request, write_end)
            os.close(write_end)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out, err = streams.texts()
            reply = Reply(status, out, err, steps.read().decode().split())
        sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
        sys.stdout.buffer.flush()


def preload() -> None:
    """Import all that a run needs, anyio's backend too, before the first fork: it starts in a tenth of the time."""
    import anyio._backends._asyncio  # noqa: F401

    import async_recovery.cli  # noqa: F401


class TemporaryStreams:
    """Two unnamed files that a fork takes as its standard output and error."""

    def __enter__(self) -> TemporaryStreams:
        self._descriptors = [os.memfd_create("out"), os.memfd_create("err")]
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    def take(self) -> None:
        for number, descriptor in enumerate(self._descriptors, start=1):
            os.dup2(descriptor, number)

    def texts(self) -> list[str]:
        return [os.pread(descriptor, 1 << 20, 0).decode() for descriptor in self._descriptors]


def _run(request: Request, report: int) -> None:
    """In the fork: does not return."""
    _watch_steps(request.kill_at, request.when, report)
    become(request.folder, request.words)


def become(folder: str, words: list[str]) -> NoReturn:
    """In a fork: be the command with these words, as `python -m async_recovery` is, and end as it does."""
    from async_recovery import __main__, cli

    try:
        os.chdir(folder)
        sys.argv = [__main__.__file__, *words]
        cli.main()
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)


def _watch_steps(kill_at: int | None, when: str, report: int) -> None:
    from async_recovery.files import Files

    calls = iter(range(1 << 30))

    def wrap(name: str) -> None:
        operation = getattr(Files, name)

        def step(self: Files, *arguments: Any, **named: Any) -> Any:
            mine = next(calls) == kill_at
            os.write(report, name.encode() + b"\n")
            if mine and when == "middle" and name == "pwrite":
                descriptor, data, offset = arguments
                operation(self, descriptor, data[: len(data) // 2], offset)
            if mine and when != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return operation(self, *arguments, **named)
            finally:
                if mine:
                    os.kill(os.getpid(), signal.SIGKILL)

        setattr(Files, name, step)

    for name in [name for name in vars(Files) if not name.startswith("_")]:
        wrap(name)


if __name__ == "__main__":
    serve()
