"""The command `serve`: the service, from its folder to its last commit."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .chosen_loop import LOOP, backend_options
from .chosen_worker import load_from_here
from .errors import UsageError
from .help import GroupedCommand
from .screen import Screen, logs

if TYPE_CHECKING:
    from .contracts import Ledger
    from .options import Options
    from .service.dashboard import Dashboard
    from .workers import Worker

logger = logging.getLogger("async_recovery")

EXIT_CODES = """\b
Exit codes:
  0    stopped by SIGINT or SIGTERM: the next start carries on
  2    a mistake in the command, a folder that can not be written
  4    the database of the service can not be read
  74   the storage failed
  75   another service has the folder
"""


@click.command(cls=GroupedCommand, epilog=EXIT_CODES)
@click.option("--data", required=True, metavar="DIR", help="Folder of the jobs, their inputs and outputs.")
@click.option(
    "--worker",
    "workers",
    multiple=True,
    required=True,
    metavar="NAME=MODULE:FUNCTION",
    help="What jobs may run, and by which name; can be repeated. Nothing else ever runs. Built in are text and http "
    "(--worker http).",
)
@click.option("--listen", default="127.0.0.1:8080", show_default=True, help="HOST:PORT; port 0: any that is free.")
@click.option(
    "--token-file",
    metavar="FILE",
    help="What requests must carry: Authorization: Bearer TOKEN. Needed where other machines can reach the service. "
    "[default: the variable ASYNC_RECOVERY_TOKEN, if set]",
)
@click.option("--allow-host", multiple=True, metavar="NAME", help="Another name it may be called by; can be repeated.")
@click.option("--max-jobs", type=int, default=4, show_default=True, help="Jobs that run at once; the others wait.")
@click.option("--max-queued", type=int, default=1000, show_default=True, help="Jobs that wait, run or are paused.")
@click.option("--max-concurrency", type=int, default=10_000, show_default=True, help="Items at once of one job.")
@click.option("--max-upload", type=int, default=1 << 30, show_default=True, help="Bytes of one upload.")
@LOOP
@logs
def serve(
    data: str,
    workers: tuple[str, ...],
    listen: str,
    token_file: str | None,
    allow_host: tuple[str, ...],
    screen: Screen,
    **bounds: int,
) -> None:
    """Run jobs that are sent over HTTP, and show them in a browser; carry on with all of them after any restart.

    \b
    Examples:
      async-recovery serve --data jobs --worker fetch=jobs:fetch
      async-recovery serve --data jobs --worker fetch=jobs:fetch --listen 0.0.0.0:8080 --token-file token
    """
    import anyio

    obey = click.get_current_context().obj
    with _needing_the_extra("serve"):
        from .service import create_service
        from .service.listen import allowed_hosts, open_sockets, parse_listen, read_token, require_token
        from .service.manager import current_job
        from .service.server import Server
    address, token = parse_listen(listen), read_token(token_file, os.environ)
    require_token(address, token)
    service = create_service(
        data,
        dict(map(_named_worker, workers)),
        token=token,
        hosts=allowed_hosts(address, allow_host),
        max_jobs=bounds["max_jobs"],
        max_queued=bounds["max_queued"],
        max_concurrency=bounds["max_concurrency"],
        max_upload_bytes=bounds["max_upload"],
    )
    server = Server(service, open_sockets(address))
    started = f"serving {Path(data).resolve()} at {server.url} with the workers {', '.join(service.workers)}"

    async def main() -> None:
        obey(server, screen)
        for handler in logging.getLogger().handlers:
            handler.addFilter(NamesJob(current_job.get))
        async with service:
            logger.info("%s", started)
            await server.serve(stop=service.drain, cancel=service.hurry)

    anyio.run(main, backend_options=backend_options())


class NamesJob(logging.Filter):
    """Puts the job before each message that is of one.

    :param current: gives its id.
    """

    def __init__(self, current: Callable[[], str | None]) -> None:
        super().__init__()
        self._current = current

    def filter(self, record: logging.LogRecord) -> bool:
        """Changes the record, and lets it pass."""
        job = self._current()
        if job is not None and job not in record.getMessage():
            record.msg, record.args = f"{job}: {record.getMessage()}", None
        return True


def open_dashboard(listen: str, worker: Worker, input: str | None, ledger: Ledger, options: Options) -> Dashboard:
    """The page for one run; see `Dashboard`."""
    with _needing_the_extra("--dashboard"):
        from .service.dashboard import Dashboard
    try:
        return Dashboard(listen, worker, input, ledger, options)
    except UsageError as error:
        raise UsageError(str(error).replace("--listen", "--dashboard")) from None


@contextlib.contextmanager
def _needing_the_extra(what: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{what} needs {error.name}, which is not installed: pip install 'async-recovery[service]'"
        ) from error


def _named_worker(given: str) -> tuple[str, Worker]:
    name, separator, function = given.partition("=")
    if not separator:
        name, function = (given, given) if ":" not in given else (given.rpartition(":")[2], given)
    if not name.replace("-", "_").isidentifier():
        raise UsageError(f"--worker {given}: {name!r} is no name for a worker; write NAME=MODULE:FUNCTION")
    return name, load_from_here(function)
