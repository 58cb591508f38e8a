"""Layer 4: schedules of the real engine over a ledger in memory; all of them where small, by dice beyond.

A schedule's id is ``4/family/choices`` (every schedule of a family has its own), ``4/seed/number`` or, with a crash,
``5/seed/number``. Replay it, with the name of a mutant (``engine_mutants.py``) if it was one that was caught::

    .venv/bin/python -m tests.proof.schedules replay 4/eight-on-four/2.0.1
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import NamedTuple

from async_recovery.checkpoint import Commit
from async_recovery.errors import StorageFailed
from tests.support.memory_ledger import MemoryLedger, Store

from .engine_mutants import MUTANTS, mutated
from .explorer import Violation
from .scheduled_loop import Choices, ScheduledLoop
from .scheduled_run import CANCELLATIONS, TEAR_DOWN, ScheduledRun, choices_id, small_and_silent
from .witness import ALL_BYTES, NEVER_S, Past, Plan

MOST_LIVES = 6
SEEDS_OF_MUTANTS = 3_000


class ScheduledLedger(MemoryLedger):
    """The ledger in memory, whose every call ends when the explorer says so.

    :param fallible: whether a commit may fail, with and without being durable.
    """

    def __init__(
        self, store: Store, loop: ScheduledLoop, *, fallible: bool = False, interruptible: bool = False
    ) -> None:
        super().__init__(store, interruptible=interruptible)
        self._loop = loop
        self._fallible = fallible
        self._fails = False

    async def _wait(self, call: str) -> None:
        if call == "audit":  # it can be cancelled
            await self._loop.moment(call)
            return
        failures = ("!commit fails, lost", "!commit fails, kept") if self._fallible and call == "commit" else ()
        chosen = await self._loop.job(call, *failures, interruptible=self._interruptible)
        self._fails = chosen in failures
        if chosen.endswith("lost"):
            raise StorageFailed("as the explorer says")

    async def commit(self, commit: Commit) -> None:
        await super().commit(commit)
        if self._fails:
            raise StorageFailed("as the explorer says")


class Family(NamedTuple):
    """Schedules that are all enumerated.

    :ivar cancelled: one cancellation, of each kind, can happen anywhere.
    :ivar drained: after it, every order of what follows (a second native cancellation too); otherwise one, by dice.
    :ivar resumed: every order of the resume as well; otherwise one, by dice.
    :ivar together: several moments can end in the same round of the loop.
    :ivar pieces: choices of which every combination is explored on its own, maybe in another process.
    """

    name: str
    plan: Plan
    cancelled: bool = False
    drained: bool = False
    resumed: bool = False
    together: bool = False
    pieces: int = 2


class Piece(NamedTuple):
    """Those schedules of a family that begin with the same choices."""

    family: str
    first: tuple[int, ...]
    mutant: str | None = None


@dataclass
class Tally:
    """What was explored.

    :ivar schedules: different ones; `lives`: runs, resumes included.
    :ivar orders: the different orders in which the items ended, with the family.
    """

    schedules: int = 0
    lives: int = 0
    orders: set[tuple[str, ...]] = field(default_factory=set)
    violations: list[str] = field(default_factory=list)

    def __iadd__(self, other: Tally) -> Tally:
        self.schedules += other.schedules
        self.lives += other.lives
        self.orders |= other.orders
        self.violations += other.violations
        return self


FAMILIES = [
    Family("eight-on-four", Plan(8, 4, window=12)),
    Family("commit-after-each", Plan(4, 3, batch_size=1)),
    Family("small-window", Plan(6, 3, window=3)),
    Family("few-bytes", Plan(5, 3, max_buffer_bytes=30)),
    Family("awaited-items", Plan(4, 2, batch_size=2, source="async")),
    Family("text", Plan(5, 2, batch_size=2, source="text")),
    Family("together", Plan(4, 3, batch_size=2), together=True),
    Family("together-in-a-window", Plan(4, 2, window=2), together=True),
    Family("cancelled", Plan(6, 4, window=12), cancelled=True),
    Family("cancelled-and-drained", Plan(4, 2, window=12), cancelled=True, drained=True),
    Family("cancelled-and-resumed", Plan(3, 2, source="text"), cancelled=True, drained=True, resumed=True),
]
LONG_FAMILIES = [
    *(Family(f"eight-on-four-in-{n}", Plan(8, 4, window=n), pieces=3) for n in (4, 5, 6, 8, 10)),
    Family("five-on-three-commit-after-each", Plan(5, 3, batch_size=1), pieces=3),
    Family("six-on-three-in-few-bytes", Plan(6, 3, max_buffer_bytes=60), pieces=3),
    Family("six-on-four-commit-after-each", Plan(6, 4, batch_size=1), pieces=3),
    Family("seven-on-three-commit-after-each", Plan(7, 3, batch_size=1), pieces=3),
    Family("more-awaited-items", Plan(6, 2, batch_size=2, source="async"), pieces=3),
    Family("more-text", Plan(7, 2, batch_size=2, source="text"), pieces=3),
    Family("more-together", Plan(5, 3, batch_size=2), together=True, pieces=3),
    Family("six-on-four-drained", Plan(6, 4, window=12), cancelled=True, drained=True, pieces=3),
    Family("four-on-two-resumed", Plan(4, 2, batch_size=2), cancelled=True, drained=True, resumed=True, pieces=3),
    Family("three-on-two-resumed", Plan(3, 2, batch_size=1), cancelled=True, drained=True, resumed=True, pieces=3),
]


def schedule(family: Family, given: Sequence[int], story: list[str] | None = None) -> tuple[Choices, int]:
    """Live one schedule of a family, and what follows it until the output is there.

    :param story: what happens is told there.
    :returns: the choices, and how many lives it took.
    """
    choices, store, past, story = Choices(given), Store(), Past(), [] if story is None else story
    deciding = choices
    for life in range(MOST_LIVES):
        loop = ScheduledLoop(deciding, together=family.together)
        kinds = CANCELLATIONS if family.cancelled and life == 0 else ()
        then = None if family.drained else partial(by_dice, choices)
        run = ScheduledRun(family.plan, past, loop, ScheduledLedger(store, loop), kinds=kinds, then=then)
        story.append(f"life {life}")
        loop.story = story
        try:
            past = run.live(partial(_published, store, run))
        except Violation as violation:
            raise Violation(f"4/{family.name}/{choices_id(choices)}: {violation}") from violation
        if store.published is not None:
            return choices, life + 1
        if not family.resumed:
            deciding = by_dice(choices)
    raise Violation(f"4/{family.name}/{choices_id(choices)}: not done after {MOST_LIVES} lives")


def by_dice(choices: Choices) -> Choices:
    """What goes on from there by dice, which are the same each time."""
    return Choices((), Random(choices_id(choices)))


def _published(store: Store, run: ScheduledRun) -> bool:
    """What the store holds fits what the witness has seen."""
    past, records = run.witness.past, run.witness.items.records
    if store.published is not None and store.published != records:
        run.loop.fail(f"I1: published is {store.published}")
    as_told = store.records == records[: past.mark] and store.committed == past.committed
    sure = run.witness.resumed_from is not None and not run.witness.poisoned
    if store.published is None and sure and not as_told:
        run.loop.fail(f"I4: the store holds {store.records} and {store.ahead} after {past}")
    if store.locked:
        run.loop.fail("P7: the lock is left behind")
    return store.published is not None


def family_of(name: str) -> Family:
    """The family of that name."""
    return next(family for family in [*FAMILIES, *LONG_FAMILIES] if family.name == name)


def explore(piece: Piece) -> Tally:
    """Every schedule of the piece; stops at the first violation."""
    family = family_of(piece.family)
    tally = Tally()
    given: Sequence[int] | None = piece.first
    with small_and_silent(), mutated(piece.mutant):
        while given is not None:
            story: list[str] = []
            try:
                choices, lives = schedule(family, given, story)
            except Violation as violation:
                tally.violations.append(str(violation))
                break
            tally.schedules += 1
            tally.lives += lives
            tally.orders.add((family.name, *(label for label in story if label.startswith("item "))))
            given = choices.following(len(piece.first))
    return tally


def pieces(family: Family) -> Iterator[Piece]:
    """The family in pieces."""
    firsts: list[tuple[int, ...]] = [()]
    for at in range(family.pieces):
        longer: list[tuple[int, ...]] = []
        for first in firsts:
            with small_and_silent():
                counts = schedule(family, first)[0].counts
            longer += [(*first, choice) for choice in range(counts[at])] if len(counts) > at else [first]
        firsts = longer
    return (Piece(family.name, first) for first in firsts)


class Seeds(NamedTuple):
    """Seeds from `first` on, each a job that is lived through to its end."""

    first: int
    jobs: int
    mutant: str | None = None


def drawn_plan(dice: Random, items: int, source: str) -> Plan:
    """How one process runs a job."""
    return Plan(
        items,
        concurrency=dice.randint(1, 6),
        window=dice.choice([1, 2, 3, 5, 8, 100, 100]),
        max_buffer_bytes=dice.choice([1, 50, 100, ALL_BYTES, ALL_BYTES]),
        batch_size=dice.choice([None, 1, 2, 3, 5]),
        interval_s=dice.choice([0, 0.5, 3.0, NEVER_S, NEVER_S, NEVER_S]),
        drain_s=dice.choice([0.0, 1.0]),
        source=source,
    )


def live_by_dice(seed: int, story: list[str] | None = None) -> int:
    """A job of that seed, until its output is there.

    :param story: what happens is told there.
    :returns: how many lives it took.
    """
    dice, store, past, story = Random(seed), Store(), Past(), [] if story is None else story
    items, source = dice.choice([0, 1, 2, *range(3, 14)]), dice.choice(["list", "async", "text"])
    for life in range(MOST_LIVES):
        last = life >= 2 or dice.random() < 0.4
        kinds = () if last else dice.sample(CANCELLATIONS, 1)
        loop = ScheduledLoop(Choices((), dice), together=dice.random() < 0.3, haste=dice.choice([0, 0, 0.1, 0.3]))
        loop.lapses = dice.choice([0, 0, 1, 4])
        fallible = not last and dice.random() < 0.3
        ledger = ScheduledLedger(
            store,
            loop,
            fallible=not last and dice.random() < 0.3,
            interruptible=TEAR_DOWN in kinds and dice.random() < 0.3,
        )
        plan = drawn_plan(dice, items, source)
        run = ScheduledRun(plan, past, loop, ledger, kinds=kinds, fallible=fallible)
        story.append(f"life {life}: {plan}")
        loop.story = story
        try:
            past = run.live(partial(_published, store, run))
        except Violation as violation:
            raise Violation(f"4/seed/{seed}: {violation}") from violation
        if store.published is not None:
            return life + 1
    raise Violation(f"4/seed/{seed}: not done after {MOST_LIVES} lives")


def live_by_seeds(seeds: Seeds) -> Tally:
    """Each seed's job; stops at the first violation."""
    tally = Tally()
    with small_and_silent(), mutated(seeds.mutant):
        for seed in range(seeds.first, seeds.first + seeds.jobs):
            try:
                tally.lives += live_by_dice(seed)
            except Violation as violation:
                tally.violations.append(str(violation))
                break
            tally.schedules += 1
    return tally


def first_violation(name: str) -> str:
    """The first violation that the mutant of that name causes; empty if there is none."""
    where = next(mutant.where for mutant in MUTANTS if mutant.name == name)
    if where == "seeds":
        return "".join(live_by_seeds(Seeds(0, SEEDS_OF_MUTANTS, name)).violations)
    return "".join(explore(Piece(where, (), name)).violations)


def replay(state: str, mutant: str | None = None) -> None:
    """Live one schedule again, and tell all that happens in it."""
    from .crashed_schedules import CrashedJob, scheduled_ledger  # they need this module

    layer, family, which = state.split("/")
    story: list[str] = []
    with scheduled_ledger() if layer == "5" else small_and_silent(), mutated(mutant):
        try:
            if layer == "5":
                CrashedJob(int(which), story, trusting=mutant is not None).live()
            elif family == "seed":
                live_by_dice(int(which), story)
            else:
                schedule(family_of(family), [int(choice) for choice in which.split(".") if choice != "-"], story)
            story.append("no violation")
        except Violation as violation:
            story.append(f"violation: {violation}")
    print("\n".join(story))


if __name__ == "__main__":
    replay(*sys.argv[2:])
