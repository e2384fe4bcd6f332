"""optuna-dashboard in a real browser, headless: study list, front, a trial's note, an artifact opened, the controls."""

import shutil
import socket
import time
import urllib.request

import pytest

pytestmark = pytest.mark.slow

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # As root, and without a GPU: plotly's parallel coordinates want WebGL, which software gives.
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "window-size=1400,1500",
        "enable-unsafe-swiftshader",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def pages(copied, launch):
    """Serves a copy of the finished study; returns the address of its pages."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def up():
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/dashboard/", timeout=10).status == 200
        except OSError:
            return False

    launch("dashboard", copied, "--port", port).until(up)
    return f"http://127.0.0.1:{port}/dashboard"


def until(ask, seconds=30):
    ends = time.monotonic() + seconds
    while not (found := ask()):
        assert time.monotonic() < ends, "the page never showed it"
        time.sleep(0.2)
    return found


def text_of(browser):
    return browser.find_element("tag name", "body").text


def shot(browser, tmp_path, name):
    """Keep a picture of the page to look at: in the folder of the test, under this name."""
    assert browser.save_screenshot(str(tmp_path / f"{name}.png"))


def test_four_pages_show_the_study(browser, pages, result, tmp_path):
    browser.get(pages)
    until(lambda: "tiny.controls" in text_of(browser))
    shot(browser, tmp_path, "list")

    browser.get(f"{pages}/studies/1")
    until(lambda: "Front and controls" in text_of(browser) and "Curves over alpha" in text_of(browser))
    until(lambda: browser.find_elements("css selector", ".scatterlayer .point"))
    shot(browser, tmp_path, "front")

    number = int(result.front.iloc[0]["trial"])
    browser.get(f"{pages}/studies/1/trials?numbers={number}")
    until(lambda: f"Trial {number}: {result.front.iloc[0]['base']}" in text_of(browser))
    shown = text_of(browser)
    assert "answers given in full" in shown and "forget_rouge" in shown and "items.csv" in shown and "recipe.yaml" in shown
    # The page is no wider than the window, or a reader would have to scroll sideways for every line.
    assert browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth") <= 0
    shot(browser, tmp_path, "trial")

    picture = until(lambda: [each for each in browser.find_elements("css selector", "img[src*='/artifacts/']") if each])[0]
    until(lambda: browser.execute_script("return arguments[0].naturalWidth", picture) > 500)
    address = picture.get_attribute("src")
    browser.get(address)
    assert "image/png" in browser.execute_script("return document.contentType")
    shot(browser, tmp_path, "artifact")

    browser.get(f"{pages}/studies/2")
    until(lambda: "Pareto Front" in text_of(browser) and "Best Trials" in text_of(browser))
    time.sleep(1)
    shot(browser, tmp_path, "controls")
    wrong = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in wrong if "favicon" not in message], wrong
