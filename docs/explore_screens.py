"""The three screens of docs/explore.md, photographed in Debian's chromium: `python docs/explore_screens.py`."""

import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

import paligemma
from paligemma import explore

HERE = Path(__file__).parent
SCENE = HERE.parent / "examples" / "scene.png"
SCREENS = {  # name of the picture: prompt, view
    "explore_attention": ("caption en", "#attention?token=2&layer=4&head=-1"),
    "explore_words": ("caption en", "#words?layer=5&patch=53"),
    "explore_routes": ("answer en what color is the umbrella ?", "#routes"),
}
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]


def sized(browser: webdriver.Chrome, height: int) -> None:
    metrics = {"width": 980, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def main() -> None:
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        options = webdriver.ChromeOptions()
        for argument in (*QUIET, f"--user-data-dir={folder}/profile"):
            options.add_argument(argument)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        for name, (prompt, view) in SCREENS.items():
            explore.page(explore.look(pg, SCENE, prompt), f"{folder}/{name}.html")
            sized(browser, 100)
            browser.get(f"file://{folder}/{name}.html{view}")
            ready = "return document.documentElement.dataset.ready"
            WebDriverWait(browser, 20).until(lambda b, ready=ready: b.execute_script(ready) == "1")
            sized(browser, browser.execute_script("return document.documentElement.scrollHeight"))
            browser.save_screenshot(f"{folder}/{name}.png")
            Image.open(f"{folder}/{name}.png").convert("RGB").quantize(256, kmeans=2).save(
                HERE / f"{name}.png", optimize=True
            )
        browser.quit()


if __name__ == "__main__":
    main()
