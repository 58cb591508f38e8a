"""Kills jobs whose items fail, at random moments, and checks what the log of the worker and the journal say.

What must hold of the attempts of an item follows from one fact: a commit takes the state at one moment, so what the
journal holds after a kill are the effects of all that happened in that life before some event of the log, and of
nothing after it. All but those events were lost with the kill, and an item may have them again.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil

import msgspec

from tests.support.commands import Committed, Ended, Folder, read_committed, wait_until
from tests.support.failing_jobs import (
    ATTEMPTS,
    LOG,
    MODULE,
    Event,
    count_of_events,
    fails_for_good,
    read_events,
)

from .forks import Fork, Inside, Prepare, nothing, quick_folder
from .killer import SIGKILLED, Forked

RECORDED = 3
SECOND = 10**9
ROUNDING = 10**3  # the log has nanoseconds, the loop's clock is a float
EARLY_COMPACTION_BYTES = 4096
UNUSED_BOUNDS = ("--max-failures", "50%", "--timeout", "100", "--deadline", "1000")
BURST = 40  # two of them, one before a kill and one after it, are more than the rate


@dataclass(frozen=True)
class Job:
    """A job to be killed.

    :ivar counts_all: whether each failure counts, as it does where there is no breaker.
    :ivar compacts: whether the journal is written anew after a few KiB already.
    :ivar share: of all kills.
    """

    items: int
    output: str
    concurrency: int
    words: tuple[str, ...]
    rate: int | None = None
    counts_all: bool = True
    compacts: bool = False
    share: float = 0.2375

    def line(self, *, limited: bool) -> list[str]:
        words = ["run", "--input", "items.txt", "--output", self.output, "--worker", "jobs:worker"]
        words += ["--concurrency", str(self.concurrency), "--retries", str(ATTEMPTS - 1)]
        words += ["--retry-initial", "0.02", "--retry-maximum", "0.1", "--on-error", "record", *self.words]
        return words + (["--rate", str(self.rate), "--burst", str(BURST)] if self.rate and limited else [])


JOBS = [
    Job(1500, "out.jsonl", 16, ("--checkpoint-interval", "0.02", "--breaker", "0")),
    Job(
        1200,
        "out.json",
        12,
        ("--checkpoint-interval", "0.05", "--breaker", "0", "--window", "64", "--batch-size", "10", *UNUSED_BOUNDS),
        compacts=True,
    ),
    Job(800, "out.jsonl", 40, ("--checkpoint-interval", "0", "--breaker", "0", "--timeout", "100")),
    Job(1000, "out.jsonl", 16, ("--checkpoint-interval", "0.02", "--breaker", "3"), counts_all=False),
    Job(120, "out.jsonl", 20, ("--checkpoint-interval", "0.03", "--breaker", "0"), rate=60, share=0.05),
]


@dataclass
class Tally:
    """What the kills met.

    :ivar begun: attempts, and `lost` those that kills took with them, before or after their end.
    :ivar ended: processes that came to their end by themselves.
    :ivar met: how many kills met a process before its first attempt, at work, and after all items had begun; and how
        many left spent attempts behind.
    """

    kills: int = 0
    items: int = 0
    begun: int = 0
    lost: int = 0
    failed: int = 0
    pauses: int = 0
    ended: int = 0
    met: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        mine, others = vars(self), vars(other)
        return Tally(**{name: value + others[name] for name, value in mine.items()})

    def __str__(self) -> str:
        met = ", ".join(f"{count} {name}" for name, count in sorted(self.met.items()))
        return (
            f"{self.kills} kills ({met}); {self.begun} attempts of {self.items} items, {self.failed} of which failed "
            f"for good; {self.lost} attempts lost with a kill, {self.pauses} pauses, {self.ended} processes that ended"
        )


class Killer:
    """Kills one job at random moments, round after round, and checks what each kill leaves.

    :param mutant: puts a defect into each process that is to be killed.
    """

    def __init__(self, folder: Folder, job: Job, seed: str, mutant: Prepare = nothing) -> None:
        self.folder, self.job, self.mutant = folder, job, mutant
        self.dice = random.Random(seed)
        self.log, self.output = folder / LOG, folder / job.output
        self.journal = folder / f"{job.output}.checkpoint"
        self.bad = frozenset(filter(fails_for_good, range(job.items)))
        self.tally = Tally()
        folder.write("jobs.py", MODULE)
        folder.write_items(job.items)
        self.expected, self.start_s = self._undisturbed()

    def run(self, kills: int) -> Tally:
        while self.tally.kills < kills:
            self._round(kills)
        return self.tally

    def _round(self, kills: int) -> None:
        """The job, from its first process to its finished output."""
        self.committed, self.events, self.lost = Committed(), list[Event](), Counter[int]()
        while not self._is_published():
            process = self._start(1.0, self.mutant)
            if self.tally.kills < kills:
                time.sleep(self._moment(process))
                ended = process.kill()
            else:
                ended = process.end()
            self._check_life(ended)
        self._check_finished()
        self.output.unlink()
        self.log.unlink()

    def _start(self, slowness: float, mutant: Prepare = nothing, *, limited: bool = True) -> Forked:
        def prepare(inside: Inside) -> None:
            os.environ["SLOWNESS"] = str(slowness)
            if self.job.compacts:
                from async_recovery import checkpoint

                checkpoint.COMPACT_ABOVE_DEAD_BYTES = EARLY_COMPACTION_BYTES
            mutant(inside)

        return Forked(Fork(self.folder.path, self.job.line(limited=limited), prepare))

    def _undisturbed(self) -> tuple[bytes, float]:
        """The output of a job that nobody kills; and the seconds to its first attempt."""
        began = time.monotonic()
        process = self._start(0, limited=False)
        self._wait_for(process, 1)
        start_s = time.monotonic() - began
        self._check_summary(process.end())
        expected = self.output.read_bytes()
        lines = expected.splitlines() if self.output.suffix == ".jsonl" else msgspec.json.decode(expected)
        records = [msgspec.json.decode(line) if isinstance(line, bytes) else line for line in lines]
        assert [record["index"] for record in records] == list(range(self.job.items))
        assert {record["index"] for record in records if "error" in record} == self.bad
        self.output.unlink()
        self.log.unlink()
        return expected, start_s

    def _wait_for(self, process: Forked, begun: int) -> None:
        wait_until(lambda: count_of_events(self.log) >= begun or process.has_ended)

    def _moment(self, process: Forked) -> float:
        """Seconds to wait before the kill."""
        if self.dice.random() < 0.15:
            return self.dice.uniform(0, self.start_s)
        self._wait_for(process, len(self.events) + 1)
        return self.dice.uniform(0, 0.5 if self.job.rate else 0.25)

    def _is_published(self) -> bool:
        return self.output.exists() and not self.journal.exists()

    # What must hold

    def _check_life(self, ended: Ended) -> None:
        assert ended.code in (RECORDED, SIGKILLED), ended.err
        before, now, published = self.committed, read_committed(self.journal), self._is_published()
        if published:
            now = Committed(mark=self.job.items, failed=len(self.bad))
        life = read_events(self.log, len(self.events))
        self.events += life
        check_attempts(life, before, now, self.lost, counts_all=self.job.counts_all)
        check_pauses(life)
        if self.job.rate:
            check_rate((event.moment for event in self.events if event.kind == "S"), self.job.rate)
        assert now.mark >= before.mark, "the mark went back"
        assert all(map(now.has, before.ahead)), "what was committed ahead of the mark is lost"
        assert now.failed == sum(index < now.mark for index in self.bad), "recorded failures are miscounted"
        if ended.code == RECORDED:
            self._check_summary(ended)
        else:
            self.tally.kills += 1
            self.tally.met["before an attempt" if not life else "at the end" if self._all_done else "at work"] += 1
            self.tally.met["with spent attempts"] += bool(now.spent)
        self.committed = now

    @property
    def _all_done(self) -> bool:
        return len({event.item for event in self.events}) == self.job.items

    def _check_summary(self, ended: Ended) -> None:
        assert ended.code == RECORDED, ended.err
        assert ended.summary["failed"] == len(self.bad), "the summary miscounts the recorded failures"
        assert ended.summary["processed"] == self.job.items
        self.tally.ended += 1

    def _check_finished(self) -> None:
        assert self.output.read_bytes() == self.expected, "the output differs from that of an undisturbed run"
        begun = counts_of(self.events, "S") - counts_of(self.events, "P")
        if self.job.counts_all:
            for item, count in begun.items():
                allowed = ATTEMPTS + self.lost[item]
                assert count <= allowed, f"item {item}: {count} attempts, {allowed} were allowed"
                assert count == allowed or item not in self.bad, f"item {item} was given up after {count} attempts"
        self.tally.items += self.job.items
        self.tally.begun += begun.total()
        self.tally.lost += self.lost.total()
        self.tally.failed += len(self.bad)
        self.tally.pauses += counts_of(self.events, "P").total()


def counts_of(events: Iterable[Event], kind: str) -> Counter[int]:
    return Counter(event.item for event in events if event.kind == kind)


def check_attempts(
    life: list[Event], before: Committed, now: Committed, lost: Counter[int], *, counts_all: bool
) -> None:
    """Of the events of one life, between what was committed before it and what is after it.

    :param lost: attempts that kills have taken with them, by item; those of this life are added.
    """
    for item, kinds in kinds_of(life).items():
        assert not before.has(item), f"item {item} was committed, and began again"
        assert is_sequence(kinds), f"item {item}: {kinds} is no sequence of attempts"
    if not counts_all:
        assert all(dict(now.spent).get(item, 0) >= count or now.has(item) for item, count in before.spent)
        return
    begun, failed, kept = counts_of(life, "S") - counts_of(life, "P"), Counter(dict(before.spent)), []
    for item, count in begun.items():
        left = ATTEMPTS - dict(before.spent).get(item, 0)
        assert count <= left, f"item {item} began {count} attempts, {left} were left"
    for event in life:
        failed[event.item] += event.kind == "F"
        is_over = event.kind == "D" or failed[event.item] == ATTEMPTS
        if event.kind in "DF":
            spent = dict(now.spent).get(event.item, 0)
            kept.append((event, now.has(event.item) or (not is_over and spent >= failed[event.item])))
    cut = next((number for number, (_, is_kept) in enumerate(kept) if not is_kept), len(kept))
    holes = [event for event, is_kept in kept[cut:] if is_kept]
    assert not holes, f"{holes[0]} is in the journal, {kept[cut][0]} before it is not"
    kept_events = [event for event, _ in kept[:cut]]
    spent_then = Counter(dict(before.spent)) + counts_of(kept_events, "F")
    expected = {item: count for item, count in spent_then.items() if not now.has(item)}
    assert dict(now.spent) == expected, f"spent: {dict(now.spent)}, from the log {expected}"
    lost.update(begun - Counter(event.item for event in kept_events))


def kinds_of(life: list[Event]) -> dict[int, str]:
    """What happened to each item, in order."""
    kinds: defaultdict[int, str] = defaultdict(str)
    for event in life:
        kinds[event.item] += event.kind
    return kinds


def is_sequence(kinds: str) -> bool:
    """Whether one attempt follows the other, each has its end but the last, and none follows a success."""
    rest = kinds.replace("SF", "").replace("SP", "")
    return rest in ("", "S", "SD")


def check_pauses(life: list[Event]) -> None:
    """While a pause lasts, no attempt begins."""
    until = 0
    for event in life:
        if event.kind == "S":
            assert event.moment >= until - ROUNDING, f"{event} is in a pause that lasts until {until}"
        elif event.kind == "P":
            until = max(until, event.moment + event.pause_ms * SECOND // 1000)


def check_rate(begins: Iterable[int], per_second: float) -> None:
    """In no half-open second, more attempts begin."""
    moments, most = sorted(begins), ceil(per_second)
    for first, beyond in zip(moments, moments[most:], strict=False):
        found = f"{most + 1} attempts within {(beyond - first) / SECOND} s"
        assert beyond - first >= SECOND - ROUNDING, f"{found}, the rate is {per_second}"


def kill_job(seed: str, kills: int, number: int, mutant: Prepare = nothing) -> Tally:
    """Its share of that many kills, for the job of that number.

    :raises AssertionError: if one of them breaks an invariant.
    """
    with quick_folder() as path, Folder(path) as folder:
        return Killer(folder, JOBS[number], f"{seed}-{number}", mutant).run(ceil(kills * JOBS[number].share))
