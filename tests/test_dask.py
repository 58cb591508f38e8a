"""A run on a real cluster of Dask: what is refused, what it shows, who comes and goes, and what it leaves alone."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from async_recovery import (
    DaskExecutor,
    NoWorkers,
    Progress,
    UsageError,
    command,
    dask_executor,
    resumable,
    run_resumable,
)
from async_recovery.dask_executor import executor_of
from async_recovery.workers import text

from .support.commands import Folder, check_one_line, children_of, end_of, kill, read_committed, wait_until
from .support.dask_cluster import DaskCluster, free_port, running_cluster, wait_for
from .support.jobs import LOG, count_of_runs, runs_in
from .test_house import ROOT, modules_after

MODULE = '''
import asyncio
import os
import signal
import time

from async_recovery import SlowDown

LOG = os.open("ran.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


class Odd(Exception):
    """An exception that pickle alone can not carry."""

    def __init__(self, one, *, two):
        super().__init__(f"{one} and {two}")
        self.two = two


def began(item):
    os.write(LOG, b"%7d\\n" % int(item))


async def quick(item):
    began(item)
    return {"n": int(item)}


async def some(item):
    began(item)
    await asyncio.sleep(0.1)
    return {"n": int(item), "by": os.environ.get("NAMED", "")}


async def straggler(item):
    began(item)
    await asyncio.sleep(1.5 if item == "0" else 0.005)
    return {"n": int(item)}


async def for_ever(item):
    began(item)
    try:
        await asyncio.sleep(10_000)
    finally:
        with open("cancelled.log", "a") as file:
            file.write(f"{item}\\n")


async def fifth(item):
    began(item)
    await asyncio.sleep(10_000 if count(0) < 5 else 0)
    return {"n": int(item)}


async def killer(item):
    began(item)
    await asyncio.sleep(0.05)
    if item == "37":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"n": int(item)}


async def odd(item):
    began(item)
    if item == "3":
        raise Odd(1, two=2)
    if item == "4" and count(4) < 2:
        raise SlowDown(0.2)
    if item == "5" and count(5) < 3:
        raise ConnectionError("again")
    return {"n": int(item)}


def count(item):
    with open("ran.log", "rb") as file:
        return file.read().split().count(b"%d" % item)


def plain(item):
    began(item)
    time.sleep(0.02)
    return {"n": int(item)}
'''

RUN = ("run", "--input", "items.txt", "--output", "out.jsonl")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Folder]:
    """A folder with the module of workers."""
    with Folder(tmp_path) as folder:
        folder.write("jobs.py", MODULE)
        yield folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    """A cluster for all tests that do it no harm."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "jobs.py").write_text(MODULE)
    with running_cluster(folder) as cluster:
        yield cluster


@pytest.fixture
def there(shared: DaskCluster) -> Iterator[Folder]:
    """The folder of its workers, with nothing in it that a test has left."""
    with Folder(shared.folder) as folder:
        yield folder
    for name in ("out.jsonl", "out.jsonl.partial", "out.jsonl.checkpoint", "out.jsonl.lock"):
        (shared.folder / name).unlink(missing_ok=True)
    if (shared.folder / LOG).exists():
        os.truncate(shared.folder / LOG, 0)  # the workers hold it open


def work_of(name: str, folder: Folder, patch: pytest.MonkeyPatch) -> Any:
    """That function of that module, ``module:function``, in this process too, as long as the test runs."""
    module, _, function = name.partition(":")
    patch.syspath_prepend(folder.path)
    patch.chdir(folder.path)
    patch.delitem(sys.modules, module, raising=False)
    imported = importlib.import_module(module)
    patch.setitem(sys.modules, module, imported)
    return getattr(imported, function)


def numbers(folder: Folder) -> list[int]:
    """The results in the order of the output."""
    return [json.loads(line)["n"] for line in (folder / "out.jsonl").read_bytes().splitlines()]


def test_a_cluster_of_this_machine_is_started_for_the_run(here: Folder) -> None:
    """`dask://` alone runs the job on processes here; none of them is left, and nothing of their log is shown."""
    here.write_items(3_000)
    ended = here.run(*RUN, "--worker", "jobs:quick", "--executor", "dask://?workers=2")
    assert (ended.code, ended.err) == (0, "")
    assert ended.summary["executed"] == 3_000
    assert numbers(here) == list(range(3_000))
    assert {path.name for path in here.path.iterdir()} == {"jobs.py", "items.txt", "out.jsonl", LOG}


def test_a_straggler_stalls_nothing_and_alone_runs_again(there: Folder, shared: DaskCluster) -> None:
    """While item 0 takes its time, the 499 others are committed; after kill -9 of the coordinator it alone runs."""
    there.write_items(500)
    words = [*RUN, "--worker", "jobs:straggler", "--concurrency", "40", "--checkpoint-interval", "0.1"]
    words += ["--executor", shared.executor]
    process = there.start(*words)
    wait_until(lambda: len(read_committed(there / "out.jsonl.checkpoint").ahead) == 499, process, within_s=20)
    assert process.poll() is None
    kill(process)
    before = count_of_runs(there / LOG)
    resumed = there.run(*words)
    assert (resumed.code, resumed.summary["executed"]) == (0, 1), resumed.err
    assert runs_in(there / LOG)[before:] == [0]
    assert numbers(there) == list(range(500))


def test_what_a_killed_coordinator_left_running_is_stopped(there: Folder, shared: DaskCluster) -> None:
    """Its items are cancelled when the scheduler sees that it is gone."""
    there.write_items(100)
    (there / "cancelled.log").unlink(missing_ok=True)
    process = there.start(*RUN, "--worker", "jobs:for_ever", "--concurrency", "10", "--executor", shared.executor)
    wait_until(lambda: count_of_runs(there / LOG) == 10, process)
    kill(process)
    wait_for(lambda: (there / "cancelled.log").exists() and len((there / "cancelled.log").read_text().split()) == 10)
    assert count_of_runs(there / LOG) == 10


def test_a_signal_stops_the_workers_too(there: Folder, shared: DaskCluster) -> None:
    """What does not end in time is cancelled there; the exit code is that of the signal, and the line resumes."""
    there.write_items(100)
    (there / "cancelled.log").unlink(missing_ok=True)
    words = [*RUN, "--worker", "jobs:for_ever", "--concurrency", "10", "--drain-timeout", "0.3"]
    process = there.start(*words, "--executor", shared.executor)
    wait_until(lambda: count_of_runs(there / LOG) == 10, process)
    process.send_signal(signal.SIGTERM)
    ended = end_of(process)
    assert ended.code == 143, ended.err
    assert sorted(map(int, (there / "cancelled.log").read_text().split())) == sorted(runs_in(there / LOG))
    assert f"--executor {shared.executor}" in ended.err


def test_a_ctrl_c_reaches_the_processes_of_this_machine_and_ends_none_before_its_time(here: Folder) -> None:
    """A terminal sends it to all of them; what is in flight ends in order, and nothing runs twice."""
    here.write_items(200)
    words = [*RUN, "--worker", "jobs:some", "--concurrency", "8", "--executor", "dask://?workers=2"]
    process = here.start(*words, start_new_session=True)
    wait_until(lambda: count_of_runs(here / LOG) > 20, process)
    os.killpg(process.pid, signal.SIGINT)
    ended = end_of(process)
    assert ended.code == 130, ended.err
    assert "is gone" not in ended.err
    done = read_committed(here / "out.jsonl.checkpoint")
    assert done.mark + len(done.ahead) == count_of_runs(here / LOG)
    for children in (1, 2, 3):  # while the cluster is being started
        early = here.start(*words, start_new_session=True)
        wait_until(lambda pid=early.pid, least=children: len(children_of(pid)) >= least, early)  # type: ignore[misc]
        os.killpg(early.pid, signal.SIGINT)
        told = end_of(early)
        assert told.code == 130
        assert "Traceback" not in told.err
    assert here.run(*words).summary["executed"] == 200 - done.mark - len(done.ahead)


def test_failures_mean_what_they_always_mean(there: Folder, shared: DaskCluster) -> None:
    """Types, messages, retries and pauses come over; the output is that of a run in one process, byte for byte."""
    there.write_items(20)
    words = [*RUN, "--worker", "jobs:odd", "--max-failures", "5", "--retries", "2", "--retry-initial", "0.05"]
    alone = there.run(*words)
    assert alone.code == 3, alone.err
    expected = (there / "out.jsonl").read_bytes()
    assert b'"error":{"type":"Odd","message":"1 and 2"}' in expected
    alone_ran = sorted(runs_in(there / LOG))
    os.truncate(there / LOG, 0)
    again = there.run(*words, "--executor", shared.executor)
    assert again.code == 3, again.err
    assert (there / "out.jsonl").read_bytes() == expected
    assert sorted(runs_in(there / LOG)) == alone_ran
    retried = there.run("retry-failed", "out.jsonl", "--worker", "jobs:quick", "--executor", shared.executor)
    assert (retried.code, retried.summary["processed"]) == (0, 1), retried.err
    assert numbers(there) == list(range(20))


@pytest.mark.parametrize("how", [["--worker", "jobs:plain"], ["--exec", "echo {}"], ["--worker", "text"]])
def test_every_kind_of_worker_runs_there(there: Folder, shared: DaskCluster, how: list[str]) -> None:
    """Plain functions in threads, commands, and those that are built in: the bytes are those of one process."""
    there.write_items(60)
    assert there.run(*RUN, *how).code == 0
    expected = (there / "out.jsonl").read_bytes()
    ended = there.run(*RUN, *how, "--executor", shared.executor)
    assert (ended.code, ended.err) == (0, "")
    assert (there / "out.jsonl").read_bytes() == expected


def test_a_worker_that_is_not_there_is_refused_before_the_first_item(here: Folder, shared: DaskCluster) -> None:
    """In one line that names the machine and the module; nothing is left behind."""
    here.write_items(10)
    here.write("only_here.py", "async def work(item):\n    return 1\n")
    before = here.snapshot()
    ended = here.run(*RUN, "--worker", "only_here:work", "--executor", shared.executor)
    check_one_line(ended, 2, "the worker tcp://127.0.0.1:", "there is no module 'only_here'")
    assert here.snapshot() == before


@pytest.mark.parametrize(
    ("customize", "said"),
    [
        ("import async_recovery\nasync_recovery.__version__ = '0.0.9'", "has async-recovery 0.0.9, and this is"),
        ("import async_recovery.dask_relay as relay\nrelay.PYTHON = '3.10'", "has Python 3.10, and this is Python 3."),
        ("import sys\nsys.modules['async_recovery'] = None", "install async-recovery[dask]=="),
        ("import sys\nsys.path.insert(0, 'foreign')", "install async-recovery[dask]=="),
    ],
)
def test_another_version_is_refused_before_the_first_item(here: Folder, customize: str, said: str) -> None:
    """Of ours, of Python, and none at all: one line, and nothing is left behind."""
    other = here.path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text(customize)
    (other / "foreign").mkdir()
    (other / "foreign" / "async_recovery.py").write_text("__version__ = '9'")
    here.write_items(10)
    with DaskCluster(other) as cluster:
        worker = cluster.start_worker()
        before = here.snapshot()
        for _ in range(2):  # that a coordinator leaves does no worker harm which it has not used
            ended = here.run(*RUN, "--worker", "jobs:quick", "--executor", f"{cluster.executor}?patience=10")
            check_one_line(ended, 2, "tcp://127.0.0.1:", said)
        assert worker.poll() is None
        after = here.snapshot()
    assert {name for name in after if not name.startswith("other")} == {
        *(name for name in before if not name.startswith("other")),
        LOG,  # which the module makes when it is imported here
    }


def test_who_can_not_run_the_worker_joins_in_vain(here: Folder) -> None:
    """A process that comes later and is not fit gets nothing, and the log says why, once."""
    here.write_items(120)
    bare = here.path / "bare"
    bare.mkdir()
    with running_cluster(here.path, 1) as cluster:
        process = here.start(*RUN, "--worker", "jobs:some", "--concurrency", "4", "--executor", cluster.executor)
        wait_until(lambda: count_of_runs(here / LOG) > 8, process)
        cluster.start_worker(python_path=bare)
        ended = end_of(process)
    assert ended.code == 0
    assert re.search(r"ERROR the worker tcp\S+ can not run the worker: .*'jobs'.*; it gets no items", ended.err)


def test_a_worker_joins_and_one_leaves_gracefully(here: Folder) -> None:
    """The one takes part, the other loses nothing; what was in flight there runs once more at most."""
    here.write_items(220)
    with DaskCluster(here.path) as cluster:
        first = cluster.start_worker()
        process = here.start(*RUN, "--worker", "jobs:some", "--concurrency", "8", "--executor", cluster.executor)
        wait_until(lambda: count_of_runs(here / LOG) > 20, process)
        second = cluster.start_worker(named="second")
        wait_until(lambda: b'"by":"second"' in (here / "out.jsonl.partial").read_bytes(), process)
        first.send_signal(signal.SIGTERM)
        ended = end_of(process)
        assert ended.code == 0, ended.err
        assert second.poll() is None
    assert numbers(here) == list(range(220))
    assert count_of_runs(here / LOG) <= 220 + 2 * 8


@pytest.mark.parametrize("nanny", [False, True])
def test_workers_that_leave_in_order_fail_no_item(here: Folder, nanny: bool) -> None:
    """Four of them end by SIGTERM while the same item runs there: it is none that kills its process."""
    here.write_items(1)
    with DaskCluster(here.path, nanny=nanny) as cluster:
        worker = cluster.start_worker()
        words = ["--worker", "jobs:fifth", "--on-error", "record", "--executor", cluster.executor]
        process = here.start(*RUN, *words)
        for ran in range(1, 5):
            wait_until(lambda ran=ran: count_of_runs(here / LOG) == ran, process)  # type: ignore[misc]
            worker.send_signal(signal.SIGTERM)
            worker = cluster.start_worker()
        ended = end_of(process)
    assert ended.code == 0, ended.err
    assert numbers(here) == [0]


def test_the_item_that_kills_its_process_is_found(here: Folder) -> None:
    """It becomes a recorded failure after some deaths; its neighbours are done."""
    here.write_items(60)
    with running_cluster(here.path, nanny=True) as cluster:
        words = [*RUN, "--worker", "jobs:killer", "--concurrency", "8", "--on-error", "record"]
        ended = here.run(*words, "--executor", cluster.executor)
    assert ended.code == 3, ended.err
    lines = [json.loads(line) for line in (here / "out.jsonl").read_bytes().splitlines()]
    assert [line["index"] for line in lines if "error" in line] == [37]
    assert lines[37]["error"]["type"] == "Quarantined"
    assert len([line for line in lines if "n" in line]) == 59
    assert runs_in(here / LOG).count(37) < 12


def test_without_a_scheduler_or_workers_the_exit_code_says_try_again(here: Folder) -> None:
    """At the start nothing is touched; in the middle everything that finished is saved, and the same line resumes."""
    here.write_items(200)
    before = here.snapshot()
    nowhere = f"dask://127.0.0.1:{free_port()}?patience=0.5"
    check_one_line(here.run(*RUN, "--executor", nowhere), 75, "can not be reached", "run the same line again")
    assert here.snapshot() == before
    with DaskCluster(here.path) as cluster:
        job = [*RUN, "--worker", "jobs:some", "--concurrency", "16", "--checkpoint-interval", "0.1"]
        hurried = [*job, "--executor", f"{cluster.executor}?patience=0.2"]
        check_one_line(here.run(*hurried), 75, "had no worker for 0.2 s", "run the same line again")
        cluster.start_worker()
        cluster.wait_for_workers()
        process = here.start(*job, "--executor", f"{cluster.executor}?patience=1")
        wait_until(lambda: read_committed(here / "out.jsonl.checkpoint").mark > 20, process)
        cluster.scheduler.kill()
        ended = end_of(process)
        assert ended.code == 75
        assert ended.err.splitlines()[-1].startswith("Error: no worker of the cluster was there for 1 s. Everything")
        done = read_committed(here / "out.jsonl.checkpoint")
        cluster.start_scheduler()
        cluster.start_worker()
        resumed = here.run(*job, "--executor", cluster.executor)
    assert resumed.code == 0, resumed.err
    assert resumed.summary["executed"] == 200 - done.mark - len(done.ahead)
    assert numbers(here) == list(range(200))


def test_status_shows_the_workers(there: Folder, shared: DaskCluster) -> None:
    """Each with its chunks, its speed and when it was last heard of; also as JSON."""
    there.write_items(400)
    process = there.start(*RUN, "--worker", "jobs:some", "--concurrency", "8", "--executor", shared.executor)

    def shown() -> str:
        found = there.run("status", "out.jsonl").out
        return found if "items a second" in found else ""

    wait_until(lambda: (there / "out.jsonl.checkpoint").exists(), process)
    text = wait_until(shown, process)
    lines = [line for line in text.splitlines() if line.startswith("worker tcp://")]
    assert len(lines) == 2
    assert re.search(r"works, \d+ chunks, \d+ items, [\d.]+ items a second, seen [\d.]+ s ago", lines[0])
    told = json.loads(there.run("status", "out.jsonl", "--json").out)["running"]["progress"]["workers"]
    assert len(told) == 2
    process.send_signal(signal.SIGINT)
    end_of(process)


@pytest.mark.parametrize("how", [["--worker", "jobs:quick"], ["--exec", "echo {}"]])
def test_a_dashboard_shows_a_run_on_a_cluster(there: Folder, shared: DaskCluster, how: list[str]) -> None:
    """The worker goes to the processes as it is."""
    there.write_items(60)
    ended = there.run(*RUN, *how, "--executor", shared.executor, "--dashboard", "127.0.0.1:0")
    assert ended.code == 0, ended.err
    assert "watch it at http://127.0.0.1:" in ended.err
    assert ended.summary["executed"] == 60


def test_tls_is_passed_through(here: Folder) -> None:
    """With its certificates a run is let in; without, it is not, and says that it can not reach the scheduler."""
    here.write_items(50)
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "1"]
    subprocess.run(["openssl", *words, "-subj", "/CN=here"], cwd=here.path, check=True, capture_output=True)
    tls = ("--tls-ca-file", "cert.pem", "--tls-cert", "cert.pem", "--tls-key", "key.pem")
    with DaskCluster(here.path, options=tls, scheme="tls") as cluster:
        cluster.start_worker()
        address = f"{cluster.executor}?tls_ca=cert.pem&tls_cert=cert.pem&tls_key=key.pem"
        ended = here.run(*RUN, "--worker", "jobs:quick", "--executor", address)
        assert ended.code == 0, ended.err
        refused = here.run(*RUN, "--worker", "jobs:quick", "--executor", f"{cluster.executor}?patience=0.5")
        check_one_line(refused, 75, "can not be reached")


def test_distributed_is_imported_only_when_chosen() -> None:
    """Neither by all that is public, nor by the command line; but by what goes to the cluster."""
    public = "from async_recovery import *\nDaskExecutor('tcp://127.0.0.1:1')"
    without = "\n".join(
        [*(f"import async_recovery.{name}" for name in ("calls", "cli", "engine", "retrying", "status"))]
    )
    assert not {"distributed", "dask", "tornado"} & modules_after(without)
    assert {"distributed"} <= modules_after(f"{public}\nimport async_recovery.dask_relay")


def test_the_users_logging_is_left_alone() -> None:
    """Importing distributed adds handlers and levels to logging; afterwards none of them is there."""
    program = """
import asyncio, logging, sys
from async_recovery import DaskExecutor, NoWorkers
from async_recovery.workers import text

try:
    asyncio.run(DaskExecutor("tcp://127.0.0.1:1", patience_s=0).connect(text))
except NoWorkers:
    assert "distributed" in sys.modules
loggers = [logging.getLogger(name) for name in [None, *logging.root.manager.loggerDict]]
print([(found.name, found.handlers) for found in loggers if found.handlers])
print([found.name for found in loggers if not found.propagate])
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n[]\n"
    assert ran.stderr == ""


def test_workers_that_share_a_process_are_refused() -> None:
    """In one line that says what to do, before the first item."""
    program = """
import asyncio
from distributed import LocalCluster
from async_recovery import DaskExecutor, UsageError
from async_recovery.workers import text

with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
    executor = DaskExecutor(cluster.scheduler_address)
    async def main():
        try:
            await executor.connect(text)
        except UsageError as error:
            print(error)
        finally:
            await executor.close()
    asyncio.run(main())
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert re.fullmatch(
        r"the worker inproc\S+ can not run the worker: there are 2 workers of Dask in its process: "
        r"start each in a process of its own \(of a LocalCluster: processes=True\)\n",
        ran.stdout,
    ), ran.stderr


def test_a_missing_extra_is_one_line(here: Folder) -> None:
    """It says what to install; without the executor nothing is missing."""
    here.write_items(3)
    here.write("sitecustomize.py", "import sys\nsys.modules['distributed'] = None\n")
    env = {"PYTHONPATH": str(here.path)}
    ended = here.run(*RUN, "--executor", "dask://", env=env)
    check_one_line(ended, 2, "pip install 'async-recovery[dask]'")
    assert here.run(*RUN, env=env).code == 0


def test_without_its_files_the_rest_works(here: Folder) -> None:
    """A job in one process needs neither the files of this executor nor those of what it stands on."""
    here.write_items(3)
    parts = ("dask_executor", "dask_relay", "chunk_pool", "chunk_host")
    gone = [f"async_recovery.{name}" for name in parts] + ["distributed", "dask"]
    here.write("sitecustomize.py", f"import sys\nsys.modules.update(dict.fromkeys({gone}))\n")
    ended = here.run(*RUN, env={"PYTHONPATH": str(here.path)})
    assert ended.code == 0, ended.err
    assert len((here.path / "out.jsonl").read_bytes().splitlines()) == 3


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("tcp://here:1", "write dask://HOST:PORT"),
        ("dask://here", "write dask://HOST:PORT"),
        ("dask://here:nan", "write dask://HOST:PORT"),
        ("dask://here:1/path", "write dask://HOST:PORT"),
        ("dask://here:1?color=red", "there is no option color; there are workers, lease, patience, tls_ca"),
        ("dask://?workers=two", "workers must be a number"),
        ("dask://?workers=0", "workers is 0: it must be a whole number of 1 or more"),
        ("dask://here:1?workers=2", "workers with the address of a scheduler"),
        ("dask://here:1?lease=-1", "lease_s is -1.0"),
        ("dask://here:1?lease=0", "lease_s is 0.0: it must be a number of 2.0 or more"),
        ("dask://here:1?lease=nan", "lease_s is nan: it must be a number of 2.0 or more"),
        ("dask://?workers=2&workers=3", "workers more than once: give it once"),
        ("dask://here:1?tls_ca=cert.pem", "TLS needs tls_ca and tls_cert"),
        ("dask://here:1?tls_ca=no.pem&tls_cert=no.pem", "there is no file 'no.pem', which tls_ca names"),
        (f"dask://here:1?tls_ca={__file__}&tls_cert={__file__}", "the files for TLS can not be used ("),
    ],
)
def test_a_wrong_address_is_refused(address: str, said: str) -> None:
    """In one line that says how to write it."""
    with pytest.raises(UsageError, match=re.escape(said)):
        executor_of(address)


def test_a_password_in_an_address_is_refused_and_not_shown(here: Folder) -> None:
    """In one line, by the command line and in a program."""
    here.write_items(3)
    for address in ("dask://me:secret@127.0.0.1:1", "dask://me:secret@127.0.0.1:1?lease=0", "dask://me:sec/ret@x:1"):
        ended = here.run(*RUN, "--worker", "jobs:quick", "--executor", address)
        check_one_line(ended, 2, "has a user or a password: Dask knows none")
        assert "sec" not in ended.err
    with pytest.raises(UsageError, match="has a user or a password") as refused:
        DaskExecutor("tcp://me:secret@here:1")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "address", ["foo://127.0.0.1:1", "inproc://127.0.0.1:1", "tcp://127.0.0.1", "tls://127.0.0.1:1"]
)
async def test_an_address_that_dask_can_not_use_is_refused(tmp_path: Path, address: str) -> None:
    """In one line that says how to write it; nothing has been touched."""
    with pytest.raises(UsageError, match=rf"{address} can not be used \(.*give its address, such as tcp://HOST:8786"):
        await run_resumable(text, ["a"], output=tmp_path / "out.jsonl", executor=DaskExecutor(address, patience_s=0))
    assert list(tmp_path.iterdir()) == []


def nested() -> object:
    """A worker without a name of its own."""

    async def worker(item: object) -> object:
        return item

    return worker


async def test_a_worker_without_a_name_is_refused(tmp_path: Path) -> None:
    """A closure can not be imported by its name: the message says what to write instead."""
    executor = DaskExecutor("tcp://127.0.0.1:1", patience_s=0)
    with pytest.raises(
        UsageError, match=r"nested.*is not what that name stands for.*Write it as a function of a module"
    ):
        await run_resumable(nested(), ["a"], output=tmp_path / "out.jsonl", executor=executor)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


async def test_an_executor_can_be_used_again_and_from_a_program(tmp_path: Path) -> None:
    """One after the other, with workers that hold something open too; whatever the program logs is its own."""
    executor = DaskExecutor(workers=1)
    for worker in (text, command(["echo", "{}"])):
        summary = await run_resumable(worker, ["a", "b"], output=tmp_path / "out.jsonl", executor=executor)
        assert summary.executed == 2
    assert logging.getLogger("distributed").handlers == []
    await asyncio.sleep(0)


async def test_who_could_not_be_seated_is_tried_again(
    there: Folder, shared: DaskCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a call through Dask ends with."""
    monkeypatch.setattr(dask_executor, "SEAT_AGAIN_S", 0.2)
    executor, failed = DaskExecutor(shared.address, patience_s=10), list[str]()
    call = executor._call

    async def failing(address: str, function: Any, *args: Any) -> Any:
        if function.__name__ == "seat" and len(failed) < 3:
            failed.append(address)
            raise RuntimeError("cannot schedule new futures after shutdown")
        return await call(address, function, *args)

    monkeypatch.setattr(executor, "_call", failing)
    summary = await run_resumable(text, ["a", "b"], output=there / "out.jsonl", executor=executor)
    assert (summary.executed, len(failed)) == (2, 3)


async def test_processes_that_are_slow_to_answer_take_part_later(
    here: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are asked more than once, answer in the end to all of it, and what works by then goes on."""
    here.write("slow.py", f"import os, time\ntime.sleep(2 if os.environ.get('NAMED') else 0)\n{MODULE}")
    monkeypatch.setattr(dask_executor, "CALL_S", 0.3)
    monkeypatch.setattr(dask_executor, "SEAT_AGAIN_S", 0.2)
    with DaskCluster(here.path) as cluster:
        for name in ("one", "two"):
            cluster.start_worker(named=name)
        cluster.wait_for_workers()
        executor = DaskExecutor(cluster.address, patience_s=30)
        summary = await run_resumable(
            work_of("slow:some", here, monkeypatch),
            map(str, range(60)),
            output=here / "out.jsonl",
            executor=executor,
            concurrency=8,
        )
    assert summary.executed == 60
    assert numbers(here) == list(range(60))
    assert caplog.text.count("does not answer (TimeoutError") > 4
    assert count_of_runs(here / LOG) == 60


LATE = (
    MODULE
    + """
time.sleep(float(os.environ.get("NAMED") or 0))


def hosts():
    from async_recovery.dask_relay import _here
    return [run for here in _here for run in here._hosts]
"""
)


async def test_who_is_ready_when_the_run_is_over_works_for_nobody(
    here: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that took longer to import than the others for all of the work; nor does it hold up the beginning."""
    here.write("late.py", LATE)
    monkeypatch.setattr(dask_executor, "EXAMINES_S", 0.2)
    from distributed import Client

    with DaskCluster(here.path) as cluster:
        cluster.start_worker()
        cluster.start_worker(named="8")
        cluster.wait_for_workers()
        some = work_of("late:some", here, monkeypatch)
        executor = DaskExecutor(cluster.address)
        summary = await run_resumable(some, map(str, range(20)), output=here / "out.jsonl", executor=executor)
        assert summary.elapsed_s < 7, "it did not wait for the slow one"
        connect: Any = Client
        async with connect(cluster.address, asynchronous=True, set_as_default=False) as client:
            for _ in range(2):  # the first answer of the slow one comes when it has imported the module
                await asyncio.sleep(0.5)
                assert list((await client.run(sys.modules["late"].hosts)).values()) == [[], []]


def test_a_cluster_is_not_idle_while_a_run_is_there_and_is_afterwards(
    here: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the run waits for slow workers, and one of them is ready only when it is over."""
    here.write("late.py", LATE)
    here.write_items(20)
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__IDLE_TIMEOUT", "3s")
    cluster = DaskCluster(here.path)
    process = here.start(*RUN, "--worker", "late:some", "--concurrency", "2", "--executor", cluster.executor)
    wait_until(lambda: len([*Path(f"/proc/{process.pid}/task").glob("*")]) > 1, process)  # it is on its way
    with cluster:
        cluster.start_worker(named="6")
        ended = end_of(process)
        assert (ended.code, ended.summary["executed"]) == (0, 20), ended.err
        wait_for(lambda: cluster.scheduler.poll() is not None, 30)


async def test_a_connection_that_is_cut_and_made_again_is_no_end(
    there: Folder, shared: DaskCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask's client connects again by itself; the workers were told that it was gone, and are seated again."""
    executor = DaskExecutor(shared.address, lease_s=3, patience_s=3)
    cuts = 0

    def cut(progress: Progress) -> None:
        nonlocal cuts
        if progress.executed >= 60 * (cuts + 1) and cuts < 3:
            cuts += 1
            executor._client.scheduler_comm.comm.abort()

    summary = await run_resumable(
        work_of("jobs:some", there, monkeypatch),
        map(str, range(300)),
        output=there / "out.jsonl",
        executor=executor,
        concurrency=20,
        checkpoint_interval=0.1,
        on_progress=cut,
    )
    assert (summary.processed, cuts) == (300, 3)
    assert numbers(there) == list(range(300))


async def test_a_scheduler_that_accepts_and_says_nothing_is_waited_for_no_longer(tmp_path: Path) -> None:
    """It ends as where there is none."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        executor = DaskExecutor(f"tcp://127.0.0.1:{mute.getsockname()[1]}", patience_s=0.5)
        with pytest.raises(NoWorkers, match="can not be reached"):
            await asyncio.wait_for(run_resumable(text, ["a"], output=tmp_path / "o.jsonl", executor=executor), 20)
    assert list(tmp_path.iterdir()) == []


async def test_an_executor_runs_one_job_at_a_time(
    there: Folder, shared: DaskCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is refused in one line; the first goes on, and afterwards it can be used again."""
    executor = DaskExecutor(shared.address)
    some, items = work_of("jobs:some", there, monkeypatch), [str(number) for number in range(40)]
    first = asyncio.ensure_future(run_resumable(some, items, output=there / "out.jsonl", executor=executor))
    await asyncio.sleep(0)
    with pytest.raises(UsageError, match="another run has this executor, and one runs one job at a time: make one"):
        await run_resumable(some, items, output=there / "other.jsonl", executor=executor)
    assert (await first).executed == 40
    assert (await run_resumable(some, items, output=there / "other.jsonl", executor=executor)).executed == 40


async def test_every_kind_of_output_takes_records_from_a_cluster(there: Folder, shared: DaskCluster) -> None:
    """Batches for a program, no output at all, and a database; one executor serves one run after the other."""
    executor = DaskExecutor(shared.address)
    records = list[bytes]()
    items = ["a", "b c"]
    async with resumable(text, items, checkpoint=there / "batches.checkpoint", executor=executor) as run:
        async for batch in run.batches():
            records += batch
    assert [json.loads(record)["word_count"] for record in records] == [1, 2]
    assert (await run_resumable(text, items, checkpoint=there / "none.checkpoint", executor=executor)).executed == 2
    assert (
        await run_resumable(text, items, output=f"sqlite:///{there / 'results.db'}", executor=executor)
    ).executed == 2


def test_a_crash_test_of_a_job_is_told_to_leave_the_cluster(here: Folder) -> None:
    """It kills the coordinator, and a cluster would change nothing of that."""
    here.write_items(3)
    check_one_line(here.run("torture", *RUN[1:], "--executor", "dask://"), 2, "--executor with torture", "leave it out")


def test_an_executor_of_another_kind_is_refused() -> None:
    """The message says what it must be."""
    with pytest.raises(UsageError, match=r"executor is 'dask://': it must be an Executor such as DaskExecutor"):
        asyncio.run(run_resumable(text, ["a"], output="out.jsonl", executor="dask://"))  # type: ignore[arg-type]


def test_a_pause_for_a_new_scheduler_shows(here: Folder) -> None:
    """While nobody is there, status says so, and for how long the run waits."""
    here.write_items(400)
    with running_cluster(here.path, 1) as cluster:
        words = [*RUN, "--worker", "jobs:some", "--concurrency", "8", "--executor", f"{cluster.executor}?patience=30"]
        process = here.start(*words)
        wait_until(lambda: count_of_runs(here / LOG) > 8, process)
        cluster.scheduler.kill()
        wait_until(lambda: "no worker of the cluster is there" in here.run("status", "out.jsonl").out, process)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert end_of(process).code == 143
        assert time.monotonic() - began < 10
