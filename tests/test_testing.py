"""The suites for authors of a `Ledger` or a `Source` of their own: what is wrong is noticed, by any test runner."""

from __future__ import annotations

import unittest
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from async_recovery import Ledger, Page, Source
from async_recovery.checkpoint import Bookmark, Checkpoint, Commit, Job
from async_recovery.contracts import RunSummary
from async_recovery.errors import AlreadyRunning
from async_recovery.testing import LedgerContract, SourceContract

from .support.memory_ledger import MemoryLedger, Store
from .test_house import modules_after


def failing(suite: Any) -> list[str]:
    """The tests of a suite that fail, each in a place of its own."""
    found = []
    for name in sorted(dir(suite)):
        if name.startswith("test_"):
            try:
                getattr(suite(), name)()
            except AssertionError:
                found.append(name.removeprefix("test_"))
    return found


def suite_of(ledger: type[MemoryLedger]) -> type[LedgerContract]:
    """The suite over such a ledger."""

    class Suite(LedgerContract):
        def __init__(self) -> None:
            self.store = Store()

        def make(self, **options: Any) -> Ledger:
            return ledger(self.store, **options)

        async def published(self) -> list[bytes] | None:
            return self.store.published

    return Suite


class WithoutLock(MemoryLedger):
    async def open(self, job: Job) -> Checkpoint:
        try:
            return await super().open(job)
        except AlreadyRunning:
            self._store.locked = False
            return await super().open(job)


class ForAnyJob(MemoryLedger):
    async def open(self, job: Job) -> Checkpoint:
        for line in (self._store.state, self._store.complete):
            if line is not None:
                job = line.job
        return await super().open(job)


class ForgetsAhead(MemoryLedger):
    async def commit(self, commit: Commit) -> None:
        await super().commit(commit)
        self._store.ahead = {}


class ForgetsSpent(MemoryLedger):
    async def commit(self, commit: Commit) -> None:
        await super().commit(msgspec.structs.replace(commit, spent=[]))


class PublishesEarly(MemoryLedger):
    async def commit(self, commit: Commit) -> None:
        await super().commit(commit)
        self._store.published = list(self._store.records)


class LosesRecords(MemoryLedger):
    async def finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        await super().finish(bookmark, summary)
        self._store.published = (self._store.published or [])[1:]


class KeepsNothing(MemoryLedger):
    async def finish(self, bookmark: Bookmark, summary: RunSummary) -> None:
        await super().finish(bookmark, summary)
        self._store.complete = None


class WithoutTransaction(MemoryLedger):
    """Records and what is ahead first, and the mark in a step of its own, which a cancellation can prevent."""

    async def commit(self, commit: Commit) -> None:
        self._interruptible = True
        before = self._store.state
        await super().commit(commit)
        after, self._store.state = self._store.state, before
        await self._wait("commit")
        self._store.state = after


LEDGERS: dict[type[MemoryLedger], str] = {
    WithoutLock: "one_run_at_a_time",
    ForAnyJob: "another_job_is_refused",
    ForgetsAhead: "each_commit_is_found_by_the_next_run",
    ForgetsSpent: "spent_attempts_are_found_until_their_item_is_finished",
    PublishesEarly: "nothing_is_published_before_the_finish",
    LosesRecords: "a_finished_job_is_published_and_starts_anew",
    KeepsNothing: "a_kept_checkpoint_tells_that_the_job_is_complete",
    WithoutTransaction: "a_cancelled_commit_is_there_or_not",
}


@pytest.mark.parametrize("ledger", LEDGERS)
def test_a_ledger_with_a_defect_fails_its_suite(ledger: type[MemoryLedger]) -> None:
    """Each defect is noticed by the test that is there for it; without one, nothing fails."""
    assert LEDGERS[ledger] in failing(suite_of(ledger))


class Numbers:
    """Fifty numbers in pages of ten, each page at its index."""

    kind = "numbers"
    path: str | None = None

    async def pages(self, position: Any) -> AsyncIterator[Page]:
        for first in range(position or 0, 51, 10):
            items = list(range(first, min(first + 10, 50)))
            yield Page(first, items, items)

    async def check(self, position: Any, *, whole: bool) -> None:
        pass

    def share(self, position: Any) -> float | None:
        return (position or 0) / 50


class StartsTooLate(Numbers):
    async def pages(self, position: Any) -> AsyncIterator[Page]:
        async for page in super().pages(position):
            if page.position != position or not page.items:
                yield page


class HasNoEnd(Numbers):
    async def pages(self, position: Any) -> AsyncIterator[Page]:
        async for page in super().pages(position):
            if page.items:
                yield page


class Falls(Numbers):
    def share(self, position: Any) -> float | None:
        return 1 - super().share(position)  # type: ignore[operator]


def suite_of_numbers(source: type[Numbers], **traits: Any) -> type[SourceContract]:
    """The suite over such a source."""

    class Suite(SourceContract):
        def make(self) -> Source:
            return source()

    for name, value in traits.items():
        setattr(Suite, name, value)
    return Suite


@pytest.mark.parametrize(
    ("source", "traits", "expected"),
    [
        (Numbers, {}, None),
        (StartsTooLate, {}, "every_position_resumes"),
        (HasNoEnd, {}, "either_all_pages_have_positions_or_none"),
        (Falls, {}, "the_share_goes_from_0_to_1"),
        (Numbers, {"can_change": True}, "a_change_before_the_position_is_refused"),
        (Numbers, {"can_grow": True}, "what_was_added_since_comes_at_the_end"),
        (Numbers, {"can_be_missing": True}, "a_missing_source_is_a_usage_error"),
    ],
)
def test_a_source_with_a_defect_fails_its_suite(
    source: type[Numbers], traits: dict[str, Any], expected: str | None
) -> None:
    """Each defect is noticed by the test that is there for it; without one, nothing fails."""
    found = failing(suite_of_numbers(source, **traits))
    assert expected in found if expected else found == []


def test_the_suites_run_under_unittest_too() -> None:
    """They are plain methods: a `TestCase` that subclasses one needs nothing else."""

    class Case(suite_of_numbers(Numbers), unittest.TestCase):  # type: ignore[misc]
        pass

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert result.testsRun > 5
    assert result.wasSuccessful(), result.errors + result.failures


def test_the_package_needs_neither_the_suites_nor_pytest() -> None:
    """What a program imports is without them; and they are without pytest."""
    assert not {"async_recovery.testing", "pytest", "sqlite3"} & modules_after(
        "from async_recovery import run_resumable"
    )
    assert "pytest" not in modules_after("import async_recovery.testing")
