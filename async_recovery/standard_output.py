"""Records on standard output, in the order of the items, each on a line: at least once.

What has been written is acknowledged, and the next start goes on behind it. What was being written when the process
was killed comes again, and the last line of that process may be cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import sys
from typing import Any

from .contracts import RunSummary
from .engine import Run
from .errors import Stopped, StorageFailed, UsageError


def check_standard_output() -> None:
    """:raises UsageError: if it is closed."""
    if sys.stdout is None:
        raise UsageError("standard output is closed: give --output a file")


async def write_records(run: Run) -> RunSummary:
    """The whole run, as `Run.main`, with its records on standard output.

    :raises BrokenPipeError: if nobody reads them any more; what finished is committed, and what was not written comes
        again.
    :raises StorageFailed: if they can not be written for another reason.
    """
    main = asyncio.ensure_future(run.main())
    try:
        while (batch := await run.next_batch(main)) is not None:
            writing = asyncio.get_running_loop().run_in_executor(None, _write, b"\n".join(batch) + b"\n")
            either: set[asyncio.Future[Any]] = {writing, main}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()  # otherwise the run has ended while the reader stands still, and says why
    except OSError as error:
        run.take_no_more()
        with contextlib.suppress(Stopped):
            await main
        if isinstance(error, BrokenPipeError):
            raise
        raise StorageFailed(
            f"standard output can not be written to: {error.strerror}. What finished is saved, and what was not "
            "written comes again: mend that, and run the same line again"
        ) from error
    return main.result()


def _write(data: bytes) -> None:
    rest, descriptor = memoryview(data), sys.stdout.fileno()
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # whoever shares it has made it so
            select.select([], [descriptor], [])
