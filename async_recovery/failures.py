"""The recorded failures in a finished output: read as items of their own, and replaced where they stand.

An output is JSON Lines or an array, as `output_file` frames them: one record a line, every index once and in order.
"""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import AsyncIterator, Iterable, Iterator
from zlib import crc32

import msgspec

from .checkpoint import JSON
from .contracts import Page
from .cursor import aclose
from .errors import InputChanged, OutputChanged, UsageError
from .output_file import framing_of
from .records import FAILURE_MARK, Failure, read_failure
from .sources import FileSource, Parsed, Position, read_position


class _Whole(msgspec.Struct, frozen=True):
    """All that an output was when the retry began: its size and CRC-32."""

    whole: tuple[int, int]


def whole_of(position: JSON) -> tuple[int, int]:
    """Size and CRC-32 that the whole output had, out of a position of `FailuresSource`."""
    try:
        return msgspec.convert(position, _Whole).whole
    except msgspec.ValidationError as error:
        raise InputChanged(f"the checkpoint's position {position!r} is not one of an output ({error})") from error


class FailuresSource(FileSource):
    """The items of the recorded failures in a finished output, in order, as JSON gives them back.

    Before the first one the whole output is read once, so that nothing begins on what is no output; a position
    remembers its size and CRC-32, and all of it is compared, not only what lies before the position.

    :param output: path of the output, as it was given: its suffix tells its form.
    """

    kind = "failures"
    max_item_bytes = 1 << 30  # a record has no bound of its own

    def __init__(self, output: str | os.PathLike[str]) -> None:
        super().__init__(output)
        self._is_array = framing_of(self.path).form == "json"
        self._whole: tuple[int, int] | None = None

    async def check(self, position: JSON, *, whole: bool) -> None:
        """See `Source.check`. Without a position: see that it is an output, all of it.

        :raises UsageError: if it is not, or there is none; the line and the byte are named.
        """
        if position is None:
            await self._look_through()
            return
        await super().check(position, whole=False)
        self._whole = whole_of(position)
        async with self._opened() as file:
            self._refuse_other_size(self._measure(file))
            if whole:
                await self._compare(file, (0, 0), self._whole)

    async def pages(self, position: JSON) -> AsyncIterator[Page]:
        if position is None and self._whole is None:
            await self._look_through()
        elif position is not None:
            self._whole = whole_of(position)
        assert self._whole is not None
        pages = super().pages(position)
        try:
            async for page in pages:
                self._refuse_other_size(self._size)
                at = read_position(page.position)
                if page.items or at.offset == self._size:  # what lies between is of no interest to a resume
                    if at.offset == self._size and at.crc != self._whole[1]:
                        raise self._changed("its bytes are others")
                    yield Page({**page.position, "whole": self._whole}, page.items, page.crcs)
                else:
                    await asyncio.sleep(0)
        finally:
            await aclose(pages)

    async def _look_through(self) -> None:
        at = Position()
        async for page in super().pages(None):
            at = read_position(page.position)
        if self._is_array and at.offset == 0:
            raise self._no_output(1, 0, "it is empty")
        self._whole = at.offset, at.crc

    def _parse(self, chunk: bytes, at: Position, *, last: bool) -> Parsed:
        parsed = Parsed([], array("I"), len(chunk))
        if self._has_only_results(chunk, at):
            return parsed
        offset = at.offset
        for number, line in enumerate(lines_of(chunk), at.line):
            reason = self._look_at(line, offset, number, parsed)
            if reason is not None:
                parsed.error = self._no_output(number, offset, reason)
                break
            offset += len(line)
        return parsed

    def _has_only_results(self, chunk: bytes, at: Position) -> bool:
        """Whether that can be told without a look at each line; False where it can not."""
        lines = chunk.count(b"\n")
        if FAILURE_MARK in chunk or chunk.count(b"},\n" if self._is_array else b"}\n") != lines:
            return False
        first = at.line - (2 if self._is_array else 1)
        begins = [b'{"index":%d,' % index for index in range(first, first + lines)]
        follows_more = not self._is_array or at.offset + len(chunk) + 2 < self._size
        return follows_more and chunk.endswith(b"\n") and all(map(bytes.startswith, chunk.split(b"\n"), begins))

    def _look_at(self, line: bytes, offset: int, number: int, parsed: Parsed) -> str | None:
        """Adds the item of a line if it is a failure; returns what is wrong with the line, if anything is."""
        end, index, follows = offset + len(line), number - 1, b"\n"
        if self._is_array:
            is_last, index = end == self._size, index - 1
            if number == 1 or is_last:
                frame = b"[]\n" if number == 1 and is_last else b"]\n" if is_last else b"[\n"
                return None if line == frame else f"it is not {frame.decode()!r}, which an array has there"
            follows = b"\n" if end + 2 == self._size else b",\n"
        begin = b'{"index":%d' % index
        if not line.startswith((begin + b",", begin + b"}")) or not line.endswith(b"}" + follows):
            return f"it is not the record of index {index}, whole and alone on its line"
        record = line.removesuffix(follows)
        try:
            failure = read_failure(record)
        except ValueError as error:
            return f"it is not valid JSON ({error})"
        if failure is not None:
            parsed.items.append(failure.item)
            parsed.crcs.append(crc32(record))
        return None

    def _refuse_other_size(self, size: int) -> None:
        assert self._whole is not None
        if size != self._whole[0]:
            raise self._changed(f"it has {size} bytes, it had {self._whole[0]}")

    def _changed(self, found: str) -> InputChanged:
        return InputChanged(
            f"the output {self.path} has changed since the retry of its failed items began: {found}. "
            "Restore it to go on, or start the retry anew with --fresh (fresh=True)"
        )

    def _no_output(self, line: int, byte: int, reason: str) -> UsageError | InputChanged:
        if self._whole is not None:  # it was an output before
            return self._changed(f"line {line}, byte {byte}: {reason}")
        return UsageError(
            f"{self.path} is not a finished output of this program: line {line}, byte {byte}: {reason}. "
            "Name the output of a job, as it was written"
        )


def lines_of(chunk: bytes) -> Iterator[bytes]:
    """The lines with their line ends."""
    start = 0
    while end := chunk.find(b"\n", start) + 1:
        yield chunk[start:end]
        start = end
    if start < len(chunk):
        yield chunk[start:]


def merged(old: Iterable[bytes], records: Iterable[bytes]) -> Iterator[bytes | memoryview]:
    """The bytes of an output in which each failure is replaced by its new record, all other bytes as they were.

    :param old: the old output, in blocks.
    :param records: the new records, one for each failure, in order: each under its number instead of its index. In
        blocks too, one a line.
    :raises OutputChanged: if there are more failures or fewer.
    """
    new = enumerate(line for lines in whole_lines(records) for line in lines_of(lines))
    for lines in whole_lines(old):
        view, start = memoryview(lines), 0
        for begin, end, failure in failures_in(lines):
            number, record = next(new, (0, b""))
            prefix = b'{"index":%d' % number
            if not record.startswith(prefix):
                raise OutputChanged(f"the failure at index {failure.index} has no new record")
            yield view[start:begin]
            yield b'{"index":%d' % failure.index
            yield memoryview(record)[len(prefix) : -1]
            start = end
        yield view[start:]
    if next(new, None) is not None:
        raise OutputChanged("there are more new records than failures")


def failures_in(lines: bytes) -> Iterator[tuple[int, int, Failure]]:
    """Where each record of a failure begins and ends in whole lines of an output, and what it says."""
    at = 0
    while (at := lines.find(FAILURE_MARK, at)) >= 0:
        begin = lines.rfind(b"\n", 0, at) + 1
        at = lines.find(b"\n", at)
        if at < 0:
            at = len(lines)
        end = at - (lines[at - 1 : at] == b",")
        try:
            failure = read_failure(lines[begin:end])
        except ValueError as error:
            raise OutputChanged(f"a record of it can not be read any more ({error})") from error
        if failure is not None:
            yield begin, end, failure


def whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks that end with a line; one that never ends comes last."""
    rest = bytearray()
    for block in blocks:
        rest += block
        if end := block.rfind(b"\n") + 1:
            end += len(rest) - len(block)
            yield bytes(rest[:end])
            del rest[:end]
    if rest:
        yield bytes(rest)
