"""What a run shows on standard error: its log, and where it stands.

On a terminal a few lines at the bottom are drawn anew four times a second, by a thread of their own; the log, and
what a worker prints, goes above them. Elsewhere progress is a line of the log every 30 seconds. The cursor is never
hidden: even after a SIGKILL the terminal is as it was.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import select
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

import click

from .errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from .progress import Progress

logger = logging.getLogger("async_recovery")

Wanted = Literal["auto", "always", "never"]
PLAIN_INTERVAL_S = 30.0
REDRAWS_PER_S = 4
SPARE_CELLS = 2  # at the end of each line: room for the ^C that a terminal echoes


class Screen:
    """Configures logging, and shows the progress of one run while it is entered.

    :param level: the least important messages of this package that are shown; others: warnings, or by `others`.
    :param log_json: each message is a JSON object on a line of its own.
    """

    def __init__(
        self, *, level: int, others: int, log_json: bool = False, progress: Wanted = "auto", color: Wanted = "auto"
    ) -> None:
        from .progress import Recent  # here: `--help` needs nothing of it

        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        is_dumb = os.environ.get("TERM", "") in ("dumb", "unknown")
        for_people = is_terminal and not log_json and level <= logging.INFO
        self._is_live = not is_dumb and (progress == "always" or (progress == "auto" and for_people))
        self._is_plain = not self._is_live and progress != "never"
        has_color = color == "always" or (
            color == "auto" and is_terminal and not is_dumb and not os.environ.get("NO_COLOR") and not log_json
        )
        if sys.stderr is None:  # closed: nothing can be shown
            self._is_live = has_color = False
        self._console = _console(has_color) if self._is_live or has_color else None
        self._live: Live | None = None
        self._height = 0
        self._progress: Progress | None = None
        self._recent = Recent()
        self._told_s = 0.0
        handler = _Handler(self._console)
        time_format = "%H:%M:%S" if self._is_live else None  # for somebody who looks on
        lines_of_text = logging.Formatter("%(asctime)s %(levelname)s %(message)s", time_format)
        handler.setFormatter(_JsonLines() if log_json else lines_of_text)
        logging.basicConfig(handlers=[handler], level=others)
        logging.getLogger("async_recovery").setLevel(level)

    def __enter__(self) -> Screen:
        if self._is_live:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._frame,
                console=self._console,
                refresh_per_second=REDRAWS_PER_S,
                transient=True,
                # On a terminal, what a worker prints goes above the display; in a file or a pipe it belongs as it is.
                redirect_stdout=all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr)),
            )
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            for stream in (sys.stdout, sys.stderr):  # the start of a line that a worker has not ended
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            self._live.stop()
            self._live = None

    def leave_room_for_records(self) -> None:
        """The records go to standard output: if that is the terminal, nothing is drawn among them."""
        if sys.stdout is not None and sys.stdout.isatty():
            self._is_live = False

    def show(self, progress: Progress) -> None:
        """Where the run stands now: cheap, the drawing is done by the thread."""
        self._recent.add(progress)
        self._progress = progress  # last: the thread looks at it first
        if self._is_plain and progress.elapsed_s - self._told_s >= PLAIN_INTERVAL_S:
            from .readout import plain

            self._told_s = progress.elapsed_s
            logger.info("%s", plain(progress, self._recent.first), extra={"progress": progress})

    def wipe(self) -> None:
        """Remove what is drawn, for a signal handler that ends the process: takes no lock and waits for nothing."""
        if self._live is not None:
            erase = "\r\x1b[2K" + "\x1b[1A\x1b[2K" * (self._height - 1)
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if select.select([], [sys.stderr], [], 0)[1]:
                    os.write(sys.stderr.fileno(), erase.encode())

    def _frame(self) -> Text:
        from rich.text import Text

        from .readout import lines

        assert self._console is not None
        width = max(1, self._console.width - SPARE_CELLS)
        if self._progress is None:
            self._height = 1
            return Text("reading what is there"[:width])
        is_ascii = not (self._console.encoding or "").lower().startswith("utf")
        found = lines(self._progress, width, earlier=self._recent.first, ascii_only=is_ascii)
        self._height = min(len(found), self._console.height)
        return Text("\n").join(Text.assemble(*line) for line in found)


def say(line: str) -> None:
    """One line for people, or for `--log-json`. Whether anybody reads it must not change how the run ends."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _JsonLines):
            handler.handle(logging.LogRecord(logger.name, logging.ERROR, "", 0, line, None, None))
            return
    with contextlib.suppress(OSError):
        click.echo(line, err=True)


def shows(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of what is shown, and gives the command the `screen` that follows from them."""

    @_QUIET
    @_VERBOSE
    @_LOG_JSON
    @click.option("--progress", type=_WANTED, default="auto", show_default=True, help="Draw where the run stands.")
    @click.option("--color", type=_WANTED, default="auto", show_default=True, help="Colors; auto respects NO_COLOR.")
    @functools.wraps(command)
    def with_screen(quiet: bool, verbose: int, log_json: bool, progress: Wanted, color: Wanted, **others: Any) -> None:
        command(screen=_screen_of(quiet, verbose, log_json=log_json, progress=progress, color=color), **others)

    return with_screen


def logs(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of a command that shows its log alone, and configures that."""

    @_QUIET
    @_VERBOSE
    @_LOG_JSON
    @functools.wraps(command)
    def with_log(quiet: bool, verbose: int, log_json: bool, **others: Any) -> None:
        command(screen=_screen_of(quiet, verbose, log_json=log_json, progress="never"), **others)

    return with_log


def _screen_of(quiet: bool, verbose: int, **others: Any) -> Screen:
    if quiet and verbose:
        raise UsageError("--quiet with --verbose: leave one of them out")
    return Screen(
        level=logging.ERROR if quiet else logging.DEBUG if verbose > 1 else logging.INFO,
        others=logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)],
        **others,
    )


_QUIET = click.option("-q", "--quiet", is_flag=True, help="Only errors.")
_VERBOSE = click.option(
    "-v", "--verbose", count=True, help="The log of the worker and its libraries, too; -vv: all of it."
)
_LOG_JSON = click.option("--log-json", is_flag=True, help="The log as JSON, an object a line.")


_WANTED = click.Choice(["auto", "always", "never"])


class _Handler(logging.StreamHandler[TextIO]):
    """To standard error; by way of the console, if there is one, which keeps what is drawn below the log."""

    def __init__(self, console: Console | None) -> None:
        super().__init__(sys.stderr)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if self._console is None:
            super().emit(record)
            return
        from rich.text import Text

        style = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else ""
        try:
            self._console.print(Text(self.format(record), style))
        except Exception:
            self.handleError(record)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        import msgspec

        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        if hasattr(record, "progress"):
            told["progress"] = record.progress
        return msgspec.json.encode(told).decode()


class _Tolerant:
    """Standard error that may be gone, or be full: what can not be shown must not end the run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _console(has_color: bool) -> Console:
    from rich.console import Console

    class _VisibleCursor(Console):
        def show_cursor(self, show: bool = True) -> bool:
            """The cursor stays: nothing could bring it back after a SIGKILL."""
            return False

    return _VisibleCursor(
        file=cast("TextIO", _Tolerant(sys.stderr)),
        force_terminal=True,
        force_interactive=True,
        color_system="auto" if has_color else None,
        no_color=not has_color,
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=True,
    )
