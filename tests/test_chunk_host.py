"""What runs in a process of a cluster: who may work there, and how its errors come over."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import msgspec
import pytest

from async_recovery import ResultRefused, SlowDown
from async_recovery.carried import pack, unpack
from async_recovery.chunk_host import Background, Host
from async_recovery.errors import CommandFailed, describe
from async_recovery.executors import Assignment, Chunk, Here, Recall, Stop, Told

from .support.virtual_loop import VirtualLoop, run_virtual

EVENTS: list[str] = []


async def for_ever(item: str) -> None:
    """Ends by a cancellation alone, and not at once."""
    EVENTS.append(f"begins {item}")
    try:
        await asyncio.sleep(1_000)
    finally:
        await asyncio.sleep(0.05)
        EVENTS.append(f"ends {item}")


def host(run: str, place: str | None, told: list[Told], worker: str = "for_ever", lease_s: float = 60.0) -> Host:
    """Somebody who works for that run, with a worker of this module."""
    options = {"timeout": None, "has_deadline": False, "keeps_records": True, "lease_s": lease_s}
    assignment = msgspec.convert({"run": run, "place": place, "worker": f"{__name__}:{worker}", **options}, Assignment)
    return Host(assignment, lambda data: told.append(pickle.loads(data)))


def chunk(items: dict[int, Any], share: int, *, is_rated: bool) -> bytes:
    """A message with these items, by their index."""
    return pickle.dumps(Chunk([*items], [pickle.dumps(item) for item in items.values()], [], share, is_rated))


async def there(background: Background, what: Any) -> None:
    """Await that on the loop of the background."""
    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(what, background.loop))


async def give(background: Background, run: str, item: str) -> None:
    """An item for that run, which begins."""
    background.loop.call_soon_threadsafe(background.hear, run, chunk({0: item}, 1, is_rated=False))
    while f"begins {item}" not in EVENTS:  # noqa: ASYNC110  said by another thread
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("place", "is_fenced"), [("host:/out.jsonl", True), ("host:/other.jsonl", False), (None, False)]
)
async def test_the_next_run_of_a_job_fences_the_last(place: str | None, is_fenced: bool) -> None:
    """What an earlier coordinator left running for the same job ends before the next begins; other jobs go on."""
    EVENTS.clear()
    background, old, new = Background(), list[Told](), list[Told]()
    await there(background, background.begin(host("old", "host:/out.jsonl" if place else None, old), "client-1"))
    await give(background, "old", "of the old")
    await there(background, background.begin(host("new", place, new), "client-2"))
    await give(background, "new", "of the new")
    began = ["begins of the old", "ends of the old", "begins of the new"]
    assert began == EVENTS if is_fenced else "ends of the old" not in EVENTS
    if is_fenced:
        assert old[-1].cancelled == [0]
    await there(background, background.end_of("client-1"))
    assert "ends of the old" in EVENTS
    assert "ends of the new" not in EVENTS
    await there(background, background.end("new"))
    assert EVENTS[-1] == "ends of the new"
    await asyncio.to_thread(background.close)


async def wants_a_pause(item: int) -> None:
    """Each of them asks for it."""
    raise SlowDown(5)


async def test_a_process_that_is_asked_for_a_pause_obeys_before_it_is_told() -> None:
    """What has not begun there goes back at once."""
    background, told = Background(), list[Told]()
    await there(background, background.begin(host("run", None, told, "wants_a_pause"), "client"))
    items = {index: index for index in range(10)}
    background.loop.call_soon_threadsafe(background.hear, "run", chunk(items, 1, is_rated=False))
    while not any(message.failures for message in told):  # noqa: ASYNC110  said by another thread
        await asyncio.sleep(0.005)
    assert [failure.index for message in told for failure in message.failures] == [0]
    assert [index for message in told for index in message.returned] == list(range(1, 10))
    await there(background, background.end("run"))
    await asyncio.to_thread(background.close)


async def takes_a_while(item: int) -> int:
    """A second."""
    EVENTS.append(f"begins {item}")
    await asyncio.sleep(1.0)
    return item


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_process_that_stood_still_begins_nothing_before_it_is_told_to(is_stopped: bool) -> None:
    """What waited there, and what is on its way, may have been given to another: it goes back."""
    EVENTS.clear()
    told = list[Told]()

    def items(*indices: int) -> bytes:
        return chunk({index: index for index in indices}, 2, is_rated=True)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        here = host("run", None, told, "takes_a_while", lease_s=5.0)
        here.begin()
        await asyncio.sleep(0.1)
        here.hear(items(*range(6)))
        await asyncio.sleep(0.5)
        loop.now += 5.0
        await asyncio.sleep(1.0)
        here.hear(items(6, 7))
        await asyncio.sleep(3.0)
        assert EVENTS == ["begins 0", "begins 1"]
        assert [index for message in told for index in message.returned] == [2, 3, 4, 5, 6, 7]
        assert [message.stood_still for message in told].count(True) == 1
        here.hear(pickle.dumps(Stop(for_good=False) if is_stopped else Recall()))
        await asyncio.sleep(0.1)
        here.hear(items(8, 9, 10))
        await asyncio.sleep(3.0)
        assert EVENTS[2:] == ["begins 8", "begins 9", "begins 10"]
        await here.stop(for_good=True)

    run_virtual(main())
    assert sorted(index for message in told for index, _ in message.records) == [0, 1, 8, 9, 10]


def test_a_process_that_hears_nothing_begins_nothing_after_about_a_lease() -> None:
    """What waits there, and what was long on its way, goes back; what it has begun goes on, and so does the rest."""
    EVENTS.clear()
    told = list[Told]()

    def items(*indices: int) -> bytes:
        return chunk({index: index for index in indices}, 1, is_rated=True)

    async def main() -> None:
        here = host("run", None, told, "takes_a_while", lease_s=5.0)
        here.begin()
        here.hear(items(*range(8)))
        await asyncio.sleep(0.7)
        for _ in range(2):
            here.hear(pickle.dumps(Here()))
            await asyncio.sleep(0.5)
        assert EVENTS == ["begins 0", "begins 1"]
        await asyncio.sleep(10.0)  # of silence: 2 to 5 begin in the first four seconds
        here.hear(items(8, 9))
        here.hear(pickle.dumps(Here()))
        await asyncio.sleep(2.0)
        assert EVENTS[2:] == ["begins 2", "begins 3", "begins 4", "begins 5"]
        assert [index for message in told for index in message.returned] == [6, 7, 8, 9]
        assert [message.stood_still for message in told].count(True) == 1
        here.hear(pickle.dumps(Recall()))
        here.hear(items(10))
        await asyncio.sleep(2.0)
        assert EVENTS[6:] == ["begins 10"]
        await here.stop(for_good=True)

    run_virtual(main())


def test_who_asks_late_or_again_begins_nothing_anew() -> None:
    """A process that was slow to answer answers to all of it: what works goes on, what has ended stays so."""
    EVENTS.clear()
    background, told = Background(), list[Told]()

    async def main() -> None:
        hosts = [host("run", "place", told) for _ in range(4)]
        for one, (owner, turn) in zip(hosts, [("c2", 2), ("c2", 2), ("c1", 1)], strict=False):
            await there(background, background.begin(one, owner, turn))
        await give(background, "run", "a")
        assert [one for one in hosts if hasattr(one, "_pool")] == hosts[:1]
        await there(background, background.begin(hosts[3], "c3", 3))
        assert "ends a" in EVENTS
        await give(background, "run", "b")
        await there(background, background.end("run"))
        assert "ends b" in EVENTS
        late = host("run", "place", told)
        await there(background, background.begin(late, "c3", 3))
        assert not hasattr(late, "_pool")
        await there(background, background.end_of("c4"))
        late = host("other", None, told)
        await there(background, background.begin(late, "c4", 1))
        assert not hasattr(late, "_pool")
        await asyncio.to_thread(background.close)

    asyncio.run(main())


class Particular(Exception):
    """Its arguments are not those of its parent."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Unpicklable(Exception):
    """It holds what can not be carried."""

    def __init__(self) -> None:
        super().__init__("held")
        self.held = lambda: 0


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("a", 1), ValueError(), KeyError("k"), OSError(2, "gone", "file"), ResultRefused("no")),
        *(
            CommandFailed("exit status 3", 3),
            Particular(code=7),
            Unpicklable(),
            UnicodeDecodeError("utf-8", b"x", 0, 1, "y"),
        ),
        *(ExceptionGroup("two", [ValueError("a"), KeyError("b")]), asyncio.CancelledError(), SystemExit(3)),
    ],
)
def test_an_error_comes_over_as_it_was(error: BaseException) -> None:
    """Type, message and fields; and its traceback as a note. Where Dask is, exceptions are pickled in another way."""
    import distributed  # noqa: F401

    found = unpack(pack(error), "there")
    assert type(found) is type(error)
    assert describe(found) == describe(error)
    for name in ("code", "exit_status", "errno", "filename"):
        assert getattr(found, name, None) == getattr(error, name, None)
    assert found.__notes__[0].startswith("raised on there:")


def test_a_pause_comes_over_also_out_of_a_group() -> None:
    """The longest that was asked for."""
    found = unpack(pack(ExceptionGroup("both", [SlowDown(2), SlowDown(5)])), "there")
    assert isinstance(found, SlowDown)
    assert found.seconds == 5.0


def test_an_error_of_a_type_that_is_not_here_keeps_its_name() -> None:
    """The record of the failure is the same; that it is another type shows only to who looks."""
    local = type("Local", (Exception,), {"__module__": "nowhere", "__qualname__": "Local"})
    found = unpack(pack(local("words")), "there")
    assert describe(found) == "Local: words"
