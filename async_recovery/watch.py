"""`status` for people: once, or again and again until the job ends."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from .checkpoint import JSON
from .errors import UsageError
from .progress import Progress
from .readout import plain, seen_worker
from .status import Status, read_status

INTERVAL_S = 1.0
COUNTS = ("mark", "ahead", "finished", "failed", "commits", "output_bytes", "damaged_lines")
REMOVED = "complete; its checkpoint has been removed"


def print_status(status: Status, *, as_json: bool) -> None:
    """Show it on standard output."""
    if as_json:
        click.echo(msgspec.json.encode(status))
        return
    _show_any_path()
    sys.stdout.write(f"{_table(status)}\n")


def watch(path: str, *, as_json: bool) -> None:
    """Show the state of the job at `path` every second until it ends, or until SIGINT ends the process.

    On a terminal it is drawn anew in place; elsewhere each change is a line.

    :raises UsageError: if there is no checkpoint there in the beginning.
    """
    signal.signal(signal.SIGINT, _leave_quietly)
    states = _until_the_end(path)
    if as_json or not sys.stdout.isatty():
        _print_lines(states, as_json=as_json)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    _show_any_path()
    console = Console(highlight=False, markup=False)
    console.show_cursor = lambda show=True: False  # type: ignore[method-assign]  # Ctrl-C leaves at any moment
    with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        for status in states:
            live.update(Text(_table(status)), refresh=True)


def _until_the_end(path: str) -> Iterator[Status]:
    status = read_status(path)
    yield status
    while status.state == "running":
        time.sleep(INTERVAL_S)
        try:
            status = read_status(path)
        except UsageError:  # its checkpoint has gone: only the end of a job removes it
            status = msgspec.structs.replace(status, state="complete", running=None, **dict.fromkeys(COUNTS))
        yield status


def _print_lines(states: Iterator[Status], *, as_json: bool) -> None:
    last = None
    for status in states:
        line = msgspec.json.encode(status).decode() if as_json else _line(status)
        if line != last:
            click.echo(line)
        last = line


def _line(status: Status) -> str:
    progress = _progress(status)
    if progress is not None:
        return f"{status.state}: {plain(progress)}"
    if status.finished is None:
        return REMOVED
    return f"{status.state}: {status.finished:,} finished, mark {status.mark:,}, {status.ahead:,} ahead of it"


def _progress(status: Status) -> Progress | None:
    told = (status.running or {}).get("progress")
    return None if told is None else msgspec.convert(told, Progress)


def _table(status: Status) -> str:
    rows = list[tuple[str, str]]()
    shown: dict[str, JSON] = msgspec.to_builtins(status)
    running: Any = shown.pop("running")
    if status.finished is None:
        shown["state"] = REMOVED
    for name, value in shown.items():
        if value is not None:
            rows.append((name.replace("_", " "), str(value)))
    if running:
        rows.append(("held by", f"process {running['pid']} on {running['host']}"))
    progress = _progress(status)
    if progress is not None:
        rows.append(("right now", f"{progress.finished} finished, {progress.in_flight} in flight"))
        if progress.paused:
            rows.append(("paused", progress.paused))
        if progress.held_by is not None:
            held = f"item {progress.held_by} for {progress.held_s:.0f} s, attempt {progress.held_attempt}"
            rows.append(("mark held by", held))
        rows += [(f"worker {seen.name}", seen_worker(seen)) for seen in progress.workers]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)} {value}" for name, value in rows)


def _show_any_path() -> None:
    """Not every terminal can show every path."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _leave_quietly(number: int, frame: object) -> None:
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\n")  # the prompt goes below what is drawn
    os._exit(128 + number)
