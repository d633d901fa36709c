"""The pictures of the web page in docs/web-page.md: python docs/screenshots.py (needs playwright and chromium)."""

import io
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser.conftest import ANSWER_MS, chromium, running  # noqa: E402

_VIEWS = {
    "page": {"viewport": {"width": 1180, "height": 860}, "color_scheme": "light"},
    "page-dark": {"viewport": {"width": 1180, "height": 860}, "color_scheme": "dark"},
    "page-phone": {"viewport": {"width": 390, "height": 1240}, "color_scheme": "light", "is_mobile": True},
}


def main(folder: Path) -> None:
    """Write a picture of the page for each of the views."""
    with running() as server, chromium() as browser:
        for name, view in _VIEWS.items():
            context = browser.new_context(**view)
            page = context.new_page()
            page.goto(server.address, wait_until="domcontentloaded", timeout=ANSWER_MS)
            page.get_by_role("button", name="Cut out the star").click(timeout=ANSWER_MS)
            page.locator("#objects table").wait_for(timeout=ANSWER_MS)
            page.locator("#download_png").wait_for()
            page.wait_for_timeout(500)  # for the picture to be shown
            with Image.open(io.BytesIO(page.screenshot())) as picture:
                few = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
                few.save(folder / f"{name}.png", optimize=True)
            context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images")
