"""A headless Chromium, steered over its DevTools protocol: pages are opened, watched, filled in and photographed.

Debian's `chromium` is enough (`apt-get install chromium`). What a page logs as an error, what it throws, and every
address that it asks for is kept, so that a test can say that nothing went wrong and nothing went outside.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--remote-debugging-port=0", "--no-first-run", "--disable-gpu"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--no-default-browser-check", "--hide-scrollbars", "--mute-audio"),
)
START_S = 30.0
ANSWER_S = 30.0
CLICK_FRAMES = 60
AGAIN_S = 0.02
LONGEST_MESSAGE = 256 * 1024 * 1024  # a screenshot is one
WITHOUT_REQUEST = ("data:", "blob:", "about:")


class BrowserError(Exception):
    """The browser did not start, or refused a command, or JavaScript threw."""


class Page:
    """One tab.

    :ivar errors: what its console said as an error, and exceptions that nobody caught.
    :ivar requested: every address that it asked for, in order; those without a request (`data:`) are left out.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self.errors: list[str] = []
        self.requested: list[str] = []
        self._browser = browser
        self._session = session

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, to this tab.

        :raises BrowserError: if the browser refuses it.
        """
        return await self._browser.send(method, session=self._session, **params)

    async def goto(self, url: str, timeout: float = 15.0) -> None:
        """Load that address, and wait until it is loaded.

        :param timeout: seconds.
        :raises BrowserError: if there is nothing there.
        :raises TimeoutError: if it takes longer.
        """
        answer = await self.send("Page.navigate", url=url)
        if error := answer.get("errorText"):
            raise BrowserError(f"{url} was not loaded: {error}")
        await self.wait_for("document.readyState === 'complete'", timeout)

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise; it must be what JSON can say.

        :raises BrowserError: if it throws.
        """
        answer = await self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if thrown := answer.get("exceptionDetails"):
            raise BrowserError(f"{script!r} threw: {_exception(thrown)}")
        return answer["result"].get("value")

    async def wait_for(self, condition: str, timeout: float = 10.0) -> None:
        """Wait until a JavaScript expression is true; an element that is there is true.

        :param timeout: seconds.
        :raises TimeoutError: if it is not true by then; says what the page shows instead.
        """
        if not await self._becomes(condition, timeout):
            shown = await self.evaluate("document.body.innerText.slice(0, 2000)")
            raise TimeoutError(f"{condition} was not true within {timeout} s; errors {self.errors}; shown:\n{shown}")

    async def _becomes(self, condition: str, timeout: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while True:
                    with contextlib.suppress(BrowserError):  # the page is just being replaced, or not there yet
                        if await self.evaluate(f"(async () => Boolean(await ({condition})))()"):
                            return True
                    await asyncio.sleep(AGAIN_S)
        return False

    async def text(self, selector: str) -> str:
        """The text of an element.

        :raises BrowserError: if there is none.
        """
        return str(await self.evaluate(f"{_element(selector)}.textContent"))

    async def click(self, selector: str) -> None:
        """Click in the middle of an element, as a mouse does, once it is seen.

        :raises BrowserError: if there is none after a while, or it is not seen, or something covers it.
        """
        found = json.dumps(selector)
        where = await self.evaluate(f"""(async () => {{
            const drawn = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
            for (let again = 0; again < {CLICK_FRAMES}; again += 1) {{
                await drawn(); // a click meets what was drawn last, not what the document says by now
                const node = document.querySelector({found});
                if (!node) continue;
                node.scrollIntoView({{block: "center", behavior: "instant"}});
                const box = node.getBoundingClientRect();
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                const top = document.elementFromPoint(x, y);
                if (box.width > 0 && box.height > 0 && top && node.contains(top)) {{
                    await drawn();
                    return [x, y];
                }}
            }}
            throw new Error({found} + (document.querySelector({found}) ? " is not seen" : " is not there"));
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    async def fill(self, selector: str, value: str) -> None:
        """Give a field of a form its value, with the events that follow when a person does.

        :raises BrowserError: if there is no such element.
        """
        await self.evaluate(f"""(() => {{
            const node = {_element(selector)};
            node.focus();
            node.value = {json.dumps(value)};
            for (const name of ["input", "change"]) node.dispatchEvent(new Event(name, {{bubbles: true}}));
        }})()""")

    async def press(self, key: str) -> None:
        """Press a key in what has the focus: "Tab", "Escape", "ArrowLeft"…"""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        more = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            code = codes.get(key, 0)
            await self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    async def set_file(self, selector: str, path: Path) -> None:
        """Choose a file in a file field.

        :raises BrowserError: if there is no such field.
        """
        document = await self.send("DOM.getDocument")
        found = await self.send("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector)
        if not found["nodeId"]:
            raise BrowserError(f"no element {selector}")
        await self.send("DOM.setFileInputFiles", nodeId=found["nodeId"], files=[str(path.resolve())])

    async def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write what is seen as a PNG.

        :param whole: the page in its whole height, not only the part in the window.
        """
        answer = await self.send(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole, **await self._clip(whole)
        )
        path.write_bytes(base64.b64decode(answer["data"]))

    async def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = (await self.send("Page.getLayoutMetrics"))["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    async def close(self) -> None:
        """Close the tab."""
        await self.send("Page.close")

    def _take(self, method: str, params: dict[str, Any]) -> None:
        """What the browser tells of its own accord."""
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(each.get("value", each.get("description"))) for each in params["args"]))
        if method == "Runtime.exceptionThrown":
            self.errors.append(_exception(params["exceptionDetails"]))
        if method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}".strip())
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(WITHOUT_REQUEST):
            self.requested.append(params["request"]["url"])
        if method == "Network.webSocketCreated":
            self.requested.append(params["url"])


class Browser:
    """One process of Chromium with a profile of its own, which goes with it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}

    @classmethod
    @asynccontextmanager
    async def open(cls, *, flags: Iterable[str] = ()) -> AsyncIterator[Self]:
        """A browser, until the block ends.

        :param flags: more of Chromium's command-line flags.
        :raises BrowserError: if there is no Chromium, or it does not start.
        """
        async with AsyncExitStack() as stack:
            profile = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            url = await stack.enter_async_context(_process(profile, flags))
            session = await stack.enter_async_context(aiohttp.ClientSession())
            socket = await stack.enter_async_context(session.ws_connect(url, max_msg_size=LONGEST_MESSAGE))
            browser = cls(socket)
            listening = asyncio.create_task(browser._listen())
            try:
                yield browser
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)

    async def page(
        self, url: str, *, width: int = 1280, height: int = 800, dark: bool = False, still: bool = False
    ) -> Page:
        """A new tab with that address loaded, and with storage of its own.

        :param width: of the window, in CSS pixels; below 600 it says that it is a phone.
        :param height: the same.
        :param dark: prefers a dark page.
        :param still: prefers reduced motion.
        :raises BrowserError: if there is nothing at the address.
        """
        context = (await self.send("Target.createBrowserContext"))["browserContextId"]
        target = await self.send("Target.createTarget", url="about:blank", browserContextId=context)
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = self._pages[attached["sessionId"]] = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Network", "Log"):
            await page.send(f"{domain}.enable")
        await page.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        await page.send(
            "Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in features.items()]
        )
        await page.goto(url)
        return page

    async def send(self, method: str, *, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command of the protocol.

        :raises BrowserError: if the browser refuses it, or is gone.
        """
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params}
        try:
            await self._socket.send_json(message if session is None else {**message, "sessionId": session})
            async with asyncio.timeout(ANSWER_S):
                result: dict[str, Any] = await answer
                return result
        except ConnectionError as error:
            raise BrowserError(f"{method}: the browser is gone") from error
        finally:
            del self._waiting[number]

    async def _listen(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if page := self._pages.get(said.get("sessionId", "")):
                page._take(said.get("method", ""), said.get("params", {}))
            answer = self._waiting.get(said.get("id", 0))
            if answer is None or answer.done():
                continue
            if "error" in said:
                answer.set_exception(BrowserError(said["error"]["message"]))
            else:
                answer.set_result(said["result"])
        for answer in self._waiting.values():
            answer.set_exception(BrowserError("the browser is gone"))


@asynccontextmanager
async def _process(profile: Path, flags: Iterable[str]) -> AsyncIterator[str]:
    """Chromium as a group of processes of its own; gives the address of its DevTools."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        raise BrowserError(f"none of {', '.join(NAMES)} was found: apt-get install chromium")
    log = profile / "log"
    with log.open("wb") as said:
        process = await asyncio.create_subprocess_exec(
            *(program, *FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        port_file = profile / "DevToolsActivePort"
        if not await _written(port_file, process):
            said_there = log.read_text(errors="replace")[-2000:]
            raise BrowserError(f"{program} did not start within {START_S} s; it said: {said_there}")
        port, path = port_file.read_text().split()
        yield f"ws://127.0.0.1:{port}{path}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _written(path: Path, process: asyncio.subprocess.Process) -> bool:
    """Whether the process writes that file of two lines while it lives, in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_S):
            while process.returncode is None:
                if path.exists() and "\n" in path.read_text():
                    return True
                await asyncio.sleep(AGAIN_S)
    return False


def _element(selector: str) -> str:
    """A JavaScript expression for the element, which throws if there is none."""
    found = json.dumps(selector)
    return f'(document.querySelector({found}) ?? (() => {{ throw new Error("no element " + {found}) }})())'


def _exception(details: dict[str, Any]) -> str:
    """What was thrown, in one text."""
    return str(details.get("exception", {}).get("description") or details.get("text"))
