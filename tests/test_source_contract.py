"""The contract of a `Source`, one suite for every implementation: a new source needs a `Case` here, and no tests."""

from __future__ import annotations

import gzip
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import pytest

from async_recovery import sources
from async_recovery.compressed import zstd
from async_recovery.contracts import Source
from async_recovery.errors import InputChanged
from async_recovery.failures import FailuresSource
from async_recovery.prefix_crc import PrefixCrc
from async_recovery.sources import CsvSource, IterableSource, JsonLinesSource, LinesSource, TextSource
from async_recovery.testing import SourceContract
from async_recovery.testing.source_contract import flat, pages_of

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
    "lines": Case(LinesSource, b"".join(b" line %d \n\n" % n for n in range(12)) + b"  "),
    "lines, gzip": Case(LinesSource, BOM + b"".join(b" line %d \r\n\n" % n for n in range(12)), ".gz"),
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
GROWTH = {"csv": b"\n21,z\n", "csv, quoted line ends": b"9,z\r\n", "tsv": b"20\tz\n", "csv, gzip": b"9,z\r\n"}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd().compress}
FILES = [name for name, case in CASES.items() if case.data is not None]
GROWING = [name for name in FILES if name != "failures"]  # a finished output does not grow

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


class TestEverySource(SourceContract):
    """The suite over each case, with sizes so small that there are many pages."""

    @pytest.fixture(autouse=True, params=CASES)
    def _case(self, request: pytest.FixtureRequest, tmp_path: Path, small: None) -> None:
        self.name: str = request.param
        self.path = tmp_path / f"input{CASES[self.name].suffix}"
        self.has_positions = self.can_be_missing = self.name in FILES
        self.can_change = bool(CASES[self.name].data)
        self.can_grow = self.name in GROWING

    def make(self) -> Source:
        return source_of(self.name, self.path)

    def change(self) -> None:
        data = contents(self.name)
        put(self.path, flipped(data, 0))

    def grow(self) -> None:
        put(self.path, contents(self.name) + GROWTH.get(self.name, b"\n[2]\n"))

    def remove(self) -> None:
        self.path.unlink()

    def test_it_says_where_it_lies(self) -> None:
        """What reads a file has its path, and nothing else has one."""
        assert self.make().path == (str(self.path) if self.name in FILES else None)


@pytest.mark.parametrize("more", [b"\nthree\n", b"\r\nthree\n"])
async def test_half_a_line_that_is_ended_later_is_one_item(tmp_path: Path, more: bytes) -> None:
    """Where blank lines are items, a line end that is added to the last line makes no item."""
    path = tmp_path / "input"
    path.write_bytes(b"one\ntwo")
    end = (await pages_of(LinesSource(path)))[-1].position
    path.write_bytes(b"one\ntwo" + more)
    assert [item for item, _ in flat(await pages_of(LinesSource(path), end))] == ["three"]


@every_file
@pytest.mark.usefixtures("small")
async def test_the_small_sizes_make_many_pages(name: str, path: Path) -> None:
    """The control of the suite: a file that is not empty has a beginning, a middle and an end."""
    assert len(await pages_of(source_of(name, path))) > 4 or not CASES[name].data


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
