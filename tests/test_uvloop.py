"""On uvloop, which the extra ``fast`` brings: the same promises, at the command line and in a program."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest
import uvloop

from async_recovery import SlowDown, run_resumable

from .support.commands import Folder, end_of, read_committed, wait_until
from .support.jobs import LOG, runs_in

RUN = ("run", "--input", "items.txt", "--output", "out.jsonl")
HELD = ("--worker", "jobs:held_at_3")
ON_UVLOOP = {"ASYNC_RECOVERY_LOOP": "uvloop"}
WORKERS = """
import asyncio

async def of_loop(item):
    await asyncio.sleep(0.001)
    return type(asyncio.get_running_loop()).__module__
"""


@pytest.mark.parametrize(
    ("words", "env", "loop"),
    [
        ([], {"ASYNC_RECOVERY_LOOP": "auto"}, "uvloop"),
        (["--loop", "auto"], {}, "uvloop"),
        (["--loop", "asyncio"], {}, "asyncio.unix_events"),
        ([], {"ASYNC_RECOVERY_LOOP": "asyncio"}, "asyncio.unix_events"),
        (["--loop", "uvloop"], {}, "uvloop"),
    ],
)
def test_the_command_line_takes_it_where_it_is(
    folder: Folder, words: list[str], env: dict[str, str], loop: str
) -> None:
    """By itself, by an option, or by the environment; the workers run on it."""
    folder.write("loops.py", WORKERS)
    ended = folder.run(*RUN, "--worker", "loops:of_loop", *words, env=env)
    assert ended.code == 0, ended.err
    lines = (folder / "out.jsonl").read_bytes().splitlines()
    assert [msgspec.json.decode(line) for line in lines] == [{"index": i, "result": loop} for i in range(10)]


def test_where_it_is_missing(folder: Folder) -> None:
    """It is an error to ask for it, and none to leave the choice to the program."""
    without = "import sys; sys.modules['uvloop'] = None\nfrom async_recovery.cli import main; main()"
    missing = [sys.executable, "-c", without]
    ended = folder.run(*RUN, "--loop", "uvloop", command=missing)
    assert ended.code == 2
    assert ended.err == "Error: --loop uvloop: uvloop is not installed: pip install 'async-recovery[fast]'\n"
    assert not (folder / "out.jsonl").exists()
    ended = folder.run(*RUN, "--loop", "auto", "--worker", "jobs:quick", command=missing)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_stops_it_and_either_loop_resumes(folder: Folder, signals: int) -> None:
    """What has finished is committed, and is not run again; what was in flight is drained, or cancelled."""
    process = folder.start(*RUN, *HELD, "--batch-size", "1", "--drain-timeout", "600", env=ON_UVLOOP)
    wait_until(lambda: len(read_committed(folder / "out.jsonl.checkpoint").ahead) == 6, process)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert any("stopping" in line for line in process.stderr)  # two signals at one moment are one
    if signals == 2:
        process.send_signal(signal.SIGINT)
    else:
        (folder / "go").touch()
    ended = end_of(process)
    assert ended.code == (130 if signals == 2 else 0), ended.err
    if signals == 2:
        (folder / "go").touch()
        ended = folder.run(*RUN, *HELD)
        assert (ended.code, ended.summary["executed"]) == (0, 1), ended.err
    assert len((folder / "out.jsonl").read_bytes().splitlines()) == 10
    assert Counter(runs_in(folder / LOG)) == Counter([*range(10), *([3] if signals == 2 else [])])


def test_no_attempt_begins_in_a_pause(tmp_path: Path) -> None:
    """Pauses last as long as the worker asked for, by the clock of the machine."""
    begun: list[float] = []
    until: list[float] = []

    async def worker(item: int) -> int:
        begun.append(time.monotonic())
        if item % 5 == 0 and len(until) < 20:
            while time.monotonic() < begun[-1] + 0.003:
                pass  # the clock of this loop stands still meanwhile
            until.append(time.monotonic() + 0.005)
            raise SlowDown(0.005)
        return item

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_resumable(worker, range(100), output=tmp_path / "out.jsonl", concurrency=1))
    assert len(until) == 20
    for end in until:
        assert [moment for moment in begun if end - 0.005 < moment < end] == []
