"""Attacks on the service, through a real process, one test each: what they must not get, and that it lives on.

After each: it answers, its log has no traceback, nothing outside of its folder was opened or made, and its
memory is bounded.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from .support.commands import COMMAND, Folder, wait_until
from .support.intruder import (
    HOST,
    LAST,
    Touched,
    break_off,
    connected,
    descriptors_of,
    memory_of,
    said,
    status_of,
    threads_of,
)
from .support.service_process import ENDED, Answer, Served

MODULE = '''
import asyncio
import os


async def quick(item):
    return item


async def fails(item):
    raise ValueError(f"{item} can not be done")


async def waits(item):
    """Until there is a file "go"."""
    while not os.path.exists("go"):
        await asyncio.sleep(0.01)
    return item


def plain(item):
    return item
'''
WORKERS = tuple(f"--worker={name}=work:{name}" for name in ("quick", "fails", "waits", "plain"))
TOKEN = "a-token-of-more-than-sixteen"
SECRET = "this lies outside of the folder"
MOST_UPLOAD_BYTES = 3_000_000
MOST_MEMORY_BYTES = 900 << 20
JSON = {"Content-Type": "application/json"}
MARKUP = "</script><img src=x onerror=alert(1)>"


class Besieged(Served):
    """A service under attack: see `make`.

    :ivar folder: where its process runs.
    """

    folder: Folder

    @property
    def uploads(self) -> Path:
        """Where uploads lie."""
        return self.folder / "data" / "uploads"

    def post(self, body: bytes, **headers: str) -> Answer:
        """A job as these bytes."""
        return self.ask("POST", "/jobs", body=body, headers={**JSON, **headers})

    def try_path(self, path: str) -> int:
        """The status of a job whose input that is."""
        return self.ask("POST", "/jobs", {"worker": "quick", "input": {"path": path}}).status

    def tell(self, job: str) -> Any:
        """The job at its end."""
        return self.when(job, *ENDED)


class Poor(Folder):
    """Its processes may have 256 descriptors."""

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        return super().start(*words, command=("prlimit", "--nofile=256:256", *COMMAND), **options)


def make(path: Path, *words: str, env: dict[str, str] | None = None, kind: type[Folder] = Folder) -> Iterator[Besieged]:
    """A service in `path`, with items in its folder and a secret beside it."""
    (path / "outside").mkdir(parents=True)
    (path / "outside" / "secret.txt").write_text(f"{SECRET}\n")
    (path / "data").mkdir(exist_ok=True)
    (path / "data" / "items.txt").write_text("a\nb\n")
    with kind(path) as folder:
        folder.write("work.py", MODULE)
        served = Besieged(folder, *WORKERS, *words, env=env)
        served.folder = folder
        yield served


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Besieged]:
    yield from make(tmp_path_factory.mktemp("shared"), f"--max-upload={MOST_UPLOAD_BYTES}")


@pytest.fixture
def served(shared: Besieged) -> Iterator[Besieged]:
    """The service that most tests share."""
    yield from bears(shared)


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Besieged]:
    """One of the test's own, with one place for jobs and six in all."""
    for besieged in make(tmp_path, "--max-jobs=1", "--max-queued=6"):
        yield from bears(besieged)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Besieged]:
    """One of the test's own, with one place for jobs."""
    for besieged in make(tmp_path, "--max-jobs=1"):
        yield from bears(besieged)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Besieged]:
    """One that wants a token."""
    for besieged in make(tmp_path_factory.mktemp("locked"), env={"ASYNC_RECOVERY_TOKEN": TOKEN}):
        yield besieged
        assert TOKEN not in besieged.log


def bears(served: Besieged) -> Iterator[Besieged]:
    """See that it has borne the test."""
    path = served.folder.path
    before = {entry.name for entry in path.parent.iterdir()} | {entry.name for entry in path.iterdir()} | {"go"}
    outside = Touched(path / "outside")
    try:
        yield served
        assert served.ask("GET", "/healthz").status == 200
        assert "Traceback" not in served.log
        assert {entry.name for entry in path.parent.iterdir()} | {entry.name for entry in path.iterdir()} <= before
        assert not outside.is_touched
        assert memory_of(served, "VmHWM") < MOST_MEMORY_BYTES
    finally:
        outside.close()


def test_the_control_of_what_is_touched(tmp_path: Path) -> None:
    """The check of each test sees who opens a file of that folder, or makes one there."""
    (tmp_path / "secret.txt").write_text(SECRET)
    for touch in (Path.read_bytes, lambda path: path.with_suffix(".new").touch()):
        with contextlib.closing(Touched(tmp_path)) as touched:
            assert not touched.is_touched
            touch(tmp_path / "secret.txt")
            assert touched.is_touched


# Names that lead elsewhere


@pytest.fixture
def traps(served: Besieged) -> Iterator[Besieged]:
    """The folder has links, a FIFO, a socket and a device that somebody has put there."""
    data, outside = served.folder / "data", served.folder / "outside"
    (data / "link").symlink_to(outside / "secret.txt")
    (data / "relative").symlink_to("../outside/secret.txt")
    (data / "folder").symlink_to(outside, target_is_directory=True)
    (data / "all").symlink_to("/", target_is_directory=True)
    (data / "loop").symlink_to("loop")
    (data / "database").symlink_to("service.db")
    (data / "sub").mkdir()
    os.mkfifo(data / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(data / "socket"))
    names = ["link", "relative", "folder", "all", "loop", "database", "fifo", "socket"]
    if os.geteuid() == 0:
        os.mknod(data / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        names.append("zero")
    yield served
    for name in names:
        (data / name).unlink()
    (data / "sub").rmdir()


def test_no_path_of_an_input_leads_out_of_the_folder(traps: Besieged) -> None:
    """Up, absolute, encoded, through links, to what is no file, to what is the service's own: 404, always the same."""
    out = "outside/secret.txt"
    up = [
        f"../{out}",
        f"sub/../../{out}",
        f"./../{out}",
        f"..//{out}",
        f"sub/../../data/../{out}",
        "../data/../work.py",
    ]
    encoded = ["%2e%2e/outside/secret.txt", "%252e%252e/outside/secret.txt", "..%2foutside%2fsecret.txt"]
    encoded += ["..\\outside\\secret.txt", "..%5coutside", "\uff0e\uff0e/outside/secret.txt", "..\u2215outside"]
    absolute = [str(traps.folder / "outside" / "secret.txt"), "/etc/passwd", "//etc/passwd", "/", "/proc/self/environ"]
    absolute += [
        "/dev/zero",
        "/dev/stdin",
        "file:///etc/passwd",
        "~/x",
        "~root/x",
        str(traps.folder / "data/items.txt"),
    ]
    through = ["link", "relative", "folder/secret.txt", "folder/../outside/secret.txt", "all/etc/passwd", "loop"]
    no_file = [
        "fifo",
        "socket",
        "zero",
        ".",
        "sub",
        "sub/",
        "items.txt/x",
        "none",
        "",
        " ",
        "items.txt\n",
    ]
    odd = ["items.txt\0", "\0", "link\0.txt", "x" * 5000, "a/" * 3000, "../" * 3000, "-", "-x", "items.txt\u0000x"]
    own = ["service.db", "service.db-wal", "service.lock", "./service.db", "sub/../service.lock", "database", "jobs"]
    for path in (*up, *encoded, *absolute, *through, *no_file, *odd, *own):
        answer = traps.ask("POST", "/jobs", {"worker": "quick", "input": {"path": path}})
        assert (answer.status, SECRET.encode() in answer.body) == (404, False), path
    (traps.folder / "data" / "sub" / "items.txt").write_text("c\n")
    for path in ("items.txt", "sub/../items.txt", "./sub/items.txt", "sub//items.txt"):
        assert traps.try_path(path) == 201, path
    (traps.folder / "data" / "sub" / "items.txt").unlink()


def test_no_path_of_an_input_leads_to_what_is_the_services_own(served: Besieged) -> None:
    """Of another job only the complete output may be an input, and no upload but by its id."""
    running = served.submit("waits", ["x"])
    done = served.submit("quick", ["y"])
    assert served.tell(done)["state"] == "complete"
    upload = served.ask("POST", "/uploads?name=a.txt", body=b"z\n").json["id"]
    wait_until(lambda: (served.folder / "data" / "jobs" / running / "output.jsonl.lock").exists(), served.process)
    jobs = served.folder / "data" / "jobs"
    own = [f"jobs/{job}/{entry.name}" for job in (running, done) for entry in (jobs / job).iterdir()]
    assert f"jobs/{running}/output.jsonl.checkpoint" in own
    for path in (
        *own,
        f"uploads/{upload}",
        f"jobs/{running}/output.jsonl.partial",
        f"jobs/{done}/../{done}/input.jsonl",
    ):
        assert served.try_path(path) == (201 if path == f"jobs/{done}/output.jsonl" else 404), path
    served.ask("POST", f"/jobs/{running}/cancel")


def test_no_id_of_an_upload_leads_elsewhere(served: Besieged) -> None:
    """An id is one that the service gave, or there is no such upload."""
    number = "up-0123456789abcdef"
    for upload in [
        *("../outside/secret.txt", "/etc/passwd", "..", ".", "", "service.db", "../service.db", f"{number}-../../x"),
        *(f"{number}-..", f"{number}-.", f"{number}-x", f"{number}-x\0", f"{number}-x\n", f"../uploads/{number}-x"),
        *(f"{number}-{'x' * 200}", "x" * 10_000, "%2e%2e%2foutside", f"{number.upper()}-x", f"{number}-x/../../x"),
    ]:
        answer = served.ask("POST", "/jobs", {"worker": "quick", "input": {"upload": upload}})
        assert answer.status == 404, upload
    assert not [path for path in (served.folder / "data" / "jobs").iterdir() if path.suffix == ".new"]


def test_no_target_leads_to_a_file(served: Besieged) -> None:
    """Ids of jobs and names of assets, however they are written: 400 or 404, and nothing of a file."""
    job = served.submit("quick", [1])
    ups = ["..", "%2e%2e", "%2E.", "%252e%252e", "..%2f..", "..%5c..", "..\\..", "%c0%ae%c0%ae", "....//", ".%00."]
    ends = ["/outside/secret.txt", "%2foutside%2fsecret.txt", "/work.py", "/app.py", "/service.db", ""]
    targets = [f"/{place}/{up}{end}" for place in ("jobs", "assets") for up in ups for end in ends]
    targets += ["/assets//etc/passwd", "/assets/%2fetc%2fpasswd", "/assets/page.js%00", "/assets/", "/assets"]
    targets += [f"/jobs/{job}%00", f"/jobs/{job}%00/output", f"/jobs/{job}/output/..", f"/jobs/{job}/output.jsonl"]
    targets += [f"/jobs/{job}/..%2f..%2fservice.db", f"/jobs/{job}%2foutput%2f", f"//jobs/{job}", f"/jobs//{job}"]
    for target in targets:
        answer = said(served, f"GET {target} HTTP/1.1\r\n".encode() + HOST + LAST + b"\r\n")
        assert status_of(answer) in (400, 404), (target, answer)
        assert SECRET.encode() not in answer
        assert b"import" not in answer


def test_a_file_that_is_swapped_after_the_job_was_made(narrow: Besieged) -> None:
    """For a link to outside, a folder that is one, a FIFO, the database, nothing: the job fails, nothing is read."""
    data, outside = narrow.folder / "data", narrow.folder / "outside"
    narrow.submit("waits", [1])  # has the only place
    jobs = {}
    for name in ("link", "fifo", "gone", "own"):
        (data / name).write_text("x\n")
        jobs[name] = narrow.submit("quick", {"path": name})
    (data / "sub").mkdir()
    (data / "sub" / "secret.txt").write_text("x\n")
    jobs["sub"] = narrow.submit("quick", {"path": "sub/secret.txt"})
    (data / "sub").rename(data / "before")
    (data / "sub").symlink_to(outside, target_is_directory=True)
    for name in ("link", "fifo", "gone", "own"):
        (data / name).unlink()
    (data / "link").symlink_to(outside / "secret.txt")
    (data / "own").symlink_to("service.db")
    os.mkfifo(data / "fifo")
    narrow.folder.write("go", "")
    for name, job in jobs.items():
        told = narrow.tell(job)
        assert (told["state"], "no such file" in told["reason"]) == ("failed", True), name
        assert narrow.output(job) == b""


def test_an_input_that_grows_ends_where_it_ended_at_the_start(narrow: Besieged) -> None:
    """Whoever goes on writing to it does not keep the job for ever."""
    grows = narrow.folder / "data" / "grows.txt"
    grows.write_text("".join(f"{n}\n" for n in range(50)))
    job = narrow.submit("waits", {"path": "grows.txt"})
    wait_until(lambda: (narrow.job(job)["sample"] or {}).get("in_flight"), narrow.process)
    with grows.open("a") as file:
        file.write("more\n" * 100_000)
    narrow.folder.write("go", "")
    assert narrow.tell(job)["state"] == "complete"
    assert narrow.output(job).count(b"\n") == 50


def test_names_of_uploads_are_names_and_nothing_else(served: Besieged) -> None:
    """Ends of lines, markup, paths, dots, whatever: the answers have no header and no place of their making."""
    names = ["a%0d%0aX-Evil:%201", "%0d%0a%0d%0a<html>", "../../x", "..%2f..%2fx", "/etc/passwd", "%00", ".", "..", ""]
    names += [
        "a%22;x=%22b",
        "%ff%fe",
        "%F0%9F%92%A9",
        "x" * 4000,
        ".part",
        "a.part",
        "con",
        "-rf",
        "a%20b",
        "%e2%80%ae.txt",
    ]
    names += ["<script>", "service.db", "~", "*", "$(id)", "%60id%60", "a.txt%00.jsonl", "." * 300, "%5c..%5cx"]
    for name in names:
        answer = served.ask("POST", f"/uploads?name={name}", body=b"1\n")
        upload = answer.json["id"]
        assert (answer.status, "x-evil" in answer.headers) == (201, False)
        assert re.fullmatch(r"up-[0-9a-f]{16}-[A-Za-z0-9._-]{1,100}", upload), name
        assert (served.uploads / upload).read_bytes() == b"1\n"
        made = served.ask("POST", "/jobs", {"worker": "quick", "input": {"upload": upload, "format": "text"}})
        assert made.headers["location"] == f"/jobs/{made.json['id']}"
        output = served.ask("GET", f"/jobs/{made.json['id']}/output")
        assert output.headers["content-disposition"] == f'attachment; filename="{made.json["id"]}.jsonl"'
    assert {path.name for path in served.uploads.iterdir() if not path.name.startswith("up-")} == set()


# Too much


def chunked(blocks: int, size: int) -> bytes:
    """A body in so many pieces, without its end."""
    return (b"%x\r\n%s\r\n" % (size, b"1" * size)) * blocks


def test_bodies_that_are_too_long(served: Besieged) -> None:
    """Announced or in pieces, of a job or an upload, also where no body belongs: 413, and nothing is kept."""
    before = set(served.uploads.iterdir())
    for path, most in [(b"/jobs", 16 << 20), (b"/uploads?name=x", MOST_UPLOAD_BYTES), (b"/jobs/x/pause", 16 << 20)]:
        head = b"POST %s HTTP/1.1\r\n" % path + HOST + b"Content-Type: application/json\r\n"
        for length in (most + 1, 10**17):
            with connected(served, head + b"Content-Length: %d\r\n\r\n" % length) as connection:
                assert status_of(connection.recv(9999)) == 413
        if path != b"/jobs/x/pause":  # there is no such job: that comes before its body
            with connected(
                served, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(most // 100_000 + 1, 100_000)
            ) as it:
                assert status_of(it.recv(9999)) == 413
    for method in (b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH", b"PUT"):
        with connected(served, method + b" /jobs HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999\r\n\r\n") as it:
            assert status_of(it.recv(9999)) == 413
    wait_until(lambda: set(served.uploads.iterdir()) == before)


def test_too_many_items(served: Besieged) -> None:
    """A million and one: 413, also eight millions in the longest body; a million is taken, and held in no memory."""
    for count, status in [(8_000_000, 413), (1_000_001, 413), (1_000_000, 201)]:
        body = b'{"worker":"quick","input":{"items":[%s]}}' % b",".join([b"1"] * count)
        answer = served.post(body)
        assert answer.status == status
        if status == 201:
            assert served.ask("POST", f"/jobs/{answer.json['id']}/cancel").status == 200
    assert memory_of(served) < 300 << 20


def test_json_that_is_meant_to_break_something(served: Besieged) -> None:
    """Deep, huge, not finite, not UTF-8, twice, cut short, of another kind: refused, or a job that ends clearly."""
    deep = [b"[" * depth + b"]" * depth for depth in (100, 900, 990, 100_000, 5_000_000)]
    deep += [b'{"a":' * depth + b"1" + b"}" * depth for depth in (900, 100_000)]
    numbers = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1e-999", b"9" * 5000, b"0x1", b"01", b"1."]
    texts = [
        b'"\xff"',
        b'"\\ud800"',
        b'"\\ud800\\udc00"',
        b'"\\u0000"',
        b'"\x00"',
        b'"\n"',
        b"'x'",
        b'"' + b"x" * 10**6 + b'"',
    ]
    jobs = []
    for value in (*deep, *numbers, *texts, b"", b"[", b"{", b"nul", b"1,,2", b"1]}}{"):
        for worker in (b"quick", b"fails"):
            options = b'"options":{"on_error":"record"}'
            answer = served.post(b'{"worker":"%s","input":{"items":[%s]},%s}' % (worker, value, options))
            assert answer.status in (201, 400, 422) or not value, (value[:50], answer)
            jobs += [answer.json["id"]] if answer.status == 201 else []
        for body in (value, b'{"worker":%s,"input":{"items":[]}}' % value, b'{"worker":"quick","input":%s}' % value):
            assert served.post(body).status in (400, 404, 422), body[:50]
        for option in (b"concurrency", b"rate", b"retry", b"on_error", b"version", b"x"):
            body = b'{"worker":"quick","input":{"items":[]},"options":{"%s":%s}}' % (option, value)
            assert served.post(body).status in (201, 400, 422), body[:80]
    for job in jobs:
        assert served.tell(job)["state"] in ("complete", "failed")
        assert served.ask("GET", f"/jobs/{job}/failures").status == 200


def test_many_large_bodies_at_once(served: Besieged) -> None:
    """Of clients that do not send their end: beyond four of the longest they get 429, and all goes on when they go."""
    head = b"POST /jobs HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nContent-Length: 16000000\r\n\r\n"
    before = memory_of(served)
    got: list[bytes] = []
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            connection = stack.enter_context(connected(served, head + b"1" * 14_000_000))
            connection.settimeout(0.1 if len(got) else 1.0)
            with contextlib.suppress(TimeoutError):
                got.append(connection.recv(9999))
        assert memory_of(served) - before < 200 << 20
        assert {status_of(answer) for answer in got} == {429}
        assert len(got) >= 7
    wait_until(lambda: served.post(b'{"worker":"quick","input":{"items":[%s1]}}' % (b" " * 15_000_000)).status == 201)


def test_slow_clients_hold_nobody_up(served: Besieged) -> None:
    """Two hundred that dawdle in the head or in the body: the others are answered at once."""
    head, before = b"POST /uploads?name=slow HTTP/1.1\r\n" + HOST, set(served.uploads.iterdir())
    with contextlib.ExitStack() as stack:
        for number in range(200):
            sent = head if number % 2 else head + b"Content-Length: 1000\r\n\r\n1"
            stack.enter_context(connected(served, sent))
        began = time.monotonic()
        for _ in range(20):
            assert served.ask("GET", "/jobs").status == 200
        assert time.monotonic() - began < 5
    wait_until(lambda: set(served.uploads.iterdir()) == before)


@pytest.mark.slow
def test_a_body_that_comes_too_slowly_is_given_up(served: Besieged) -> None:
    """After half a minute without a byte: 408, and nothing of it is kept."""
    before = set(served.uploads.iterdir())
    sent = b"POST /uploads?name=slow HTTP/1.1\r\n" + HOST + b"Content-Length: 1000\r\n\r\n1"
    assert status_of(said(served, sent, 60)) == 408
    assert set(served.uploads.iterdir()) == before


def test_more_connections_than_descriptors(tmp_path: Path) -> None:
    """Where the system allows few: those beyond are closed, with no traceback for each; then all goes on."""
    for served in make(tmp_path, kind=Poor):
        for besieged in bears(served):
            with contextlib.ExitStack() as stack:
                for _ in range(250):
                    stack.enter_context(connected(besieged))
                assert status_of(said(besieged, b"GET /jobs HTTP/1.1\r\n" + HOST + LAST + b"\r\n")) == 503
            wait_until(lambda: status_of(said(served, b"GET /jobs HTTP/1.1\r\n" + HOST + LAST + b"\r\n")) == 200)  # noqa: B023
            assert besieged.tell(besieged.submit("quick", [1]))["state"] == "complete"


def test_clients_that_break_off_their_uploads(served: Besieged) -> None:
    """A hundred, in the middle: nothing is left of them, neither file nor descriptor."""
    before, descriptors = set(served.uploads.iterdir()), descriptors_of(served)
    head = b"POST /uploads?name=x HTTP/1.1\r\n" + HOST
    for number in range(100):
        sent = (
            b"Transfer-Encoding: chunked\r\n\r\n" + chunked(2, 50_000)
            if number % 2
            else b"Content-Length: 999999\r\n\r\n"
        )
        with connected(served, head + sent + b"1" * (number % 2)) as connection:
            break_off(connection)
    wait_until(lambda: set(served.uploads.iterdir()) == before)
    wait_until(lambda: descriptors_of(served) <= descriptors + 2)


def test_clients_that_break_off_their_downloads(served: Besieged) -> None:
    """Of a large output: no descriptor is left."""
    job = served.submit("quick", ["y" * 1000] * 5000)
    assert served.tell(job)["state"] == "complete"
    descriptors = descriptors_of(served)
    for number in range(100):
        with connected(served, f"GET /jobs/{job}/output HTTP/1.1\r\n".encode() + HOST + b"\r\n") as connection:
            if number % 2:
                connection.recv(1000)
            break_off(connection)
    wait_until(lambda: descriptors_of(served) <= descriptors + 2)


def test_uploads_are_bounded_and_old_ones_make_room(served: Besieged) -> None:
    """A thousand are kept: then 429; those that are a day old go, and there is room again."""
    fakes = [served.uploads / f"up-{number:016x}-fake" for number in range(1000)]
    for fake in fakes:
        fake.write_text("x")
    full = served.ask("POST", "/uploads?name=x", body=b"1\n")
    assert (full.status, "retry-after" in full.headers) == (429, True)
    for fake in fakes[:500]:
        os.utime(fake, (1, 1))
    assert served.ask("POST", "/uploads?name=x", body=b"1\n").status == 201
    assert [fake.exists() for fake in fakes] == [False] * 500 + [True] * 500
    for fake in fakes[500:]:
        fake.unlink()


def test_listeners_are_bounded(served: Besieged) -> None:
    """So many that others still find a connection: the next get 503, and a place when one of them has gone."""
    job = served.submit("waits", [1])
    target = f"/jobs/{job}/events"
    sent = f"GET {target} HTTP/1.1\r\n".encode() + HOST + b"\r\n"
    for _ in range(700):  # what they only ask for is not listened to
        assert served.ask("HEAD", target).status == 200
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(connected(served, sent)) for _ in range(600)]
        assert {status_of(listener.recv(12)) or listener.recv(0) for listener in listeners} == {200}
        refused = served.ask("GET", target)
        assert (refused.status, "retry-after" in refused.headers) == (503, True)
        assert served.ask("GET", "/jobs").status == 200
        break_off(listeners[0])
        listens = [b""]

        def is_let_in() -> bool:
            with connected(served, sent) as connection:
                listens[0] = connection.recv(9999)
            return status_of(listens[0]) == 200

        wait_until(is_let_in)
    served.ask("POST", f"/jobs/{job}/cancel")


def test_jobs_are_bounded(narrow: Besieged) -> None:
    """Those that wait, run or are paused: then 429, which costs nothing; a place is free when one has ended."""
    jobs = [narrow.submit("waits", [1]) for _ in range(6)]
    narrow.ask("POST", f"/jobs/{jobs[0]}/pause")
    body = msgspec.json.encode({"worker": "waits", "input": {"items": ["x" * 100_000] * 100}})
    for _ in range(10):
        assert narrow.post(body).status == 429
    assert len(list((narrow.folder / "data" / "jobs").iterdir())) == 6
    narrow.ask("POST", f"/jobs/{jobs[0]}/cancel")
    assert narrow.post(body).status == 201


def test_paused_jobs_do_not_pile_up(alone: Besieged) -> None:
    """Each that stays loaded has files, tasks and a thread: beyond a bound they are let go, and go on all the same."""
    jobs: list[str] = []
    used: list[tuple[int, int]] = []

    def is_in_flight() -> bool:
        return bool((alone.job(jobs[-1])["sample"] or {}).get("in_flight"))

    for number in range(40):
        jobs.append(alone.submit("waits", [number, "x"], drain_timeout=0))
        wait_until(is_in_flight, alone.process)
        assert alone.ask("POST", f"/jobs/{jobs[-1]}/pause").json["state"] == "paused"
        used.append((threads_of(alone), descriptors_of(alone)))
    threads, descriptors = used[17]
    wait_until(lambda: threads_of(alone) <= threads + 3 and descriptors_of(alone) <= descriptors + 8)
    assert {alone.job(job)["state"] for job in jobs} == {"paused"}
    alone.folder.write("go", "")
    for _ in range(3):  # paused again before it has a place
        alone.ask("POST", f"/jobs/{jobs[-1]}/unpause")
        alone.ask("POST", f"/jobs/{jobs[-1]}/pause")
    for job in jobs:
        alone.ask("POST", f"/jobs/{job}/unpause")
    for number, job in enumerate(jobs):
        assert alone.tell(job)["state"] == "complete"
        assert [msgspec.json.decode(line)["result"] for line in alone.output(job).splitlines()] == [number, "x"]


def test_jobs_that_are_paused_while_they_are_loaded(alone: Besieged) -> None:
    """At whatever moment: no more than a few stay loaded, and each goes on when it is unpaused."""
    threads, descriptors = threads_of(alone), descriptors_of(alone)
    jobs = []
    for number in range(60):
        jobs.append(alone.submit("waits", [number], drain_timeout=0))
        for _ in range(number % 3):
            alone.ask("GET", "/healthz")
        for step in ("pause", "unpause", "pause")[: 3 if number % 2 else 1]:
            assert alone.ask("POST", f"/jobs/{jobs[-1]}/{step}").status == 200
    assert {alone.job(job)["state"] for job in jobs} == {"paused"}
    wait_until(lambda: threads_of(alone) <= threads + 45 and descriptors_of(alone) <= descriptors + 160)
    alone.folder.write("go", "")
    for job in jobs:
        alone.ask("POST", f"/jobs/{job}/unpause")
    for number, job in enumerate(jobs):
        assert alone.tell(job)["state"] == "complete"
        assert msgspec.json.decode(alone.output(job))["result"] == number


# Options


TOO_MUCH: list[dict[str, Any]] = [
    *({"rate": rate} for rate in (1e9, 1e300, 0, -1, 1e-300, "1", True)),
    *({"concurrency": n} for n in (10_001, 10**9, 10**30, 0, -1, 1.5, "1", True, None)),
    *({"window": n} for n in (0, -1, 10**6 + 1, 10**9, 10**18)),
    *({"checkpoint_interval": s} for s in (1e-300, 0, -1, 1e300)),
    *({"batch_size": n} for n in (0, -1, 10**18)),
    *({"timeout": s} for s in (0, -1, 1e-300, 1e300)),
    *({"drain_timeout": s} for s in (-1, 1e300)),
    *({"burst": n, "rate": 1} for n in (0, -1, 10**9)),
    *({"retry": n} for n in (0, -1, 10**18, "3")),
    *({"retry": {"attempts": n}} for n in (0, -1, 10**18)),
    *({"retry": {name: s}} for name in ("initial", "maximum") for s in (-1, 1e300)),
    *({"retry": {"deadline": s}} for s in (0, -1, 1e300)),
    *({"retry": {name: 0}} for name in ("breaker", "quarantine_after")),
    *({"on_error": {"max_failures": n}} for n in (-1, 10**18, "101%", "1" * 99 + "%", "-1%", "x", "1%\n")),
    *({"version": text} for text in ("x" * 201, 1)),
    *({name: 1} for name in ("key", "output", "checkpoint", "fresh", "on_progress", "__class__", "limits")),
]


@pytest.mark.parametrize("options", TOO_MUCH, ids=str)
def test_options_that_would_take_memory_or_loop_are_refused(served: Besieged, options: dict[str, Any]) -> None:
    """With 422, when the job is made and when it is changed; nothing is made."""
    jobs = list((served.folder / "data" / "jobs").iterdir())
    answer = served.ask("POST", "/jobs", {"worker": "quick", "input": {"items": [1]}, "options": options})
    assert answer.status == 422, answer
    assert list((served.folder / "data" / "jobs").iterdir()) == jobs


def test_changes_that_would_take_memory_or_loop_are_refused(served: Besieged) -> None:
    """The job goes on as it was."""
    job = served.submit("waits", [1])
    before = served.job(job)["options"]
    changes: list[Any] = [one for one in TOO_MUCH if set(one) <= {"rate", "concurrency"}]
    for change in (*changes, {}, {"window": 5}, [], 1, None):
        assert served.post(b"").status == 400
        answer = served.ask("PATCH", f"/jobs/{job}", body=msgspec.json.encode(change), headers=JSON)
        assert answer.status == 422, change
    assert served.job(job)["options"] == before
    served.ask("POST", f"/jobs/{job}/cancel")


def test_threads_are_bounded(served: Besieged) -> None:
    """A plain function runs in threads: thousands of them would leave the service no time. Neither made nor changed."""
    made = served.ask("POST", "/jobs", {"worker": "plain", "input": {"items": [1]}, "options": {"concurrency": 501}})
    assert (made.status, "threads" in made.json["detail"]) == (422, True)
    job = served.submit("plain", [1] * 1000, concurrency=500, rate=1)
    assert served.ask("PATCH", f"/jobs/{job}", {"concurrency": 501}).status == 422
    served.ask("POST", f"/jobs/{job}/cancel")


def test_attempts_without_a_pause_leave_the_loop_its_time(served: Besieged) -> None:
    """A thousand items that fail at once and are tried again at once, for ever: others are answered, and it can end."""
    retry = {"attempts": 10**9, "initial": 0, "maximum": 0, "breaker": None}
    job = served.submit("fails", list(range(1000)), concurrency=1000, retry=retry, checkpoint_interval=0.01)
    served.when(job, "running")
    for _ in range(5):
        began = time.monotonic()
        assert served.ask("GET", "/jobs").status == 200
        assert time.monotonic() - began < 3
    assert served.ask("POST", f"/jobs/{job}/cancel").status == 200
    wait_until(lambda: served.ask("DELETE", f"/jobs/{job}").status == 204)


def test_what_is_told_of_a_job_is_short_and_names_no_place(served: Besieged) -> None:
    """However long the error of its input or of its worker is; nor does it say where the folder lies."""
    for name, worker, content in [
        ("x.csv", "quick", ",".join(["same"] * 500_000) + "\n1\n"),
        ("x.jsonl", "fails", f'"{"x" * 2_000_000}"\n'),
        ("x.jsonl", "quick", "{\n"),
        ("x.gz", "quick", "this is not compressed\n"),
    ]:
        upload = served.ask("POST", f"/uploads?name={name}", body=content.encode()).json["id"]
        told = served.tell(served.submit(worker, {"upload": upload}))
        assert (told["state"], len(told["reason"]) <= 2000) == ("failed", True)
        assert str(served.folder.path) not in str(told)


def test_failures_come_in_pages_that_are_bounded_in_bytes(served: Besieged) -> None:
    """Of large items a few at a time; with `next` all of them are found, each once."""
    lines = b"".join(b'"%d %s"\n' % (n, b"x" * 500_000) for n in range(5))
    found, after = [], 0
    jobs = []
    for _ in range(3):
        upload = served.ask("POST", "/uploads?name=x.jsonl", body=lines).json["id"]
        jobs.append(served.submit("fails", {"upload": upload}, on_error="record"))
    for job in jobs:
        assert served.tell(job)["summary"]["failed"] == 5
    while after is not None:
        page = served.ask("GET", f"/jobs/{jobs[0]}/failures?limit=500&after={after}")
        assert len(page.body) < 6 << 20
        found += [failure["index"] for failure in page.json["failures"]]
        after = page.json["next"]
    assert found == list(range(5))
    one = served.ask("GET", f"/jobs/{jobs[0]}/failures?limit=500")
    assert 0 < len(one.json["failures"]) < 5


# Other sites, other names


def test_wrong_hosts_and_other_sites(served: Besieged) -> None:
    """A name that is not its own, a page or a form of elsewhere: nothing is told, nothing is made."""
    count = len(served.ask("GET", "/jobs?limit=500").json["jobs"])
    body = b'{"worker":"quick","input":{"items":[1]}}'
    for host in (b"evil.example", b"127.0.0.1.evil.example", b"0.0.0.0", b"169.254.169.254"):
        for target in (b"/", b"/jobs", b"/service"):
            assert (
                status_of(said(served, b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + LAST + b"\r\n"))
                == 421
            )
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{served.port + 1}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate"},
    ):
        assert served.post(body, **headers).status == 403
        assert served.ask("POST", "/uploads?name=x", body=b"1", headers=headers).status == 403
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "application/jsonx",
    ):
        assert served.post(body, **{"Content-Type": kind}).status == 415
    answer = served.ask(
        "OPTIONS", "/jobs", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert (answer.status, [name for name in answer.headers if name.startswith("access-control")]) == (403, [])
    assert len(served.ask("GET", "/jobs?limit=500").json["jobs"]) == count


def test_markup_is_never_taken_for_a_page(served: Besieged) -> None:
    """In items, errors, versions, names, paths: what has it is no text/html, is not sniffed, may run nothing."""
    job = served.submit("fails", [MARKUP], on_error="record", version=MARKUP)
    assert served.tell(job)["state"] == "complete"
    failed = served.submit("fails", [MARKUP], version=MARKUP)
    assert MARKUP in served.tell(failed)["reason"]
    upload = served.ask("POST", "/uploads?name=%3Cscript%3E", body=MARKUP.encode())
    answers = [served.ask("GET", path) for path in (f"/jobs/{job}", "/jobs", "/metrics", "/openapi.json", "/service")]
    answers += [served.ask("GET", f"/jobs/{one}/{what}") for one in (job, failed) for what in ("output", "failures")]
    answers += [served.ask("GET", f"/jobs/%3Cscript%3E{what}") for what in ("", "/output", "/%3Cscript%3E")]
    answers += [served.ask("GET", "/jobs?state=%3Cscript%3E"), served.ask("GET", "/jobs?%3Cscript%3E=1"), upload]
    answers += [served.ask("POST", "/jobs", {"worker": MARKUP, "input": {"items": []}})]
    answers += [served.ask("POST", "/jobs", {"worker": "quick", "input": {"path": MARKUP}})]
    answers += [served.ask("POST", "/jobs", {"worker": "quick", "input": {"items": []}, "options": {MARKUP: 1}})]
    for answer in answers:
        assert not answer.headers["content-type"].startswith(("text/html", "image/", "text/xml"))
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert served.ask("GET", f"/jobs/{job}/output").headers["content-disposition"].startswith("attachment")
    with served.events(failed) as events:
        told = next(data for _, kind, data in events if kind == "job")
    assert MARKUP in told["reason"]


def test_a_worker_can_not_be_named_into_being(served: Besieged) -> None:
    """Only those that were registered: no module, no path, no attribute, no markup."""
    names = [
        "os:system",
        "work:plain",
        "subprocess.run",
        "__import__",
        "quick\0",
        "QUICK",
        " quick",
        "",
        MARKUP,
        "../work",
        "text",
    ]
    for name in names:
        assert served.ask("POST", "/jobs", {"worker": name, "input": {"items": ["id"]}}).status == 404
    for folder in ("<b>=work:quick", "a b=work:quick", "a\n=work:quick", "=work:quick", "../x=work:quick"):
        ended = served.folder.run("serve", "--data", "elsewhere", f"--worker={folder}", "--listen", "0")
        assert ended.code == 2


# The token


def test_without_the_token_nothing_is_told_and_nothing_done(locked: Besieged) -> None:
    """No header, a wrong one, one in the query or a cookie: 401. With it, it works."""
    right = {"Authorization": f"Bearer {TOKEN}"}
    paths = [
        "/jobs",
        "/service",
        "/metrics",
        "/readyz",
        "/openapi.json",
        "/jobs/x",
        "/jobs/x/events",
        "//",
        "/x",
        "/jobs/../",
    ]
    for path in paths:
        for query in ("", f"?token={TOKEN}", f"?access_token={TOKEN}", f"?authorization=Bearer%20{TOKEN}"):
            for headers in ({}, {"Cookie": f"token={TOKEN}"}, {"X-Token": TOKEN}, {"Authorization": f"Basic {TOKEN}"}):
                answer = locked.ask("GET", path + query, headers=headers)
                assert answer.status in (401, 400), path
    for path, method in [
        ("/jobs", "POST"),
        ("/uploads?name=x", "POST"),
        ("/jobs/x", "DELETE"),
        ("/jobs/x/cancel", "POST"),
    ]:
        assert locked.ask(method, path, body=b"{}").status == 401
    assert [locked.ask("GET", path).status for path in ("/", "/healthz", "/assets/page.js")] == [200, 200, 200]
    assert locked.ask("GET", "/jobs", headers=right).status == 200
    assert list(locked.uploads.iterdir()) == []


def test_guesses_of_the_token_are_slowed(locked: Besieged) -> None:
    """401, then 429 for wrong ones; who has the right one is not kept out, and the log tells of it once."""
    guesses = [f"{TOKEN[:n]}" for n in range(1, len(TOKEN))] + [TOKEN.upper(), TOKEN + "x", f"{TOKEN},{TOKEN}", "\xff"]
    got = [locked.ask("GET", "/jobs", headers={"Authorization": f"Bearer {guess}"}).status for guess in guesses * 2]
    assert set(got) == {401, 429}
    assert got[-20:] == [429] * 20
    assert locked.ask("GET", "/jobs", headers={"Authorization": f"Bearer {TOKEN}"}).status == 200
    assert locked.log.count("wrong tokens") == 1
    assert "Traceback" not in locked.log


# Methods, and what they must not do


def test_methods_that_only_look_may_bring_a_body(served: Besieged) -> None:
    """It is not read; the next request on that connection is not taken out of it."""
    hidden = b"DELETE /jobs HTTP/1.1\r\n" + HOST + b"\r\n"
    for method in (b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT"):
        sent = (
            method + b" /jobs HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n" % len(hidden) + LAST + b"\r\n" + hidden
        )
        answer = said(served, sent)
        assert answer.count(b"HTTP/1.1 ") == 1
        assert status_of(answer) == (200 if method in (b"GET", b"HEAD") else 405)


def test_head_is_get_without_its_body(served: Besieged) -> None:
    """Everywhere, also where the answer never ends; the connection can be used for the next."""
    job = served.submit("quick", [1])
    assert served.tell(job)["state"] == "complete"
    paths = [
        "/",
        "/assets/page.js",
        "/service",
        "/healthz",
        "/readyz",
        "/metrics",
        "/openapi.json",
        "/jobs",
        f"/jobs/{job}",
    ]
    paths += [f"/jobs/{job}/{what}" for what in ("events", "output", "failures", "none")] + [
        "/none",
        "/jobs/none",
        "/uploads",
    ]
    for path in paths:
        sent = (
            f"HEAD {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n" + b"GET /healthz HTTP/1.1\r\n" + HOST + LAST + b"\r\n"
        )
        head, _, rest = said(served, sent).partition(b"\r\n\r\n")
        wanted = 200 if path.endswith("events") else served.ask("GET", path).status
        assert (status_of(head), status_of(rest)) == (wanted, 200), path


def test_a_job_that_runs_can_not_be_deleted(served: Besieged) -> None:
    """Nor with any other method or header; it goes on."""
    job = served.submit("waits", [1])
    served.when(job, "running")
    for _ in range(20):
        assert served.ask("DELETE", f"/jobs/{job}").status == 409
    for method in ("PUT", "POST", "TRACE", "CONNECT", "PURGE", "delete", "MKCOL"):
        answer = served.ask(method, f"/jobs/{job}", headers={"X-HTTP-Method-Override": "DELETE"})
        assert answer.status == 405
        assert set(answer.headers["allow"].split(", ")) == {"DELETE", "GET", "HEAD", "PATCH"}
    assert served.job(job)["state"] == "running"
    served.ask("POST", f"/jobs/{job}/cancel")


# The disk


def test_a_disk_that_is_full_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    """507, which names no place; nothing of it is left, and a smaller one finds its room."""
    data = tmp_path / "data"
    data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", data], check=True)
    try:
        for served in make(tmp_path):
            for _ in range(3):
                full = served.ask("POST", "/uploads?name=x", body=b"1" * 6_000_000)
                assert (full.status, str(tmp_path) in full.body.decode()) == (507, False)
                assert list(served.uploads.iterdir()) == []
            assert served.ask("POST", "/uploads?name=x", body=b"1\n").status == 201
            assert "Traceback" not in served.log
    finally:
        subprocess.run(["umount", "--lazy", data], check=True)
