"""Requests that nobody has thought of, to a real process: none fails, none gets or makes a file outside of its folder.

Seeded: the same seed sends the same requests.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from pathlib import Path

import pytest

from .support.commands import Folder
from .support.intruder import LAST, Touched, memory_of, said, status_of
from .support.service_process import Served

TOKEN = b"a-token-of-more-than-sixteen"
MODULE = """
async def quick(item):
    return item
"""
SECRET = "this lies outside of the folder"
MOST_UPLOAD_BYTES = 100_000

METHODS = [b"GET", b"GET", b"POST", b"POST", b"POST", b"PATCH", b"DELETE", b"HEAD", b"PUT", b"OPTIONS", b"TRACE", b"X"]
STEPS = (b"/pause", b"/unpause", b"/cancel", b"/retry-failed")
PLACES = [b"/jobs", b"/jobs", b"/jobs/ID", b"/jobs/ID/output", b"/jobs/ID/failures", b"/uploads", b"/assets/page.js"]
PLACES += [b"/jobs/ID" + step for step in STEPS] * 2
PLACES += [b"/", b"/service", b"/healthz", b"/readyz", b"/metrics", b"/openapi.json", b"/none"]
PIECES = [
    b"..",
    b".",
    b"/",
    b"%2e%2e",
    b"%2f",
    b"%252e",
    b"%00",
    b"\\",
    b"%5c",
    b"outside",
    b"secret.txt",
    b"service.db",
]
PIECES += [
    b"%0d%0a",
    b"%ff",
    b"%c0%ae",
    b"\xc3\xa9",
    b"%F0%9F%92%A9",
    b"~",
    b"*",
    b"'",
    b"%22",
    b"<script>",
    b"a" * 300,
]
PIECES += [b"etc/passwd", b"job-0123456789abcdef", b"up-0123456789abcdef-x", b"%", b"%zz", b"?", b"&", b"=", b"#", b";"]
QUERIES = [b"", b"", b"name=", b"limit=", b"after=", b"state=", b"token=" + TOKEN, b"name=a&name=", b"x="]
VALUES = [
    b"",
    b"0",
    b"-1",
    b"1",
    b"500",
    b"501",
    b"1e3",
    b"9" * 30,
    b"running",
    b"x.jsonl",
    b"x.gz",
    b"\xd9\xa3",
    b"null",
]
JSONS = [
    "null",
    "true",
    "[]",
    "{}",
    "1",
    "-1",
    "0",
    "1.5",
    "1e308",
    "1e999",
    "9" * 40,
    '""',
    '"x"',
    '"1%"',
    "[1,[2]]",
    "NaN",
]
JSONS += [
    '"../outside/secret.txt"',
    '"link"',
    '"folder/secret.txt"',
    '"items.txt"',
    '"\\u0000"',
    '"\\ud800"',
    '"record"',
]
JSONS += ['{"max_failures":1}', '{"attempts":2}', '{"items":[1]}', '{"path":"link"}', '{"upload":"ID"}', "[" * 2000]
FIELDS = ["worker", "input", "options", "concurrency", "rate", "retry", "on_error", "window", "version", "batch_size"]
FIELDS += ["checkpoint_interval", "timeout", "burst", "drain_timeout", "path", "items", "upload", "format", "__proto__"]
HEADERS = [
    b"Range: bytes=0-",
    b"Range: bytes=-1",
    b"Range: bytes=9-1",
    b"If-None-Match: *",
    b"If-Range: x",
    b"Expect: x",
]
HEADERS += [
    b"Idempotency-Key: k",
    b"Idempotency-Key: \xff",
    b"Last-Event-ID: 0-0",
    b"Origin: null",
    b"Cookie: a=b",
    b"X: y",
]
HEADERS += [
    b"Content-Encoding: gzip",
    b"Accept: text/html",
    b"X-Forwarded-Host: evil",
    b"Forwarded: for=x",
    b"Upgrade: h2c",
]
TOKENS = [b"Bearer " + TOKEN[:-1], b"Bearer", b"Basic " + TOKEN, TOKEN, b"bearer \xff", b"Bearer " + TOKEN * 9, b""]
TYPES = [b"text/plain", b"application/json; charset=utf-16", b"multipart/form-data", b"", b"\xff"]


class Fuzz:
    """Makes requests out of dice.

    :ivar ids: of jobs and uploads that there are.
    """

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.ids = [b"job-0123456789abcdef", b"up-0123456789abcdef-x"]

    def often(self, share: float) -> bool:
        """True in so many of the cases."""
        return self.dice.random() < share

    def target(self) -> bytes:
        """A path and a query, mostly sound."""
        place = self.dice.choice(PLACES)
        if self.often(0.2):
            place += b"/" + b"".join(self.dice.choices(PIECES, k=self.dice.randrange(1, 5)))
        if self.often(0.1):
            place = place.replace(b"ID", b"".join(self.dice.choices(PIECES, k=3)))
        query = b""
        if self.often(0.4):
            query = b"?" + self.dice.choice(QUERIES) + self.dice.choice([*VALUES, *PIECES])
        return place.replace(b"ID", self.dice.choice(self.ids)) + query

    def object(self) -> str:
        """A JSON object of fields that there are, with values of all kinds."""
        fields = self.dice.choices(FIELDS, k=self.dice.randrange(4))
        return "{" + ",".join(f'"{field}":{self.dice.choice(JSONS)}' for field in fields) + "}"

    def body(self) -> bytes:
        """Of a job, mostly, in which something may be wrong."""
        kind = self.dice.random()
        if kind < 0.2:
            return self.dice.randbytes(self.dice.randrange(300))
        if kind < 0.4:
            return self.object().encode()
        source = self.dice.choice(
            ['{"items":[1]}', '{"path":"items.txt"}', '{"path":"link"}', '{"upload":"ID"}', self.object()]
        )
        if self.often(0.3):
            source = '{"items":[1,"x",null]}'
        name, options = (
            self.dice.choice(['"quick"', '"quick"', self.dice.choice(JSONS)]),
            self.dice.choice(["{}", self.object()]),
        )
        text = bytearray(f'{{"worker":{name},"input":{source},"options":{options}}}'.encode())
        while self.often(0.1):
            text[self.dice.randrange(len(text))] = self.dice.randrange(256)
        return bytes(text).replace(b"ID", self.dice.choice(self.ids))

    def request(self) -> bytes:
        """A whole request, after which the connection ends."""
        target = self.target()
        does = target.startswith(b"/uploads") or target == b"/jobs" or target.endswith(STEPS)
        method = b"POST" if does and self.often(0.8) else self.dice.choice(METHODS)
        lines = [b"%s %s HTTP/1.1" % (method, target)]
        lines += [b"Host: 127.0.0.1"] if self.often(0.97) else [b"Host: " + self.dice.choice(VALUES)]
        token = b"Bearer " + TOKEN if self.often(0.95) else self.dice.choice(TOKENS)
        kind = b"application/json" if self.often(0.9) else self.dice.choice(TYPES)
        lines += [
            b"Authorization: " + token,
            b"Content-Type: " + kind,
            *self.dice.choices(HEADERS, k=self.dice.randrange(3)),
        ]
        body = self.body() if self.often(0.7) else b""
        if self.often(0.02):
            body = b"1" * (MOST_UPLOAD_BYTES + 1)
        if self.often(0.2):
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
            lines.append(b"Transfer-Encoding: chunked")
        else:
            lines.append(b"Content-Length: %d" % len(body))
        return b"\r\n".join(lines) + b"\r\n" + LAST + b"\r\n" + body


def learn(fuzz: Fuzz, answer: bytes) -> None:
    """Know the jobs and uploads that were made: the next requests are about them."""
    if status_of(answer) == 201:
        _, _, rest = answer.partition(b'"id":"')
        fuzz.ids = [*fuzz.ids[-6:], rest.partition(b'"')[0]]


def check(folder: Folder, seed: int, count: int) -> None:
    """Send so many requests, and see that nothing came of them but answers."""
    folder.write("work.py", MODULE)
    data, outside = folder / "data", folder / "outside"
    for path in (data, outside):
        path.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    (data / "items.txt").write_text("a\nb\n")
    (data / "link").symlink_to(outside / "secret.txt")
    (data / "folder").symlink_to(outside, target_is_directory=True)
    words = ("--worker=quick=work:quick", f"--max-upload={MOST_UPLOAD_BYTES}", "--max-queued=50")
    served = Served(folder, *words, env={"ASYNC_RECOVERY_TOKEN": TOKEN.decode()})
    there = names_in(folder.path)
    fuzz, got, touched = Fuzz(seed), Counter[int](), Touched(outside)
    with contextlib.closing(touched):
        for _ in range(count):
            request = fuzz.request()
            answer = said(served, request)
            status = status_of(answer)
            got[status] += 1
            assert 200 <= status < 500, (request, answer)
            assert SECRET.encode() not in answer, request
            learn(fuzz, answer)
        assert not touched.is_touched
    assert {200, 201, 400, 401, 404, 405, 409, 413, 415, 422} <= got.keys(), got
    assert names_in(folder.path) == there
    assert memory_of(served, "VmHWM") < 400 << 20
    assert served.ask("GET", "/readyz", headers={"Authorization": f"Bearer {TOKEN.decode()}"}).status == 200
    assert served.stop().code == 0
    assert "Traceback" not in served.log
    assert TOKEN.decode() not in served.log
    assert not [path for path in (data / "jobs").rglob("*") if SECRET in text_of(path)]


def names_in(folder: Path) -> set[str]:
    """What lies in a folder and its `outside`, and beside it."""
    return {str(path) for place in (folder, folder / "outside", folder.parent) for path in place.iterdir()}


def text_of(path: Path) -> str:
    """What a file holds."""
    return path.read_bytes().decode("latin-1") if path.is_file() else ""


def test_requests_of_a_fuzz(folder: Folder) -> None:
    """Some thousand: each is answered, with less than 500."""
    check(folder, seed=8, count=3000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_requests_of_a_long_fuzz(folder: Folder, seed: int) -> None:
    """The same with many more."""
    check(folder, seed, count=20_000)
