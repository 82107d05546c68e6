"""A headless Chromium by its own driver's protocol, for tests of pages."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
]
WAITING = """
const look = () => { const value = %s; if (value) arguments[0](value); else setTimeout(look, 100); };
look();
"""


@dataclass(frozen=True)
class Browser:
    """One window."""

    session: str

    def go(self, url: str) -> None:
        """Open a page."""
        _call("POST", f"{self.session}/url", {"url": url})

    def ask(self, script: str) -> Any:
        """Return the value of an expression on the page."""
        return _call("POST", f"{self.session}/execute/sync", {"script": f"return {script}", "args": []})

    def wait(self, script: str, timeout_s: float) -> Any:
        """Return the value of an expression once it is true; the page itself looks, ten times a second."""
        _call("POST", f"{self.session}/timeouts", {"script": int(1000 * timeout_s)})
        try:
            return _call("POST", f"{self.session}/execute/async", {"script": WAITING % script, "args": []})
        except HTTPError as error:
            shown = self.ask("document.body.innerText")
            raise AssertionError(f"{script} is not true after {timeout_s} s; the page says:\n{shown}") from error

    def resize(self, width: int, height: int) -> None:
        """Give the window another size."""
        _call("POST", f"{self.session}/window/rect", {"width": width, "height": height})

    def complaints(self) -> list[str]:
        """Return the browser's complaints since the last call: faults of scripts, and requests against a policy."""
        logged = _call("POST", f"{self.session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in logged if entry["level"] == "SEVERE"]

    def picture(self, path: Path) -> None:
        """Write a picture of the window to a file."""
        path.write_bytes(base64.b64decode(_call("GET", f"{self.session}/screenshot")))


@contextmanager
def browsing(folder: Path, port: int) -> Iterator[Browser]:
    """Open a browser with its profile in `folder`, driven through `port`."""
    assert CHROMIUM is not None
    assert DRIVER is not None
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert driver.stdout is not None
        assert any("started successfully" in line for line in driver.stdout)
        options = {"binary": CHROMIUM, "args": [*ARGUMENTS, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        base = f"http://127.0.0.1:{port}/session"
        made = _call("POST", base, {"capabilities": {"alwaysMatch": wanted}})
        session = f"{base}/{made['sessionId']}"
        try:
            yield Browser(session)
        finally:
            _call("DELETE", session)
    finally:
        driver.terminate()
        driver.communicate(timeout=30)


def _call(method: str, url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=500) as answer:
        return json.load(answer)["value"]
