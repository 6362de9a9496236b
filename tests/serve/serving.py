"""For the tests of the server: one in a thread, over a real socket, and what is sent to it."""

import base64
import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from paligemma.serve.app import create_app
from paligemma.serve.server import Server, listen
from paligemma.serve.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples"
SCENE = (EXAMPLES / "scene.png").read_bytes()


class Running:
    """A server on a free port of this machine, until it is stopped."""

    def __init__(self, load, settings, wait=True):
        self.listening, self.url = listen("127.0.0.1", 0)
        self.ready = threading.Event()
        self.server = Server(create_app(load, settings), settings, self.ready.set)
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],), daemon=True)
        self.thread.start()
        assert not wait or self.ready.wait(60)

    @property
    def service(self):
        return self.server.service

    @property
    def address(self):
        """(host, port)"""
        return self.listening.getsockname()

    def client(self, **options):
        return httpx.Client(base_url=self.url, **{"timeout": 60, "verify": False, **options})

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(pg, **settings):
    """A server of its own, for tests that change what it is set to or break it."""
    server = Running(lambda: pg, Settings(**settings))
    try:
        yield server
    finally:
        server.stop()


def data_url(data=SCENE, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(seed, side=128):
    """Some picture of its own, as a PNG: noise in big squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return png(Image.fromarray(squares).resize((side, side), Image.Resampling.NEAREST))


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def chat(prompt="caption en", image=SCENE, **fields):
    """The body of a chat request."""
    parts = [{"type": "text", "text": prompt}]
    if image is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": data_url(image)}})
    return {"model": "tiny", "messages": [{"role": "user", "content": parts}], **fields}


def error_of(response):
    """(status, code, param) of an error, whose form is checked."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return response.status_code, error["code"], error["param"]


def wait_until(holds, seconds=20):
    """Until something holds that another thread brings about."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


class Command:
    """`paligemma serve` in a process of its own."""

    def __init__(self, *options, wait=True, log=subprocess.PIPE, **environment):
        command = [sys.executable, "-m", "paligemma", "serve", "--port", "0", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        self.url = self.process.stdout.readline().strip() if wait else None

    def resident(self):
        """Bytes of memory that it holds now."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def end(self, sig=signal.SIGTERM, seconds=60):
        """(exit code, rest of stdout, stderr)"""
        self.process.send_signal(sig)
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
