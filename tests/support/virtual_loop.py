"""An event loop on a clock of its own: when nothing can run, it is at once the time of the next timer.

Threads are real: while a job of an executor runs, the loop waits for it and its clock stands still. When there is
nothing to run, no timer and no thread, the program under test hangs for ever: that is an error here.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

REAL_PATIENCE_S = 1.0


class Hang(BaseException):
    """Nothing can ever run again, and the main task is not done."""


class _Selector(selectors.SelectSelector):
    """Waits only for threads; otherwise it moves the loop's clock on."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        loop = self._loop
        if loop.jobs or timeout == 0:
            return super().select(timeout if timeout == 0 else None)
        if timeout is None:  # a thread that the loop does not know of may still have something to say
            ready = super().select(REAL_PATIENCE_S)
            if not ready:
                raise Hang
            return ready
        loop.now += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop.

    :ivar now: its time in seconds.
    :ivar jobs: of threads, under way.
    :ivar hops: jobs that were handed to threads so far.
    :ivar on_step: called before each round of callbacks with the number of the round.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.jobs = 0
        self.hops = 0
        self.steps = 0
        self.on_step: Callable[[int], None] | None = None
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        future = super().run_in_executor(executor, func, *args)
        self.jobs += 1
        self.hops += 1
        future.add_done_callback(self._job_done)
        return future

    def _job_done(self, _: object) -> None:
        self.jobs -= 1

    def _run_once(self) -> None:
        self.steps += 1
        if self.on_step is not None:
            self.on_step(self.steps)
        super()._run_once()  # type: ignore[misc]


def run_virtual(main: Coroutine[Any, Any, T], on_step: Callable[[int], None] | None = None) -> T:
    """Run `main` to its end on a new virtual loop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        loop.on_step = on_step
        return runner.run(main)


def at_round(step: int, action: Callable[[], object], again_after: int | None = None) -> None:
    """Do something at the given round of the running loop, counted from now."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    rounds = {loop.steps + step} | ({loop.steps + step + again_after} if again_after else set())

    def on_step(number: int) -> None:
        if number in rounds:
            action()

    loop.on_step = on_step
