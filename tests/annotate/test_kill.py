"""The shipped model, killed at random moments and on a cluster: the rows are those of a run that was not disturbed.

With more pictures: ANNOTATE_PICTURES=2000 python -m pytest -n 0 -m "slow or ray" tests/annotate/test_kill.py
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from paligemma_jax.annotate import rows
from paligemma_jax.shapes_world.samples import scene_sample
from tests import kills

PICTURES = int(os.environ.get("ANNOTATE_PICTURES", "300"))
BROKEN = 20  # of them
KILLS = 5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), random.Random(0)
    for i in range(PICTURES):
        scene_sample(1, i).image.resize((96, 96)).save(folder / f"{i}.png")
    for i in rng.sample(range(PICTURES), BROKEN):
        data = (folder / f"{i}.png").read_bytes()
        (folder / f"{i}.png").write_bytes(data[: rng.randrange(len(data))])  # of length 0 too, perhaps
    return folder


def start(folder: Path, output: Path, **keys: object) -> subprocess.Popen:
    (output.parent / "prompts.txt").write_text("caption en\ndetect star ; circle\n")
    settings = {"image": folder, "output_dir": output, "prompts_file": output.parent / "prompts.txt"}
    settings |= {"shard_size": 64, "batch_size": 8, "max_new_tokens": 40} | keys
    return kills.start("annotate", output.parent / "cache", **settings)


def finish(process: subprocess.Popen) -> None:
    out, err = process.communicate(timeout=240 + PICTURES)
    expected = f"{PICTURES - BROKEN:,} of {PICTURES:,} pictures, {BROKEN} failed"
    assert process.returncode == 2 and out.startswith(expected), err


def found(directory: Path) -> list[rows.Row]:
    return [row for path in sorted(directory.glob("rows-*")) for row in rows.read(path)]


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "out"
    finish(start(folder, directory))
    return directory


def written(output: Path) -> int:
    """Bytes of rows, finished or not: what grows while a run works."""
    total = 0
    for path in (*output.glob("rows-*"), *output.glob("state/*.journal")):
        with contextlib.suppress(FileNotFoundError):  # renamed or removed just now
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("keys", [{}, pytest.param({"engine": "ray", "workers": 1}, marks=pytest.mark.ray)], ids=str)
def test_killed_at_random_moments(folder, undisturbed, tmp_path, keys):
    rng, total = random.Random(1), written(undisturbed)
    for moment in sorted(rng.uniform(0.02, 0.9) for _ in range(KILLS)):
        process = start(folder, tmp_path / "out", **keys)
        assert kills.kill_when(process, lambda moment=moment: written(tmp_path / "out") >= moment * total)
        for path in (tmp_path / "out").glob("rows-*.jsonl"):
            assert path.read_bytes() == (undisturbed / path.name).read_bytes()
    finish(start(folder, tmp_path / "out", **keys))
    for path in undisturbed.glob("rows-*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.ray
def test_ray_makes_the_same_rows_and_either_engine_goes_on(folder, undisturbed, tmp_path):
    process = start(folder, tmp_path / "out")
    while process.poll() is None and written(tmp_path / "out") < 0.3 * written(undisturbed):
        time.sleep(0.003)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "the same command goes on from here" in err
    finish(start(folder, tmp_path / "out", engine="ray", workers=1))
    assert found(tmp_path / "out") == found(undisturbed)
