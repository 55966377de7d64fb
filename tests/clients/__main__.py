"""Every client stack of this folder in its newest version against a server: `python -m tests.clients`.

Python's run with `uv run`, which makes each an environment from the head of its script; JavaScript's with npm.
Those are skipped where npm is missing. Prints a table and exits 1 if anything failed, or a client that was named
could not be tried.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.api import templates
from tests.api.tiny import RunningServer, make_pair
from tests.clients import javascript

FOLDER = Path(__file__).parent
TORCH = "https://download.pytorch.org/whl/torch"  # builds for CPU: the one of PyPI brings gigabytes of CUDA
CHECKS = ("text", "stream", "structured", "tools", "embeddings")
PAGE = """# Clients

Each client in its newest version, unmodified, asked a server with a tiny random model. `make test-clients` runs them
and writes this page. An empty cell is what a client does not offer, or what its script does not try.

openai-agents 0.24.0 raises `ModelBehaviorError` where `/v1/responses` ends an answer at its limit of tokens
(`findings/openai_agents_incomplete.sh`). Its `OpenAIChatCompletionsModel` gives the text so far.

| client | version | text | stream | structured output | tool loop | embeddings |
|---|---|---|---|---|---|---|
"""


def scripts() -> dict[str, Path]:
    found = [*FOLDER.glob("[a-z]*_.py"), *FOLDER.glob("*.mjs")]
    return {path.stem.rstrip("_").replace("_", "-"): path for path in sorted(found)}


def run_python(path: Path, url: str, folder: Path) -> dict[str, str]:
    """What the script found; nothing if it did not start."""
    wheels = {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", TORCH)} if "+cpu" in path.read_text() else {}
    command = [sys.executable, "-m", "uv", "run", "--quiet", "--upgrade", str(path), url]
    return results_of(subprocess.run(command, cwd=folder, env=os.environ | wheels, capture_output=True, text=True))


def run_javascript(path: Path, url: str, folder: Path) -> dict[str, str]:
    """The same of a script for node."""
    script = path.read_text()
    packages = re.search(r"packages: (.+)", script)[1].split()
    results = results_of(javascript.run(script, packages, url, folder))
    if not results:
        return {}
    manifest = folder / "node_modules" / packages[0].split("@")[0] / "package.json"
    return {"version": json.loads(manifest.read_text())["version"]} | results


def results_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What a client's script printed last."""
    sys.stderr.write(done.stderr[-6000:])
    try:
        return json.loads(done.stdout.strip().split("\n")[-1])
    except ValueError:
        return {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="some of them; default: all")
    parser.add_argument("--write", type=Path, help="this page gets the rows, in place of those of the same names")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(scripts()):
        parser.error(f"there is no {', '.join(sorted(unknown))}, only {', '.join(scripts())}")
    wanted = {name: path for name, path in scripts().items() if name in (arguments.names or scripts())}
    rows, num_failed = {}, 0
    if reason := javascript.why_not():
        for name in [name for name, path in wanted.items() if path.suffix == ".mjs"]:
            print(f"{name} is skipped: it {reason}.", file=sys.stderr)
            num_failed += name in arguments.names
            del wanted[name]
    if not wanted:
        return int(num_failed > 0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "template").write_text(templates.LLAMA3)
        # Open WebUI's own tools are 20,000 characters, and so are tokens here; it sets no limit to an answer.
        room = ("--kv-cache-memory", "128MiB", "--max-model-len", "32768", "--default-max-tokens", "2000")
        template = ("--chat-template", str(folder / "template"))
        with RunningServer(make_pair(folder, max_len=32768), *template, *room) as server:
            for name, path in wanted.items():
                own = folder / name
                own.mkdir()
                run = run_python if path.suffix == ".py" else run_javascript
                results = run(path, server.url, own)
                version = results.pop("version", "?")
                cells = [results.get(check, "" if results else "did not start") for check in CHECKS]
                num_failed += any(cell not in ("yes", "") for cell in cells)
                rows[name] = "| " + " | ".join([name, version, *cells]) + " |"
                print(rows[name], flush=True)
    if arguments.write:
        before = arguments.write.read_text().splitlines() if arguments.write.is_file() else []
        rows = {name: line for name in scripts() for line in before if line.startswith(f"| {name} |")} | rows
        arguments.write.write_text(PAGE + "".join(f"{rows[name]}\n" for name in sorted(rows)))
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
