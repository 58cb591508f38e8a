"""A job of the service beside those who watch and ask: 500 listeners of events, and 200 requests a second.

    python -m tests.benchmarks.service [--pairs 10] [--seconds 5] [--listeners 500] [--requests 200]

One process serves one job whose items wait 100 ms, 1,000 at once: 10,000 items a second. Phases in turns, alone and
beside the load, which comes from a process of its own: what the job finishes in each is compared. The exit code is 1 if
it is slowed by 10 % or more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

WORKER = """
import asyncio


async def waits(item):
    await asyncio.sleep(0.1)
    return item
"""
PORT = 8798
URL = f"http://127.0.0.1:{PORT}"
CONCURRENCY, PER_SECOND = 1000, 10_000
MOST_SLOWER = 0.10


def ask(method: str, path: str, body: bytes | None = None, json_type: bool = False) -> Any:
    """One request, and what its answer says."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=30)
    connection.request(method, path, body, {"Content-Type": "application/json"} if json_type else {})
    answer = connection.getresponse().read()
    connection.close()
    return json.loads(answer)


async def load(job: str, listeners: int, requests: int) -> None:
    """Listen and ask until standard input ends; then say what came of it."""
    told: Counter[str] = Counter()
    paths = itertools.cycle([f"/jobs/{job}", "/jobs", f"/jobs/{job}", "/metrics", f"/jobs/{job}/failures?limit=0"])

    async def listen(session: aiohttp.ClientSession) -> None:
        async with session.get(f"{URL}/jobs/{job}/events") as answer:
            async for line in answer.content:
                told["events"] += line.startswith(b"data:")

    async def request(session: aiohttp.ClientSession, path: str) -> None:
        began = time.perf_counter()
        async with session.get(URL + path) as answer:
            await answer.read()
            told[f"status {answer.status}"] += 1
        took.append(time.perf_counter() - began)

    took: list[float] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        listening = [asyncio.create_task(listen(session)) for _ in range(listeners)]
        await asyncio.sleep(2)  # the history has come to all of them
        print("ready", flush=True)
        loop, began, asking = asyncio.get_running_loop(), time.perf_counter(), set()
        ended = loop.run_in_executor(None, sys.stdin.read)
        for number in itertools.count():
            await asyncio.sleep(max(0.0, began + number / requests - time.perf_counter()))
            if ended.done():
                break
            task = asyncio.create_task(request(session, next(paths)))
            asking.add(task)
            task.add_done_callback(asking.discard)
        await asyncio.gather(*asking, return_exceptions=True)
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, return_exceptions=True)
    told["p95 of an answer, ms"] = round(1000 * statistics.quantiles(took, n=20)[-1])
    print(json.dumps(told))


def finished_in(job: str, seconds: float) -> float:
    """Items a second over so many seconds."""
    before = ask("GET", f"/jobs/{job}")["sample"]
    time.sleep(seconds)
    after = ask("GET", f"/jobs/{job}")["sample"]
    return float((after["finished"] - before["finished"]) / (after["elapsed_s"] - before["elapsed_s"]))


@contextlib.contextmanager
def beside(words: list[str], told: list[str]) -> Any:
    """The load, while this lasts; what it says in the end is added to `told`."""
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield
    told.append(process.communicate("")[0].strip())


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--listeners", type=int, default=500)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        asyncio.run(load(given.load, given.listeners, given.requests))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "work.py").write_text(WORKER)
        (folder / "data").mkdir()
        items = int(PER_SECOND * (given.seconds * 2 + 5) * (given.pairs + 1))
        (folder / "data" / "items.txt").write_text("".join(f"{n}\n" for n in range(items)))
        serve = [sys.executable, "-m", "async_recovery", "serve", "--data", "data", "--worker", "waits=work:waits"]
        log = (folder / "log").open("w")
        with log, subprocess.Popen([*serve, "--listen", str(PORT)], cwd=folder, stderr=log) as server:
            try:
                return compare(given)
            finally:
                server.terminate()


def compare(given: argparse.Namespace) -> int:
    """The phases in turns; the exit code."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            if ask("GET", "/readyz")["status"] == "ok":
                break
        time.sleep(0.1)
    options = {"concurrency": CONCURRENCY}
    wanted = json.dumps({"worker": "waits", "input": {"path": "items.txt"}, "options": options}).encode()
    job = ask("POST", "/jobs", wanted, json_type=True)["id"]
    time.sleep(3)
    many = ["--listeners", str(given.listeners), "--requests", str(given.requests)]
    words = [sys.executable, "-m", "tests.benchmarks.service", "--load", job, *many]
    told: list[str] = []
    ratios, alone_all, loaded_all = [], [], []
    for _ in range(given.pairs):
        alone = finished_in(job, given.seconds)
        with beside(words, told):
            loaded = finished_in(job, given.seconds)
        ratios.append(loaded / alone)
        alone_all.append(alone)
        loaded_all.append(loaded)
        print(f"  alone {alone:8,.0f} items/s   beside the load {loaded:8,.0f}   {loaded / alone:.3f}", flush=True)
    print(told[-1])
    slower = 1 - statistics.median(ratios)
    medians = f"{statistics.median(alone_all):,.0f} and {statistics.median(loaded_all):,.0f} items/s"
    bound = f"slower by {100 * slower:.1f} % (bound {100 * MOST_SLOWER:.0f})"
    print(f"{given.listeners} listeners and {given.requests} requests a second: medians {medians}, {bound}")
    return int(slower >= MOST_SLOWER)


if __name__ == "__main__":
    sys.exit(main())
