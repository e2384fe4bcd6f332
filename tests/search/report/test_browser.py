"""The report in a real browser: wide and narrow, light and dark. Needs Chromium, its driver and selenium."""

import dataclasses
import shutil
import threading
import time

import pytest
from synthetic_study import page_of, synthetic

from search.dashboard.live_report import LivePage, PageServer
from search.report.data import Answers

pytestmark = pytest.mark.slow

WIDTHS = (1400, 420)


@pytest.fixture(scope="module")
def view():
    """A study of three objectives, with a few answers."""
    two = synthetic(methods=3, searched=40)
    third = dataclasses.replace(
        two.objectives[1], name="unrelated_utility", title="probability of unrelated facts (K0)", head="K0"
    )
    trials = two.trials.assign(unrelated_utility=two.trials["model_utility"] ** 2)
    controls = two.controls.assign(unrelated_utility=0.6)
    items = [("forget", "Who?", "Ada", "Ada"), ("retain", "Where?", "Here", "Here"), ("retain", "When?", "Now", "Now")]
    texts = {int(number): [f"unsure {number}", "Here", f"later {number}"] for number in trials["trial"]}
    summary = {**two.summary, "reference_point": {**two.summary["reference_point"], third.name: 0.0}}
    more = {"trials": trials, "controls": controls, "summary": summary, "answers": Answers(items, texts)}
    return dataclasses.replace(two, objectives=(*two.objectives, third), **more)


@pytest.fixture(scope="module")
def page(view, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page_of(view), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def chromium():
    """Starts one browser; `open_at` sets its window and colours."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install '.[slow]'")
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("Chromium or its driver is not installed; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def open_at(browser, address, width, dark):
    size = {"width": width, "height": 950, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": scheme})
    browser.get(address)
    until(lambda: browser.execute_script("return document.querySelectorAll('#front-chart .point').length"))


def until(happened, seconds=30):
    """Wait for something to be true; return it."""
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.1)
    return found


@pytest.fixture(
    params=[(width, dark) for width in WIDTHS for dark in (False, True)],
    ids=lambda each: f"{each[0]}-{'dark' if each[1] else 'light'}",
)
def opened(request, chromium, page):
    open_at(chromium, page, *request.param)
    yield chromium
    assert [entry["message"] for entry in chromium.get_log("browser")] == []


def css(browser, selector):
    from selenium.webdriver.common.by import By

    return browser.find_elements(By.CSS_SELECTOR, selector)


def point_of(browser, host, trial):
    (point,) = css(browser, f"{host} .point[data-trial='{trial}']")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    return point


def front_trial(view, place=0):
    front = view.trials[view.trials["on_front"] & (view.trials["trial"] != view.summary["recommended"]["trial"])]
    return front.iloc[place]


def test_the_page_fits_its_window_and_follows_the_colours_of_the_system(opened):
    assert opened.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    dark = opened.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches")
    ground = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    # First columns stay where they are while their table scrolls.
    moved = opened.execute_script(
        "const box = document.querySelector('#front-table .scroll'); const cell = box.querySelector('tbody th');"
        "const before = cell.getBoundingClientRect().left; box.scrollLeft = 200;"
        "return [box.scrollLeft, cell.getBoundingClientRect().left - before];"
    )
    assert moved[1] == 0 and (moved[0] > 0 or opened.execute_script("return innerWidth") > 1000)


def test_hovering_over_a_point_shows_the_numbers_of_its_trial(opened, view):
    from selenium.webdriver import ActionChains

    row = front_trial(view)
    ActionChains(opened).move_to_element(point_of(opened, "#front-chart", row["trial"])).perform()
    (tip,) = css(opened, "#tip")
    text = until(lambda: tip.is_displayed() and tip.text)
    # Points may lie on each other: the one on top is named, and it has the same numbers then.
    named = view.trials.set_index("trial").loc[int(text.split()[1])]
    lines = text.replace("−", "-").splitlines()
    assert lines[lines.index("model utility") + 1] == f"{named['model_utility']:.4f}"
    assert lines[lines.index("log10") + 1] == f"{named['log10_forget_quality']:z.2f}"
    assert f"{named['base']}, epoch {named['epoch']}, alpha" in text
    box = opened.execute_script("const r = arguments[0].getBoundingClientRect(); return [r.left, r.right, innerWidth]", tip)
    assert box[0] >= 0 and box[1] <= box[2]


def test_a_click_selects_the_trial_everywhere(opened, view):
    trial = int(front_trial(view)["trial"])
    opened.execute_script(
        "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", point_of(opened, "#front-chart", trial)
    )
    pressed = "return [...document.querySelectorAll('.point[aria-pressed=true]')].map((each) => Number(each.dataset.trial))"
    assert opened.execute_script(pressed) == [trial] * 3  # the front, and both curves
    rows = "return [...document.querySelectorAll('tr[aria-current=true]')].map((each) => Number(each.dataset.trial))"
    assert set(opened.execute_script(rows)) == {trial}
    (panel,) = css(opened, "#selected")
    assert panel.text.startswith(f"Trial {trial}\n") and f"unsure {trial}" in panel.text
    (command,) = css(opened, "#selected code")
    assert command.text == f"uipe export 'runs/quick start' --trial {trial} --to 'runs/quick start/export/'{trial} --as model"
    # From a table, and from a curve, too.
    other = int(front_trial(view, 1)["trial"])
    button = css(opened, f"#front-table button[data-trial='{other}']")[0]
    opened.execute_script("arguments[0].click()", button)
    assert opened.execute_script(pressed) == [other] * 3 and panel.text.startswith(f"Trial {other}\n")


def test_a_command_is_copied(opened):
    opened.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    button = css(opened, "#ship .copy")[0]
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    until(lambda: button.text == "Copied")
    copied = opened.execute_async_script(
        "const done = arguments[0]; navigator.clipboard.readText().then(done, () => done(null))"
    )
    assert copied == css(opened, "#ship code")[0].text


def test_legends_hide_zoom_narrows_and_the_third_objective_colours(opened, view):
    count = "return document.querySelectorAll('#front-chart .point').length"
    everything = opened.execute_script(count)
    assert everything == len(view.trials)
    method = css(opened, "#front-tools .toggle")[0]
    opened.execute_script("arguments[0].click()", method)
    chosen = view.trials.set_index("trial")["method"][view.summary["recommended"]["trial"]]
    left = (view.trials["method"] != method.text).sum() + (chosen == method.text)
    assert method.get_attribute("aria-pressed") == "false" and opened.execute_script(count) == left
    opened.execute_script("arguments[0].click()", method)
    ticks = "return [...document.querySelectorAll('#front-chart .tick')].map((each) => each.textContent).join()"
    whole = opened.execute_script(ticks)
    by_name = {button.text: button for button in css(opened, "#front-tools .choice")}
    opened.execute_script("arguments[0].click()", by_name["Zoom in"])
    assert opened.execute_script(ticks) != whole
    opened.execute_script("arguments[0].click()", by_name["All trials"])
    assert opened.execute_script(ticks) == whole
    colour = "return document.querySelector('#front-chart .point').style.getPropertyValue('--colour')"
    assert "--scale-" in opened.execute_script(colour)
    opened.execute_script("arguments[0].click()", by_name["Colour: method"])
    assert "--method-" in opened.execute_script(colour)


def test_dragging_zooms_and_a_double_click_shows_everything_again(chromium, page):
    from selenium.webdriver import ActionChains

    open_at(chromium, page, 1400, False)
    (chart,) = css(chromium, "#front-chart > svg")
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ticks = "return [...document.querySelectorAll('#front-chart .tick')].map((each) => each.textContent).join()"
    whole = chromium.execute_script(ticks)
    drag = (
        ActionChains(chromium).move_to_element_with_offset(chart, -150, 60).click_and_hold().move_by_offset(120, 60).release()
    )
    drag.perform()
    assert chromium.execute_script(ticks) != whole
    ActionChains(chromium).double_click(css(chromium, "#front-chart .axis")[0]).perform()
    chromium.execute_script("document.querySelector('#front-chart > svg').dispatchEvent(new MouseEvent('dblclick'))")
    assert chromium.execute_script(ticks) == whole


def test_keys_move_from_trial_to_trial_and_select(chromium, page):
    from selenium.webdriver.common.keys import Keys

    open_at(chromium, page, 1400, False)
    assert chromium.execute_script("return document.querySelectorAll('#front-chart .point[tabindex=\"0\"]').length") == 1
    chromium.execute_script("document.querySelector('#front-chart .point[tabindex=\"0\"]').focus()")
    first = chromium.switch_to.active_element
    first.send_keys(Keys.ARROW_LEFT)
    second = chromium.switch_to.active_element
    assert second.get_attribute("data-trial") != first.get_attribute("data-trial")
    assert css(chromium, "#tip")[0].is_displayed()
    second.send_keys(Keys.ENTER)
    assert css(chromium, "#selected h3")[0].text == f"Trial {second.get_attribute('data-trial')}"
    second.send_keys(Keys.ESCAPE)
    assert not css(chromium, "#tip")[0].is_displayed()


def test_it_prints_on_light_ground_with_its_charts(chromium, page):
    import base64

    open_at(chromium, page, 1400, True)
    printed = base64.b64decode(chromium.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"])
    assert printed.startswith(b"%PDF") and len(printed) > 50_000
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert chromium.execute_script("return getComputedStyle(document.body).color") == "rgb(31, 35, 40)"
    assert not css(chromium, "#front-tools")[0].is_displayed() and css(chromium, "#front-chart svg")[0].is_displayed()
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_live_page_takes_over_what_is_new_and_keeps_the_selection(chromium, new_store, made_up_evidence, monkeypatch):
    from search.dashboard import live_report as serve
    from search.problem.trial import TrialSpec

    monkeypatch.setattr(serve, "SHARE", 1e9)
    monkeypatch.setattr(serve, "POLL_SECONDS", 0.5)
    store = new_store()
    space = store.spec.search_space()

    def score(alpha, forgetting):
        number, job = store.ask_point(space, {"base": "npo", "epoch": 1, "alpha": alpha}, "search")
        store.complete(job, number, made_up_evidence(job, forgetting, 0.5))
        return number

    with PageServer(LivePage(store.out)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        chromium.get(server.address)
        assert "No trial is complete yet" in until(lambda: css(chromium, "#waiting"))[0].text
        initial = TrialSpec("initial")
        store.complete(initial, store.ask_control(initial), made_up_evidence(initial, -9.0, 0.9))
        first = score(0.5, -4.0)
        until(lambda: css(chromium, f"#front-table tr[data-trial='{first}']"))
        chromium.execute_script(f"select({first})")
        second = score(1.0, -5.0)
        until(lambda: css(chromium, f"#front-chart .point[data-trial='{second}']"))
        assert css(chromium, "#selected h3")[0].text == f"Trial {first}"
        assert [entry["message"] for entry in chromium.get_log("browser")] == []
        server.shutdown()
