"""What differs between event loops: asyncio's own, and uvloop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


def clock_of(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """The seconds that the loop counts, at this very moment.

    uvloop's own clock has whole milliseconds and stands still within a turn: an attempt would begin before its time.
    """
    return time.monotonic if type(loop).__module__.partition(".")[0] == "uvloop" else loop.time
