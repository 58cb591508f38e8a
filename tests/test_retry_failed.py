"""Failed items run again alone: right bytes at the right index, the old output until then, whatever happens."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from zlib import crc32

import msgspec
import pytest

from async_recovery import retry_failed, run_resumable, sources
from async_recovery.checkpoint import Ahead, Bookmark, Commit, Complete, Job, Replay, encode_line
from async_recovery.contracts import Page, RunSummary
from async_recovery.engine import Run, to_its_end
from async_recovery.errors import (
    AlreadyRunning,
    AsyncRecoveryError,
    CheckpointUnusable,
    InputChanged,
    ItemFailed,
    JobMismatch,
    Mismatch,
    OutputChanged,
    StorageFailed,
    UsageError,
)
from async_recovery.failures import FailuresSource, merged, whole_of
from async_recovery.file_ledger import FileLedger
from async_recovery.files import DISK, Files
from async_recovery.journal import Journal
from async_recovery.lock import Lock
from async_recovery.options import Options
from async_recovery.output_file import OutputFile, framing_of
from async_recovery.records import encode_failure, encode_record
from async_recovery.retry_ledger import RetryLedger
from async_recovery.sources import as_source

from .proof.crash_model import RULES, MemoryFiles, Rules, World, power_cuts, settled
from .proof.explorer import OUT, Case, in_memory, now
from .support.commands import COMMAND, Folder, wait_until
from .support.faulty_files import READING, FaultyFiles, ShortWrites
from .support.file_jobs import OtherWorker, Worker, committed, names_in, replay_of, snapshot
from .support.fork_server import ForkServer
from .support.jobs import LOG, MODULE, runs_in
from .support.peak_memory import MEASURE, MEBIBYTE
from .support.threaded_loop import run

NAMES = [f"item {number}" for number in range(12)]
FAILED = {0, 1, 5, 6, 9, 11}
ERROR = ValueError("an outage")
FORMS = ("out.jsonl", "out.json")
SUMMARY = {
    "total_items": 6,
    "processed": 6,
    "checkpoint_cleared": True,
    "resumed_from": 0,
    "executed": 6,
    "failed": 0,
    "elapsed_s": 1.0,
    "output": "out",
}
every_form = pytest.mark.parametrize("name", FORMS)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder, in memory where there is such a file system."""
    shared = "/dev/shm"
    path = Path(tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None))
    yield path
    shutil.rmtree(path)


def output_of(name: str, failed: Collection[int] = (), names: list[str] = NAMES) -> bytes:
    """The finished output of `Worker` over these items, with some of them recorded as failures."""
    records = [
        encode_failure(index, item, ERROR) if index in failed else encode_record(index, {"did": item})
        for index, item in enumerate(names)
    ]
    framing = framing_of(name)
    whole = framing.join(records, 0)
    return whole + framing.closing(len(whole))


def new_record(number: int, index: int, failed: Collection[int]) -> bytes:
    """What the retry's own partial output holds for its item of that number."""
    if index in failed:
        return encode_failure(number, NAMES[index], ERROR)
    return encode_record(number, {"did": NAMES[index]})


def retry(worker: Worker, path: Path, files: Files = DISK, batch_size: int | None = 2, **options: Any) -> RunSummary:
    """A whole retry over this seam."""
    ledger = RetryLedger(path, files=files, **options)
    settings = Options(concurrency=3, drain_timeout=0, batch_size=batch_size)
    return run(to_its_end(Run(worker, FailuresSource(path), ledger, settings)))


def job(path: Path, **options: Any) -> RunSummary:
    """The run of the job itself."""
    return run(run_resumable(Worker(), NAMES, output=path, concurrency=3, drain_timeout=0, **options))


def interrupted(path: Path, *, at: str = NAMES[9], **options: Any) -> None:
    """A retry that has finished some items, others ahead of them, and stopped."""
    with pytest.raises(ItemFailed):
        retry(Worker(hangs={NAMES[1]}, fails={at}), path, **options)


def journal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.retry.checkpoint")


# The bytes


@every_form
def test_each_result_is_at_its_original_index(folder: Path, name: str) -> None:
    """The new output is byte for byte that of a job without failures; only the failures ran; nothing else stays."""
    path = folder / name
    job(path)
    whole = path.read_bytes()
    path.write_bytes(output_of(name, FAILED))
    worker = Worker(slow={NAMES[0]: 3.5, NAMES[6]: 4.5})
    summary = retry(worker, path)
    assert path.read_bytes() == whole == output_of(name)
    assert sorted(worker.calls) == sorted(NAMES[index] for index in FAILED)
    assert (summary.total_items, summary.processed, summary.executed, summary.failed) == (6, 6, 6, 0)
    assert (summary.output, summary.checkpoint_cleared) == (str(path), True)
    assert names_in(folder) == {name}


@every_form
def test_every_set_of_failures(folder: Path, name: str) -> None:
    """Whichever of five items failed, the first and the last, all of them, none of them."""
    names, path = NAMES[:5], folder / name
    for bits in range(32):
        failed = {index for index in range(5) if bits >> index & 1}
        path.write_bytes(output_of(name, failed, names))
        assert retry(Worker(), path).executed == len(failed)
        assert path.read_bytes() == output_of(name, (), names)
        assert names_in(folder) == {name}


@pytest.mark.parametrize("name", [*FORMS, "one record.json"])
@pytest.mark.parametrize("again", [set(), {5}, FAILED])
def test_blocks_of_any_size_are_merged_alike(name: str, again: set[int]) -> None:
    """Wherever the blocks of the old output and of the new records end: each record is in its place, failed or not."""
    names, failed = (NAMES[:1], {0}) if name.startswith("one") else (NAMES, FAILED)
    old = output_of(name, failed, names)
    new = b"".join(new_record(number, index, again) + b"\n" for number, index in enumerate(sorted(failed)))
    expected = output_of(name, again & failed, names)
    for size in [*range(1, 200), len(old)]:
        for new_size in (1, size, len(new)):
            blocks = (old[at : at + size] for at in range(0, len(old), size))
            records = (new[at : at + new_size] for at in range(0, len(new), new_size))
            assert b"".join(merged(blocks, records)) == expected


def test_as_many_new_records_as_failures_are_merged(folder: Path) -> None:
    """One record too few or too many, or one of another number: `OutputChanged`, never a wrong output."""
    old = output_of("out.jsonl", {1, 2})
    record = b'{"index":%d}\n'
    for numbers in ((), (0,), (0, 1, 2), (1, 0), (0, 2)):
        with pytest.raises(OutputChanged):
            list(merged([old], [record % number for number in numbers]))
    assert list(merged([old], [record % 0 + record % 1]))


def test_records_that_are_no_failures_are_copied_byte_for_byte(folder: Path) -> None:
    """Also those that look like one, or are written in another way than this version would."""
    records = [
        b'{"index":0, "error" : {"type":"E","message":"m"}, "item":1}',  # as no version writes it
        b'{"index":1,"error":{"type":"E"},"item":1}',
        b'{"index":2,"error":{"type":"E","message":"m"},"item":1,"more":2}',
        b'{"index":3,"error":{"type":"E","message":1},"item":1}',
        b'{"index":4,"result":{"index":1,"error":{"type":"E","message":"m"},"item":1}}',
        b'{"index":5,"text":"\\"error\\":{\\"type\\":","error":{"type":7}}',
        b'{"index":6,"caf\xc3\xa9":1.0e0}',
        encode_failure(7, {"error": {"type": "E", "message": "m"}, "name": "x"}, ERROR),
        b'{"index":8}',
    ]
    path = folder / "out.jsonl"
    path.write_bytes(b"\n".join(records) + b"\n")
    worker = Worker()
    assert retry(worker, path).executed == 1
    assert worker.calls == ["x"]
    records[7] = b'{"index":7,"did":"x"}'
    assert path.read_bytes() == b"\n".join(records) + b"\n"


def test_the_items_are_those_that_failed(folder: Path) -> None:
    """The worker gets the whole item as JSON gives it back: any value, null and very large numbers among them."""
    items: list[Any] = [None, 2**70, "é\n", {"a": [1.5, None]}, [], ""]
    path = folder / "out.jsonl"
    path.write_bytes(b"".join(encode_failure(n, item, ERROR) + b"\n" for n, item in enumerate(items)))
    seen = []

    async def worker(item: Any) -> Any:
        seen.append(item)
        return {"did": 1}

    assert run(retry_failed(worker, path, concurrency=1)).executed == len(items)
    assert seen == items


@every_form
@pytest.mark.parametrize("kept", [True, False])
def test_an_item_that_fails_again_stays_in_its_place(folder: Path, name: str, *, kept: bool) -> None:
    """Its new failure is recorded at its index, and the kept line of the job counts those that remain."""
    path = folder / name
    job(path, keep_checkpoint=kept)
    if kept:
        replace_kept(path, output_of(name, FAILED))
    else:
        path.write_bytes(output_of(name, FAILED))
    remaining = {5, 11}
    records = [new_record(number, index, remaining) for number, index in enumerate(sorted(FAILED))]

    async def main() -> None:
        source, ledger = FailuresSource(path), RetryLedger(path)
        await ledger.open(Job("failures", "w", None, ledger.form))
        position = [page async for page in source.pages(None)][-1].position
        for generation, (mark, taken) in enumerate([(0, []), (3, records[:3]), (6, records[3:])], 1):
            await ledger.commit(Commit(generation, mark, 9, Bookmark(position, mark, 0), taken, [], mark // 3))
        summary = msgspec.convert({**SUMMARY, "failed": 2}, RunSummary)
        await ledger.finish(Bookmark(position, 6, 0), summary)
        await ledger.close()

    run(main())
    assert path.read_bytes() == output_of(name, remaining)
    if kept:
        complete = replay_of(path.with_name(f"{name}.checkpoint")).complete
        assert complete is not None
        assert (complete.summary["failed"], complete.summary["total_items"]) == (2, 12)


def test_an_output_keeps_its_mode(folder: Path) -> None:
    """Its bits are those of the old output, whatever the umask."""
    path = folder / "out.jsonl"
    path.write_bytes(output_of(path.name, FAILED))
    for mode in (0o600, 0o666):
        path.chmod(mode)
        path.write_bytes(output_of(path.name, FAILED))
        retry(Worker(), path)
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_symlink_stays_one(folder: Path) -> None:
    """What it leads to is replaced; its own name decides the form, as in the job's run."""
    (folder / "data").mkdir()
    target, link = folder / "data" / "target", folder / "out.json"
    target.write_bytes(output_of("out.json", FAILED))
    link.symlink_to("data/target")
    interrupted(link)
    assert names_in(folder / "data") == {"target", "target.retry.partial", "target.retry.checkpoint"}
    retry(Worker(), link)
    assert link.is_symlink()
    assert target.read_bytes() == output_of("out.json")
    assert (names_in(folder), names_in(folder / "data")) == ({"data", "out.json"}, {"target"})


@every_form
def test_without_failures_nothing_is_touched(folder: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The run ends at once, says so, and the output is the very same file, not written to; an empty one too."""
    path = folder / name
    for data in (output_of(name), output_of(name, (), [])):
        path.write_bytes(data)
        before, there = snapshot(folder), path.stat()
        caplog.clear()
        with caplog.at_level("INFO"):
            summary = retry(Worker(), path)
        assert (summary.total_items, summary.executed, summary.failed) == (0, 0, 0)
        assert f"there are no failed items in {path}: nothing to do" in caplog.text
        assert snapshot(folder) == before
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (there.st_ino, there.st_mtime_ns)


# Resuming


@every_form
def test_a_retry_is_resumed(folder: Path, name: str) -> None:
    """What was committed never runs again, also what was ahead; until the end the old output is untouched."""
    path, old = folder / name, output_of(name, FAILED)
    path.write_bytes(old)
    interrupted(path)
    done = committed(journal_of(path))
    assert done
    assert path.read_bytes() == old
    assert names_in(folder) == {name, f"{name}.retry.partial", f"{name}.retry.checkpoint"}
    worker = Worker()
    summary = retry(worker, path)
    failed = sorted(FAILED)
    assert sorted(worker.calls) == sorted(NAMES[failed[number]] for number in range(6) if number not in done)
    assert (summary.total_items, summary.executed) == (6, 6 - len(done))
    assert path.read_bytes() == output_of(name)
    assert names_in(folder) == {name}


def test_fresh_starts_the_retry_anew(folder: Path) -> None:
    """Also over the leftovers of another worker's; with nothing to retry the leftovers go."""
    path = folder / "out.jsonl"
    path.write_bytes(output_of(path.name, FAILED))
    interrupted(path)
    with pytest.raises(JobMismatch):
        retry(OtherWorker(), path)
    assert retry(OtherWorker(), path, fresh=True).executed == 6
    assert path.read_bytes() == output_of(path.name)
    path.write_bytes(output_of(path.name, FAILED))
    interrupted(path)
    path.write_bytes(output_of(path.name))
    assert retry(Worker(), path, fresh=True).total_items == 0
    assert names_in(folder) == {"out.jsonl"}


def test_a_disk_that_takes_three_bytes_at_a_time_gets_all_of_them(folder: Path) -> None:
    """Short writes are gone on with, in the merged output too."""
    path = folder / "out.json"
    path.write_bytes(output_of(path.name, FAILED))
    retry(Worker(), path, files=ShortWrites())
    assert path.read_bytes() == output_of(path.name)


def test_a_merge_of_many_blocks(folder: Path) -> None:
    """An output and records of several MiB, a single record of more than a block among them, are merged right."""
    path = folder / "out.jsonl"
    names = [f"{'x' * (3 << 20 if number == 700 else 5000)} {number}" for number in range(1500)]
    failed = {*range(0, 1500, 7), 700, 1499}
    path.write_bytes(output_of(path.name, failed, names))
    assert retry(Worker(), path, batch_size=None).executed == len(failed)
    assert path.read_bytes() == output_of(path.name, (), names)


# The source


async def test_the_pages_between_failures_are_passed_over(tmp_path: Path) -> None:
    """Only pages with failures are given, and the end: what a run holds does not grow with what lies between."""
    path = tmp_path / "out.jsonl"
    names = [f"{number:0100}" for number in range(20_000)]
    path.write_bytes(output_of(path.name, {7, 15_000}, names))
    pages = [page async for page in FailuresSource(path).pages(None)]
    assert [list(page.items) for page in pages] == [[names[7]], [names[15_000]], []]
    assert whole_of(pages[0].position)[0] == path.stat().st_size
    assert [page.position.get("offset", 0) for page in pages] == sorted(
        page.position.get("offset", 0) for page in pages
    )


@every_form
async def test_every_position_resumes(tmp_path: Path, name: str) -> None:
    """From each page's position come that page's failures and all after it."""
    path = tmp_path / name
    names = [f"{number:01000}" for number in range(500)]
    path.write_bytes(output_of(name, range(0, 500, 3), names))
    pages = [page async for page in FailuresSource(path).pages(None)]
    assert len(pages) > 5

    def items(pages: list[Page]) -> list[Any]:
        return [item for page in pages for item in page.items]

    assert items(pages) == names[::3]
    for number, page in enumerate(pages):
        position = msgspec.json.decode(msgspec.json.encode(page.position))
        again = FailuresSource(path)
        for whole in (False, True):
            await again.check(position, whole=whole)
        assert items([page async for page in again.pages(position)]) == items(pages[number:])


# Every step fails, or is the last


def replace_kept(path: Path, output: bytes) -> None:
    """Let the output of a job that was kept be another one, and its kept line say so."""
    journal = Journal(f"{path}.checkpoint", DISK)
    complete = journal.load().complete
    assert complete is not None
    path.write_bytes(output)
    journal.keep(msgspec.structs.replace(complete, size=len(output), crc=crc32(output)))
    journal.close()


class Scenario(NamedTuple):
    """An output with failures, what else is there, and how the retry is run."""

    prepare: Callable[[Path], None] = lambda path: None
    options: dict[str, Any] = {}  # noqa: RUF012  never changed
    name: str = "out.jsonl"
    failed: Collection[int] = FAILED


def kept(path: Path) -> None:
    old = path.read_bytes()
    job(path, keep_checkpoint=True)
    replace_kept(path, old)


def complete(path: Path, *, renamed: bool, keep: bool = False) -> None:
    """What a kill leaves after the complete line, or after the rename."""
    if keep:
        kept(path)
    old, steps = path.read_bytes(), FaultyFiles()
    before = snapshot(path.parent)
    retry(Worker(), path, steps)
    retry_renames = [number for number, call in enumerate(steps.calls) if call == "rename"]
    at = retry_renames[1] + renamed  # after that of the journal
    restore(path.parent, before)
    with pytest.raises(StorageFailed):
        retry(Worker(), path, FaultyFiles(at, dies=True))
    assert replay_of(journal_of(path)).complete is not None
    assert (path.read_bytes() == old) != renamed
    assert path.with_name(f"{path.name}.retry.tmp").exists() != renamed


def restore(folder: Path, before: dict[str, Any]) -> None:
    for name in names_in(folder):
        (folder / name).unlink()
    for name, (_, _, content) in before.items():
        (folder / name).write_bytes(content)


def damaged(path: Path) -> None:
    interrupted(path)
    journal_of(path).write_bytes(b"damaged")


def all_but_merged(path: Path) -> None:
    """Every item is committed, and a merged output that is none was left."""
    before, steps = snapshot(path.parent), FaultyFiles()
    retry(Worker(), path, steps)
    at = [number for number, call in enumerate(steps.calls) if call == "rename"][1] - 1  # the complete line
    while steps.calls[at] != "pwrite":
        at -= 1
    restore(path.parent, before)
    with pytest.raises(StorageFailed):
        retry(Worker(), path, FaultyFiles(at, dies=True))
    assert committed(journal_of(path)) == set(range(6))
    assert replay_of(journal_of(path)).complete is None
    with path.with_name(f"{path.name}.retry.tmp").open("ab") as file:
        file.write(b"garbage" * 1000)


SCENARIOS = {
    "lines": Scenario(),
    "array": Scenario(name="out.json"),
    "kept": Scenario(kept),
    "kept, array": Scenario(kept, name="out.json"),
    "resumed": Scenario(interrupted),
    "all but merged": Scenario(all_but_merged),
    "anew": Scenario(interrupted, {"fresh": True}),
    "damaged": Scenario(damaged),
    "complete": Scenario(lambda path: complete(path, renamed=False)),
    "complete, renamed": Scenario(lambda path: complete(path, renamed=True)),
    "complete, kept": Scenario(lambda path: complete(path, renamed=True, keep=True)),
    "complete, anew": Scenario(lambda path: complete(path, renamed=False), {"fresh": True}),
    "complete, renamed, anew": Scenario(lambda path: complete(path, renamed=True, keep=True), {"fresh": True}),
    "nothing to do": Scenario(failed=()),
}
IN_LONG_FORM = {"array", "kept", "anew", "complete, kept", "complete, anew"}  # CI has what they are made of, together
every_scenario = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in IN_LONG_FORM else []) for name in SCENARIOS]
)


class Lives:
    """One scenario, prepared once and copied for each life."""

    def __init__(self, name: str, folder: Path) -> None:
        self.scenario = SCENARIOS[name]
        self._prepared, self.place = folder / "prepared", folder / "place"
        self.old = output_of(self.scenario.name, self.scenario.failed)
        self.new = output_of(self.scenario.name)
        self._prepared.mkdir()
        path = self._prepared / self.scenario.name
        path.write_bytes(self.old)
        self.scenario.prepare(path)
        self.keeps = (self._prepared / f"{path.name}.checkpoint").exists()
        self.output, self.journal = self.place / path.name, self.place / f"{path.name}.retry.checkpoint"

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self._prepared, self.place)

    def life(self, worker: Worker, files: Files, **options: Any) -> RunSummary:
        # Items in an order that leaves some of them ahead of the mark at nearly every commit.
        worker._slow = {NAMES[0]: 1.5, NAMES[1]: 3.2, NAMES[6]: 2.5}
        return retry(worker, self.output, files, **options)

    def fails(self, files: FaultyFiles) -> bool:
        """Whether a life over this seam fails, as it should then. The output is the old one, or the new one."""
        try:
            self.life(Worker(), files, **self.scenario.options)
        except StorageFailed:
            assert self.output.read_bytes() in (self.old, self.new)
            return True
        return False

    def count(self) -> list[str]:
        """The operations of a life without a fault."""
        self.reset()
        steps = FaultyFiles()
        self.life(Worker(), steps, **self.scenario.options)
        assert self.output.read_bytes() == self.new
        return steps.calls

    def next_life(self) -> None:
        """The same line again: the right bytes, nothing that was committed is done again, the kept line is right."""
        if self.journal.exists():
            with pytest.raises(Mismatch, match="To finish it: `async-recovery retry-failed"):
                job(self.output)
        was_new, done = self.output.read_bytes() == self.new, committed(self.journal)
        is_complete = self.journal.exists() and replay_of(self.journal).complete is not None
        worker = Worker()
        summary = self.life(worker, DISK)
        assert self.output.read_bytes() == self.new
        failed = sorted(self.scenario.failed)
        assert not {NAMES[failed[number]] for number in done} & set(worker.calls)
        assert summary.executed == len(worker.calls)
        assert not (was_new or is_complete) or summary.executed == 0
        left = {name for name in names_in(self.place) if ".damaged-" not in name}
        allowed = {f"{self.journal.name}.tmp", f"{self.output.name}.checkpoint.tmp"}
        assert left - allowed == {self.output.name} | ({f"{self.output.name}.checkpoint"} if self.keeps else set())
        if self.keeps:
            assert job(self.output, keep_checkpoint=True).executed == 0


@every_scenario
def test_any_operation_that_fails_is_the_last_but_for_closing(folder: Path, name: str) -> None:
    """`StorageFailed`, not one more byte, fsync, rename or cut; then the same line ends the retry as it should be."""
    world = Lives(name, folder)
    for at, operation in enumerate(world.count()):
        world.reset()
        files = FaultyFiles(at, (errno.ENOSPC, errno.EIO)[at % 2], torn=at % 2 == 0)
        if not world.fails(files):
            assert operation == "close", (at, operation)
            assert world.output.read_bytes() == world.new
            continue
        allowed = {"close"} if world.scenario.prepare is not interrupted else READING  # an audit may read on
        assert set(files.calls_after_failure) <= allowed, (at, operation, files.calls_after_failure)
        assert not [left for left in names_in(world.place) if left.endswith(".lock")], (at, operation)
        world.next_life()


@pytest.mark.parametrize("torn", [False, True])
@every_scenario
def test_a_process_that_dies_between_any_two_steps_is_resumed(folder: Path, name: str, *, torn: bool) -> None:
    """The output is the old one or the new one; the same line again gives the new one."""
    world = Lives(name, folder)
    complete = 0
    for at, operation in enumerate(world.count()):
        if torn and operation != "pwrite":
            continue
        world.reset()
        assert world.fails(FaultyFiles(at, dies=True, torn=torn)) or operation == "close", (at, operation)
        Path(f"{world.output}.lock").write_bytes(b"left by the dead")
        complete += world.journal.exists() and replay_of(world.journal).complete is not None
        world.next_life()
    assert complete > 0 or torn or name == "nothing to do"


@pytest.mark.parametrize("name", ["kept", "array"])
def test_a_process_that_dies_twice_is_resumed(folder: Path, name: str) -> None:
    """Also when the second life ends at any step of reading, cutting back, going on and finishing."""
    world = Lives(name, folder)
    operations = world.count()
    for first in range(12, len(operations) - 2, 17):
        second = first % 3
        while True:
            world.reset()
            if not world.fails(FaultyFiles(first, dies=True, torn=True)):
                break
            done = committed(world.journal)
            if not world.fails(FaultyFiles(second, dies=True)):
                break
            assert committed(world.journal) >= done or not world.journal.exists()
            world.next_life()
            second += 3
        assert second > 20 or first > len(operations) - 10


# Power cuts


SMALL = NAMES[:3]
TWO_FAILED = {0, 2}


class PowerCuts:
    """Every crash of a small retry that the crash model can show, and every crash of what follows.

    The job was kept; the retry finishes its second item ahead of the first.

    :ivar states: how many different ones have been lived on from.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._old, self._new = output_of(OUT, TWO_FAILED, SMALL), output_of(OUT, (), SMALL)
        self._position = {"whole": [len(self._old), crc32(self._old)]}
        self._seen: set[object] = set()
        self.states = 0

    def explore(self, depth: int) -> None:
        """From the beginning, that many crashes deep."""
        with in_memory(Case("retry", [])):
            kept = encode_line(self._kept(self._old))
            self._crash(settled({OUT: self._old, f"{OUT}.checkpoint": kept + b"\n" + kept}), 0, depth)

    def _crash(self, world: World, acknowledged: int, depth: int) -> None:
        """Live on from there; at each operation crash, and live on from whatever that leaves."""
        left: list[tuple[World, int]] = []
        files = MemoryFiles(world, self._rules, lambda number, words, world, _: left.append((world, self._level)))
        self._level = acknowledged
        self._live(files)
        for point, level in left if depth else ():
            for crashed in (point, *power_cuts(point, self._rules, "sectors")):
                key = crashed.key(), level, depth
                if key not in self._seen:
                    self._seen.add(key)
                    self.states += 1
                    assert crashed.read(OUT) in ((self._new,) if level == 4 else (self._old, self._new))
                    self._crash(crashed, level, depth - 1)

    def _live(self, files: MemoryFiles) -> None:
        ledger = RetryLedger(OUT, files=files)
        found = now(ledger.open(Job("failures", "w", None, ledger.form)))
        generation = found.state.generation if found.state else 0
        if found.complete is None and files.world.read(OUT) == self._old:
            assert generation >= self._level, "an acknowledged commit is lost"
            records = [new_record(number, index, ()) for number, index in enumerate(sorted(TWO_FAILED))]
            for number in range(generation + 1, 4):
                ahead = [Ahead(1, 1, records[1])] if number == 2 else []
                mark, taken = (2, records) if number == 3 else (0, [])
                now(ledger.commit(Commit(number, mark, 9, Bookmark(self._position, mark, 0), taken, ahead, 0)))
                self._level = number
            now(ledger.audit())
            now(ledger.finish(Bookmark(self._position, 2, 0), msgspec.convert(SUMMARY, RunSummary)))
        self._level = 4
        now(ledger.close())
        assert files.world.read(OUT) == self._new
        assert set(files.world.names) - {f"{OUT}.retry.checkpoint.tmp"} == {OUT, f"{OUT}.checkpoint"}
        replay = Replay()
        replay.feed(files.world.read(f"{OUT}.checkpoint") or b"")
        assert replay.kept
        assert replay.complete == self._kept(self._new)

    def _kept(self, output: bytes) -> Complete:
        summary = {**SUMMARY, "failed": 2 if output == self._old else 0}
        job = Job("text", "w", None, "jsonl")
        return Complete(1, job, "in", Bookmark(None, 0, 0), len(output), crc32(output), summary)


@pytest.mark.parametrize("rules", RULES)
def test_no_power_cut_loses_the_old_output_or_the_retry(rules: Rules) -> None:
    """At any operation, torn in any way, thrice: the old output or the new one, and nothing acknowledged is lost."""
    cuts = PowerCuts(rules)
    cuts.explore(3)
    print(f"{cuts.states} states")
    assert cuts.states > 1000


def unsynced(output: OutputFile, mode: int) -> None:
    """Instead of `OutputFile.sync`."""


def no_line(journal: Journal, line: Complete) -> None:
    """Instead of `Journal.complete`."""


def published_first(ledger: RetryLedger, whole: tuple[int, int]) -> None:
    """Instead of `RetryLedger._merge`: the output has its name before its complete line is durable."""
    merge(ledger, whole)
    ledger._merged.publish()
    ledger._merged.publish = lambda: None  # type: ignore[method-assign]


def kept_last(ledger: RetryLedger, complete: Complete) -> None:
    """Instead of `RetryLedger._conclude`: the journal goes before the kept line is right."""
    assert ledger._file is not None
    ledger._file.remove()
    ledger._journal.remove()
    with mock.patch.object(Journal, "remove"):
        conclude(ledger, complete)


def partial_last(ledger: RetryLedger, complete: Complete) -> None:
    """Instead of `RetryLedger._conclude`: the journal goes before the partial output."""
    assert ledger._file is not None
    ledger._journal.remove()
    ledger._file.remove()
    with mock.patch.object(Journal, "remove"):
        conclude(ledger, complete)


merge, conclude = RetryLedger._merge, RetryLedger._conclude
MUTANTS: dict[str, tuple[type, str, Callable[..., None]]] = {
    "the merged output is not synced": (OutputFile, "sync", unsynced),
    "no complete line": (Journal, "complete", no_line),
    "the complete line comes late": (RetryLedger, "_merge", published_first),
    "the kept line comes last": (RetryLedger, "_conclude", kept_last),
    "the partial output goes last": (RetryLedger, "_conclude", partial_last),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_control_of_the_power_cuts(name: str) -> None:
    """Each step of the finish left out, or put elsewhere, is seen."""
    where, what, instead = MUTANTS[name]
    with mock.patch.object(where, what, instead), pytest.raises((AssertionError, AsyncRecoveryError)):
        explore_all()
    explore_all()


def explore_all() -> None:
    for rules in RULES:
        PowerCuts(rules).explore(1)


# Refusals


def refused(path: Path, error: type[Exception], match: str, **options: Any) -> None:
    """A retry that must be refused with this error: nothing runs, and nothing is changed."""
    before, worker = snapshot(path.parent), Worker()
    with pytest.raises(error, match=match):
        retry(worker, path, **options)
    assert worker.calls == []
    assert snapshot(path.parent) == before


def test_an_unfinished_job_is_refused(folder: Path) -> None:
    """Interrupted, or complete and not published: `Mismatch` with the line that finishes it, `--fresh` or not."""
    path = folder / "out.jsonl"
    (folder / "in.txt").write_text("\n".join(NAMES))
    with pytest.raises(ItemFailed):
        run(run_resumable(Worker(fails={NAMES[5]}), folder / "in.txt", output=path, version="it's 2"))
    path.write_bytes(output_of(path.name, FAILED))
    line = (
        f"async-recovery run --input {folder}/in.txt --output {path} "
        f"--worker tests.support.file_jobs:Worker --job-version 'it'\"'\"'s 2'"
    )
    for fresh in (False, True):
        refused(path, Mismatch, re.escape(f"is not finished ({path}.checkpoint)"), fresh=fresh)
        refused(path, Mismatch, re.escape(f"To finish it: `{line}`"), fresh=fresh)
    (folder / "out.jsonl.checkpoint").rename(folder / "elsewhere")
    refused(path, Mismatch, re.escape(f"there is a partial output {path}.partial: its job is not finished"))
    line = line.replace(" --worker", f" --checkpoint {folder}/elsewhere --worker")
    refused(path, Mismatch, re.escape(f"`{line}`"), checkpoint=folder / "elsewhere")


@pytest.mark.parametrize("kind", ["complete", "damaged", "iterable"])
def test_any_checkpoint_but_a_kept_one_is_that_of_an_unfinished_job(folder: Path, kind: str) -> None:
    """Complete, but not put away; not to be read; of an input that no line can name."""
    path = folder / "out.jsonl"
    if kind == "complete":
        steps = FaultyFiles()
        job_over(path, steps)
        path.unlink()
        with pytest.raises(StorageFailed):
            job_over(path, FaultyFiles(steps.calls.index("unlink"), dies=True))
        assert path.exists()
    elif kind == "damaged":
        (folder / "out.jsonl.checkpoint").write_bytes(b"damaged")
    else:
        with pytest.raises(ItemFailed):
            job_over(path, DISK, Worker(fails={NAMES[5]}))
    path.write_bytes(output_of(path.name, FAILED))
    refused(path, Mismatch, "is not finished .*: run it again as it was started")


def job_over(path: Path, files: Files, worker: Worker | None = None) -> RunSummary:
    """The run of the job itself over this seam."""
    ledger = FileLedger(path, files=files)
    settings = Options(concurrency=3, drain_timeout=0)
    return run(to_its_end(Run(worker or Worker(), as_source(NAMES), ledger, settings)))


def test_a_missing_output_is_a_usage_error(folder: Path) -> None:
    """Nothing is made, no folder either; one that went after the retry began is `OutputChanged`."""
    refused(folder / "out.jsonl", UsageError, f"there is no output {folder}/out.jsonl")
    with pytest.raises(UsageError, match="there is no output"):
        retry(Worker(), folder / "a" / "out.jsonl")
    assert names_in(folder) == set()
    path = folder / "out.jsonl"
    path.mkdir()
    refused(path, UsageError, f"{path} is a folder: name the finished output of a job in it")
    path.rmdir()
    path.write_bytes(output_of(path.name, FAILED))
    interrupted(path)
    path.unlink()
    refused(path, OutputChanged, f"the output {path} is missing: restore it")
    path.write_bytes(output_of(path.name, FAILED))
    retry(Worker(), path)
    assert path.read_bytes() == output_of(path.name)


def test_one_at_a_time(folder: Path) -> None:
    """Whoever holds the output's lock, a run or a retry, keeps others out; a journal elsewhere is locked as well."""
    path = folder / "out.jsonl"
    path.write_bytes(output_of(path.name, FAILED))
    for name in ("out.jsonl.lock", "journal.lock"):
        lock = Lock(str(folder / name))
        lock.acquire()
        refused(path, AlreadyRunning, f"{name} is held by process {os.getpid()}", checkpoint=folder / "journal")
        lock.release()

    def second() -> None:
        for fresh in (False, True):
            with pytest.raises(AlreadyRunning):
                retry(Worker(), path, fresh=fresh)
            with pytest.raises(AlreadyRunning):
                job(path, fresh=fresh)

    retry(Worker(during={NAMES[5]: second}), path)
    assert path.read_bytes() == output_of(path.name)


def no_outputs(failed: Collection[int]) -> dict[str, tuple[str, list[bytes], int]]:
    """What is no output: its name, its lines, and the number of the line that is wrong."""
    lines = output_of("out.jsonl", failed).splitlines(keepends=True)
    array = output_of("out.json", failed).splitlines(keepends=True)
    found = {
        "text": ("out.jsonl", [b"one\n", b"two\n"], 1),
        "another index": ("out.jsonl", [*lines[:3], *lines[4:]], 4),
        "an index twice": ("out.jsonl", [*lines[:3], *lines[2:]], 4),
        "a longer index": ("out.jsonl", [*lines[:1], lines[1].replace(b":1,", b":11,", 1), *lines[2:]], 2),
        "a line cut": ("out.jsonl", [*lines[:5], lines[5][:-5] + b"\n", *lines[6:]], 6),
        "a blank line": ("out.jsonl", [*lines[:5], b"\n", *lines[5:]], 6),
        "two on a line": ("out.jsonl", [*lines[:2], lines[2][:-1] + b", " + lines[3], *lines[4:]], 4),
        "the end cut": ("out.jsonl", [*lines[:-1], lines[-1][:-1]], 12),
        "an array by another name": ("out.jsonl", array, 1),
        "lines by another name": ("out.json", lines, 1),
        "no array": ("out.json", [], 1),
        "no bracket at the end": ("out.json", array[:-1], 13),
        "a comma too many": ("out.json", [*array[:-2], array[-2].replace(b"\n", b",\n"), array[-1]], 13),
        "a comma too few": ("out.json", [*array[:4], array[4].replace(b",\n", b"\n"), *array[5:]], 5),
        "two arrays": ("out.json", [*array, *array], 13),
    }
    if failed:
        found |= {
            "a failure cut": ("out.jsonl", [*lines[:5], lines[5].replace(b'"item":', b'"item";')], 6),
            "no UTF-8": ("out.jsonl", [*lines[:5], lines[5].replace(b"outage", b"out\xffge")], 6),
        }
    return found


@pytest.mark.parametrize("page_bytes", [16, 64 << 10])
@pytest.mark.parametrize("failed", [FAILED, set()], ids=["failures", "none"])
def test_what_is_no_output_is_refused_before_anything_begins(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failed: Collection[int], page_bytes: int
) -> None:
    """`UsageError` with the line and the byte, wherever it lies; not one item runs."""
    monkeypatch.setattr(sources, "PAGE_BYTES", page_bytes)
    for name, lines, number in no_outputs(failed).values():
        path = folder / name
        path.write_bytes(b"".join(lines))
        byte = sum(map(len, lines[: number - 1]))
        refused(path, UsageError, f"{name} is not a finished output of this program: line {number}, byte {byte}: ")
        path.unlink()


def test_a_changed_output_is_refused(folder: Path) -> None:
    """Any byte flipped, in what was done and after it, or another size: refused, and resumed when it is restored."""
    path, old = folder / "out.jsonl", output_of("out.jsonl", FAILED)
    path.write_bytes(old)
    interrupted(path)
    before = snapshot(folder)
    for at in range(0, len(old), 7):
        for changed in (old[:at] + bytes([old[at] ^ 1]) + old[at + 1 :], old[:at], old[: at + 1] + old[at:]):
            path.write_bytes(changed)
            with pytest.raises(InputChanged, match="has changed"):
                retry(Worker(hangs=NAMES), path)
            assert path.read_bytes() == changed
            restore(folder, before)
    retry(Worker(), path)
    assert path.read_bytes() == output_of(path.name)


def test_an_output_that_changes_while_the_retry_runs_is_not_replaced(folder: Path) -> None:
    """Changed at the last moment, it is compared again as it is copied: `OutputChanged`, and nothing is published."""
    path, old = folder / "out.jsonl", output_of("out.jsonl", FAILED)
    changed = old.replace(b"item 3", b"item X")
    for found in (changed, old + b"more\n", old[:-4]):
        path.write_bytes(old)
        worker = Worker(slow={NAMES[11]: 9.0}, during={NAMES[11]: lambda found=found: path.write_bytes(found)})  # type: ignore[misc]
        with pytest.raises(OutputChanged, match=r"is not what it was when the retry began|can not be read"):
            retry(worker, path)
        assert path.read_bytes() == found
        path.write_bytes(old)
        assert retry(Worker(), path).executed == 0
        assert path.read_bytes() == output_of(path.name)
        assert names_in(folder) == {path.name}


def test_another_retry_is_refused(folder: Path) -> None:
    """Another worker or version than that of the one that was begun; a partial output of it that nothing explains."""
    path = folder / "out.jsonl"
    path.write_bytes(output_of(path.name, FAILED))
    interrupted(path)
    with pytest.raises(JobMismatch, match="file_jobs:Worker', not 'tests"):
        retry(OtherWorker(), path)
    journal_of(path).unlink()
    refused(path, CheckpointUnusable, f"there is a partial output {path}.retry.partial")


def test_a_damaged_journal_of_a_retry(folder: Path) -> None:
    """Refused if that was asked for; else moved aside, never deleted, and the retry starts anew."""
    path = folder / "out.jsonl"
    path.write_bytes(output_of(path.name, FAILED))
    damaged(path)
    refused(path, CheckpointUnusable, "is damaged", on_damage="refuse")
    assert retry(Worker(), path).executed == 6
    assert names_in(folder) == {
        path.name,
        *(f"{path.name}.retry.{kind}.damaged-1" for kind in ("checkpoint", "partial")),
    }


# The job itself


@pytest.mark.parametrize("options", [{}, {"fresh": True}, {"keep_checkpoint": True}, {"checkpoint": "other"}])
def test_the_job_is_refused_while_a_retry_is_unfinished(folder: Path, options: dict[str, Any]) -> None:
    """Whatever its options, the line that resumes the retry is in the message, and nothing is changed."""
    path = folder / "out.jsonl"
    path.write_bytes(output_of(path.name, FAILED))
    interrupted(path)
    if "checkpoint" in options:
        options = {"checkpoint": folder / "other"}
    for content in (journal_of(path).read_bytes(), b"damaged"):
        journal_of(path).write_bytes(content)
        before = snapshot(folder)
        worker = "WORKER" if content == b"damaged" else "tests.support.file_jobs:Worker"
        line = f"`async-recovery retry-failed {path} --worker {worker}`"
        with pytest.raises(
            Mismatch, match=re.escape(f"To finish it: {line}. To drop it instead, remove the files {path}.retry.*")
        ):
            job(path, **options)
        assert snapshot(folder) == before
    for left in folder.glob("out.jsonl.retry.*"):
        left.unlink()
    job(path, **options)
    assert path.read_bytes() == output_of(path.name)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_kept_job_knows_its_new_output(folder: Path, *, elsewhere: bool) -> None:
    """Its kept line, wherever it lies, is brought up to date: the same call of the job then does nothing."""
    path = folder / "out.json"
    options: dict[str, Any] = {"checkpoint": folder / "journal"} if elsewhere else {}
    job(path, keep_checkpoint=True, **options)
    if elsewhere:
        (folder / "journal").rename(folder / "out.json.checkpoint")
    replace_kept(path, output_of(path.name, FAILED))
    if elsewhere:
        (folder / "out.json.checkpoint").rename(folder / "journal")
    assert job(path, keep_checkpoint=True, **options).executed == 0
    retry(Worker(), path, **options)
    assert path.read_bytes() == output_of(path.name)
    assert job(path, keep_checkpoint=True, **options).executed == 0
    assert names_in(folder) == {"out.json", "journal" if elsewhere else "out.json.checkpoint"}


def test_a_kept_line_of_another_output_is_never_brought_up_to_date(folder: Path) -> None:
    """An output of another size is refused at once, one of other bytes before it is replaced."""
    path = folder / "out.jsonl"
    job(path, keep_checkpoint=True)
    replace_kept(path, output_of(path.name, FAILED))
    path.write_bytes(output_of(path.name, FAILED | {3}))
    refused(path, OutputChanged, f"the checkpoint {path}.checkpoint remembers an output of")
    changed = output_of(path.name, FAILED).replace(b"item 3", b"item X")
    path.write_bytes(changed)
    with pytest.raises(OutputChanged, match=r"but .* has other bytes: restore it, or remove that checkpoint"):
        retry(Worker(), path)
    assert path.read_bytes() == changed
    path.write_bytes(output_of(path.name, FAILED))
    retry(Worker(), path, fresh=True)
    assert job(path, keep_checkpoint=True).executed == 0


# The command


WORDS = ("retry-failed", "out.jsonl", "--worker", "jobs:quick")


def write_job(folder: Folder, count: int, failed: Collection[int], name: str = "out.jsonl") -> bytes:
    """Items, workers, and the output of a job with these failures; returns what it is without them."""
    folder.write("jobs.py", MODULE)
    folder.write_items(count)
    path = folder / name
    words = ["run", "--input", "items.txt", "--output", name, "--worker", "jobs:quick", "--concurrency", "50"]
    ended = folder.run(*words)
    assert ended.code == 0, ended.err
    (folder / LOG).unlink()
    whole = path.read_bytes()
    framing = framing_of(name)
    lines = whole.splitlines()[1:-1] if framing.form == "json" else whole.splitlines()
    records = [line.removesuffix(b",") for line in lines]
    for index in failed:
        records[index] = encode_failure(index, str(index), ERROR)
    data = framing.join(records, 0)
    path.write_bytes(data + framing.closing(len(data)))
    return whole


def test_the_command_runs_the_failures_alone(tmp_path: Path) -> None:
    """Its summary is that of `run`, its code 0; a second time there is nothing to do, and the log says so."""
    with Folder(tmp_path) as folder:
        whole = write_job(folder, 50, {0, 7, 49})
        ended = folder.run(*WORDS, "--concurrency", "4", "--batch-size", "1")
        assert ended.code == 0, ended.err
        assert {**ended.summary, "elapsed_s": 1.0} == {**SUMMARY, "total_items": 3, "processed": 3, "executed": 3} | {
            "output": "out.jsonl"
        }
        assert sorted(runs_in(folder / LOG)) == [0, 7, 49]
        assert (folder / "out.jsonl").read_bytes() == whole
        again = folder.run(*WORDS)
        assert (again.code, again.summary["total_items"]) == (0, 0)
        assert "there are no failed items" in again.err


def test_the_command_is_stopped_and_resumed(tmp_path: Path) -> None:
    """SIGTERM: code 143 and the line that resumes it; `run`, `status` and `verify` tell of the retry."""
    with Folder(tmp_path) as folder:
        whole = write_job(folder, 50, range(1, 50, 2))
        words = ["retry-failed", "out.jsonl", "--worker", "jobs:held_at_3", "--batch-size", "1", "--drain-timeout", "0"]
        process = folder.start(*words)
        journal = folder / "out.jsonl.retry.checkpoint"
        wait_until(lambda: len(committed(journal)) == 24, process)
        assert json.loads(folder.run("status", "out.jsonl", "--json").out)["state"] == "running"
        assert folder.run("verify", str(journal)).code == 0
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (143, "")
        line = err.splitlines()[-1].strip()
        assert shlex.split(line)[-len(words) :] == words
        status = json.loads(folder.run("status", "out.jsonl", "--json").out)
        assert (status["state"], status["source"], status["finished"]) == ("interrupted", "failures", 24)
        for looked in (
            folder.run("verify", "out.jsonl"),
            folder.run("run", "--output", "out.jsonl", "--dry-run", "--input", "items.txt"),
        ):
            assert looked.code == 4
            assert f"async-recovery retry-failed {folder / 'out.jsonl'} --worker jobs:held_at_3`" in looked.out
        found = folder.run("verify", str(journal))
        assert found.code == 0, found.out
        assert "the 1 items below the mark, and the 23 ahead of it, are those that were done" in found.out
        refusal = folder.run("run", "--input", "items.txt", "--output", "out.jsonl", "--fresh")
        assert refusal.code == 4
        match = re.search(r"To finish it: `async-recovery (.*?)`", refusal.err)
        assert match is not None
        (folder / "go").touch()
        ended = folder.run(*shlex.split(match[1]))
        assert (ended.code, ended.summary["executed"]) == (0, 1), ended.err
        assert (folder / "out.jsonl").read_bytes() == whole
        assert Counter(runs_in(folder / LOG)) == Counter([3, *range(1, 50, 2)])


@pytest.mark.parametrize(
    ("name", "keep"), [pytest.param("out.jsonl", False, marks=pytest.mark.slow), ("out.json", True)]
)
def test_kill_9_between_any_two_steps(tmp_path: Path, name: str, *, keep: bool) -> None:
    """A kill of the real command at any operation on files, or amid a write: the same line ends the retry."""
    with Folder(tmp_path / "job") as folder, ForkServer() as server:
        folder.path.mkdir()
        whole = write_job(folder, 8, {0, 2, 3, 6}, name)
        if keep:
            old = (folder / name).read_bytes()
            ended = folder.run(
                "run", "--input", "items.txt", "--output", name, "--worker", "jobs:quick", "--keep-checkpoint"
            )
            assert ended.code == 0, ended.err
            replace_kept(folder / name, old)
        old = (folder / name).read_bytes()
        (folder / LOG).unlink(missing_ok=True)
        before = tmp_path / "before"
        shutil.copytree(folder.path, before)
        words = ["retry-failed", name, "--worker", "jobs:item_0_last", "--concurrency", "3", "--batch-size", "1"]
        undisturbed = server.run(folder.path, *words)
        assert undisturbed.code == 0, undisturbed.err
        journal, kills = folder / f"{name}.retry.checkpoint", Counter[str]()
        for number, step in enumerate(undisturbed.steps):
            for when in ("middle", "after") if step == "pwrite" else ("after",):
                killed = undisturbed
                for _ in range(5):  # what ends during a commit is a matter of time: it may move the steps, and a rename
                    shutil.rmtree(folder.path)
                    shutil.copytree(before, folder.path)
                    killed = server.run(folder.path, *words, kill_at=number, when=when)
                    if step != "rename" or killed.steps[-1] == step:
                        break
                if killed.code == 0:
                    continue  # two threads of one process, in another order: fewer steps this time
                assert killed.code == -9, killed.err
                kills[f"{when} {killed.steps[-1]}"] += 1
                assert (folder / name).read_bytes() in (old, whole)
                done, begun = committed(journal), len(runs_in(folder / LOG))
                is_new = (folder / name).read_bytes() == whole
                again = server.run(folder.path, *words)
                assert again.code == 0, again.err
                assert (folder / name).read_bytes() == whole
                ran = runs_in(folder / LOG)[begun:]
                assert not {[0, 2, 3, 6][index] for index in done} & set(ran)
                assert not (ran and is_new)
                left = set(names_in(folder.path)) - {LOG, name, "items.txt", "jobs.py", "__pycache__"}
                assert left == ({f"{name}.checkpoint"} if keep else set())
        print(f"{kills.total()} kills: {dict(kills)}")
        assert kills["after rename"] >= (3 if keep else 2), "of the journal, the output, and the kept line"
        if keep:
            run_again = folder.run(
                "run", "--input", "items.txt", "--output", name, "--worker", "jobs:quick", "--keep-checkpoint"
            )
            assert (run_again.code, run_again.summary["executed"]) == (0, 0), run_again.err


# Memory


def peak_bytes(folder: Path, count: int) -> int:
    """Peak resident memory of a retry of 100 failures in an output of `count` records, 1 KB each."""
    path = folder / "out.jsonl"
    with path.open("wb") as output:
        for index in range(count):
            if index % (count // 100) == 5:
                output.write(encode_failure(index, str(index), ERROR) + b"\n")
            else:
                output.write(b'{"index":%d,"text":"%b"}\n' % (index, b"x" * 980))
    command = [sys.executable, "-c", MEASURE, *COMMAND, *WORDS]
    measured = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    code, peak = map(int, measured.stdout.split())
    assert code == 0
    with path.open("rb") as output:
        assert sum(b'"error"' not in line for line in output) == count
    return peak


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs elsewhere")
def test_memory_is_flat_however_large_the_output(tmp_path: Path) -> None:
    """A retry in an output of 200 MB takes less than 80 MiB at the peak, and about what one in 20 MB takes."""
    (tmp_path / "jobs.py").write_text(MODULE)
    fewer, many = (peak_bytes(tmp_path, count) for count in (20_000, 200_000))
    print(f"peak: {fewer / MEBIBYTE:.1f} MiB for 20 MB, {many / MEBIBYTE:.1f} MiB for 200 MB")
    assert many < 80 * MEBIBYTE
    assert many < fewer + 16 * MEBIBYTE  # it varies by some MiB: threads have heaps of their own


@pytest.mark.parametrize("name", ["out.jsonl", "out.json"])
@pytest.mark.parametrize("kept", [False, True])
async def test_items_that_fail_again_stay_recorded_failures(tmp_path: Path, name: str, kept: bool) -> None:
    """After each retry the output is that of a run whose items failed in the very same way."""
    bad = set(range(0, 40, 3))

    async def worker(item: int) -> dict[str, int]:
        if item in bad:
            raise ValueError(f"{item} is bad")
        return {"value": item}

    output, whole = tmp_path / name, tmp_path / f"whole-{name}"
    summary = await run_resumable(worker, range(40), output=output, on_error="record", keep_checkpoint=kept)
    assert summary.failed == len(bad)
    while bad:
        before = len(bad)
        for index in sorted(bad)[:5]:
            bad.discard(index)
        summary = await retry_failed(worker, output, concurrency=3, retry=2)
        assert (summary.total_items, summary.failed) == (before, len(bad))
        await run_resumable(worker, range(40), output=whole, on_error="record")
        assert output.read_bytes() == whole.read_bytes()
    if kept:
        again = await run_resumable(worker, range(40), output=output, on_error="record", keep_checkpoint=True)
        assert (again.executed, again.failed) == (0, 0)
    assert (await retry_failed(worker, output)).total_items == 0


def test_the_command_says_with_its_exit_code_whether_failures_remain(tmp_path: Path) -> None:
    """3 while they do, then 0."""
    with Folder(tmp_path) as folder:
        folder.write(
            "jobs.py", "import os\nasync def work(item):\n    return 1 // (int(item) % 5 + (os.path.exists('ok')))\n"
        )
        folder.write_items(20)
        ran = folder.run(
            "run", "--input", "items.txt", "--output", "o.jsonl", "--worker", "jobs:work", "--on-error", "record"
        )
        assert (ran.code, ran.summary["failed"]) == (3, 4)
        again = folder.run("retry-failed", "o.jsonl", "--worker", "jobs:work", "--retries", "1", "--retry-initial", "0")
        assert (again.code, again.summary["failed"]) == (3, 4)
        folder.write("ok", "")
        mended = folder.run("retry-failed", "o.jsonl", "--worker", "jobs:work")
        assert (mended.code, mended.summary["failed"], mended.summary["executed"]) == (0, 0, 4)
        assert b"error" not in (folder / "o.jsonl").read_bytes()


async def test_a_partial_output_is_no_output(folder: Path) -> None:
    """Neither by its own name nor by that of the output to be; and nothing is touched."""
    for name, said in (("out.jsonl.partial", "a partial output"), ("out.jsonl", "not finished")):
        (folder / "out.jsonl.partial").write_text('{"index":0,"error":{"type":"E","message":""},"item":"x"}\n')
        before = sorted(folder.iterdir())
        with pytest.raises(UsageError, match=said):
            await retry_failed(str, folder / name)
        assert sorted(folder.iterdir()) == before
