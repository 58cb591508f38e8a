"""The lines of a journal, and what must be found where some of them do not count.

That is worked out from the lines that are still whole, by other means than the replay: by looking at the damage and
not at the bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from async_recovery.checkpoint import Ahead, Complete, State


@dataclass(frozen=True)
class Line:
    """One line of a journal: its bytes with the line end, and what it says."""

    data: bytes
    value: State | Complete | tuple[Ahead, ...]


@dataclass(frozen=True)
class Found:
    """What a replay says of a journal."""

    state: State | None
    ahead: dict[int, Ahead]
    complete: Complete | None
    kept: bool
    end: int
    damaged_lines: int


def joined(lines: list[Line]) -> bytes:
    """The bytes of a journal."""
    return b"".join(line.data for line in lines)


def line_of_each_byte(lines: list[Line]) -> list[int]:
    """For each byte of the journal, the number of the line that it stands in."""
    return [number for number, line in enumerate(lines) for _ in line.data]


def expected(lines: Sequence[Line], lost: Collection[int], damaged_lines: int = 0) -> Found:
    """What must be found where exactly the lines in `lost` do not count: worked out from the lines alone."""
    ends = [0]
    for line in lines:
        ends.append(ends[-1] + len(line.data))
    state: State | None = None
    complete: Complete | None = None
    ahead: dict[int, Ahead] = {}
    seen: dict[int, Ahead] = {}
    end = 0
    for number, line in enumerate(lines):
        if number in lost:
            continue
        if isinstance(line.value, State):
            state, complete, end = line.value, None, ends[number + 1]
            ahead = {index: item for index, item in sorted(seen.items()) if index >= line.value.mark}
        elif isinstance(line.value, Complete):
            complete, end = line.value, ends[number + 1]
        else:
            seen.update((item.index, item) for item in line.value)
    return Found(state, ahead, complete, complete is not None and state is None, end, damaged_lines)
