"""What the crash test of a job has found: values, and what is said of them. No clock, no file, no process."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

import msgspec

from .checkpoint import JSON
from .errors import shorten

SHOWN = 10  # of a list that may be long; all of it is in the JSON


class Difference(msgspec.Struct, frozen=True):
    """Where two outputs part.

    :ivar index: of the item whose records differ; None if that can not be told.
    :ivar first: its record in the first output; None where that one has ended already.
    :ivar second: and in the second.
    """

    index: int | None
    first: str | None
    second: str | None

    def __str__(self) -> str:
        at = "" if self.index is None else f"item {self.index}: "
        return f"{at}{self.first or 'nothing'} / {self.second or 'nothing'}"


class Kill(msgspec.Struct, frozen=True):
    """One job that was killed and resumed until it was complete.

    :ivar kind: ``"boundary"`` or ``"random"``.
    :ivar where: for each kill, the step that the process had reached; a random one fell after it.
    :ivar ran_again: indices of the items that ran in more than one of its processes.
    :ivar lost_s: seconds that a kill cost: those of all its processes beyond those of an undisturbed run.
    :ivar problem: what was wrong in the end, or None.
    """

    kind: str
    where: list[str]
    ran_again: list[int]
    lost_s: float
    problem: str | None


class RanTwice(msgspec.Struct, frozen=True):
    """An item that ran again after a kill.

    :ivar runs: in how many processes of one job it ran, at most.
    :ivar jobs: how many jobs had it run again.
    """

    index: int
    item: str
    runs: int
    jobs: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the crash test of a job has found.

    :ivar items: how many items each run had.
    :ivar all_items: whether the input has no more than these.
    :ivar undisturbed_s: seconds that a run takes that nobody kills.
    :ivar boundaries: at how many boundaries of commits a kill is possible.
    :ivar boundaries_taken: at how many of them one was tried.
    :ivar not_met: of those, how many the run did not come by again: it commits by time, too.
    :ivar random_wanted: how many kills at random moments there should have been.
    :ivar seed: of the random moments.
    :ivar kills: the jobs that were killed.
    :ivar deterministic: whether two undisturbed runs gave the same output.
    :ivar difference: where they parted, if they did.
    :ivar ran_twice: the items that ran again after a kill. No finding: a worker has to bear that.
    :ivar lost_s_median: seconds that a kill cost.
    :ivar lost_s_most: and at most.
    :ivar problems: the findings, in words.
    """

    items: int
    all_items: bool
    undisturbed_s: float
    boundaries: int
    boundaries_taken: int
    not_met: int
    random_wanted: int
    seed: int
    kills: list[Kill]
    deterministic: bool
    difference: Difference | None
    ran_twice: list[RanTwice]
    lost_s_median: float
    lost_s_most: float
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """All of it in one line."""
        count = sum(len(kill.where) for kill in self.kills)
        if self.problems:
            return f"NOT all right, findings: {len(self.problems)}"
        if not count:
            return "nothing was found, but nothing was killed"
        again = "" if not self.ran_twice else ". Items can run again after a crash: see that the worker bears it"
        return f"all right: {count} kills, and each time the finished output was the undisturbed one{again}"

    def __str__(self) -> str:
        rows = [
            ("items", f"{self.items}, " + ("all of them" if self.all_items else "the first of the input")),
            ("undisturbed", f"{self.undisturbed_s:.2f} s"),
            ("deterministic", self._determinism()),
            ("kills", self._count("boundary", f"at boundaries of commits{self._cap()}")),
            ("", self._count("random", f"of {self.random_wanted} at random moments (seed {self.seed})")),
            *([("", f"  before or after {self._places()}")] if self.boundaries_taken else []),
            ("ran again", self._again()),
            *(
                (
                    "",
                    f"  item {item.index} ({item.item}): {item.runs} runs in one job, again in {item.jobs} of the jobs",
                )
                for item in self.ran_twice[:SHOWN]
            ),
            ("time lost", f"{self.lost_s_median:.2f} s for a kill in the median, {self.lost_s_most:.2f} s at most"),
            *(("FOUND", problem) for problem in self.problems[:SHOWN]),
        ]
        if len(self.problems) > SHOWN:
            rows.append(("FOUND", f"and {len(self.problems) - SHOWN} more, of which the JSON has all"))
        rows.append(("verdict", self.verdict))
        return "\n".join(f"{subject:<14} {text}" for subject, text in rows)

    def as_json(self) -> dict[str, JSON]:
        """Everything, for machines."""
        return {"ok": self.ok, "verdict": self.verdict, **msgspec.to_builtins(self)}

    def _determinism(self) -> str:
        if self.difference is None:
            return "yes: two undisturbed runs gave the same output"
        return f"NO: two undisturbed runs differ, first at {self.difference}"

    def _count(self, kind: str, what: str) -> str:
        return f"{sum(len(kill.where) for kill in self.kills if kill.kind == kind)} {what}"

    def _cap(self) -> str:
        left = self.boundaries - self.boundaries_taken
        missed = f"; {self.not_met} were not met again" if self.not_met else ""
        if not left:
            return f", every one that there is{missed}"
        return f"; NOT ALL were taken: {left} of {self.boundaries} were left out (--boundaries){missed}"

    def _places(self) -> str:
        """What was under way at the boundaries: operations, or the files of a ledger's own lines."""
        places = Counter(
            re.split(" of |:", where.removeprefix("before ").removeprefix("after "))[0]
            for kill in self.kills
            if kill.kind == "boundary"
            for where in kill.where
        )
        return ", ".join(f"{place} ({count})" for place, count in sorted(places.items()))

    def _again(self) -> str:
        if not self.ran_twice:
            return "no item"
        more = f"; the first {SHOWN}" if len(self.ran_twice) > SHOWN else ""
        return f"{len(self.ran_twice)} items, each in flight or not yet committed when the process died{more}"


def chosen(steps: Sequence[str], most: int) -> list[int]:
    """At which of the steps to kill: each kind of step once as far as that goes, then others, spread evenly."""
    places: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        places.setdefault(step, []).append(number)
    taken = _spread(sorted(numbers[len(numbers) // 2] for numbers in places.values()), most)
    rest = sorted(set(range(len(steps))) - set(taken))
    return sorted(taken + _spread(rest, most - len(taken)))


def _spread(numbers: list[int], most: int) -> list[int]:
    if len(numbers) <= most:
        return numbers
    return [numbers[place * len(numbers) // most] for place in range(most)]


def first_difference(first: Sequence[bytes], second: Sequence[bytes]) -> Difference | None:
    """Where two outputs part, as lists of their records."""
    for number in range(max(len(first), len(second))):
        pair = [records[number] if number < len(records) else None for records in (first, second)]
        if pair[0] != pair[1]:
            index = next((found for record in pair if record and (found := index_of(record)) is not None), None)
            return Difference(index, *(None if record is None else text_of(record) for record in pair))
    return None


def index_of(record: bytes) -> int | None:
    """The index in a record; None for what is none, such as the brackets of an array."""
    try:
        return msgspec.json.decode(record.strip(b", \n"), type=_Indexed).index
    except msgspec.DecodeError:
        return None


class _Indexed(msgspec.Struct):
    index: int


def text_of(record: bytes) -> str:
    """A record for people, on one line, not too long."""
    text = record.decode(errors="backslashreplace").strip(", \n")
    return text if len(text) <= 200 else text[:199] + "…"


def gaps(records: Iterable[bytes], items: int) -> str | None:
    """Which items have no record, or more than one; None if each has its own."""
    counts = Counter(index for record in records if (index := index_of(record)) is not None)
    missing = [index for index in range(items) if not counts[index]]
    doubled = [index for index, count in counts.items() if count > 1 or index >= items]
    found = [f"{word} {shown(indices)}" for word, indices in (("no record of", missing), ("twice", doubled)) if indices]
    return ", ".join(found) or None


def effects_differ(first: object, second: object) -> str:
    """How side effects differ: the lines or entries that are too many and too few, where they have such."""
    before, now = _entries(first), _entries(second)
    if before is None or now is None:
        return f"{shorten(first)} / {shorten(second)}"
    found = [
        f"{more.total()} too {word} ({', '.join(list(more.elements())[:SHOWN])}{', …' if more.total() > SHOWN else ''})"
        for word, more in (("many", now - before), ("few", before - now))
        if more
    ]
    return ", ".join(found) or "the same in another order"


def _entries(effects: object) -> Counter[str] | None:
    if isinstance(effects, str):
        return Counter(effects.splitlines())
    return Counter(map(shorten, effects)) if isinstance(effects, list | tuple) else None


def shown(indices: Sequence[int]) -> str:
    """Some indices for people."""
    listed = ", ".join(map(str, indices[:SHOWN]))
    return f"item{'s' if len(indices) > 1 else ''} {listed}" + (
        f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else ""
    )


def costs(kills: Iterable[Kill]) -> tuple[float, float]:
    """Median and most of what a kill cost, in seconds."""
    lost = [kill.lost_s for kill in kills if kill.where]
    return (round(median(lost), 3), round(max(lost), 3)) if lost else (0.0, 0.0)
