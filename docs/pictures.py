"""The pictures of docs/tour.md and the README, taken of a run's page: `python docs/pictures.py runs/phantom stage2-61`.

Needs Chromium and playwright, as tests/test_page_browser.py. The second word names a recorded group: stage and update.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

OUT = Path(__file__).parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PLAIN = ".turn { position: static !important } .code { display: none }"  # nothing lies over what is photographed


def save(data: bytes, name: str, height: int = 1100) -> None:
    """A PNG of 256 colours, cut to its upper `height` pixels."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.crop((0, 0, image.width, min(height, image.height)))
    image.quantize(256, dither=Image.Dither.NONE).save(OUT / name, optimize=True)


def main() -> None:
    path, group = Path(sys.argv[1]) / "page.html", sys.argv[2]
    (OUT / "tour").mkdir(exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme="light")
        page.goto(f"{path.resolve().as_uri()}#{group}")
        page.add_style_tag(content=PLAIN)
        page.check(".card.on .tokens [value='2']")
        for i, block in enumerate(page.query_selector_all("#update .card.on > .block"), 1):
            save(block.screenshot(), f"tour/{i}.png")
        save(page.query_selector("#glance").screenshot(), "tour/7.png", 900)
        save(page.query_selector("#writes").screenshot(), "tour/8.png", 900)
        page.add_style_tag(content="header, h2, .turn, #update > p, .facts, .look div + h5 { display: none }")
        save(page.screenshot(full_page=True), "page.png", 860)
        browser.close()


if __name__ == "__main__":
    main()
