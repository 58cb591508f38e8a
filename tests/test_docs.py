"""Every block of the pages in `docs/` is executed, one page in one folder, and prints what the page says."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest

from async_recovery import RunSummary
from async_recovery.engine import Run, to_its_end
from async_recovery.errors import InputChanged, ItemFailed, UsageError
from async_recovery.files import Files
from async_recovery.options import Options
from async_recovery.standard_input import SpoolingLedger, StandardInput

from .support.commands import Folder
from .support.file_jobs import names_in
from .support.virtual_loop import run_virtual
from .test_readme import ROOT, printed_by, run_console

PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in ("failures.md", "proof.md")]
FILE = re.compile(r"# (\S+\.py)\n")
NOTEBOOK = """
import ast, asyncio
asyncio.run(eval(compile({cell!r}, "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)))
"""
URLS = 200
BUSY, BUSY_TIMES = "/7", 8  # more than the attempts of any page: the server asks for a pause, until a date


class Block(NamedTuple):
    """A block of code, and what stands below it as its output, if anything does."""

    language: str
    text: str
    printed: str | None


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, each with the block of text that follows it at once."""
    pattern = re.compile(r"^```(\w+)\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
    return [Block(*found.groups()) for found in pattern.finditer(page.read_text())]


class _Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    server: _Server

    def do_GET(self) -> None:
        body = f"this is {self.path}".encode()
        busy = self.path == BUSY and next(self.server.asked) < BUSY_TIMES
        self.send_response(503 if busy else 200)
        if busy:
            self.send_header("Retry-After", formatdate(0, usegmt=True))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 2 * URLS
    daemon_threads = True
    asked: Iterator[int]


@contextmanager
def served_urls() -> Iterator[str]:
    """The lines of a file of URLs that are there while this lasts."""
    with _Server(("127.0.0.1", 0), _Page) as server:
        server.asked = count()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield "".join(f"http://127.0.0.1:{server.server_port}/{number}\n" for number in range(URLS))
        finally:
            server.shutdown()
            thread.join()


def run_block(block: Block, folder: Path) -> None:
    """Do what a reader would do with it."""
    text, printed = block.text, block.printed or ""
    if block.language == "console":
        run_console(text, folder)
    elif block.language == "ini":
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str  # type: ignore[assignment, method-assign]
        unit.read_string(text)
        run_command(shlex.split(unit["Service"]["ExecStart"]), folder)
    elif block.language == "json":
        (container,) = json.loads(text)["spec"]["template"]["spec"]["containers"]
        run_command(container["command"], folder)
    elif found := FILE.match(text):
        (folder / found[1]).write_text(text)
    else:
        assert block.language == "python"
        is_cell = re.search(r"^(\w+ = )?await ", text, re.MULTILINE) is not None
        assert printed_by(NOTEBOOK.format(cell=text) if is_cell else text, folder) == printed


def run_command(words: list[str], folder: Path) -> None:
    """A supervisor starts it, and once more after it has ended: then it does nothing."""
    assert Path(words[0]).name == "async-recovery"
    with Folder(folder) as here:
        executed = [json.loads(here.run(*words[1:]).out)["executed"] for _ in range(2)]
    assert executed == [20, 0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, after those before it; a block that begins with the name of a file is that file."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with served_urls() as urls:
        (tmp_path / "urls.txt").write_text(urls)
        for block in blocks_of(page):
            run_block(block, tmp_path)


def test_the_application_of_the_recipe_does_its_job_once(tmp_path: Path) -> None:
    """Started twice, it runs the job, says that it is done, and does nothing the second time."""
    recipe = next(block.text for block in blocks_of(ROOT / "docs" / "recipes.md") if "web.Application()" in block.text)
    served = f"""{recipe}
async def main() -> None:
    runner = web.AppRunner(app)
    await runner.setup()
    print((await app["job"]).executed)
    await runner.cleanup()

import warnings
warnings.simplefilter("ignore", web.NotAppKeyWarning)
asyncio.run(main())
"""
    assert [printed_by(served, tmp_path) for _ in range(2)] == ["100\n", "0\n"]


def test_supervisors_start_nothing_again_that_no_start_mends() -> None:
    """A mistake, a failed item, and a kept job that is complete with failures, which each start says again."""
    mended_by_no_start = {
        *(ItemFailed.exit_code, UsageError.exit_code, InputChanged.exit_code),
        3,  # complete with recorded failures
    }
    blocks = blocks_of(ROOT / "docs" / "recipes.md")
    unit = configparser.ConfigParser(interpolation=None)
    unit.read_string(next(block.text for block in blocks if block.language == "ini"))
    service = unit["Service"]
    codes = f"{service['RestartPreventExitStatus']} {service['SuccessExitStatus']}"
    assert set(map(int, codes.split())) == mended_by_no_start
    job = next(json.loads(block.text) for block in blocks if block.language == "json")
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], set(rule["onExitCodes"]["values"])) == ("FailJob", mended_by_no_start)


def rows_of(page: str, section: str) -> set[str]:
    """What stands as code in the first column of a table of a page."""
    text = (ROOT / "docs" / page).read_text().partition(section)[2].partition("\n## ")[0]
    return {name for cell in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE) for name in re.findall("`(.*?)`", cell)}


def test_the_page_of_files_defines_each_field_of_the_summary() -> None:
    """By the very names that it has."""
    assert rows_of("formats.md", "## The summary\n") == set(RunSummary.__struct_fields__)


class Named(Files):
    """Knows all names that it has given."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        self.names |= {Path(path).name} if flags & os.O_CREAT else set()
        return super().open(path, flags, mode)

    def rename(self, source: str, target: str) -> None:
        self.names.add(Path(target).name)
        super().rename(source, target)


@pytest.mark.parametrize(
    ("output", "checkpoint"), [("<output>", None), ("<output>", "<checkpoint>"), (None, "<checkpoint>")]
)
def test_the_page_of_files_has_each_file_of_a_job(tmp_path: Path, output: str | None, checkpoint: str | None) -> None:
    """Of one whose damaged checkpoint is moved aside, with its input from standard input; and of no other."""
    folder, files = tmp_path / "folder", Named()
    folder.mkdir()
    (folder / (checkpoint or f"{output}.checkpoint")).write_bytes(b"damaged\n")
    if output is not None:
        (folder / f"{output}.partial").write_bytes(b"")

    def work(item: str) -> None:
        files.names.update(names_in(folder))

    places = [None if name is None else str(folder / name) for name in (output, checkpoint)]
    ledger = SpoolingLedger(*places, keep_checkpoint=True, files=files)
    with (tmp_path / "given").open("w+") as given:
        given.write("1\n")
        given.seek(0)
        run_virtual(to_its_end(Run(work, StandardInput(ledger.spool, None, given.fileno()), ledger, Options())))
    documented = rows_of("formats.md", "beside its output:\n") - {"<output>.retry.*"}
    assert files.names <= documented
    if (output, checkpoint) != ("<output>", "<checkpoint>"):
        own = output or checkpoint
        assert files.names == {name for name in documented if str(own) in name}
