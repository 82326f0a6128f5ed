"""A headless Chromium of this machine, spoken to by its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A tab. What the page writes to the console, and what fails in it, is in ``problems``."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900) -> None:
        import websocket

        assert CHROMIUM is not None
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--remote-debugging-port=0", "--remote-allow-origins=*"]
        self.log = open(folder / "chromium.log", "wb")  # noqa: SIM115
        words = [
            CHROMIUM,
            *flags,
            f"--user-data-dir={folder / 'chromium'}",
            f"--window-size={width},{height}",
            "about:blank",
        ]
        self.process = subprocess.Popen(words, stdout=self.log, stderr=self.log)
        place, end = folder / "chromium" / "DevToolsActivePort", time.monotonic() + 60
        while not place.exists() or "\n" not in place.read_text():
            assert time.monotonic() < end, "Chromium does not start"
            assert self.process.poll() is None, (folder / "chromium.log").read_text()
            time.sleep(0.05)
        port = place.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
            tab = next(one for one in json.load(answer) if one["type"] == "page")
        self.link: Any = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=60)
        self.count = 0
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its answer."""
        self.count += 1
        self.link.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            said = json.loads(self.link.recv())
            if said.get("id") == self.count:
                assert "error" not in said, said
                return dict(said["result"])
            if said.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.problems.append(json.dumps(said["params"])[:2000])

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)

    def ask(self, expression: str) -> Any:
        """What an expression of JavaScript comes to in the page."""
        result = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def shape(self, width: int, height: int, dark: bool = False) -> None:
        """The size of the window, and whether the user likes it dark."""
        self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = "dark" if dark else "light"
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> None:
        """A picture of the whole page."""
        data = self.do("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self.link.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
