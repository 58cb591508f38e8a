"""The built-in worker `http`, against a service on loopback."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from multidict import CIMultiDict

from async_recovery import SlowDown, UsageError, run_resumable
from async_recovery.http_worker import HttpFailed, HttpWorker, retry_after, safe_name, write_whole
from async_recovery.workers import load, words_for
from tests.support.commands import COMMAND


class Service:
    """What the worker meets: by path, and how often it was asked.

    :ivar peers: the connections over which it was asked.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.peers: set[Any] = set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        assert request.transport is not None
        self.peers.add(request.transport.get_extra_info("peername"))
        if request.path == "/busy" and self.asked.count("/busy") == 1:
            return web.Response(status=429, headers={"Retry-After": "0"})
        if request.path == "/latin":
            return web.Response(body=b"caf\xe9", headers={"Content-Type": "text/plain; charset=latin-1"})
        if request.path.startswith("/charset/"):
            return web.Response(
                body=b"caf\xc3\xa9", headers={"Content-Type": f"text/plain; charset={request.path[9:]}"}
            )
        if request.path == "/odd":
            return web.Response(body=b"a\xffb", headers={"Content-Type": "text/plain", "ETag": "7"})
        if request.path == "/twice":
            several = [("Vary", "a"), ("Vary", "b"), ("Set-Cookie", "c=1, 2"), ("Set-Cookie", "d=3")]
            return web.Response(text="", headers=CIMultiDict(several))
        if request.path == "/moved":
            raise web.HTTPFound("/latin")
        if request.path.startswith("/status/"):
            return web.Response(status=int(request.path[8:]))
        return web.Response(text=f"page {request.path_qs}")


@pytest.fixture
async def service() -> AsyncIterator[tuple[Service, str]]:
    """The service, and the URL before its paths."""
    service, app = Service(), web.Application()
    app.router.add_get("/{path:.*}", service.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield service, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def records_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("charset", ["idna", "undefined", "punycode", "no-such", "base64"])
async def test_a_charset_that_is_none_for_texts_is_read_as_utf_8(service: tuple[Service, str], charset: str) -> None:
    """What a server claims must not fail the item: Python has codecs of these names, or none."""
    assert (await HttpWorker()(f"{service[1]}/charset/{charset}"))["body"] == "café"


async def test_answers_are_records(service: tuple[Service, str], tmp_path: Path) -> None:
    """Status, chosen headers and text of each answer, in order, over one connection for the whole run."""
    found, url = service
    items: list[Any] = [f"{url}/latin", {"url": f"{url}/odd", "other": 1}, f"{url}/moved"]
    worker = HttpWorker(keep_headers=["ETag", "Content-Type"])
    await run_resumable(worker, items, output=tmp_path / "out.jsonl", concurrency=1)
    latin = {"content-type": "text/plain; charset=latin-1"}
    assert records_of(tmp_path / "out.jsonl") == [
        {"index": 0, "url": f"{url}/latin", "status": 200, "headers": latin, "body": "café"},
        {
            "index": 1,
            "url": f"{url}/odd",
            "status": 200,
            "headers": {"content-type": "text/plain", "etag": "7"},
            "body": "a\\xffb",
        },
        {"index": 2, "url": f"{url}/moved", "status": 200, "headers": latin, "body": "café"},
    ]
    assert len(found.peers) == 1


async def test_bodies_are_files_in_the_folder(service: tuple[Service, str], tmp_path: Path) -> None:
    """With a folder, each body is a file in it, whatever its URL, and the same URL twice is one file."""
    _, url = service
    paths = ["/a/b.html", "/a/b.html?x=1", "/..%2f..%2fup", "/é 😀;rm", "/a/b.html", "/" + "x" * 1000, "/"]
    worker = HttpWorker(save_dir=tmp_path / "new" / "pages")
    await run_resumable(worker, [url + path for path in paths], output=tmp_path / "out.jsonl")
    records = records_of(tmp_path / "out.jsonl")
    files = {path.name: path.read_bytes() for path in (tmp_path / "new" / "pages").iterdir()}
    assert files.keys() == {record["file"] for record in records}
    assert len(files) == 6
    assert all(len(files[record["file"]]) == record["bytes"] for record in records)
    assert files[records[1]["file"]] == b"page /a/b.html?x=1"
    assert {path.name for path in tmp_path.iterdir()} == {"new", "out.jsonl"}


def test_many_write_one_file_at_once(tmp_path: Path) -> None:
    """As runs that share a folder do: none of them fails, the file is one of theirs, whole, and nothing else is left.

    (A lock of this kind is one between descriptors: threads meet it as processes do.)
    """
    bodies = [bytes([number]) * (1 + number) * 100 for number in range(200)]
    (tmp_path / ".page.part").write_bytes(b"left by a kill" * 10_000)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda body: write_whole(str(tmp_path), "page", body), bodies))
    assert (tmp_path / "page").read_bytes() in bodies
    assert {path.name for path in tmp_path.iterdir()} == {"page"}


@pytest.mark.parametrize("status", [199 + 5, 404, 500, 503])
async def test_any_status_but_success_is_a_failure(service: tuple[Service, str], status: int) -> None:
    """A 2xx is a result, any other status the item's failure, in words that are the same in each run."""
    _, url = service
    if status < 300:
        assert (await HttpWorker()(f"{url}/status/{status}"))["status"] == status
    else:
        with pytest.raises(HttpFailed, match=f"^the server answered with status {status}$"):
            await HttpWorker()(f"{url}/status/{status}")


async def test_retry_after_makes_the_run_pause(service: tuple[Service, str], tmp_path: Path) -> None:
    """A 429 that asks for a pause is no failure: the item is asked for again, without any retry allowed."""
    found, url = service
    summary = await run_resumable(HttpWorker(), [f"{url}/busy"], output=tmp_path / "out.jsonl")
    assert (summary.failed, found.asked) == (0, ["/busy", "/busy"])


async def test_an_answer_beyond_the_bound_is_a_failure(service: tuple[Service, str]) -> None:
    """The bound itself is allowed."""
    _, url = service
    assert (await HttpWorker(max_body_bytes=6)(f"{url}/"))["body"] == "page /"
    with pytest.raises(HttpFailed, match="more than 5 bytes"):
        await HttpWorker(max_body_bytes=5)(f"{url}/")


@pytest.mark.parametrize("item", [5, None, {"link": "x"}, {"url": 5}])
async def test_an_item_without_a_url_fails(item: Any) -> None:
    """Nothing is asked for that the item does not name."""
    with pytest.raises(ValueError, match="neither a URL nor an object"):
        await HttpWorker()(item)


@pytest.mark.parametrize(
    ("text", "pause_s"),
    [
        ("0", 0.0),
        ("1.5", 1.5),
        ("-3", 0.0),
        ("99999999", 3600.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 50.0),
        ("Thu, 01 Jan 1970 00:00:10 GMT", 0.0),
        ("soon", None),
        ("nan", None),
        ("inf", 3600.0),
        ("", None),
    ],
)
def test_the_pause_that_an_answer_asks_for(text: str, pause_s: float | None) -> None:
    """Seconds or a date, never less than none nor more than an hour."""
    assert retry_after({"Retry-After": text}, now=50.0) == pause_s
    if pause_s is not None:
        SlowDown(pause_s)


@pytest.mark.parametrize(
    "url", ["", "x", "http://h/..", "http://h/../../etc/passwd", "/etc/passwd", "http://h/.", "a\0b", "\udcff", "-rf"]
)
def test_names_of_files_are_safe(url: str) -> None:
    """A name has no separator, no dot or dash at its beginning and a bounded length, whatever the URL."""
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", safe_name(url))


def test_names_of_files_differ_where_urls_do() -> None:
    """Also where nothing but what is left out of a name differs, and case is not told apart."""
    urls = [
        "http://h/a",
        "https://h/a",
        "http://h/A",
        "http://h/a?b",
        "http://h/a#b",
        "http://h/a/",
        "http://h/é",
        "http://h/è",
    ]
    assert len({safe_name(url).lower() for url in urls}) == len(urls)
    assert safe_name("http://h/a/b.html") == safe_name("http://h/a/b.html")
    assert safe_name("http://h/a/b.html").startswith("h-a-b-")
    assert safe_name("http://h/a/b.html").endswith(".html")


@pytest.mark.parametrize(
    ("url", "begins", "ends"),
    [
        ("http://127.0.0.1:18765/ok", "127.0.0.1-18765-ok-", ""),
        ("https://example.org/", "example.org-", ""),
        ("https://example.org/a.b/c", "example.org-a.b-c-", ""),
        ("https://example.org/a/b.tar.gz?c=d.e", "example.org-a-b.tar-", ".gz"),
        ("https://example.org", "example.org-", ""),
    ],
)
def test_what_can_be_read_of_a_name(url: str, begins: str, ends: str) -> None:
    """Server, port and path, and the suffix of the path alone."""
    assert re.fullmatch(re.escape(begins) + "[0-9a-f]{24}" + re.escape(ends), safe_name(url))


async def test_a_header_that_comes_several_times(service: tuple[Service, str], tmp_path: Path) -> None:
    """All of its values are kept: joined, but for cookies, which are a list."""
    worker, output = HttpWorker(keep_headers=["Vary", "Set-Cookie", "ETag"]), tmp_path / "out.jsonl"
    await run_resumable(worker, [f"{service[1]}/twice"], output=output)
    assert json.loads(output.read_text())["headers"] == {"vary": "a, b", "set-cookie": ["c=1, 2", "d=3"]}


def test_its_name_is_its_words() -> None:
    """The name in the job's identity is what the command line would say; another folder is another job."""
    assert load("http").name == "http"  # type: ignore[attr-defined]
    worker = HttpWorker(keep_headers=["ETag"], save_dir="my pages")
    assert words_for(worker.name) == ("--worker", "http", "--keep-header", "etag", "--save-dir", "my pages")


def test_without_aiohttp_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is said in one line."""
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UsageError, match=r"pip install 'async-recovery\[http\]'"):
        load("http")


async def test_from_the_command_line(service: tuple[Service, str], tmp_path: Path) -> None:
    """`--worker http` with its options; the run ends with the code of its failures and no warning."""
    _, url = service
    (tmp_path / "urls.txt").write_text(f"{url}/a\n{url}/status/404\n")
    words = ("run", "--input", "urls.txt", "--output", "out.jsonl", "--worker", "http", "--save-dir", "pages")
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *words, "--on-error", "record", cwd=tmp_path, stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 3
    records = records_of(tmp_path / "out.jsonl")
    assert (tmp_path / "pages" / records[0]["file"]).read_text() == "page /a"
    assert records[1]["error"] == {"type": "HttpFailed", "message": "the server answered with status 404"}


@pytest.mark.parametrize("url", ["example.org/x", "//127.0.0.1/", "ftp://127.0.0.1/", "http:///x", "https://", ""])
async def test_a_url_that_is_not_whole_says_what_is_missing(tmp_path: Path, url: str) -> None:
    """Without scheme and server nothing is asked; the failure says what to put in front."""
    output = tmp_path / "out.jsonl"
    await run_resumable(HttpWorker(), [url], output=output, on_error="record")
    error = json.loads(output.read_text())["error"]
    assert error["type"] == "ValueError"
    assert "put https:// (or http://) and the name of the server in front" in error["message"]
