"""`examples/browser`: the embedded model answers in a real browser, from files that lie beside the page."""

import functools
import http.server
import importlib.util
import json
import threading
from pathlib import Path

import pytest
from page_browser import needs_browser, start_browser
from test_node import modules  # noqa: F401  (a fixture)

import paligemma

pytest.importorskip("onnx_ir", reason="needs the extra `export`")

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, needs_browser]


class Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(modules, tmp_path_factory):  # noqa: F811
    """The folder, and its address on a server like `python -m http.server`."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "examples" / "build_browser.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    folder = tmp_path_factory.mktemp("site") / "web"
    build.build(folder, modules / "node_modules")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_it_is_small(site):
    folder, _ = site
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 40e6


def test_caption_question_and_boxes(site, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    _, url = site
    browser = start_browser(tmp_path)
    browser.set_script_timeout(120)
    try:
        browser.get(url)
        root = "document.documentElement.dataset"
        WebDriverWait(browser, 120).until(lambda b: b.execute_script(f"return {root}.ready") == "1")

        def answer(prompt):
            browser.execute_script(
                f"delete {root}.answer; document.getElementById('prompt').value = arguments[0]", prompt
            )
            browser.find_element("id", "run").click()
            return WebDriverWait(browser, 120).until(lambda b: b.execute_script(f"return {root}.answer"))

        pg, scene = paligemma.load("tiny", device="cpu", dtype="float32"), ROOT / "examples" / "scene.png"
        for prompt in ("caption en", "answer en is there a book ?"):
            assert answer(prompt) == pg.generate(scene, prompt).text  # 8 bits, and pixels resized by the browser
        red = "return [...document.getElementById('canvas').getContext('2d').getImageData(0, 0, 1e3, 1e3).data]"
        plain = browser.execute_script(red)
        (found,) = paligemma.parse(answer("detect book"), image_size=(384, 384)).detections
        (expected,) = pg.detect(scene, ["book"])
        assert found.label == "book" and found.box == pytest.approx(expected.box, abs=8)
        assert browser.find_element("id", "answer").text == "1 found: book"
        assert browser.execute_script(red) != plain  # the box is drawn
        requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [one["params"]["request"]["url"] for one in requests if one["method"] == "Network.requestWillBeSent"]
        over_http = [one for one in asked if one.startswith("http")]
        assert over_http and all(one.startswith(url) for one in over_http), over_http
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        browser.save_screenshot(str(tmp_path / "page.png"))
    finally:
        browser.quit()
