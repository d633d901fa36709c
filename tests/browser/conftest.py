"""Pages in processes of their own, and a browser that notes what it asks for and complains about."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
ANSWER_MS = 60_000  # programs may have to be compiled
_SWITCHES = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@contextlib.contextmanager
def running(*settings: str) -> Iterator[SimpleNamespace]:
    """A page in a process: its address, and the lines it wrote to stderr."""
    command = [sys.executable, "main.py", "--config=configs/ui.py", "--config.port=0"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [*command, *(f"--config.{setting}" for setting in settings)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        lines: list[str] = []
        try:
            address = re.search(r"http://\S+", process.stderr.readline())[0]
            threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
            yield SimpleNamespace(address=address, lines=lines, process=process)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def chromium() -> Iterator[object]:
    """A browser of the machine, as playwright drives it."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path, "chromium is needed: apt-get install chromium"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(_SWITCHES))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def full(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """The full page of the shipped model, which may talk for long, token by token."""
    checkpoint = tmp_path_factory.mktemp("page") / "talkative"
    shutil.copytree(ROOT / "assets" / "tiny", checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 8192
    (checkpoint / "config.json").write_text(json.dumps(config))
    with running(f"checkpoint={checkpoint}", "max_new_tokens=4000", "num_steps=1") as server:
        yield server


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., object]]:
    """visit(server, ...): its page in a browser of its own, open at once; nothing may go wrong in it meanwhile."""
    pages, asked, complaints = [], [], []

    def open_(server: SimpleNamespace, **options: object) -> object:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.set_default_timeout(30_000)
        page.goto(server.address, wait_until="domcontentloaded", timeout=ANSWER_MS)
        page.locator("#ask").wait_for(timeout=ANSWER_MS)
        page.wait_for_function("() => !document.body.innerText.includes('Loading...')")
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.context.close()
    outside = [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    assert asked and not outside
    assert not complaints
