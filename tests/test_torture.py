"""The crash-test kit finds what is wrong with a job, and nothing where nothing is."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from async_recovery import IncompleteRun, UsageError
from async_recovery.cli import run
from async_recovery.torture import torture
from async_recovery.torture_command import torture_command
from async_recovery.torture_report import (
    Difference,
    Report,
    chosen,
    effects_differ,
    first_difference,
    gaps,
)

from .support.commands import Folder, wait_until
from .support.table_ledger import TableLedger, records_in

ITEMS = [f"item {number}" for number in range(12)]

JOBS = """
import os
import time

IMPORTED = time.time_ns()


def clean(item):
    print("working on", item)
    return {"text": item.upper()}


def imported_at(item):
    return {"text": item, "at": IMPORTED}


def hashed(item):
    return {"letters": list(set("abcdefgh"))}


def charge(item):
    with open("charged.txt", "a") as charged:
        charged.write(item + "\\n")
    return {"charged": item}


def marks(item):
    os.makedirs("marks", exist_ok=True)
    open("marks/" + item, "w").close()
    return item


def fails(item):
    raise ValueError("no such thing")


def ends_the_process(item):
    os._exit(0)
"""


async def clean(item: str) -> dict[str, str]:
    return {"text": item.upper()}


async def with_a_clock(item: str) -> dict[str, Any]:
    return {"text": item, "at": int(time.time())}


@pytest.fixture(autouse=True)
def _in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a SIGKILL leaves is the same on any file system, and on this one a sync costs nothing."""
    if Path("/dev/shm").is_dir():
        monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
        monkeypatch.setenv("TMPDIR", "/dev/shm")


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """A folder with a module of workers and their items."""
    with Folder(tmp_path) as folder:
        folder.write("jobs.py", JOBS)
        folder.write("items.txt", "\n".join(ITEMS))
        yield folder


def words(worker: str, *more: str, boundaries: int = 6, random: int = 2) -> list[str]:
    """The command for a worker of that module."""
    few = ["--boundaries", str(boundaries), "--random", str(random)]
    chosen = [] if "--exec" in more else ["--worker", f"jobs:{worker}"]
    return ["torture", "--input", "items.txt", "--output", "out.json", *chosen, *few, *more]


def test_a_clean_worker_passes() -> None:
    """Killed at its boundaries and at random moments, its output is the same each time, and nothing is found."""
    report = torture(clean, ITEMS, boundaries=10, random=2)
    assert report.ok, report
    assert report.deterministic
    assert (report.items, report.all_items) == (12, True)
    assert report.boundaries_taken == 10
    assert sum(len(kill.where) for kill in report.kills) >= 8, "kills that met nobody prove nothing"
    assert sum(len(kill.where) for kill in report.kills if kill.kind == "random") == 2
    assert any(kill.ran_again for kill in report.kills), "items in flight ran again"
    assert {item.index for item in report.ran_twice} == {index for kill in report.kills for index in kill.ran_again}
    assert all(ITEMS[item.index] in item.item and item.runs >= 2 for item in report.ran_twice)
    assert 0 <= report.lost_s_median <= report.lost_s_most
    assert "NOT ALL were taken" in str(report)
    assert report.verdict in str(report)


def test_a_hidden_clock_is_found() -> None:
    """A result with the time in it differs between two undisturbed runs: the first difference is shown."""
    report = torture(with_a_clock, ITEMS, boundaries=2, random=0)
    assert not report.ok
    assert not report.deterministic
    assert report.difference is not None
    first, second = (json.loads(text or "") for text in (report.difference.first, report.difference.second))
    assert report.difference.index == first["index"] == second["index"] == 0
    assert first["at"] != second["at"]
    assert len(report.problems) == 1, "what follows from it is not found a second time"


def test_a_side_effect_that_is_not_idempotent_is_found(tmp_path: Path) -> None:
    """What was charged twice is found, and the items that ran again are listed."""
    charged = tmp_path / "charged.txt"

    async def charge(item: str) -> dict[str, str]:
        descriptor = os.open(charged, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK)
        os.write(descriptor, item.encode() + b"\n")
        os.close(descriptor)
        return {"charged": item}

    def effects() -> list[str]:
        lines = sorted(charged.read_text().splitlines())
        charged.unlink()
        return lines

    report = torture(charge, ITEMS, effects=effects, boundaries=10, random=0)
    assert report.deterministic
    assert not report.ok
    assert all("the side effects are not those of an undisturbed run" in problem for problem in report.problems)
    assert "too many ('item " in report.problems[0]
    assert "run again were item" in report.problems[0]
    assert report.ran_twice
    assert len(report.problems) <= sum(bool(kill.ran_again) for kill in report.kills)


def tortured_table(mistake: str, boundaries: int) -> Report:
    """What is found of a job over a ledger with that mistake."""
    return torture(
        clean,
        ITEMS[:8],
        ledger=lambda folder: TableLedger(folder / "table.db", mistake=mistake),
        results=lambda folder: records_in(folder / "table.db"),
        boundaries=boundaries,
        random=0,
        concurrency=1,  # so that each commit has records
    )


def test_a_good_ledger_of_somebody_else_passes() -> None:
    """It is killed before lines of its own, and nothing is found."""
    report = tortured_table("", 12)
    assert report.ok, report
    assert any("table_ledger.py:" in where for kill in report.kills for where in kill.where)


@pytest.mark.parametrize(
    ("mistake", "boundaries", "finding"),
    [
        ("no transaction", 30, "the output is not that of an undisturbed run: twice item"),
        ("too early", 10, "ran again although they had been committed"),
    ],
    ids=["no transaction", "too early"],
)
def test_a_careless_ledger_is_found(mistake: str, boundaries: int, finding: str) -> None:
    """One whose author forgot the transaction is killed within it; one that promises too early is held to its word."""
    report = tortured_table(mistake, boundaries)
    assert report.deterministic
    assert any(finding in problem for problem in report.problems), report


def test_the_command_takes_the_options_of_run(job: Folder) -> None:
    """It passes a clean job of the command line, whose worker prints; nothing of the user's is touched or left."""
    job.write("out.json", "mine")
    job.write("out.json.checkpoint", "mine, too")
    before = job.snapshot(times=True)
    ended = job.run(*words("clean", "--json", "--concurrency", "3", "--checkpoint", "mine.checkpoint"))
    report = json.loads(ended.out)
    assert ended.code == 0, ended.out + ended.err
    assert (report["ok"], report["deterministic"], report["items"]) == (True, True, 12)
    assert report["boundaries"] > report["boundaries_taken"] == 6
    assert job.snapshot(times=True) == before


@pytest.mark.parametrize("worker", ["hashed", pytest.param("imported_at", marks=pytest.mark.slow)])
def test_what_differs_between_interpreters_is_found(job: Folder, worker: str) -> None:
    """The time of an import and the order of a set are the same in every fork; another interpreter has others."""
    ended = job.run(*words(worker, "--json", boundaries=1, random=0))
    report = json.loads(ended.out)
    assert (ended.code, report["deterministic"], report["difference"]["index"]) == (1, False, 0)


def test_the_command_compares_side_effects(job: Folder) -> None:
    """With a script that prints them and clears them away."""
    script = "sort charged.txt; rm charged.txt"
    ended = job.run(*words("charge", "--items", "5", "--effects", script, boundaries=5, random=0))
    assert ended.code == 1, ended.out + ended.err
    assert "the side effects are not those of an undisturbed run" in ended.out
    assert "5, the first of the input" in ended.out
    assert ended.out.splitlines()[-1].startswith("verdict        NOT all right")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (words("fails"), 1, "fails although nobody kills it, which comes first: item"),
        (words("ends_the_process"), 1, "the process ended by itself with 0"),
        (words("missing"), 2, "has no 'missing'"),
        (words("clean", "--concurency", "3"), 2, "No such option '--concurency'"),
    ],
)
def test_mistakes_are_one_line(job: Folder, arguments: list[str], code: int, said: str) -> None:
    """A job that fails by itself, and whatever can not be used, is said in one line; nothing is killed."""
    ended = job.run(*arguments)
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    assert sum(line.startswith("Error: ") for line in ended.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--input", "-"], "--input - can be read only once"),
        (["--fresh"], "--fresh leaves nothing to be resumed"),
        (["--dry-run"], "--dry-run leaves nothing to be resumed"),
        (["--output", "redis://here"], "give --output FILE or sqlite:///FILE"),
        (["--output", "postgresql://u:s3cr3t@h/d"], r"^torture with --output postgresql://u@h/d: .* PostgresLedger"),
        (["--output", "PostgreSQL://u:s3cr3t@[::1/d"], r"^torture with --output postgresql://…: .* PostgresLedger"),
    ],
)
def test_a_run_that_can_not_be_tortured_is_refused(more: list[str], said: str) -> None:
    """What can not be run again and again, or not in a folder of its own, is refused before anything begins."""
    with pytest.raises(UsageError, match=said):
        torture_command(run, more, items=1, boundaries=1, random=0, seed=0, effects=None)


def test_a_stopped_torture_leaves_nothing(job: Folder, tmp_path_factory: pytest.TempPathFactory) -> None:
    """SIGTERM ends it, its process and its folder."""
    temporary = tmp_path_factory.mktemp("temporary")
    process = job.start(*words("clean", boundaries=100), env={"TMPDIR": str(temporary)})
    wait_until(lambda: list(temporary.glob("*/job-4/*.diary")), process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert list(temporary.iterdir()) == []


def test_a_program_is_told_of_its_mistakes() -> None:
    """In Python as well: a failing worker, a ledger without its reader, an unknown option."""

    async def fails(item: str) -> None:
        raise ValueError("no such thing")

    with pytest.raises(IncompleteRun, match=r"fails although nobody kills it.*no such thing"):
        torture(fails, ITEMS)
    with pytest.raises(UsageError, match="belong together"):
        torture(clean, ITEMS, ledger=lambda folder: TableLedger(folder / "table.db"))
    with pytest.raises(UsageError, match="concurency"):
        torture(clean, ITEMS, concurency=3)
    with pytest.raises(UsageError, match="the number of items is 0"):
        torture(clean, ITEMS, first=0)


async def test_it_is_not_called_within_a_loop() -> None:
    """A fork within a loop would not be the process that it is to be."""
    with pytest.raises(UsageError, match="within an event loop"):
        torture(clean, ITEMS)


def test_kinds_of_steps_come_first_then_all_of_them_evenly() -> None:
    """As many kills as there may be, each step once; a rare kind of step is not missed for a frequent one."""
    steps = [*["often"] * 50, "rare", *["often"] * 49]
    assert chosen(steps, 2) == [50, 51] or chosen(steps, 2) == [49, 50]
    assert len(set(chosen(steps, 10))) == 10
    assert 50 in chosen(steps, 10)
    assert max(after - before for before, after in zip(chosen(steps, 20), chosen(steps, 20)[1:], strict=False)) <= 7
    assert chosen(steps, 1000) == list(range(100))
    assert chosen([], 5) == chosen(steps, 0) == []


def record(index: int, text: str = "x") -> bytes:
    return json.dumps({"index": index, "text": text}).encode() + b"\n"


def test_the_first_difference() -> None:
    """The index of the first record that differs, and both records; one that is missing differs as well."""
    whole = [b"[\n", record(0), record(1)]
    assert first_difference(whole, list(whole)) is None
    assert first_difference(whole, [*whole[:2], record(1, "y")]) == Difference(
        1, '{"index": 1, "text": "x"}', '{"index": 1, "text": "y"}'
    )
    assert first_difference(whole[:2], whole) == Difference(1, None, '{"index": 1, "text": "x"}')


def test_gaps_in_an_output() -> None:
    """Records that are missing, doubled or beyond the end are named."""
    whole: Callable[[int], list[bytes]] = lambda count: [record(index) for index in range(count)]  # noqa: E731
    assert gaps([b"[\n", *whole(5), b"]\n"], 5) is None
    assert gaps(whole(4), 6) == "no record of items 4, 5"
    assert gaps([*whole(4), record(1)], 4) == "twice item 1"


def test_side_effects_are_compared_as_lines() -> None:
    """What is too many and too few is named, in text and in lists; of anything else both are shown."""
    assert effects_differ("a\nb\n", "a\na\nb\n") == "1 too many (a)"
    assert effects_differ(["a", "b"], ["b"]) == "1 too few ('a')"
    assert effects_differ(["a", "b"], ["b", "a"]) == "the same in another order"
    assert effects_differ(3, 4) == "3 / 4"


def test_a_database_is_tortured_as_a_file_is(job: Folder) -> None:
    """Killed before lines of the ledger's own, it passes; the user's database is not made."""
    ended = job.run(*words("clean", "--output", "sqlite:///mine.db?run=pages", "--json", boundaries=8, random=2))
    report = json.loads(ended.out)
    assert ended.code == 0, ended.out + ended.err
    assert any("sqlite.py:" in where for kill in report["kills"] for where in kill["where"])
    assert not (job / "mine.db").exists()


@pytest.mark.slow
@pytest.mark.parametrize("output", ["out.jsonl", "out.json"])
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--keep-checkpoint"],
        ["--concurrency", "1"],
        ["--worker", "jobs:marks", "--effects", "ls marks; rm -r marks"],
        ["--exec", "echo {}"],
    ],
    ids=["plain", "kept", "one at a time", "side effects", "exec"],
)
def test_every_boundary_of_a_clean_job(job: Folder, output: str, more: list[str]) -> None:
    """Each boundary that there is, and a hundred random moments: nothing is found."""
    ended = job.run(*words("clean", "--output", output, "--json", *more, boundaries=1000, random=100))
    report = json.loads(ended.out)
    assert ended.code == 0, report["problems"]
    assert report["boundaries"] == report["boundaries_taken"] >= 40


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--keep-checkpoint"], ["--concurrency", "1"]])
def test_many_boundaries_of_a_database(job: Folder, more: list[str]) -> None:
    """Two hundred lines of the ledger over SQLite, and fifty random moments: nothing is found."""
    ended = job.run(*words("clean", "--output", "sqlite:///out.db", "--json", *more, boundaries=200, random=50))
    report = json.loads(ended.out)
    assert ended.code == 0, report["problems"]
    assert report["boundaries_taken"] == 200
