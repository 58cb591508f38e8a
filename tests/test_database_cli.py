"""The command line with a database as the output: `run`, `status`, `verify`, `export`, and what is refused."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from async_recovery.ledgers import ledger_of, place_of
from tests.support.commands import Folder, check_one_line, kill, wait_until
from tests.support.database_kills import read_database
from tests.support.jobs import LOG, count_of_runs

OUTPUT = "sqlite:///out.db"


def job(worker: str = "jobs:quick", *more: str, output: str = OUTPUT) -> list[str]:
    """The words of a run of that worker."""
    return ["run", "--input", "items.txt", "--output", output, "--worker", worker, *more]


def test_from_a_file_to_a_database_and_back(folder: Folder) -> None:
    """One changed argument: the same summary, and an export has the same bytes as the file."""
    in_file, in_database = folder.run(*job(output="out.json")), folder.run(*job())
    assert in_database.code == 0, in_database.err
    assert in_database.summary | {"output": 0, "elapsed_s": 0} == in_file.summary | {"output": 0, "elapsed_s": 0}
    assert in_database.summary["output"] == OUTPUT
    exported = folder.run("export", OUTPUT, "exported.json")
    assert (exported.code, exported.out) == (0, ""), exported.err
    assert (folder / "exported.json").read_bytes() == (folder / "out.json").read_bytes()
    assert sorted(path.name for path in folder.path.iterdir()) == [
        *("exported.json", "items.txt", "jobs.py", "out.db", "out.json", LOG),
    ]


def test_a_running_job_is_seen_and_a_killed_one_resumes(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`status` and `verify` tell where it stands while it runs and after a kill; a second run is refused meanwhile."""
    monkeypatch.chdir(folder.path)
    process = folder.start(*job("jobs:held_at_3", "--checkpoint-interval", "0.01"))
    wait_until(lambda: len(read_database(OUTPUT)[0].ahead) == 6, process)
    running = json.loads(folder.run("status", OUTPUT, "--json").out)
    assert (running["state"], running["mark"], running["ahead"]) == ("running", 3, 6)
    assert running["running"]["pid"] == process.pid
    check_one_line(
        folder.run(*job("jobs:held_at_3", output=f"{OUTPUT}?run=other")), 75, "out.db.lock", str(process.pid)
    )
    kill(process)
    verified = folder.run("verify", OUTPUT)
    assert verified.code == 0, verified.out
    assert "resumes at index 3, passing over 6 items finished ahead of it" in verified.out
    looked_ahead = folder.run(*job("jobs:held_at_3", "--dry-run"))
    assert looked_ahead.out == verified.out
    check_one_line(folder.run("export", OUTPUT, "out.json"), 1, "its mark is 3")
    folder.write("go", "")
    runs = count_of_runs(folder / LOG)
    assert folder.run(*job("jobs:held_at_3")).code == 0
    assert count_of_runs(folder / LOG) == runs + 1
    assert json.loads(folder.run("status", OUTPUT, "--json").out)["state"] == "complete"


@pytest.mark.parametrize("locked", ["file", "folder"])
def test_what_may_not_be_written_is_one_line(folder: Folder, bound: tuple[str, ...], locked: str) -> None:
    """A database or a folder that may only be read: one line, nothing has changed, and it can be read all the same."""
    (folder / "there").mkdir()
    output = "sqlite:///there/out.db"
    assert folder.run(*job(output=output)).code == 0
    path = folder / "there" / ("out.db" if locked == "file" else "")
    path.chmod(0o444 if locked == "file" else 0o555)
    before = folder.snapshot()
    ended = folder.run(*job(output=output), command=bound)
    check_one_line(ended, 2, "there")
    foretold = folder.run(*job("jobs:quick", "--dry-run", output=output), command=bound)
    assert (foretold.code, foretold.out) == (2, "")
    assert foretold.err.split(":")[:2] == ended.err.split(":")[:2]
    assert folder.run("status", output, command=bound).code == 0
    assert folder.snapshot() == before


def test_what_a_killed_run_left_in_a_folder_that_may_only_be_read_is_told(
    folder: Folder, bound: tuple[str, ...]
) -> None:
    """SQLite reads a log only with a file that it makes beside it: one line says so, and what helps."""
    process = folder.start(*job("jobs:held_at_3", "--checkpoint-interval", "0.01", output="sqlite:///there.db"))
    wait_until(lambda: len(read_database(f"sqlite:///{folder / 'there.db'}")[0].ahead) == 6, process)
    kill(process)
    (folder / "there").mkdir()
    for name in ("there.db", "there.db-wal"):
        shutil.copy(folder / name, folder / "there" / name)
    (folder / "there").chmod(0o555)
    for command in ("status", "verify"):
        ended = folder.run(command, "sqlite:///there/there.db", command=bound)
        check_one_line(ended, 2, "SQLite has to make", "there.db-shm beside it", "copy the first two")


def test_what_does_not_fit_a_database_is_one_line(folder: Folder) -> None:
    """Standard input and a checkpoint lie beside a file; a run that is not there, and an export of a file, are told."""
    before = folder.snapshot()
    check_one_line(folder.run("run", "--input", "-", "--output", OUTPUT), 2, "standard input is kept beside a file")
    check_one_line(folder.run(*job("jobs:quick", "--checkpoint", "c")), 2, "checkpoint with the output")
    check_one_line(folder.run("status", OUTPUT), 2, f"there is no database {folder / 'out.db'}")
    check_one_line(folder.run("export", OUTPUT, "out.json"), 2, f"there is no database {folder / 'out.db'}")
    check_one_line(folder.run("verify", OUTPUT, "--checkpoint", "c"), 2, "leave it out")
    check_one_line(folder.run("export", "items.txt", "out.json"), 2, "is no address of a database")
    check_one_line(folder.run(*job(output=f"{OUTPUT}?run=%ff")), 2, "give the run a name of printable characters")
    check_one_line(folder.run("export", OUTPUT, "-"), 2, "export to -: it writes a file")
    assert folder.snapshot() == before


def test_a_complete_run_is_foretold_to_start_anew_whatever_has_changed(folder: Folder) -> None:
    """A grown input is no problem, a changed record is one to `verify` alone: the same line looks at neither."""
    assert folder.run(*job()).code == 0
    items = len((folder / "items.txt").read_text().splitlines())
    folder.write_items(items + 5)
    for line in (job(jobs := "jobs:quick", "--dry-run"), ["verify", OUTPUT]):
        looked = folder.run(*line)
        assert looked.code == 0, looked.out
        assert looked.out.splitlines()[-1] == "the same line  starts anew"
    with closing(sqlite3.connect(folder / "out.db", isolation_level=None)) as connection:
        connection.execute("UPDATE async_recovery_record SET record = replace(record, '3', '4')")
    assert folder.run(*job(jobs, "--dry-run")).code == 0
    verified = folder.run("verify", OUTPUT)
    assert verified.code == 4
    assert "output: PROBLEM" in verified.out
    assert verified.out.splitlines()[-1].split(None, 3)[-1] == "starts anew"
    again = folder.run(*job())
    assert (again.code, again.summary["executed"]) == (0, items + 5)


@pytest.mark.parametrize("scheme", ["postgresql+asyncpg", "mysql", "MySQL"])
def test_an_address_of_another_database_is_told_without_its_password(folder: Folder, scheme: str) -> None:
    """By every command that takes an address; and it is never the name of a file."""
    address = f"{scheme}://me:s3cr3t@localhost/db"
    assert folder.run(*job()).code == 0
    before = folder.snapshot()
    for line in (
        *(job(output=address), job("jobs:quick", "--dry-run", output=address)),
        *(job("jobs:quick", "--checkpoint", "x", output=address), ["torture", *job(output=address)[1:]]),
        *(["status", address], ["verify", address], ["retry-failed", address, "--worker", "jobs:quick"]),
        *(["export", address, "x"], ["export", OUTPUT, address]),
    ):
        ended = folder.run(*line)
        check_one_line(ended, 2, f"{scheme.lower()}://…")
        assert "s3cr3t" not in ended.out + ended.err
    assert folder.snapshot() == before


def test_a_run_is_named_by_where_its_database_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words in two folders, or of two machines, are two places; on a server one, without passwords."""
    places = set[str | None]()
    for name in ("x", "y"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        places |= {
            place_of(ledger_of(output)) for output in ("sqlite:///res.db?run=a", "sqlite:///res.db?run=b", "o.jsonl")
        }
        places.add(place_of(ledger_of(f"sqlite:///{tmp_path}/x/res.db?run=a")))
    assert len(places) == 6
    assert all(place and place.startswith(f"{socket.gethostname()}:{tmp_path}") for place in places)
    server = place_of(ledger_of("postgresql://me:secret@db.example/results?run=a"))
    assert server is not None
    assert server.startswith("postgresql://me@db.example/results")
    assert "secret" not in server
    here = place_of(ledger_of("postgresql:///results"))
    assert here is not None
    assert here.startswith(socket.gethostname())
