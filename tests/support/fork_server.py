"""Runs of the command line in forks of one process that has imported it: the same command, started in a millisecond.

A run can be told to kill itself with SIGKILL at a given step, which is any call of `async_recovery.files.Files`: just
before it, in the middle of it (a write of which only half arrives), or just after it. Or functions prepare the fork
for what it is to go through, such as a fault below Python (`tests/proof/shim.py`).

As a script it is the server: it reads one request a line from standard input, runs it in a fork, and answers with one.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import os
import pkgutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

MODULE = "tests.support.fork_server"
PROJECT = Path(__file__).parents[2]
LONGEST_RUN_S = 120
LEFT_OUT = {"async_recovery.__main__", "async_recovery.http_worker"}  # one runs, the other brings what no fork needs

Preparation = tuple[str, list[str]]
"""``module:function`` and its arguments. It is called with the descriptor of the report, then these."""


class Request(msgspec.Struct):
    """One run.

    :ivar kill_at: the number of the step, from 0 on, at which it kills itself; None: never.
    :ivar when: ``"before"``, ``"middle"`` or ``"after"``.
    :ivar preparations: what is called in the fork before the run; if there are any, it is they who report the steps.
    :ivar stdin: the file that is its standard input.
    """

    folder: str
    words: list[str]
    kill_at: int | None = None
    when: str = "before"
    preparations: list[Preparation] = []
    stdin: str = os.devnull


class Reply(msgspec.Struct):
    """How it ended.

    :ivar code: exit code, or minus the signal.
    :ivar steps: the operations that it began, in order; the last one is the one at which it was killed. With
        preparations: the lines that they wrote into the report.
    """

    code: int
    out: str
    err: str
    steps: list[str]


class ForkServer:
    """The client: one server process for as long as the `with` lasts.

    :param env: what the server's environment has besides.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._env = env or {}

    def __enter__(self) -> ForkServer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **self._env},
        )
        return self

    def __exit__(self, *error: object) -> None:
        with self._process as process:
            process.kill()

    def run(
        self,
        folder: Path,
        *words: str,
        kill_at: int | None = None,
        when: str = "before",
        preparations: Sequence[Preparation] = (),
        stdin: str | Path = os.devnull,
    ) -> Reply:
        """Run the command with these words in `folder`."""
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None
        assert replies is not None
        request = Request(str(folder), list(words), kill_at, when, list(preparations), str(stdin))
        requests.write(msgspec.json.encode(request) + b"\n")
        requests.flush()
        return msgspec.json.decode(replies.readline(), type=Reply)


def serve() -> None:
    """The server."""
    preload()
    for line in sys.stdin.buffer:
        request = msgspec.json.decode(line, type=Request)
        prepare = [(function_named(name), words) for name, words in request.preparations]
        with TemporaryStreams() as streams:
            child = os.fork()
            if child == 0:
                _run(request, prepare, streams.take())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out, err, report = streams.texts()
            reply = Reply(status, out, err, report.splitlines())
        sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
        sys.stdout.buffer.flush()


def import_package() -> None:
    """Import what the package itself imports late: each fork would do it again, for most of its time."""
    import async_recovery

    for module in pkgutil.iter_modules(async_recovery.__path__, "async_recovery."):
        if module.name not in LEFT_OUT:
            importlib.import_module(module.name)


def preload() -> None:
    """Import all that a run needs before the first fork, what its first loop imports too."""
    import anyio

    import_package()
    anyio.run(anyio.sleep, 0)
    gc.freeze()


def function_named(name: str) -> Callable[..., object]:
    """What a preparation names."""
    module, _, function = name.partition(":")
    found: Callable[..., object] = getattr(importlib.import_module(module), function)
    return found


class TemporaryStreams:
    """Three unnamed files: a fork takes them as its standard output, its standard error, and for its report."""

    def __enter__(self) -> TemporaryStreams:
        self._descriptors = [os.memfd_create(name) for name in ("out", "err", "report")]
        for descriptor in self._descriptors:  # two threads may write at once, and only this puts one after the other
            fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    def take(self) -> int:
        """In the fork; returns the descriptor of the report."""
        out, err, report = self._descriptors
        os.dup2(out, 1)
        os.dup2(err, 2)
        return report

    def texts(self) -> list[str]:
        sizes = [os.fstat(descriptor).st_size for descriptor in self._descriptors]
        return [
            os.pread(descriptor, size, 0).decode() for descriptor, size in zip(self._descriptors, sizes, strict=True)
        ]


def _run(request: Request, prepare: list[tuple[Callable[..., object], list[str]]], report: int) -> None:
    """In the fork: does not return."""
    signal.alarm(LONGEST_RUN_S)  # one that hangs is ended, and its code says so
    os.chdir(request.folder)
    os.dup2(os.open(request.stdin, os.O_RDONLY), 0)
    for function, words in prepare:
        function(report, *words)
    if not prepare:
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
