"""The service over HTTP, as a process of its own: jobs from their submission to their output, steered on the way."""

from __future__ import annotations

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from async_recovery import run_resumable
from async_recovery.status import read_status

from .support.commands import Folder, end_of, wait_until
from .support.jobs import LOG, runs_in
from .support.service_process import ENDED, Answer, Served

MODULE = '''
import asyncio
import os


async def double(item):
    await asyncio.sleep(0.001)
    return {"twice": item * 2}


async def picky(item):
    """Fails for odd numbers, until there is a file "mended"."""
    if int(item) % 2 and not os.path.exists("mended"):
        raise ValueError(f"{item} is odd")
    return int(item)


def plain(item):
    return item


async def waits(item):
    """Until there is a file "go"."""
    while not os.path.exists("go"):
        await asyncio.sleep(0.005)
    return item
'''
WORKERS = ("double", "picky", "plain", "waits")


@pytest.fixture
def here(folder: Folder) -> Folder:
    folder.write("work.py", MODULE)
    return folder


@pytest.fixture
def served(here: Folder) -> Served:
    """A service of its own for the test, with all workers."""
    return start(here)


def start(folder: Folder, *words: str) -> Served:
    ours = [f"--worker={name}=work:{name}" for name in WORKERS]
    theirs = [f"--worker={name}=jobs:{name}" for name in ("random_latency", "held_from_3", "held_at_3")]
    return Served(folder, *ours, *theirs, *words)


def records(*results: Any) -> bytes:
    lines = (
        {"index": index, **(one if isinstance(one, dict) else {"result": one})} for index, one in enumerate(results)
    )
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)


# The input


@pytest.mark.parametrize(
    "items", [[], [1, 2.5, "x", None, {"a": [1, {}]}], ["\n", "é\u2028", "</script>"], [12345678901234567890]]
)
def test_items_in_the_request_come_to_the_worker_as_they_were_sent(served: Served, items: list[Any]) -> None:
    """Numbers and texts as JSON has them; the output is what `run_resumable` writes for them."""
    job = served.submit("plain", items)
    assert served.when(job, *ENDED)["state"] == "complete"
    assert served.output(job) == records(*items)


@pytest.mark.parametrize("name", ["items.txt", "items.jsonl", "items.csv"])
def test_an_upload_is_the_input_and_its_suffix_tells_the_format(served: Served, here: Folder, name: str) -> None:
    """The output is byte for byte that of the same run without a service."""
    content = {"items.txt": b"one\n\ntwo \n", "items.jsonl": b'{"a":1}\n2\n', "items.csv": b"a,b\n1,2\n"}[name]
    upload = served.ask("POST", f"/uploads?name={name}", body=content).json
    assert upload["bytes"] == len(content)
    job = served.submit("plain", {"upload": upload["id"]})
    served.when(job, "complete")
    (here / name).write_bytes(content)

    def plain(item: Any) -> Any:
        return item

    asyncio.run(run_resumable(plain, here / name, output=here / "expected.jsonl"))
    assert served.output(job) == (here / "expected.jsonl").read_bytes()
    again = served.submit("plain", {"upload": upload["id"], "format": "text"})  # an upload serves more than one job
    assert served.when(again, *ENDED)["state"] == "complete"


def test_a_path_below_the_folder_is_the_input(served: Served, here: Folder) -> None:
    """It is read where it lies."""
    (here / "data" / "mine").mkdir()
    (here / "data" / "mine" / "items.txt").write_text("a\nb\n")
    job = served.submit("plain", {"path": "mine/items.txt"})
    served.when(job, "complete")
    assert served.output(job) == records("a", "b")


def test_a_job_is_an_ordinary_one_for_the_other_commands(served: Served, here: Folder) -> None:
    """`status` and `verify` find its output and checkpoint, while it runs and afterwards."""
    job = served.submit("held_from_3", ["0", "1", "2", "3", "4"])
    output = str(here / "data" / "jobs" / job / "output.jsonl")
    wait_until(lambda: served.output(job).count(b"\n") == 3, served.process)
    assert (read_status(output).state, read_status(output).mark) == ("running", 3)
    here.write("go", "")
    served.when(job, "complete")
    assert (read_status(output).state, read_status(output).finished) == ("complete", 5)
    assert here.run("verify", output).code == 0


# The same request twice


def test_the_same_idempotency_key_makes_one_job_however_often_it_is_sent(served: Served) -> None:
    """Twenty at once: one is told 201, the others 200, all of them the same job; also after a restart."""
    request = {"worker": "plain", "input": {"items": [1, 2]}}

    def send(_: int) -> tuple[int, str]:
        answer = served.ask("POST", "/jobs", request, headers={"Idempotency-Key": "mine"})
        return answer.status, answer.json["id"]

    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(send, range(20)))
    assert sorted(status for status, _ in answers) == [200] * 19 + [201]
    assert len({job for _, job in answers}) == 1
    served.kill()
    served.start()
    assert send(0) == (200, answers[0][1])
    other = served.ask("POST", "/jobs", {**request, "input": {"items": [3]}}, headers={"Idempotency-Key": "mine"})
    assert other.status == 409
    assert len(served.ask("GET", "/jobs").json["jobs"]) == 1


# Steering


def test_a_paused_job_begins_nothing_and_goes_on_where_it_was(served: Served, here: Folder) -> None:
    """What is in flight ends; also over a kill of the service: it stays paused until somebody unpauses it."""
    job = served.submit("random_latency", [str(n) for n in range(3000)], concurrency=2, checkpoint_interval=0.05)
    wait_until(lambda: len(runs_in(here / LOG)) > 20, served.process)
    assert served.ask("POST", f"/jobs/{job}/pause").json["state"] == "paused"
    begun = wait_until(
        lambda: (found := served.job(job)["sample"])["durable_mark"] == found["frontier"] and found["mark"]
    )
    assert len(runs_in(here / LOG)) == begun < 3000
    served.kill()
    served.start()
    found = served.job(job)
    assert (found["state"], found["sample"]["finished"]) == ("paused", begun)
    assert len(runs_in(here / LOG)) == begun
    served.ask("PATCH", f"/jobs/{job}", {"concurrency": 200})
    assert served.ask("POST", f"/jobs/{job}/unpause").json["state"] in ("queued", "running")
    served.when(job, "complete")
    assert sorted(runs_in(here / LOG)) == list(range(3000))  # nothing ran twice: all was committed before the kill
    assert [event["what"] for event in served.job(job)["events"]] == [
        *("created", "started", "paused", "changed", "unpaused", "resumed", "complete"),
    ]


def test_concurrency_and_rate_change_while_it_runs(served: Served, here: Folder) -> None:
    """They hold at once, and are remembered."""
    job = served.submit("waits", list(range(60)), concurrency=2, batch_size=1)
    wait_until(lambda: (served.job(job)["sample"] or {}).get("in_flight") == 2, served.process)
    assert served.ask("PATCH", f"/jobs/{job}", {"concurrency": 7.0}).status == 200
    wait_until(lambda: served.job(job)["sample"]["in_flight"] == 7, served.process)
    changed = served.ask("PATCH", f"/jobs/{job}", {"rate": 5}).json
    assert (changed["options"]["rate"], changed["sample"]["concurrency"]) == (5, 7)
    here.write("go", "")
    wait_until(lambda: served.job(job)["sample"]["finished"] >= 7, served.process)
    assert served.job(job)["state"] == "running"  # 53 items at 5 a second take ten seconds
    served.ask("PATCH", f"/jobs/{job}", {"rate": None})
    assert served.when(job, *ENDED)["state"] == "complete"
    assert served.ask("PATCH", f"/jobs/{job}", {"rate": 5}).status == 409


def test_a_cancelled_job_ends_keeps_what_it_has_and_can_be_deleted(served: Served, here: Folder) -> None:
    """With it go its files; before that, its output can be had."""
    job = served.submit("held_from_3", ["0", "1", "2", "3", "4"], batch_size=1)
    wait_until(lambda: len(runs_in(here / LOG)) == 5, served.process)
    assert served.ask("DELETE", f"/jobs/{job}").status == 409
    assert served.ask("POST", f"/jobs/{job}/cancel").json["state"] == "cancelled"
    assert served.output(job).count(b"\n") == 3
    for step in ("pause", "unpause", "retry-failed"):
        assert served.ask("POST", f"/jobs/{job}/{step}").status == 409
    wait_until(lambda: served.ask("DELETE", f"/jobs/{job}").status == 204, served.process)
    assert served.ask("GET", f"/jobs/{job}").status == 404
    assert list((here / "data" / "jobs").iterdir()) == []


def test_failed_items_run_again_and_take_their_places(served: Served, here: Folder) -> None:
    """Only they; the groups of failures tell of them before, and of none afterwards."""
    job = served.submit("picky", [str(n) for n in range(10)], on_error="record")
    assert served.when(job, *ENDED)["summary"]["failed"] == 5
    told = served.ask("GET", f"/jobs/{job}/failures?limit=2").json
    assert [(group["type"], group["count"]) for group in told["groups"]] == [("ValueError", 5)]
    assert [failure["index"] for failure in told["failures"]] == [1, 3]
    more = served.ask("GET", f"/jobs/{job}/failures?limit=2&after={told['next']}").json
    assert [failure["index"] for failure in more["failures"]] == [5, 7]
    last = served.ask("GET", f"/jobs/{job}/failures?limit=2&after={more['next']}").json
    assert ([failure["index"] for failure in last["failures"]], last["next"]) == ([9], None)
    here.write("mended", "")
    assert served.ask("POST", f"/jobs/{job}/retry-failed").status == 200
    found = served.when(job, "complete")
    assert (found["summary"]["failed"], found["summary"]["total_items"], found["retrying"]) == (0, 10, False)
    assert served.output(job) == records(*range(10))
    assert served.ask("GET", f"/jobs/{job}/failures").json["groups"] == []
    assert served.ask("POST", f"/jobs/{job}/retry-failed").status == 409  # nothing is left to be run again


def test_a_failed_job_says_why_and_goes_on_when_it_is_asked_to(served: Served, here: Folder) -> None:
    """What was done is not done again."""
    job = served.submit("picky", [str(n) for n in (0, 2, 4, 5, 6)], concurrency=1)
    found = served.when(job, *ENDED)
    assert found["state"] == "failed"
    assert "item 3 ('5') failed: ValueError: 5 is odd" in found["reason"]
    assert "retry it" in found["reason"]
    assert "the same line" not in found["reason"]
    here.write("mended", "")
    served.ask("POST", f"/jobs/{job}/retry-failed")
    assert served.when(job, *ENDED)["state"] == "complete"
    assert served.job(job)["summary"]["resumed_from"] == 3
    assert served.output(job) == records(0, 2, 4, 5, 6)


def test_each_message_of_the_log_names_its_job(served: Served) -> None:
    """Whatever the engine says of a run has the job before it."""
    jobs = [served.submit("picky", ["1", "3"], on_error="record") for _ in range(2)]
    for job in jobs:
        served.when(job, "complete")
    failed = [line for line in served.log.splitlines() if "is odd" in line]
    assert len(failed) == 4
    assert {job for job in jobs for line in failed if f"WARNING {job}: item" in line} == set(jobs)
    assert all(" job-" in line for line in failed)


def test_so_many_jobs_run_at_once_and_the_oldest_come_first(here: Folder) -> None:
    """The others wait; a paused one gives its place away, and takes it again in its turn."""
    served = start(here, "--max-jobs", "2", "--max-queued", "4")
    jobs = [served.submit("waits", [n], batch_size=1) for n in range(4)]
    full = served.ask("POST", "/jobs", {"worker": "waits", "input": {"items": [9]}})
    assert (full.status, full.headers["retry-after"]) == (429, "60")

    def states() -> list[str]:
        return [served.job(job)["state"] for job in jobs]

    wait_until(lambda: states() == ["running", "running", "queued", "queued"], served.process)
    served.ask("POST", f"/jobs/{jobs[0]}/pause")
    wait_until(lambda: states() == ["paused", "running", "running", "queued"], served.process)
    served.ask("POST", f"/jobs/{jobs[0]}/unpause")
    wait_until(lambda: states() == ["queued", "running", "running", "queued"], served.process)
    served.ask("POST", f"/jobs/{jobs[1]}/cancel")
    wait_until(lambda: states() == ["running", "cancelled", "running", "queued"], served.process)
    here.write("go", "")
    for job in (jobs[0], *jobs[2:]):
        served.when(job, "complete")


# Looking


def test_the_output_comes_in_ranges_and_says_when_it_has_not_changed(served: Served) -> None:
    """As HTTP has it: from a byte on, the last bytes, behind the end, if it is still the same."""
    job = served.submit("plain", ["a", "b", "c"])
    served.when(job, "complete")
    whole = served.output(job)

    def ask(**headers: str) -> Answer:
        return served.ask("GET", f"/jobs/{job}/output", headers=headers)

    for asked, wanted in [("5-", whole[5:]), ("0-0", whole[:1]), ("-4", whole[-4:]), ("3-9999", whole[3:])]:
        answer = ask(Range=f"bytes={asked}")
        assert (answer.status, answer.body) == (206, wanted)
        first = len(whole) - len(wanted) if asked != "0-0" else 0
        assert answer.headers["content-range"] == f"bytes {first}-{first + len(wanted) - 1}/{len(whole)}"
    assert (ask(Range="bytes=9999-").status, ask(Range="lines=1-2").body) == (416, whole)
    tag = ask().headers["etag"]
    assert ask(**{"If-None-Match": tag}).status == 304
    assert ask(**{"If-Range": '"other"', "Range": "bytes=5-"}).body == whole
    assert ask(**{"If-Range": tag, "Range": "bytes=5-"}).body == whole[5:]
    head = served.ask("HEAD", f"/jobs/{job}/output")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(whole)))


def test_while_it_runs_the_output_is_what_is_committed(served: Served, here: Folder) -> None:
    """Whole records, and a beginning of what it will be; also when the service was killed and the job is paused."""
    job = served.submit("random_latency", [str(n) for n in range(4000)], concurrency=8, checkpoint_interval=0.02)
    seen = [b""]
    while len(seen) < 12:
        seen.append(
            wait_until(lambda: found if len(found := served.output(job)) > len(seen[-1]) else b"", served.process)
        )
    served.ask("POST", f"/jobs/{job}/pause")
    served.kill()
    served.start()
    seen.append(served.output(job))
    served.ask("PATCH", f"/jobs/{job}", {"concurrency": 300})
    served.ask("POST", f"/jobs/{job}/unpause")
    served.when(job, "complete")
    seen.append(served.output(job))
    for earlier, later in pairwise(seen):
        assert later.startswith(earlier)
        assert earlier == b"" or earlier.endswith(b"\n")


def test_events_tell_each_change_and_go_on_where_a_listener_left_off(served: Served, here: Folder) -> None:
    """From the last id on nothing comes twice and nothing is missing; after a restart everything comes."""
    job = served.submit("waits", [1], batch_size=1)
    served.when(job, "running")
    seen: list[tuple[str, str, Any]] = []
    with served.events(job) as events:
        for event in events:
            seen.append(event)
            if len([kind for _, kind, _ in seen if kind == "sample"]) == 2:
                break
    assert seen[0][1] == "job" or seen[0][2]["finished"] == 0
    here.write("go", "")
    served.when(job, "complete")
    with served.events(job, seen[-1][0]) as events:
        later = [next(events), next(events)]
    numbers = [int(event_id.partition("-")[2]) for event_id, _, _ in seen + later]
    assert numbers == sorted(set(numbers))
    assert [data["state"] for _, kind, data in later if kind == "job"] == ["complete"]
    served.kill()
    served.start()
    with served.events(job, later[-1][0]) as events:
        again = next(events)
    assert again[0].partition("-")[0] != later[-1][0].partition("-")[0]
    assert again[2]["state"] == "complete"


def test_metrics_have_the_names_that_prometheus_wants_and_the_values_of_the_job(served: Served, here: Folder) -> None:
    """Each family is there while a job runs; of ended jobs their number is left."""
    job = served.submit("held_at_3", [str(n) for n in range(10)], batch_size=1, concurrency=4, checkpoint_interval=0.05)
    wait_until(lambda: (served.job(job)["sample"] or {}).get("durable_mark") == 3, served.process)
    wait_until(lambda: served.job(job)["sample"]["finished"] == 9, served.process)
    text = served.ask("GET", "/metrics").body.decode()
    values = {
        (sample.name, sample.labels.get("outcome") or sample.labels.get("state")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("job", job) == job
    }
    assert values["async_recovery_items_total", "done"] == 9
    assert values["async_recovery_items_total", "failed"] == 0
    assert values["async_recovery_mark", None] == values["async_recovery_durable_mark", None] == 3
    assert (values["async_recovery_items_ahead", None], values["async_recovery_items_in_flight", None]) == (6, 1)
    assert values["async_recovery_frontier", None] == 10
    assert values["async_recovery_head_of_line_age_seconds", None] > 0
    assert values["async_recovery_last_commit_age_seconds", None] > 0
    assert values["async_recovery_commit_duration_seconds_count", None] == values["async_recovery_commits_total", None]
    for name in ("attempts_retried_total", "pauses_total", "paused", "concurrency", "items_waiting"):
        assert (f"async_recovery_{name}", None) in values
    assert values["async_recovery_jobs", "running"] == 1
    here.write("go", "")
    served.when(job, "complete")
    text = served.ask("GET", "/metrics").body.decode()
    assert 'async_recovery_jobs{state="complete"} 1.0' in text
    assert job not in text


def test_the_list_has_the_newest_first_page_by_page(served: Served) -> None:
    """And by state."""
    jobs = [served.submit("plain", [n]) for n in range(5)]
    for job in jobs:
        served.when(job, "complete")
    first = served.ask("GET", "/jobs?limit=2").json
    second = served.ask("GET", f"/jobs?limit=2&after={first['next']}").json
    third = served.ask("GET", f"/jobs?limit=2&after={second['next']}").json
    assert [job["id"] for page in (first, second, third) for job in page["jobs"]] == jobs[::-1]
    assert third["next"] is None
    assert served.ask("GET", "/jobs?state=failed").json["jobs"] == []
    assert len(served.ask("GET", "/jobs?state=complete").json["jobs"]) == 5


# Its end, and its start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_in_flight_finish_and_commits_it(served: Served, here: Folder, number: int) -> None:
    """Exit code 0; the next start goes on, and runs nothing again. Listeners are let go."""
    job = served.submit("waits", list(range(8)), concurrency=3, drain_timeout=60)
    wait_until(lambda: (served.job(job)["sample"] or {}).get("in_flight") == 3, served.process)
    with served.events(job) as events:
        next(events)
        served.process.send_signal(number)
        assert [kind for _, kind, _ in events if kind not in ("job", "sample")] == []  # and it ends
    here.write("go", "")
    assert end_of(served.process).code == 0
    output = here / "data" / "jobs" / job / "output.jsonl"
    assert read_status(str(output)).mark == 3
    served.start()
    served.when(job, "complete")
    assert served.job(job)["summary"]["executed"] == 5
    assert served.output(job) == records(*range(8))


def test_a_second_signal_cancels_what_is_in_flight(served: Served, here: Folder) -> None:
    """It does not wait for the drain; what had finished is kept."""
    job = served.submit("held_from_3", [str(n) for n in range(8)], concurrency=8, drain_timeout=1000)
    wait_until(lambda: len(runs_in(here / LOG)) == 8, served.process)
    served.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "stopping" in served.log, served.process)
    assert served.stop().code == 0
    assert read_status(str(here / "data" / "jobs" / job / "output.jsonl")).mark == 3


def test_a_second_service_in_the_same_folder_is_refused(served: Served, here: Folder) -> None:
    """Exit code 75, one line; the first goes on."""
    second = here.run("serve", "--data", "data", "--worker", "plain=work:plain", "--listen", "0")
    assert (second.code, second.err.count("\n")) == (75, 1)
    assert "another service has this folder" in second.err
    assert served.ask("GET", "/readyz").status == 200


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--worker", "plain=work:nothing"), "has no 'nothing'"),
        (("--worker", "plain=nowhere:plain"), "no module 'nowhere'"),
        (("--worker", "pl ain=work:plain"), "no name for a worker"),
        (("--worker", "plain=work:plain", "--listen", "0.0.0.0:0"), "there is no token"),
        (("--worker", "plain=work:plain", "--listen", "nonsense"), "is no address"),
        (("--worker", "plain=work:plain", "--token-file", "none"), "can not be read"),
        (("--worker", "plain=work:plain", "--max-jobs", "0"), "max_jobs is 0"),
    ],
)
def test_a_mistake_in_the_command_is_one_line_and_makes_nothing(
    here: Folder, words: tuple[str, ...], said: str
) -> None:
    """Exit code 2, no folder, no traceback."""
    ended = here.run("serve", "--data", "elsewhere", *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert said in ended.err
    assert not (here / "elsewhere").exists()


def test_a_data_folder_that_can_not_be_is_told_in_one_line(here: Folder) -> None:
    """A file, for one; and a database that is none."""
    here.write("file", "")
    ended = here.run("serve", "--data", "file", "--worker", "plain=work:plain", "--listen", "0")
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    (here / "broken").mkdir()
    here.write("broken/service.db", "this is no database, and was not one before\n" * 100)
    ended = here.run("serve", "--data", "broken", "--worker", "plain=work:plain", "--listen", "0")
    assert (ended.code, ended.err.count("\n")) == (4, 1), ended.err
    assert (here / "broken" / "service.db").read_text().startswith("this is no database")


def test_a_job_whose_worker_is_gone_fails_and_says_so(served: Served, here: Folder) -> None:
    """The other jobs go on; with the worker back, so does it."""
    job = served.submit("waits", [1])
    served.when(job, "running")
    served.kill()
    port, served.port = served.port, 0
    less = Served(here, "--worker=plain=work:plain", data="data")
    found = less.when(job, *ENDED)
    assert (found["state"], "waits" in found["reason"]) == ("failed", True)
    assert less.stop().code == 0
    served.port = port
    here.write("go", "")
    served.start()
    served.ask("POST", f"/jobs/{job}/retry-failed")
    assert served.when(job, *ENDED)["state"] == "complete"
