"""Headless Chromium, driven through its remote debugging pipe: no port, and no package besides Debian's browser.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    # A mouse: without one, pages show all that they otherwise show under it.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
]


class Browser:
    """One page of a headless Chromium that reaches nothing but the loopback."""

    def __init__(self, program: str, width: int = 1400, height: int = 900) -> None:
        self._profile = Path(tempfile.mkdtemp(prefix="consistency-chromium-"))
        self._pid, self._to, self._from = _start(program, self._profile)
        self._unread, self._calls, self._session = b"", 0, ""
        try:
            self._attach(width, height)
        except BaseException:
            self.close()
            raise

    def _attach(self, width: int, height: int) -> None:
        page = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.resize(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End it with all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def resize(self, width: int, height: int) -> None:
        """Set the size of the page in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def open(self, address: str) -> None:
        """Go to an address; about:blank in between, for a changed fragment alone would load nothing."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=address)

    def forget(self, address: str) -> None:
        """Let pages of that server start as for a person who was never there."""
        self._call("Storage.clearDataForOrigin", origin=address, storageTypes="all")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        said = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def text(self) -> str:
        """What a person can read on the page."""
        return self.run("document.body ? document.body.innerText : ''")

    def wait_for(self, script: str, patience: float = 60) -> Any:
        """Wait until a JavaScript expression is true; fail with the page's text. Returns its value."""
        deadline = time.monotonic() + patience
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}\n{self.text()}"
            time.sleep(0.2)
        return value

    def wait_for_text(self, *texts: str, patience: float = 60) -> None:
        """Wait until all the texts stand on the page."""
        wanted = json.dumps(texts)
        self.wait_for(f"document.body && {wanted}.every(text => document.body.innerText.includes(text))", patience)

    def click(self, selector: str, text: str = "") -> None:
        """Click the first element of a CSS selector that holds a text."""
        found = (
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            f".find(element => element.innerText.includes({json.dumps(text)}))"
        )
        self.wait_for(f"!!{found}")
        place = self.run(
            f"(() => {{ const element = {found}; element.scrollIntoView({{block: 'center'}});"
            " const box = element.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            button = {"type": kind, "x": place[0], "y": place[1], "button": "left", "clickCount": 1}
            self._call("Input.dispatchMouseEvent", **button)

    def rest(self, seconds: float = 2.0) -> None:
        """Wait for what moves on a page to come to rest."""
        time.sleep(seconds)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self._call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """Save what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, patience: float = 60, **params: Any) -> dict[str, Any]:
        """One command and its answer; events are passed over."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + patience
        while True:
            answer = self._read(deadline - time.monotonic(), method)
            if answer.get("id") == self._calls:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self, patience: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(patience, 0))
            assert ready, f"Chromium does not answer {method}"
            piece = os.read(self._from, 1 << 20)
            assert piece, f"Chromium has ended:\n{(self._profile / 'log').read_text(errors='replace')[-2000:]}"
            self._unread += piece
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)


def _start(program: str, profile: Path) -> tuple[int, int, int]:
    """Start it in a process group of its own. Returns its pid, and the pipes to and from it (there: 3 and 4)."""
    theirs_in, ours_out = _pipe()
    ours_in, theirs_out = _pipe()
    log = os.open(profile / "log", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC)
    duplicates = {0: os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), 1: log, 2: log, 3: theirs_in, 4: theirs_out}
    pid = os.posix_spawn(
        program,
        [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        {**os.environ, "HOME": str(profile)},
        file_actions=[(os.POSIX_SPAWN_DUP2, ours, theirs) for theirs, ours in duplicates.items()],
        setsid=True,
    )
    for end in {*duplicates.values()}:
        os.close(end)
    return pid, ours_out, ours_in


def _pipe() -> list[int]:
    """Both ends, away from the numbers that they will have in the child."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved
