"""What a person is shown of a run: a snapshot and a width in, lines of text with their styles out.

* Never over 100 %, and 100 % only when all of it is done: shares are rounded down.
* No time left where it would be a guess: while the run pauses, the mark stands still, or nothing finishes; or beyond 99
  days. Rate and time left are those of the last seconds: a run becomes slower, or stands still, and they follow.
* No line is wider than it may be, in cells of a terminal; what does not fit beside the rest gets a line of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size

from .progress import Progress, Seen

STILL_S = 10.0  # the mark stands still for so long: the item that holds it is named
LONGEST_LEFT_S = 99 * 86_400.0
LEAST_BAR, MOST_BAR = 8, 60


class Words(NamedTuple):
    """Text of one line in one style, as rich names styles."""

    text: str
    style: str = ""


Line = list[Words]


def lines(progress: Progress, width: int, *, earlier: Progress | None = None, ascii_only: bool = False) -> list[Line]:
    """The snapshot, for a live display.

    :param width: cells that a line may take, 1 or more.
    :param earlier: one from some seconds ago in the same run: rate and time left are of the time since then.
    :param ascii_only: the terminal can show nothing else.
    """
    more = "..." if ascii_only else "…"
    found = [*_bar(progress, earlier, width, ascii_only), *_fill(_counts(progress, earlier), width, more)]
    for text, style in _troubles(progress):
        found += _wrap(text, style, width, more)
    return found


def plain(progress: Progress, earlier: Progress | None = None) -> str:
    """The snapshot as one line of a log; see `lines`."""
    share, left = _share(progress), _left(progress, earlier)
    counts = [words.text for words in _counts(progress, earlier)]
    if share is not None:
        counts[0] += f" ({_percent(share)})"
    if left is not None:
        counts.insert(2, f"{left} left")
    return "; ".join([", ".join(counts), *(text for text, _ in _troubles(progress))])


def duration(seconds: float) -> str:
    """A time span for people, in its two largest units, rounded down.

    :param seconds: negative counts as 0.
    """
    whole = max(0, math.floor(seconds))
    minutes, hours, days = whole // 60, whole // 3_600, whole // 86_400
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{minutes} min {whole % 60:02} s"
    if whole < 86_400:
        return f"{hours} h {minutes % 60:02} min"
    return f"{days} d {hours % 24} h"


def seen_worker(seen: Seen) -> str:
    """A process of a cluster, in words."""
    rate = f"{seen.items_per_s:,.1f} items a second"
    return f"{seen.state}, {seen.chunks:,} chunks, {seen.items:,} items, {rate}, seen {seen.last_seen_s:.1f} s ago"


def _percent(share: float) -> str:
    return f"{math.floor(share * 1_000) / 10:.1f} %"


def _share(progress: Progress) -> float | None:
    """The share that is done, 0 to 1; an input that changed its size under us can tell more, or less."""
    if progress.share is None or math.isnan(progress.share):
        return None
    return min(1.0, max(0.0, progress.share))


def _stands_still(progress: Progress) -> bool:
    return progress.held_by is not None and progress.held_s >= STILL_S


def _left(progress: Progress, earlier: Progress | None) -> str | None:
    left = progress.since(earlier if earlier is not None and earlier.share is not None else None).remaining_s
    if left is None or not left <= LONGEST_LEFT_S or progress.paused or _stands_still(progress):
        return None
    return duration(round(left))


def _rate(progress: Progress, earlier: Progress | None) -> str:
    items_per_s = progress.since(earlier).items_per_s
    if items_per_s >= 10:
        return f"{items_per_s:,.0f} a second"
    if items_per_s >= 1 or items_per_s == 0:
        return f"{items_per_s:.1f} a second"
    return f"{items_per_s * 60:.1f} a minute"


def _counts(progress: Progress, earlier: Progress | None) -> list[Words]:
    found = [
        Words(f"{progress.finished:,} finished", "bold"),
        Words(_rate(progress, earlier)),
        Words(f"mark {progress.mark:,}"),
    ]
    if progress.ahead:
        found.append(Words(f"{progress.ahead:,} ahead of it"))
    if progress.retries:
        found.append(Words(f"{progress.retries:,} {'retry' if progress.retries == 1 else 'retries'}", "yellow"))
    if progress.failed:
        found.append(Words(f"{progress.failed:,} failed", "red"))
    if progress.waiting:
        found.append(Words(f"{progress.waiting:,} waiting", "yellow"))
    if progress.workers:
        working = sum(seen.state == "works" for seen in progress.workers)
        of_all = "" if working == len(progress.workers) else f" of {len(progress.workers)}"
        found.append(Words(f"{working}{of_all} workers", "yellow" if of_all else ""))
    return found


def _troubles(progress: Progress) -> list[Words]:
    """What holds the run up: a pause, or else the item at the mark."""
    if progress.paused:
        return [Words(f"paused: {progress.paused}", "yellow")]
    if _stands_still(progress):
        held = f"item {progress.held_by:,} holds the mark for {duration(progress.held_s)}"
        return [Words(f"{held}, attempt {progress.held_attempt}", "yellow")]
    return []


def _bar(progress: Progress, earlier: Progress | None, width: int, ascii_only: bool) -> list[Line]:
    """Percent, a bar and the time left, as far as they are known and fit."""
    share, left = _share(progress), _left(progress, earlier)
    if share is None:
        return []
    percent, end = f"{_percent(share):>7}", "" if left is None else f"{left} left"
    room = min(MOST_BAR, width - len(percent) - len(end) - (2 if end else 1))
    if room < LEAST_BAR:
        return _fill([Words(percent.lstrip(), "bold"), *([Words(end)] if end else [])], width, "")
    full, empty = "#-" if ascii_only else "━─"
    done = math.floor(share * room)
    bar = [Words(f"{percent} ", "bold"), Words(full * done, "green"), Words(empty * (room - done), "dim")]
    return [[*bar, Words(f" {end}")] if end else bar]


def _fill(pieces: Iterable[Words], width: int, more: str) -> list[Line]:
    """The pieces with commas between, as many on a line as fit."""
    found: list[Line] = []
    used = 0
    for text, style in pieces:
        cells = cell_len(text)
        if found and used + 2 + cells < width:  # one cell more for the comma that may follow
            found[-1] += [Words(", "), Words(text, style)]
            used += 2 + cells
            continue
        if found and used < width:
            found[-1].append(Words(","))
        found.append([Words(_cut(text, width, more), style)])
        used = min(cells, width)
    return found


def _wrap(text: str, style: str, width: int, more: str) -> list[Line]:
    """The text between words, over as many lines as it takes."""
    found = [""]
    for word in text.split():
        longer = f"{found[-1]} {word}".lstrip()
        if cell_len(longer) <= width:
            found[-1] = longer
        else:
            found.append(_cut(word, width, more))
    return [[Words(line, style)] for line in found if line]


def _cut(text: str, width: int, more: str) -> str:
    """The text in no more cells than that; a character of two cells is never cut in halves."""
    if cell_len(text) <= width:
        return text
    end = more[:width]
    return set_cell_size(text, width - cell_len(end)).rstrip() + end
