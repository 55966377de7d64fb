# /// script
# dependencies = ["open-webui", "playwright", "torch==2.13.0+cpu"]
# ///
"""Open WebUI as its makers ship it, in a real browser: its backend asks the server, with its built-in tools."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common import MODEL, QUESTION, URL, report
from playwright.sync_api import Page, sync_playwright

asked: list[dict] = []  # bodies of chat completions
refused: list[urllib.error.HTTPError] = []


class Between(BaseHTTPRequestHandler):
    """Passes on what Open WebUI asks of the server, and notes it."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if body:
            asked.append(json.loads(body))
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(URL + self.path, body or None, headers, method=self.command)
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
            refused.append(error)
        with answer:
            self.send_response(answer.status)
            self.send_header("content-type", answer.headers["content-type"])
            self.end_headers()
            while piece := answer.read1():
                self.wfile.write(piece)

    do_POST = do_GET

    def log_message(self, *args) -> None:
        pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(folder: str, base_url: str) -> tuple[subprocess.Popen, str]:
    """Open WebUI with its defaults, but without accounts and without downloads: the process, and its address."""
    port = free_port()
    settings = {
        "DATA_DIR": folder, "OPENAI_API_BASE_URL": f"{base_url}/v1", "OPENAI_API_KEY": "none", "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "none", "ENABLE_OLLAMA_API": "False", "OFFLINE_MODE": "True", "DEFAULT_MODELS": MODEL,
        "RAG_EMBEDDING_ENGINE": "openai", "DO_NOT_TRACK": "True", "ANONYMIZED_TELEMETRY": "False",
    }  # fmt: skip
    program = Path(sys.executable).with_name("open-webui")
    command = [str(program), "serve", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, env=os.environ | settings, stdout=sys.stderr)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        assert process.poll() is None, "Open WebUI ended"
        try:
            urllib.request.urlopen(f"{address}/health").close()
            return process, address
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("Open WebUI did not start")


# Counts how the answer grows, as often as the page changes.
WATCH = """() => {
  window.lengths = new Set();
  new MutationObserver(() => {
    const answer = [...document.querySelectorAll("#response-content-container")].at(-1);
    if (answer?.innerText.trim()) window.lengths.add(answer.innerText.length);
  }).observe(document.body, {childList: true, characterData: true, subtree: true});
}"""
# What a user saves as a model with parameters of its own.
CREATE = """model => fetch("/api/v1/models/create", {
  method: "POST", body: JSON.stringify(model),
  headers: {authorization: `Bearer ${localStorage.token}`, "content-type": "application/json"},
}).then(async answer => { if (!answer.ok) throw new Error(await answer.text()); })"""
CALL = {"name": "get_current_timestamp", "parameters": {}}  # one of its built-in tools


def ask(page: Page, address: str, model: str, is_first: bool = False) -> str:
    """A new chat: type the question, press Enter, read what is shown once it is whole."""
    page.goto(f"{address}/?model={model}")
    page.locator("#chat-input").wait_for(timeout=60_000)
    if is_first:
        page.get_by_role("button", name="Okay, Let's Go!").click(timeout=60_000)  # of what is new
    page.evaluate(WATCH)
    page.locator("#chat-input").click()
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.locator(".copy-response-button").last.wait_for(timeout=180_000)
    return page.locator("#response-content-container").last.inner_text().strip()


def main() -> None:
    between = ThreadingHTTPServer(("127.0.0.1", 0), Between)
    threading.Thread(target=between.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, sync_playwright() as driver:
        process, address = serve(folder, f"http://127.0.0.1:{between.server_port}")
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        lengths: list[int] = []

        def with_parameters(name: str, **parameters: object) -> str:
            model = {"id": name, "name": name, "base_model_id": MODEL, "meta": {}}
            page.evaluate(CREATE, model | {"params": {"custom_params": parameters}})
            return name

        def text() -> bool:
            said = ask(page, address, MODEL, is_first=True)
            lengths.extend(page.evaluate("[...window.lengths]"))
            chat = next(body for body in asked if body.get("tools"))  # its built-in ones
            return bool(said) and chat["model"] == MODEL and not refused

        def stream() -> bool:
            return len(lengths) > 2 and next(body for body in asked if body.get("tools"))["stream"]

        def structured() -> bool:
            form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": {"city": "Bern"}}}}
            said = ask(page, address, with_parameters("held", response_format=form))
            return json.loads(said) == {"city": "Bern"}

        def tools() -> bool:
            model = with_parameters("caller", structured_outputs={"choice": [json.dumps(CALL), "done"]})
            for _ in range(10):
                since = len(asked)
                said = ask(page, address, model)
                results = [m for body in asked[since:] for m in body["messages"] if m["role"] == "tool"]
                if results:
                    return all("current_iso" in str(result["content"]) for result in results) and "done" in said
            raise AssertionError("the model never called the tool")

        try:
            report(text=text, stream=stream, structured=structured, tools=tools)
        finally:
            if os.environ.get("OPEN_WEBUI_PICTURE"):
                page.screenshot(path=os.environ["OPEN_WEBUI_PICTURE"])
            browser.close()
            process.terminate()
            process.wait(30)


main()
