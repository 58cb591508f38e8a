"""The page of the service, in a real browser: what it shows, and that it goes on whatever the server does."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest

from tests.support.browser import Browser, Page
from tests.support.page_service import PAGE, PageService, job, page_service, sample

THIN = "\u202f"
HOSTILE = '<img src=x onerror="window.harm=1"><script>window.harm=2</script>\'"></b>\u202e'
SHOWN = HOSTILE.replace("\u202e", r"\u202e")  # the sign that turns the direction is written out
TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
LIVE = "document.querySelector('[data-testid=connection]').dataset.state === 'live'"
AWAY = "document.querySelector('[data-testid=connection]').dataset.state === 'away'"
TEXT_ON = {  # colours of text, and of what may be behind them
    "--ink": ("--bg", "--card", "--sunk", "--held-back", "--bad-back"),
    "--soft": ("--bg", "--card", "--sunk"),
    "--held-text": ("--bg", "--card", "--held-back"),
    "--bad": ("--bg", "--card", "--sunk"),
    "--warn": ("--card",),
    "--good": ("--card",),
    "--accent": ("--bg", "--card", "--sunk"),
    "--on-accent": ("--accent",),
}


@pytest.fixture
async def service() -> AsyncIterator[PageService]:
    """A service that does what the test says."""
    async with page_service() as service:
        yield service


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """A browser of the test's own."""
    async with Browser.open() as browser:
        yield browser


def there(name: str, said: str) -> str:
    """The condition that an element says something."""
    return f"document.querySelector('[data-testid={name}]').textContent.includes({json.dumps(said)})"


async def harmless(page: Page, service: PageService) -> None:
    """Nothing went wrong in the page, nothing outside was asked for, and no text became code."""
    assert page.errors == []
    assert [url for url in page.requested if not url.startswith(service.url)] == []
    assert not await page.evaluate("window.harm")


def test_no_code_of_the_page_makes_markup_of_text_or_asks_the_outside() -> None:
    """No markup or code is made of a text, nothing is inline that the policy forbids, and no address is absolute."""
    made = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc")
    inline = re.compile(r"<style|\sstyle=|\son[a-z]+=|javascript:", re.IGNORECASE)
    for path in PAGE.iterdir():
        said = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert made.findall(said) == [], path.name
        assert "://" not in said, path.name
        assert path.suffix != ".html" or inline.findall(said) == []


def palette(css: str, *, dark: bool) -> dict[str, tuple[float, ...]]:
    """The colours, as linear red, green and blue."""
    blocks = css.split("prefers-color-scheme: dark")
    found = dict(re.findall(r"(--[\w-]+): #([0-9a-f]{6});", blocks[0]))
    if dark:
        found |= dict(re.findall(r"(--[\w-]+): #([0-9a-f]{6});", blocks[1]))

    def linear(byte: str) -> float:
        share = int(byte, 16) / 255
        return share / 12.92 if share <= 0.04045 else float(((share + 0.055) / 1.055) ** 2.4)

    return {name: tuple(linear(value[at : at + 2]) for at in (0, 2, 4)) for name, value in found.items()}


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_what_is_behind_it(dark: bool) -> None:
    """Each colour of text has the contrast that WCAG 2.2 AA asks for, 4.5, light and dark."""
    colours = palette((PAGE / "page.css").read_text(), dark=dark)

    def light(name: str) -> float:
        red, green, blue = colours[name]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for text, grounds in TEXT_ON.items():
        for ground in grounds:
            darker, lighter = sorted((light(text), light(ground)))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, f"{text} on {ground}"


async def test_numbers_are_written_for_people(service: PageService, browser: Browser) -> None:
    """Big counts have thin separators, durations their two largest units, and a share is 100 % only when it is all."""
    page = await browser.page(service.url)
    wanted: list[tuple[str, Any, str]] = [
        ("count", 1_234_567, "1 234 567"),
        ("count", None, "–"),
        ("duration", 3_725, "1 h 02 min"),
        ("duration", 245, "4 min 05 s"),
        ("duration", 273_600, "3 d 4 h"),
        ("duration", -1, "0 s"),
        ("duration", "<b>", "–"),
        ("span", 0.0123, "12 ms"),
        ("span", 3.29, "3.2 s"),
        ("percent", 0.99999, "99.9 %"),
        ("percent", 1, "100.0 %"),
        ("rate", 0.5, "30.0 /min"),
        ("bytes", 39_000_000, "39 MB"),
    ]
    calls = ",".join(f"f.{name}({json.dumps(value)})" for name, value, _ in wanted)
    said = await page.evaluate(f"import('/assets/format.js').then(f => [{calls}])")
    assert [each.replace(THIN, " ") for each in said] == [text for *_, text in wanted]


async def test_a_long_night_does_not_fill_the_memory(service: PageService, browser: Browser) -> None:
    """Of 20,000 samples at most 600 stay: the first, the newest ones all, a peak of latency, and the longest hold."""
    page = await browser.page(service.url)
    found = await page.evaluate("""import('/assets/history.js').then(({ History }) => {
        const history = new History();
        for (let time = 0; time < 20000; time += 1) {
            const p99 = time === 7000 ? 99 : 1;
            const held_s = time > 4000 && time < 4300 ? time - 4000 : 0;
            const boot = time < 9000 ? "a" : "b";
            history.add({ time, finished: time, mark: time, latency: { p99 }, held_by: 7, held_s }, boot);
            history.add({ time, finished: 0 }, boot); // known already
        }
        const { samples, holds, restarts } = history;
        return { times: samples.map((one) => one.time), peak: Math.max(...samples.map((one) => one.latency.p99)),
                 holds, restarts };
    })""")
    times = found["times"]
    assert len(times) <= 600
    assert times[0] == 0
    assert times[-50:] == list(range(19_950, 20_000))
    assert max(later - earlier for earlier, later in pairwise(times)) < 100
    assert found["peak"] == 99
    assert found["holds"] == [{"index": 7, "from": 4000, "to": 4299, "attempt": 1}]
    assert found["restarts"] == [{"from": 8999, "to": 9000}]


async def test_events_are_the_same_however_the_bytes_are_cut(service: PageService, browser: Browser) -> None:
    """Whole, and character by character, with any of the three line ends: the same events come."""
    page = await browser.page(service.url)
    lines = [
        ": beat",
        "",
        "id: a-1",
        "event: sample",
        'data: {"a":',
        "data: 1}",
        "",
        "data:x",
        "unknown: y",
        "",
        "data: lost",
    ]
    for end in ("\n", "\r\n", "\r"):
        text = json.dumps(end.join(lines))
        whole, single = await page.evaluate(f"""import('/assets/api.js').then(({{ EventParser }}) => {{
            const one = new EventParser();
            return [new EventParser().feed({text}), [...{text}].flatMap((each) => one.feed(each))];
        }})""")
        assert whole == single
        assert whole == [
            {"id": "a-1", "event": "sample", "data": '{"a":\n1}'},
            {"id": "a-1", "event": "message", "data": "x"},
        ]


async def test_a_broken_stream_goes_on_where_it_was(service: PageService, browser: Browser) -> None:
    """Broken in the middle of an event, it asks for what comes after the last whole one; it never has two streams."""
    service.send(("job", service.job), ("sample", sample(1)))
    page = await browser.page(f"{service.url}#/jobs/one")
    await page.wait_for(f"{LIVE} && {there('finished', '10')}")
    service.send('id: a-3\nevent: sample\ndata: {"ti', ConnectionError(), ("sample", sample(2)))
    await page.wait_for(there("finished", "20"))
    assert service.asked == [None, "a-2"]
    assert service.most_open == 1


async def test_a_stream_that_makes_no_sense_is_closed(service: PageService, browser: Browser) -> None:
    """After an event that is not JSON there is another stream, and not one beside it."""
    service.send(("job", service.job), ("sample", sample(1)))
    page = await browser.page(f"{service.url}#/jobs/one")
    await page.wait_for(there("finished", "10"))
    service.send("id: a-9\nevent: sample\ndata: {\n\n", None, ("sample", sample(2)))
    await page.wait_for(there("finished", "20"))
    assert service.asked == [None, "a-2"]
    assert service.most_open == 1


async def test_the_page_outlives_the_server(service: PageService, browser: Browser) -> None:
    """While the server is away it says so; when it is back it goes on, and still draws what it knew before."""
    service.send(("job", service.job), *(("sample", sample(time)) for time in range(1, 31)))
    page = await browser.page(f"{service.url}#/jobs/one")
    await page.wait_for(there("finished", "300"))
    for until in (40, 50):
        service.restart(("job", service.job), ("sample", sample(until)))
        await page.wait_for(AWAY)
        assert await page.evaluate("!document.querySelector('#away').hidden")
        service.away = False
        await page.wait_for(f"{LIVE} && {there('finished', str(until * 10))}", 5)
    service.send(("sample", sample(51)))
    await page.wait_for(there("finished", "510"))
    await page.wait_for("document.querySelectorAll('#lines rect.gap').length === 2")
    drawn = await page.evaluate("document.querySelector('#lines path.mark-line').getAttribute('d')")
    assert drawn.count("M") == 3  # of each life its own line
    assert len(re.findall(r"[ML]", drawn)) == 33
    assert service.most_open == 1


async def test_the_item_that_holds_the_mark_is_named(service: PageService, browser: Browser) -> None:
    """Index, how long, attempt, and what is finished ahead of it; when the window is full, that too."""
    held = {"mark": 41, "durable_mark": 41, "finished": 541, "ahead": 500, "frontier": 545, "held_by": 41}
    service.send(("job", service.job), ("sample", sample(70, **held, held_s=62.5, held_attempt=3)))
    page = await browser.page(f"{service.url}#/jobs/one")
    await page.wait_for(there("held-by", f"Item 41 holds the mark for 1{THIN}min 02{THIN}s, attempt 3."))
    assert "500 items are finished ahead of it; 4 in flight; room for 496 more" in await page.text("#held")
    full = held | {"finished": 1040, "ahead": 999, "in_flight": 1, "frontier": 1041}
    service.send(("sample", sample(80, **full, held_s=72.5)))
    await page.wait_for(there("held-by", "The window is full"))


async def test_everything_shown_is_text(service: PageService, browser: Browser) -> None:
    """Names, reasons, items and errors that look like markup are seen as they are, in the list and in the job."""
    errors = [{"error": HOSTILE, "count": 3, "item": HOSTILE}]
    events = [{"time": 1.5, "what": "changed", "text": HOSTILE}]
    named = {"kind": "upload", "name": HOSTILE, "bytes": 1}
    service.job = job(state="paused", reason=HOSTILE, worker=HOSTILE, input=named, events=events)
    samples = [{"index": 4, "message": HOSTILE, "item": {"a": HOSTILE}}]
    service.failures = [{"type": HOSTILE, "message": HOSTILE, "count": 2, "samples": samples}]
    page = await browser.page(service.url)
    await page.wait_for(there("job-row", SHOWN))
    service.send(("job", service.job), ("sample", sample(2, failed=2, errors=errors, paused=HOSTILE)))
    await page.click("[data-testid=job-row] a")
    for name in ("reason", "failure-group", "errors", "events"):
        await page.wait_for(f"document.querySelector('[data-testid={name}]') && {there(name, SHOWN)}")
    assert await page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    await harmless(page, service)


async def test_numbers_that_are_not_known_break_nothing(service: PageService, browser: Browser) -> None:
    """A sample in which all that may be null is null is drawn."""
    unknown = dict.fromkeys(("held_by", "share", "remaining_s", "since_commit_s", "latency", "items_per_s"))
    service.send(("job", service.job), ("sample", sample(1, **unknown)), ("sample", sample(2, **unknown)))
    page = await browser.page(f"{service.url}#/jobs/one")
    await page.wait_for(there("finished", "20"))
    await harmless(page, service)


async def test_the_token_is_asked_for_and_never_in_an_address(service: PageService, browser: Browser) -> None:
    """A wrong token is refused in words; the right one opens the page, and stands in no URL."""
    service.token = "s3cret"
    page = await browser.page(service.url)
    await page.wait_for("!document.querySelector('#view-token').hidden")
    for said in ("wrong", service.token):
        await page.fill("[data-testid=token-form] input", said)
        await page.press("Enter")
        wanted = (
            "document.querySelector('[data-testid=job-row]')"
            if said == service.token
            else there("token-form", "not take")
        )
        await page.wait_for(wanted)
    assert not [url for url in page.requested if service.token in url]


async def test_cancelling_asks_once(service: PageService, browser: Browser) -> None:
    """Cancel opens a question: Escape leaves the job alone, and only a yes is sent."""
    service.send(("job", service.job), ("sample", sample(1)))
    page = await browser.page(f"{service.url}#/jobs/one")
    await page.wait_for(there("finished", "10"))
    await page.click("[data-testid=button-cancel]")
    await page.press("Escape")
    await page.wait_for("!document.querySelector('dialog').open")
    assert service.posted == []
    await page.click("[data-testid=button-cancel]")
    await page.click("[data-testid=confirm-yes]")
    await page.wait_for("!document.querySelector('dialog').open")
    await page.wait_for("!document.querySelector('#controls').hasAttribute('aria-busy')")
    assert service.posted == ["/jobs/one/cancel"]


async def test_the_page_fits_a_narrow_phone(service: PageService, browser: Browser) -> None:
    """At a width of 360 px nothing sticks out, in the list and in a job, long names and all."""
    service.job = job(reason="x" * 3_000, input={"kind": "upload", "name": "y" * 500, "bytes": 1})
    service.send(("job", service.job), ("sample", sample(1)), ("sample", sample(2)))
    for place, ready in (
        ("", "document.querySelector('[data-testid=job-row]')"),
        ("#/jobs/one", there("finished", "20")),
    ):
        page = await browser.page(service.url + place, width=360, dark=True, still=True)
        await page.wait_for(ready)
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360


async def test_nothing_is_drawn_while_the_tab_is_hidden(service: PageService, browser: Browser) -> None:
    """A hidden tab changes its title alone; seen again, it shows where the job stands now."""
    service.send(("job", service.job), ("sample", sample(1)))
    page = await browser.page(f"{service.url}#/jobs/one")
    await page.wait_for(there("finished", "10"))
    await page.evaluate("""(() => {
        window.drawn = 0;
        const all = { subtree: true, childList: true, attributes: true, characterData: true };
        const count = (changes) => { window.drawn += changes.length; };
        new MutationObserver(count).observe(document.querySelector("main"), all);
        Object.defineProperty(document, "hidden", { configurable: true, value: true });
        document.dispatchEvent(new Event("visibilitychange"));
    })()""")
    service.send(*(("sample", sample(time)) for time in range(2, 50)), ("job", job(state="paused")))
    await page.wait_for("document.title.includes('paused')")
    assert await page.evaluate("new Promise((done) => requestAnimationFrame(() => done(window.drawn)))") == 0
    await page.evaluate("""(() => {
        delete document.hidden;
        document.dispatchEvent(new Event("visibilitychange"));
    })()""")
    await page.wait_for(f"{there('finished', '490')} && {there('state', 'paused')}")


async def test_what_a_person_types_is_not_overwritten(service: PageService, browser: Browser) -> None:
    """A field that was changed keeps what is in it when the job tells of itself; one that was not follows the job."""
    service.send(("job", service.job), ("sample", sample(1)))
    page = await browser.page(f"{service.url}#/jobs/one")
    await page.wait_for(there("finished", "10"))
    await page.fill("[data-testid=input-concurrency]", "17")
    service.send(("job", job(options={"concurrency": 8, "rate": 2.5})))
    await page.wait_for("document.querySelector('[data-testid=input-rate]').value === '2.5'")
    assert await page.evaluate("document.querySelector('[data-testid=input-concurrency]').value") == "17"


@pytest.mark.parametrize("state", ["failed", "cancelled", "complete"])
async def test_a_job_that_ended_with_nothing_finished_has_an_empty_bar(
    service: PageService, browser: Browser, state: str
) -> None:
    """With the mark at 0, no part of the window's picture is filled; with a mark, the same job has a full one."""
    ended = job(state=state, ended=9.0)
    none = {"held_by": None, "in_flight": 0, "frontier": 0}
    service.send(("job", ended), ("sample", sample(0, **none)))
    page = await browser.page(f"{service.url}#/jobs/one")
    await page.wait_for(there("mark", "0"))
    widths = "[...document.querySelectorAll('#strip .part')].map((part) => Number(part.getAttribute('width')))"
    assert await page.evaluate(widths) == [0, 0, 0, 0]
    assert "all" not in await page.text("#strip .tick.low")
    service.send(("sample", sample(4, **none)))
    await page.wait_for(there("mark", "40"))
    assert await page.evaluate(f"{widths}[0]") > 200
    assert await page.text("#strip .tick.low") == "all 40"


async def test_the_list_says_that_an_outage_pauses_a_job(service: PageService, browser: Browser) -> None:
    """The row of a running job that begins nothing says why, cut, and no item is blamed; of any other, it does not."""
    stands = sample(70, held_by=0, held_s=62.5, failed=3, paused="an outage: " + "x" * 3_000)
    service.job = job(sample=stands)
    page = await browser.page(service.url)
    await page.wait_for("document.querySelector('[data-testid=job-row]')")
    row = "[data-testid=job-row] .row-note"
    said = await page.text(row)
    assert said.startswith("an outage: xxx")
    assert "x… · 3 failed" in said
    assert len(said) < 200
    assert "holds the mark" not in said
    assert await page.evaluate(f"document.querySelector('{row}').dataset.level") == "slow"
    service.job = job(sample=stands | {"paused": None})
    await page.wait_for(there("job-row", "item 0 holds the mark"))
    service.job = job(sample=stands, state="queued")
    await page.wait_for("document.querySelector('[data-testid=job-row]').dataset.state === 'queued'")
    assert "outage" not in await page.text(row)


async def test_failures_that_are_not_committed_are_told_of(service: PageService, browser: Browser) -> None:
    """Those that the groups do not count are counted apart; "None." is said only if there are none."""
    more = "not in the committed output yet: those ahead of the mark, for one."
    service.send(("job", service.job), ("sample", sample(1)))
    page = await browser.page(f"{service.url}#/jobs/one")
    await page.wait_for(there("finished", "10"))
    none, rest = (
        "!document.querySelector('#failures-none').hidden",
        "!document.querySelector('#failures-more').hidden",
    )
    assert await page.evaluate(f"{none} && !({rest})")
    service.failures = None  # the records go to no file
    service.send(("sample", sample(2, failed=61)))
    await page.wait_for(there("failures", f"61 more are {more}"))
    assert await page.evaluate(f"!({none}) && {rest}")
    service.is_read = False
    service.failures = [{"type": "ValueError", "message": "no", "count": 60, "samples": []}]
    await page.wait_for(there("failures", "1 more: the output is still being read."))
    service.is_read = True
    await page.wait_for(there("failures", f"1 more is {more}"))
    service.failures = [{"type": "ValueError", "message": "no", "count": 61, "samples": []}]
    await page.wait_for(f"!({rest})")
    assert not await page.evaluate(none)


async def test_signs_that_turn_the_direction_of_a_text_are_written_out(service: PageService, browser: Browser) -> None:
    """No text, title, label or name of the tab has one, wherever texts of others are shown; their codes are seen."""
    codes = "".join(f"\\u{ord(sign):04x}" for sign in TURNS)
    service.offers = {"workers": [TURNS]}
    samples = [{"index": 4, "message": TURNS, "item": {"a": TURNS}}]
    service.failures = [{"type": TURNS, "message": TURNS, "count": 2, "samples": samples}]
    events = [{"time": 1.5, "what": TURNS, "text": TURNS}]
    options = {"concurrency": 4, "rate": None, "version": TURNS, "retry": {"on": TURNS}}
    named = {"input": {"kind": "upload", "name": TURNS, "bytes": 1}, "worker": TURNS, "options": options}
    service.job = job(reason=TURNS, events=events, sample=sample(1, paused=TURNS), **named)
    page = await browser.page(service.url)
    turned = f"""(() => {{
        const nodes = [...document.querySelectorAll("*")];
        const names = ["title", "aria-label", "aria-valuetext", "placeholder"];
        const said = [document.title, document.body.textContent, ...nodes.flatMap((node) =>
            names.map((name) => node.getAttribute(name) ?? ""))];
        return said.filter((text) => [...{json.dumps(TURNS)}].some((sign) => text.includes(sign)));
    }})()"""
    await page.wait_for(there("job-row", codes))
    assert await page.evaluate(turned) == []
    assert await page.evaluate("document.querySelector('[data-testid=worker]').value") == TURNS
    errors = [{"error": TURNS, "count": 3, "item": TURNS}]
    service.send(("job", service.job), ("sample", sample(1)), ("sample", sample(2, failed=2, errors=errors)))
    await page.click("[data-testid=job-row] a")
    for name in ("reason", "failure-group", "errors", "events"):
        await page.wait_for(f"document.querySelector('[data-testid={name}]') && {there(name, codes)}")
    assert codes in await page.evaluate("document.title")
    assert await page.evaluate(turned) == []


@pytest.mark.parametrize(
    ("offers", "hidden"), [({}, False), ({"has_output": True}, False), ({"has_output": False}, True)]
)
async def test_what_has_no_output_has_no_download(
    service: PageService, browser: Browser, offers: dict[str, Any], hidden: bool
) -> None:
    """Where the records go to no file, there is no link to one; where nothing is said of it, there is."""
    service.offers = offers
    service.send(("job", service.job), ("sample", sample(1)))
    page = await browser.page(f"{service.url}#/jobs/one")
    await page.wait_for(there("finished", "10"))
    assert await page.evaluate("document.querySelector('[data-testid=download-output]').hidden") is hidden
    assert ("no file" in await page.text("#download-hint")) is hidden


async def test_the_button_of_a_paused_job_is_called_unpause_too(service: PageService, browser: Browser) -> None:
    """Its name to a screen reader begins with what is seen and says "unpause", and so does its title."""
    service.send(("job", job(state="paused")), ("sample", sample(1)))
    page = await browser.page(f"{service.url}#/jobs/one")
    await page.wait_for("!document.querySelector('#controls').hidden")
    button = "document.querySelector('[data-testid=button-unpause]')"
    assert await page.evaluate(f"{button}.getAttribute('aria-label').startsWith({button}.textContent)")
    for name in ("aria-label", "title"):
        assert "unpause" in (await page.evaluate(f"{button}.getAttribute('{name}')")).lower()
