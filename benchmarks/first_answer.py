"""Seconds from the command of the web page to its first answer in a browser, without and with a compilation cache.

    python benchmarks/first_answer.py

Needs chromium, and `pip install playwright gradio`.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from paligemma_jax.files import write_text

ROOT = Path(__file__).resolve().parents[1]
_WAIT_MS = 120_000
_HEADER = """# The first answer of the web page

Seconds from `python main.py --config=configs/ui.py` until the address is printed, a button of the page can be pressed,
and its answer is there. The browser runs already. Cold: no compiled program is on the disk.

"""


def first_answer(cache: str) -> tuple[float, float, float]:
    """Seconds to the address, to the button and to the answer; compiled programs are kept in `cache`."""
    from playwright.sync_api import sync_playwright

    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        start = time.perf_counter()
        command = [sys.executable, "main.py", "--config=configs/ui.py", "--config.port=0"]
        environment = os.environ | {"XDG_CACHE_HOME": cache}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as server:
            try:
                address = re.search(r"http://\S+", server.stderr.readline())[0]
                times = [time.perf_counter() - start]
                page.goto(address, timeout=_WAIT_MS, wait_until="domcontentloaded")
                page.get_by_role("button", name="Describe it").click(timeout=_WAIT_MS)
                times.append(time.perf_counter() - start)
                page.locator("#answer .pj-numbers").wait_for(timeout=_WAIT_MS)
                times.append(time.perf_counter() - start)
            finally:
                browser.close()
                server.terminate()
    return tuple(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--starts", default=3, type=int, help="with a cache; the one without is one more")
    parser.add_argument("--out", default=ROOT / "benchmarks/results/first_answer.md", type=Path)
    args = parser.parse_args()
    about = machine.describe()
    lines = [
        f"{datetime.date.today().isoformat()}: {about['cpu']}, {about['cores']} cores, jax {about['jax']}, the shipped "
        f"model. Load average before, of other programs: {os.getloadavg()[0]:.1f}.",
        "",
        "| start | address | button | first answer |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as cache:
        for i in range(args.starts + 1):
            times = " | ".join(f"{seconds:.1f}" for seconds in first_answer(cache))
            lines.append(f"| {'again' if i else 'cold'} | {times} |")
            print(lines[-1], flush=True)
    write_text(args.out, _HEADER + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
