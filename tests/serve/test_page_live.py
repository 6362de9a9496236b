"""The page while an answer is written, when something goes wrong, and on every screen: also in a real browser."""

import itertools
import json
import time
import urllib.request

import pytest
from page_browser import Page, axe_core, needs_browser, start_browser, violations
from PIL import Image
from selenium.webdriver.common.keys import Keys
from serving import running

from paligemma.serve.engine_thread import EngineThread

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
    """Of a server that takes its time for each token."""
    step = EngineThread._step
    with pytest.MonkeyPatch.context() as patch, running(pg, embedded=True) as server:
        patch.setattr(EngineThread, "_step", lambda self: (step(self), time.sleep(0.03)))
        yield server.url + "/"


@pytest.fixture
def page(browser, url, scene):
    page = Page(browser, url)
    page.usual_size()
    page.scheme("light")
    page.open().pick(scene)
    return page


def cancelled_and_running(url):
    with urllib.request.urlopen(url + "metrics") as reply:
        lines = reply.read().decode().splitlines()
    values = {name: float(value) for name, _, value in (line.partition(" ") for line in lines if line[0] != "#")}
    return values["paligemma_cancelled_total"], values["paligemma_rows_running"]


def row_is_gone(url, cancelled_before):
    """Within a second the server has counted the client that left, and runs nothing."""
    for _ in range(40):
        if cancelled_and_running(url) == (cancelled_before + 1, 0):
            return True
        time.sleep(0.025)
    return False


# ---------------------------------------------------------------------------------------------- while it is written


def test_the_text_grows(page):
    watch = """
        window.seen = [];
        const text = document.getElementById('text');
        new MutationObserver(() => window.seen.push(text.textContent)).observe(text, { childList: true });"""
    page.script(watch)
    page.run()
    seen = [text for text in page.script("return window.seen") if text]
    assert len(seen) > 5
    assert all(after.startswith(before) for before, after in itertools.pairwise(seen))
    assert seen[-1] == page.text("#text")
    assert page.find("#text").get_attribute("aria-busy") == "false"


def test_boxes_appear_while_they_are_written(page, browser):
    page.task("detect")
    page.labels("book", "umbrella", "house")
    page.click("#run")
    page.wait("/^Boxes: book/.test(document.getElementById('overlay').getAttribute('aria-label'))")
    assert page.shown("#stop"), "the first box is there before the answer is complete"
    browser.get_log("browser")
    before, after = page.script("""
        const overlay = document.getElementById("overlay"), { left, top, width } = overlay.getBoundingClientRect();
        const book = { clientX: left + (159 / 384) * width, clientY: top + (120 / 384) * width };
        const before = overlay.toDataURL();
        overlay.dispatchEvent(new MouseEvent("click", book));
        return [before, overlay.toDataURL()];""")
    assert before != after, "the click hits the box, which is drawn as the chosen one"
    assert browser.get_log("browser") == []  # the table has no row yet that the click could show
    page.finished()
    assert len(page.rows()) == 3


@pytest.mark.parametrize("way", ["mouse", "keyboard"])
def test_stop_ends_the_row_on_the_server(page, url, way):
    before = cancelled_and_running(url)[0]
    page.task("segment")
    page.labels("book", "umbrella", "house", "ball")
    page.click("#run")
    page.wait("document.getElementById('status').textContent === 'Writing …'")
    if way == "mouse":
        page.click("#stop")
    else:
        page.press(Keys.ESCAPE)
    page.wait("document.getElementById('stop').hidden")
    assert page.text("#status").startswith("Stopped after")
    assert row_is_gone(url, before)
    page.task("caption")
    page.run()  # and the page goes on
    assert "book" in page.text("#text")


def test_an_answer_that_comes_after_a_new_picture_is_dropped(page, url, tmp_path):
    before = cancelled_and_running(url)[0]
    Image.new("RGB", (200, 100), "white").save(tmp_path / "other.png")
    page.click("#run")
    page.wait("document.getElementById('status').textContent === 'Writing …'")
    page.drop(tmp_path / "other.png")
    assert page.text("#picture-name") == "other.png · 200 × 100"
    assert row_is_gone(url, before)
    time.sleep(0.3)
    assert not page.shown("#answer") and not page.shown("#error") and page.text("#status") == ""


def test_a_run_that_begins_while_a_picture_is_opened_is_dropped(page, tmp_path):
    """Large photos take a second; the question then was about the picture before."""
    Image.new("RGB", (200, 100), "white").save(tmp_path / "other.png")
    slow = """
        const open = window.createImageBitmap, later = () => new Promise((done) => setTimeout(done, 400));
        window.createImageBitmap = (...all) => later().then(() => open(...all));"""
    page.script(slow)
    page.find("#file").send_keys(str(tmp_path / "other.png"))
    page.click("#run")
    page.wait("document.getElementById('picture-name').textContent.startsWith('other.png')")
    time.sleep(1.2)
    assert not page.shown("#answer") and not page.shown("#stop")
    page.run()


def test_a_double_click_asks_once(page, browser):
    from selenium.webdriver import ActionChains

    page.requests()
    ActionChains(browser).double_click(page.find("#run")).perform()
    page.press(Keys.ENTER, holding=Keys.CONTROL)
    page.finished()
    assert sum(address.endswith("/v1/chat/completions") for address in page.requests()) == 1


def test_look_inside_opens_the_page_of_this_picture_and_prompt(page, browser):
    page.run()
    answer, first = page.text("#text"), browser.current_window_handle
    page.click("#explore")
    try:
        page.wait("/new tab/.test(document.getElementById('status').textContent)", 60)
        (other,) = set(browser.window_handles) - {first}
        browser.switch_to.window(other)
        page.wait("document.documentElement.dataset.ready === '1'")
        assert "/explored/" in browser.current_url
        assert f"caption en → {answer}"[:120] == page.text("h1")
        assert page.script("return window.opener") is None
        page.click("nav a[data-screen=attention]")  # it also works in the sandbox that it is served in
        page.press(Keys.ARROW_RIGHT, Keys.ARROW_UP)
        assert "#attention?token=1&layer=4" in browser.current_url and "layer 4" in page.text("#attention-said")
    finally:
        for handle in set(browser.window_handles) - {first}:
            browser.switch_to.window(handle)
            browser.close()
        browser.switch_to.window(first)


# ---------------------------------------------------------------------------------------------- what goes wrong


def reply_with(page, body, status=200, headers=None):
    """The next requests of the page get this reply."""
    code = (
        "const [body, status, headers] = arguments; window.fetch = async () => new Response(body, { status, headers })"
    )
    page.script(code, body, status, headers or {})


def events(*contents, done=True):
    return "".join(f"data: {json.dumps(content)}\n\n" for content in contents) + ("data: [DONE]\n\n" if done else "")


def piece(**delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


RESULT = {"image_size": [384, 384], "score": 0.5, "finished": True, "invalid": [], "detections": [], "segments": []}


def error_after_run(page):
    page.click("#run")
    page.wait("!document.getElementById('error').hidden")
    page.wait("document.getElementById('stop').hidden")
    return page.text("#error")


def test_errors_are_worded_by_the_server(page):
    page.task("free")
    page.find("#free").send_keys("caption <image>")
    assert "<image>" in error_after_run(page)
    busy = json.dumps(
        {"error": {"message": "the queue is full", "type": "rate_limit_error", "param": None, "code": "x"}}
    )
    reply_with(page, busy, 429, {"Retry-After": "7"})
    assert error_after_run(page) == "the queue is full (try again in 7 s)"
    reply_with(page, "<h1>Bad gateway</h1>", 502)
    assert error_after_run(page).startswith("502")
    reply_with(page, events(piece(content="a red"), {"error": {"message": "the row failed"}}, done=False))
    assert error_after_run(page) == "the row failed"
    assert page.text("#text") == "a red", "what was written stays"
    reply_with(page, events(piece(content="a red"), done=False))
    assert "broke off" in error_after_run(page)
    page.script("window.fetch = async () => { throw new TypeError('Failed to fetch') }")
    assert "does not answer" in error_after_run(page)
    reply_with(page, events(piece(paligemma={**RESULT, "image_size": [300, 384]})))
    assert "300 × 384" in error_after_run(page), "boxes of another picture are not drawn"


def test_markup_is_text(page, tmp_path):
    """In labels, prompts, answers, errors and the names of files."""
    evil = "<img src=x onerror=window.hurt=1>"
    page.task("detect")
    page.labels(evil)
    item = {"label": evil, "box": [10, 10, 90, 90], "score": 0.5}
    reply_with(page, events(piece(content=evil), piece(paligemma={**RESULT, "detections": [item]})))
    page.run()
    assert evil in page.find("#rows").text and evil in page.text("#labels") and evil in page.text("#prompt")
    page.task("caption")
    page.run()
    reply_with(page, json.dumps({"error": {"message": evil}}), 400)
    assert error_after_run(page) == evil
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "<b onclick=1>.png")
    page.pick(tmp_path / "<b onclick=1>.png")
    assert "<b onclick=1>.png" in page.text("#picture-name")
    assert page.script("return window.hurt") is None
    assert page.script("return document.querySelectorAll('main img').length") == 1


def test_a_very_long_answer_has_room(page):
    page.size(360, 740, mobile=True)
    reply_with(page, events(*[piece(content="word " * 50 + "x" * 500)] * 40, piece(paligemma=RESULT)))
    page.run()
    assert page.script("return document.documentElement.scrollWidth") <= 360
    assert page.script("return document.getElementById('text').clientHeight") < 400
    many = [{"label": f"a label with many words {i}", "box": [i, i, 300.5, 301], "score": 0.5} for i in range(200)]
    reply_with(page, events(piece(paligemma={**RESULT, "detections": many})))
    page.run()
    assert len(page.rows()) == 200 and page.script("return document.documentElement.scrollWidth") <= 360


def test_the_slider_leaves_out_what_scores_less(page):
    found = [{"label": name, "box": [10, 10, 90, 90], "score": score} for name, score in (("book", 0.3), ("ball", 0.8))]
    page.task("detect")
    page.labels("book", "ball")
    reply_with(page, events(piece(paligemma={**RESULT, "detections": found})))
    page.run()
    page.tab_to("#score")
    page.press(*[Keys.ARROW_RIGHT] * 31)
    assert len(page.rows()) == 1 and page.text("#count") == "1 of 2 shown."
    page.press(Keys.END)
    assert page.rows() == [] and not page.overlay().any()
    page.press(Keys.HOME)
    assert len(page.rows()) == 2


def test_an_empty_answer_is_said(page):
    page.task("detect")
    page.labels("book")
    reply_with(
        page, events(piece(paligemma={**RESULT, "finished": False, "invalid": [{"span": [0, 1], "reason": "x"}]}))
    )
    page.run()
    assert page.text("#count") == "Nothing found."
    assert page.text("#status").endswith("cut off at its limit of tokens · 1 part could not be read")


# ---------------------------------------------------------------------------------------------- the key


def test_a_key_is_asked_for_and_kept_in_this_tab(browser, pg, scene):
    with running(pg, api_key="open sesame") as server:
        page = Page(browser, server.url + "/").open()
        page.wait("!document.getElementById('key-form').hidden")
        assert page.text("#model") == "needs a key"
        page.press("wrong", Keys.ENTER)  # the field has the focus
        page.wait("document.getElementById('key').value === ''")
        assert page.shown("#key-form")
        page.press("open sesame", Keys.ENTER)
        page.wait("document.getElementById('key-form').hidden")
        page.pick(scene)
        page.run()
        assert "book" in page.text("#text")
        browser.refresh()
        page.wait("document.body.dataset.state === 'ready'")
        assert page.script("return [Object.values(sessionStorage), localStorage.length]") == [["open sesame"], 0]
        page.script("sessionStorage.setItem('paligemma-key', 'changed')")  # the server was started anew with another
        page.pick(scene)
        assert "key" in error_after_run(page) and page.shown("#key-form")


def test_on_loopback_without_a_key_none_is_asked_for(page):
    assert not page.shown("#key-form") and page.text("#model") == "tiny"
    assert page.shown("#banner")


# ---------------------------------------------------------------------------------------------- every screen


def states(page):
    """The page in each of its states, by name."""
    page.open()
    yield "empty"
    page.click("#example")
    page.picture_is_there()
    for task in ("caption", "ask", "ocr", "detect", "segment"):
        page.task(task)
        page.run()
        yield task
    page.click("#raw summary")
    page.script("document.querySelector('#rows button').focus()")
    yield "segment, opened"
    page.task("free")
    page.find("#free").send_keys("<image>" + "long" * 60)
    error_after_run(page)
    yield "error"
    page.script(
        "document.getElementById('key-form').hidden = false; document.getElementById('progress').hidden = false"
    )
    page.script("document.getElementById('stop').hidden = false; document.getElementById('run').ariaDisabled = 'true'")
    yield "running, key"


@pytest.mark.parametrize("width", [360, 768, 1280, 1920])
def test_nothing_scrolls_sideways(page, width):
    page.size(width, 800, 2, mobile=width < 800)
    for state in states(page):
        assert page.script("return document.documentElement.scrollWidth") <= width, state
        assert page.shown("#camera") == (state == "empty" and width < 800), "a camera where there is a finger"


def test_dark_and_light(page):
    shades = {}
    for scheme in ("dark", "light"):
        page.scheme(scheme)
        code = "return getComputedStyle(document.body)[arguments[0]].match(/\\d+/g).slice(0, 3).map(Number)"
        shades[scheme] = [sum(page.script(code, name)) / 3 for name in ("backgroundColor", "color")]
    assert shades["dark"][0] < 60 < 200 < shades["dark"][1]
    assert shades["light"][1] < 60 < 200 < shades["light"][0]


def test_no_other_host_is_asked_and_the_console_is_empty(page, browser, url):
    page.open()
    page.requests(), browser.get_log("browser")
    for state in states(page):
        if state == "segment, opened":
            break
    asked = page.requests()
    assert asked and all(address.startswith((url, "blob:", "data:")) for address in asked)
    assert browser.get_log("browser") == []
    attributes = (
        "return [...document.querySelectorAll('[src], [href], [action]')].map(e => e.src || e.href || e.action)"
    )
    assert all(address.startswith((url, "blob:" + url)) for address in page.script(attributes))


@pytest.fixture(scope="module")
def axe(request):
    return axe_core(request.config)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing(page, browser, axe, scheme, width):
    page.scheme(scheme)
    page.size(width, 900, mobile=width < 800)
    for state in states(page):
        assert not violations(browser, axe), state
