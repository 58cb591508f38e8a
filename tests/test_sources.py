"""Sources, read in blocks and pages of every size: the same items, CRCs, positions and errors each time."""

from __future__ import annotations

import asyncio
import csv
import io
import logging
import os
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, cast
from zlib import crc32

import aiofiles
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from async_recovery import sources
from async_recovery.contracts import Page, Source
from async_recovery.errors import IncompleteRun, InputChanged, InvalidItem, UsageError
from async_recovery.sources import (
    CsvSource,
    FileSource,
    IterableSource,
    JsonLinesSource,
    LinesSource,
    TextSource,
    as_source,
    file_source,
)

BOM = b"\xef\xbb\xbf"

# (block, page) in bytes: every one far smaller than the inputs below, so that each boundary falls everywhere.
SIZES = [(block, page) for page in (*range(1, 20), 33, 64) for block in (1, 2, 3, 7, 64)]


def set_sizes(monkeypatch: pytest.MonkeyPatch, block: int, page: int) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    monkeypatch.setattr(sources, "PAGE_BYTES", page)


def reading(source: Source, position: Any = None) -> aclosing[AsyncGenerator[Page, None]]:
    """The pages, closed at the end of the block."""
    return aclosing(cast("AsyncGenerator[Page, None]", source.pages(position)))


async def read(source: Source, position: Any = None) -> list[Page]:
    """All pages; positions as they come back from a journal."""
    pages = []
    async with reading(source, position) as given:
        async for page in given:
            pages.append(msgspec.structs.replace(page, position=through_json(page.position)))
    return pages


async def read_until_error(source: Source, position: Any = None) -> tuple[list[Page], Exception | None]:
    """The pages before the first error, and that error."""
    pages: list[Page] = []
    try:
        async with reading(source, position) as given:
            async for page in given:
                pages.append(msgspec.structs.replace(page, position=through_json(page.position)))
    except (InvalidItem, InputChanged, UsageError, IncompleteRun) as error:
        return pages, error
    return pages, None


def through_json(position: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(position))


def items_of(pages: Iterable[Page]) -> list[Any]:
    return [item for page in pages for item in page.items]


def crcs_of(pages: Iterable[Page]) -> list[int]:
    return [crc for page in pages for crc in page.crcs]


TEXT: dict[str, tuple[bytes, list[str], list[bytes]]] = {
    "plain": (b"one\ntwo\nthree\n", ["one", "two", "three"], [b"one", b"two", b"three"]),
    "no line end at the end": (b"one\ntwo", ["one", "two"], [b"one", b"two"]),
    "crlf": (b"one\r\ntwo\r\n\r\nthree", ["one", "two", "three"], [b"one", b"two", b"three"]),
    "carriage return alone ends no line": (b"a\rb\nc\r\r\nd\r", ["a\rb", "c", "d"], [b"a\rb", b"c\r", b"d"]),
    "white space": (b"  a \n\tb c\t\n", ["a", "b c"], [b"  a ", b"\tb c\t"]),
    "blank lines": (b"\n\n a\n \t\n\r\nb\n\n\n", ["a", "b"], [b" a", b"b"]),
    "only blank lines": (b"\n \n\t\r\n\n", [], []),
    "only blanks, no line end": (b"  \n  ", [], []),
    "empty": (b"", [], []),
    "byte order mark": (BOM + b"one\ntwo\n", ["one", "two"], [BOM + b"one", b"two"]),
    "byte order mark before a blank line": (BOM + b"\r\none\n", ["one"], [b"one"]),
    "byte order mark alone": (BOM, [], []),
    "byte order mark in the middle is text": (b"a\n" + BOM + b"b\n", ["a", "\ufeffb"], [b"a", BOM + b"b"]),
    "characters of two, three and four bytes": (
        "é\n\u20ac\u20ac\n\U0001f600x\U0001f600\n".encode(),
        ["é", "€€", "😀x😀"],
        ["é".encode(), "€€".encode(), "😀x😀".encode()],
    ),
    "rare separators end no line": (
        "a\u2028b\x0bc\x85d\n".encode(),
        ["a\u2028b\x0bc\x85d"],
        ["a\u2028b\x0bc\x85d".encode()],
    ),
    "lines of very different length": (
        b"x" * 100 + b"\ny\n" + b"z" * 150 + b"\n",
        ["x" * 100, "y", "z" * 150],
        [b"x" * 100, b"y", b"z" * 150],
    ),
}

LINES: dict[str, tuple[bytes, list[str], list[bytes]]] = {
    "outer blanks": (b" a\n\tb \n\x0b\n", [" a", "\tb ", "\x0b"], [b" a", b"\tb ", b"\x0b"]),
    "empty lines": (b"\n\na\n\n", ["", "", "a", ""], [b"", b"", b"a", b""]),
    "no line end at the end": (b"a\n  ", ["a", "  "], [b"a", b"  "]),
    "crlf": (b"a \r\n\r\n b\r\r\nc\r", ["a ", "", " b\r", "c"], [b"a ", b"", b" b\r", b"c"]),
    "byte order mark": (BOM + b" a\n" + BOM + b"b", [" a", "\ufeffb"], [BOM + b" a", BOM + b"b"]),
    "byte order mark before an empty line": (BOM + b"\n\n", ["", ""], [BOM, b""]),
    "byte order mark alone": (BOM, [], []),
    "empty": (b"", [], []),
    "rare separators end no line": (
        "a\u2028b\x85\nc".encode(),
        ["a\u2028b\x85", "c"],
        ["a\u2028b\x85".encode(), b"c"],
    ),
}

JSON_LINES: dict[str, tuple[bytes, list[Any], list[bytes]]] = {
    "values": (
        b'{"a": 1}\n[2, null]\n"three"\n4.5\ntrue\n',
        [{"a": 1}, [2, None], "three", 4.5, True],
        [b'{"a": 1}', b"[2, null]", b'"three"', b"4.5", b"true"],
    ),
    "crlf, blanks, no line end": (b'\r\n {"a":"\xc3\xa9"} \r\n\n  \n1', [{"a": "é"}, 1], [b' {"a":"\xc3\xa9"} ', b"1"]),
    "byte order mark": (BOM + b"1\n2\n", [1, 2], [BOM + b"1", b"2"]),
    "byte order mark alone": (BOM, [], []),
    "empty": (b"", [], []),
    "only blank lines": (b"\n\r\n \n", [], []),
    "a null is an item": (b"null\n0\n", [None, 0], [b"null", b"0"]),
    "integers of any size": (b"123456789012345678901234567890\n", [123456789012345678901234567890], []),
}

CSV: dict[str, tuple[bytes, list[dict[str, str]], list[bytes]]] = {
    "plain": (b"a,b\n1,2\n3,4\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}], [b"1,2", b"3,4"]),
    "no line end at the end": (b"a,b\n1,2", [{"a": "1", "b": "2"}], [b"1,2"]),
    "crlf": (b"a,b\r\n1,2\r\n\r\n3,4\r\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}], [b"1,2", b"3,4"]),
    "quoted line ends": (
        b'a,b\n"1\n\n1",2\n3,"4\r\n5"\r\n6,7\n',
        [{"a": "1\n\n1", "b": "2"}, {"a": "3", "b": "4\r\n5"}, {"a": "6", "b": "7"}],
        [b'"1\n\n1",2', b'3,"4\r\n5"', b"6,7"],
    ),
    "quotes and commas within quotes": (
        b'a,b\n"say ""hi""","1,2"\n"",x\n',
        [{"a": 'say "hi"', "b": "1,2"}, {"a": "", "b": "x"}],
        [b'"say ""hi""","1,2"', b'"",x'],
    ),
    "a header over two lines": (b'"a\nb",c\n1,2\n', [{"a\nb": "1", "c": "2"}], [b"1,2"]),
    "blank lines everywhere": (b"\n\r\na,b\n\n1,2\n\n", [{"a": "1", "b": "2"}], [b"1,2"]),
    "one column": (b'a\n1\n\n""\n2', [{"a": "1"}, {"a": ""}, {"a": "2"}], [b"1", b'""', b"2"]),
    "byte order mark": (BOM + b"a,b\n1,2\n", [{"a": "1", "b": "2"}], [b"1,2"]),
    "byte order mark and a quoted header": (BOM + b'"a\n",b\r\n1,2\r\n', [{"a\n": "1", "b": "2"}], [b"1,2"]),
    "byte order mark alone": (BOM, [], []),
    "header only": (b"a,b\n", [], []),
    "header only, no line end": (b"a,b", [], []),
    "empty": (b"", [], []),
    "only blank lines": (b"\n\r\n\n", [], []),
    "characters of several bytes": (
        "é,€\n😀,\U0001f600\n".encode(),
        [{"é": "😀", "€": "😀"}],
        ["😀,😀".encode()],
    ),
    "a long quoted field": (
        b'a,b\n1,"' + b"x\n" * 60 + b'"\n2,3\n',
        [{"a": "1", "b": "x\n" * 60}, {"a": "2", "b": "3"}],
        [b'1,"' + b"x\n" * 60 + b'"', b"2,3"],
    ),
}

CASES = [
    *[pytest.param(TextSource, *case, id=f"text: {name}") for name, case in TEXT.items()],
    *[pytest.param(LinesSource, *case, id=f"lines: {name}") for name, case in LINES.items()],
    *[pytest.param(JsonLinesSource, *case, id=f"jsonl: {name}") for name, case in JSON_LINES.items()],
    *[pytest.param(CsvSource, *case, id=f"csv: {name}") for name, case in CSV.items()],
]


@pytest.mark.parametrize(("kind", "data", "items", "raw"), CASES)
async def test_the_items_are_the_same_for_every_block_and_page_size(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[FileSource],
    data: bytes,
    items: list[Any],
    raw: list[bytes],
) -> None:
    """However a file falls into blocks and pages, its items and the CRCs of their raw lines come out in order."""
    path = tmp_path / "input"
    path.write_bytes(data)
    for block, page in [*SIZES, (1 << 20, 64 << 10)]:
        set_sizes(monkeypatch, block, page)
        pages = await read(kind(path))
        assert items_of(pages) == items, (block, page)
        assert all(len(p.items) == len(p.crcs) for p in pages)
        if raw or not items:
            assert crcs_of(pages) == [crc32(line) for line in raw], (block, page)


@pytest.mark.parametrize(("kind", "data", "items", "raw"), CASES)
async def test_a_resume_from_every_page_gives_exactly_the_remaining_items(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[FileSource],
    data: bytes,
    items: list[Any],
    raw: list[bytes],
) -> None:
    """A position, written to JSON and back, re-reads its page and all after it, also with other page sizes."""
    path = tmp_path / "input"
    path.write_bytes(data)
    for block, page in [(1, 1), (2, 3), (64, 5), (7, 16)]:
        for other_block, other_page in [(block, page), (64, 9), (1 << 20, 64 << 10)]:
            set_sizes(monkeypatch, block, page)
            pages = await read(kind(path))
            set_sizes(monkeypatch, other_block, other_page)
            for number, at in enumerate(pages):
                resumed = await read(kind(path), at.position)
                assert resumed[0].position == at.position
                assert items_of(resumed) == items_of(pages[number:])
                assert crcs_of(resumed) == crcs_of(pages[number:])
                end, same_end = resumed[-1].position, pages[-1].position
                assert all(end.get(name) == same_end.get(name) for name in ("offset", "line", "crc"))


async def test_the_last_page_is_empty_and_its_position_is_the_end(tmp_path: Path) -> None:
    """The last page's position is the size of the file, with the CRC-32 of all of it and the line that comes next."""
    path = tmp_path / "input"
    path.write_bytes(b"one\r\n\ntwo\nthree")
    pages = await read(TextSource(path))
    assert pages[-1].items == []
    assert pages[-1].position["offset"] == path.stat().st_size
    assert pages[-1].position["crc"] == crc32(path.read_bytes())
    assert pages[-1].position["line"] == 4


async def test_a_line_of_several_blocks_is_one_item(tmp_path: Path) -> None:
    """With the real sizes, lines of more than 3 MiB between short ones come out whole."""
    path = tmp_path / "input"
    long = "é" * (3 << 19) + "x" * 7
    path.write_text(f"one\n{long}\ntwo\n{long}", encoding="utf-8")
    pages = await read(TextSource(path))
    assert items_of(pages) == ["one", long, "two", long]
    path.write_bytes(b'a,b\n1,"' + b"x\n" * 700_000 + b'"\n2,3')
    limit = csv.field_size_limit()
    assert items_of(await read(CsvSource(path))) == [{"a": "1", "b": "x\n" * 700_000}, {"a": "2", "b": "3"}]
    assert csv.field_size_limit() == limit, "the limit of others is not changed"


async def test_a_line_beyond_the_limit_is_an_error_after_the_items_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item of more than `MAX_ITEM_BYTES` is refused with its line and byte, instead of filling the memory."""
    set_sizes(monkeypatch, 8, 4)
    monkeypatch.setattr(sources, "MAX_ITEM_BYTES", 64)
    path = tmp_path / "input"
    path.write_bytes(b"one\ntwo\n" + b"x" * 60 + b"\n" + b"y" * 500 + b"\n")
    pages, error = await read_until_error(TextSource(path))
    assert items_of(pages) == ["one", "two", "x" * 60]
    assert isinstance(error, InvalidItem)
    assert "line 4: the item that begins at byte 69 has more than" in str(error)
    path.write_bytes(b'a,b\n1,2\n3,"' + b"y\n" * 500)
    pages, error = await read_until_error(CsvSource(path))
    assert items_of(pages) == [{"a": "1", "b": "2"}]
    assert isinstance(error, InvalidItem)
    assert "line 3: the item that begins at byte 8 has more than" in str(error)


# An input that can not be read: class, bytes, items before the error, line, byte, a word of the reason.
INVALID = [
    pytest.param(TextSource, b"one\ntw\xffo\nthree\n", ["one"], 2, 6, "UTF-8", id="text: a byte"),
    pytest.param(TextSource, b"\xff", [], 1, 0, "UTF-8", id="text: the only byte"),
    pytest.param(TextSource, BOM + b"o\xc3\n", [], 1, 4, "UTF-8", id="text: after a byte order mark"),
    pytest.param(TextSource, BOM + b"one\r\n\r\ntwo\xe2\x82\r\n", ["one"], 3, 13, "UTF-8", id="text: CRLF, cut short"),
    pytest.param(TextSource, b"one\n\n  a\xed\xa0\x80b", ["one"], 3, 8, "UTF-8", id="text: a surrogate, no line end"),
    pytest.param(LinesSource, BOM + b" one \r\n\r\n\ntwo\xe2\x82\r\n", [" one ", "", ""], 4, 16, "UTF-8", id="lines"),
    pytest.param(JsonLinesSource, b'1\n\n{"a":}\n2\n', [1], 3, 3, "JSON", id="jsonl: malformed"),
    pytest.param(JsonLinesSource, BOM + b"nope\n", [], 1, 3, "JSON", id="jsonl: first line, byte order mark"),
    pytest.param(JsonLinesSource, b'1\r\n"\xff"\r\n2', [1], 2, 3, "UTF-8|utf-8", id="jsonl: not UTF-8, CRLF"),
    pytest.param(JsonLinesSource, b"1\n2\nNaN", [1, 2], 3, 4, "JSON", id="jsonl: NaN"),
    pytest.param(JsonLinesSource, b"1\n" + b"[" * 90_000 + b"\n", [1], 2, 2, "Recursion", id="jsonl: too deep"),
    pytest.param(CsvSource, b"a,b\n1,2\n3\n", [{"a": "1", "b": "2"}], 3, 8, "1 fields", id="csv: too few fields"),
    pytest.param(CsvSource, b"a,b\n\n1,2,3\n", [], 3, 5, "3 fields", id="csv: too many fields"),
    pytest.param(CsvSource, BOM + b"a,b\r\n1,2,3\r\n", [], 2, 8, "3 fields", id="csv: byte order mark, CRLF"),
    pytest.param(CsvSource, b"a,b,a\n1,2,3\n", [], 1, 0, "same name", id="csv: two columns of one name"),
    pytest.param(CsvSource, BOM + b"a,a\n", [], 1, 3, "same name", id="csv: of one name, byte order mark"),
    pytest.param(
        CsvSource, b'a,b\n"x\ny",2\n1,"2\n3,4\n', [{"a": "x\ny", "b": "2"}], 4, 12, "never closed", id="csv: no quote"
    ),
    pytest.param(CsvSource, b'a,"b', [], 1, 0, "never closed", id="csv: unclosed header, no line end"),
    pytest.param(CsvSource, b'a,b\n1,"2\nx\xffy"\n', [], 3, 10, "UTF-8", id="csv: not UTF-8 within quotes"),
    pytest.param(CsvSource, b"a,b\n1,2\rx\n", [], 2, 4, "CSV", id="csv: a lone carriage return"),
]


@pytest.mark.parametrize(("kind", "data", "before", "line", "byte", "reason"), INVALID)
async def test_a_line_that_can_not_be_read_is_named_after_the_items_before_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[FileSource],
    data: bytes,
    before: list[Any],
    line: int,
    byte: int,
    reason: str,
) -> None:
    """Its file, line and byte are named, for all sizes and after every resume; the items before it are given."""
    path = tmp_path / "input"
    path.write_bytes(data)
    sizes = [(64, 1 << 20)] if len(data) > 10_000 else [*SIZES[::3], (64, 1 << 20)]
    for sizes_now in sizes:
        set_sizes(monkeypatch, *sizes_now)
        pages, error = await read_until_error(kind(path))
        assert items_of(pages) == before, sizes_now
        assert isinstance(error, InvalidItem), sizes_now
        assert f"{path}, line {line}, byte {byte}: " in str(error), sizes_now
        assert any(word in str(error) for word in reason.split("|"))
        for number, at in enumerate(pages):
            rest, again = await read_until_error(kind(path), at.position)
            assert items_of(rest) == items_of(pages[number:])
            assert str(again) == str(error)


async def test_a_record_without_its_closing_quote_waits_for_a_file_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half record at the end of a CSV file that is still being written ends the run before that record."""
    set_sizes(monkeypatch, 8, 4)
    path = tmp_path / "input"
    path.write_bytes(b'a,b\n1,2\n3,"x\ny')
    source = CsvSource(path)
    async with reading(source) as pages:
        first = await anext(pages)
        with path.open("ab") as file:
            file.write(b'z"\n')
        rest = [page async for page in pages]
    assert items_of([first, *rest]) == [{"a": "1", "b": "2"}]
    assert items_of(await read(source, through_json(rest[-1].position))) == [{"a": "3", "b": "x\nyz"}]


async def test_a_half_line_is_an_item_while_the_file_keeps_its_size(tmp_path: Path) -> None:
    """A last line without a line end is an item, and the position after it is the end of the file."""
    path = tmp_path / "input"
    path.write_bytes(b"one\ntw")
    pages = await read(TextSource(path))
    assert items_of(pages) == ["one", "tw"]
    assert pages[-1].position["offset"] == 6


@pytest.mark.parametrize("kind", [TextSource, LinesSource, JsonLinesSource, CsvSource])
async def test_a_half_line_of_a_file_that_has_grown_ends_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[FileSource]
) -> None:
    """Reading ends after the last whole line of what was there at the start, says so, and can go on from there."""
    set_sizes(monkeypatch, 4, 2)
    path = tmp_path / "input"
    path.write_bytes(b"10\n20\n3")
    source = kind(path)
    async with reading(source) as pages:
        read_pages = [await anext(pages)]
        with path.open("ab") as file:
            file.write(b"0\n40\n")
        with caplog.at_level(logging.WARNING, "async_recovery"):
            read_pages += [page async for page in pages]
    given = items_of(read_pages)
    assert [str(item) for item in given] == (["{'10': '20'}"] if kind is CsvSource else ["10", "20"])
    assert "has grown while it was read" in caplog.text
    assert "byte 7" in caplog.text
    end = read_pages[-1].position
    assert end["offset"] == 6
    assert len(items_of(await read(source, through_json(end)))) == 2


async def test_what_is_appended_while_a_file_is_read_belongs_to_the_next_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size at the start is the end of what is read; whole lines that were added are found from there on."""
    set_sizes(monkeypatch, 4, 2)
    path = tmp_path / "input"
    path.write_bytes(b"one\ntwo\n")
    source = TextSource(path)
    async with reading(source) as pages:
        read_pages = [await anext(pages)]
        with path.open("ab") as file:
            file.write(b"three\n")
        read_pages += [page async for page in pages]
    assert items_of(read_pages) == ["one", "two"]
    assert not caplog.records
    await source.check(read_pages[-1].position, whole=True)
    await source.check(read_pages[-1].position, whole=False)
    assert items_of(await read(source, read_pages[-1].position)) == ["three"]


@pytest.mark.parametrize("kind", [TextSource, LinesSource, JsonLinesSource, CsvSource])
@pytest.mark.parametrize("left", [0, 15_000, 20_000])
async def test_a_file_that_shrinks_while_it_is_read_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[FileSource], left: int
) -> None:
    """A file cut below what was to be read is an `InputChanged`, never a shorter input."""
    set_sizes(monkeypatch, 100, 1)
    path = tmp_path / "input"
    path.write_bytes((b'"' + b"x" * 4_997 + b'"\n') * 8)
    async with reading(kind(path)) as pages:
        await anext(pages)
        os.truncate(path, left)
        with pytest.raises(InputChanged, match=r"40000 bytes at the start of this run.*--fresh"):
            async for _ in pages:
                pass


@pytest.mark.parametrize("kind", [TextSource, LinesSource, JsonLinesSource, CsvSource])
async def test_only_a_regular_file_is_read(tmp_path: Path, kind: type[FileSource]) -> None:
    """A missing file, a directory, a FIFO or a socket's place is a `UsageError` that names it; a FIFO never blocks."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, reason in [
        (tmp_path / "missing", "there is no input file"),
        (tmp_path, "not a regular file"),
        (fifo, "not a regular file"),
        (tmp_path / "loop", "can not be read"),
        (Path("/dev/null"), "not a regular file"),
        (Path("a\0b"), "can not be read"),
    ]:
        for attempt in (read(kind(path)), kind(path).check(None, whole=False)):
            with pytest.raises(UsageError, match=reason) as caught:
                await attempt
            assert str(path) in str(caught.value)


async def test_a_symlink_to_a_regular_file_is_read(tmp_path: Path) -> None:
    """What a symlink leads to is the input."""
    (tmp_path / "real").write_text("one\n")
    (tmp_path / "link").symlink_to("real")
    assert items_of(await read(TextSource(tmp_path / "link"))) == ["one"]


class _Broken:
    """An open file whose disk has failed."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    async def read(self, size: int) -> bytes:
        raise OSError(5, "Input/output error")


async def test_an_input_that_can_no_longer_be_read_is_an_error_with_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read error of the disk is an `IncompleteRun` that names the file, in `pages` and in `check` alike."""
    path = tmp_path / "input"
    path.write_bytes(b"one\ntwo\n")
    end = (await read(TextSource(path)))[-1].position
    aiofiles_open = aiofiles.open

    async def open_broken(*args: Any, **options: Any) -> Any:
        return _Broken(await aiofiles_open(*args, **options))

    monkeypatch.setattr(aiofiles, "open", open_broken)
    for attempt in (
        read(TextSource(path)),
        TextSource(path).check(end, whole=True),
        TextSource(path).check(end, whole=False),
    ):
        with pytest.raises(IncompleteRun, match=f"{path} can not be read any more: .*Input/output error"):
            await attempt


class _Counted(_Broken):
    """A file that takes two rounds of the loop to open and to close, as one does whose threads are busy."""

    left_open = 0

    @classmethod
    async def open(cls, file: Any) -> _Counted:
        cls.left_open += 1  # a thread that has begun goes on, whoever still waits for it
        await asyncio.sleep(0)
        return cls(file)

    async def read(self, size: int) -> bytes:
        await asyncio.sleep(0)
        return cast("bytes", self._file.read(size))

    async def close(self) -> None:
        await asyncio.sleep(0)
        type(self).left_open -= 1  # not reached by a thread that had not begun


async def test_a_task_that_is_cancelled_at_any_moment_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A native cancellation, which no shield of anyio stops, ends the reading after the file is closed."""
    path = tmp_path / "input"
    path.write_bytes(b"one\ntwo\n")

    with path.open("rb") as file:
        monkeypatch.setattr(aiofiles, "open", lambda *_, **__: _Counted.open(file))
        for rounds in range(100):
            file.seek(0)
            reading = asyncio.ensure_future(read(TextSource(path)))
            for _ in range(rounds):
                await asyncio.sleep(0)
            if not reading.cancel():
                break
            await asyncio.wait({reading})
            assert reading.cancelled()
            assert _Counted.left_open == 0, rounds
        else:
            pytest.fail("the reading never ended by itself")
    assert rounds > 5


async def test_a_tsv_is_a_csv_with_tabs(tmp_path: Path) -> None:
    """Commas mean nothing, tabs separate, quotes work, and the kind is another one."""
    path = tmp_path / "input.tsv"
    path.write_bytes(b'a\tb\n1,2\t"3\t\n4"\n')
    source = file_source(path)
    assert source.kind == "tsv"
    assert items_of(await read(source)) == [{"a": "1,2", "b": "3\t\n4"}]


def test_the_suffix_chooses_the_format_and_format_overrides_it() -> None:
    """.jsonl and .ndjson, .csv, .tsv in any case; everything else is text; an unknown format is refused."""
    kinds = {name: file_source(name).kind for name in ("a.jsonl", "a.NDJSON", "a.csv", "a.TSV", "a.txt", "a", "json")}
    assert list(kinds.values()) == ["jsonl", "jsonl", "csv", "tsv", "text", "text", "text"]
    assert file_source("a.json", "text").kind == "text"
    for name in ("a.json", "a.JSON.gz"):
        with pytest.raises(
            UsageError, match=r"one JSON document by its name.*`jq -c '.\[\]' a.*--format jsonl or text"
        ):
            file_source(name)
        with pytest.raises(UsageError, match="one JSON document"):
            as_source(name)
    assert file_source("a.csv", "text").kind == "text"
    assert file_source("a.txt", "tsv").kind == "tsv"
    with pytest.raises(UsageError, match="no format 'xml': choose one of: text, lines, jsonl, csv, tsv"):
        file_source("a.xml", "xml")


async def test_a_position_of_something_else_is_refused(tmp_path: Path) -> None:
    """A position that no file source wrote is an `InputChanged`, not a wrong place in the file."""
    path = tmp_path / "input"
    path.write_text("one\n")
    with pytest.raises(InputChanged, match="is not one of a file"):
        await TextSource(path).check("page-token-7", whole=False)


# Iterables


async def _asynchronously(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        await asyncio.sleep(0)
        yield item


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 511, 512, 513, 1500])
async def test_every_kind_of_iterable_gives_all_items_in_order(count: int) -> None:
    """Lists, ranges, generators, dict keys and async generators of any length give the same items and CRCs."""
    numbers = list(range(count))
    expected = [crc32(msgspec.json.encode(number)) for number in numbers]
    for items in (
        numbers,
        tuple(numbers),
        range(count),
        iter(numbers),
        (number for number in numbers),
        dict.fromkeys(numbers),
        _asynchronously(numbers),
    ):
        pages = await read(as_source(items))
        assert items_of(pages) == numbers
        assert crcs_of(pages) == expected
        assert {page.position for page in pages} <= {None}


async def test_an_iterator_is_read_no_further_than_a_page_is_wanted() -> None:
    """What is not asked for is not pulled: an endless generator is fine."""
    pulled = 0

    def endless() -> Iterator[int]:
        nonlocal pulled
        while True:
            pulled += 1
            yield pulled

    async with reading(as_source(endless())) as pages:
        await anext(pages)
        assert pulled == sources.ITERATOR_PAGE_ITEMS
        await anext(pages)
        assert pulled == 2 * sources.ITERATOR_PAGE_ITEMS


async def test_items_that_json_can_not_hold_need_a_key() -> None:
    """Without `key` they are a `UsageError` that says so; with it, the CRC is that of the key."""

    class Task:
        def __init__(self, name: str) -> None:
            self.name = name

    tasks = [Task("a"), Task("b")]
    with pytest.raises(UsageError, match=r"can not be written as JSON .*give key="):
        await read(as_source(tasks))
    with pytest.raises(UsageError, match="give key="):
        await read(as_source(_asynchronously(tasks)))
    with pytest.raises(UsageError, match="what key= makes of an item can not be written as JSON"):
        await read(as_source(tasks, key=lambda task: task))
    with pytest.raises(UsageError, match="key= failed on an item: ZeroDivisionError"):
        await read(as_source(tasks, key=lambda task: 1 // 0))
    pages = await read(as_source(tasks, key=lambda task: task.name))
    assert items_of(pages) == tasks
    assert crcs_of(pages) == [crc32(b'"a"'), crc32(b'"b"')]


async def test_the_order_inside_a_set_does_not_matter() -> None:
    """The CRC of an item does not depend on the order of a set, which is another in each process."""
    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other), "the premise: equal sets of another order"
    assert crcs_of(await read(as_source([one]))) == crcs_of(await read(as_source([other])))


async def test_what_can_not_be_a_source_is_refused() -> None:
    """Bytes, numbers and None are no items; `key` is for iterables alone; a source is taken as it is."""
    for items in (b"abc", bytearray(b"abc"), 5, None):
        with pytest.raises(UsageError, match="give a path, a Source, an iterable or an async iterable"):
            as_source(items)
    for ready in ("a.txt", Path("a.txt"), IterableSource([])):
        with pytest.raises(UsageError, match="key= is for iterables"):
            as_source(ready, key=str)
    source = IterableSource([])
    assert as_source(source) is source
    assert as_source("a.csv").kind == "csv"


# Against simple references

fast = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.tuples(st.integers(1, 64), st.integers(1, 64))


def read_all(source: Source) -> list[Any]:
    return items_of(asyncio.run(read(source)))


@fast
@given(text=st.text("ab \t\n\r\u00e9\u20ac\U0001f600\u2028\ufeff", max_size=80), sizes=sizes)
def test_text_is_what_split_and_strip_give(tmp_path: Path, text: str, sizes: tuple[int, int]) -> None:
    """The items are the stripped, non-empty parts between the line feeds; a mark at the start is dropped."""
    path = tmp_path / "input"
    path.write_bytes(text.encode())
    expected = [line.strip() for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_sizes(monkeypatch, *sizes)
        assert read_all(TextSource(path)) == expected


@fast
@given(
    rows=st.lists(st.tuples(*[st.text('ab,"\n\r \t\u00e9\U0001f600', max_size=12)] * 2), max_size=8),
    line_end=st.sampled_from(["\n", "\r\n"]),
    sizes=sizes,
    mark=st.booleans(),
    ended=st.booleans(),
)
def test_csv_is_what_dict_reader_gives(
    tmp_path: Path, rows: list[tuple[str, str]], line_end: str, sizes: tuple[int, int], *, mark: bool, ended: bool
) -> None:
    """What `csv.writer` writes is read back as `csv.DictReader` reads it."""
    written = io.StringIO(newline="")
    quoting: Literal[0, 1] = csv.QUOTE_ALL if line_end == "\n" else csv.QUOTE_MINIMAL  # no bare carriage return
    csv.writer(written, lineterminator=line_end, quoting=quoting).writerows([("x", 'y\n"z'), *rows])
    text = written.getvalue()
    if not ended:
        text = text.removesuffix(line_end)
    path = tmp_path / "input"
    path.write_bytes((BOM if mark else b"") + text.encode())
    expected = list(csv.DictReader(io.StringIO(text, newline="")))
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_sizes(monkeypatch, *sizes)
        assert read_all(CsvSource(path)) == expected


@fast
@given(data=st.binary(max_size=60) | st.text('a,"\n\r\ufeff', max_size=60).map(str.encode), sizes=sizes)
def test_any_bytes_give_items_or_one_named_error_whatever_the_sizes(
    tmp_path: Path, data: bytes, sizes: tuple[int, int]
) -> None:
    """No bytes hang a source, escape its errors, or read differently in tiny pieces than at once."""
    path = tmp_path / "input"
    path.write_bytes(data)
    for kind in (TextSource, JsonLinesSource, CsvSource):
        whole = asyncio.run(read_until_error(kind(path)))
        with pytest.MonkeyPatch.context() as monkeypatch:
            set_sizes(monkeypatch, *sizes)
            pieces = asyncio.run(read_until_error(kind(path)))
        assert items_of(pieces[0]) == items_of(whole[0])
        assert crcs_of(pieces[0]) == crcs_of(whole[0])
        assert str(pieces[1]) == str(whole[1])


def test_the_crcs_of_a_page_take_four_bytes_an_item() -> None:
    """CRCs are kept for every item of the window, so they are an array and not a list."""

    async def main() -> None:
        for page in await read(as_source([1, 2, 3])):
            assert isinstance(page.crcs, array)

    asyncio.run(main())


def test_a_key_must_be_a_function() -> None:
    """Refused before anything is begun, with a message that says what it is for."""
    not_a_function: Any = "id"
    with pytest.raises(UsageError, match="key is 'id': it must be a function that makes a JSON value of an item"):
        as_source([1, 2], not_a_function)
