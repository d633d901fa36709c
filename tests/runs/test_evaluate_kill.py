"""An evaluation, killed at random moments: its records and its result are those of an undisturbed run.

With more kills: EVALUATION_KILLS=10 python -m pytest -n 0 -m slow tests/runs/test_evaluate_kill.py
"""

import os
import random
import subprocess
from pathlib import Path

import pytest

from benchmarks.scenes_as_coco import write
from tests import kills
from tests.runs.test_folder import contents

KILLS = int(os.environ.get("EVALUATION_KILLS", "3"))
SCENES = 40 * (KILLS + 1)

pytestmark = pytest.mark.slow


def start(directory: Path, output: Path) -> subprocess.Popen:
    settings = {"data": directory / "scenes" / "detect.jsonl", "metric": "detection_f1", "batch_size": 4}
    return kills.start("evaluate", directory / "cache", output_dir=output, **settings)


def written(output: Path) -> int:
    """Bytes of records."""
    records = output / "records.jsonl"
    return records.stat().st_size if records.exists() else 0


def test_killed_at_random_moments(tmp_path):
    write(tmp_path / "scenes", SCENES)
    _, err = (process := start(tmp_path, tmp_path / "whole")).communicate(timeout=300)
    assert process.returncode == 0, err
    whole, rng, output = contents(tmp_path / "whole"), random.Random(3), tmp_path / "killed"
    assert "result.json" in whole
    total = written(tmp_path / "whole")
    for moment in sorted(rng.uniform(0.01, 0.9) for _ in range(KILLS)):
        process = start(tmp_path, output)
        assert kills.kill_when(process, lambda moment=moment: written(output) >= moment * total)
    _, err = (process := start(tmp_path, output)).communicate(timeout=300)
    assert process.returncode == 0, err
    assert contents(output) == whole
