"""The pictures of docs/serving.md: the page of `paligemma serve`, photographed in Debian's chromium.

python docs/serve_screens.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

HERE = Path(__file__).parent
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
SCREENS = {  # name of the picture: views side by side, each (width, height, scheme, task)
    "serve_page": [(1260, 920, "light", "segment")],
    "serve_phone": [(360, 960, "light", "ask"), (360, 960, "dark", "detect")],
}


def view(browser: webdriver.Chrome, url: str, width: int, height: int, scheme: str, task: str) -> None:
    """The page as it stands after the example was answered."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 500})
    dark_or_light = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark_or_light)
    browser.get(url)
    until(browser, "document.body.dataset.state === 'ready'")
    browser.find_element("id", "example").click()
    until(browser, "!document.getElementById('frame').hidden")
    browser.find_element("css selector", f"input[value={task}]").click()
    browser.find_element("id", "run").click()
    until(browser, "!document.getElementById('actions').hidden")
    ActionChains(browser).move_by_offset(5, 5).perform()  # the pointer lights up no row
    browser.execute_script("document.activeElement.blur(); scrollTo(0, arguments[0])", scroll(browser, width))


def scroll(browser: webdriver.Chrome, width: int) -> int:
    """A telephone shows the page from its picture on."""
    return browser.execute_script("return document.querySelector('.stage').offsetTop - 12") if width < 500 else 0


def until(browser: webdriver.Chrome, condition: str) -> None:
    WebDriverWait(browser, 30).until(lambda b: b.execute_script(f"return {condition}"))


def main() -> None:
    command = [sys.executable, "-m", "paligemma", "serve", "--port", "0"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        options = webdriver.ChromeOptions()
        for argument in (*QUIET, f"--user-data-dir={folder}/profile"):
            options.add_argument(argument)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        for name, views in SCREENS.items():
            shots = []
            for i, one in enumerate(views):
                view(browser, url, *one)
                browser.save_screenshot(f"{folder}/{i}.png")
                shots.append(Image.open(f"{folder}/{i}.png").convert("RGB"))
            width = sum(shot.width for shot in shots) + 24 * (len(shots) - 1)
            sheet = Image.new("RGB", (width, shots[0].height), "white")
            left = 0
            for shot in shots:
                sheet.paste(shot, (left, 0))
                left += shot.width + 24
            sheet.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2).save(HERE / f"{name}.png", optimize=True)
        browser.quit()
        server.terminate()


if __name__ == "__main__":
    main()
