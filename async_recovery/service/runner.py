"""A job that is loaded: its run in the engine, and what is seen of it from outside."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from ..contracts import RunSummary, Source
from ..engine import Run
from ..file_ledger import FileLedger
from ..progress import Progress, Recent
from ..retrying import retry_run
from ..sources import file_source
from ..workers import Worker
from .attempts import Attempts, watched
from .jobs import JobOptions
from .samples import Sample, sample_of

Committed = Callable[[float], object]


class Watch:
    """What is seen of one run from outside, second by second.

    :param committed: called after each commit with the seconds that it took.
    """

    def __init__(self, committed: Committed) -> None:
        self.attempts = Attempts(time.monotonic)
        self._recent = Recent()
        self._committed = committed
        self._commits, self._committed_at = 0, 0.0

    def on_progress(self, progress: Progress) -> None:
        """To be called as `on_progress` of the run."""
        if progress.commits > self._commits:
            self._commits, self._committed_at = progress.commits, time.monotonic()
            self._committed(progress.commit_s)

    def sample(self, progress: Progress, *, window: int, concurrency: int, rate: float | None) -> Sample:
        """Where the run stands now."""
        self._recent.add(progress)
        return sample_of(
            progress,
            progress.since(self._recent.first),
            time=time.time(),
            since_commit_s=time.monotonic() - self._committed_at if self._commits else None,
            latency=self.attempts.latency(),
            errors=self.attempts.errors,
            window=window,
            concurrency=concurrency,
            rate=rate,
        )


class Runner:
    """The run of a job, from its checkpoint on. Nothing is begun before `main`.

    :param worker: the function that was registered under the job's worker.
    :param input: path of the items; None: the failed items in `output` run again.
    :param options: of the job, checked.
    :param committed: as for `Watch`.
    :raises UsageError: if the job can not be run.
    """

    def __init__(
        self,
        worker: Worker,
        input: str | None,
        format: str | None,
        output: str,
        options: JobOptions,
        committed: Committed,
    ) -> None:
        self._watch, self._followed = Watch(committed), options
        attempts = self._watch.attempts
        of_a_run = msgspec.structs.replace(
            options.of_a_run(), on_progress=self._watch.on_progress, on_failed_attempt=attempts.failed
        )
        function = watched(worker, attempts, options.version)
        self._window = of_a_run.window
        self._ledger: FileLedger | None = None
        if input is None:
            self.run = retry_run(function, output, None, of_a_run, fresh=False, on_damage="refuse")
        else:
            source: Source = file_source(input, format)
            self._ledger = FileLedger(output, input=input, keep_checkpoint=True, on_damage="refuse")
            self.run = Run(function, source, self._ledger, of_a_run)

    def follow(self, options: JobOptions) -> None:
        """Go on with the concurrency and the rate of these, where they are others."""
        before, self._followed = self._followed, options
        if options.concurrency != before.concurrency:
            self.run.set_concurrency(options.concurrency)
        if options.rate_limit != before.rate_limit:
            self.run.set_rate(options.rate_limit)

    async def main(self) -> RunSummary:
        """Run it to its end; see `run_resumable` for what it raises."""
        return await self.run.main()

    @property
    def committed_bytes(self) -> int | None:
        """How much of the partial output counts; None where a complete output is there, or that is not known yet."""
        return None if self._ledger is None else self._ledger.committed_bytes

    def sample(self, concurrency: int, rate: float | None) -> Sample:
        """Where it stands now."""
        return self._watch.sample(self.run.progress(), window=self._window, concurrency=concurrency, rate=rate)
