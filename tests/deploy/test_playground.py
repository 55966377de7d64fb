"""The playground in a real headless Chromium against a real server process with a tiny pair."""

from __future__ import annotations

import re
import shutil

import httpx
import pytest

from tests.api.tiny import RunningServer, make_pair

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the Python package)")
expect = playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RunningServer(make_pair(tmp_path_factory.mktemp("pair"))) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def dials(tmp_path_factory):
    """A server on which precision is a dial, too."""
    folder = tmp_path_factory.mktemp("dials")
    flags = ("--precision-dial", "on", "--exact", "on", "--store", str(folder / "store"), "--size-policy", "auto")
    with RunningServer(make_pair(folder), *flags) as server:
        yield server


def test_both_dials_choose_what_answers(browser, dials):
    page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
    page.goto(dials.url + "/")
    expect(page.locator("#status")).to_have_text("Ready.")
    assert page.locator("#grid circle").count() == 15  # 3 sizes x 5 precisions
    expect(page.locator("#size-facts")).to_contain_text("nothing beats it in")
    page.select_option("#precision", "q4")
    run(page)
    titles = page.locator("#results h3").all_inner_texts()
    assert any("6L-q4" in title for title in titles) and any("auto → 6L" in title for title in titles)
    page.context.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
    page.on(
        "request", lambda request: request.url.startswith(server.url) or page.problems.append(f"left: {request.url}")
    )
    page.goto(server.url + "/")
    expect(page.locator("#status")).to_have_text("Ready.")
    yield page
    context.close()
    assert not page.problems


def run(page, prompt: str = "The quick brown fox", tokens: int = 12) -> None:
    page.fill("#prompt", prompt)
    page.fill("#max-tokens", str(tokens))
    page.click("#run")
    expect(page.locator("#status")).to_have_text(re.compile("^Done"), timeout=30_000)


def test_sizes_answer_side_by_side(page):
    run(page)
    lanes = page.locator("#results article")
    expect(lanes).to_have_count(4)  # student, middle, teacher, auto
    assert page.locator("article h3").all_inner_texts()[0].startswith("4L")
    for lane in lanes.all():
        facts = dict(zip(lane.locator("dt").all_inner_texts(), lane.locator("dd").all_inner_texts(), strict=True))
        assert re.fullmatch(r"[\d.]+ m?s", facts["TTFT"]) and facts["Speed"].endswith("tok/s"), facts
        assert int(facts["Tokens"]) > 1 and "KV" in facts["Memory"], facts
        assert lane.locator(".text").inner_text().strip()
    assert "reason: auto" in lanes.last.locator(".reason").inner_text()
    # The largest size is what the others are compared with; auto was given it too.
    agreements = page.locator("article .agreement").all_inner_texts()
    assert agreements[2] == "" and agreements[3] == "Word for word the answer of 6L."
    assert re.fullmatch(r"The first \d+ of \d+ words as 6L\.", agreements[0]), agreements
    assert page.locator("#mix-text").inner_text()


def test_the_slider_names_every_size_and_adds_it(page):
    slider = page.locator("#size")
    slider.focus()
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext").startswith("4 layers")
    expect(page.locator("#strip rect")).to_have_count(4)  # a cell for every layer that runs
    page.keyboard.press("ArrowRight")
    assert "5 layers" in page.locator("#size-name").inner_text()
    expect(page.locator("#strip rect")).to_have_count(5)
    assert "stations run their block of teacher layers" in page.locator("#strip-text").inner_text()
    for _ in page.locator("#chips button").all():
        page.locator("#chips button").first.click()
    expect(page.locator("#chips li")).to_have_count(0)
    page.locator("#auto").uncheck()
    page.click("#run")
    expect(page.locator("#status")).to_have_text("Choose a size, or auto.")
    page.locator("#add").press("Enter")
    expect(page.locator("#chips li")).to_have_text(re.compile("5L"))
    run(page)
    expect(page.locator("#results article")).to_have_count(1)


def test_limits_reach_the_server_and_the_curl_line_works(page, server):
    page.fill("#slo-tpot", "60000")
    run(page)
    curl = page.locator("#curl").inner_text()
    assert '"slo":{"tpot_ms":60000}' in curl
    page.locator("#curl-of").select_option("4L")
    assert '"model":"tiny:4L"' in page.locator("#curl").inner_text()
    body = re.search(r"-d '(.*)'$", curl).group(1).replace("'\\''", "'")
    answer = httpx.post(server.url + "/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200 and answer.text.rstrip().endswith("data: [DONE]")


def test_an_error_is_shown_in_its_lane(page):
    run(page, prompt="far too long " * 500)
    reasons = page.locator("#results article .reason.error")
    expect(reasons).to_have_count(4)
    assert "256" in reasons.first.inner_text()  # the context it does not fit into
    page.problems = [text for text in page.problems if "400" not in text]  # Chromium reports every 400 as an error


def test_a_crowd_can_be_stopped_and_shows_in_the_chart(page):
    page.fill("#crowd-size", "4")
    page.click("#crowd")
    expect(page.locator("#crowd")).to_have_text("Stop crowd")
    expect(page.locator("#mix-text")).to_have_text(re.compile("Now running"), timeout=15_000)
    expect(page.locator("#chart-mix rect").first).to_be_attached()
    page.click("#crowd")
    expect(page.locator("#mix-text")).to_have_text("Nothing is running.", timeout=15_000)


def test_everything_is_reachable_and_named_for_assistive_technology(page):
    unnamed = page.locator("input:visible, select:visible, textarea:visible, button:visible").evaluate_all(
        """nodes => nodes.filter(node => !(node.labels?.length || node.getAttribute('aria-label')
           || node.textContent.trim())).map(node => node.id)"""
    )
    assert unnamed == []
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").count() == 1
    page.locator("body").press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "skip"
    page.locator("#prompt").focus()
    page.locator("#prompt").press("Control+Enter")  # runs from the keyboard
    expect(page.locator("#status")).to_have_text(re.compile("^Done"), timeout=30_000)


CONTRAST = """() => {
  const lum = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const back = node => { for (; node; node = node.parentElement) {
    const c = getComputedStyle(node).backgroundColor; if (!c.includes('rgba(0, 0, 0, 0)')) return c; }
    return 'rgb(255, 255, 255)'; };
  const bad = [];
  for (const node of document.querySelectorAll('p, label, dt, dd, h1, h2, h3, button, a, pre, figcaption, small')) {
    if (!node.textContent.trim() || node.disabled || node.className === 'skip') continue;
    const [a, b] = [lum(getComputedStyle(node).color), lum(back(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push(`${node.tagName} ${node.id} ${ratio.toFixed(2)}`);
  }
  return bad;
}"""


def test_a_narrow_screen_does_not_scroll_sideways(page):
    page.set_viewport_size({"width": 375, "height": 800})
    run(page, tokens=4)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 375


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_in_both_themes(page, theme):
    page.locator("#theme").select_option(theme)
    run(page, tokens=4)
    assert page.evaluate(CONTRAST) == []


def test_only_its_own_files_are_served(server):
    for name in ("app.js", "api.js", "chart.js", "dial.js", "lane.js", "format.js", "app.css", "icon.svg", "pair.json"):
        answer = httpx.get(f"{server.url}/playground/{name}")
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
    for name in ("__init__.py", "..%2f..%2fapp.py", "nothing.js"):
        assert httpx.get(f"{server.url}/playground/{name}").status_code == 404
