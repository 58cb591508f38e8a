"""The command line: run · retry-failed · status · verify · export · serve · torture · completion.

Standard output has the summary alone; the log and the progress go to standard error. A user's mistake is one line.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import __version__
from .chosen_loop import LOOP, backend_options
from .chosen_worker import chosen_worker, taken_for_installed, tell_of_blanks
from .errors import (
    AsyncRecoveryError,
    IncompleteRun,
    Mismatch,
    Stopped,
    StorageFailed,
    UsageError,
    check_number,
    describe,
)
from .help import Formats, GroupedCommands, completion_script, mistake
from .screen import Screen, say, shows
from .serve import open_dashboard, serve
from .signals import Signals

if TYPE_CHECKING:
    from .checkpoint import Job
    from .contracts import Ledger, RunSummary, Source
    from .engine import Run
    from .executors import Executor
    from .options import Options
    from .progress import Progress
    from .verify import Report
    from .workers import Worker

    Main = Callable[[Run], Awaitable[RunSummary]]

logger = logging.getLogger("async_recovery")

PATH = click.Path(readable=False)  # for completion alone: whether it can be read is found out by reading

EXIT_CODES = """\b
Exit codes:
  0    complete
  1    an item failed, or the run ended early: resumable
  2    a mistake in the command, a missing input, a folder that can not be written
  3    complete, with recorded failures
  4    input, output, checkpoint or job are not what was left there
  74   the storage failed (disk full, I/O error): resumable
  75   held by another run, or a cluster without workers: try again later
  130  stopped by SIGINT: resumable
  143  stopped by SIGTERM: resumable
"""


TORTURE_EXIT_CODES = """\b
Exit codes:
  0    all is right
  1    something was found, or the job fails by itself
  2    a mistake in the command
"""


@click.group(cls=GroupedCommands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="async-recovery")
def cli() -> None:
    """Run a long list of items once, all of it, whatever happens to the machine.

    Kill it at any moment, run the same line again, and it carries on.

    \b
    Examples:
      async-recovery run --input urls.txt --output pages.jsonl --worker jobs:fetch
      async-recovery status pages.jsonl --watch
    """


MORE_WORDS = {"allow_extra_args": True}  # they are refused with a hint, see `chosen_worker`
_ON_ERROR = click.option(
    "--on-error",
    type=click.Choice(["stop", "record"]),
    help="A failed item stops the run, or takes its place in the output.  [default: stop]",
)


def _policies(
    retries: int,
    retry_initial: float,
    retry_maximum: float,
    deadline: float | None,
    breaker: int,
    quarantine_after: int | None,
    timeout: float | None,
    max_failures: str | None,
    rate: float | None,
    burst: int | None,
    on_error: str | None = None,
) -> dict[str, Any]:
    """The options of a run that follow from those of the command line."""
    from .policies import RateLimit, Record, Retry

    check_number("--retries", retries, least=0)
    if burst is not None and rate is None:
        raise UsageError("--burst without --rate: give the rate, too")
    if max_failures is not None and on_error == "stop":
        raise UsageError("--max-failures with --on-error stop: the first failure stops the run; leave one of them out")
    retry = Retry(
        attempts=retries + 1,
        initial=retry_initial,
        maximum=retry_maximum,
        deadline=deadline,
        breaker=breaker or None,
        quarantine_after=quarantine_after,
    )
    retry.check()  # also where it is not used
    wanted = retries or deadline is not None or quarantine_after is not None
    record: Any = on_error or "stop"
    if max_failures is not None:
        record = Record(max_failures=int(max_failures) if max_failures.isdecimal() else max_failures)
    return {
        "retry": retry if wanted else None,
        "timeout": timeout,
        "on_error": record,
        "rate_limit": None if rate is None else RateLimit(per_second=rate, burst=1 if burst is None else burst),
    }


_HOW_A_RUN_BEHAVES = (
    # What happens when items fail
    click.option("--retries", type=int, default=0, show_default=True, help="How often an item is tried again."),
    click.option(
        "--retry-initial",
        type=float,
        default=0.5,
        show_default=True,
        help="Bound of the first wait, seconds.",
    ),
    click.option("--retry-maximum", type=float, default=60.0, show_default=True, help="Bound of any wait, in seconds."),
    click.option("--deadline", type=float, help="Seconds for an item, all its attempts together."),
    click.option(
        "--breaker",
        type=int,
        default=50,
        show_default=True,
        help="With --retries: so many failures in a row are an outage, and the run pauses; 0: never.",
    ),
    click.option(
        "--quarantine-after",
        type=int,
        help="Give an item up after the process has died so often while it ran.  [default: never]",
    ),
    click.option("--timeout", type=float, help="Seconds for an attempt."),
    click.option("--max-failures", help="Record failures, up to a number, or a share such as 1%; then stop."),
    click.option("--rate", type=float, help="Attempts that may begin in a second."),
    click.option("--burst", type=int, help="With --rate: how many may begin at one moment.  [default: 1]"),
    # And the rest
    click.option("--concurrency", type=int, default=16, show_default=True, help="Items at once."),
    click.option("--checkpoint-interval", type=float, default=1.0, show_default=True, help="Seconds between commits."),
    click.option("--batch-size", type=int, help="Commit also when this many items have finished."),
    click.option(
        "--window",
        type=int,
        help="How far items may run ahead of the slowest one.  [default: 50000, or 64 x concurrency]",
    ),
    click.option("--job-version", help="Your version of the job: another one does not resume it."),
    click.option(
        "--drain-timeout",
        type=float,
        default=10.0,
        show_default=True,
        help="Seconds that items in flight get when the run stops.",
    ),
    click.option(
        "--executor",
        metavar="ADDRESS",
        help="Run the worker on a Dask cluster: dask://HOST:PORT of its scheduler; dask:// alone starts processes here "
        "for the run.  [default: in this process]",
    ),
)

_ON_DAMAGE = click.option(
    "--on-damage",
    type=click.Choice(["restart", "refuse"]),
    default="restart",
    show_default=True,
    help="When nothing in the checkpoint can be read: move it aside and start anew, or stop.",
)


_AS_LINE = click.option("--json", "as_line", is_flag=True, help="The summary as one line of JSON.")


def _how_a_run_behaves(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that `_options` takes."""
    for option in reversed((*_HOW_A_RUN_BEHAVES, LOOP)):
        command = option(command)
    return command


def _options(
    *,
    concurrency: int,
    checkpoint_interval: float,
    batch_size: int | None,
    window: int | None,
    job_version: str | None,
    drain_timeout: float,
    executor: str | None,
    on_progress: Callable[[Progress], object],
    **policies: Any,
) -> Options:
    from .options import Limits, Options

    options = Options(
        concurrency=concurrency,
        limits=Limits(window=window),
        checkpoint_interval=checkpoint_interval,
        batch_size=batch_size,
        version=job_version,
        drain_timeout=drain_timeout,
        on_progress=on_progress,
        executor=None if executor is None else _executor(executor),
        **_policies(**policies),
    )
    options.check()
    return options


def _executor(address: str) -> Executor:
    from .dask_executor import executor_of  # the only one that has a name at the command line

    return executor_of(address)


@cli.command(epilog=EXIT_CODES, context_settings=MORE_WORDS)
@click.option(
    "--input",
    "input_",
    type=PATH,
    default="data/sample_input.txt",
    show_default=True,
    help="File of items, also .gz or .zst; - is standard input, kept in OUTPUT.input until the end.",
)
@click.option(
    "--output",
    type=PATH,
    default="data/processed_output.json",
    show_default=True,
    help="Where the results go: a JSON array if it ends with .json, else JSON Lines; sqlite:///FILE?run=NAME and "
    "postgresql://USER@HOST/DATABASE?run=NAME are runs in a database; - is standard output, at least once and with "
    "--checkpoint.",
)
@chosen_worker
@click.option(
    "--format",
    "format_",
    type=Formats(["text", "lines", "jsonl", "csv", "tsv"]),
    help="What the input holds. text: lines without their outer blanks, blank ones dropped; lines: each line exactly "
    "as it is, empty ones too, as for names of files.  [default: by its suffix, else text]",
)
@click.option("--checkpoint", type=PATH, help="Where progress is kept.  [default: OUTPUT.checkpoint]")
@click.option("--fresh", is_flag=True, help="Start anew, whatever is there.")
@click.option("--keep-checkpoint", is_flag=True, help="Remember that the job is complete: the same line does nothing.")
@_ON_DAMAGE
@_how_a_run_behaves
@_ON_ERROR
@shows
@_AS_LINE
@click.option(
    "--dashboard",
    is_flag=False,
    flag_value="127.0.0.1:8080",
    metavar="[HOST:PORT]",
    help="Show the run in a browser, while it goes on. Without an address: at 127.0.0.1:8080.",
)
@click.option("--dry-run", is_flag=True, help="Only look at what is there and tell what this line would do.")
def run(
    input_: str,
    output: str,
    worker: Callable[[], Worker],
    format_: str | None,
    checkpoint: str | None,
    fresh: bool,
    keep_checkpoint: bool,
    on_damage: Any,
    dashboard: str | None,
    dry_run: bool,
    screen: Screen,
    as_line: bool,
    **behaviour: Any,
) -> None:
    """Run a worker on each item of a file, and resume what was interrupted.

    \b
    Examples:
      async-recovery run
      async-recovery run --input urls.txt --output pages.jsonl --worker jobs:fetch --concurrency 200
      async-recovery run --input urls.txt --output pages.jsonl --exec 'curl -sf -- {}' --retries 3
      zcat urls.gz | async-recovery run --input - --output - --checkpoint fetch.checkpoint --worker jobs:fetch
    """
    from .engine import Run
    from .standard_output import write_records

    options = _options(on_progress=screen.show, **behaviour)
    files = {"fresh": fresh, "keep_checkpoint": keep_checkpoint, "on_damage": on_damage}
    source, ledger = _ends(input_, output, format_, checkpoint, **files)
    function = worker()
    tell_of_blanks(source, function)
    if dry_run:
        _look_ahead(Run(function, source, ledger, options).job, source, ledger, fresh=fresh)
    else:
        main: Main = Run.main
        if output == "-":
            main = write_records
            screen.leave_room_for_records()
        if dashboard is not None:
            shown = open_dashboard(dashboard, function, source.path, ledger, options)
            function, options, main = shown.worker, shown.options, partial(shown.around, main)
        _run_to_its_end(lambda: Run(function, source, ledger, options), screen, as_line, main)


def _ends(input_: str, output: str, format_: str | None, checkpoint: str | None, **files: Any) -> tuple[Source, Ledger]:
    """Where the items come from and the records go; `-` is a standard stream."""
    from .ledgers import is_address, ledger_of, public
    from .sources import file_source
    from .standard_input import SpoolingLedger, StandardInput, standard_input
    from .standard_output import check_standard_output

    where: str | None = output
    if output == "-":
        if checkpoint is None:
            raise UsageError("--output - without --checkpoint: name a file, which remembers what has been written")
        check_standard_output()
        where, files["keep_records"] = None, True
    if input_ != "-":
        return file_source(input_, format_), ledger_of(where, checkpoint, input=input_, **files)
    if is_address(where):
        raise UsageError(
            f"--input - with --output {public(output)}: standard input is kept beside a file; give --input a file"
        )
    spooling = SpoolingLedger(where, checkpoint, **files)
    return StandardInput(spooling.spool, format_, standard_input()), spooling


@cli.command(name="retry-failed", epilog=EXIT_CODES, context_settings=MORE_WORDS)
@click.argument("output", type=PATH)
@chosen_worker
@click.option("--checkpoint", type=PATH, help="Where the job itself kept its progress.  [default: OUTPUT.checkpoint]")
@click.option("--fresh", is_flag=True, help="Start the retry anew, whatever an earlier one has left.")
@_ON_DAMAGE
@_how_a_run_behaves
@shows
@_AS_LINE
def retry_failed(
    output: str,
    worker: Callable[[], Worker],
    checkpoint: str | None,
    fresh: bool,
    on_damage: Any,
    screen: Screen,
    as_line: bool,
    **behaviour: Any,
) -> None:
    """Run the failed items of the finished job whose output is OUTPUT once more, and resume what was interrupted.

    Each new result takes the place of its failure in a new output, which replaces OUTPUT when all of them are done. An
    item that fails again stays a recorded failure: exit code 3.

    \b
    Examples:
      async-recovery retry-failed pages.jsonl --worker jobs:fetch --concurrency 20
      async-recovery retry-failed pages.jsonl --exec 'curl -sf -- {}' --retries 5
    """
    from .engine import Run
    from .retrying import retry_run

    options = _options(on_progress=screen.show, **behaviour)
    function = worker()
    again = partial(retry_run, function, output, checkpoint, options, fresh=fresh, on_damage=on_damage)
    _run_to_its_end(again, screen, as_line, Run.main)


def _run_to_its_end(make: Callable[[], Run], screen: Screen, as_line: bool, main: Main) -> None:
    import asyncio

    import anyio

    try:
        anyio.run(_run_and_leave, make, screen, as_line, main, backend_options=backend_options())
    except (asyncio.CancelledError, RuntimeError) as error:
        raise IncompleteRun(
            f"the event loop was stopped, or the run cancelled, from within ({describe(error)}): the worker must "
            "stop no loop, and cancel no task but its own. What is committed is safe: run the same line again"
        ) from error


@cli.command(name="verify", epilog=EXIT_CODES)
@click.argument("path", type=PATH)
@click.option("--checkpoint", type=PATH, help="Where its progress is kept.  [default: PATH.checkpoint]")
@click.option("--input", "input_", type=PATH, help="File of items.  [default: the one that the checkpoint names]")
@click.option("--json", "as_json", is_flag=True, help="As a JSON object on standard output.")
def verify_(path: str, checkpoint: str | None, input_: str | None, as_json: bool) -> None:
    """Compare journal, output and input of the job whose output or checkpoint is PATH, and tell what a resume would do.

    Touches nothing, also while the job runs. Exit code 0: all is right; 4: it is not.

    \b
    Examples:
      async-recovery verify pages.jsonl
      async-recovery verify pages.jsonl --input urls.txt --json
      async-recovery verify sqlite:///results.db
    """
    import anyio
    import msgspec

    from .database_verify import verify_left

    report = anyio.run(partial(verify_left, path, checkpoint, input=input_))
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        _print_report(report)
    _leave(Mismatch.exit_code if report.problems else 0)


@cli.command(epilog=EXIT_CODES)
@click.argument("path", type=PATH)
@click.option("--watch", "watching", is_flag=True, help="Again every second, until the job ends.")
@click.option("--json", "as_json", is_flag=True, help="As a JSON object on standard output.")
def status(path: str, watching: bool, as_json: bool) -> None:
    """Show where the job stands whose output or checkpoint is PATH. Touches nothing, also while it runs.

    \b
    Examples:
      async-recovery status pages.jsonl --watch
      async-recovery status pages.jsonl --json
      async-recovery status 'sqlite:///results.db?run=pages'
    """
    from .status import read_status
    from .watch import print_status, watch

    if watching:
        watch(path, as_json=as_json)
    else:
        print_status(read_status(path), as_json=as_json)


@cli.command(epilog=TORTURE_EXIT_CODES, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF RUN]...")
@click.option("--items", type=int, default=30, show_default=True, help="Take so many items of the input.")
@click.option(
    "--boundaries",
    type=int,
    default=100,
    show_default=True,
    help="Kill at so many boundaries of commits at most: each kind once, then spread evenly.",
)
@click.option("--random", type=int, default=10, show_default=True, help="Kill at so many random moments.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random moments.")
@click.option(
    "--effects",
    metavar="SCRIPT",
    help="A script of /bin/sh that prints the side effects of a job and clears them away: they are compared, too.",
)
@click.option("--json", "as_json", is_flag=True, help="The report as a JSON object on standard output.")
def torture(words: tuple[str, ...], as_json: bool, **how: Any) -> None:
    """Crash-test a job: kill it again and again, resume it, and compare with a run that nobody killed.

    Takes the options of run. Output and checkpoint are those of a temporary folder, not yours; but the worker really
    runs, some thousand times.

    \b
    Examples:
      async-recovery torture --input urls.txt --output pages.jsonl --worker jobs:fetch
      async-recovery torture --input orders.csv --worker jobs:charge --effects 'sort charged; rm -f charged'
    """
    import msgspec

    from .torture_command import torture_command

    report = torture_command(run, words, **how)
    click.echo(msgspec.json.encode(report.as_json()) if as_json else str(report))
    _leave(0 if report.ok else 1)


@cli.command(epilog=EXIT_CODES)
@click.argument("address")
@click.argument("output", type=PATH)
def export(address: str, output: str) -> None:
    """Write the records of the complete run at ADDRESS in a database to OUTPUT, as a run with that output would have.

    A JSON array if OUTPUT ends with .json, else JSON Lines; it appears when all of it is there.

    \b
    Examples:
      async-recovery export sqlite:///results.db pages.jsonl
      async-recovery export 'sqlite:///results.db?run=pages' pages.json
    """
    import anyio

    from .export import export

    say(f"{anyio.run(export, address, output)} records written to {output}")
    _leave(0)


cli.add_command(serve)


@cli.command(epilog=EXIT_CODES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands, options and file names at the tab key.

    \b
    Examples:
      eval "$(async-recovery completion bash)"      # in ~/.bashrc; zsh in ~/.zshrc likewise
      async-recovery completion fish > ~/.config/fish/completions/async-recovery.fish
    """
    click.echo(completion_script(cli, "async-recovery", shell))


def main() -> None:
    """The entry point: runs the command, and turns every error into one line and an exit code."""
    _signals.install()
    try:
        cli.main(standalone_mode=False, obj=_signals.obey)
        _leave(0)  # Python's own way out gives signals back their defaults before it ends
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        say(f"Error: {mistake(error)}")
        _leave(error.exit_code)
    except AsyncRecoveryError as error:
        say(f"Error: {error}")
        _leave(error.exit_code)
    except BrokenPipeError:
        _leave(1)  # nobody reads any more: end quietly
    except OSError as error:
        say(f"Error: {describe(error)}")
        _leave(StorageFailed.exit_code)
    except Exception as error:
        in_the_way = taken_for_installed()
        if not in_the_way:
            raise
        say(f"Error: {describe(error)}: {in_the_way}")
        _leave(UsageError.exit_code)


_signals = Signals()


async def _run_and_leave(make: Callable[[], Run], screen: Screen, as_line: bool, main: Main) -> NoReturn:
    """Run, report, and end the process from within the loop.

    Closing the loop would wait for every thread in which something of the worker's still runs.
    """
    import msgspec

    from .standard_output import write_records

    run = make()
    _signals.obey(run, screen)
    try:
        with screen:
            summary = await main(run)
    except Stopped as error:
        _signals.ignore()
        say(f"{error}:\n  {_resume_line(run)}")
        _leave(_signals.exit_code)
    except AsyncRecoveryError as error:
        _signals.ignore()
        say(f"Error: {error}")
        _leave(error.exit_code)
    except BrokenPipeError:  # nobody reads the records any more: end quietly
        _leave(IncompleteRun.exit_code)
    _signals.ignore()
    try:
        encoded = msgspec.json.encode(summary)
        click.echo(encoded if as_line else msgspec.json.format(encoded), err=main is write_records)
    except OSError as error:  # the job is complete all the same, and that is what the exit code says
        if not isinstance(error, BrokenPipeError):
            say(f"the job is complete, but its summary could not be written to standard output: {error.strerror}")
    _leave(3 if summary.failed else 0)


def _look_ahead(job: Job, source: Source, ledger: Ledger, *, fresh: bool) -> NoReturn:
    """What `run` would do, without doing it."""
    import anyio

    from .database import DatabaseLedger
    from .database_verify import verify_database
    from .file_ledger import FileLedger
    from .standard_input import StandardInput
    from .verify import Target, verify

    found = source.if_there() if isinstance(source, StandardInput) else source
    if isinstance(ledger, FileLedger):
        ledger.check_writable()
        output, journal = ledger.check_paths()
        report = anyio.run(partial(verify, Target(output, ledger.output or "", journal), source=found, job=job))
    else:
        assert isinstance(ledger, DatabaseLedger)  # nothing else has a name at the command line
        anyio.run(ledger.check_writable)
        report = anyio.run(partial(verify_database, ledger.address, source=source, job=job))
    if fresh and report.state != "running":
        report.problems, report.next = [], "starts anew, whatever is there (--fresh)"
    _print_report(report)
    _leave(Mismatch.exit_code if report.problems else 0)


def _print_report(report: Report) -> None:
    from .checkpoint import printable

    rows = [(subject, text) for subject, text in report.facts]
    rows += [(f"{subject}: PROBLEM", text) for subject, text in report.problems]
    rows += [("state", report.state), ("the same line", report.next)]
    width = max(len(subject) for subject, _ in rows)
    for subject, text in rows:
        click.echo(f"{subject.ljust(width)}  {printable(text)}")


def _resume_line(run: Run) -> str:
    """The command as it was given, but for --fresh, which would start anew what this run has begun."""
    from .ledgers import shown_word

    begun = run.progress().commits > 0
    words = [shown_word(word) for word in sys.argv[1:] if word != "--fresh" or not begun]
    script = sys.argv[0]
    if os.path.basename(script) == "__main__.py":
        return shlex.join([sys.orig_argv[0], "-m", "async_recovery", *words])
    found = shutil.which(os.path.basename(script))
    is_on_path = found is not None and os.path.samefile(found, script)
    return shlex.join([os.path.basename(script) if is_on_path else script, *words])


def _leave(code: int) -> NoReturn:
    """End the process without waiting for threads in which a plain function still runs."""
    logging.shutdown()
    os._exit(code)
