"""The ordered collector: takes records in any order, releases them in order, and knows when a commit is due.

Plain synchronous code: between reading and changing its state nothing else can run.
"""

from __future__ import annotations

from collections.abc import Mapping

from .watermark import Watermark


class Collector:
    """Holds every record from the moment it is made until it is durable in the output.

    :param watermark: which items are finished; its values are their records.
    :param batch_items: a commit is due when this many items have finished since the last.
    :param batch_bytes: or when their records have this many bytes.

    :ivar held: bytes of the records held: ahead, waiting to be written, being written.
    :ivar fresh: items finished since the last commit was taken.
    """

    __slots__ = (
        "_batch_bytes",
        "_batch_items",
        "_before",
        "_due_at",
        "_fresh_ahead",
        "fresh",
        "held",
        "watermark",
    )

    def __init__(self, watermark: Watermark[bytes], *, batch_items: int, batch_bytes: int) -> None:
        self.watermark = watermark
        self.held = sum(map(len, watermark.ahead.values()))
        self.fresh = 0
        self._before = 0
        self._due_at = self.held + batch_bytes  # what `held` is when so many bytes have finished
        self._fresh_ahead: list[int] = []
        self._batch_items = batch_items
        self._batch_bytes = batch_bytes

    @property
    def executed(self) -> int:
        """Items finished by this process."""
        return self._before + self.fresh

    @property
    def pending(self) -> bool:
        """Whether a commit would write anything new."""
        return self.fresh > 0 or self.watermark.mark > self.watermark.durable

    def complete(self, index: int, record: bytes) -> bool:
        """The item at `index` is finished.

        :returns: whether a commit is due.
        :raises ValueError: if that index is not in flight; nothing has changed.
        """
        if self.watermark.complete(index, record):
            self._fresh_ahead.append(index)
        self.held = held = self.held + len(record)
        self.fresh = fresh = self.fresh + 1
        return fresh >= self._batch_items or held >= self._due_at

    def take(self) -> tuple[list[bytes], Mapping[int, bytes]]:
        """What the next commit writes, taken out of the collector in one step.

        :returns: the records that the mark has passed, in order; and those that finished ahead of it since the
            last time and still are, by ascending index.
        """
        watermark = self.watermark
        records, watermark.released = watermark.released, []
        fresh_ahead = sorted(index for index in self._fresh_ahead if index >= watermark.mark)
        self._before += self.fresh
        self.fresh = 0
        self._due_at = self.held + self._batch_bytes
        self._fresh_ahead = []
        return records, {index: watermark.ahead[index] for index in fresh_ahead}

    def acknowledge(self, mark: int, records: list[bytes]) -> None:
        """The commit that took `records` up to `mark` is durable: they are held no longer."""
        self.watermark.commit(mark)
        written = sum(map(len, records))
        self.held -= written
        self._due_at -= written
