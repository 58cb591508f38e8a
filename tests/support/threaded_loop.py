"""Whole runs, files and threads included, on the virtual clock: while any thread works, time stands still."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio.to_thread
import pytest

from .virtual_loop import VirtualLoop

T = TypeVar("T")


class ThreadedLoop(VirtualLoop):
    """A virtual loop that also knows of the thread that shuts down the default executor."""

    async def shutdown_default_executor(self, *args: Any) -> None:
        self.jobs += 1
        try:
            await super().shutdown_default_executor(*args)
        finally:
            self.jobs -= 1


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end on a new loop."""
    in_thread = anyio.to_thread.run_sync

    async def counted(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ThreadedLoop)
        loop.jobs += 1
        loop.hops += 1
        try:
            return await in_thread(work, *args, **options)
        finally:
            loop.jobs -= 1

    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=ThreadedLoop) as runner:
        patch.setattr(anyio.to_thread, "run_sync", counted)
        return runner.run(main)
