"""The worker: what the user wrote, made into one form; and the built-in ones.

A worker is ``async def worker(item) -> result``, or a plain ``def``, which runs in a thread.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import shlex
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import anyio
import anyio.to_thread

from .errors import UsageError, describe, shorten

Worker = Callable[[Any], Any]
AsyncWorker = Callable[[Any], Awaitable[Any]]


async def text(item: Any) -> dict[str, Any]:
    """The sample worker, and the command line's default: what the original script said of a line.

    :returns: ``original``, ``length`` in characters, ``word_count`` of words between white space, ``uppercase``.
    """
    line = item if isinstance(item, str) else str(item)
    return {"original": line, "length": len(line), "word_count": len(line.split()), "uppercase": line.upper()}


class Session(ABC):
    """A worker of ours for the length of one run, with all that it holds open."""

    @abstractmethod
    async def __call__(self, item: Any) -> Any:
        """The worker."""

    @abstractmethod
    async def aclose(self) -> None:
        """Give up what is held, and end what still runs."""


class SessionWorker(ABC):
    """A worker of ours that holds something open while a run lasts: a process, connections.

    :ivar name: of the worker in the job's identity, in plain words.
    """

    name: str

    @abstractmethod
    def begin(self) -> Session:
        """What one run works with. Nothing is opened before its first item."""

    async def __call__(self, item: Any) -> Any:
        """For one item alone."""
        session = self.begin()
        try:
            return await session(item)
        finally:
            await session.aclose()


BUILT_IN: dict[str, Worker] = {"text": text}


def identity(worker: Worker, version: str | None) -> str:
    """The worker's name in the job's identity: ``module:qualname``, partials unwrapped.

    :raises UsageError: if it has no name of its own (a lambda) and there is no version to tell it from others.
    """
    while isinstance(worker, functools.partial):
        worker = worker.func
    if isinstance(worker, SessionWorker):
        return worker.name
    named = worker if hasattr(worker, "__qualname__") else type(worker)
    if named.__qualname__.endswith("<lambda>") and version is None:
        raise UsageError(
            "the worker is a lambda, which has no name to know it by: give it one, or give version= (--job-version)"
        )
    return f"{named.__module__}:{named.__qualname__}"


def words_for(name: str) -> tuple[str, ...]:
    """The words of a command line that give the worker of that name, as far as a name tells."""
    kind, _, rest = name.partition(" ")
    if kind in ("exec", "shell") and rest:
        return (f"--{kind}", "COMMAND")
    return ("--worker", *(shlex.split(name) if kind == "http" else (name,)))


def is_async(worker: Worker) -> bool:
    """Whether calling the worker gives an awaitable: an ``async def``, or an object whose ``__call__`` is one."""
    while isinstance(worker, functools.partial):
        worker = worker.func
    return inspect.iscoroutinefunction(worker) or inspect.iscoroutinefunction(getattr(worker, "__call__", None))  # noqa: B004


def as_async(worker: Worker, begun: Callable[[asyncio.AbstractEventLoop], object]) -> AsyncWorker:
    """The worker in its asynchronous form. A plain function runs in threads, as many as there are calls.

    :param begun: called with the loop, in its thread, when a plain function begins; for others it is not.
    """
    if is_async(worker):
        return worker
    limiter = anyio.CapacityLimiter(inf)

    def call(item: Any, loop: asyncio.AbstractEventLoop) -> Any:
        begun(loop)
        return worker(item)

    async def in_thread(item: Any) -> Any:
        loop = asyncio.get_running_loop()
        result = await anyio.to_thread.run_sync(call, item, loop, abandon_on_cancel=True, limiter=limiter)
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise TypeError(
                f"the worker {identity(worker, 'ours')} is a plain function, but returned an awaitable: "
                "write `async def worker(item): return await …`"
            )
        return result

    return in_thread


def _instead_of_file(file: str, function: str) -> str:
    """What to write for a worker whose module was given as a file."""
    from pathlib import Path

    if "/" not in file:
        file = file.lstrip(".")  # a relative module
    module, here = Path(file.removesuffix(".py")).resolve(), Path.cwd()
    if module.is_relative_to(here):
        return f"write {'.'.join(module.relative_to(here).parts)}:{function}"
    return f"run in the folder {module.parent}, where {module.name}.py lies, and write {module.name}:{function}"


def load(name: str) -> Worker:
    """The worker that `name` stands for: a built-in one, or ``module:function``.

    :raises UsageError: if there is none; the message says what is missing.
    """
    if name == "http":
        from .http_worker import HttpWorker  # which may be missing what it needs

        return HttpWorker()
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, separator, path = name.partition(":")
    if not separator or not module_name or not path:
        raise UsageError(
            f"the worker {name!r} is not module:function, nor one of: {', '.join(sorted([*BUILT_IN, 'http']))}"
        )
    if module_name.endswith(".py") or module_name.startswith(".") or "/" in module_name:
        raise UsageError(f"the worker {name!r} names a file, and not its module: {_instead_of_file(module_name, path)}")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        where = "" if missing == module_name else f", which the module {module_name!r} imports"
        raise UsageError(
            f"there is no module {missing!r}{where}: run from the folder it lies in, or install it"
        ) from error
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # a script may leave, even with 0 and nothing done
        raise UsageError(f"the module {module_name!r} can not be imported: {describe(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise UsageError(f"the module {module_name!r} has no {path!r}: check the name of the function")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{name} is {shorten(found)}, not a function: name a function of one item")
    worker: Worker = found
    return worker
