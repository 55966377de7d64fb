"""The playground in a real headless Chromium against a real server process with a tiny pair, both dials and a key."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import httpx
import pytest

from tests.api.tiny import RunningServer, make_pair, noted

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the Python package)")
expect = playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
KEY = "secret"
DESKTOP, PHONE = {"width": 1280, "height": 1000}, {"width": 375, "height": 800}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    flags = ("--precision-dial", "on", "--exact", "on", "--store", str(folder / "store"), "--size-policy", "auto")
    with RunningServer(noted(*make_pair(folder), folder / "store"), *flags, "--api-key", KEY) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser, server):
    """Makes pages; whatever one of them says to the console, or loads from elsewhere, fails the test."""
    pages = []

    def make(key: str = KEY, **options):
        page = browser.new_context(**{"viewport": DESKTOP} | options).new_page()
        page.problems, page.bodies = [], []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
        page.on("request", lambda asked: note(page, asked))
        if key:
            page.add_init_script(f"sessionStorage.setItem('boomerang-key', '{key}')")
        page.goto(server.url + "/")
        if key == KEY:
            expect(page.locator("#status")).to_have_text("Ready.", timeout=20_000)
        pages.append(page)
        return page

    def note(page, asked) -> None:
        if not asked.url.startswith(server.url):
            page.problems.append(f"left: {asked.url}")
        if asked.method == "POST" and "/v1/" in asked.url:
            page.bodies.append(json.loads(asked.post_data))

    yield make
    for page in pages:
        page.context.close()
        assert not page.problems


@pytest.fixture
def page(new_page):
    return new_page()


def run(page, prompt: str = "The quick brown fox", tokens: int = 8) -> None:
    page.locator("#max-tokens").evaluate(f"node => {{ node.value = '{tokens}'; }}")
    page.fill("#prompt", prompt)
    page.click("#run")
    finished(page)


def finished(page) -> None:
    expect(page.locator("#stop")).to_be_disabled(timeout=30_000)


def forgive(page, status: int) -> None:
    """Chromium reports every refusal as an error."""
    page.problems = [text for text in page.problems if f"status of {status}" not in text]


def figures(lane) -> dict[str, str]:
    return dict(zip(lane.locator("dt").all_inner_texts(), lane.locator("dd").all_inner_texts(), strict=True))


def test_sizes_answer_one_after_another_and_race_if_told(page):
    # How many lanes are streaming, each time that one begins.
    page.evaluate(
        """() => { window.most = []; new MutationObserver(() => {
          window.most.push(document.querySelectorAll('article.streaming').length);
        }).observe(document.querySelector('#results'), {subtree: true, childList: true, attributes: true}); }"""
    )
    run(page)
    expect(page.locator("#status")).to_have_text("Done: 4 answers.")
    lanes = page.locator("#results article")
    assert page.evaluate("() => Math.max(...window.most)") == 1
    assert [lane.get_attribute("aria-label") for lane in lanes.all()] == ["4L", "6L-q4", "6L", "auto"]
    for lane in lanes.all():
        found = figures(lane)
        assert re.match(r"[\d.]+ m?s", found["First word"]) and "tokens/s" in found["Speed"], found
        assert re.fullmatch(r"\d+ tokens", found["Length"]) and "of it for the text" in found["Memory"], found
        assert "beside" not in found["Speed"] and lane.locator(".text").inner_text().strip()
    assert "100 % of the teacher: " in lanes.last.locator(".note").inner_text()  # why auto was given this
    assert "are those of 6L." in lanes.first.locator(".note").inner_text()
    assert "auto → " in lanes.last.locator("h3").inner_text()
    page.check("#race")
    page.click("#again")
    finished(page)
    assert page.evaluate("() => Math.max(...window.most)") == 4 and "beside 3 more" in figures(lanes.first)["Speed"]


def test_two_dials_on_the_frontier(page):
    layers, precision = page.locator("#size"), page.locator("#precision")
    layers.focus()
    page.keyboard.press("Home")
    assert layers.get_attribute("aria-valuetext").startswith("4 layers")
    expect(page.locator("#strip rect")).to_have_count(4)  # a cell for every layer that runs
    page.keyboard.press("ArrowRight")
    precision.focus()
    page.keyboard.press("Home")
    assert precision.get_attribute("aria-valuetext") == "4 bits a weight"
    assert page.locator("#point-name").inner_text().startswith("5L-q4")
    facts = page.locator("#facts").inner_text()
    assert "Distance to the teacher" in facts and "A token, alone" in facts
    assert "blocks run all the teacher's layers" in page.locator("#strip-text").text_content()
    # The picture has an axis for each figure, and all 15 points; the one that is clicked is the dials'.
    assert re.search(r"The line joins the \d+ of 15 that nothing beats", page.locator("#frontier-text").inner_text())
    page.evaluate("() => { document.activeElement.blur(); }")
    box = page.locator("#frontier .u-over").bounding_box()
    for share in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        page.mouse.click(box["x"] + share * box["width"], box["y"] + 0.93 * box["height"])
    assert page.locator("#point-name").inner_text().startswith("6L")  # at the teacher's distance, 0
    for _ in page.locator("#chips button").all():
        page.locator("#chips button").first.click()
    page.uncheck("#auto")
    page.click("#run")
    expect(page.get_by_role("alert")).to_have_text("Choose a size, or auto.")
    page.locator("#precision").press("Home")
    page.locator("#add").press("Enter")
    expect(page.locator("#chips li")).to_have_text(["6L-q4×"])
    run(page)
    assert [body["model"] for body in page.bodies] == ["tiny:6L-q4"]


def test_a_conversation_goes_on_with_the_chosen_answer(page):
    page.locator("summary", has_text="System prompt").click()
    page.fill("#system", "Be kind.")
    run(page, "One")
    assert page.locator("#prompt").input_value() == ""
    page.get_by_label("Go on with the answer of 4L").check()
    said = page.locator("article").first.locator(".text > div").inner_text().strip()
    run(page, "Two")
    messages = page.bodies[-1]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert [messages[0]["content"], messages[1]["content"], messages[3]["content"]] == ["Be kind.", "One", "Two"]
    assert said[:3] in messages[2]["content"]
    assert page.locator("#transcript strong").all_inner_texts() == ["You", "4L", "You"]
    page.click("#again")  # the latest question, with what is chosen now
    finished(page)
    assert page.bodies[-1]["messages"] == messages
    page.click("#new")
    expect(page.locator("#transcript")).to_be_hidden()
    run(page, "Three")
    assert [message["role"] for message in page.bodies[-1]["messages"]] == ["system", "user"]


def test_markdown_is_rendered_and_harmless(page):
    def rendered(text: str) -> str:
        script = "async text => { const node = document.createElement('div');"
        script += " node.append((await import('/playground/markdown.js')).rendered(text)); return node.innerHTML; }"
        return page.evaluate(script, text)

    assert "<strong>a</strong>" in rendered("**a**") and "<code>" in rendered("```py\nx = 1\n```")
    assert "<td>1</td>" in rendered("|a|\n|-|\n|1|") and "<li>" in rendered("- a\n- b")
    link = rendered("[a](https://example.org)")
    assert 'rel="noopener noreferrer nofollow"' in link and 'href="https://example.org"' in link
    assert "&lt;b&gt;" in rendered("<b>a</b>") and rendered("![words](https://example.org/a.png)") == "<p>words</p>\n"
    for bad in (
        "<img src=x onerror=alert(1)>", "[a](javascript:alert(1))", "<script>1</script>", "<iframe src=/></iframe>",
        "<style>* { color: red }</style>", "<form action=/><input name=a>", '<p style="position: fixed" id=run>a</p>',
        "<svg><a xlink:href='javascript:1'><text>a</text></a></svg>", "[a](data:text/html,a)", "![a](x 'b\" onload=1')",
    ):  # fmt: skip
        tags = re.findall(r"<[^>]*>", rendered(bad))
        assert all(re.fullmatch(r'</?\w+( (target|rel)="[\w ]+")*>', tag) for tag in tags), tags
        assert not re.search("<(img|script|iframe|style|form|input|svg)", "".join(tags))


def test_errors_stand_where_the_answer_should_and_are_announced(page):
    run(page, prompt="far too long " * 500)
    expect(page.get_by_role("alert").filter(has_text="No answer: ")).to_contain_text("256")  # tokens of context
    expect(page.locator("#status")).to_have_text("")
    errors = page.locator("#results article .text .error")
    expect(errors).to_have_count(4)
    assert "256" in errors.first.inner_text() and page.locator("#prompt").input_value().startswith("far too long")
    expect(page.locator("#transcript")).to_be_hidden()  # it never came to be said
    forgive(page, 400)
    page.route(
        "**/chat/completions",
        lambda route: route.abort() if '"tiny:4L"' in route.request.post_data else route.continue_(),
    )
    run(page)
    expect(page.get_by_role("alert").filter(has_text="4L failed")).to_have_text(
        "4L failed: The server cannot be reached."
    )
    assert page.locator("article .keep:visible").count() == 3
    page.problems = [text for text in page.problems if "ERR_FAILED" not in text and "fetch" not in text]


def test_the_code_is_that_of_the_request_and_runs(page, server):
    page.fill("#prompt", 'It\'s a "quote",\nand a 🌍')
    page.fill("#slo-tpot", "60000")
    page.locator("#max-tokens").evaluate("node => { node.value = '5'; }")
    page.locator("#slo-e2e").fill("70000")
    code = page.locator("#code").inner_text()
    assert '"slo": {"tpot_ms": 60000, "e2e_ms": 70000}' in code and 'os.environ["BOOMERANG_API_KEY"]' in code
    page.select_option("#code-of", "6L-q4")
    code = page.locator("#code").inner_text()
    assert 'model="tiny:6L-q4"' in code and "slo" not in code
    environment = os.environ | {"BOOMERANG_API_KEY": KEY, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    page.select_option("#code-as", "curl")
    body = re.search(r"-d '(.*)'$", page.locator("#code").inner_text(), re.DOTALL).group(1).replace("'\\''", "'")
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    answer = httpx.post(server.url + "/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 200 and answer.text.rstrip().endswith("data: [DONE]")
    page.locator("summary", has_text="System prompt").click()
    page.select_option("#mode", "completion")
    page.select_option("#code-as", "python")
    code = page.locator("#code").inner_text()
    assert "client.completions.create(" in code and 'prompt="It\'s a \\"quote\\",\\nand a 🌍"' in code
    compile(code, "snippet", "exec")


def test_what_is_out_of_date_is_marked(page):
    run(page)
    expect(page.locator("#stale")).to_be_hidden()
    page.locator("summary", has_text="System prompt").click()
    page.fill("#temperature", "0.5")
    expect(page.locator("#stale")).to_be_visible()
    page.click("#again")
    finished(page)
    expect(page.locator("#stale")).to_be_hidden()
    page.route("**/metrics", lambda route: route.abort())
    page.reload()  # so that this page never hears anything
    expect(page.locator("#live-note")).to_contain_text("Out of date: nothing heard from the server for", timeout=15_000)
    assert "stale" in page.locator("#charts").get_attribute("class")
    page.unroute("**/metrics")
    expect(page.locator("#live-note")).to_have_text("The last two minutes.", timeout=5000)
    page.problems = [text for text in page.problems if "ERR_FAILED" not in text]


def test_a_locked_server_asks_for_its_key(new_page):
    page = new_page(key="")
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    expect(page.locator("#open")).to_be_hidden()
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("This key is not known here.")
    assert page.locator("#key").get_attribute("aria-invalid") == "true" and violations(page) == []
    page.fill("#key", KEY)
    page.click("text=Unlock")
    expect(page.locator("#status")).to_have_text("Ready.")
    run(page)
    page.click("#forget-key")
    expect(page.locator("#locked")).to_be_visible()
    forgive(page, 401)


def test_sizes_that_sleep_are_told_and_can_be_woken(page, server):
    card = {"state": "asleep", "largest": "4L", "seconds_to_wake": 0.25}

    def models(route) -> None:
        answer = route.fetch()
        found = answer.json()
        for model in found.get("data", [found]):
            model |= {} if "layers" in model else {"sleep": card}
        route.fulfill(response=answer, json=found)

    def wake(route) -> None:
        card["state"] = "awake"
        route.fulfill(json={})

    page.route("**/v1/models**", models)
    page.route("**/wake", wake)
    page.reload()
    expect(page.locator("#sleep-text")).to_contain_text("Sizes above 4L are asleep")
    page.click("#wake")
    expect(page.locator("#sleep")).to_be_hidden(timeout=10_000)


def test_a_crowd_can_be_stopped_and_shows_in_the_chart(page):
    page.fill("#crowd-size", "4")
    page.click("#crowd")
    expect(page.locator("#crowd")).to_have_text("Stop crowd")
    expect(page.locator("#mix-text")).to_have_text(re.compile(r"Now: \d+ at \dL"), timeout=15_000)
    page.click("#crowd")
    expect(page.locator("#mix-text")).to_have_text("Nothing is running.", timeout=15_000)
    assert page.locator("#charts canvas").count() == 4


def violations(page) -> list[str]:
    """What axe-core finds, as rules with the elements."""
    axe = pytest.importorskip("axe_playwright_python.base", reason="needs axe-playwright-python")
    page.evaluate(axe.AXE_SCRIPT)  # through the debugger: no policy of the page is in its way
    found = page.evaluate("() => axe.run()")["violations"]
    return [f"{rule['id']}: {[node['target'] for node in rule['nodes']]}" for rule in found]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(new_page, theme, size):
    page = new_page(viewport=size, color_scheme=theme)
    run(page)
    run(page, tokens=9)
    for summary in page.locator("summary:visible").all():
        summary.click()
    page.fill("#temperature", "0.5")  # with the mark of what is out of date
    assert violations(page) == []
    page.click("#new")
    run(page, prompt="far too long " * 500)
    assert violations(page) == []
    forgive(page, 400)


def test_a_phone_has_all_of_it_in_2000_pixels(new_page):
    page = new_page(viewport=PHONE, has_touch=True)
    run(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 375
    assert page.evaluate("() => document.documentElement.scrollHeight") <= 2000


def test_the_keyboard_reaches_everything_once_and_runs(page):
    page.locator("body").press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "skip"
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate("() => document.activeElement.id || document.activeElement.tagName")
        if name == "BODY":
            break
        reached.append(name)
    controls = page.locator("input:visible, select:visible, textarea:visible, button:visible:enabled")
    wanted = [name for name in controls.evaluate_all("nodes => nodes.map(node => node.id)") if name]
    assert [name for name in reached if name in wanted] == wanted  # in the order in which they are seen
    page.locator("#max-tokens").evaluate("node => { node.value = '4'; }")
    page.locator("#prompt").focus()
    page.locator("#prompt").press("Control+Enter")
    expect(page.locator("#status")).to_have_text(re.compile("^Done"), timeout=30_000)


def test_only_its_own_files_are_served(server):
    names = ("app.js", "lane.js", "app.css", "icon.svg", "vendor/uPlot.iife.min.js", "vendor/purify.min.js")
    for name in names:
        answer = httpx.get(f"{server.url}/playground/{name}")
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
    for name in ("__init__.py", "..%2f..%2fapp.py", "nothing.js", "vendor/vendor.json", "vendor"):
        assert httpx.get(f"{server.url}/playground/{name}").status_code == 404
    # What sizes there are is for those who may ask them.
    assert httpx.get(f"{server.url}/playground/pair.json").status_code == 401
