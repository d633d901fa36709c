"""The real command as a process of its own, which is killed (-9) at a chosen moment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PAUSE_S = 0.002


def start(config: str, cache: Path, **keys: object) -> subprocess.Popen:
    """`main.py` with a file of configs/ on CPU; compiled programs are kept in `cache`."""
    arguments = [f"--config.{key}={value}" for key, value in ({"platform": "cpu"} | keys).items()]
    return subprocess.Popen(
        [sys.executable, ROOT / "main.py", f"--config=configs/{config}.py", *arguments],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill_when(process: subprocess.Popen, reached: Callable[[], bool]) -> bool:
    """Kill a process as soon as something is reached; False if it ended before."""
    while process.poll() is None and not reached():
        time.sleep(_PAUSE_S)
    was_running = process.poll() is None
    if was_running:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    return was_running
