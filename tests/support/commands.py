"""The command line as a user starts it: real processes, and the files that they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from async_recovery.checkpoint import Replay

T = TypeVar("T")

COMMAND = (sys.executable, "-m", "async_recovery")
DEADLINE_S = 60.0
POLL_S = 0.002


class Ended(NamedTuple):
    """A process that has ended: its exit code (minus the signal that killed it), and what it said."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """Standard output, which has to be one JSON object and nothing else."""
        found: dict[str, Any] = msgspec.json.decode(self.out, type=dict[str, Any])
        return found


class Folder:
    """A folder to run commands in. What is still running when the `with` ends is killed.

    :ivar path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._started:
            process.kill()
            process.communicate()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write(self, name: str, text: str) -> Path:
        """A file with this text."""
        path = self.path / name
        path.write_text(text)
        return path

    def write_items(self, count: int, name: str = "items.txt") -> Path:
        """A file of the numbers below `count`, one a line."""
        return self.write(name, "".join(f"{number}\n" for number in range(count)))

    def start(
        self, *words: str, env: Mapping[str, str] | None = None, command: Iterable[str] = COMMAND, **options: Any
    ) -> subprocess.Popen[str]:
        """Start the command with these words, and do not wait for it."""
        process = subprocess.Popen(
            [*command, *words],
            cwd=self.path,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
            text=True,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        self._started.append(process)
        return process

    def run(self, *words: str, **options: Any) -> Ended:
        """Run the command with these words to its end."""
        return end_of(self.start(*words, **options))

    def snapshot(self, *, times: bool = False) -> dict[str, tuple[object, ...]]:
        """Every file, folder and link below, with mode and content; with `times` also when each was last touched."""
        found: dict[str, tuple[object, ...]] = {}
        for path in sorted(self.path.rglob("*")):
            there = path.lstat()
            holds: object = None
            if path.is_symlink():
                holds = os.readlink(path)  # noqa: PTH115  as it is written there
            elif path.is_file():
                holds = path.read_bytes()
            when = (there.st_mtime_ns, there.st_ctime_ns, there.st_ino) if times else ()
            found[str(path.relative_to(self.path))] = (there.st_mode, holds, *when)
        return found


def end_of(process: subprocess.Popen[str], within_s: float = DEADLINE_S) -> Ended:
    """Wait for the end of a process."""
    out, err = process.communicate(timeout=within_s)
    return Ended(process.returncode, out or "", err or "")


def check_one_line(ended: Ended, code: int, *said: str) -> None:
    """One line on standard error, no traceback, nothing on standard output."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("Error: ")
    for words in said:
        assert words in lines[0]


def kill(process: subprocess.Popen[str]) -> Ended:
    """SIGKILL, whatever it is doing; it may have ended by itself before."""
    process.send_signal(signal.SIGKILL)
    return end_of(process)


def wait_until(look: Callable[[], T], process: subprocess.Popen[str] | None = None, within_s: float = DEADLINE_S) -> T:
    """Look again and again until something true is seen, and return it.

    :param process: stop looking when it has ended: that is an error.
    """
    deadline = time.monotonic() + within_s
    while True:
        ended = process is not None and process.poll() is not None
        if found := look():
            return found
        if ended:
            assert process is not None
            raise AssertionError(f"the process ended before that was seen: {end_of(process)}")
        if time.monotonic() > deadline:
            raise AssertionError(f"that was not seen within {within_s} s")
        time.sleep(POLL_S)


def children_of(pid: int) -> list[int]:
    """The processes that it has started, and that are there."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += map(int, thread.read_text().split())
    return found


class Committed(NamedTuple):
    """What a journal says is committed.

    :ivar begun: there is a journal with a line that counts.
    :ivar offset: how many bytes of the output are committed.
    :ivar complete: the output is whole and only its publication is left; `kept`: not even that.
    :ivar input: the input's path, as the journal has it.
    :ivar failed: recorded failures below the mark.
    :ivar spent: items that are not finished, with their failed attempts.
    """

    begun: bool = False
    mark: int = 0
    ahead: frozenset[int] = frozenset()
    offset: int = 0
    commits: int = 0
    complete: bool = False
    kept: bool = False
    input: str | None = None
    failed: int = 0
    spent: frozenset[tuple[int, int]] = frozenset()

    def has(self, index: int) -> bool:
        """Whether that item must never run again."""
        return index < self.mark or index in self.ahead


def read_committed(journal: Path) -> Committed:
    """Read the journal as a resume does; nothing is committed if there is none."""
    try:
        return committed_in(journal.read_bytes())
    except FileNotFoundError:
        return Committed()


def committed_in(journal: bytes) -> Committed:
    """What a journal of these bytes says is committed."""
    replay = Replay()
    replay.feed(journal)
    state, complete = replay.state, replay.complete
    commits = state.generation if state else 0
    if complete is not None:
        return Committed(
            begun=True,
            mark=complete.summary["total_items"],
            offset=complete.size or 0,
            commits=commits,
            complete=True,
            kept=replay.kept,
            input=complete.input,
            failed=complete.summary["failed"],
        )
    if state is None:
        return Committed()
    offset = state.output.offset if state.output else 0
    ahead = frozenset(replay.ahead)
    return Committed(
        begun=True,
        mark=state.mark,
        ahead=ahead,
        offset=offset,
        commits=commits,
        input=state.input,
        failed=state.failed,
        spent=frozenset((index, found.attempts) for index, found in replay.spent.items() if found.attempts),
    )


def indices_of(output: Path) -> list[int]:
    """The index of each record of a finished output."""
    data = output.read_bytes()
    records = msgspec.json.decode(data) if output.suffix == ".json" else msgspec.json.Decoder().decode_lines(data)
    return [record["index"] for record in records]
