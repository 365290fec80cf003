"""The page, in a real browser: Chromium, driven as a person would use it."""

import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support import until
from tests.web.conftest import Server, start

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402  (selenium may be missing)
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="Chromium and its driver are not installed")


@pytest.fixture(scope="module")
def open_browser() -> Iterator[Callable[[], WebDriver]]:
    """Starts browsers, which share nothing."""
    opened: list[WebDriver] = []

    def browser() -> WebDriver:
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        opened.append(webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)))
        return opened[-1]

    yield browser
    for each in opened:
        each.quit()


@pytest.fixture(scope="module")
def first(open_browser: Callable[[], WebDriver]) -> WebDriver:
    return open_browser()


class Page:
    """What a person sees and does."""

    def __init__(self, browser: WebDriver, server: Server) -> None:
        self.browser, self.server = browser, server
        browser.get(server.url)
        until(lambda: browser.find_elements(By.CSS_SELECTOR, "#model option"))

    def one(self, selector: str):
        until(lambda: self.all(selector))
        return self.all(selector)[0]

    def all(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def type(self, name: str, text: str) -> None:
        if not self.one(f"#{name}").is_displayed():
            self.one("#more summary").click()
        self.one(f"#{name}").clear()
        self.one(f"#{name}").send_keys(text)

    def make(self, prompt: str) -> None:
        self.type("prompt", prompt)
        self.one("#prompt").send_keys(Keys.ENTER)

    def made(self, count: int = 1) -> None:
        until(lambda: len(self.all("#tray figure.done")) == count and not self.one("#stop").is_displayed())

    def pixels(self, selector: str) -> np.ndarray:
        """Of the file that an image of the gallery or the viewer shows."""
        source = self.one(selector).get_attribute("src")
        return np.array(Image.open(io.BytesIO(httpx.get(source).content)))

    def problems(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def page(first: WebDriver, server: Server) -> Page:
    return Page(first, server)


WATCH = """
window.shown = [];
new MutationObserver((changes) => changes.forEach((each) => window.shown.push(each.target.src)))
    .observe(document.getElementById("tray"), {subtree: true, attributeFilter: ["src"]});
"""


def test_prompt_and_enter_suffice_and_the_picture_comes_up(page: Page) -> None:
    page.browser.execute_script(WATCH)
    page.make("a red apple")
    page.made()
    shown = page.browser.execute_script("return window.shown")
    assert len(set(shown)) == len(shown) > 5  # previews, each another, and the picture
    assert "seed" in page.one("#tray figcaption").text
    assert page.one("#gallery img").get_attribute("alt") == "a red apple"
    assert page.problems() == []


def test_picture_is_made_again_to_the_same_pixels(page: Page) -> None:
    page.type("steps", "4")
    page.make("a green house")
    page.made()
    page.one("#gallery button").click()
    assert page.one("#viewer-title").text == "a green house"
    before = page.pixels("#viewer-image")
    file = page.one("#viewer-file").get_attribute("download")
    (page.server.output / file).unlink()
    page.one("[data-action=remake]").click()
    page.made()
    assert (page.server.output / file).exists()
    assert (page.pixels("#gallery img") == before).all()


def test_another_seed_makes_another_picture(page: Page) -> None:
    page.one("#gallery button").click()
    before = page.pixels("#viewer-image")
    page.one("[data-action=vary]").click()
    page.made()
    assert (page.pixels("#gallery img") != before).any()


def test_lines_are_prompts_and_lists_a_grid_of_one_seed(page: Page) -> None:
    page.type("steps", "2, 4")
    page.type("prompt", "a cat")
    page.one("#prompt").send_keys(Keys.SHIFT, Keys.ENTER)
    page.one("#prompt").send_keys("a dog")
    page.one("#make").click()
    page.made(4)
    captions = [each.text for each in page.all("#tray figcaption")]
    assert len({caption.split("seed ")[1].split()[0] for caption in captions}) == 1
    assert any("a dog" in caption and "4 steps" in caption for caption in captions)


def test_what_is_being_made_can_be_stopped(page: Page) -> None:
    page.type("steps", "50")
    page.type("count", "8")
    page.make("a cat")
    until(page.one("#stop").is_displayed)
    page.one("#stop").click()
    until(lambda: page.all("#tray figure.failed"))
    until(lambda: "slots_occupied 0" in (text := httpx.get(f"{page.server.url}/metrics").text) or "} 0.0" in text)
    assert page.one("#tray figure.failed figcaption").text == "stopped"


def test_two_people_at_a_time_get_their_own_pictures(
    page: Page, open_browser: Callable[[], WebDriver], server: Server
) -> None:
    other = Page(open_browser(), server)
    for each, prompt in ((page, "a cat"), (other, "a dog")):
        each.type("steps", "10")
        each.make(prompt)
    for each, prompt in ((page, "a cat"), (other, "a dog")):
        each.made()
        assert each.one("#tray img").get_attribute("alt") == prompt


def test_prompt_is_never_taken_for_markup(page: Page) -> None:
    hostile = '<img src=x onerror="document.title=1">"\'</figcaption><script>document.title=1</script>'
    page.type("steps", "2")
    page.make(hostile)
    page.made()
    page.one("#gallery button").click()
    assert page.one("#viewer-title").text == hostile
    assert page.browser.title == "Darkroom" and not page.all("img[src=x]")


def test_refusal_is_shown_where_one_looks(page: Page) -> None:
    page.type("steps", "51")
    page.make("a cat")
    until(page.one("#problem").is_displayed)
    assert page.one("#problem").text == "steps 51 is more than the 50 that are made here."
    assert page.one("#tray figure").get_attribute("class") == "failed"


DROP = """
const done = arguments[1];
const bytes = Uint8Array.from(atob(arguments[0]), (each) => each.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
setTimeout(done, 200);
"""


def test_dropped_picture_fills_the_form(page: Page) -> None:
    import base64

    asked = {"prompt": "a blue dog, ünïcode", "steps": 3, "seed": 2**63 + 1, "scheduler": "EulerA"}
    answer = httpx.post(f"{page.server.url}/v1/images/generations", json=asked).json()
    page.browser.execute_async_script(DROP, answer["data"][0]["b64_json"])
    values = {name: page.one(f"#{name}").get_attribute("value") for name in asked}
    assert values == {name: str(value) for name, value in asked.items()}
    page.browser.execute_async_script(DROP, base64.b64encode(b"no picture").decode())
    assert "carries no recipe" in page.one("#problem").text


def test_picture_is_deleted_after_a_question(page: Page) -> None:
    page.one("#gallery button").click()
    file = page.one("#viewer-file").get_attribute("download")
    page.one("[data-action=delete]").click()
    page.browser.switch_to.alert.accept()
    until(lambda: not (page.server.output / file).exists())


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out_at_any_width(page: Page, width: int) -> None:
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    assert page.browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_has_a_name(page: Page) -> None:
    page.one("#more summary").click()
    for control in page.all("input, select, textarea, button"):
        if control.is_displayed():
            assert control.accessible_name.strip(), control.get_attribute("outerHTML")


def test_page_asks_for_the_key_once(open_browser: Callable[[], WebDriver], stores: Path, tiny_model: Path) -> None:
    locked = start(stores, tiny_model, DARKROOM_API_KEY="opensesame")
    try:
        browser = open_browser()
        browser.get(locked.url)
        key = browser.find_element(By.ID, "key")
        until(key.is_displayed)
        key.send_keys("wrong", Keys.ENTER)
        until(lambda: key.is_displayed() and not key.get_attribute("value"))
        key.send_keys("opensesame", Keys.ENTER)
        until(lambda: browser.find_elements(By.CSS_SELECTOR, "#model option"))
        Page(browser, locked).make("a cat")
        until(lambda: browser.find_elements(By.CSS_SELECTOR, "#tray figure.done"))
    finally:
        locked.process.kill()


def test_server_that_dies_and_comes_back(open_browser: Callable[[], WebDriver], stores: Path, tiny_model: Path) -> None:
    dying = start(stores, tiny_model)
    page = Page(open_browser(), dying)
    page.type("steps", "50")
    page.type("count", "8")
    page.make("a cat")
    until(page.one("#stop").is_displayed)
    os.kill(dying.process.pid, signal.SIGKILL)
    until(lambda: "does not answer" in page.one("#state").text)
    assert page.all("#tray figure.failed")
    again = start(stores, tiny_model, "--port", dying.url.rpartition(":")[2])
    try:
        until(lambda: "does not answer" not in page.one("#state").text)
        page.type("count", "1")
        page.make("a dog")
        page.made()
    finally:
        again.process.kill()
