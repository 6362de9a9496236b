"""The page in a real browser: every task by mouse and by keyboard alone, and the pixels that it draws."""

import json
import shutil
import subprocess
import time

import numpy as np
import pytest
from page_browser import Page, needs_browser, start_browser
from PIL import Image
from serving import running

from paligemma.answers.drawing import _pixel_box

pytestmark = [pytest.mark.slow, needs_browser]
SCENE = "examples/scene.png"


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    Image.open(SCENE).save(path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = start_browser(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def url(pg):
    with running(pg, embedded=True) as server:
        yield server.url + "/"


@pytest.fixture
def page(browser, url):
    page = Page(browser, url)
    page.usual_size()
    return page.open()


# ---------------------------------------------------------------------------------------------- tasks


def test_every_task_by_mouse(page, scene, pg):
    page.pick(scene)
    assert page.text("#picture-name") == "scene.png · 384 × 384"
    for name, field, value, answer in (
        ("caption", None, None, pg.caption(SCENE)),
        ("ask", "#question", "what color is the book ?", pg.ask(SCENE, "what color is the book ?")),
        ("ocr", None, None, pg.ocr(SCENE)),
        ("free", "#free", "answer en how many objects are there ?", pg.ask(SCENE, "how many objects are there ?")),
    ):
        page.click(f"input[value={name}]")
        if field:
            page.find(field).send_keys(value)
        page.run()
        assert page.text("#text") == answer.text, name
        assert f"score {answer.score:.2f}" in page.text("#status")
        assert not page.shown("#found")
    for name, items in (("detect", pg.detect(SCENE, ["book", "house"])), ("segment", pg.segment(SCENE, ["book"]))):
        page.click(f"input[value={name}]")
        page.labels(*dict.fromkeys(item.label for item in items))
        page.run()
        expected = [[item.label, f"{item.score:.2f}", *(f"{edge:.0f}" for edge in item.box)] for item in items]
        cells = "return [...document.querySelectorAll('#rows tr')].map(r => [...r.children].map(c => c.textContent))"
        assert page.script(cells) == expected
        assert not page.shown("#text") and page.shown("#found")


def test_every_task_by_keyboard_alone(page, pg):
    """Tab, arrows, Enter, Ctrl+Enter; never a pointer. The file dialog belongs to the system, so: the example."""
    from selenium.webdriver.common.keys import Keys

    page.tab_to("#example")
    page.press(Keys.ENTER)
    page.picture_is_there()
    assert page.script("return document.activeElement.id") == "run"
    page.press(Keys.ENTER)
    page.finished()
    assert page.text("#text") == pg.caption(SCENE).text
    assert page.script("return document.activeElement.id") == "run", "the focus stays where it was"
    page.script("document.activeElement.blur(); scrollTo(0, 0)")
    page.tab_to("input[name=task]")
    for name in ("ask", "ocr", "detect", "segment", "free"):
        page.press(Keys.ARROW_RIGHT)
        assert page.script("return document.activeElement.value") == name
        if name == "free":
            page.tab_to("#free")
            page.press("caption en")
        page.press(Keys.ENTER, holding=Keys.CONTROL)
        page.finished()
        assert page.text("#prompt") == {
            "ask": "answer en what color is the umbrella ?", "ocr": "ocr", "detect": "detect book ; umbrella ; house",
            "segment": "segment book ; umbrella ; house", "free": "caption en",
        }[name]  # fmt: skip
        assert not page.shown("#error")


def test_labels_are_chips(page):
    from selenium.webdriver.common.keys import Keys

    page.task("detect")
    field = page.find("#label")
    field.send_keys("red book" + Keys.ENTER)
    field.send_keys("house;")
    field.send_keys("ball")
    assert page.text("#prompt") == "detect red book ; house ; ball"
    field.send_keys(Keys.TAB)  # leaving the field ends the label
    chips = "return [...document.querySelectorAll('#labels li')].map(li => li.childNodes[1].textContent)"
    assert page.script(chips) == ["red book", "house", "ball"]
    field.send_keys(Keys.BACKSPACE)
    assert page.script(chips) == ["red book", "house"]
    page.click("#labels button[aria-label='Remove red book']")
    assert page.script(chips) == ["house"] and page.text("#prompt") == "detect house"
    field.send_keys("house" + Keys.ENTER)
    assert page.script(chips) == ["house"], "a label is there once"


def test_what_is_missing_is_asked_for(page):
    page.click("#run")
    assert page.text("#status") == "Choose a picture first."
    page.click("#example")
    page.picture_is_there()
    page.task("free")
    page.click("#run")
    assert page.text("#status") == "Fill in this field first."
    assert page.script("return document.activeElement.id") == "free"


# ---------------------------------------------------------------------------------------------- pictures


def test_pictures_are_dropped_and_pasted(page, scene):
    page.drop(scene)
    assert "384 × 384" in page.text("#picture-name")
    page.drop(scene, "paste")
    page.run()
    assert "book" in page.text("#text")


@pytest.mark.parametrize("orientation", [6, 7])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_exif_orientation_is_the_same_for_page_and_server(page, tmp_path, pg, orientation, ending):
    """A picture that lies on its side in the file: the box is where the thing is seen."""
    turned = {6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}
    upright = Image.open(SCENE).convert("RGB").crop((0, 0, 384, 300))
    exif = Image.Exif()
    exif[274] = orientation
    stored = upright.transpose(turned[orientation])
    options = {"lossless": True} if ending == "webp" else {"quality": 95}
    stored.save(tmp_path / f"photo.{ending}", exif=exif, **options)
    page.pick(tmp_path / f"photo.{ending}")
    seen = (
        stored if ending == "webp" else upright
    )  # chromium leaves a WebP as it lies; then that is what is asked about
    assert page.text("#picture-name") == f"photo.{ending} · {seen.width} × {seen.height}"
    page.task("detect")
    page.labels("book")
    page.run()
    (book,) = pg.detect(seen, ["book"])
    assert len(page.rows()) == 1
    numbers = [float(number) for number in page.rows()[0].split()[-4:]]
    assert numbers == pytest.approx(list(book.box), abs=9)


def test_a_huge_photo_is_sent_smaller_and_told_in_its_own_pixels(page, tmp_path, pg):
    scene = Image.open(SCENE).convert("RGB")
    scene.resize((7680, 7680), Image.Resampling.BICUBIC).save(tmp_path / "phone.jpg", quality=80)  # 59 million pixels
    page.pick(tmp_path / "phone.jpg")
    assert page.text("#picture-name") == "phone.jpg · 7680 × 7680, sent as 2048 × 2048"
    page.task("segment")
    page.labels("book")
    page.run()
    numbers = [float(number) for number in page.rows()[0].split()[-4:]]
    (book,) = pg.segment(scene, ["book"])
    assert numbers == pytest.approx([20 * edge for edge in book.box], abs=20 * 384 / 128)
    copied = copied_json(page)
    assert copied["image_size"] == [7680, 7680]
    assert copied["segments"][0]["mask"]["size"] == [7680, 7680]
    assert sum(copied["segments"][0]["mask"]["counts"]) == 7680 * 7680


def test_transparent_pixels_are_white_for_both(page, tmp_path):
    Image.new("RGBA", (60, 40), (0, 0, 0, 0)).save(tmp_path / "clear.webp", lossless=True)
    page.pick(tmp_path / "clear.webp")
    pixel = """
        const pen = new OffscreenCanvas(1, 1).getContext('2d');
        pen.drawImage(document.getElementById('picture'), 0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data]"""
    assert page.script(pixel) == [255, 255, 255, 255]


def test_what_is_no_picture_is_said(page, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    page.find("#file").send_keys(str(tmp_path / "notes.png"))
    page.wait("!document.getElementById('error').hidden")
    assert "notes.png is not a picture that this browser can show" in page.text("#error")


# ---------------------------------------------------------------------------------------------- boxes and masks


def chip_color(page, label):
    code = "return getComputedStyle(document.querySelector(`.swatch[data-label='${arguments[0]}']`)).backgroundColor"
    return tuple(int(value) for value in page.script(code, label)[4:-1].split(","))


def of_color(canvas, color):
    return (np.abs(canvas[..., :3].astype(int) - color).max(-1) <= 2) & (canvas[..., 3] == 255)


@pytest.mark.parametrize("density", [1, 2, 3])
def test_a_box_is_drawn_where_the_library_draws_it(page, scene, pg, density):
    page.size(1000, 900, density)
    page.pick(scene)
    page.task("detect")
    page.labels("umbrella")
    page.run()
    canvas = page.overlay()
    scale = canvas.shape[1] / 384
    width = page.script("return document.getElementById('overlay').getBoundingClientRect().width")
    assert canvas.shape[1] == round(width * density), "one pixel of the canvas is one of the screen"
    (umbrella,) = pg.detect(SCENE, ["umbrella"])
    left, top, right, bottom = _pixel_box(umbrella.box, scale, (canvas.shape[1], canvas.shape[0]))
    drawn = of_color(canvas, chip_color(page, "umbrella"))
    middle = (top + bottom) // 2  # a row of pixels that crosses both sides, far from the label
    columns = np.flatnonzero(drawn[middle])
    assert abs(columns[0] - left) <= 1 and abs(columns[-1] + 1 - right) <= 1
    rows = np.flatnonzero(drawn[:, (left + 2 * right) // 3])
    assert abs(rows[-1] + 1 - bottom) <= 1 and abs(rows[rows > top - 2][0] - top) <= 2
    assert not canvas[middle, : left - 2].any() and not canvas[middle, right + 2 :].any(), "nothing outside"


def test_a_mask_covers_the_pixels_that_it_names(page, scene, pg):
    page.size(1000, 900)
    page.pick(scene)
    page.task("segment")
    page.labels("book")
    page.run()
    canvas = page.overlay()
    (book,) = pg.segment(SCENE, ["book"])
    height, width = canvas.shape[:2]
    expected = np.array(Image.fromarray(book.mask).resize((width, height), Image.Resampling.NEAREST))
    left, top, right, bottom = _pixel_box(book.box, width / 384, (width, height))
    inside = np.s_[top + 6 : bottom - 6, left + 6 : right - 6]  # within the lines of the box
    drawn, wanted = canvas[inside][..., 3] > 60, expected[inside]
    assert (drawn & wanted).sum() / (drawn | wanted).sum() > 0.98
    blue = np.array(chip_color(page, "book"))
    tint = canvas[inside][wanted & (canvas[inside][..., 3] < 200), :3].astype(int)
    assert np.abs(np.median(tint, 0) - blue).max() <= 3


def test_rows_and_boxes_light_up_together(page, scene):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    page.pick(scene)
    page.task("detect")
    page.labels("book", "umbrella", "house")
    page.run()
    chosen = "return [...document.querySelectorAll('#rows tr')].map(r => r.classList.contains('chosen'))"
    before = page.overlay()
    # From the table to the picture: the pointer, then the focus.
    ActionChains(page.browser).move_to_element(page.find("#rows tr:nth-child(2)")).perform()
    assert page.script(chosen) == [False, True, False]
    assert (page.overlay() != before).any()
    page.tab_to("#rows tr:nth-child(1) button")
    page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert page.script(chosen) == [False, False, True]
    # From the picture to the table: the middle of the book, then a click that stays.
    canvas = page.find("#overlay")
    scale = canvas.size["width"] / 384
    book = (int((159 - 192) * scale), int((120 - 192) * scale))
    ActionChains(page.browser).move_to_element_with_offset(canvas, *book).click().move_to_element(
        page.find("h1")
    ).perform()
    assert page.script(chosen) == [True, False, False]
    assert page.find("#rows tr:nth-child(1) button").get_attribute("aria-pressed") == "true"
    page.press(Keys.ESCAPE)
    assert page.script(chosen) == [False, False, False]


# ---------------------------------------------------------------------------------------------- what leaves the page


def copied(page, button):
    """What the button put on the clipboard."""
    page.script("navigator.clipboard.writeText = async (text) => { window.copied = text; }; window.copied = undefined")
    page.click(button)
    page.wait("window.copied !== undefined")
    return page.script("return window.copied")


def copied_json(page):
    return json.loads(copied(page, "#copy-json"))


def test_json_is_what_the_server_answered(page, scene, pg):
    page.pick(scene)
    page.task("detect")
    page.labels("book")
    page.run()
    answer = copied_json(page)
    (book,) = pg.detect(SCENE, ["book"])
    assert answer["image"] == "scene.png" and answer["prompt"] == "detect book" and answer["finished"]
    assert answer["detections"][0]["box"] == list(book.box)
    assert answer["detections"][0]["score"] == pytest.approx(book.score, abs=1e-5)
    assert page.text("#copy-json") == "Copied"
    page.click("#copy-json")  # once more, before the button has its own words again
    time.sleep(2)  # 1.5 s after each click it gets them back
    page.wait("document.getElementById('copy-json').textContent === 'Copy JSON'")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("name", ["scene.png", """it's "my" photo; $HOME.png"""])
def test_the_copied_command_asks_the_same(page, tmp_path, pg, name):
    Image.open(SCENE).save(tmp_path / name)
    page.pick(tmp_path / name)
    page.task("detect")
    page.labels("book")
    page.run()
    command = copied(page, "#copy-curl")
    assert command.startswith(f"curl '{page.url}v1/answer'")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["image"] == name.replace('"', "%22")  # as curl and browsers write it in a form
    assert answer["prompt"] == "detect book"
    assert answer["detections"][0]["box"] == list(pg.detect(SCENE, ["book"])[0].box)


def test_the_picture_is_saved_with_its_boxes(page, scene, browser, tmp_path):
    page.pick(scene)
    page.task("detect")
    page.labels("umbrella")
    page.run()
    catch = """
        const click = HTMLAnchorElement.prototype.click;
        HTMLAnchorElement.prototype.click = function () { window.saved = { url: this.href, name: this.download }; };"""
    page.script(catch)
    page.click("#save")
    page.wait("window.saved !== undefined")
    assert page.script("return window.saved.name") == "scene-answer.png"
    measure = "const [done] = arguments, made = new Image(); made.onload = () => done([made.width, made.height]);"
    size = browser.execute_async_script(measure + "made.src = saved.url")
    assert size == [1024, 1024], "a small picture is enlarged, so that its labels can be read"
