"""Ways to be cancelled wrongly, each of which the sweeps of cancellations have to notice, and one in which it shows."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple
from unittest import mock

from async_recovery import engine
from async_recovery.engine import Run
from async_recovery.file_ledger import FileLedger
from async_recovery.files import WriterThread


class Mutant(NamedTuple):
    """A defect.

    :ivar patch: makes it.
    :ivar shows: place, way and kind of moments in which it shows, and `says` what the violation has to say.
    """

    patch: Callable[[], AbstractContextManager[Any]]
    shows: tuple[str, str, str]
    says: str


def instead(*patches: tuple[Any, str, Any]) -> Callable[[], AbstractContextManager[Any]]:
    """`broken` in the place of `owner.name`, for each of these."""

    def patched() -> ExitStack:
        stack = ExitStack()
        for owner, name, broken in patches:
            stack.enter_context(mock.patch.object(owner, name, broken))
            # the tests have imported it by its name, too
            if owner is engine:
                for module in ("tests.proof.cancellations", "tests.test_engine"):
                    stack.enter_context(mock.patch(f"{module}.{name}", broken))
        return stack

    return patched


async def does_not_absorb(self: WriterThread, job: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(job, *args))


async def does_not_join(self: FileLedger) -> None:
    if not self._closed:
        self._closed = True
        self._close()
        self._thread.stop()


async def swallows(run: Run) -> Any:
    try:
        return await _to_its_end(run)
    except asyncio.CancelledError:
        return None


async def raises_another(run: Run) -> Any:
    cancelled = False
    try:
        return await _to_its_end(run)
    except asyncio.CancelledError:
        cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    return None


async def miscounts(run: Run) -> Any:
    try:
        return await _to_its_end(run)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        raise


async def does_not_wait(run: Run) -> Any:
    task = asyncio.ensure_future(run.main())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        run.stop()
        raise


async def waits_once(run: Run) -> Any:
    task = asyncio.ensure_future(run.main())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        run.stop()
        await asyncio.wait({task})
        raise


async def persists_once(self: Run) -> None:
    if self not in _persisted:
        _persisted.append(self)
        await _persist(self)


_to_its_end, _persist, _persisted = engine.to_its_end, Run._persist, list[Run]()

MUTANTS = {
    "the writer thread is left alone": Mutant(
        instead((WriterThread, "run", does_not_absorb)), ("file", "tear-down", "operation"), "was not seen within"
    ),
    "the lock goes before the thread has ended": Mutant(
        instead((WriterThread, "run", does_not_absorb), (FileLedger, "close", does_not_join)),
        ("file", "tear-down", "operation"),
        "came while the lock was not held",
    ),
    "the cancellation is swallowed": Mutant(
        instead((engine, "to_its_end", swallows)), ("memory", "own task", "round"), "cancelling() is 1"
    ),
    "another CancelledError is raised": Mutant(
        instead((engine, "to_its_end", raises_another)), ("memory", "scope", "round"), "CancelledError"
    ),
    "the cancellation is counted off": Mutant(
        instead((engine, "to_its_end", miscounts)), ("memory", "own task", "round"), "cancelling() is 0"
    ),
    "a cancelled call returns while its run goes on": Mutant(
        instead((engine, "to_its_end", does_not_wait)), ("file", "native", "round"), "it outlives its scope"
    ),
    "the second cancellation breaks the wait": Mutant(
        instead((engine, "to_its_end", waits_once)), ("file", "native, twice", "round"), "it outlives its scope"
    ),
    "a loop that is torn down loses what has finished": Mutant(
        instead((Run, "_persist", persists_once)), ("memory", "tear-down", "round"), "are not committed"
    ),
}
