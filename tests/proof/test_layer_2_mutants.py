"""Layer 2: the durable path with one step broken, which layer 1's explorer has to notice each time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple
from unittest import mock

import pytest

from async_recovery.checkpoint import Ahead, Complete, Spent, State, encode_ahead, encode_line
from async_recovery.file_ledger import FileLedger
from async_recovery.files import write_all
from async_recovery.journal import Journal
from async_recovery.output_file import OutputFile, move_aside

from . import report
from .cases import case_named
from .disturbances import Disturber
from .explorer import Explorer, Tally
from .mutants import Patch, cut_what_is_seen, instead, nothing, offset_of_stat, silent
from .parallel import in_processes

AFTER_A_CRASH = re.compile(r"[/+]\d+\.\w+: (I\d): ")


class Mutant(NamedTuple):
    """A broken durable path, the case that shows it, and after how many crashes; `shut_down`: only that shows it."""

    name: str
    case: str
    patch: Patch
    depth: int = 1
    shut_down: bool = False


def journal_first(self: Any, commit: Any) -> None:
    if not self._begun:
        self._begin(commit)
        return
    output, late = self._file, []

    def keep(parts: Iterable[bytes]) -> None:
        for data in parts:
            late.append((data, output._crc.offset))
            output._crc.update(data)

    with mock.patch.object(output, "_write", keep):
        output.append(commit.records)
    self._journal.commit(commit.ahead, commit.spent, self._state(commit))
    for data, offset in late:
        write_all(self._files, output._only_descriptor, data, offset)
        self._files.fdatasync(output._only_descriptor)


def rename_first(self: Any, lines: Iterable[bytes]) -> None:
    temporary = self.path + ".tmp"
    descriptor = self._files.open(temporary, 0o102 | 0o1000)
    self._files.rename(temporary, self.path)
    size = self._write(lines, descriptor, 0)
    self._files.fsync(descriptor)
    self._files.fsync_directory(self.path.rpartition("/")[0] or "/")
    self._descriptor, self._size, self.exists = descriptor, size, True


def state_first(self: Any, ahead: list[Ahead], spent: list[Spent], state: State) -> None:
    self._remember(ahead, state.mark)
    self._append([encode_line(state)])
    self._append(list(encode_ahead(ahead)))


def not_cut_back(self: Any, replay: Any) -> None:
    self._remember(list(replay.ahead.values()), replay.state.mark)


def removed_before_publishing(self: Any, complete: Complete) -> None:
    self._append([encode_line(complete)])
    self.remove()
    self.remove = nothing


def forgets_ahead(self: Any, ahead: list[Ahead], mark: int) -> None:
    self._live, self._live_bytes = {}, 0


def output_first(self: Any, commit: Any) -> None:
    self._begun = True
    self._file.begin()
    self._journal.begin(self._state(commit))


def journal_aside_first(self: Any, commit: Any) -> None:
    self._begun = True
    if self._damaged:
        move_aside(self._files, self._journal.path)
        self._file.move_aside()
    self._journal.begin(self._state(commit))
    self._file.begin()


MUTANTS = [
    Mutant("records not synced", "fresh-start", silent(OutputFile, "_write", "fdatasync")),
    Mutant("journal not synced", "fresh-start", silent(Journal, "_append", "fdatasync")),
    Mutant("journal before records", "fresh-start", instead(FileLedger, "_commit", journal_first)),
    Mutant("temporary file not synced", "fresh-start", silent(Journal, "_replace", "fsync", 0)),
    Mutant("renamed before written", "compaction", instead(Journal, "_replace", rename_first)),
    Mutant("journal's name not synced", "no-output", silent(Journal, "_replace", "fsync_directory")),
    Mutant("compacted journal's name not synced", "compaction", silent(Journal, "_replace", "fsync_directory")),
    Mutant("no fsync after the rename", "compaction", silent(Journal, "_replace", "fsync", 1), shut_down=True),
    Mutant("fdatasync believed", "fresh-start", silent(Journal, "_append", "pread"), shut_down=True),
    Mutant("partial output's name not synced", "fresh-start", silent(OutputFile, "begin", "fsync_directory")),
    Mutant("partial output before the journal", "fresh-start", instead(FileLedger, "_begin", output_first)),
    Mutant("complete line not synced", "elsewhere", silent(Journal, "complete", "fdatasync")),
    Mutant("no complete line", "fresh-start", instead(Journal, "complete", nothing)),
    Mutant("output's name not synced", "elsewhere", silent(OutputFile, "publish", "fsync_directory")),
    Mutant("journal removed before the rename", "fresh-start", instead(Journal, "complete", removed_before_publishing)),
    Mutant("state line before ahead lines", "fresh-start", instead(Journal, "commit", state_first)),
    Mutant("output not cut back", "fresh-start", instead(OutputFile, "cut", nothing)),
    Mutant("offset of stat, not of the journal", "fresh-start", instead(OutputFile, "cut", offset_of_stat)),
    Mutant("journal not cut back", "fresh-start", instead(Journal, "resume", not_cut_back), depth=2),
    Mutant("journal not cleared beyond its end", "other-order", instead(Journal, "resume", cut_what_is_seen), depth=2),
    Mutant("compaction forgets what is ahead", "compaction", instead(Journal, "_remember", forgets_ahead)),
    Mutant("journal moved aside first", "damaged", instead(FileLedger, "_begin", journal_aside_first)),
    Mutant("names of a killed run not settled", "no-output", silent(FileLedger, "_open", "fsync_directory"), depth=2),
]


def explored(name: str) -> Tally:
    """What layer 1 finds where that mutant is."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    with mutant.patch():
        if mutant.shut_down:
            return Disturber(case_named(mutant.case), "posix", mutant.depth).shut_down()
        return Explorer(case_named(mutant.case), "posix", mutant.depth).explore()


@pytest.fixture(scope="module")
def tallies() -> dict[str, Tally]:
    """All mutants, those that take longest first."""
    names = [mutant.name for mutant in sorted(MUTANTS, key=lambda mutant: -mutant.depth)]
    return dict(zip(names, in_processes(explored, names), strict=True))


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS])
def test_every_mutant_is_caught(tallies: dict[str, Tally], name: str) -> None:
    """The durable path with one step broken has a violation in a state of layer 1, and not merely an exception."""
    violations = tallies[name].violations
    caught = violations != [] and AFTER_A_CRASH.search(violations[0]) is not None
    report.add(2, "mutants", 1)
    report.control(2, caught=caught)
    assert caught, violations
    print(violations[0][:160])


def test_there_are_enough_mutants() -> None:
    """As many as RELIABILITY.md wants, each with a name of its own."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 15


def test_the_fsync_after_the_rename_is_seen_by_a_shutdown_alone() -> None:
    """No power cut of the model needs it: only a directory's fsync that returns 0 without effect, as on XFS, does."""
    with silent(Journal, "_replace", "fsync", 1)():
        assert Explorer(case_named("compaction"), "posix", 1).explore().violations == []
