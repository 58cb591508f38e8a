"""Every test runs under blockbuster: a call that blocks the event loop fails the test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

from .support.commands import COMMAND, Folder
from .support.jobs import MODULE

os.environ["ASYNC_RECOVERY_LOOP"] = "asyncio"  # test_uvloop.py has the other one


@pytest.fixture(autouse=True)
def _no_blocking_on_the_loop() -> Iterator[None]:
    with blockbuster_ctx("async_recovery", excluded_modules=["async_recovery.testing"]):  # those are tests, too
        yield


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
