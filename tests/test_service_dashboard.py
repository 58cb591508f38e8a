"""`run --dashboard`: one run on the page of the service, to be watched and not to be steered."""

from __future__ import annotations

import http.client
import socket
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from .support.browser import Browser
from .support.commands import Folder, check_one_line, end_of, kill, wait_until

WORDS = ("run", "--input", "items.txt", "--output", "out.jsonl", "--worker", "jobs:held_at_3", "--batch-size", "1")


def start(folder: Folder, *words: str, port: int = 0) -> tuple[subprocess.Popen[str], int]:
    """A run that is shown, and the port at which it is."""
    with (folder / "log").open("w") as log:
        process = folder.start(*WORDS, "--dashboard", f"127.0.0.1:{port}", *words, stderr=log)
    said = lambda: (folder / "log").read_text().partition("watch it at http://127.0.0.1:")[2].partition("/")[0]  # noqa: E731
    return process, int(wait_until(said, process))


def ask(port: int, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def job(port: int) -> Any:
    return msgspec.json.decode(ask(port, "/jobs/run")[1])


def test_a_run_is_watched_and_its_result_is_the_same(folder: Folder) -> None:
    """Where it stands, what it has committed, its metrics; the output and the exit code are those of any run."""
    process, port = start(folder)
    wait_until(lambda: (now := job(port)["sample"] or {}) and (now["finished"], now["durable_mark"]) == (9, 3), process)
    found = job(port)
    assert (found["state"], found["sample"]["mark"], found["sample"]["held_by"]) == ("running", 3, 3)
    assert found["worker"] == "jobs:held_at_3"
    assert ask(port, "/jobs/run/output")[1].count(b"\n") == 3
    assert b"async_recovery_mark{" in ask(port, "/metrics")[1]
    assert ask(port, "/")[0] == 200
    folder.write("go", "")
    assert end_of(process).code == 0
    folder.run(*WORDS[:4], "plain.jsonl", *WORDS[5:])
    assert (folder / "out.jsonl").read_bytes() == (folder / "plain.jsonl").read_bytes()


def test_nothing_of_it_can_be_steered(folder: Folder) -> None:
    """Nor can anything be submitted."""
    process, port = start(folder)
    for method, path in [
        ("POST", "/jobs"),
        ("POST", "/uploads"),
        ("POST", "/jobs/run/cancel"),
        ("DELETE", "/jobs/run"),
    ]:
        assert ask(port, path, method)[0] in (404, 405)
    assert ask(port, "/jobs/run", "PATCH")[0] == 405
    assert b'"read_only":true' in ask(port, "/service")[1]
    folder.write("go", "")
    assert end_of(process).code == 0


def test_an_address_that_is_taken_is_told_before_anything_begins(folder: Folder) -> None:
    """One line, exit code 2, no file."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        before = folder.snapshot()
        ended = folder.run(*WORDS, "--dashboard", f"127.0.0.1:{taken.getsockname()[1]}")
        check_one_line(ended, 2, "--dashboard", "can not listen there")
    check_one_line(folder.run(*WORDS, "--dashboard", "0.0.0.0:0"), 2, "there is no token")
    assert set(folder.snapshot()) - set(before) <= {"ran.log"}  # which the worker's module makes


@pytest.mark.parametrize("output", ["sqlite:///results.db", "-"])
def test_records_that_go_to_no_file_are_not_offered(folder: Folder, output: str) -> None:
    """The page is told so; whoever asks all the same gets 404, and the log of the run no traceback."""
    words = ["run", "--input", "items.txt", "--output", output, "--worker", "jobs:held_at_3", "--dashboard", "0"]
    words += ["--checkpoint", "c"] if output == "-" else []
    with (folder / "log").open("w") as log, (folder / "records").open("w") as records:
        process = folder.start(*words, stdout=records, stderr=log)
    port = int(wait_until(lambda: (folder / "log").read_text().partition("127.0.0.1:")[2].partition("/")[0], process))
    assert b'"has_output":false' in ask(port, "/service")[1]
    assert ask(port, "/jobs/run/output")[0] == 404
    assert msgspec.json.decode(ask(port, "/jobs/run/failures")[1])["failures"] == []
    folder.write("go", "")
    assert end_of(process).code == 0
    assert "Traceback" not in (folder / "log").read_text()


async def test_the_page_of_a_killed_run_goes_on_when_the_line_is_run_again(folder: Folder, tmp_path: Path) -> None:
    """And it has no controls."""
    process, port = start(folder)
    wait_until(lambda: (job(port)["sample"] or {}).get("finished") == 9, process)
    async with Browser.open() as browser:
        page = await browser.page(f"http://127.0.0.1:{port}/#/jobs/run")
        await page.wait_for("document.querySelector('[data-testid=held-by]').textContent.includes('3')")
        assert await page.evaluate("document.querySelector('[data-testid=button-pause]').offsetParent === null")
        await page.screenshot(tmp_path / "dashboard.png")
        kill(process)
        await page.wait_for("document.querySelector('[data-testid=connection]').dataset.state === 'away'", timeout=30)
        process, _ = start(folder, port=port)
        await page.wait_for("document.querySelector('[data-testid=connection]').dataset.state === 'live'", timeout=30)
        await page.wait_for("document.querySelector('[data-testid=held-by]').textContent.includes('3')", timeout=30)
        assert page.errors == [error for error in page.errors if "Failed to load resource" in error]
    folder.write("go", "")
    assert end_of(process).code == 0
