"""Our two pages in Debian's chromium, driven by selenium: what the tests of the page of `paligemma serve` and of the
look-inside page have in common."""

import base64
import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

needs_browser = pytest.mark.skipif(shutil.which("chromedriver") is None, reason="needs chromium and chromedriver")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


def axe_core(config):
    """The source of axe-core, an accessibility checker, from npm; kept in pytest's cache."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm, for axe-core")
    folder = config.cache.mkdir("axe-core")
    script = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists():
        command = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run([*command, "axe-core@4.14.1"], capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"axe-core could not be installed: {done.stderr.strip()[-200:]}")
    return script.read_text(encoding="utf-8")


def violations(browser, axe):
    """What axe-core finds wrong with the page as it is shown: [(rule, elements)]."""
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})  # a page's CSP does not concern the debugger
    found = browser.execute_async_script("const done = arguments[0]; axe.run().then((r) => done(r.violations))")
    return [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]


def start_browser(folder):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for argument in (*QUIET, f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900"):
        options.add_argument(argument)
    downloads = {"download.default_directory": str(folder), "download.prompt_for_download": False}
    options.add_experimental_option("prefs", downloads)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


class Page:
    """What a person does with the page, and what they see."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url

    def open(self):
        self.browser.get("about:blank")
        self.browser.get(self.url)
        self.browser.execute_script("sessionStorage.clear()")
        self.browser.get(self.url)
        self.wait("document.body.dataset.state !== undefined")
        return self

    def script(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def wait(self, condition, seconds=20):
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, seconds, 0.03).until(lambda _: self.script(f"return {condition}"), condition)

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def text(self, selector):
        return self.find(selector).text

    def shown(self, selector):
        return self.find(selector).is_displayed()

    def click(self, selector):
        self.find(selector).click()

    def press(self, *keys, holding=None):
        from selenium.webdriver import ActionChains

        actions = ActionChains(self.browser)
        if holding:
            actions = actions.key_down(holding)
        actions = actions.send_keys(*keys)
        (actions.key_up(holding) if holding else actions).perform()

    def tab_to(self, selector, most=40):
        from selenium.webdriver.common.keys import Keys

        for _ in range(most):
            if self.script("return document.activeElement.matches(arguments[0])", selector):
                return
            self.press(Keys.TAB)
        raise AssertionError(f"{selector} is not reached by the Tab key")

    # What is done

    def pick(self, path):
        before = self.script("return document.getElementById('picture').src")
        self.find("#file").send_keys(str(path))
        self.picture_is_there(before)

    def picture_is_there(self, before=""):
        self.wait(f"document.getElementById('picture').src !== {json.dumps(before)}")
        self.wait("document.getElementById('picture').complete && !document.getElementById('frame').hidden")
        self.wait("document.getElementById('status').textContent === ''")

    def drop(self, path, event="drop"):
        """Drops a file on the page, or with event "paste" pastes it."""
        data = base64.b64encode(path.read_bytes()).decode()
        before = self.script("return document.getElementById('picture').src")
        code = """
            const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
            transfer.items.add(new File([bytes], arguments[1], { type: "image/png" }));
            const made = arguments[2] === "drop" ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true })
                : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true });
            document.body.dispatchEvent(made);"""
        self.script(code, data, path.name, event)
        self.picture_is_there(before)

    def task(self, name):
        self.script("document.querySelector(`input[name=task][value=${arguments[0]}]`).click()", name)

    def labels(self, *labels):
        field = self.find("#label")
        while self.browser.find_elements("css selector", "#labels button"):
            self.click("#labels button")
        for label in labels:
            field.send_keys(label + "\n")

    def run(self):
        self.click("#run")
        self.finished()

    def finished(self):
        self.wait("document.getElementById('stop').hidden && !document.getElementById('actions').hidden")

    # What is seen

    def rows(self):
        return [row.text.split("\n")[-1] for row in self.browser.find_elements("css selector", "#rows tr")]

    def overlay(self):
        """The canvas over the picture: uint8 [H, W, 4]"""
        url = self.script("return document.getElementById('overlay').toDataURL()")
        return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))

    def requests(self):
        """The URLs of everything that was asked since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        ours = [request for request in sent if request["documentURL"].startswith(self.url)]
        return [request["request"]["url"] for request in ours]

    def scheme(self, name):
        feature = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)

    def size(self, width, height=800, density=1, mobile=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": density, "mobile": mobile}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": mobile})

    def usual_size(self):
        self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
