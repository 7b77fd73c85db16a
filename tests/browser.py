"""A headless Chromium for the tests, driven over the DevTools protocol through two pipes.

No driver and no package is needed: Chromium reads commands from file 3 and writes answers to file
4, each a json text that ends in a zero byte.

    with Browser() as browser:
        browser.open(path)
        browser.evaluate("1 + 1")
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowUp": 38, "ArrowDown": 40, "Tab": 9, " ": 32,
        "Home": 36, "End": 35, "PageUp": 33, "PageDown": 34}


def find_browser():
    """Path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. What it asked the network for, what scripts complained of: `requests`, `errors`."""

    def __init__(self):
        self.requests, self.errors, self.numbers = [], [], itertools.count(1)
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self.write_to = os.pipe()
        self.read_from, from_browser = os.pipe()
        command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                   "--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars",
                   "--remote-debugging-pipe", f"--user-data-dir={self.folder.name}"]
        # the shell makes the two pipes its files 3 and 4; "$@" is the browser's command
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.unread, self.session = b"", None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target,
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.session = None
            self.send("Browser.close")
        except (OSError, EOFError):
            self.process.kill()
        self.process.wait(20)
        os.close(self.write_to)
        os.close(self.read_from)
        self.folder.cleanup()

    def send(self, method, **params):
        """A command -> its result. Events that come before it are looked at and dropped."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.write_to, data):]
        while True:
            answer = self.read()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def read(self, seconds=60):
        """The next message of the browser."""
        end = time.time() + seconds
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.read_from], [], [], max(0, end - time.time()))
            assert ready, f"the browser has been silent for {seconds} s"
            data = os.read(self.read_from, 1 << 16)
            if not data:
                raise EOFError("the browser has ended")
            self.unread += data
        text, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"])
        return message

    def open(self, path):
        """Opens a file and waits until it has loaded."""
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self.evaluate("document.readyState") != "complete":
            time.sleep(0.02)

    def evaluate(self, expression):
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def call(self, function, *arguments):
        """function(*arguments), where the arguments are anything that json can say."""
        return self.evaluate(f"({function})({', '.join(map(json.dumps, arguments))})")

    def look(self, width, height, dark=False):
        """The window's size in pixels, and light or dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def key(self, name, times=1):
        """Presses a key, as often as told."""
        codes = {"key": name, "code": "Space" if name == " " else name,
                 "windowsVirtualKeyCode": KEYS[name]}
        for _ in range(times):
            text = {"text": " "} if name == " " else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", **codes, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", **codes)

    def mouse(self, kind, x, y):
        """kind: mousePressed, mouseMoved or mouseReleased, at a point of the window."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1,
                  clickCount=1)

    def drag(self, start, end):
        self.mouse("mousePressed", *start)
        self.mouse("mouseMoved", *end)
        self.mouse("mouseReleased", *end)

    def screenshot(self, path, whole=True):
        """A png of the page, all of it or what the window shows."""
        picture = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))
