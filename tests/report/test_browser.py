"""The pages in a real browser: Chromium, driven over a pipe by its DevTools protocol."""

import base64
import functools
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import time

import pytest
from conftest import make_model
from sample_tables import FEW, MANY, ONE
from test_explain import MEASURED, ROWS

from armo.report.explain import explain_pairs
from armo.report.explain_page import explanation_page
from armo.report.pages import save_pages

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path"
)
PATIENCE_S = 60
WIDTHS = (1280, 400)


class Browser:
    """One headless browser with one tab."""

    def __init__(self, profile):
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()
        # The protocol's pipes are file descriptors 3 and 4. Its own profile: nothing is shared.
        flags = ["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"]
        flags += ["--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"]
        flags += [f"--user-data-dir={profile}", "about:blank"]
        redirected = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirected, "bash", CHROMIUM, *flags],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._number = itertools.count(1)
        self._unread = b""
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    _session = None

    def close(self):
        os.close(self._commands)
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        os.close(self._answers)

    def _read(self, deadline):
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.time()))
            if not ready:
                raise TimeoutError(f"Chromium did not answer within {PATIENCE_S} s.")
            chunk = os.read(self._answers, 1 << 20)
            if not chunk:
                raise RuntimeError("Chromium ended.")
            self._unread += chunk
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        number = next(self._number)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.time() + PATIENCE_S
        while (answer := self._read(deadline)).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, path, *, width, media="screen"):
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Emulation.setEmulatedMedia", media=media)
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.time() + PATIENCE_S
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read(deadline))

    def run(self, script):
        """Evaluate a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path, *, top=0, height=None):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "scale": 1}
        clip["height"] = height or size["height"] - top
        data = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self):
        self.call("Emulation.setEmulatedMedia", media="print")
        answer = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        return base64.b64decode(answer["data"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


PAGES = {"one": ONE, "few": FEW, "many": MANY}
WIDEST = "document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The folder that a page is saved to, by the name of its evaluation."""
    folder = tmp_path_factory.mktemp("pages")

    @functools.cache
    def save(which):
        save_pages(PAGES[which], folder / which, title=f"Evaluation of {which}")
        return folder / which / "report.html"

    return save


def test_the_browser_tells_of_requests_and_errors(browser, tmp_path):
    # The tests below would pass in a browser that says nothing.
    page = tmp_path / "bad.html"
    page.write_text('<img src="other.png"><script>console.error("x"); missing()</script>')
    browser.open(page, width=400)
    methods = [event.get("method") for event in browser.events]
    assert methods.count("Network.requestWillBeSent") == 2
    assert "Runtime.consoleAPICalled" in methods
    assert "Runtime.exceptionThrown" in methods


@pytest.mark.parametrize("which", PAGES)
def test_the_page_asks_for_nothing_and_logs_nothing(browser, pages, which):
    browser.open(pages(which), width=1280)
    requests = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert requests == [pages(which).as_uri()]
    spoken = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
    assert not [event for event in browser.events if event.get("method") in spoken]
    assert browser.run("document.compatMode") == "CSS1Compat"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", PAGES)
def test_nothing_is_wider_than_the_window_and_pictures_lie_in_their_sections(
    browser, pages, which, width
):
    browser.open(pages(which), width=width)
    assert browser.run("innerWidth") == width
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.run(WIDEST) <= width
    boxes = browser.run(
        "[...document.querySelectorAll('svg')].map(svg => [svg, svg.closest('section')].map("
        "each => {const b = each.getBoundingClientRect(); return [b.x, b.y, b.right, b.bottom]}))"
    )
    assert len(boxes) >= 12
    for inner, outer in boxes:
        assert inner[2] - inner[0] > 200
        assert inner[3] - inner[1] > 50
        assert outer[0] - 0.5 <= inner[0] < inner[2] <= outer[2] + 0.5
        assert outer[1] - 0.5 <= inner[1] < inner[3] <= outer[3] + 0.5
    tops = [outer[1] for _, outer in boxes]
    assert tops == sorted(tops)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", PAGES)
def test_no_text_of_a_picture_is_cut_off_or_too_small(browser, pages, which, width):
    browser.open(pages(which), width=width)
    texts = browser.run(
        "[...document.querySelectorAll('svg text')].map(text => {"
        "const a = text.getBoundingClientRect();"
        "const b = text.closest('svg').getBoundingClientRect();"
        "const size = parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a;"
        "return [text.textContent, a.x - b.x, b.right - a.right, a.y - b.y, b.bottom - a.bottom,"
        " size]})"
    )
    assert len(texts) > 100
    for text, *edges, size in texts:
        assert min(edges) >= -1.5, text
        assert size == 0.0 or size > (10.0 if width == 1280 else 4.5), text


def test_labels_do_not_lie_on_each_other(browser, pages):
    browser.open(pages("many"), width=1280)
    overlaps = browser.run(
        "[...document.querySelectorAll('svg')].flatMap(svg => {"
        "const boxes = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim())"
        ".map(t => [t.textContent, t.getBoundingClientRect()]);"
        "return boxes.flatMap(([s, a], k) => boxes.slice(k + 1).filter(([, b]) =>"
        "Math.min(a.right, b.right) - Math.max(a.x, b.x) > 2 &&"
        "Math.min(a.bottom, b.bottom) - Math.max(a.y, b.y) > 0.4 * Math.min(a.height, b.height)"
        ").map(([t]) => [s, t]))})"
    )
    assert overlaps == []


def test_the_accessibility_tree_has_landmarks_names_and_descriptions(browser, pages):
    browser.open(pages("few"), width=1280)
    nodes = [
        {
            "role": node["role"]["value"],
            "name": node.get("name", {}).get("value", ""),
            "description": node.get("description", {}).get("value", ""),
        }
        for node in browser.call("Accessibility.getFullAXTree")["nodes"]
        if not node["ignored"]
    ]
    roles = {}
    for node in nodes:
        roles.setdefault(node["role"], []).append(node)
    assert len(roles["main"]) == 1
    assert [node["name"] for node in roles["navigation"]] == ["Contents"]
    titles = [table.title for table in FEW.tables]
    heads = [node["name"] for node in roles["heading"]]
    assert heads == ["Evaluation of few", "In short", "Contents", *titles]
    images = roles.get("image", roles.get("img", []))
    assert len(images) >= 14
    for image in images:
        assert image["name"]
        assert re.search(r"\d\.\d\d", image["description"])
    # No text of a picture is read out a second time, piece by piece.
    assert "responses to choose from, N" in pages("few").read_text()
    assert not [node for node in nodes if node["name"] == "responses to choose from, N"]
    assert roles["link"][0]["name"] == "Skip to the results"
    links = [node["name"] for node in roles["link"]]
    assert "More on Calibration error" in links
    assert all(title in links for title in titles)


def test_the_keyboard_reaches_every_link_and_opens_the_tables(browser, pages):
    browser.open(pages("one"), width=1280)
    reached = []
    for _ in range(200):
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", windowsVirtualKeyCode=9)
        at = browser.run(
            "document.activeElement === document.body ? null : "
            "document.activeElement.tagName + (document.activeElement.getAttribute('href') || '')"
        )
        if at is None:
            break
        reached.append(at)
    hrefs = browser.run(
        "[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"
    )
    hrefs = [href for href in hrefs if href]
    assert [at[1:] for at in reached if at.startswith("A#")] == hrefs
    assert "SUMMARY" in reached
    assert "DIV" in reached  # a table that stands open


def media_boxes(pdf):
    pages = re.findall(rb"/Type\s*/Page\b", pdf)
    sizes = re.findall(rb"/MediaBox\s*\[\s*0\s+0\s+([\d.]+)\s+([\d.]+)", pdf)
    return len(pages), {(round(float(w)), round(float(h))) for w, h in sizes}


def test_in_print_each_section_starts_a_page_of_its_own(browser, pages):
    a4, turned = (595, 842), (842, 595)
    for which, sizes in (("one", {a4}), ("few", {a4}), ("many", {a4, turned})):
        browser.open(pages(which), width=1280)
        count, found = media_boxes(browser.pdf())
        assert found == sizes
        sections = 1 + len(PAGES[which].tables)
        assert sections <= count <= 3 * sections


@pytest.mark.parametrize("which", PAGES)
def test_in_print_tables_are_open_and_nothing_is_wider_than_the_paper(browser, pages, which):
    # The width of A4 less its margins, upright and turned, in pixels.
    for width, wide in ((int(182 / 25.4 * 96), False), (int(269 / 25.4 * 96), True)):
        browser.open(pages(which), width=width, media="print")
        tables = browser.run(
            "[...document.querySelectorAll('table')].map(table => {"
            "const b = table.getBoundingClientRect();"
            "return [!!table.closest('.wide'), b.x, b.right, "
            "table.checkVisibility() ? b.height : 0, table.rows.length]})"
        )
        assert len(tables) == len(PAGES[which].tables)
        for turned, left, right, height, rows in tables:
            assert height > 8 * rows
            if turned == wide:
                assert left >= 0
                assert right <= width + 1
        # A picture and its heading fit one page.
        heights = browser.run(
            "[...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect().height)"
        )
        if not wide:
            assert max(heights) < 265 / 25.4 * 96
        assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_explanations_fit_window_and_paper_and_ask_for_nothing(browser, encoder, tmp_path):
    page = tmp_path / "page.html"
    explained = list(explain_pairs(make_model(encoder, covariates=MEASURED), ROWS))
    page.write_text(explanation_page(explained, title="Pairs"), encoding="utf-8")
    for width in WIDTHS:
        browser.open(page, width=width)
        requests = [e for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
        assert len(requests) == 1
        assert browser.run(WIDEST) <= width
        sizes = browser.run(
            "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)"
        )
        assert len(sizes) == 2 * len(ROWS)
        assert min(sizes) > 200
    assert media_boxes(browser.pdf())[0] >= 1 + len(ROWS)
