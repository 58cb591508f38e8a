"""The contract of a `Source`: the same items from every position each time, or an error that says that they changed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

import msgspec

from ..contracts import Page, Source
from ..errors import InputChanged, UsageError
from .expectations import expect, expect_error, expect_true, on_a_loop


class SourceContract:
    """What every source must hold.

    :cvar has_positions: whether its pages have positions.
    :cvar can_change: whether `change` changes what it reads; `can_grow`: whether `grow` adds to it; `can_be_missing`:
        whether `remove` takes it away.
    """

    has_positions = True
    can_change = False
    can_grow = False
    can_be_missing = False

    @abstractmethod
    def make(self) -> Source:
        """A new source, over the same items each time within a test: best some pages of them."""

    def change(self) -> None:
        """Change the very first item of what it reads."""

    def grow(self) -> None:
        """Add items at the end of what it reads."""

    def remove(self) -> None:
        """Take away what it reads."""

    @on_a_loop
    async def test_it_says_what_it_is(self) -> None:
        """A source has a kind of one word, and a path if it lies somewhere."""
        source = self.make()
        expect_true(isinstance(source, Source), "it has all that a Source has")
        expect(source.kind.split(), [source.kind], "its kind is one word")
        expect_true(isinstance(source.path, str | None), "its path is text, or None")

    @on_a_loop
    async def test_pages_are_repeatable(self) -> None:
        """Reading again gives the same pages, with one CRC-32 for each item, and positions that JSON gives back."""
        pages = await pages_of(self.make())
        expect(await pages_of(self.make()), pages, "the pages, read again")
        for page in pages:
            expect(len(page.crcs), len(page.items), "one CRC for each item")
            expect([crc for crc in page.crcs if not 0 <= crc < 1 << 32], [], "what is no CRC-32")

    @on_a_loop
    async def test_every_position_resumes(self) -> None:
        """From a page's position come exactly the items of that page and all after it; None is the beginning."""
        pages = await pages_of(self.make())
        for number, page in enumerate(pages):
            if page.position is not None:
                resumed = await pages_of(self.make(), page.position)
                expect(flat(resumed), flat(pages[number:]), f"what comes from the position {page.position!r}")
                expect(resumed[0].position, page.position, "the position of the page that it names")
        expect(flat(await pages_of(self.make(), None)), flat(pages), "what comes from the beginning")

    @on_a_loop
    async def test_either_all_pages_have_positions_or_none(self) -> None:
        """A source with positions ends with an empty page, whose position is the end."""
        pages = await pages_of(self.make())
        has = {page.position is not None for page in pages}
        expect(has - {self.has_positions}, set(), "whether pages have positions")
        if self.has_positions:
            expect(list(pages[-1].items), [], "the items of the last page")
            expect(flat(await pages_of(self.make(), pages[-1].position)), [], "what comes from the end")

    @on_a_loop
    async def test_reading_can_end_early(self) -> None:
        """Whoever has read enough closes the pages; the next one gets them from the beginning all the same."""
        everything = flat(await pages_of(self.make()))
        source = self.make()
        async with aclosing(cast("AsyncGenerator[Page, None]", source.pages(None))) as reading:
            async for _ in reading:
                break
        expect(flat(await pages_of(self.make())), everything, "what comes after somebody has read a page")

    @on_a_loop
    async def test_an_unchanged_source_passes_at_every_position(self) -> None:
        """`check` accepts what has not changed, at each position, with a new source and with the one that was read."""
        source = self.make()
        pages = await pages_of(source)
        for position in [None, *(page.position for page in pages)]:
            for whole in (True, False):
                await source.check(position, whole=whole)
                await self.make().check(position, whole=whole)

    @on_a_loop
    async def test_the_share_goes_from_0_to_1(self) -> None:
        """`share` is None, or a number from 0 to 1 that never falls from page to page."""
        source = self.make()
        pages = await pages_of(source)
        shares = [source.share(position) for position in [None, *(page.position for page in pages)]]
        if any(share is None for share in shares):
            expect(set(shares), {None}, "the shares, if one is not known")
        else:
            expect(shares, sorted(cast("list[float]", shares)), "the shares, in order")
            expect((shares[0], shares[-1]), (0.0, 1.0), "the first and the last share")
        self.make().share(pages[-1].position if pages else None)  # before it has read anything: no error

    @on_a_loop
    async def test_a_change_before_the_position_is_refused(self) -> None:
        """An item that is not what it was: `check` of every position behind it raises `InputChanged`."""
        if not self.can_change:
            return
        source = self.make()
        pages = await pages_of(source)
        self.change()
        for number, page in enumerate(pages):
            if flat(pages[:number]):
                with expect_error(InputChanged, f"a change before the position {page.position!r}"):
                    await self.make().check(page.position, whole=True)

    @on_a_loop
    async def test_what_was_added_since_comes_at_the_end(self) -> None:
        """A source that only grew is fine: every position of before holds, and from it come the new items, too."""
        if not self.can_grow:
            return
        pages = await pages_of(self.make())
        self.grow()
        grown = flat(await pages_of(self.make()))
        expect_true(len(grown) > len(flat(pages)), "there are more items than before")
        for number, page in enumerate(pages):
            await self.make().check(page.position, whole=True)
            rest = flat(await pages_of(self.make(), page.position))
            expect(rest, grown[len(flat(pages[:number])) :], f"what comes from the position {page.position!r}")

    @on_a_loop
    async def test_a_missing_source_is_a_usage_error(self) -> None:
        """`check` without a position sees that the source is there."""
        if not self.can_be_missing:
            return
        source = self.make()
        self.remove()
        for whole in (True, False):
            with expect_error(UsageError, "there is no such source"):
                await source.check(None, whole=whole)


async def pages_of(source: Source, position: Any = None) -> list[Page]:
    """The pages, their positions written to JSON and back, as a checkpoint keeps them."""
    pages = []
    async with aclosing(cast("AsyncGenerator[Page, None]", source.pages(position))) as reading:
        async for page in reading:
            position = msgspec.json.decode(msgspec.json.encode(page.position))
            pages.append(Page(position, list(page.items), list(page.crcs)))
    return pages


def flat(pages: list[Page]) -> list[tuple[Any, int]]:
    """Every item with its CRC."""
    return [pair for page in pages for pair in zip(page.items, page.crcs, strict=True)]
