"""Compressed inputs: read as their content, resumed only if all of it is the same, refused if they are not whole."""

from __future__ import annotations

import asyncio
import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from async_recovery import InputChanged, InvalidItem, RunSummary, UsageError, run_resumable
from async_recovery.compressed import zstd
from async_recovery.sources import CsvSource, JsonLinesSource, TextSource, file_source
from async_recovery.verify import locate, verify

from .support.file_jobs import Worker, json_lines, names_in
from .support.virtual_loop import run_virtual

COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd().compress}
NAMES = [f"item {number}{'x' * (number % 7)}" for number in range(40)]
LINES = "".join(f"{name}\n" for name in NAMES).encode()

every_form = pytest.mark.parametrize("suffix", COMPRESS)


def run(worker: Worker, path: Path, **options: Any) -> RunSummary:
    """A job on the virtual clock, which commits each second."""
    output = path.with_name("out.jsonl")
    options = {"output": output, "concurrency": 3, "drain_timeout": 0, **options}
    return run_virtual(run_resumable(worker, path, **options))


def interrupted(path: Path, *, at: int = 25) -> Worker:
    """A job that ended at a failed item."""
    worker = Worker(fails={NAMES[at]})
    with pytest.raises(Exception, match="as the test says"):
        run(worker, path)
    return worker


MANY = [f"{number:06d} {'x' * 100}" for number in range(5_600)]
MANY_LINES = "".join(f"{name}\n" for name in MANY).encode()  # 600 KB: about ten pages


def interrupted_late(path: Path) -> None:
    """A job over many lines that ended at its last item but one."""
    path.write_bytes(COMPRESS[path.suffix](MANY_LINES))
    with pytest.raises(Exception, match="as the test says"):
        run(Worker(fails={MANY[-2]}), path, concurrency=200)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl.gz", JsonLinesSource),
        ("a.ndjson.zst", JsonLinesSource),
        ("a.CSV.GZ", CsvSource),
        ("a.tsv.zst", CsvSource),
        ("a.txt.gz", TextSource),
        ("a.gz", TextSource),
        (".gz", TextSource),
    ],
)
def test_the_format_is_what_stands_before_the_suffix(name: str, kind: type) -> None:
    """`items.jsonl.gz` holds JSON Lines, whatever the case of the letters; without such a suffix it is text."""
    assert type(file_source(name)) is kind


@every_form
def test_the_output_is_that_of_the_plain_file(tmp_path: Path, suffix: str) -> None:
    """Several streams in a row are one content, also where one ends within a line or holds nothing."""
    path = tmp_path / f"items{suffix}"
    compress = COMPRESS[suffix]
    path.write_bytes(b"".join(compress(part) for part in (LINES[:33], b"", LINES[33:100], LINES[100:])))
    assert run(Worker(), path).total_items == len(NAMES)
    assert (tmp_path / "out.jsonl").read_bytes() == json_lines(NAMES)
    assert names_in(tmp_path) == {path.name, "out.jsonl"}


@every_form
def test_a_resume_runs_nothing_again(tmp_path: Path, suffix: str) -> None:
    """Positions and CRCs are those of the content: packed in another way, or unpacked, the job goes on."""
    path = tmp_path / f"items{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES))
    first = interrupted(path)
    done = len(first.calls) - 3  # what was in flight comes again
    path.write_bytes(COMPRESS[suffix](LINES[:77]) + COMPRESS[suffix](LINES[77:]))
    second = interrupted(path, at=31)
    assert len(set(first.calls) & set(second.calls)) <= 3
    plain = tmp_path / "items"
    plain.write_bytes(LINES)
    report = asyncio.run(verify(locate(str(tmp_path / "out.jsonl"))))
    assert report.problems == []
    last = Worker()
    assert run(last, plain).resumed_from >= done
    assert len(set(second.calls) & set(last.calls)) <= 3
    assert (tmp_path / "out.jsonl").read_bytes() == json_lines(NAMES)


@every_form
def test_the_whole_prefix_is_compared_before_the_first_item(tmp_path: Path, suffix: str) -> None:
    """One byte changed in the middle of 600 KB that are done, far from what a plain file is looked at at once."""
    path = tmp_path / f"items{suffix}"
    interrupted_late(path)
    middle = len(MANY_LINES) // 2
    path.write_bytes(COMPRESS[suffix](MANY_LINES[:middle] + b"#" + MANY_LINES[middle + 1 :]))
    worker, before = Worker(), (tmp_path / "out.jsonl.checkpoint").read_bytes()
    with pytest.raises(InputChanged, match=r"the bytes from 0 to \d+ are not those that were done"):
        run(worker, path)
    assert worker.calls == []
    assert (tmp_path / "out.jsonl.checkpoint").read_bytes() == before


@every_form
@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_stream_cut_short_is_an_error_and_not_the_end(tmp_path: Path, suffix: str, cut: int) -> None:
    """All but the last page before it is done and kept, nothing is published, and with the whole file it goes on."""
    path = tmp_path / f"items{suffix}"
    whole = COMPRESS[suffix](MANY_LINES[:500_000]) + COMPRESS[suffix](MANY_LINES[500_000:])
    path.write_bytes(whole[:-cut])
    worker = Worker()
    with pytest.raises(
        InvalidItem, match=rf"items\{suffix}: its \w+ stream is cut short after \d+ bytes of its content"
    ):
        run(worker, path, concurrency=200)
    assert len(worker.calls) > 4_000
    assert "out.jsonl" not in names_in(tmp_path)
    path.write_bytes(whole)
    again = Worker()
    run(again, path, concurrency=200)
    assert not set(worker.calls) & set(again.calls)
    assert (tmp_path / "out.jsonl").read_bytes() == json_lines(MANY)


@every_form
@pytest.mark.parametrize("wound", ["a flipped bit", "rubbish behind", "no bytes", "not compressed"])
def test_a_damaged_stream_is_one_clear_line(tmp_path: Path, suffix: str, wound: str) -> None:
    """It names the file, the place and the reason, and leaves no stray file where nothing was done."""
    path = tmp_path / f"items{suffix}"
    packed = bytearray(COMPRESS[suffix](LINES))
    packed[len(packed) // 2] ^= 0x10
    wounded = {
        "a flipped bit": bytes(packed),
        "rubbish behind": COMPRESS[suffix](LINES) + b"rubbish that is no stream",
        "no bytes": b"",
        "not compressed": LINES,
    }[wound]
    path.write_bytes(wounded)
    expected = "cut short after 0 bytes" if wound == "no bytes" else r"damaged after \d+ bytes"
    with pytest.raises(InvalidItem, match=rf"items\{suffix}: its \w+ stream is {expected}") as raised:
        run(Worker(), path)
    assert "\n" not in str(raised.value)
    assert wound == "rubbish behind" or names_in(tmp_path) == {path.name}


@every_form
def test_damage_before_the_point_that_was_reached_is_a_changed_input(tmp_path: Path, suffix: str) -> None:
    """What could be read once and can not be read now is not what was done."""
    path = tmp_path / f"items{suffix}"
    interrupted_late(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    worker = Worker()
    with pytest.raises(InputChanged, match=r"its \w+ stream is cut short after \d+ bytes"):
        run(worker, path)
    assert worker.calls == []


def test_the_share_is_not_known(tmp_path: Path) -> None:
    """How much content is left can not be told before its end: no number is better than a wrong one."""
    shares = []
    path = tmp_path / "items.gz"
    path.write_bytes(gzip.compress(LINES))
    run(Worker(), path, on_progress=lambda progress: shares.append(progress.share))
    assert set(shares) == {None}


@every_form
def test_half_a_line_that_was_done_may_be_followed_by_damage(tmp_path: Path, suffix: str) -> None:
    """What was done holds, and the line says that no more can be read."""
    path = tmp_path / f"items{suffix}"
    half = LINES[:-1]
    path.write_bytes(COMPRESS[suffix](half))
    run(Worker(), path, keep_checkpoint=True)
    path.write_bytes(COMPRESS[suffix](half) + COMPRESS[suffix](b"\nmore\n")[:-3])
    with pytest.raises(InvalidItem, match="cut short"):
        run(Worker(), path, keep_checkpoint=True)


def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is not installed that reads zstd, the line says how to install it, before anything begins."""
    missing = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    monkeypatch.setitem(sys.modules, missing, None)
    if "." in missing:
        monkeypatch.delattr(sys.modules[missing.partition(".")[0]], "zstd", raising=False)
    with pytest.raises(UsageError, match=r"pip install 'async-recovery\[zstd\]'"):
        run(Worker(), tmp_path / "items.zst")
    assert names_in(tmp_path) == set()


@every_form
async def test_reading_does_not_block_the_loop(tmp_path: Path, suffix: str) -> None:
    """Content that unpacks to many blocks is read on threads: blockbuster fails this test otherwise."""
    path = tmp_path / f"items.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](b"".join(b'{"n":%d}\n' % number for number in range(300_000))))
    count = 0
    async for page in file_source(path).pages(None):
        count += len(page.items)
    assert count == 300_000
