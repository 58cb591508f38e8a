"""Records on standard output: in order, at least once, and a reader who goes away ends the run quietly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .support.commands import COMMAND, Folder, end_of, kill, read_committed, wait_until
from .support.file_jobs import names_in
from .support.jobs import LOG, MODULE, runs_in

COUNT = 3_000
JOB = ("run", "--input", "items.txt", "--output", "-", "--checkpoint", "job", "--concurrency", "50")
QUICK = (*JOB, "--worker", "jobs:quick")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """A folder with items whose records are more than a pipe holds, and the module of workers."""
    with Folder(tmp_path) as folder:
        folder.write("jobs.py", MODULE)
        folder.write(LOG, "")
        folder.write_items(COUNT)
        yield folder


def indices(text: str) -> list[int]:
    """The index of each whole line."""
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line)["index"] for line in whole.splitlines()]


def left(folder: Folder) -> set[str]:
    return names_in(folder.path) - {"jobs.py", "items.txt", LOG}


def resumed(folder: Folder, taken: list[int], **options: Any) -> list[int]:
    """The same line again; what it must keep to, whatever came before. Returns the indices that came."""
    committed, before = read_committed(folder / "job"), len(runs_in(folder / LOG))
    ended = folder.run(*QUICK, **options)
    assert ended.code == 0, ended.err
    came = indices(ended.out)
    assert came == list(range(committed.mark, COUNT))
    assert committed.mark <= len(taken), "nothing is left out"
    assert not any(map(committed.has, runs_in(folder / LOG)[before:])), "nothing is done twice that was committed"
    assert left(folder) == set()
    return came


def test_all_records_in_order(folder: Folder) -> None:
    """Standard output is JSON Lines and nothing else, the summary goes to standard error, no file is left."""
    ended = folder.run(*QUICK)
    assert ended.code == 0, ended.err
    assert indices(ended.out) == list(range(COUNT))
    assert json.loads(ended.err[ended.err.index("{") :])["processed"] == COUNT
    assert left(folder) == set()


def test_from_pipe_to_pipe(folder: Folder) -> None:
    """With both ends a pipe, the input is kept beside the checkpoint while the job is not done."""
    with (folder / "items.txt").open() as stdin:
        process = folder.start(*QUICK[:2], "-", *QUICK[3:], stdin=stdin, errors="replace")
    wait_until(lambda: len(read_committed(folder / "job").ahead) > 0, process)
    assert left(folder) == {"job", "job.input", "job.lock"}
    kill(process)
    ended = folder.run(*QUICK[:2], "-", *QUICK[3:])
    assert ended.code == 0, ended.err
    assert indices(ended.out)[-1] == COUNT - 1
    assert left(folder) == set()


def test_a_checkpoint_is_required(folder: Folder) -> None:
    """One line that names the option, code 2, no stray file."""
    ended = folder.run("run", "--input", "items.txt", "--output", "-")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("Error: --output - without --checkpoint")
    assert left(folder) == set()


def test_standard_output_that_is_closed(folder: Folder) -> None:
    """It is refused before anything begins: another file could have taken its place."""
    ended = folder.run(*QUICK, command=("sh", "-c", 'exec "$@" >&-', "sh", *COMMAND))
    assert (ended.code, ended.err) == (2, "Error: standard output is closed: give --output a file\n")
    assert left(folder) == set()


def test_a_reader_who_goes_away(folder: Folder) -> None:
    """As with `| head`: no line of error, code 1, and the same line goes on with what was not written."""
    process = folder.start(*QUICK, errors="replace")
    assert process.stdout is not None
    taken = [json.loads(process.stdout.readline())["index"] for _ in range(10)]
    process.stdout.close()
    process.stdout = None
    ended = end_of(process)
    assert ended.code == 1
    assert [line for line in ended.err.splitlines() if " INFO " not in line] == []
    assert taken == list(range(10))
    assert left(folder) == {"job"}
    resumed(folder, taken)


def test_kill_in_the_middle(folder: Folder) -> None:
    """After kill -9 the records go on at the last that was acknowledged: some may come twice, none is left out."""
    process = folder.start(*QUICK, errors="replace")
    assert process.stdout is not None
    taken = [json.loads(process.stdout.readline())["index"] for _ in range(1_500)]
    process.kill()
    taken += indices(process.stdout.read())
    process.wait()
    assert taken == list(range(len(taken)))
    committed = read_committed(folder / "job")
    assert 0 < committed.mark < COUNT
    came = resumed(folder, taken)
    assert set(taken) | set(came) == set(range(COUNT))


def test_a_signal_while_the_reader_stands_still(folder: Folder) -> None:
    """What is finished is committed, the exit code is 130, and what was not taken comes again."""
    process = folder.start(*QUICK, "--drain-timeout", "0.2", errors="replace")
    wait_until(lambda: len(read_committed(folder / "job").ahead) == COUNT, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    ended = end_of(process)
    assert "the same line again" in ended.err
    assert left(folder) == {"job"}
    assert len(resumed(folder, indices(ended.out))) == COUNT
    assert len(runs_in(folder / LOG)) == COUNT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_whose_drain_delivers_the_rest(folder: Folder, number: int) -> None:
    """What is written while the run stops is taken; with all of it the job is complete, and nothing is left."""
    folder.write_items(200)
    process = folder.start(*JOB, "--worker", "jobs:held_at_3", "--concurrency", "200")
    wait_until(lambda: len(read_committed(folder / "job").ahead) == 196, process)
    process.send_signal(number)
    (folder / "go").touch()
    ended = end_of(process)
    assert ended.code == 0, ended.err
    assert indices(ended.out) == list(range(200))
    assert left(folder) == {"go"}


def test_a_signal_before_the_end_leaves_what_was_not_written(folder: Folder) -> None:
    """The mark is behind the last record that was written, the message counts as `status` does, nothing comes twice."""
    words = (*JOB, "--worker", "jobs:held_from_3", "--checkpoint-interval", "600")
    log = folder / "log"
    with log.open("w") as stderr:
        process = folder.start(*words, stderr=stderr)
    wait_until(lambda: len(runs_in(folder / LOG)) == 53, process)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "stopping" in log.read_text(), process)
    (folder / "go").touch()
    ended = end_of(process)
    assert ended.code == 130
    assert indices(ended.out) == list(range(53))
    status = json.loads(folder.run("status", "job", "--json").out)
    assert (status["mark"], status["ahead"]) == (53, 0)
    assert "stopped at the mark 53, with 0 items finished ahead of it" in log.read_text()
    assert indices(folder.run(*words).out) == list(range(53, COUNT))
    assert len(runs_in(folder / LOG)) == COUNT


def test_standard_output_that_is_full(folder: Folder) -> None:
    """One line, code 74, and with room the same line goes on."""
    with Path("/dev/full").open("wb") as full:
        ended = folder.run(*QUICK, stdout=full)
    assert ended.code == 74
    (line,) = [line for line in ended.err.splitlines() if " INFO " not in line]
    assert line.startswith("Error: standard output can not be written to: No space left on device")
    resumed(folder, [])


@pytest.mark.parametrize("end", ["stdin", "stdout"])
def test_a_pipe_that_does_not_block(folder: Folder, end: str) -> None:
    """Ends that whoever shares them has made non-blocking are waited for."""
    reader, writer = os.pipe()
    os.set_blocking(reader if end == "stdin" else writer, False)
    if end == "stdin":
        process = folder.start(*QUICK[:2], "-", *QUICK[3:], stdin=reader)
        wait_until(lambda: "job.input.tmp" in left(folder) or "job.lock" in left(folder), process)
        os.write(writer, (folder / "items.txt").read_bytes())
        os.close(writer)
        os.close(reader)
        ended = end_of(process)
    else:
        process = folder.start(*QUICK, stdout=writer, stderr=subprocess.DEVNULL)
        os.close(writer)
        with os.fdopen(reader) as output:
            text = output.read()
        ended = end_of(process)._replace(out=text)
    assert ended.code == 0, ended.err
    assert indices(ended.out) == list(range(COUNT))


def test_a_dry_run_and_a_kept_job(folder: Folder) -> None:
    """A dry run tells what would happen and writes no record; a kept job says that it is complete, and writes none."""
    assert "starts anew" in folder.run(*QUICK, "--dry-run").out
    assert left(folder) == set()
    assert folder.run(*QUICK, "--keep-checkpoint").code == 0
    again = folder.run(*QUICK, "--keep-checkpoint")
    assert (again.code, again.out) == (0, ""), again.err
    verified = folder.run("verify", "job")
    assert verified.code == 0, verified.out + verified.err
