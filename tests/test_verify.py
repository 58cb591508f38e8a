"""`verify` and `run --dry-run`: what they say is there, and what a resume then really does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio
import pytest

from async_recovery.errors import CheckpointUnusable, Mismatch, OutputChanged, UsageError
from async_recovery.sources import CsvSource, file_source, source_of_kind
from async_recovery.status import read_status
from async_recovery.verify import Report, Target, locate, verify

from .support.commands import Folder, kill, read_committed, wait_until
from .support.file_jobs import Worker, json_lines, replay_of, snapshot
from .support.jobs import MODULE
from .test_changes import FORMATS, NAMES, interrupt, resume


def report_of(path: Path, checkpoint: Path | None = None, input: Path | None = None) -> Report:
    """What `verify` says; nothing in the folder may have been touched by it."""
    before = snapshot(path.parent)

    target = locate(str(path), None if checkpoint is None else str(checkpoint))
    report = anyio.run(partial(verify, target, input=None if input is None else str(input)))
    assert snapshot(path.parent) == before
    return report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def text(folder: Path) -> Path:
    """A text input of `NAMES`."""
    path = folder / "in.txt"
    path.write_bytes(FORMATS["text"].bytes(NAMES))
    return path


def nothing(path: Path) -> None:
    pass


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def append(data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(path.read_bytes() + data)

    return change


def without_last_commit(path: Path) -> None:
    """The last state line is torn."""
    path.write_bytes(path.read_bytes()[:-9])


def damaged_ahead(path: Path) -> None:
    flip(path, path.read_bytes().index(b'"kind":"ahead"'))


CHANGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "nothing": ("out.jsonl.checkpoint", nothing, ""),
    "a commit that was cut": ("out.jsonl.checkpoint", append(b'{"crc":"00'), ""),
    "a torn last commit": ("out.jsonl.checkpoint", without_last_commit, ""),
    "a damaged ahead line": ("out.jsonl.checkpoint", damaged_ahead, "journal"),
    "bytes after the last commit": ("out.jsonl.partial", append(b'{"index":3,"did'), ""),
    "a byte of the output flipped": ("out.jsonl.partial", lambda path: flip(path, 5), "output"),
    "an output cut": ("out.jsonl.partial", lambda path: path.write_bytes(path.read_bytes()[:-1]), "output"),
    "an output gone": ("out.jsonl.partial", Path.unlink, "output"),
    "an input that has grown": ("in.txt", append(b"item 20\nitem 21"), ""),
    "an input changed at the mark": ("in.txt", lambda path: flip(path, 8 * 3), ""),
    "an input changed before the mark": ("in.txt", lambda path: flip(path, 8), "input"),
    "an input changed under what is ahead": ("in.txt", lambda path: flip(path, 8 * 9), "input"),
    "an input cut": ("in.txt", lambda path: path.write_bytes(path.read_bytes()[: 8 * 9]), "input"),
    "an input gone": ("in.txt", Path.unlink, "input"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_foretold_is_what_a_resume_does(folder: Path, text: Path, change: str) -> None:
    """It is refused if and only if that was said, and otherwise begins where it was said, with what is ahead."""
    interrupt(text, folder)
    name, carry_out, problem = CHANGES[change]
    carry_out(folder / name)
    report = report_of(folder / "out.jsonl")
    assert [subject for subject, _ in report.problems] == ([problem] if problem else [])
    assert report.state == "interrupted"
    if report.next.startswith("is refused"):
        with pytest.raises((Mismatch, UsageError)):
            resume(Worker(), text, folder)
        return
    replay = replay_of(folder / "out.jsonl.checkpoint")
    assert replay.state is not None
    said = f"resumes at index {replay.state.mark}, passing over {len(replay.ahead)} items finished ahead of it"
    assert report.next == said
    worker = Worker()
    summary = resume(worker, text, folder)
    assert (summary.resumed_from, len(worker.calls)) == (
        replay.state.mark,
        summary.total_items - replay.state.mark - len(replay.ahead),
    )


@pytest.mark.parametrize("output", ["out.jsonl", "out.json"])
def test_every_state_of_an_undisturbed_job_is_right(folder: Path, text: Path, output: str) -> None:
    """Interrupted, finished, kept: no problem, and the counts of items and records."""
    interrupt(text, folder, output=output)
    report = report_of(folder / output)
    assert (report.problems, report.records, report.state) == ([], 3, "interrupted")
    assert report_of(folder / f"{output}.checkpoint") == report_of(folder / f"{output}.partial") == report
    assert ("input", "the 3 items below the mark, and the 5 ahead of it, are those that were done") in report.facts
    resume(Worker(), text, folder, output=output)
    report = report_of(folder / output, input=text)
    assert (report.problems, report.records, report.state, report.next) == ([], 20, "finished", "starts anew")
    assert ("input", "20 items, as many as there are records") in report.facts
    resume(Worker(), text, folder, output=output, keep_checkpoint=True)
    report = report_of(folder / output)
    assert (report.problems, report.records, report.state) == ([], 20, "complete")
    assert "with --keep-checkpoint compares the input and runs nothing" in report.next


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"index":0}\n{"index":2}\n', "the record of index 1 is that of index 2"),
        (b'{"index":0}\n{"index":0}\n', "the record of index 1 is that of index 0"),
        (b'{"index":1}\n', "the record of index 0 is that of index 1"),
        (b'{"index":0}\n{"index":1}', "the record of index 1 is missing or cut"),
        (b'{"index":0}\n{"index":1,\n', "the record of index 1 is no record"),
        (b'{"index":0}\n\n{"index":1}\n', "the record of index 1 is no record"),
        (b'{"result":0}\n', "the record of index 0 is no record"),
        (b'{"index":0,"\xff":1}\n', "the record of index 0 is no record"),
    ],
)
def test_a_finished_output_has_every_index_once_and_in_order(folder: Path, content: bytes, problem: str) -> None:
    """Skipped, doubled, cut, torn and foreign lines are each named by their index."""
    (folder / "out.jsonl").write_bytes(content)
    report = report_of(folder / "out.jsonl")
    assert [text for _, text in report.problems if problem in text] != []


@pytest.mark.parametrize(
    ("content", "records"),
    [
        (b"[]\n", 0),
        (b'[\n{"index":0}\n]\n', 1),
        (b'[\n{"index":0},\n{"index":1}\n]\n', 2),
        (b"", None),
        (b"[", None),
        (b"[\n", None),
        (b"[\n]\n", None),
        (b"[]\n[]\n", None),
        (b'{"index":0}\n', None),
        (b'[\n{"index":0},\n]\n', None),
        (b'[\n{"index":0},\n', None),
        (b'[\n{"index":0}\n', None),
        (b'[\n{"index":0}', None),
        (b'[\n{"index":0}\n{"index":1}\n]\n', None),
        (b'[\n{"index":0}\n]\n{"index":1}\n', None),
        (b'[\n{"index":0}\n]\n]\n', None),
        (b'[\n{"index":1}\n]\n', None),
    ],
)
def test_a_finished_array_is_framed_as_one(folder: Path, content: bytes, records: int | None) -> None:
    """Brackets, commas and line ends stand where they are written by a run, and nowhere else."""
    (folder / "out.json").write_bytes(content)
    report = report_of(folder / "out.json")
    assert (report.records, bool(report.problems)) == (records, records is None)
    if records is not None:
        assert len(json.loads(content)) == records


def test_an_output_longer_than_a_block_is_read_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that lie across the ends of blocks are put together."""
    monkeypatch.setattr("async_recovery.verify.READ_BYTES", 7)
    (folder / "out.jsonl").write_bytes(json_lines(NAMES))
    assert report_of(folder / "out.jsonl").records == len(NAMES)


def test_a_count_that_differs_from_that_of_the_input_is_a_problem(folder: Path, text: Path) -> None:
    """A finished output that lacks its end looks whole; beside its input it does not."""
    (folder / "out.jsonl").write_bytes(json_lines(NAMES[:19]))
    assert report_of(folder / "out.jsonl").problems == []
    report = report_of(folder / "out.jsonl", input=text)
    assert report.problems == [("input", "20 items, but 19 in the output".replace("19 in", "19 records in"))]


@pytest.mark.parametrize("published", [False, True])
def test_a_complete_job_that_was_not_cleared_away(folder: Path, text: Path, *, published: bool) -> None:
    """The output is whole, under either of its names: verified, and the same line publishes it and runs nothing."""
    partial, link = folder / "out.jsonl.partial", folder / "link"
    with pytest.raises(OutputChanged):  # the finish stops just before the complete line
        resume(Worker(during={NAMES[2]: lambda: os.link(partial, link)}), text, folder)
    link.unlink()
    journal = folder / "out.jsonl.checkpoint"
    left = journal.read_bytes()
    resume(Worker(), text, folder, keep_checkpoint=True)
    complete = journal.read_bytes().split(b"\n")[0]
    journal.write_bytes(left + complete + b"\n")
    if not published:
        (folder / "out.jsonl").rename(partial)
    report = report_of(folder / "out.jsonl")
    assert (report.problems, report.records, report.state) == ([], 20, "complete")
    assert report.next == "publishes the output, and runs nothing"
    flip(folder / "out.jsonl" if published else partial, 30)
    assert [subject for subject, _ in report_of(folder / "out.jsonl").problems] == ["output"]
    with pytest.raises(OutputChanged):
        resume(Worker(), text, folder)


def test_a_kept_job_whose_input_has_grown(folder: Path, text: Path) -> None:
    """With the checkpoint kept, the same line would refuse it: so it is a problem."""
    resume(Worker(), text, folder, keep_checkpoint=True)
    append(b"item 20\n")(text)
    report = report_of(folder / "out.jsonl")
    assert report.problems == [("input", "it has grown: 20 items were done, and there are more now")]
    assert report.next.startswith("with --keep-checkpoint is refused for the input")
    assert report.next.endswith("without it starts anew")
    (folder / "out.jsonl").unlink()
    assert report_of(folder / "out.jsonl.checkpoint").problems[0][0] == "output"


def test_what_is_no_file_is_refused_at_once(folder: Path) -> None:
    """A pipe or a folder is no job: nobody waits for it."""
    os.mkfifo(folder / "pipe")
    for name in ("pipe", ""):
        with pytest.raises(UsageError, match="is not a regular file"):
            locate(str(folder / name))


def test_a_missing_input_is_the_mistake_of_the_run_that_is_to_be(folder: Path, text: Path) -> None:
    """As the run itself would say; of a job that only lies there, it is a problem."""
    interrupt(text, folder)
    text.unlink()
    target = locate(str(folder / "out.jsonl"))
    with pytest.raises(UsageError, match="there is no input file"):
        anyio.run(partial(verify, target, source=file_source(text)))
    assert [subject for subject, _ in report_of(folder / "out.jsonl").problems] == ["input"]


def test_a_journal_with_nothing_readable(folder: Path, text: Path) -> None:
    """It is a problem, and what the same line would do about it is said."""
    interrupt(text, folder)
    (folder / "out.jsonl.checkpoint").write_bytes(b"no line of this\ncan be read\n")
    report = report_of(folder / "out.jsonl")
    assert report.state == "damaged"
    assert "can be read" in report.problems[0][1]
    assert "aside" in report.next


def test_a_partial_output_that_no_checkpoint_explains(folder: Path, text: Path) -> None:
    """It would be refused, and is told so."""
    interrupt(text, folder)
    (folder / "out.jsonl.checkpoint").unlink()
    assert "name the right one with --checkpoint" in report_of(folder / "out.jsonl").problems[0][1]


def test_a_checkpoint_elsewhere(folder: Path, text: Path) -> None:
    """It is named beside the output; alone it does not tell where the output lies."""
    journal = folder / "progress"
    interrupt(text, folder, checkpoint=journal)
    assert report_of(folder / "out.jsonl", journal).problems == []
    with pytest.raises(UsageError, match="belongs to an output: name that"):
        report_of(journal)


def test_a_job_without_an_output(folder: Path, text: Path) -> None:
    """Its checkpoint alone is compared with the input, whatever its name."""
    for name in ("progress", "side.checkpoint"):
        with pytest.raises(Exception, match="item 7"):
            anyio.run(_interrupt_without_output, text, folder / name)
        report = report_of(folder / name)
        assert (report.problems, report.state, report.records) == ([], "interrupted", None)


async def _interrupt_without_output(text: Path, checkpoint: Path) -> None:
    from async_recovery import run_resumable

    async def worker(item: str) -> None:
        if item == NAMES[7]:
            raise RuntimeError("enough")

    await run_resumable(worker, text, checkpoint=checkpoint, concurrency=1)


def test_items_of_a_program_are_not_compared(folder: Path) -> None:
    """There is no file to compare: that is said, and is no problem."""
    interrupt(NAMES, folder)
    report = report_of(folder / "out.jsonl")
    assert report.problems == []
    assert ("input", "it did not come from a file, and is not compared here") in report.facts


def test_the_kind_of_a_source_is_found_again(folder: Path) -> None:
    """A checkpoint names its source's kind: each that reads files is made from that again, no other is."""
    for source in (CsvSource(folder / "in", ";"), CsvSource(folder / "in"), CsvSource(folder / "in", "\t")):
        again = source_of_kind(source.kind, source.path)
        assert again is not None
        assert again.kind == source.kind
    assert source_of_kind("iterable", "in") is None
    assert source_of_kind("text", None) is None


def test_nothing_there_and_what_can_not_be_read(folder: Path, text: Path) -> None:
    """A missing job and a folder in a file's place are mistakes; a newer format is named."""
    with pytest.raises(UsageError, match="there is neither"):
        report_of(folder / "out.jsonl")
    interrupt(text, folder)
    journal = folder / "out.jsonl.checkpoint"
    data = journal.read_bytes()
    (folder / "out.jsonl.checkpoint").unlink()
    (folder / "out.jsonl.checkpoint").mkdir()
    with pytest.raises(UsageError, match="can not be read"):
        report_of(folder / "out.jsonl")
    journal.rmdir()
    journal.write_bytes(_with_format(data, 2))
    with pytest.raises(CheckpointUnusable, match="format 2"):
        report_of(folder / "out.jsonl")


def _with_format(journal: bytes, number: int) -> bytes:
    from zlib import crc32

    body = journal.split(b"\n")[0][len(b'{"crc":"00000000",') :].replace(b'"format":1', b'"format":%d' % number)
    return b'{"crc":"%08x",' % crc32(body) + body + b"\n"


def test_what_looks_wrong_is_looked_at_again_if_the_journal_has_changed(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that finishes between the reading of its journal and that of its output is seen as it is afterwards."""
    interrupt(text, folder)
    from async_recovery import verify as module

    look = module._look_at_state

    def finished_meanwhile(*args: object) -> None:
        monkeypatch.setattr(module, "_look_at_state", look)
        resume(Worker(), text, folder)
        look(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_look_at_state", finished_meanwhile)
    report = anyio.run(verify, Target(str(folder / "out.jsonl"), "out.jsonl", str(folder / "out.jsonl.checkpoint")))
    assert (report.problems, report.state, report.records) == ([], "finished", 20)


# The command line


JOB = ("--input", "items.txt", "--output", "out.jsonl", "--worker", "jobs:random_latency", "--concurrency", "20")

SLOWLY = {"SLOWNESS": "20"}  # half a minute: it is still at work when it is killed


@pytest.fixture
def job(folder: Path) -> Folder:
    commands = Folder(folder)
    commands.write("jobs.py", MODULE)
    commands.write_items(4000)
    return commands


def test_a_running_job_is_looked_at_without_touching_it(job: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at again and again while it runs, with a commit every few milliseconds: never a problem."""
    assert "name it with --input" in _missing_input(job)
    monkeypatch.chdir(job.path)
    with job:
        process = job.start("run", *JOB, "--checkpoint-interval", "0.005")
        wait_until(lambda: read_committed(job / "out.jsonl.checkpoint").mark, process)
        looks, states = 0, set()
        while process.poll() is None:
            try:
                report = anyio.run(verify, locate(str(job / "out.jsonl")))
            except UsageError:
                if (job / "out.jsonl.checkpoint").exists():
                    raise
                break  # the job has come to its end: there is nothing to look at any more
            assert report.problems == []
            looks += 1
            states.add(report.state)
        assert looks > 3
        assert "running" in states
        assert process.wait() == 0
    print(f"{looks} looks")


def _missing_input(job: Folder) -> str:
    with job:
        process = job.start("run", *JOB, "--checkpoint-interval", "0.005", env=SLOWLY)
        wait_until(lambda: read_committed(job / "out.jsonl.checkpoint").mark, process)
        kill(process)
    ((_, text),) = report_of(job / "out.jsonl").problems
    return text


def test_verify_at_the_command_line(job: Folder) -> None:
    """Code 0 and what a resume would do; code 4 and the problem; touching nothing."""
    with job:
        process = job.start("run", *JOB, "--checkpoint-interval", "0.02", env=SLOWLY)
        wait_until(lambda: read_committed(job / "out.jsonl.checkpoint").mark > 100, process)
        kill(process)
        before = job.snapshot(times=True)
        mark = read_committed(job / "out.jsonl.checkpoint").mark
        verified, dry = job.run("verify", "out.jsonl"), job.run("run", *JOB, "--dry-run")
        assert (verified.code, dry.code) == (0, 0)
        assert verified.out == dry.out
        assert f"resumes at index {mark}" in verified.out
        shown = json.loads(job.run("verify", "out.jsonl", "--json").out)
        assert (shown["state"], shown["problems"]) == ("interrupted", [])
        other = job.run("run", *JOB[:-4], "--worker", "text", "--dry-run")
        assert other.code == 4
        assert "worker 'jobs:random_latency', not 'async_recovery.workers:text'" in other.out
        fresh = job.run("run", *JOB[:-4], "--worker", "text", "--dry-run", "--fresh")
        assert (fresh.code, "starts anew, whatever is there" in fresh.out) == (0, True)
        assert job.snapshot(times=True) == before
        flip(job / "out.jsonl.partial", 20)
        wrong = job.run("verify", "out.jsonl")
        assert (wrong.code, "output: PROBLEM" in wrong.out) == (4, True)


def test_a_dry_run_of_a_new_job_touches_nothing(job: Folder) -> None:
    """It starts anew; a missing input and a bad path are the mistakes that they would be."""
    with job:
        before = job.snapshot(times=True)
        dry = job.run("run", "--input", "items.txt", "--output", "out.jsonl", "--dry-run")
        assert (dry.code, dry.out.splitlines()[-1].split("  ")[-1]) == (0, "starts anew")
        assert job.run("run", "--input", "missing.txt", "--output", "x", "--dry-run").code == 2
        assert job.run("run", "--input", "items.txt", "--output", "items.txt", "--dry-run").code == 2
        assert job.snapshot(times=True) == before


@pytest.mark.parametrize("locked", ["there", "there/out.jsonl.partial", "there/out.jsonl.checkpoint"])
def test_a_dry_run_foretells_what_may_not_be_written(job: Folder, bound: tuple[str, ...], locked: str) -> None:
    """A folder or a file that may only be read: the very line that the run itself would end with."""
    line = ("run", "--input", "items.txt", "--output", "there/out.jsonl", "--worker", "jobs:random_latency")
    with job:
        process = job.start(*line, "--checkpoint-interval", "0.02", env=SLOWLY)
        wait_until(lambda: read_committed(job / "there" / "out.jsonl.checkpoint").mark, process)
        kill(process)
        (job / "there" / "out.jsonl.lock").unlink()
        (job / locked).chmod(0o555 if locked == "there" else 0o444)
        before = job.snapshot()
        dry, ended = job.run(*line, "--dry-run", command=bound), job.run(*line, command=bound)
        assert (ended.code, dry.code, dry.out) == (2, 2, "")
        assert dry.err.split(":")[:2] == ended.err.split(":")[:2]
        assert job.snapshot() == before


def test_verify_and_status_tell_the_same(folder: Path, text: Path) -> None:
    """The mark, what is ahead, and the state."""
    interrupt(text, folder)
    status, report = read_status(str(folder / "out.jsonl")), report_of(folder / "out.jsonl")
    assert (status.state, status.mark) == (report.state, report.records)
    assert ("journal", f"the mark is {status.mark}, {status.ahead} items are finished ahead of it") in report.facts
