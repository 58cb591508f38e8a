"""One run of the command line on the page of the service: `run --dashboard`. It can be watched, and not be steered."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..contracts import Ledger, RunSummary
from ..engine import Run
from ..errors import Stopped, describe
from ..file_ledger import FileLedger
from ..options import Options
from ..policies import Record, Retry
from ..workers import Worker, identity
from .api import Api, Bounds
from .app import guarded
from .attempts import watched
from .jobs import Input, Job, JobOptions, RecordOptions, RetryOptions
from .listen import allowed_hosts, open_sockets, parse_listen, read_token, require_token
from .metrics import Metrics
from .runner import Watch
from .samples import Feed, Sample
from .server import Server
from .views import as_json

logger = logging.getLogger("async_recovery")

TICK_S = 1.0
ID = "run"
LAST_LOOK_S = 1.0  # for the pages that are open to learn how it ended


class Dashboard:
    """What is shown of one run, as the jobs of a service are: see `Board`.

    :param listen: where, as for `serve`; beyond loopback it takes the token of the variable ASYNC_RECOVERY_TOKEN.
    :param worker: the function. :param input: path of the items, for people. :param ledger: where the records go.
    :ivar worker: the same function, whose attempts are watched where they are in this process; `options`: likewise. The
        run is to be made of these.
    :raises UsageError: if it can not listen there.
    """

    def __init__(self, listen: str, worker: Worker, input: str | None, ledger: Ledger, options: Options) -> None:
        address, token = parse_listen(listen), read_token(None, os.environ)
        require_token(address, token)
        self._ledger = ledger
        self._run: Run | None = None
        self._metrics = Metrics(lambda: self.jobs, self.sample)
        self._watch = Watch(self._committed)
        self.options = self._followed(options)
        is_elsewhere = options.executor is not None  # where nobody tells how long an attempt takes
        self.worker = worker if is_elsewhere else watched(worker, self._watch.attempts, options.version)
        now, name = time.time(), input or "-"
        size = Path(name).stat().st_size if Path(name).is_file() else 0
        source = Input("path", name, name, size)
        job = Job(1, ID, identity(worker, "any"), source, _shown(options), now, events=())
        self.jobs: Mapping[str, Job] = {ID: job.made(now)}
        self._feed = Feed(secrets.token_hex(4))
        bounds = Bounds(body_bytes=0, upload_bytes=0)
        app = guarded(
            Api(lambda: self, self._metrics.text, bounds),
            read_only=True,
            token=token,
            hosts=allowed_hosts(address),
            bounds=bounds,
        )
        self._server = Server(app, open_sockets(address))

    def about(self) -> dict[str, Any]:
        """See `Board`."""
        workers = [job.worker for job in self.jobs.values()]
        limits = {"max_jobs": 1, "max_concurrency": self.options.concurrency}
        return {"workers": workers, "read_only": True, "has_output": self.output_of(ID) is not None, **limits}

    def feed(self, job_id: str) -> Feed:
        """See `Board`."""
        return self._feed

    def sample(self, job_id: str) -> Sample | None:
        """See `Board`."""
        options, rate = self.options, self.options.rate
        if self._run is None:
            return None
        return self._watch.sample(
            self._run.progress(),
            window=options.window,
            concurrency=options.concurrency,
            rate=None if rate is None else rate.per_second,
        )

    def output_of(self, job_id: str) -> tuple[str, int | None] | None:
        """See `Board`."""
        ledger = self._ledger
        if isinstance(ledger, FileLedger) and ledger.output is not None:
            return ledger.output, ledger.committed_bytes
        return None

    async def around(self, main: Callable[[Run], Awaitable[RunSummary]], run: Run) -> RunSummary:
        """Run it to its end by `main`, and show it meanwhile."""
        self._run = run
        serving = asyncio.create_task(self._server.serve(stop=self._feed.close, cancel=self._feed.close))
        ticking = asyncio.create_task(self._tick())
        logger.info("watch it at %s", self._server.url)
        self._become(self.jobs[ID].begun(time.time()))
        try:
            summary = await main(run)
            told = msgspec.to_builtins(summary)
            self._become(self.jobs[ID].completed(time.time(), told))
            return summary
        except Stopped:
            self._become(self.jobs[ID].cancelled(time.time()))
            raise
        except Exception as error:
            self._become(self.jobs[ID].has_failed(time.time(), describe(error)))
            raise
        finally:
            ticking.cancel()
            self._show()
            self._server.stop()
            await asyncio.wait({serving}, timeout=LAST_LOOK_S)

    def _become(self, job: Job) -> None:
        self.jobs = {ID: job}
        self._feed.tell_job(as_json(job))

    def _committed(self, seconds: float) -> None:
        self._metrics.committed(self.jobs[ID], seconds)

    def _followed(self, options: Options) -> Options:
        shown, seen = options.on_progress, self._watch.on_progress

        def on_progress(progress: Any) -> None:
            seen(progress)
            if shown is not None:
                shown(progress)

        failed = self._watch.attempts.failed
        return msgspec.structs.replace(options, on_progress=on_progress, on_failed_attempt=failed)

    async def _tick(self) -> None:
        while True:
            self._show()
            await asyncio.sleep(TICK_S)

    def _show(self) -> None:
        self._feed.tell_sample(msgspec.json.encode(self.sample(ID)))


def _shown(options: Options) -> JobOptions:
    """The options as a job of the service has them."""
    retry, record, rate = options.retrying, options.recording, options.rate
    return JobOptions(
        concurrency=options.concurrency,
        batch_size=options.batch_size,
        checkpoint_interval=options.checkpoint_interval,
        retry=_retry(retry),
        timeout=options.timeout,
        on_error="stop" if record is None else _record(record),
        rate=None if rate is None else rate.per_second,
        burst=1 if rate is None else rate.burst,
        window=options.limits.window,
        drain_timeout=options.drain_timeout,
        version=options.version,
    )


def _retry(retry: Retry | None) -> RetryOptions | None:
    if retry is None:
        return None
    return RetryOptions(**{name: getattr(retry, name) for name in RetryOptions.__struct_fields__})


def _record(record: Record) -> Any:
    return "record" if record.max_failures is None else RecordOptions(record.max_failures)
