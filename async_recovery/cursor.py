"""The shared cursor: workers pull (index, item) from it, with no queue between.

It holds the pages from the mark to the frontier: what lies beyond the frontier is handed out; what lies before it
tells, at a commit, where the source stands for the mark. Taking is synchronous; a worker waits only while there is no
page, or the window or the buffer is full.
"""

from __future__ import annotations

import asyncio
import struct
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any
from zlib import crc32

from .checkpoint import JSON, Ahead, Bookmark
from .collector import Collector
from .contracts import Page, Source
from .errors import InputChanged

JOINED_ITEMS = 512


class _Span:
    """What of a page outlives its items: its position and the items' CRCs."""

    __slots__ = ("crcs", "end", "first", "position")

    def __init__(self, position: JSON, first: int, crcs: Sequence[int]) -> None:
        self.position = position
        self.first = first
        self.crcs = array("I", crcs)
        self.end = first + len(crcs)


class Cursor:
    """Hands out the items of the pages that are added to it.

    :param collector: its watermark says which index comes next; it knows how many bytes are held.
    :param bookmark: where the pages begin, and what the items from there to the mark were.
    :param ahead: what an earlier run finished ahead of the mark: its items are compared when they come by.
    :param max_buffer_bytes: while this many bytes of records are held, only gaps go out, and the item at the mark if
        nothing below it waits to be written.
    :param low_water: another page is wanted while no more items than this are ready.
    :param full: called when a worker has to wait because the window or the buffer is full.

    :ivar wanted: set while another page is wanted.
    :ivar gated: how many workers wait because the window or the buffer is full.
    :ivar exhausted: the source has no more pages.
    """

    def __init__(
        self,
        collector: Collector,
        bookmark: Bookmark,
        ahead: Iterable[Ahead],
        *,
        max_buffer_bytes: int,
        low_water: int,
        full: Callable[[], None],
    ) -> None:
        self._collector = collector
        self._watermark = collector.watermark
        self._base = Bookmark(bookmark.position, bookmark.first_index, 0)
        self._upto = self._next_index = self._first = self._stop = bookmark.first_index
        self._expected_crc = bookmark.items_crc
        self._skipped_crc = 0
        self._ahead = deque(sorted((item.index, item.item_crc) for item in ahead))
        self._last_gap = self._ahead[-1][0] if self._ahead else -1
        for index, _ in reversed(self._ahead):
            if index == self._last_gap:
                self._last_gap -= 1
        self._max_buffer_bytes = max_buffer_bytes
        self._low_water = low_water
        self._full = full
        self._spans: deque[_Span] = deque()
        self._ready: deque[tuple[int, Sequence[Any]]] = deque()
        self._ready_items = 0
        self._held_back: tuple[int, Sequence[Any]] | None = None
        self._items: Sequence[Any] = ()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._stopped = False
        self.wanted = asyncio.Event()
        self.wanted.set()
        self.gated = 0
        self.exhausted = False

    def take(self) -> tuple[int, Any] | None:
        """The next index and its item; None if there is none to hand out at this moment."""
        while self._collector.held < self._max_buffer_bytes or self._goes_out_anyway:
            index = self._watermark.take(self._stop)
            if index is not None:
                return index, self._items[index - self._first]
            if self._stopped or self._watermark.frontier < self._stop or not self._ready:
                return None
            self._turn_page()
        return None

    async def changed(self) -> None:
        """Wait until something may be handed out that could not be before, or `wake` is called."""
        gated = self._is_full
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self.gated += gated
        if gated:
            self._full()
        try:
            await future
        finally:
            self.gated -= gated

    @property
    def waited_for(self) -> bool:
        """Whether a worker waits."""
        return bool(self._waiting)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    @property
    def finished(self) -> bool:
        """Nothing will be handed out any more."""
        return self._stopped or (self.exhausted and self._used_up)

    @property
    def total_items(self) -> int:
        """How many items the source has given so far, those of earlier runs included."""
        return self._next_index

    def stop(self) -> None:
        """Hand out nothing more, whatever the source still gives; and ask it for nothing more."""
        self._stopped = True
        self._stop = 0
        self.wanted.clear()
        self.wake()

    def wake(self, count: int | None = None) -> None:
        """Let `count` waiting workers, or all, look again."""
        waiting = self._waiting
        for _ in range(len(waiting) if count is None else min(count, len(waiting))):
            future = waiting.popleft()
            if not future.done():
                future.set_result(None)

    def add(self, page: Page) -> None:
        """The next page of the source. Items that an earlier run finished are compared, not handed out.

        While one of them is still to come, a page of a source with positions waits for the next one: should the
        source end with it, it is shorter than it was, and its last item may be a part of what was there (half a line).
        That must not be done as an item.

        :raises InputChanged: if one of them is not what it was then.
        """
        first = self._next_index
        self._next_index = end = first + len(page.items)
        self._compare_finished(first, end, page.crcs)
        last = self._spans[-1] if self._spans else None
        if page.position is None and last is not None and last.end - last.first < JOINED_ITEMS:
            last.crcs.extend(page.crcs)
            last.end = end
        else:
            self._spans.append(_Span(page.position, first, page.crcs))
        if end <= self._watermark.durable:  # and not the mark, which a bookmark for a consumer lies behind
            self._advance(end)
        elif page.items:
            self._let_go_of_page()
            self._held_back = (first, page.items)
            if not self._ahead or page.position is None:
                self._let_go_of_page()

    def end(self) -> None:
        """The source has no more pages.

        :raises InputChanged: if it ends before what an earlier run finished.
        """
        furthest = self._ahead[-1][0] if self._ahead else self._watermark.mark - 1
        if self._next_index <= furthest:
            raise _changed(f"it has {self._next_index} items now, the item at index {furthest} was finished")
        self._let_go_of_page()
        self.exhausted = True
        self.wake()

    def bookmark(self, mark: int) -> Bookmark:
        """Where the source stands for `mark`, which never goes back."""
        self._advance(mark)
        return self._base

    def item_crcs(self, indices: Iterable[int]) -> Iterator[int]:
        """CRC-32 of the raw items at `indices`, which ascend, between the last bookmark's mark and the frontier."""
        spans = iter(self._spans)
        first, end, crcs = 0, 0, array("I")
        for index in indices:
            while index >= end:
                span = next(spans)
                first, end, crcs = span.first, span.end, span.crcs
            yield crcs[index - first]

    @property
    def skipping(self) -> bool:
        """Whether the pages have not reached the mark yet: nothing is handed out before they have."""
        return self._next_index < self._watermark.mark

    @property
    def _goes_out_anyway(self) -> bool:
        """Whether the next item goes out however much is held: it fills a gap, or no commit can write any of that."""
        watermark = self._watermark
        return watermark.frontier <= self._last_gap or watermark.frontier == watermark.mark == watermark.durable

    @property
    def _used_up(self) -> bool:
        return self._watermark.frontier >= self._stop and not self._ready

    @property
    def _is_full(self) -> bool:
        """Whether the window or the buffer keeps the next item back."""
        if self._used_up:
            return False
        held_back = self._collector.held >= self._max_buffer_bytes and not self._goes_out_anyway
        return held_back or self._watermark.is_full

    def read_so_far(self, share_of: Callable[[JSON], float | None]) -> tuple[float, int] | None:
        """Share of the source before the last page that was read, and how many items that is.

        None if `share_of` does not tell it of positions, or no item lies before that page.
        """
        last = self._spans[-1] if self._spans else None
        if last is None or not last.first:
            return None
        share = share_of(last.position)
        return None if share is None else (share, last.first)

    def _let_go_of_page(self) -> None:
        page, self._held_back = self._held_back, None
        if page is not None:
            items = len(page[1])
            self._ready.append(page)
            self._ready_items += items
            if self._ready_items > self._low_water:
                self.wanted.clear()
            self.wake(items)

    def _turn_page(self) -> None:
        self._first, self._items = self._ready.popleft()
        if self._watermark.frontier < self._first:  # items would go out under the index of others
            raise RuntimeError(f"the page of index {self._first} comes before index {self._watermark.frontier} is out")
        self._stop = self._first + len(self._items)
        self._ready_items -= len(self._items)
        if self._ready_items <= self._low_water:
            self.wanted.set()

    def _compare_finished(self, first: int, end: int, crcs: Sequence[int]) -> None:
        mark = self._watermark.mark
        if first < mark:
            self._skipped_crc = _crc_of(crcs[: mark - first], self._skipped_crc)
            if end >= mark and self._skipped_crc != self._expected_crc:
                raise _changed(f"the items from index {self._base.first_index} to {mark} are not those that were done")
        while self._ahead and self._ahead[0][0] < end:
            index, crc = self._ahead.popleft()
            if crcs[index - first] != crc:
                raise _changed(f"the item at index {index}, which was finished ahead of the others, is another now")

    def _advance(self, mark: int) -> None:
        """Move the base to the last page that begins at or before `mark`, and its CRC on to `mark`."""
        spans = self._spans
        while len(spans) > 1 and spans[1].first <= mark:
            if spans[1].position is None:
                self._chain(spans[0].end)
            else:
                self._base, self._upto = Bookmark(spans[1].position, spans[1].first, 0), spans[1].first
            spans.popleft()
        if spans and self._upto == self._base.first_index == spans[0].first and spans[0].position is not None:
            self._base = Bookmark(spans[0].position, spans[0].first, 0)
        self._chain(mark)

    def _chain(self, upto: int) -> None:
        if upto > self._upto:
            span, base = self._spans[0], self._base
            crc = _crc_of(span.crcs[self._upto - span.first : upto - span.first], base.items_crc)
            self._base, self._upto = Bookmark(base.position, base.first_index, crc), upto


async def compare(source: Source, bookmark: Bookmark, cursor: Cursor, furthest: int) -> None:
    """Let the pages of `source` go by, until the item at `furthest` and one more have, or the source ends.

    :raises InputChanged: if one of them is not what it was, or there are fewer.
    """
    pages = source.pages(bookmark.position)
    try:
        async for page in pages:
            cursor.add(page)
            if cursor.total_items > furthest + 1:
                return
        cursor.end()
    finally:
        await aclose(pages)


async def aclose(pages: AsyncIterator[Page]) -> None:
    """Close an iterator that can be closed."""
    close = getattr(pages, "aclose", None)
    if close is not None:
        await close()


def _crc_of(crcs: Sequence[int], start: int) -> int:
    return crc32(struct.pack(f"<{len(crcs)}I", *crcs), start)


def _changed(found: str) -> InputChanged:
    return InputChanged(
        f"the input has changed: {found}. Restore it to resume, or start anew with --fresh (fresh=True)"
    )
