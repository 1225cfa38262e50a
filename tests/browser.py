"""A headless Chromium for tests of pages, spoken to over its debugging pipe: no port, no driver, no package.

What is not covered: anything but one tab of one local file. `Browser.start()` is None where there is no Chromium.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --disable-dev-shm-usage "
    "--hide-scrollbars --force-color-profile=srgb"
)


class Browser:
    """One page. `evaluate` is JavaScript in it, promises awaited; errors of the page's own scripts are in `errors`."""

    def __init__(self, *, timeout_s: float = 60.0) -> None:
        assert CHROMIUM is not None, "look at CHROMIUM first"
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="browser-")
        to_them, self._write = os.pipe()
        self._read, from_them = os.pipe()
        # the pipe's ends have to be their descriptors 3 and 4
        command = f'exec "$@" 3<&{to_them} 4>&{from_them}'
        flags = [*_FLAGS.split(), "--remote-debugging-pipe", f"--user-data-dir={self._folder.name}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", CHROMIUM, *flags],
            pass_fds=(to_them, from_them),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": self._folder.name},
        )
        os.close(to_them)
        os.close(from_them)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._session = None
        try:
            self.call("Browser.close", timeout_s=10)
        except (OSError, TimeoutError):
            self._process.kill()
        self._process.wait(30)
        os.close(self._write)
        os.close(self._read)
        self._folder.cleanup()

    # the protocol ----------------------------------------------------------------------------------------------------

    def call(self, method: str, *, timeout_s: float | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + (timeout_s or self._timeout_s)
        while True:
            answer = self._next(deadline, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _next(self, deadline: float, waiting_for: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError(f"the browser did not answer to {waiting_for}")
            got = os.read(self._read, 1 << 20)
            if not got:
                raise OSError(f"the browser ended while it was asked for {waiting_for}")
            self._buffer += got
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"])[:2000])
        elif message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    # a page ----------------------------------------------------------------------------------------------------------

    def size(self, width: int, height: int, *, scale: float = 1.0, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path, *, anchor: str = "") -> float:
        """Seconds from the navigation until the page says that it is ready (`body[data-ready]`)."""
        began = time.monotonic()
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        began = time.monotonic()
        self.call("Page.navigate", url=page.resolve().as_uri() + anchor)
        self.wait("location.protocol === 'file:' && document.body && document.body.dataset.ready === 'true'")
        return time.monotonic() - began

    def evaluate(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script[:200]}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str, *, timeout_s: float = 60.0) -> None:
        """Also across a navigation, in whose middle there is nobody to answer."""
        deadline = time.monotonic() + timeout_s
        while True:
            why = ""
            try:
                if self.evaluate(f"Boolean({condition})"):
                    return
            except RuntimeError as error:
                why = f" ({error})"
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {condition}{why}")
            time.sleep(0.01)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
        code = codes.get(key, ord(key[0].upper()))
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def click(self, selector: str) -> None:
        """A real click in the middle of the element."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def choose(self, selector: str, value: str) -> None:
        """An option of a select, or the text of a field."""
        self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)}; "
            "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change')); })()"
        )

    def screenshot(self, to: Path, *, of: str | None = None, height: int | None = None) -> None:
        """PNG of what is in view, or of the element `of`, its first `height` px."""
        parameters: dict[str, Any] = {"format": "png"}
        if of is not None:
            box = self.evaluate(
                f"(() => {{ const r = document.querySelector({json.dumps(of)}).getBoundingClientRect(); "
                "return [r.x + scrollX, r.y + scrollY, r.width, r.height]; })()"
            )
            clip = {"x": box[0], "y": box[1], "width": box[2], "height": min(box[3], height or box[3]), "scale": 1}
            parameters |= {"clip": clip, "captureBeyondViewport": True}
        to.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **parameters)["data"]))


def seconds(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began
