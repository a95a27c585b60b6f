"""Reports in a real browser: nothing in the console, nothing loaded from outside, videos play, both widths fit.

``VIDSHARD_TEST_BROWSER`` names Chromium or Chrome, or one is found on PATH. Screenshots go to the folder
``VIDSHARD_TEST_SCREENSHOTS``, if that is set.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from base64 import b64decode
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.cli import printed_by
from vidshard.jobs.commands.reporting import page_of
from vidshard.jobs.report import job

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0")

_PLAYED = """(async () => {
  const videos = [...document.querySelectorAll("video")];
  await Promise.all(videos.map((video) => video.play()));
  await Promise.all(videos.map((video) => new Promise((done) => video.addEventListener("timeupdate", done))));
  return videos.map((video) => video.error ? video.error.message : video.videoWidth);
})()"""
_HOVERED = """(async () => {
  const videos = [...document.querySelectorAll("video")];
  videos.forEach((video) => video.pause());
  const box = document.querySelector(".videos");
  box.dispatchEvent(new PointerEvent("pointerenter", { pointerType: "mouse" }));
  const during = [...box.querySelectorAll("video")].filter((video) => !video.paused).length;
  box.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
  return [during, videos.filter((video) => !video.paused).length];
})()"""


@pytest.fixture(scope="module")
def browser() -> str:
    """Path of the browser."""
    found = os.environ.get("VIDSHARD_TEST_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)
    if not found:
        pytest.skip("no Chromium or Chrome on PATH; VIDSHARD_TEST_BROWSER names one")
    return found


@pytest.fixture(scope="module")
def evaluation(good_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of two tokenizers."""
    out = tmp_path_factory.mktemp("evaluation")
    flags = ("--tokenizer", "tiny", "--tokenizer", "tiny_kl", "--frames", 5, "--size", 32, "--local", "--no-lpips")
    printed_by("evaluate", good_videos, "--out", out, *flags, "--report", "none")
    return out


@pytest.mark.parametrize(("kind", "videos_of_a_clip"), [("output", 3), ("evaluation", 5), ("training", 0)])
def test_every_kind_of_report_works_in_a_browser_at_both_widths(
    kind: str, videos_of_a_clip: int, request: pytest.FixtureRequest, tmp_path: Path, browser: str
) -> None:
    pytest.importorskip("vl_convert")
    target = tmp_path / f"{kind}.html"
    job.write_report(str(request.getfixturevalue(kind)), page_of, target=str(target))
    with subprocess.Popen(
        [browser, *_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "about:blank"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            address = next(line.split()[-1] for line in process.stderr if "DevTools listening on" in line)
            asyncio.run(asyncio.wait_for(_look(address, target, videos_of_a_clip), 120))
        finally:
            process.kill()


class _Tab:
    """A tab of the browser, over the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.events: list[dict[str, Any]] = []

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            answer = json.loads((await self._socket.receive()).data)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    async def evaluate(self, expression: str) -> Any:
        """Value of an expression."""
        result = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait_for(self, method: str) -> None:
        """Wait for an event."""
        while all(event.get("method") != method for event in self.events):
            self.events.append(json.loads((await self._socket.receive()).data))


async def _look(address: str, target: Path, videos_of_a_clip: int) -> None:
    port = address.split(":")[2].split("/")[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            page = next(one for one in await answer.json() if one["type"] == "page")
        async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=1 << 27) as socket:
            tab = _Tab(socket)
            for domain in ("Runtime", "Log", "Page", "Network"):
                await tab.send(f"{domain}.enable")
            for name, width, scheme in (("wide", 1300, "light"), ("phone", 390, "dark")):
                await _check(tab, target, videos_of_a_clip, name, width, scheme)


async def _check(tab: _Tab, target: Path, videos_of_a_clip: int, name: str, width: int, scheme: str) -> None:
    tab.events.clear()
    await tab.send(
        "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=name == "phone"
    )
    await tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    await tab.send("Page.navigate", url=target.as_uri())
    await tab.wait_for("Page.loadEventFired")
    assert await tab.evaluate("document.documentElement.scrollWidth") == width  # no sideways scrolling
    sizes = await tab.evaluate(_PLAYED)
    assert bool(sizes) == bool(videos_of_a_clip)
    assert all(isinstance(size, int) and size > 0 for size in sizes), sizes
    if videos_of_a_clip:
        assert await tab.evaluate(_HOVERED) == [videos_of_a_clip, 0]
    broken = "[...document.images].filter((one) => !one.complete || !one.naturalWidth).length"
    assert await tab.evaluate(broken) == 0
    paper = await tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) == (scheme == "dark")
    height = await tab.evaluate("document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    picture = await tab.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
    if folder := os.environ.get("VIDSHARD_TEST_SCREENSHOTS"):
        Path(folder, f"{target.stem}-{name}.png").write_bytes(b64decode(picture["data"]))
    said = [e for e in tab.events if e.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    assert not said
    assert not [e for e in tab.events if e.get("method") == "Runtime.exceptionThrown"]
    asked = [e["params"]["request"]["url"] for e in tab.events if e.get("method") == "Network.requestWillBeSent"]
    assert not [url for url in asked if not url.startswith((target.as_uri(), "data:"))]
