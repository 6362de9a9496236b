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
SCREENS = {  # name of the picture: prompt, view, height
    "explore_attention": ("caption en", "#attention?token=2&layer=4&head=-1", 1240),
    "explore_words": ("caption en", "#words?layer=5&patch=19", 1000),
    "explore_routes": ("answer en what color is the umbrella ?", "#routes", 760),
}
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]


def main() -> None:
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        options = webdriver.ChromeOptions()
        for argument in (*QUIET, f"--user-data-dir={folder}/profile"):
            options.add_argument(argument)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        for name, (prompt, view, height) in SCREENS.items():
            explore.page(explore.look(pg, SCENE, prompt), f"{folder}/{name}.html")
            browser.set_window_size(980, height)
            browser.get(f"file://{folder}/{name}.html{view}")
            ready = "return document.documentElement.dataset.ready"
            WebDriverWait(browser, 20).until(lambda b, ready=ready: b.execute_script(ready) == "1")
            browser.save_screenshot(f"{folder}/{name}.png")
            Image.open(f"{folder}/{name}.png").convert("P", palette=Image.Palette.ADAPTIVE).save(HERE / f"{name}.png")
        browser.quit()


if __name__ == "__main__":
    main()
