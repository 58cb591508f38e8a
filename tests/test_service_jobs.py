"""The rules of a job: every sequence of steps from every state, what it remembers of them, and its options."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from async_recovery import Record, Retry, UsageError
from async_recovery.policies import RateLimit
from async_recovery.service.jobs import (
    BOUNDS,
    ENDED,
    MOST_EVENTS,
    Event,
    Input,
    Job,
    JobOptions,
    NotNow,
    RecordOptions,
    RetryOptions,
    check_bounds,
    queue_order,
)

Step = Callable[[Job, float], Job]

MADE = Job(1, "job-1", "w", Input("items", "jobs/job-1/input.jsonl", "items", 3), JobOptions(), 0.0).made(0.0)
ASKED: dict[str, Step] = {
    "pause": Job.paused,
    "unpause": Job.unpaused,
    "cancel": Job.cancelled,
    "retry": lambda job, now: job.retried(now, "file"),
    "change": lambda job, now: job.changed(now, "concurrency 2", msgspec.structs.replace(job.options, concurrency=2)),
}
HAPPENS: dict[str, Step] = {
    "begin": Job.begun,
    "go on": Job.goes_on,
    "found": lambda job, now: job.found_running(),
    "wait": lambda job, now: job.waits(now, "no room"),
    "complete": lambda job, now: job.completed(now, {"total_items": 3, "failed": 1, "executed": 3}),
    "fail": lambda job, now: job.has_failed(now, "a defect"),
}
STEPS = ASKED | HAPPENS
# What a step asked for leads to; everywhere else it is refused.
LEADS = {
    "pause": dict.fromkeys(("queued", "running", "paused"), "paused"),
    "unpause": {"paused": "queued", "queued": "queued", "running": "running"},
    "cancel": dict.fromkeys(("queued", "running", "paused", "cancelled"), "cancelled"),
    "retry": dict.fromkeys(("complete", "failed"), "queued"),
    "change": {state: state for state in ("queued", "running", "paused")},
}
# And what has happened; everywhere else it changes nothing.
GOES = {
    "begin": {"queued": "running"},
    "go on": {"queued": "running"},
    "found": {"running": "queued"},
    "wait": {"queued": "queued", "running": "queued", "paused": "paused"},
    "complete": dict.fromkeys(("queued", "running", "paused"), "complete"),
    "fail": dict.fromkeys(("queued", "running", "paused"), "failed"),
}


def taken(job: Job, name: str, now: float) -> Job:
    """The job after a step, which may be refused."""
    try:
        return STEPS[name](job, now)
    except NotNow:
        return job


@pytest.mark.parametrize("first", STEPS)
def test_every_sequence_of_steps_keeps_the_rules(first: str) -> None:
    """Of five steps each: the next state is that of the table, and an ended job is only ever retried."""
    for names in itertools.product((first,), STEPS, STEPS, STEPS, STEPS):
        job = MADE
        for now, name in enumerate(names, 1):
            before, frozen = job, msgspec.json.encode(job)
            job = taken(before, name, now)
            assert msgspec.json.encode(before) == frozen, "a job never changes, it becomes another"
            table = LEADS.get(name) or GOES[name]
            assert job.state == table.get(before.state, before.state), names
            if before.has_ended:
                assert job is before or name == "retry"
            if job is before:
                continue
            assert (job.id, job.number, job.created, job.input) == (MADE.id, 1, 0.0, MADE.input)
            assert (job.ended is not None) == job.has_ended == (job.state in ENDED)
            assert job.options == before.options or name == "change"
            assert job.state != "failed" or job.reason == "a defect"
            assert job.events[: len(before.events)] == before.events
            assert len(job.events) - len(before.events) == (0 if name in ("go on", "found") else 1)


@pytest.mark.parametrize("name", ASKED)
def test_a_step_that_is_refused_says_in_which_state_the_job_is(name: str) -> None:
    """And one that is not refused, where the job is so already, changes nothing."""
    for state in ("queued", "running", "paused", "complete", "failed", "cancelled"):
        job = msgspec.structs.replace(MADE, state=state, summary={"failed": 1})
        if state not in LEADS[name]:
            with pytest.raises(NotNow, match=f"the job is {state}"):
                STEPS[name](job, 1)
    idempotent = [("pause", "paused"), ("unpause", "queued"), ("unpause", "running"), ("cancel", "cancelled")]
    for step, state in idempotent:
        job = msgspec.structs.replace(MADE, state=state)
        assert STEPS[step](job, 1) is job


def test_only_an_ended_job_can_go() -> None:
    """The others are refused."""
    for state in ("queued", "running", "paused"):
        with pytest.raises(NotNow, match="only an ended job can be deleted"):
            msgspec.structs.replace(MADE, state=state).refuse_to_go()
    for ended in ENDED:
        msgspec.structs.replace(MADE, state=ended).refuse_to_go()


def test_a_paused_job_whose_storage_fails_stays_paused() -> None:
    """It says why, and goes on only when it is asked to."""
    job = MADE.begun(1).paused(2).waits(3, "no room")
    assert (job.state, job.reason) == ("paused", "no room")
    assert job.unpaused(4).state == "queued"


def test_a_complete_job_is_retried_only_where_something_failed_and_lies_there() -> None:
    """Its failed items are in its output: without one the job itself would be run again from its beginning."""
    complete = MADE.begun(1).completed(2, {"total_items": 3, "failed": 0, "executed": 3})
    with pytest.raises(NotNow, match="no item of the job has failed"):
        complete.retried(3, "file")
    failed = MADE.begun(1).completed(2, {"total_items": 3, "failed": 2, "executed": 3})
    with pytest.raises(NotNow, match="the output of the job is missing"):
        failed.retried(3, None)
    retried = failed.retried(3, "file")
    assert (retried.state, retried.retries_of, retried.ended) == ("queued", "file", None)
    done = retried.begun(4).completed(5, {"total_items": 2, "processed": 2, "failed": 1, "executed": 2})
    assert done.summary == {"total_items": 3, "failed": 1, "executed": 2}
    assert done.retries_of is None
    again = retried.begun(4).has_failed(5, "too many").retried(6, None)
    assert (again.state, again.retries_of) == ("queued", "file"), "it goes on with the retry"


def test_events_are_bounded_and_the_first_one_stays() -> None:
    """The newest are there, and when it was made."""
    job = MADE
    for now in range(1, 3 * MOST_EVENTS):
        job = job.paused(now) if now % 2 else job.unpaused(now)
    assert len(job.events) == MOST_EVENTS
    assert job.events[0] == Event(0.0, "created")
    assert [event.time for event in job.events[1:]] == list(range(2 * MOST_EVENTS + 1, 3 * MOST_EVENTS))


def test_those_that_have_begun_come_first_and_then_the_oldest() -> None:
    """Whatever the order in which they are looked at."""
    jobs = [msgspec.structs.replace(MADE, number=n, started=1.0 if n in (3, 5) else None) for n in range(1, 7)]
    for order in itertools.permutations(jobs):
        assert [job.number for job in sorted(order, key=queue_order)] == [3, 5, 1, 2, 4, 6]


def test_a_job_is_read_back_as_it_was_written() -> None:
    """Whatever has happened to it."""
    for names in itertools.product(STEPS, STEPS, STEPS):
        job = MADE
        for name in names:
            job = taken(job, name, 1.5)
        assert msgspec.json.decode(msgspec.json.encode(job), type=Job) == job


def test_options_are_those_of_the_engine() -> None:
    """Each by its name; what is left out is what the engine takes."""
    default = JobOptions().of_a_run()
    assert (default.concurrency, default.retry, default.on_error, default.rate, default.window) == (
        *(16, None, "stop", None, 50_000),
    )
    retry = RetryOptions(attempts=4, initial=1, maximum=2, deadline=9, breaker=None, quarantine_after=3)
    options = JobOptions(
        concurrency=3,
        batch_size=5,
        checkpoint_interval=0.5,
        retry=retry,
        timeout=7,
        on_error=RecordOptions("1%"),
        rate=10,
        burst=4,
        window=100,
        drain_timeout=2,
        version="v",
    ).of_a_run()
    assert options.retrying == Retry(
        attempts=4, initial=1, maximum=2, deadline=9, breaker=None, quarantine_after=3, on=Exception
    )
    assert options.recording == Record(max_failures="1%")
    assert options.rate == RateLimit(per_second=10, burst=4)
    assert (options.concurrency, options.batch_size, options.checkpoint_interval, options.window) == (3, 5, 0.5, 100)
    assert (options.timeout, options.drain_timeout, options.version) == (7, 2, "v")
    assert JobOptions(retry=2).of_a_run().retrying == Retry(attempts=2)
    assert JobOptions(on_error="record").of_a_run().recording == Record()


@pytest.mark.parametrize("rate", [0.001, 0.5, 1, 1.5, 3, 10, 10**6])
@pytest.mark.parametrize("burst", [1, 2, 3, 1000, 10**6])
def test_any_rate_goes_with_any_burst(rate: float, burst: int) -> None:
    """A later change of the rate alone is never one that the engine refuses."""
    limit = JobOptions(rate=rate, burst=burst).of_a_run().rate
    assert limit is not None
    assert 1 <= limit.burst <= burst


def holding(name: str, value: Any) -> JobOptions:
    """Options in which one number is set."""
    if name == "max_failures":
        return JobOptions(on_error=RecordOptions(value))
    if name in RetryOptions.__struct_fields__:
        return JobOptions(retry=msgspec.structs.replace(RetryOptions(), **{name: value}))
    return msgspec.structs.replace(JobOptions(), **{name: value})


@pytest.mark.parametrize("name", BOUNDS)
def test_every_number_has_its_bounds(name: str) -> None:
    """The bounds themselves are allowed, and can be used; beyond them is an error that names it."""
    least, most = BOUNDS[name]
    for value in (least, most):
        check_bounds(holding(name, value))
        holding(name, value).of_a_run()
    for value in (least - 1, most + 1, -1, float("inf"), float("nan")):
        with pytest.raises(UsageError, match=f"{name} is"):
            check_bounds(holding(name, value))


def test_every_number_of_the_options_is_among_the_bounds() -> None:
    """None was forgotten."""
    schemas = msgspec.json.schema_components([JobOptions])[1]
    numbers = {
        name
        for schema in schemas.values()
        for name, kind in schema["properties"].items()
        if any(one.get("type") in ("integer", "number") for one in kind.get("anyOf", [kind]))
    }
    assert numbers == set(BOUNDS)


@pytest.mark.parametrize("share", ["1", "1%%", "-1%", "1 %", "100.5%", "nan%", "1e1%", "", "%", "1/2%", "٣%"])
def test_a_share_is_written_in_one_way(share: str) -> None:
    """Anything else is refused."""
    with pytest.raises(UsageError, match="max_failures is"):
        check_bounds(holding("max_failures", share))


@pytest.mark.parametrize("share", ["0%", "1%", "99%", "0.5%", "12.345678%", "100%"])
def test_every_share_is_a_bound(share: str) -> None:
    """From none to all."""
    check_bounds(holding("max_failures", share))
    holding("max_failures", share).of_a_run()


def test_a_long_version_is_refused() -> None:
    """It would be in each line of the checkpoint."""
    check_bounds(JobOptions(version="v" * 200))
    with pytest.raises(UsageError, match="version has 201 characters"):
        check_bounds(JobOptions(version="v" * 201))
