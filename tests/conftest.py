"""Every test runs under blockbuster: a call that blocks the event loop fails the test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blockbuster import blockbuster_ctx

from .proof import report
from .support import postgres
from .support.commands import COMMAND, Folder
from .support.jobs import MODULE
from .support.postgres import Server

# The first are tests, too; the others are on a loop of their own, in the ledger's own thread.
LEFT_OUT = ["async_recovery.testing", "async_recovery.postgres", "async_recovery.postgres_session"]
LEFT_OUT += ["async_recovery.postgres_reader", "async_recovery.postgres_retry"]

os.environ["ASYNC_RECOVERY_LOOP"] = "asyncio"  # test_uvloop.py has the other one


@pytest.fixture(autouse=True)
def _no_blocking_on_the_loop() -> Iterator[None]:
    with blockbuster_ctx("async_recovery", excluded_modules=LEFT_OUT):
        yield


@pytest.fixture
def server() -> Server:
    """A server of PostgreSQL, the same for all tests."""
    return postgres.server()


def pytest_sessionfinish(session: pytest.Session) -> None:
    postgres.end()
    told = getattr(session.config, "workeroutput", None)
    if told is not None:  # a process of pytest-xdist: the one that started it has the last lines
        told["proof"], told["missing"] = report.as_builtins(), sorted(postgres.why_missing)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    told = getattr(node, "workeroutput", {})
    report.merge(told.get("proof", {}))
    postgres.why_missing.update(told.get("missing", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if report.table:
        terminalreporter.section("the proof")
        for line in report.lines():
            terminalreporter.write_line(line)
    for why in sorted(postgres.why_missing):
        terminalreporter.section("NOT RUN: PostgreSQL")
        terminalreporter.write_line(why)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """A folder with ten items and the module of workers."""
    path = tmp_path / "here"
    path.mkdir()
    with Folder(path) as folder:
        folder.write("jobs.py", MODULE)
        folder.write_items(10)
        yield folder


@pytest.fixture
def bound() -> tuple[str, ...]:
    """The command of a process that permissions bind, root or not."""
    if os.geteuid() != 0:
        return COMMAND
    if shutil.which("setpriv") is None:
        pytest.skip("permissions do not bind root, and there is no setpriv to give that up")
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search", *COMMAND)
