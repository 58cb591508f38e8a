"""Where items come from: text lines, JSON Lines, CSV, and anything that can be iterated.

Files are read in binary blocks, never whole, and only up to the size they have at the start. A page's position
carries the CRC-32 of everything before it, so that a resume can tell whether the input is still the same. Where a file
is compressed, that is said of its content.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import logging
import os
import re
import shlex
import stat
from array import array
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar
from zlib import crc32

import aiofiles
import anyio
import msgspec
from aiofiles.threadpool.binary import AsyncBufferedReader

from .checkpoint import JSON
from .compressed import DamagedStream, Decompressed, check_extra, check_plain, suffix_of
from .contracts import Page, Source
from .errors import AsyncRecoveryError, IncompleteRun, InputChanged, InvalidItem, UsageError, describe, shorten
from .prefix_crc import PrefixCrc

logger = logging.getLogger("async_recovery.sources")

T = TypeVar("T")

BLOCK_BYTES = 1 << 20
PAGE_BYTES = 64 << 10
COMPARED_BYTES = 64 << 10
MAX_ITEM_BYTES = 64 << 20
UNKNOWN_BYTES = 1 << 62  # the size of a content whose end has not been reached
SEQUENCE_PAGE_ITEMS = 512
ITERATOR_PAGE_ITEMS = 64

_BOM = b"\xef\xbb\xbf"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Position(msgspec.Struct, frozen=True, omit_defaults=True):
    """A place in a file: its offset, the line that begins there, and the CRC-32 of what lies before.

    `head` and `tail` are points before it with the CRC-32 up to them; `header` is the header of a CSV file.
    """

    offset: int = 0
    line: int = 1
    crc: int = 0
    tail: tuple[int, int] = (0, 0)
    head: tuple[int, int] | None = None
    header: list[str] | None = None


class Parsed(msgspec.Struct):
    """What a chunk of a file holds: items, their CRCs, the bytes that they take, and the error that ended it."""

    items: list[Any]
    crcs: array[int]
    consumed: int
    header: list[str] | None = None
    error: AsyncRecoveryError | None = None


class FileSource:
    """Base of the sources that read a file. A subclass parses chunks of whole lines.

    A file whose name ends in ``.gz`` or ``.zst`` is decompressed: offsets and CRCs are those of its content. It can be
    read from its beginning alone, so that is what each resume does.
    """

    kind: str
    max_item_bytes: int | None = None  # None: MAX_ITEM_BYTES

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not self.path:
            raise UsageError("the input is '': name a file")
        self._size = 0
        self._is_compressed = suffix_of(os.fsdecode(path)) is not None
        check_extra(os.fsdecode(path))

    def _parse(self, chunk: bytes, at: Position, *, last: bool) -> Parsed:
        """Parse the items that end within `chunk`.

        :param chunk: whole lines; the last one without its line end only if `last`.
        :param last: nothing follows.
        """
        raise NotImplementedError

    def share(self, position: JSON) -> float | None:
        offset = 0 if position is None else read_position(position).offset
        return offset / self._size if self._size and not self._is_compressed else None

    async def check(self, position: JSON, *, whole: bool) -> None:
        """See `Source.check`. Not whole: the first 64 KiB and at least the 64 KiB before the position.

        Of a compressed file all before the position is read anyway, and compared.
        """
        at = Position() if position is None else read_position(position)
        async with self._opened() as file:
            if position is None and not self._is_compressed:
                check_plain(self.path, await file.read(4))
            if not self._is_compressed and (size := self._measure(file)) < at.offset:
                raise self._changed(f"it has {size} bytes, {at.offset} of them were done")
            if at.head is not None and not whole and not self._is_compressed:
                await self._compare(file, (0, 0), at.head)
            start = (0, 0) if whole or self._is_compressed else at.tail
            last = await self._compare(file, start, (at.offset, at.crc))
            if not whole and last not in (b"", b"\n"):
                await self._check_line_end(file, at.offset)

    async def pages(self, position: JSON) -> AsyncIterator[Page]:
        at = Position() if position is None else read_position(position)
        crc = PrefixCrc(COMPARED_BYTES, *at.tail, tail=at.tail, head=at.head)
        async with self._opened() as file:
            measured = self._measure(file)
            self._size = size = UNKNOWN_BYTES if self._is_compressed else measured
            await file.seek(crc.offset)
            block = b""
            while crc.offset < at.offset:  # once more past what lies before, so that the next tail is near again
                block = await self._read(file, min(BLOCK_BYTES, at.offset - crc.offset))
                if not block:
                    raise self._changed(f"it has {crc.offset} bytes, {at.offset} of them were done")
                crc.update(block)
            buffer, start, wanted, stuck_at = b"", 0, PAGE_BYTES, -1
            if at.offset < size and block[-1:] not in (b"", b"\n"):  # it was the end, and of a line that has one now
                buffer = await self._read(file, min(2, size - at.offset))
                if buffer.startswith((b"\n", b"\r\n")):
                    start = buffer.index(b"\n") + 1
                    crc.update(buffer[:start])
                    at = Position(crc.offset, at.line + 1, crc.value, crc.tail, crc.head, at.header)
            while at.offset < size:
                unread = size - (at.offset + len(buffer) - start)
                if unread and len(buffer) - start < wanted:
                    block = await self._read(file, min(max(BLOCK_BYTES, wanted), unread))
                    buffer, start = buffer[start:] + block, 0
                    size = size if block else at.offset + len(buffer)
                    continue
                end = _whole_lines(buffer, start, wanted)
                if end == start and unread:
                    wanted = self._more(wanted, at)
                    continue
                if end in (start, stuck_at):  # all that is left is a last line without a line end
                    if not self._half_line_counts(file, measured):
                        break
                    end = len(buffer)
                chunk = buffer[start:end]
                parsed = self._parse(chunk, at, last=not unread and end == len(buffer))
                if not parsed.consumed and parsed.error is None:
                    stuck_at = end if not unread and start + wanted >= len(buffer) else -1
                    wanted = wanted if stuck_at >= 0 else self._more(wanted, at)
                    continue
                yield Page(_write_position(at), parsed.items, parsed.crcs)
                if parsed.error is not None:
                    raise parsed.error
                crc.update(memoryview(chunk)[: parsed.consumed])
                start, wanted, stuck_at = start + parsed.consumed, PAGE_BYTES, -1
                line, header = at.line + chunk.count(b"\n", 0, parsed.consumed), parsed.header or at.header
                at = Position(crc.offset, line, crc.value, crc.tail, crc.head, header)
            yield Page(_write_position(at), [], array("I"))

    async def _read(self, file: AsyncBufferedReader, size: int) -> bytes:
        try:
            block = await file.read(size)
        except DamagedStream as error:
            raise InvalidItem(
                f"{self.path}: {error}. Put the whole file there and run the same line again: what is done is kept"
            ) from error
        if not block and not self._is_compressed:
            raise self._changed(f"it had {self._size} bytes at the start of this run, and is shorter now")
        return block

    def _opened(self) -> Any:
        return _Opened(self.path, is_compressed=self._is_compressed)

    def _measure(self, file: AsyncBufferedReader) -> int:
        return os.fstat(file.fileno()).st_size

    def _more(self, wanted: int, at: Position) -> int:
        most = self.max_item_bytes or MAX_ITEM_BYTES
        if wanted >= most:
            raise InvalidItem(
                f"{self.path}, line {at.line}: the item that begins at byte {at.offset} has more than "
                f"{most >> 20} MiB: is a line end or a closing quote missing?"
            )
        return wanted * 2

    def _half_line_counts(self, file: AsyncBufferedReader, size: int) -> bool:
        """Whether the last line, which has no line end, is an item: only while nobody is still writing it."""
        if self._measure(file) == size:
            return True
        logger.warning(
            "%s has grown while it was read, and the line at its former end (byte %d) was not whole then: "
            "this run ends before that line; the next one reads on from there",
            self.path,
            size,
        )
        return False

    async def _compare(self, file: AsyncBufferedReader, start: tuple[int, int], end: tuple[int, int]) -> bytes:
        """Compare the CRC-32 of the bytes between two points with what is remembered; returns the last one of them."""
        offset, crc, block = *start, b""
        await file.seek(offset)
        while offset < end[0]:
            try:
                block = await file.read(min(BLOCK_BYTES, end[0] - offset))
            except DamagedStream as error:
                raise self._changed(str(error)) from error
            if not block:
                raise self._changed(f"it has {offset} bytes, {end[0]} of them were done")
            crc = crc32(block, crc)
            offset += len(block)
        if crc != end[1]:
            raise self._changed(f"the bytes from {start[0]} to {end[0]} are not those that were done")
        return block[-1:]

    async def _check_line_end(self, file: AsyncBufferedReader, offset: int) -> None:
        """A position after a line without a line end holds only while no more has been added to that line."""
        follows = b""
        with contextlib.suppress(DamagedStream):  # who reads on will say so
            follows = await file.read(2)
        if follows and not follows.startswith((b"\n", b"\r\n")):
            raise self._changed(f"the line that ended at byte {offset} goes on now")

    def _changed(self, found: str) -> InputChanged:
        return InputChanged(
            f"the input {self.path} has changed before the point that was reached: {found}. "
            "Restore it to resume, or start anew with --fresh (fresh=True)"
        )

    def _invalid(self, chunk: bytes, at: Position, number: int, byte: int, reason: str) -> InvalidItem:
        """The error for a byte of line `number` (0-based) of the chunk, counted without a byte order mark."""
        offset = at.offset + sum(len(line) + 1 for line in chunk.split(b"\n")[:number]) + byte
        if number == 0:
            offset += len(chunk) - len(_without_bom(chunk, at))
        return InvalidItem(
            f"{self.path}, line {at.line + number}, byte {offset}: {reason}. "
            "Mend the line and run the same line again: what comes before it is kept"
        )


class LinesSource(FileSource):
    """Lines of UTF-8 text, each exactly as it is, empty ones too. A line ends at ``\\n`` or ``\\r\\n``."""

    kind = "lines"

    def _parse(self, chunk: bytes, at: Position, *, last: bool) -> Parsed:
        raw, text = _split_lines(chunk), _without_bom(chunk, at)
        if not text:
            return Parsed([], array("I"), len(chunk))  # a byte order mark, and nothing else
        try:
            lines = text.decode().split("\n")
        except UnicodeDecodeError:
            return self._until_bad_line(chunk, raw, at)
        del lines[len(raw) :]
        if b"\r" in chunk:
            lines = [line.removesuffix("\r") for line in lines]
        return self._keep(lines, raw, len(chunk))

    def _keep(self, lines: list[str], raw: list[bytes], consumed: int) -> Parsed:
        return Parsed(lines, array("I", map(crc32, raw)), consumed)

    def _until_bad_line(self, chunk: bytes, raw: list[bytes], at: Position) -> Parsed:
        lines: list[str] = []
        for number, line in enumerate(raw):
            try:
                lines.append((_without_bom(line, at) if number == 0 else line).decode())
            except UnicodeDecodeError as error:
                parsed = self._keep(lines, raw[:number], 0)
                parsed.error = self._invalid(chunk, at, number, error.start, f"not valid UTF-8 ({error.reason})")
                return parsed
        raise AssertionError("each line is valid, and all together are not")


class TextSource(LinesSource):
    """Lines of UTF-8 text: stripped, blank ones dropped. A line ends at ``\\n`` or ``\\r\\n``.

    :ivar tells_of_blanks: say in the log, once, that what is around a line does not belong to its item.
    """

    kind = "text"
    tells_of_blanks = False

    def _keep(self, lines: list[str], raw: list[bytes], consumed: int) -> Parsed:
        items = [line.strip() for line in lines]
        if self.tells_of_blanks and items != lines:
            self._tell_of_blanks(items, lines)
        if not all(items):
            kept = [(item, line) for item, line in zip(items, raw, strict=True) if item]
            return Parsed([item for item, _ in kept], array("I", [crc32(line) for _, line in kept]), consumed)
        return Parsed(items, array("I", map(crc32, raw)), consumed)

    def _tell_of_blanks(self, items: list[str], lines: list[str]) -> None:
        self.tells_of_blanks = False
        line, item = next((line, item) for line, item in zip(lines, items, strict=True) if line != item)
        logger.warning(
            "%s: the line %s is taken for %s: a line of text is stripped of its outer blanks, and dropped if nothing "
            "is left. If they belong to it, as in a name of a file, give --format lines",
            self.path,
            shorten(line),
            f"the item {shorten(item)}" if item else "no item",
        )


class JsonLinesSource(FileSource):
    """One JSON value a line, blank lines dropped."""

    kind = "jsonl"

    def _parse(self, chunk: bytes, at: Position, *, last: bool) -> Parsed:
        lines = _split_lines(chunk)
        decode = msgspec.json.Decoder().decode
        parsed = Parsed([], array("I"), len(chunk))
        for number, line in enumerate(lines):
            text = _without_bom(line, at) if number == 0 else line
            if not text or text.isspace():
                continue
            try:
                parsed.items.append(decode(text))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                parsed.error = self._invalid(chunk, at, number, 0, f"not valid JSON ({describe(error)})")
                break
            parsed.crcs.append(crc32(line))
        return parsed


class CsvSource(FileSource):
    """CSV with a header, read by the standard library's reader: each record is a mapping of its fields.

    Quoted fields may hold line ends; blank lines are dropped; a record whose fields are not as many as the
    header's is an error. The header is a page of its own: a position after it vouches for it as well.

    :param delimiter: the character between two fields.
    """

    def __init__(self, path: str | os.PathLike[str], delimiter: str = ",") -> None:
        super().__init__(path)
        self.kind = {",": "csv", "\t": "tsv"}.get(delimiter, f"csv{delimiter}")
        self._delimiter = delimiter

    def _parse(self, chunk: bytes, at: Position, *, last: bool) -> Parsed:
        limit = csv.field_size_limit(MAX_ITEM_BYTES)  # the reader's own, 128 KiB, holds for the whole process
        try:
            return self._parse_records(chunk, at, last=last)
        finally:
            csv.field_size_limit(limit)

    def _parse_records(self, chunk: bytes, at: Position, *, last: bool) -> Parsed:
        text = _without_bom(chunk, at)
        lines = _keep_line_ends(text)
        parsed = Parsed([], array("I"), len(chunk) - len(text), header=at.header)
        feed = _Feed(lines)
        reader = csv.reader(feed, delimiter=self._delimiter)
        while parsed.header is at.header:  # until the header has been read, if it has not been before
            start, fields = feed.taken, None
            try:
                fields = next(reader, None)
                if fields is None:
                    break
                if feed.starved and not last:
                    break  # the record goes on beyond this chunk
                reason, byte = self._wrong(fields, feed, parsed), 0
            except UnicodeDecodeError as error:
                start, byte, reason = feed.taken - 1, error.start, f"not valid UTF-8 ({error.reason})"
            except csv.Error as error:
                byte, reason = 0, f"not valid CSV ({error})"
            if reason:
                parsed.error = self._invalid(chunk, at, start, byte, reason)
                break
            raw = lines[start] if feed.taken == start + 1 else b"".join(lines[start : feed.taken])
            self._add(fields or [], raw, parsed)
            parsed.consumed += len(raw)
        if parsed.consumed == len(chunk) - len(text) and not last:
            parsed.consumed = 0  # not even the first record is whole: the byte order mark waits for it
        return parsed

    def _wrong(self, fields: list[str], feed: _Feed, parsed: Parsed) -> str | None:
        if feed.starved:
            return "a quoted field that begins in this record is never closed"
        if parsed.header is not None and fields and len(fields) != len(parsed.header):
            return f"the record has {len(fields)} fields, the header has {len(parsed.header)}"
        if parsed.header is None and len(set(fields)) != len(fields):
            return f"two columns of the header have the same name: {', '.join(fields)}"
        return None

    def _add(self, fields: list[str], raw: bytes, parsed: Parsed) -> None:
        if not fields:
            return
        if parsed.header is None:
            parsed.header = fields
            return
        parsed.items.append(dict(zip(parsed.header, fields, strict=True)))
        parsed.crcs.append(crc32(raw.removesuffix(b"\n").removesuffix(b"\r")))


class _Feed:
    """Gives lines to a CSV reader, and tells how many it has taken and whether it wanted more in a record."""

    def __init__(self, lines: list[bytes]) -> None:
        self._lines = lines
        self.taken = 0
        self.starved = False

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        if self.taken == len(self._lines):
            self.starved = True
            raise StopIteration
        self.taken += 1
        return self._lines[self.taken - 1].decode()


class IterableSource:
    """Any iterable or async iterable. It has no positions: a resume counts from its first item.

    What can be iterated only once (a generator, a socket) must be given again from its beginning. An iterable is
    iterated on the event loop: one whose ``next`` waits for something belongs in an async iterable.

    :param items: the items.
    :param key: what tells an item apart, for items that can not be written as JSON: item → JSON value.
    """

    kind = "iterable"
    path = None

    def __init__(self, items: Iterable[Any] | AsyncIterable[Any], key: Callable[[Any], JSON] | None = None) -> None:
        self._items = items
        self._key = key
        self._encode = msgspec.json.Encoder(order="deterministic").encode  # a set's order is another in each process

    def share(self, position: JSON) -> float | None:
        return None

    async def check(self, position: JSON, *, whole: bool) -> None:
        """Nothing: items without positions are compared one by one when they come by."""

    async def pages(self, position: JSON) -> AsyncIterator[Page]:
        if isinstance(self._items, AsyncIterable):
            async for item in self._items:
                yield Page(None, [item], self._crcs([item]))
            return
        size = SEQUENCE_PAGE_ITEMS if isinstance(self._items, Sequence) else ITERATOR_PAGE_ITEMS
        iterator = iter(self._items)
        while items := list(islice(iterator, size)):
            yield Page(None, items, self._crcs(items))

    def _crcs(self, items: list[Any]) -> array[int]:
        keys: Iterable[Any] = items
        if self._key is not None:
            try:
                keys = [self._key(item) for item in items]
            except Exception as error:
                raise UsageError(f"key= failed on an item: {describe(error)}") from error
        try:
            return array("I", map(crc32, map(self._encode, keys)))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            if self._key is not None:
                raise UsageError(
                    f"what key= makes of an item can not be written as JSON ({describe(error)}): it must be a plain "
                    "function that makes a JSON value of an item"
                ) from error
            raise UsageError(
                f"an item can not be written as JSON ({describe(error)}), and its CRC is what tells a changed input: "
                "give key=, a function that makes a JSON value of an item"
            ) from error


FORMATS = ("text", "lines", "jsonl", "csv", "tsv")
_BY_SUFFIX: dict[str, str] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}


def file_source(path: str | os.PathLike[str], format: str | None = None) -> FileSource:
    """The source for a file.

    :param format: ``"text"``, ``"lines"``, ``"jsonl"``, ``"csv"`` or ``"tsv"``; None: by the suffix, else text.
        That of ``items.jsonl.gz`` is what stands before ``.gz``.
    :raises UsageError: if there is no such format, the path is a URL, or its suffix is ``.json``: an array is one
        value, not one a line.
    """
    plain = os.fsdecode(path)
    if _URL.match(plain):
        raise UsageError(
            f"the input {plain} is a URL, and an input is a file: load it down first, or pipe it "
            f"(curl -sf {shlex.quote(plain)} | async-recovery run --input - …); in Python, give a Source"
        )
    suffix = os.path.splitext(plain.removesuffix(suffix_of(plain) or ""))[1].lower()
    if suffix == ".json" and format is None:
        raise UsageError(
            f"the input {plain} is one JSON document by its name, and items are values or lines: write one a line "
            f"(`jq -c '.[]' {shlex.quote(plain)} > items.jsonl`), or, if it has them, say so (--format jsonl or text; "
            "JsonLinesSource or TextSource)"
        )
    chosen = format or _BY_SUFFIX.get(suffix, "text")
    if chosen == "text":
        return TextSource(path)
    if chosen == "lines":
        return LinesSource(path)
    if chosen == "jsonl":
        return JsonLinesSource(path)
    if chosen in ("csv", "tsv"):
        return CsvSource(path, "\t" if chosen == "tsv" else ",")
    raise UsageError(f"there is no format {chosen!r}: choose one of: {', '.join(FORMATS)}")


def source_of_kind(kind: str, path: str | None) -> FileSource | None:
    """The source of that kind for a file; None if there is no file, or the kind is none of these here."""
    if path is None:
        return None
    if kind.startswith("csv") and len(kind) == 4:
        return CsvSource(path, kind[3])
    return file_source(path, kind) if kind in FORMATS else None


def as_source(items: Any, key: Callable[[Any], JSON] | None = None) -> Source:
    """The source for what was given as items: a path, a `Source`, an iterable or an async iterable.

    :raises UsageError: if it is none of these, or `key` is given with a path or a source.
    """
    ready: Source | None = None
    if isinstance(items, str | os.PathLike):
        ready = file_source(items)
    elif isinstance(items, Source):
        ready = items
    if ready is not None:
        if key is not None:
            raise UsageError("key= is for iterables: the lines of a file are compared by their bytes")
        return ready
    if not (key is None or callable(key)):
        raise UsageError(f"key is {shorten(key)}: it must be a function that makes a JSON value of an item")
    if isinstance(items, Iterable | AsyncIterable) and not isinstance(items, bytes | bytearray):
        return IterableSource(items, key)
    raise UsageError(f"the items are {shorten(items)}: give a path, a Source, an iterable or an async iterable")


class _Opened:
    """Opens a regular file for reading, with a clear error where that can not be done."""

    def __init__(self, path: str, *, is_compressed: bool) -> None:
        self._path = path
        self._is_compressed = is_compressed

    async def __aenter__(self) -> AsyncBufferedReader:
        try:
            self._file, cancelled = await _to_its_end(_open(self._path, is_compressed=self._is_compressed))
        except FileNotFoundError:
            raise UsageError(f"there is no input file {self._path}") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"the input {self._path} can not be read: {describe(error)}") from error
        if cancelled is not None:
            await _to_its_end(self._file.close())
            raise cancelled
        return self._file

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        _, cancelled = await _to_its_end(self._file.close())
        if cancelled is not None:
            raise cancelled
        if isinstance(error, OSError):
            raise IncompleteRun(
                f"the input {self._path} can not be read any more: {describe(error)}. What finished is saved"
            ) from error


async def _open(path: str, *, is_compressed: bool) -> AsyncBufferedReader:
    if not is_compressed:
        return await aiofiles.open(path, "rb", opener=_regular_file)
    loop = asyncio.get_running_loop()
    content: Any = await loop.run_in_executor(None, Decompressed, path, _regular_file)
    return AsyncBufferedReader(content, loop=loop, executor=None)


async def _to_its_end(job: Coroutine[Any, Any, T]) -> tuple[T, asyncio.CancelledError | None]:
    """Wait for the end of an open or a close, which would leave an open file behind if it were cancelled.

    A shield of anyio does not stop a native cancellation: the last one is returned, to be raised by the caller.
    """
    task, cancelled = asyncio.ensure_future(job), None
    while not task.done():
        try:
            with anyio.CancelScope(shield=True):
                await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    return task.result(), cancelled


def _regular_file(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # a FIFO would wait for a writer
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        cure = "" if stat.S_ISDIR(mode) else ": use --input -, and give on standard input what comes from there"
        raise OSError(f"it is not a regular file{cure}")
    return descriptor


def read_position(position: JSON) -> Position:
    """:raises InputChanged: if it is not one of a file."""
    try:
        return msgspec.convert(position, Position)
    except msgspec.ValidationError as error:
        raise InputChanged(f"the checkpoint's position {position!r} is not one of a file ({error})") from error


def _write_position(position: Position) -> JSON:
    return msgspec.to_builtins(position)


def _whole_lines(buffer: bytes, start: int, wanted: int) -> int:
    """The end of the whole lines in about `wanted` bytes from `start`; `start` if there is no whole line."""
    end = buffer.rfind(b"\n", start, start + wanted) + 1
    return end or buffer.find(b"\n", start + wanted) + 1 or start


def _split_lines(chunk: bytes) -> list[bytes]:
    """The lines without their line ends."""
    lines = chunk.split(b"\n")
    if not lines[-1]:
        lines.pop()
    if chunk.find(b"\r") >= 0:
        lines = [line.removesuffix(b"\r") for line in lines]
    return lines


def _keep_line_ends(text: bytes) -> list[bytes]:
    """The lines with their line ends; a lone carriage return ends none."""
    lines = text.split(b"\n")
    last = lines.pop()
    return [line + b"\n" for line in lines] + ([last] if last else [])


def _without_bom(data: bytes, at: Position) -> bytes:
    return data.removeprefix(_BOM) if at.offset == 0 else data
