"""`torture` of the command line: the very command `run` that the user would type, in a folder of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import click
import msgspec

from . import command_worker, engine, standard_input, standard_output  # noqa: F401  so that no fork has to
from .errors import AsyncRecoveryError, IncompleteRun, UsageError
from .export import export
from .ledgers import files_of, is_address, public, sqlite_path
from .screen import say
from .sqlite import address_of
from .torture import TorturedJob, lines_of, torture_job
from .torture_life import Orders, Watch, WatchedRun
from .torture_report import Report

# The folder goes last, where Python puts it first: no file of the user's is taken for a module that we need.
AFRESH = (
    "import sys; sys.path.append(sys.path.pop(0)); "
    "from async_recovery.torture_command import live_afresh; live_afresh(*sys.argv[1:])"
)


def torture_command(
    run: click.Command,
    words: Sequence[str],
    *,
    items: int,
    boundaries: int,
    random: int,
    seed: int,
    effects: str | None,
) -> Report:
    """The crash test of `run` with these words.

    :param effects: a script of /bin/sh that prints what the side effects of a job were, and clears them away.
    """
    output = _checked(run, words)

    def afresh(orders: Orders, folder: Path) -> list[str]:
        """Another interpreter hashes strings in another way, and imports the worker's module in another second."""
        order = msgspec.json.encode(orders).decode()
        return [sys.executable, "-c", AFRESH, order, *_words_in(folder, words, output)]

    job = TorturedJob(
        lambda folder: _live(run, _words_in(folder, words, output)),
        lambda folder: _results_in(folder, output),
        None if effects is None else lambda: _printed_by(effects),
        afresh,
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing to drain here: leave, and take the rest along
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    return torture_job(job, first=items, boundaries=boundaries, random_kills=random, seed=seed, tell=say)


def _checked(run: click.Command, words: Sequence[str]) -> str:
    """The name of the output in the job's own folder, or its address."""
    given = run.make_context("run", list(words)).params
    if given["input_"] == "-":
        raise UsageError("--input - can be read only once: put the items into a file")
    if given["executor"] is not None:
        raise UsageError("--executor with torture: it kills the coordinator, which is the same without; leave it out")
    for name in ("fresh", "dry_run"):
        if given[name]:
            raise UsageError(f"--{name.replace('_', '-')} leaves nothing to be resumed: leave it out")
    output: str = given["output"]
    if is_address(output):
        if files_of(output):  # of SQLite
            return output
        raise UsageError(
            f"torture with --output {public(output)}: it works in a folder of its own, where only a file or a database "
            "of SQLite can be made: give --output FILE or sqlite:///FILE; to PostgreSQL it takes a test, with "
            "torture(..., ledger=, results=) and a PostgresLedger in it"
        )
    return "results.jsonl" if output == "-" else Path(output).name


def _words_in(folder: Path, words: Sequence[str], output: str) -> list[str]:
    """The same command in that folder: the last word on an option counts."""
    where = _place_in(folder, output)
    return [*words, "--output", where, *([] if is_address(where) else ["--checkpoint", f"{where}.checkpoint"])]


def _place_in(folder: Path, output: str) -> str:
    if not is_address(output):
        return str(folder / output)
    path, name = sqlite_path(output)
    return address_of(str(folder / Path(path).name), name)


def _results_in(folder: Path, output: str) -> list[bytes] | None:
    """The finished output as the lines of a file."""
    where = _place_in(folder, output)
    if not is_address(where):
        return lines_of(Path(where))
    exported = folder.parent / "results.jsonl"
    try:
        anyio.run(export, where, str(exported))
    except (IncompleteRun, UsageError):  # not complete, or not even begun
        return None
    return lines_of(exported)


def _live(run: click.Command, words: list[str]) -> int:
    setattr(engine, "Run", WatchedRun)  # noqa: B010  where the command finds it
    sys.argv = ["async-recovery", "run", *words]
    run.main(words, prog_name="async-recovery run", standalone_mode=False)
    return 0


def live_afresh(orders: str, *words: str) -> None:
    """The same in an interpreter of its own."""
    from .cli import run

    WatchedRun.watch = Watch(msgspec.json.decode(orders, type=Orders))
    try:
        _live(run, list(words))
    except AsyncRecoveryError as error:
        say(f"Error: {error}")
        os._exit(error.exit_code)


def _printed_by(script: str) -> str:
    done = subprocess.run(["/bin/sh", "-c", script], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise UsageError(f"--effects ended with exit status {done.returncode}: it must print the side effects")
    return done.stdout.decode(errors="backslashreplace")
