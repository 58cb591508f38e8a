"""The service in a real browser, from the submission of a file to its output, with a kill of the server in between."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from .support.browser import Browser, Page
from .support.commands import Folder
from .support.service_process import Served

HOSTILE = '<img src=x onerror="window.harm=1"><script>window.harm=2</script>'
MODULE = f'''
import asyncio
import os


async def visit(item):
    """Item 7 fails, item 40 waits until there is a file "go"."""
    await asyncio.sleep(0.005)
    if item == "7":
        raise ValueError({HOSTILE!r})
    while item == "40" and not os.path.exists("go"):
        await asyncio.sleep(0.005)
    return item.upper()
'''
ITEMS = 3000
STATE = "document.querySelector('[data-testid=state]').textContent"
LIVE = "document.querySelector('[data-testid=connection]').dataset.state === 'live'"


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with Browser.open() as browser:
        yield browser


async def in_state(page: Page, state: str) -> None:
    await page.wait_for(f"{STATE}.toLowerCase().includes('{state}')", timeout=30)


async def number(page: Page, name: str) -> int:
    shown = await page.text(f"[data-testid={name}]")
    return int("".join(filter(str.isdecimal, shown.split("of")[0].split("/")[0])) or 0)


async def picture(page: Page, name: str, tmp_path: Path) -> None:
    """The page at this moment, for people."""
    await page.screenshot(tmp_path / f"{name}.png")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
async def test_a_job_is_submitted_watched_and_steered_and_outlives_the_server(
    folder: Folder, browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    """Submitted with a file, paused, unpaused, a failing item seen; the server is killed and started again in the
    middle, and the page goes on by itself; the output is byte for byte right; no text becomes code.
    """
    folder.write("work.py", MODULE)
    source = folder.write_items(ITEMS, "numbers.txt")
    served = await asyncio.to_thread(Served, folder, "--worker=visit=work:visit")
    page = await browser.page(served.url, width=width, height=900, dark=dark)
    await page.wait_for(LIVE)
    await page.wait_for("document.getElementById('new-job').open")  # where there are no jobs, it opens by itself
    await page.set_file("[data-testid=file]", source)
    await page.fill("[data-testid=concurrency]", "4")
    await page.evaluate("document.querySelector('[data-testid=on-error]').value = 'record'")
    await picture(page, "1-form", tmp_path)
    await page.click("#submit-go")
    await in_state(page, "running")
    await page.wait_for("document.querySelector('[data-testid=held-by]').textContent.includes('40')")
    await page.wait_for("document.querySelector('[data-testid=failure-group]') !== null")
    assert HOSTILE in await page.text("[data-testid=failures]")
    await picture(page, "2-held", tmp_path)

    await page.click("[data-testid=button-pause]")
    await in_state(page, "paused")
    job = (await page.evaluate("location.hash")).rpartition("/")[2]
    paused = served.job(job)
    assert paused["state"] == "paused"
    await picture(page, "3-paused", tmp_path)
    await page.click("[data-testid=button-unpause]")
    await in_state(page, "running")
    assert await number(page, "mark") == 40

    before = await number(page, "finished")
    await asyncio.to_thread(served.kill)
    await page.wait_for("document.querySelector('[data-testid=connection]').dataset.state === 'away'", timeout=30)
    await picture(page, "4-away", tmp_path)
    await asyncio.to_thread(served.start)
    await page.wait_for(LIVE, timeout=30)
    await page.wait_for(f"{STATE}.toLowerCase().includes('running')", timeout=30)
    folder.write("go", "")
    await in_state(page, "complete")
    await picture(page, "5-complete", tmp_path)
    assert await number(page, "finished") == ITEMS > before

    expected = [{"index": index, "result": str(index)} for index in range(ITEMS)]
    expected[7] = {"index": 7, "error": {"type": "ValueError", "message": HOSTILE}, "item": "7"}
    output = await asyncio.to_thread(served.output, job)
    assert output == b"".join(msgspec.json.encode(record) + b"\n" for record in expected)
    assert not await page.evaluate("window.harm")
    assert [url for url in page.requested if not url.startswith(served.url)] == []
    assert [error for error in page.errors if "Failed to load resource" not in error] == []
    await asyncio.to_thread(served.stop, signal.SIGTERM)
