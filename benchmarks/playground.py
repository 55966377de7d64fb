"""`python -m benchmarks.playground --url http://localhost:8000`: pictures of the playground for `docs/deployment.md`.

The server has the default pair, `--quantization none` and `--precision-dial on`: beside a file's own codes fewer bits
gain nothing. Each picture carries the text that it shows, as its description: `tests/test_pages.py` holds the names and
figures in it to those of the pair.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs/images"
# name -> window and theme
PICTURES = {"light": (1280, 1000, "light"), "dark": (1280, 1000, "dark"), "phone": (375, 800, "light")}


def take(url: str, folder: Path) -> None:
    """Ask the question that the page comes with, in each window, and keep what is seen then."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in (next(iter(PICTURES)), *PICTURES):  # the first one twice: at first everything is cold
            width, height, theme = PICTURES[name]
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
            page.goto(url)
            expect(page.locator("#status")).to_have_text("Ready.", timeout=60_000)
            page.click("#run")
            expect(page.locator("#status")).to_have_text("Done: 4 answers.", timeout=300_000)
            page.wait_for_timeout(2500)  # the charts' next figures
            note = PngInfo()
            note.add_itxt("Description", page.inner_text("body"))
            picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB").quantize(256)
            picture.save(folder / f"playground-{name}.png", pnginfo=note, optimize=True)
            page.close()
        browser.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8000/")
    parser.add_argument("--out", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    take(arguments.url, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
