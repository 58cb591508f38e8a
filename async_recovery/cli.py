"""The command line: run · status.

Standard output has the summary alone; the log and the progress go to standard error. A user's mistake is one line.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import anyio
import anyio.abc
import click
import msgspec

from . import __version__
from .checkpoint import JSON
from .contracts import RunSummary
from .engine import Limits, Options, Run
from .errors import AsyncRecoveryError, Stopped, UsageError, describe
from .file_ledger import FileLedger
from .progress import Progress
from .sources import file_source
from .status import Status, read_status
from .workers import load

logger = logging.getLogger("async_recovery")

PROGRESS_INTERVAL_S = 10.0
EXIT_CODES = """\b
Exit codes:
  0    complete
  1    an item failed, or the run ended early: resumable
  2    a mistake in the command, a missing input, a folder that can not be written
  3    complete, with recorded failures
  4    input, output, checkpoint or job are not what was left there
  74   the storage failed (disk full, I/O error): resumable
  75   held by another run: try again later
  130  stopped by SIGINT: resumable
  143  stopped by SIGTERM: resumable
"""


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="async-recovery")
def cli() -> None:
    """Run a long list of items once, all of it, whatever happens to the machine.

    Kill it at any moment, run the same line again, and it carries on.
    """


@cli.command(epilog=EXIT_CODES)
@click.option("--input", "input_", default="data/sample_input.txt", show_default=True, help="File of items.")
@click.option(
    "--output",
    default="data/processed_output.json",
    show_default=True,
    help="Where the results go: a JSON array if it ends with .json, else JSON Lines.",
)
@click.option(
    "--worker",
    default="text",
    show_default=True,
    help="module:function, looked for in this folder too; or the built-in text.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "jsonl", "csv", "tsv"]),
    help="What the input holds.  [default: by its suffix, else text]",
)
@click.option("--concurrency", type=int, default=16, show_default=True, help="Items at once.")
@click.option("--checkpoint", help="Where progress is kept.  [default: OUTPUT.checkpoint]")
@click.option("--checkpoint-interval", type=float, default=1.0, show_default=True, help="Seconds between commits.")
@click.option("--batch-size", type=int, help="Commit also when this many items have finished.")
@click.option(
    "--window", type=int, help="How far items may run ahead of the slowest one.  [default: 50000, or 64 x concurrency]"
)
@click.option("--fresh", is_flag=True, help="Start anew, whatever is there.")
@click.option("--keep-checkpoint", is_flag=True, help="Remember that the job is complete: the same line does nothing.")
@click.option(
    "--on-damage",
    type=click.Choice(["restart", "refuse"]),
    default="restart",
    show_default=True,
    help="When nothing in the checkpoint can be read: move it aside and start anew, or stop.",
)
@click.option("--job-version", help="Your version of the job: another one does not resume it.")
@click.option(
    "--drain-timeout",
    type=float,
    default=10.0,
    show_default=True,
    help="Seconds that items in flight get when the run stops.",
)
def run(
    input_: str,
    output: str,
    worker: str,
    format_: str | None,
    concurrency: int,
    checkpoint: str | None,
    checkpoint_interval: float,
    batch_size: int | None,
    window: int | None,
    fresh: bool,
    keep_checkpoint: bool,
    on_damage: Any,
    job_version: str | None,
    drain_timeout: float,
) -> None:
    """Run a worker on each item of a file, and resume what was interrupted.

    \b
    Examples:
      async-recovery run
      async-recovery run --input urls.txt --output pages.jsonl --worker jobs:fetch --concurrency 200
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    options = Options(
        concurrency=concurrency,
        limits=Limits(window=window),
        checkpoint_interval=checkpoint_interval,
        batch_size=batch_size,
        version=job_version,
        drain_timeout=drain_timeout,
        on_progress=_log_progress(),
    )
    options.check()
    sys.path.insert(0, os.getcwd())
    ledger = FileLedger(
        output, checkpoint, input=input_, fresh=fresh, keep_checkpoint=keep_checkpoint, on_damage=on_damage
    )
    source, function = file_source(input_, format_), load(worker)
    summary = anyio.run(_run_with_signals, lambda: Run(function, source, ledger, options))
    click.echo(msgspec.json.format(msgspec.json.encode(summary)).decode())
    _leave(3 if summary.failed else 0)


@cli.command(epilog=EXIT_CODES)
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="As a JSON object on standard output.")
def status(path: str, as_json: bool) -> None:
    """Show where the job stands whose output or checkpoint is PATH. Touches nothing, also while it runs.

    \b
    Examples:
      async-recovery status pages.jsonl
      async-recovery status pages.jsonl --json
    """
    found = read_status(path)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        _print_status(found)


def main() -> None:
    """The entry point: runs the command, and turns every error into one line and an exit code."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"Error: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more: end quietly
        sys.exit(1)
    except Stopped as error:
        click.echo(f"{error}:\n  {_resume_line()}", err=True)
        _leave(_signal_exit_code)
    except AsyncRecoveryError as error:
        click.echo(f"Error: {error}", err=True)
        _leave(error.exit_code)


_signal_exit_code = Stopped.exit_code


async def _run_with_signals(make: Callable[[], Run]) -> RunSummary:
    """Signals: the first drains and commits, the second cancels what is in flight and commits, the third ends."""
    run = make()
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_obey, signals, run)
            try:
                return await run.main()
            except Exception as error:
                failed: Exception = error
            finally:
                tasks.cancel_scope.cancel()
    raise failed


async def _obey(signals: Any, run: Run) -> None:
    global _signal_exit_code
    count = 0
    async for number in signals:
        count += 1
        _signal_exit_code = 128 + number
        if count == 1:
            logger.info("stopping: waiting for the items in flight; again to cancel them")
            run.stop()
        elif count == 2:
            logger.info("cancelling the items in flight; again to leave at once")
            run.cancel()
        else:
            os._exit(_signal_exit_code)


def _log_progress() -> Callable[[Progress], None]:
    last = 0.0

    def log(progress: Progress) -> None:
        nonlocal last
        if progress.elapsed_s - last < PROGRESS_INTERVAL_S:
            return
        last = progress.elapsed_s
        share = "" if progress.share is None else f" ({progress.share:.0%})"
        left = "" if progress.remaining_s is None else f", about {progress.remaining_s:.0f} s left"
        held = f", held by item {progress.held_by} for {progress.held_s:.0f} s" if progress.held_s > 10 else ""
        logger.info(
            "%d finished%s, %.0f a second%s; mark %d, %d ahead of it%s",
            progress.finished,
            share,
            progress.items_per_s,
            left,
            progress.mark,
            progress.ahead,
            held,
        )

    return log


def _resume_line() -> str:
    """The command as it was given, but for --fresh, which would start anew."""
    words = [word for word in sys.argv[1:] if word != "--fresh"]
    return shlex.join(["async-recovery", *words])


def _print_status(status: Status) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    shown: dict[str, JSON] = msgspec.to_builtins(status)
    running = shown.pop("running")
    for name, value in shown.items():
        if value is not None:
            table.add_row(name.replace("_", " "), str(value))
    if running:
        table.add_row("held by", f"process {running['pid']} on {running['host']}")
        progress = running.get("progress")
        if progress:
            table.add_row("right now", f"{progress['finished']} finished, {progress['in_flight']} in flight")
    Console(highlight=False, soft_wrap=True).print(table)


def _leave(code: int) -> NoReturn:
    """End the process without waiting for threads in which a plain function still runs."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


__all__ = ["UsageError", "cli", "describe", "main"]
