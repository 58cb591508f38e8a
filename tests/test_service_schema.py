"""What the service says of itself, asked of it by schemathesis: every answer is one that its document promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .support.commands import Folder
from .support.service_process import Served

TOKEN = "a-token-of-more-than-sixteen"
MODULE = """
async def quick(item):
    return item


async def fails(item):
    raise ValueError(f"{item} can not be done")
"""
WORKERS = ("--worker=quick=work:quick", "--worker=fails=work:fails")
EVENTS = "/jobs/{id}/events"  # never ends; test_service.py and test_service_attacks.py ask it


def ask_all(folder: Folder, served: Served, *words: str) -> None:
    """Let schemathesis ask: it must find nothing."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}openapi.json", "--no-color"]
    fixed = ["--exclude-path", EVENTS, "--checks", "all", "--seed", "8", "--suppress-health-check", "all"]
    phases = ["--phases", "examples,coverage,fuzzing,stateful", "--generation-database", "none"]
    ran = subprocess.run(
        [*command, *fixed, *phases, *words], cwd=folder.path, capture_output=True, text=True, timeout=1800
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def check(folder: Folder, token: str | None, examples: int) -> None:
    """Ask a service with that token so many times for each operation; then it is well."""
    folder.write("work.py", MODULE)
    served = Served(folder, *WORKERS, env={"ASYNC_RECOVERY_TOKEN": token} if token else None)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    words = [f"--header=Authorization: Bearer {token}"] if token else []
    ask_all(folder, served, f"--max-examples={examples}", *words)
    assert served.ask("GET", "/readyz", headers=headers).status == 200
    assert served.stop().code == 0
    assert "Traceback" not in served.log
    assert TOKEN not in served.log


@pytest.mark.parametrize("token", [None, TOKEN], ids=["open", "token"])
def test_every_answer_is_one_that_the_document_promises(folder: Folder, token: str | None) -> None:
    """Sound requests are taken, others refused, none fails, also one after the other along the links."""
    check(folder, token, 20)


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, TOKEN], ids=["open", "token"])
def test_every_answer_is_one_that_the_document_promises_at_length(folder: Folder, token: str | None) -> None:
    """The same with many more requests."""
    check(folder, token, 150)
