"""The contract of a `Source`, one suite for every implementation: a new source needs a `Case` here, and no tests."""

from __future__ import annotations

import gzip
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple, cast
from zlib import crc32

import msgspec
import pytest

from async_recovery import sources
from async_recovery.compressed import zstd
from async_recovery.contracts import Page, Source
from async_recovery.errors import InputChanged, UsageError
from async_recovery.failures import FailuresSource
from async_recovery.prefix_crc import PrefixCrc
from async_recovery.sources import CsvSource, IterableSource, JsonLinesSource, TextSource

BOM = b"\xef\xbb\xbf"


class Case(NamedTuple):
    """One implementation over one input.

    `make` gives a source over the same items each time; `data` are the bytes of its file, if it reads one, which lie
    there compressed if `suffix` says so.
    """

    make: Callable[[Path], Source]
    data: bytes | None = None
    suffix: str = ""


async def _async_numbers() -> AsyncIterator[int]:
    for number in range(70):
        yield number


FAILURES = b"".join(
    b'{"index":%d,"error":{"type":"E","message":"m"},"item":[%d]}\n' % (n, n) if n % 3 else b'{"index":%d}\n' % n
    for n in range(7)
)

CASES: dict[str, Case] = {
    "text": Case(TextSource, b"".join(b" line %d \n" % n for n in range(12)) + b"\n\nlast"),
    "text, CRLF and byte order mark": Case(TextSource, BOM + b"".join(b"line %d\r\n" % n for n in range(12))),
    "text, nothing": Case(TextSource, b""),
    "jsonl": Case(JsonLinesSource, b"".join(b'{"n":%d}\n\n' % n for n in range(12)) + b"[1]"),
    "csv": Case(CsvSource, b"a,b\n" + b"".join(b"%d,x\n" % n for n in range(20)) + b"20,y"),
    "csv, quoted line ends": Case(CsvSource, BOM + b'"a\n",b\r\n' + b"".join(b'%d,"x\ny"\r\n' % n for n in range(9))),
    "tsv": Case(lambda path: CsvSource(path, "\t"), b"a\tb\n" + b"".join(b"%d\t,\n" % n for n in range(20))),
    "text, gzip": Case(TextSource, b"".join(b" line %d \n" % n for n in range(12)) + b"\n\nlast", ".gz"),
    "text, zstd, nothing": Case(TextSource, b"", ".zst"),
    "jsonl, zstd": Case(JsonLinesSource, b"".join(b'{"n":%d}\n\n' % n for n in range(12)) + b"[1]", ".zst"),
    "csv, gzip": Case(CsvSource, BOM + b'"a\n",b\r\n' + b"".join(b'%d,"x\ny"\r\n' % n for n in range(9)), ".gz"),
    "failures": Case(FailuresSource, FAILURES),
    "list": Case(lambda _: IterableSource(list(range(600)))),
    "generator": Case(lambda _: IterableSource(n * n for n in range(150))),
    "async generator": Case(lambda _: IterableSource(_async_numbers())),
    "objects by key": Case(lambda _: IterableSource([object, str], key=lambda kind: kind.__name__)),
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd().compress}
FILES = [name for name, case in CASES.items() if case.data is not None]
GROWING = [name for name in FILES if name != "failures"]  # a finished output does not grow

every_source = pytest.mark.parametrize("name", CASES)
every_file = pytest.mark.parametrize("name", FILES)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes so small that the inputs above have many pages, and a beginning, a middle and an end to compare."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 32)
    monkeypatch.setattr(sources, "PAGE_BYTES", 16)
    monkeypatch.setattr(sources, "COMPARED_BYTES", 8)


@pytest.fixture
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    case = getattr(request.node, "callspec", None)
    return tmp_path / f"input{CASES[case.params['name']].suffix if case else ''}"


def source_of(name: str, path: Path) -> Source:
    case = CASES[name]
    if case.data is not None and not path.exists():
        put(path, case.data)
    return case.make(path)


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


@every_source
def test_it_says_what_it_is(name: str, path: Path) -> None:
    """A source has a kind of one word, and a path if it lies somewhere."""
    source = source_of(name, path)
    assert isinstance(source, Source)
    assert source.kind
    assert source.kind.split() == [source.kind]
    assert source.path == (str(path) if name in FILES else None)


@every_source
@pytest.mark.usefixtures("small")
async def test_pages_are_repeatable(name: str, path: Path) -> None:
    """Reading again gives the same pages, with one CRC-32 for each item."""
    pages = await pages_of(source_of(name, path))
    assert await pages_of(source_of(name, path)) == pages
    assert all(0 <= crc < 1 << 32 for page in pages for crc in page.crcs)


@every_source
@pytest.mark.usefixtures("small")
async def test_every_position_resumes(name: str, path: Path) -> None:
    """From a page's position come exactly the items of that page and all after it; None is the beginning."""
    pages = await pages_of(source_of(name, path))
    for number, page in enumerate(pages):
        if page.position is not None:
            resumed = await pages_of(source_of(name, path), page.position)
            assert flat(resumed) == flat(pages[number:])
            assert resumed[0].position == page.position
    assert flat(await pages_of(source_of(name, path), None)) == flat(pages)


@every_source
@pytest.mark.usefixtures("small")
async def test_either_all_pages_have_positions_or_none(name: str, path: Path) -> None:
    """A source with positions ends with an empty page, whose position is the end."""
    pages = await pages_of(source_of(name, path))
    if name in FILES:
        assert all(page.position is not None for page in pages)
        assert pages[-1].items == []
        assert len(pages) > 4 or not CASES[name].data
        assert flat(await pages_of(source_of(name, path), pages[-1].position)) == []
    else:
        assert all(page.position is None for page in pages)


@every_source
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.usefixtures("small")
async def test_an_unchanged_source_passes_at_every_position(name: str, path: Path, *, whole: bool) -> None:
    """`check` accepts what has not changed, at each position, with a new source and with the one that was read."""
    source = source_of(name, path)
    pages = await pages_of(source)
    for position in [None, *(page.position for page in pages)]:
        await source.check(position, whole=whole)
        await source_of(name, path).check(position, whole=whole)


@every_source
@pytest.mark.usefixtures("small")
async def test_the_share_goes_from_0_to_1(name: str, path: Path) -> None:
    """`share` is None, or a number from 0 to 1 that never falls from page to page."""
    source = source_of(name, path)
    pages = await pages_of(source)
    shares = [source.share(position) for position in [None, *(page.position for page in pages)]]
    if any(share is None for share in shares):
        assert set(shares) == {None}
    else:
        assert shares == sorted(cast("list[float]", shares))
        assert (shares[0], shares[-1]) == (0.0, 1.0)
    source_of(name, path).share(pages[-1].position if pages else None)  # before it has read anything: no error


@every_file
@pytest.mark.parametrize("whole", [True, False])
async def test_a_missing_source_is_a_usage_error(name: str, path: Path, *, whole: bool) -> None:
    """`check` without a position sees that the source is there."""
    source = CASES[name].make(path)
    with pytest.raises(UsageError, match="there is no input file"):
        await source.check(None, whole=whole)


def put(path: Path, data: bytes) -> None:
    """The data as the content of the file: compressed, where its name says so, in two streams, one after the other."""
    compress = COMPRESS.get(path.suffix, bytes)
    middle = len(data) // 2
    path.write_bytes(compress(data[:middle]) + compress(data[middle:]))


def contents(name: str) -> bytes:
    data = CASES[name].data
    assert data is not None
    return data


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :]


@every_file
@pytest.mark.usefixtures("small")
async def test_a_changed_byte_before_the_position_is_refused(name: str, path: Path) -> None:
    """Any byte with `whole`; without, at least those of the first and the last stretch before the position."""
    source = source_of(name, path)
    data = contents(name)
    for page in await pages_of(source):
        offset = page.position.get("offset", 0)
        for at in range(offset):
            put(path, flipped(data, at))
            with pytest.raises(InputChanged, match=r"has changed (before the point|since the retry) .* --fresh"):
                await source.check(page.position, whole=True)
            if at < 8 or at >= offset - 8:
                with pytest.raises(InputChanged, match=r"has changed (before the point|since the retry) .* --fresh"):
                    await source.check(page.position, whole=False)


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.usefixtures("small")
async def test_what_lies_at_or_after_the_position_may_change(name: str, path: Path, *, whole: bool) -> None:
    """`check` looks at nothing but what was done: what comes after a line end may change, go or grow."""
    source = source_of(name, path)
    data = contents(name)
    for page in await pages_of(source):
        offset = page.position.get("offset", 0)
        if data[:offset].endswith(b"\n") or not offset:
            for others in (b"", b"others\n", data[offset:] + b"more\n"):
                put(path, data[:offset] + others)
                await source.check(page.position, whole=whole)


@every_file
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.usefixtures("small")
async def test_a_source_shorter_than_the_position_is_refused(name: str, path: Path, *, whole: bool) -> None:
    """A file of fewer bytes than were done is `InputChanged`, whatever is left of it."""
    source = source_of(name, path)
    data = contents(name)
    for page in await pages_of(source):
        offset = page.position.get("offset", 0)
        for left in {0, offset // 2, offset - 1} if offset else ():
            put(path, data[:left])
            with pytest.raises(InputChanged, match=f"it has {left} bytes, {offset} of them were done"):
                await source.check(page.position, whole=whole)


async def test_a_position_after_half_a_line_holds_until_that_line_goes_on(path: Path) -> None:
    """At an end without a line end: the same end, or a line end there, is fine; more of that line is not."""
    for kind, half in ((TextSource, b"1\n2"), (JsonLinesSource, b"1\n2"), (CsvSource, b"a\n1\n2")):
        put(path, half)
        source = kind(path)
        end = (await pages_of(source))[-1].position
        for more in (b"", b"\n", b"\r\n", b"\n3\n", b"\r\n3"):
            put(path, half + more)
            await source.check(end, whole=False)
            assert len(flat(await pages_of(source, end))) == more.count(b"3")
        for more in (b"o", b"o\n", b" \n", b"\rx\n", b"\r"):
            put(path, half + more)
            with pytest.raises(InputChanged, match=f"the line that ended at byte {len(half)} goes on now"):
                await source.check(end, whole=False)


async def test_with_the_real_sizes_64_kib_at_both_ends_are_compared_at_once(path: Path) -> None:
    """In a file of 400 KiB: the first 64 KiB and the 64 KiB before the position at once; all of it with `whole`."""
    dice = random.Random(2)
    data = b"".join(b"%x\n" % dice.getrandbits(320) for _ in range(5_000))
    put(path, data)
    source = TextSource(path)
    for page in await pages_of(source):
        offset, grain = page.position.get("offset", 0), 64 << 10
        ends = {0, grain // 2, grain - 1, max(offset - grain, 0), offset - grain // 2, offset - 1}
        for at in ends if offset > grain else ():
            put(path, flipped(data, at))
            with pytest.raises(InputChanged):
                await source.check(page.position, whole=False)
        for at in (offset // 2, offset // 3) if offset else ():
            put(path, flipped(data, at))
            with pytest.raises(InputChanged):
                await source.check(page.position, whole=True)


def test_the_points_of_a_running_crc_are_right_however_the_bytes_arrive() -> None:
    """`head` and `tail` of a `PrefixCrc` are points of the stream, a tail at least one grain back, for all pieces."""
    data = bytes(range(256))
    for piece in (1, 3, 8, 13, 100, 256):
        running = PrefixCrc(16)
        for start in range(0, len(data), piece):
            running.update(data[start : start + piece])
            offset = min(start + piece, len(data))
            assert (running.offset, running.value) == (offset, crc32(data[:offset]))
            assert running.tail[1] == crc32(data[: running.tail[0]])
            assert running.tail[0] <= max(0, offset - 16)
            assert offset - running.tail[0] <= 32 + 16
            assert running.head == ((16, crc32(data[:16])) if offset >= 16 else None)
            again = PrefixCrc(16, running.offset, running.value, running.tail, running.head)
            again.update(data[offset:])
            assert again.value == crc32(data)


def one_by_one(items: list[Any]) -> Iterator[Any]:
    yield from items


async def test_the_crc_of_an_item_is_the_same_from_every_kind_of_iterable() -> None:
    """A job that was started with a list is resumed with a generator of the same items."""
    items = [1, "two", {"three": [3.5, None]}, ["four"]]

    async def async_items() -> AsyncIterator[Any]:
        for item in items:
            yield item

    listed = flat(await pages_of(IterableSource(items)))
    assert flat(await pages_of(IterableSource(one_by_one(items)))) == listed
    assert flat(await pages_of(IterableSource(async_items()))) == listed
