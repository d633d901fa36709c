"""A folder of pictures, killed at random moments: records, pictures and exports are those of an undisturbed run.

With more kills: FOLDER_KILLS=10 python -m pytest -n 0 -m slow tests/runs/test_folder_kill.py
"""

import os
import random
import subprocess
from pathlib import Path

import pytest

from paligemma_jax.shapes_world.samples import scene_sample
from tests import kills
from tests.runs.test_folder import contents

PICTURES, KILLS = 300, int(os.environ.get("FOLDER_KILLS", "4"))

pytestmark = pytest.mark.slow


def start(directory: Path, output: Path, **keys: object) -> subprocess.Popen:
    settings = {"image": directory / "pictures", "prompt": "segment star ; circle", "max_new_tokens": 30}
    settings |= {"export": "coco,yolo", "output_dir": output, "batch_size": 8}
    return kills.start("tiny", directory / "cache", **(settings | keys))


def written(output: Path) -> int:
    """Files and bytes of records: what grows while the run works."""
    records = output / "records.jsonl"
    size = records.stat().st_size if records.exists() else 0
    return size + 1000 * len(list(output.glob("*_drawn.png")))


def same_names(output: Path) -> dict[str, bytes]:
    """`contents` without the name of the folder, which records have in the paths of masks."""
    return {name: data.replace(bytes(output), b"OUT") for name, data in contents(output).items()}


def test_killed_at_random_moments(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(PICTURES):
        scene_sample(1, i).image.resize((96, 96)).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "7.png").write_bytes(b"damaged")
    process = start(tmp_path, tmp_path / "whole")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and f"{PICTURES - 1} of {PICTURES} pictures, 1 failed" in err, err
    whole, rng = same_names(tmp_path / "whole"), random.Random(3)
    assert len([name for name in whole if name.endswith("_drawn.png")]) > PICTURES / 2
    assert any("_mask_" in name for name in whole) and "coco_results.json" in whole

    output, total = tmp_path / "killed", written(tmp_path / "whole")
    for moment in sorted(rng.uniform(0.01, 0.95) for _ in range(KILLS)):
        process = start(tmp_path, output, resume=True)
        assert kills.kill_when(process, lambda moment=moment: written(output) >= moment * total)
    process = start(tmp_path, output, resume=True)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and f"{PICTURES - 1} of {PICTURES} pictures, 1 failed" in err, err
    assert same_names(output) == whole
