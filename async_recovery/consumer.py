"""Records on their way to an application that takes them itself, in batches and in the order of the items.

The mark of such a run is what the application has acknowledged. What has finished beyond it is remembered in the
journal like all that is ahead, so that it is not run again; the batch that was out at a crash comes again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping

BATCH_RECORDS = 1_000
BATCH_BYTES = 4 << 20


class Consumer:
    """What lies between the collector and the application.

    :ivar taken: every record below it is acknowledged.
    :ivar is_gone: the application takes no more.
    """

    def __init__(self) -> None:
        self.taken = self._released = 0
        self.is_gone = False
        self._written: set[int] = set()
        self._ready: deque[bytes] = deque()
        self._out: list[bytes] = []
        self._acknowledged: list[bytes] = []
        self._changed = asyncio.Event()

    def restore(self, mark: int, ahead: Iterable[int]) -> None:
        """Go on from what an earlier run left.

        :param mark: what the application had acknowledged.
        :param ahead: the indices at or above it whose records the journal has.
        """
        self.taken = self._released = mark
        self._written = set(ahead)

    def release(self, records: list[bytes], ahead: Mapping[int, bytes]) -> dict[int, bytes]:
        """The mark of the run has passed `records`, and `ahead` has finished beyond it.

        :returns: all of that which the journal does not have yet, by ascending index.
        """
        first, self._released = self._released, self._released + len(records)
        news = {index: record for index, record in enumerate(records, first) if index not in self._written}
        self._written.difference_update(range(first, self._released))
        self._written.update(ahead)
        self._ready.extend(records)
        return {**news, **ahead}

    def acknowledged(self) -> list[bytes]:
        """The records that the application has acknowledged since this was last called."""
        records, self._acknowledged = self._acknowledged, []
        return records

    def acknowledge(self) -> bool:
        """The application is done with the batch that it has.

        :returns: whether there was one.
        """
        self.taken += len(self._out)
        self._acknowledged += self._out
        had_one, self._out = bool(self._out), []
        return had_one

    def next_batch(self) -> list[bytes]:
        """The records that follow, as far as they are there: at most 1,000, and 4 MiB or a single one."""
        size = 0
        while self._ready and len(self._out) < BATCH_RECORDS:
            size += len(self._ready[0])
            if self._out and size > BATCH_BYTES:
                break
            self._out.append(self._ready.popleft())
        return self._out

    def wake(self, _: object = None) -> None:
        """Something has changed for whoever waits for a batch."""
        self._changed.set()

    async def changed(self) -> None:
        """Wait for `wake`."""
        self._changed.clear()
        await self._changed.wait()
