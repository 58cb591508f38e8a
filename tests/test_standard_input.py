"""Standard input as the input: kept whole before the job begins, the input of each resume, and gone with the journal.

(Kills between any two steps: `tests/test_kill.py`.)
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from async_recovery.engine import Run, to_its_end
from async_recovery.errors import Stopped, StorageFailed
from async_recovery.files import DISK, Files
from async_recovery.options import Options
from async_recovery.standard_input import SpoolingLedger, StandardInput

from .support.commands import COMMAND, Ended, Folder, end_of, kill, read_committed, wait_until
from .support.faulty_files import FaultyFiles
from .support.file_jobs import Worker, json_lines, names_in
from .support.jobs import LOG, MODULE, runs_in
from .support.virtual_loop import run_virtual

JOB = ("run", "--input", "-", "--output", "out.jsonl", "--worker", "jobs:quick")
HELD = (*JOB[:-1], "jobs:held_from_3", "--concurrency", "2", "--batch-size", "1")
FIRST = """
import asyncio
import os

LOG = os.open("ran.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


async def work(item):
    os.write(LOG, b"%7d\\n" % int(item))
    while not os.path.exists("go"):
        if "FAILS" in os.environ:
            raise ValueError(item)
        await asyncio.sleep(0.005)
    return item
"""
CLOSED = ("sh", "-c", 'exec "$@" <&-', "sh", *COMMAND)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """A folder with ten items and the module of workers."""
    with Folder(tmp_path) as folder:
        folder.write("jobs.py", MODULE)
        folder.write(LOG, "")
        folder.write_items(10)
        yield folder


def run(folder: Folder, *words: str, given: str | None = None, **options: Any) -> Ended:
    """Run to the end with this text on standard input; None: the ten items."""
    text = (folder / "items.txt").read_text() if given is None else given
    with folder.write("given", text).open() as stdin:
        return folder.run(*words, **{"stdin": stdin, **options})


def interrupted(folder: Folder, *more: str) -> None:
    """A job that was killed when three items were done."""
    with (folder / "items.txt").open() as stdin:
        process = folder.start(*HELD, *more, stdin=stdin)
    wait_until(lambda: read_committed(folder / "out.jsonl.checkpoint").mark == 3, process)
    kill(process)
    (folder / "out.jsonl.lock").unlink()
    folder.write("go", "")


def numbers_in(output: Path) -> list[int]:
    return [json.loads(line)["number"] for line in output.read_text().splitlines()]


def said(ended: Ended, code: int, *words: str) -> None:
    """One line of error, and no traceback."""
    assert (ended.code, ended.out) == (code, ""), ended.err
    (line,) = [line for line in ended.err.splitlines() if " INFO " not in line]
    assert line.startswith("Error: ")
    for word in words:
        assert word in line


def begun_to_give(folder: Folder) -> tuple[subprocess.Popen[str], IO[str]]:
    """A run that has kept three items and waits for the next."""
    process = folder.start(*JOB, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("0\n1\n2\n")
    process.stdin.flush()
    temporary = folder / "out.jsonl.input.tmp"
    wait_until(lambda: temporary.exists() and temporary.read_bytes() == b"0\n1\n2\n", process)
    return process, process.stdin


@pytest.mark.parametrize(
    ("more", "given"),
    [
        ([], "0\n1\n\n2"),
        (["--format", "jsonl", "--worker", "jobs:quick"], '"0"\n"1"\n"2"\n'),
        ([], ""),
    ],
)
def test_items_from_a_pipe(folder: Folder, more: list[str], given: str) -> None:
    """They are read as `--format` says, text by default, and nothing but the output is left."""
    before = set(folder.snapshot())
    ended = run(folder, *JOB, *more, given=given)
    assert ended.code == 0, ended.err
    assert numbers_in(folder / "out.jsonl") == ([0, 1, 2] if given else [])
    assert set(folder.snapshot()) - before - {"given"} == {"out.jsonl"}


@pytest.mark.parametrize("what", ["the same", "nothing", "closed", "a terminal"])
def test_a_resume_has_the_spool_as_its_input(folder: Folder, what: str) -> None:
    """The same again, nothing, no standard input at all or a terminal: the job goes on, and nothing is left."""
    interrupted(folder)
    assert (folder / "out.jsonl.input").read_bytes() == (folder / "items.txt").read_bytes()
    assert read_committed(folder / "out.jsonl.checkpoint").input == str(folder / "out.jsonl.input")
    before = len(runs_in(folder / LOG))
    if what == "a terminal":
        person, terminal = os.openpty()
        ended = folder.run(*HELD, stdin=terminal)
        os.close(person)
        os.close(terminal)
    elif what == "closed":
        ended = folder.run(*HELD, command=CLOSED)
    else:
        ended = run(folder, *HELD, given="" if what == "nothing" else None)
    assert ended.code == 0, ended.err
    assert sorted(runs_in(folder / LOG)[before:]) == list(range(3, 10))
    assert numbers_in(folder / "out.jsonl") == list(range(10))
    assert not [name for name in names_in(folder.path) if name.startswith("out.jsonl.")]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("0\n1\n2\n3\n4\n5\n6\n7\n8\n8\n", "bytes 0 to 20 differ"),
        ("0\n1\n2\n", "ends after 6 bytes, 20 are there"),
        ("".join(f"{number}\n" for number in range(12)), "goes on after the 20 bytes that are there"),
    ],
    ids=["differs", "shorter", "longer"],
)
def test_another_input_on_a_resume_is_refused(folder: Folder, given: str, found: str) -> None:
    """`InputChanged` before any item runs, with the cure, and nothing has changed; --fresh takes the new one."""
    interrupted(folder)
    folder.write("given", given)
    before = folder.snapshot()
    said(run(folder, *HELD, given=given), 4, "standard input is not what was kept", found, "< /dev/null", "--fresh")
    assert folder.snapshot() == before
    assert run(folder, *HELD, "--fresh", given=given).code == 0
    assert numbers_in(folder / "out.jsonl") == [int(line) for line in given.split()]


def test_a_retry_before_the_job_is_finished_names_its_line(folder: Folder) -> None:
    """With standard input as its input, and not the file that it is kept in, which goes with that job alone."""
    folder.write("out.jsonl", "{}\n")
    interrupted(folder)
    ended = folder.run("retry-failed", "out.jsonl", "--worker", "jobs:held_from_3")
    said(ended, 4, "`async-recovery run --input - --output out.jsonl --worker jobs:held_from_3`")
    assert folder.run(*HELD).code == 0
    assert not [name for name in names_in(folder.path) if name.startswith("out.jsonl.")]


def test_a_spool_that_is_gone_is_a_changed_input(folder: Folder) -> None:
    """A job is not resumed with what merely comes on standard input now: the line names the file and --fresh."""
    interrupted(folder)
    (folder / "out.jsonl.input").unlink()
    said(run(folder, *HELD), 4, "out.jsonl.input", "is missing", "--fresh")


@pytest.mark.parametrize("what", ["closed", "a terminal"])
def test_a_fresh_start_with_nobody_to_give_anything(folder: Folder, what: str) -> None:
    """A clear mistake of usage, and no stray file, nor folder."""
    before = folder.snapshot()
    words = ["--output", "new/out.jsonl"]
    if what == "closed":
        ended = folder.run(*JOB, *words, command=CLOSED)
    else:
        person, terminal = os.openpty()
        ended = folder.run(*JOB, *words, stdin=terminal)
        os.close(person)
        os.close(terminal)
    said(ended, 2, "nothing is given on standard input", "--input")
    assert folder.snapshot() == before


@pytest.mark.parametrize("to", [["--output", "out.jsonl"], ["--output", "-", "--checkpoint", "out.jsonl.checkpoint"]])
@pytest.mark.parametrize("why", ["it was stopped", "it was killed", "an item failed"])
def test_a_job_of_which_nothing_is_done_keeps_its_input(folder: Folder, why: str, to: list[str]) -> None:
    """What can not be given again stays however a run ends, and nothing on standard input goes on with it."""
    words = [*JOB[:3], *to, "--worker", "first:work", "--drain-timeout", "0"]
    spool = folder / ("out.jsonl.input" if "-" not in to else "out.jsonl.checkpoint.input")
    folder.write("first.py", FIRST)
    with folder.write_items(10, "given").open() as stdin:
        process = folder.start(*words, stdin=stdin, env={"FAILS": "1"} if why == "an item failed" else {})
    if why != "an item failed":
        wait_until(lambda: len(runs_in(folder / LOG)) > 0, process)
        process.send_signal(signal.SIGKILL if why == "it was killed" else signal.SIGTERM)
    assert end_of(process).code == {"it was stopped": 143, "it was killed": -9, "an item failed": 1}[why]
    assert spool.read_bytes() == (folder / "given").read_bytes()
    for lock in folder.path.glob("*.lock"):
        lock.unlink()
    folder.write("other", "1\n")
    before = folder.snapshot()
    with (folder / "other").open() as stdin:
        said(folder.run(*words, stdin=stdin), 4, "standard input is not what was kept", "/dev/null")
    assert folder.snapshot() == before
    folder.write("go", "")
    ended = folder.run(*words)
    assert ended.code == 0, ended.err
    records = ended.out if "-" in to else (folder / "out.jsonl").read_text()
    assert [json.loads(line)["result"] for line in records.splitlines()] == [str(number) for number in range(10)]
    assert not [name for name in names_in(folder.path) if name.startswith("out.jsonl.")]


def test_a_bad_first_line_stays_as_well(folder: Folder) -> None:
    """Nothing on standard input is not taken for no items; what is given instead is a new job."""
    words = (*JOB, "--format", "jsonl")
    for given in ("{broken\n", ""):
        said(run(folder, *words, given=given), 1, "out.jsonl.input, line 1", "not valid JSON")
    assert run(folder, *words, "--fresh", given='"7"\n').code == 0
    assert numbers_in(folder / "out.jsonl") == [7]
    assert {name for name in names_in(folder.path) if name.startswith("out")} == {"out.jsonl"}


def test_kill_while_it_is_kept(folder: Folder) -> None:
    """No journal, no spool under its own name; the next start keeps all of it anew, and leaves nothing behind."""
    process, _ = begun_to_give(folder)
    kill(process)
    assert {name for name in names_in(folder.path) if name.startswith("out")} == {
        "out.jsonl.input.tmp",
        "out.jsonl.lock",
    }
    assert run(folder, *JOB).code == 0
    assert numbers_in(folder / "out.jsonl") == list(range(10))
    assert {name for name in names_in(folder.path) if name.startswith("out")} == {"out.jsonl"}


@pytest.mark.parametrize("is_kept", [False, True], ids=["nothing before", "an input that was kept before"])
def test_nothing_is_not_the_rest_of_an_input_that_was_cut(folder: Folder, *, is_kept: bool) -> None:
    """Killed before it was kept, it is neither an empty input nor the one before: refused, with both cures."""
    if is_kept:
        folder.write("out.jsonl.input", "5\n")
    process, _ = begun_to_give(folder)
    kill(process)
    (folder / "out.jsonl.lock").unlink()
    folder.write("given", "")
    before = folder.snapshot()
    said(run(folder, *JOB, given=""), 2, "out.jsonl.input.tmp", "give all of it again", "remove the file")
    assert folder.snapshot() == before
    assert run(folder, *JOB, given="8\n").code == 0
    assert numbers_in(folder / "out.jsonl") == [8]
    assert {name for name in names_in(folder.path) if name.startswith("out")} == {"out.jsonl"}


def test_a_signal_while_it_is_kept(folder: Folder) -> None:
    """The first Ctrl-C ends a run that waits for standard input, with code 130 and no stray file."""
    process, _ = begun_to_give(folder)
    process.send_signal(signal.SIGINT)
    ended = end_of(process)
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    assert not [name for name in names_in(folder.path) if name.startswith("out")]


def test_a_spool_of_a_job_that_never_began_is_used_or_replaced(folder: Folder) -> None:
    """Killed between spool and journal: with nothing on standard input it is the input, and else it is written anew."""
    for given, expected in (("", [5, 6]), ("7\n8\n", [7, 8])):
        folder.write("out.jsonl.input", "5\n6\n")
        assert run(folder, *JOB, given=given).code == 0
        assert numbers_in(folder / "out.jsonl") == expected
        assert not (folder / "out.jsonl.input").exists()


def test_two_starts_at_once(folder: Folder) -> None:
    """The second one is refused while the first one still reads, and neither reads nor writes anything."""
    process, stdin = begun_to_give(folder)
    before = folder.snapshot()
    said(folder.run(*JOB, stdin=subprocess.DEVNULL), 75, "another run is working on this output")
    assert folder.snapshot() == before
    stdin.write("3\n")
    ended = end_of(process)
    assert ended.code == 0, ended.err
    assert numbers_in(folder / "out.jsonl") == [0, 1, 2, 3]


def test_a_kept_job_keeps_its_input(folder: Folder) -> None:
    """With --keep-checkpoint the spool stays, and the same line compares it, and what is given, and runs nothing."""
    words = (*JOB, "--keep-checkpoint")
    assert run(folder, *words).code == 0
    assert (folder / "out.jsonl.input").exists()
    for given in ("", None):
        again = run(folder, *words, given=given)
        assert (again.code, again.summary["executed"]) == (0, 0), again.err
    said(run(folder, *words, given="1\n"), 4, "standard input is not what was kept")
    with (folder / "out.jsonl.input").open("a") as spool:
        spool.write("10\n")
    said(run(folder, *words, given=""), 4, "the input has grown")


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ("out.jsonl.input", "would be overwritten"),
        ("out.jsonl.input.tmp", "another name"),
    ],
)
def test_the_spool_is_none_of_the_other_files(folder: Folder, checkpoint: str, words: str) -> None:
    """A checkpoint of the spool's name is refused, and nothing is touched."""
    folder.write("given", "1\n")
    before = folder.snapshot()
    said(run(folder, *JOB, "--checkpoint", checkpoint, given="1\n"), 2, words)
    assert folder.snapshot() == before


@pytest.mark.parametrize("name", ["out.jsonl.input", "out.jsonl.input.tmp"])
def test_what_is_no_regular_file_is_not_replaced_by_the_spool(folder: Folder, name: str) -> None:
    """A folder or a link in its place is refused before anything is read."""
    folder.write("given", "1\n")
    (folder / name).mkdir()
    said(run(folder, *JOB, given="1\n"), 2, name, "not a regular file")
    (folder / name).rmdir()
    (folder / name).symlink_to("items.txt")
    before = folder.snapshot()
    said(run(folder, *JOB, given="1\n"), 2, name, "not a regular file")
    assert folder.snapshot() == before


def test_a_dry_run_leaves_standard_input_alone(folder: Folder) -> None:
    """It tells what is there, and neither reads nor waits."""
    reader, writer = os.pipe()
    assert "starts anew" in folder.run(*JOB, "--dry-run", stdin=reader).out
    interrupted(folder)
    before = folder.snapshot()
    ended = folder.run(*HELD, "--dry-run", stdin=reader)
    os.close(reader)
    os.close(writer)
    assert (ended.code, "resumes at index 3" in ended.out) == (0, True), ended.out + ended.err
    assert folder.snapshot() == before


def test_a_disk_that_is_full_before_all_of_it_is_kept(folder: Folder) -> None:
    """One line, code 74, no stray file; and `verify` of a job that goes on compares the spool."""
    limited = ("sh", "-c", 'ulimit -f 98 && exec "$@"', "sh", *COMMAND)  # blocks of 512 or 1024 bytes
    before = set(folder.snapshot())
    said(run(folder, *JOB, given="1\n" * 200_000, command=limited), 74, "can not be kept", "File too large")
    assert set(folder.snapshot()) - {"given"} == before


NAMES = [f"item {number}" for number in range(12)]


def life(folder: Path, files: Files, given: bytes) -> Worker:
    """One run of the whole job over this seam."""
    worker = Worker()
    (folder.parent / "given").write_bytes(given)
    descriptor = os.open(folder.parent / "given", os.O_RDONLY)
    ledger = SpoolingLedger(str(folder / "out.jsonl"), None, files=files)
    source = StandardInput(ledger.spool, None, descriptor)
    try:
        run_virtual(to_its_end(Run(worker, source, ledger, Options(concurrency=3, batch_size=2, drain_timeout=0))))
    finally:
        os.close(descriptor)
    return worker


class Told(Files):
    """Tells what was made durable, renamed and removed, by the names in the folder."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def fsync(self, descriptor: int) -> None:
        super().fsync(descriptor)
        self.steps.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")  # noqa: PTH115

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self.steps.append(f"name {Path(target).name}")

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self.steps.append(f"remove {Path(path).name}")


def test_the_spool_is_durable_before_the_journal_and_goes_with_it(tmp_path: Path) -> None:
    """Content, name and folder are synced before there is a journal; it goes before one that says complete."""
    folder = tmp_path / "place"
    folder.mkdir()
    told = Told()
    life(folder, told, "".join(f"{name}\n" for name in NAMES).encode())
    steps = [step for step in told.steps if "partial" not in step and step != "fsync out.jsonl"]
    begin = steps.index("fsync out.jsonl.input.tmp")
    assert steps[begin : begin + 3] == ["fsync out.jsonl.input.tmp", "name out.jsonl.input", "fsync place"]
    assert steps.index("name out.jsonl.checkpoint") > begin + 2
    assert steps.index("name out.jsonl") < steps.index("remove out.jsonl.input")
    assert steps[-4:] == ["remove out.jsonl.input", "fsync place", "remove out.jsonl.checkpoint", "fsync place"]


def test_a_stop_just_as_it_ends_may_have_ended_the_giver_too(tmp_path: Path) -> None:
    """As Ctrl-C does in a pipe: what came is not taken for the whole input, and nothing of it is left."""

    class Stopping(Files):
        def rename(self, source: str, target: str) -> None:
            super().rename(source, target)
            loops[0].call_soon_threadsafe(run.stop)

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await to_its_end(run)

    loops: list[asyncio.AbstractEventLoop] = []
    folder = tmp_path / "place"
    folder.mkdir()
    ledger = SpoolingLedger(str(folder / "out.jsonl"), None, files=Stopping())
    with (tmp_path / "given").open("w+") as given:
        run = Run(Worker(), StandardInput(ledger.spool, None, given.fileno()), ledger, Options())
        with pytest.raises(Stopped):
            asyncio.run(main())
    assert names_in(folder) == set()


@pytest.mark.parametrize("dies", [False, True])
def test_any_operation_that_fails_costs_nothing(tmp_path: Path, *, dies: bool) -> None:
    """It is a failed storage, and the same line ends the job, with nothing done twice and nothing left behind."""
    lines, folder = "".join(f"{name}\n" for name in NAMES).encode(), tmp_path / "place"
    folder.mkdir()
    undisturbed = FaultyFiles()
    life(folder, undisturbed, lines)
    assert names_in(folder) == {"out.jsonl"}
    failed = 0
    for at in range(len(undisturbed.calls)):
        for path in folder.iterdir():
            path.unlink()
        files = FaultyFiles(at, errno.EIO, dies=dies, torn=True)
        try:
            life(folder, files, lines)
        except StorageFailed:
            failed += 1
        committed = read_committed(folder / "out.jsonl.checkpoint")
        is_kept = (folder / "out.jsonl.input").exists()
        worker = life(folder, DISK, b"" if is_kept else lines)
        assert (folder / "out.jsonl").read_bytes() == json_lines(NAMES)
        assert not [name for name in worker.calls if committed.has(NAMES.index(name))]
        assert names_in(folder) <= {"out.jsonl", "out.jsonl.checkpoint.tmp"}
    assert failed > len(undisturbed.calls) // 2
