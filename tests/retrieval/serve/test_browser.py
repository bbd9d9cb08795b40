"""The page in a real browser: Chromium, driven by Playwright."""

import base64
import io
import os
import shutil
import time

import pytest

from conftest import draw  # isort: skip

CHROMIUM = os.environ.get("QF_CHROMIUM") or shutil.which("chromium")
KEY = "green-pole-0.png"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here; apt-get install chromium, or name another in QF_CHROMIUM"
)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, live):
    """Opens pages of contexts with some options. No page may complain on its console."""
    complaints, contexts = [], []

    def make(path="/", **options):
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on(
            "console",
            lambda line: (
                complaints.append(f"{line.text} {line.location}") if line.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(live.url + path)
        return page

    make.complaints = complaints
    yield make
    for context in contexts:
        context.close()
    assert complaints == []


def until(page, fact):
    """Wait until an expression of JavaScript is true. Playwright's own way needs eval, which the page forbids."""
    end = time.monotonic() + 60
    while not page.evaluate(fact):
        assert time.monotonic() < end, fact
        page.wait_for_timeout(20)


def titles(page):
    return page.eval_on_selector_all(".hit img", "pictures => pictures.map(p => p.alt)")


def seen(page):
    """Wait until all pictures in sight are there; returns how many."""
    page.eval_on_selector_all(".hit img", "pictures => pictures.forEach(p => { p.loading = 'eager'; })")
    until(page, "[...document.querySelectorAll('.hit img')].every(p => p.complete && p.naturalWidth > 0)")
    return page.locator(".hit").count()


def the_search(page, act):
    """Do something that searches, and wait for the answer."""
    with page.expect_response(lambda answer: "/?" in answer.url and answer.status == 200):
        act()
    until(page, "!document.querySelector('main').classList.contains('busy')")


def png() -> bytes:
    data = io.BytesIO()
    draw("green", "pole").save(data, "PNG")
    return data.getvalue()


def test_who_types_sees_pictures(open_page):
    page = open_page()
    assert seen(page) == 24
    the_search(page, lambda: page.keyboard.type("a red square"))
    page.wait_for_url("**/?q=a+red+square")
    assert seen(page) == 24
    assert page.title() == "a red square · qf"
    heights = page.eval_on_selector_all(".hit", "hits => hits.map(h => h.getBoundingClientRect().height)")
    assert len(set(heights)) == 1
    right = "hits => Math.max(...hits.map(h => h.getBoundingClientRect().right))"
    assert page.eval_on_selector_all(".hit", right) <= page.viewport_size["width"]


def test_more_and_less_like_this_become_chips_and_the_address_keeps_them(open_page):
    page = open_page("/?q=a+red+square")
    first = titles(page)
    hit = page.locator(".hit").nth(3)
    hit.hover()
    the_search(page, hit.locator(".more").click)
    assert page.locator(".chip.plus img").count() == 1
    page.locator(".hit .open").nth(2).focus()
    the_search(page, lambda: page.keyboard.press("l"))
    assert page.locator(".chip.minus img").count() == 1
    assert "plus=" in page.url
    assert "minus=" in page.url
    order = titles(page)
    page.reload()
    assert titles(page) == order
    the_search(page, page.go_back)
    assert page.locator(".chip").count() == 1
    the_search(page, page.locator(".remove").click)
    assert titles(page) == first


PASTE = """data => {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
    const held = new DataTransfer();
    held.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
    window.dispatchEvent(new ClipboardEvent("paste", { clipboardData: held, bubbles: true, cancelable: true }));
}"""
DROP = (
    PASTE.replace("ClipboardEvent", "DragEvent").replace('"paste"', '"drop"').replace("clipboardData", "dataTransfer")
)


@pytest.mark.parametrize("way", ["paste", "drop", "upload"])
def test_a_picture_of_ones_own_is_searched_with(open_page, way):
    page = open_page()

    def give():
        if way == "upload":
            page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png()})
        else:
            page.evaluate(PASTE if way == "paste" else DROP, base64.b64encode(png()).decode())

    the_search(page, give)
    assert (
        page.locator(".chip.plus img[alt='your picture']").evaluate("p => p.decode().then(() => p.naturalWidth)") == 64
    )
    assert seen(page) == 24
    assert "green" in titles(page)[0]
    assert page.locator("#toast").is_hidden()


def test_a_hit_opens_with_its_heat_map_by_keys_alone(open_page):
    page = open_page("/?q=a+red+square")
    page.keyboard.press("Tab")
    page.locator(".hit .open").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#look").is_visible()
    assert page.locator("#captions li").count() == 2
    until(page, "document.getElementById('large').naturalWidth > 0")
    page.locator("#heat").press("Enter")
    until(page, "document.getElementById('large').naturalWidth > 1000")
    page.keyboard.press("Escape")
    assert page.locator("#look").is_hidden()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"


def test_splits_and_reranking_are_chosen(open_page):
    page = open_page("/?q=a+red+square")
    the_search(page, lambda: page.select_option("[name=split]", "val"))
    assert seen(page) == 12
    the_search(page, lambda: page.check("[name=rerank]"))
    assert "split=val&rerank=1" in page.url
    assert page.locator(".bar").count() == 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(open_page, scheme):
    page = open_page(
        "/?q=a+red+square&plus=blue&minus=" + KEY,
        viewport={"width": 360, "height": 740},
        is_mobile=True,
        has_touch=True,
        color_scheme=scheme,
    )
    assert seen(page) > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(18, 19, 23)") == (scheme == "dark")
    page.locator(".open").first.tap()
    assert page.locator("#look").is_visible()
    assert page.locator("#look").bounding_box()["width"] <= 360


def test_it_works_without_javascript(open_page):
    page = open_page("/?q=a+red+square", java_script_enabled=False)
    assert page.locator(".hit").count() == 24
    page.locator(".hit .less").nth(2).click(force=True)
    assert page.locator(".chip.minus").count() == 1
    page.fill("#q", "a blue bar")
    page.click("button[type=submit]")
    assert "q=a+blue+bar" in page.url
    assert page.locator(".chip.minus").count() == 1
    page.locator(".hit .open").first.click()
    assert "/images/" in page.url


def test_a_fault_is_told(open_page):
    page = open_page("/?q=a+red+square")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("#toast:not([hidden])")
    assert "not an image" in page.locator("#toast").inner_text()
    (complaint,) = open_page.complaints
    assert "400 (Bad Request)" in complaint
    open_page.complaints.clear()
