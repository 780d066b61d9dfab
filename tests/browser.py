"""Drives a headless Chromium over its debugging pipe, with nothing but Python."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """A page of Chromium. `errors` are what its console said of errors, and uncaught exceptions."""

    def __init__(self, width=1360, height=900):
        to_browser, from_browser = os.pipe(), os.pipe()
        ends = to_browser[0], from_browser[1]

        def connect():
            # Copies first: the ends may be 3 or 4 themselves.
            copies = [os.dup(end) for end in ends]
            for copy, number in zip(copies, (3, 4), strict=True):
                os.dup2(copy, number)

        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        arguments += [
            "--disable-dev-shm-usage",
            "--no-first-run",
            f"--window-size={width},{height}",
        ]
        self._process = subprocess.Popen(
            [CHROMIUM, *arguments, "about:blank"],
            pass_fds=(3, 4),
            preexec_fn=connect,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        self._write, self._read = os.fdopen(to_browser[1], "wb"), from_browser[0]
        self._left, self._number, self._session, self.errors = b"", 0, None, []
        (target,) = [
            t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"
        ]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Performance"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Returns what the browser answers."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._receive()
            self._note(answer)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self):
        while b"\0" not in self._left:
            block = os.read(self._read, 1 << 20)
            assert block, "the browser has ended"
            self._left += block
        line, _, self._left = self._left.partition(b"\0")
        return json.loads(line)

    def _note(self, event):
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        if event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.errors.append(str(parameters["args"]))
        if event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(str(parameters["entry"]["text"]))

    def run(self, script):
        """Returns the value of an expression, awaited if it is a promise."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def open(self, file, fragment, ready):
        """Opens a file anew, and waits until the selector `ready` is there."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=f"{Path(file).as_uri()}#{fragment}")
        self.wait(f"document.querySelector({json.dumps(ready)}) !== null")

    def wait(self, condition, seconds=120):
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.05)

    def emulate(self, *, width, height, scheme):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def cpu_seconds(self):
        """Returns how long the page's main thread has worked so far. A busy machine does not make
        it longer."""
        metrics = self.call("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "ThreadTime")

    def close(self):
        with contextlib.suppress(BrokenPipeError, AssertionError):
            self._session = None
            self.call("Browser.close")
        self._process.wait(timeout=30)
        self._write.close()
        os.close(self._read)
