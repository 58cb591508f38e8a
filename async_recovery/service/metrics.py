"""The metrics for Prometheus: of the jobs that have not ended, and how many there are in each state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .jobs import STATES, Job
from .samples import Sample

Sampled = Callable[[str], Sample | None]
COMMIT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
LABELS = ("job", "worker")

_GAUGES: tuple[tuple[str, str, Callable[[Sample], float | None]], ...] = (
    ("mark", "Index of the first item that is not finished.", lambda sample: sample.mark),
    ("durable_mark", "The mark of the last commit.", lambda sample: sample.durable_mark),
    ("frontier", "Index of the next item to hand out.", lambda sample: sample.frontier),
    ("items_ahead", "Items finished ahead of the mark.", lambda sample: sample.ahead),
    ("items_in_flight", "Items handed out and not finished.", lambda sample: sample.in_flight),
    ("items_waiting", "Items that wait for their next attempt.", lambda sample: sample.waiting),
    ("concurrency", "Items at once, at most.", lambda sample: sample.concurrency),
    ("paused", "1 while nothing begins.", lambda sample: float(sample.paused is not None)),
    ("head_of_line_age_seconds", "Seconds since the mark last moved.", lambda sample: sample.held_s),
    ("last_commit_age_seconds", "Seconds since the last commit.", lambda sample: sample.since_commit_s),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Sample], float | None]], ...] = (
    (
        "attempts_retried",
        "Failed attempts of this run that are followed by another one.",
        lambda sample: sample.retries,
    ),
    ("commits", "Commits of this run.", lambda sample: sample.commits),
)


class Metrics(Collector):
    """All of them.

    :param jobs: gives the jobs.
    :param sample: gives where a job stands.
    """

    def __init__(self, jobs: Callable[[], Mapping[str, Job]], sample: Sampled) -> None:
        self._jobs, self._sample = jobs, sample
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._commits = Histogram(
            "async_recovery_commit_duration_seconds",
            "Seconds that a commit took.",
            LABELS,
            buckets=COMMIT_BUCKETS,
            registry=self._registry,
        )

    def committed(self, job: Job, seconds: float) -> None:
        """A commit of a job took so long."""
        if (job.id, job.worker) not in self._commits._metrics:
            self._forget_ended()
        self._commits.labels(job.id, job.worker).observe(seconds)

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        self._forget_ended()
        return generate_latest(self._registry)

    def _forget_ended(self) -> None:
        """Of jobs that have ended nothing is told any more, nor kept."""
        jobs = self._jobs()
        for labels in list(self._commits._metrics):
            if labels[0] not in jobs or jobs[labels[0]].has_ended:
                self._commits.remove(*labels)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        jobs = list(self._jobs().values())
        states = GaugeMetricFamily("async_recovery_jobs", "Jobs by state.", labels=["state"])
        counts = Counter(job.state for job in jobs)
        for state in STATES:
            states.add_metric([state], counts[state])
        yield states
        loaded = [(job, sample) for job in jobs if not job.has_ended and (sample := self._sample(job.id)) is not None]
        items = CounterMetricFamily("async_recovery_items", "Finished items by outcome.", labels=[*LABELS, "outcome"])
        pauses = CounterMetricFamily("async_recovery_pauses", "Times that a job was paused by hand.", labels=LABELS)
        for job, sample in loaded:
            items.add_metric([job.id, job.worker, "done"], sample.finished - sample.failed)
            items.add_metric([job.id, job.worker, "failed"], sample.failed)
            pauses.add_metric([job.id, job.worker], sum(event.what == "paused" for event in job.events))
        yield items
        yield pauses
        for kind, rows in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for name, text, value in rows:
                family = kind(f"async_recovery_{name}", text, labels=LABELS)
                for job, sample in loaded:
                    if (number := value(sample)) is not None:
                        family.add_metric([job.id, job.worker], number)
                yield family
