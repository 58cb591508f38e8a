"""The rows of `tests.benchmarks.durable`: each runs in a process and a folder of its own.

They do not promise the same. diskcache commits without an fsync, Redis fsyncs once a second, GNU parallel's job log and
the original script never do; bytewax takes a snapshot once a second, as ours commits; DBOS commits each step. The pool
by hand fsyncs ten times a second, but has no order, and nothing compares what it finds after a crash.

Each reads the same lines of a file or has them handed in, keeps every result, and is asked afterwards whether all of
them are there. What is measured is from the first item to the last result; the start of Python and of a server is not.
GNU parallel's is, it is a part of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from async_recovery import run_resumable
from tests.benchmarks.apart import Row

CONCURRENCY, CHUNK = 100, 100
INPUT, OUTPUT = Path("items.txt"), Path("out.jsonl")
SOCKET = "redis.sock"  # in the current folder: a whole path may be too long
ORIGINAL_BATCH = 5

Result = dict[str, Any]


def lines_of(items: int, round_number: int) -> list[str]:
    """The items: others in every round, all of the same length."""
    return [f"{round_number}-{number:08}" for number in range(items)]


def write_input(items: int, round_number: int) -> None:
    """A line an item."""
    INPUT.write_text("".join(f"{line}\n" for line in lines_of(items, round_number)))


def result_of(line: str) -> Result:
    """What a worker makes of an item."""
    return {"value": line, "ok": True}


async def worker(line: str) -> Result:
    """Let the others have their turn."""
    await asyncio.sleep(0)
    return result_of(line)


def check(results: Iterable[Result], items: int, round_number: int) -> None:
    """Every result is there, once, in any order."""
    found = sorted(result["value"] for result in results)
    assert found == sorted(lines_of(items, round_number)), f"{len(found)} results for {items} items, or wrong ones"


def check_output(items: int, round_number: int) -> None:
    """The same, for a file of records."""
    check((json.loads(line) for line in OUTPUT.read_text().splitlines()), items, round_number)


def count_in(database: Path, table: str) -> int:
    """How many rows of a table of SQLite are kept."""
    with contextlib.closing(sqlite3.connect(database)) as kept:
        return int(kept.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def seconds_of(run: Coroutine[Any, Any, object]) -> float:
    """Run it to its end."""
    start = time.perf_counter()
    asyncio.run(run)
    return time.perf_counter() - start


async def pull_all(items: Iterable[Any], work: Callable[[Any], Coroutine[Any, Any, object]]) -> None:
    """A bare pool: as many tasks as may run at once, on one iterator."""
    shared = iter(items)

    async def pull() -> None:
        for item in shared:
            await work(item)

    await asyncio.gather(*(pull() for _ in range(CONCURRENCY)))


def ours(items: int, round_number: int) -> float:
    """The durable, ordered run, on default settings."""
    asyncio.run(run_resumable(worker, ["warm-up"], output="warm-up.jsonl"))  # the first run imports what it needs
    write_input(items, round_number)
    seconds = seconds_of(run_resumable(worker, INPUT, output=OUTPUT, concurrency=CONCURRENCY))
    with OUTPUT.open() as records:
        for index, (line, record) in enumerate(zip(lines_of(items, round_number), records, strict=True)):
            assert json.loads(record) == {"index": index, **result_of(line)}, f"{record} is not that of item {index}"
    return seconds


async def pool_by_hand(lines: Iterable[str], file: int) -> None:
    """A pool that writes and fsyncs what it has each 100 ms, in a thread; the indices in the file tell what is done."""
    encode, buffer = msgspec.json.Encoder().encode, bytearray()

    async def work(indexed: tuple[int, str]) -> None:
        index, line = indexed
        result = await worker(line.rstrip("\n"))
        buffer.extend(encode({"index": index, **result}))
        buffer.extend(b"\n")

    def write(block: bytes) -> None:
        assert os.write(file, block) == len(block)
        os.fdatasync(file)

    async def commit() -> None:
        block = bytes(buffer)
        buffer.clear()
        await asyncio.to_thread(write, block)

    pool = asyncio.create_task(pull_all(enumerate(lines), work))
    while not pool.done():
        await asyncio.wait([pool], timeout=0.1)
        await commit()
    await pool
    await commit()  # what came in while the one before was written


def by_hand(items: int, round_number: int) -> float:
    """See `pool_by_hand`."""
    write_input(items, round_number)
    with INPUT.open() as lines, OUTPUT.open("wb") as output:
        seconds = seconds_of(pool_by_hand(lines, output.fileno()))
    check_output(items, round_number)
    return seconds


def with_bytewax(items: int, round_number: int) -> float:
    """A file to a file with its recovery store, a snapshot a second; its map is sequential."""
    from bytewax import operators
    from bytewax.connectors.files import FileSink, FileSource
    from bytewax.dataflow import Dataflow
    from bytewax.recovery import RecoveryConfig, init_db_dir
    from bytewax.testing import cluster_main

    write_input(items, round_number)
    encode, store = msgspec.json.Encoder().encode, Path("recovery")
    store.mkdir()
    init_db_dir(store, 1)
    flow = Dataflow("benchmark")
    lines = operators.input("input", flow, FileSource(INPUT))
    records = operators.map("work", lines, lambda line: ("all", encode(result_of(line)).decode()))
    operators.output("output", records, FileSink(OUTPUT))
    start = time.perf_counter()
    cluster_main(flow, [], 0, epoch_interval=timedelta(seconds=1), recovery_config=RecoveryConfig(store))
    seconds = time.perf_counter() - start
    assert count_in(store / "part-0.sqlite3", "snaps") == 2, "not kept: how far it has read, and written"
    check_output(items, round_number)
    return seconds


async def do_chunk(lines: list[str]) -> list[Result]:
    """A chunk of items, all at once."""
    return list(await asyncio.gather(*(worker(line) for line in lines)))


def with_dbos(size: int, items: int, round_number: int) -> float:
    """A workflow of steps on SQLite, 100 items at once: `size` items a step."""
    from dbos import DBOS

    DBOS(config={"name": "benchmark", "system_database_url": "sqlite:///dbos.sqlite", "log_level": "ERROR"})
    one, chunk = DBOS.step()(worker), DBOS.step()(do_chunk)

    async def go_through(lines: list[str]) -> list[Result]:
        results = list[Result]()
        for start in range(0, len(lines), CHUNK):
            now = lines[start : start + CHUNK]
            results += await (chunk(now) if size > 1 else asyncio.gather(*(one(line) for line in now)))
        return results

    workflow, results = DBOS.workflow()(go_through), list[Result]()

    async def run() -> float:
        start = time.perf_counter()
        results.extend(await workflow(lines_of(items, round_number)))
        return time.perf_counter() - start

    DBOS.launch()
    seconds = asyncio.run(run())
    DBOS.destroy()
    check(results, items, round_number)
    steps = count_in(Path("dbos.sqlite"), "operation_outputs")
    assert steps == -(-items // size), f"{steps} steps were kept"
    return seconds


@contextlib.contextmanager
def redis_server() -> Iterator[None]:
    """A server of its own on a socket in this folder, with an append-only file."""
    import redis

    settings = {"port": "0", "unixsocket": SOCKET, "save": "", "appendonly": "yes", "appendfsync": "everysec"}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    with Path("redis.log").open("wb") as log:
        server = subprocess.Popen(["redis-server", *words], stdout=log, stderr=log)
    deadline = time.monotonic() + 10
    try:
        with redis.Redis(unix_socket_path=SOCKET) as client:
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert time.monotonic() < deadline, Path("redis.log").read_text()
                    time.sleep(0.01)
        yield
    finally:
        server.terminate()
        server.wait()


async def redis_queue(lines: list[str], results: list[Result]) -> float:
    """The queue that its manual calls reliable: an item is moved to a list of those begun until its result is kept."""
    import redis.asyncio

    encode = msgspec.json.Encoder().encode
    options: dict[str, Any] = {"decode_responses": True, "max_connections": CONCURRENCY}
    async with redis.asyncio.Redis(unix_socket_path=SOCKET, **options) as client:

        async def pull(_: int) -> None:
            while (line := await client.lmove("waiting", "begun", "LEFT", "RIGHT")) is not None:
                result = await worker(line)
                async with client.pipeline(transaction=True) as both:
                    await both.hset("results", line, encode(result)).lrem("begun", 1, line).execute()

        start = time.perf_counter()
        await client.rpush("waiting", *lines)
        await pull_all(range(CONCURRENCY), pull)
        seconds = time.perf_counter() - start
        results.extend(json.loads(kept) for kept in await client.hvals("results"))
        assert await client.llen("begun") == 0
    return seconds


def with_redis(items: int, round_number: int) -> float:
    """See `redis_queue`."""
    results = list[Result]()
    with redis_server():
        seconds = asyncio.run(redis_queue(lines_of(items, round_number), results))
    check(results, items, round_number)
    return seconds


def with_diskcache(items: int, round_number: int) -> float:
    """A pool that looks whether the result is there, and keeps it if not."""
    import diskcache

    with diskcache.Cache("cache", eviction_policy="none") as cache:

        async def work(line: str) -> None:
            if line not in cache:
                cache[line] = await worker(line)

        lines = lines_of(items, round_number)
        seconds = seconds_of(pull_all(lines, work))
        check((cache[line] for line in cache), items, round_number)
    return seconds


def with_parallel(items: int, round_number: int) -> float:
    """The program ``true`` for each item, with a job log and resume; its start is measured, too."""
    write_input(items, round_number)
    words = ["parallel", "--will-cite", "-j", str(CONCURRENCY), "--joblog", "joblog", "--resume", "true", "{}"]
    start = time.perf_counter()
    subprocess.run([*words, "::::", str(INPUT)], check=True, stdin=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    jobs = [line.split("\t") for line in Path("joblog").read_text().splitlines()[1:]]
    assert {job[6] for job in jobs} == {"0"}
    check((result_of(job[8].removeprefix("true ")) for job in jobs), items, round_number)
    return seconds


def original(items: int, round_number: int) -> float:
    """The script that this grew from: one after the other; after every five, all results so far are written anew."""
    write_input(items, round_number)
    checkpoint, results = Path("checkpoint.json"), list[Result]()

    def save() -> None:
        temporary = checkpoint.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump({"last_index": len(results) - 1, "results": results}, file)
        temporary.replace(checkpoint)

    start = time.perf_counter()
    for line in INPUT.read_text().splitlines():
        results.append(result_of(line))
        if len(results) % ORIGINAL_BATCH == 0:
            save()
    save()
    OUTPUT.write_text(json.dumps(results))
    seconds = time.perf_counter() - start
    check(json.loads(OUTPUT.read_text()), items, round_number)
    assert json.loads(checkpoint.read_text())["last_index"] == items - 1
    return seconds


ROWS: dict[str, Row] = {
    "ours": ours,
    "a pool by hand, fsync each 100 ms": by_hand,
    "bytewax with recovery": with_bytewax,
    "DBOS on SQLite, a step an item": partial(with_dbos, 1),
    "DBOS on SQLite, a step a chunk of 100": partial(with_dbos, CHUNK),
    "a Redis queue": with_redis,
    "diskcache": with_diskcache,
    "GNU parallel with a job log": with_parallel,
    "the original script's algorithm": original,
}
