"""The real command, killed at random moments while it indexes: at last the index is that of an undisturbed run."""

import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.errors import DataError
from paligemma_jax.patch_vit import index as indexes
from paligemma_jax.shapes_world.samples import scene_sample
from tests import kills
from tests.patch_vit.small import small_clip, small_student

PICTURES, KILLS = 300, 4

pytestmark = pytest.mark.slow


def start(directory: Path, index: Path) -> subprocess.Popen:
    keys = {"run": "search", "image": directory / "pictures", "student": directory / "student"}
    keys |= {"clip": directory / "clip", "output_dir": directory / "out", "index": index, "save_every_s": 0.0}
    return kills.start("patch_vit", directory / "cache", **keys)


def indexed(path: Path) -> int:
    try:
        return len(indexes.load(path).entries)
    except DataError:
        return 0


def test_killed_at_random_moments(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(PICTURES):
        scene_sample(1, i).image.resize((96, 96)).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "0.png").write_bytes(b"damaged")
    small_student("masked").save(tmp_path / "student")
    small_clip().save(tmp_path / "clip")
    out, err = start(tmp_path, tmp_path / "undisturbed").communicate(timeout=120)
    assert "red circle" in out, err

    rng, path = random.Random(1), tmp_path / "killed"
    for share in sorted(rng.uniform(0.05, 0.9) for _ in range(KILLS)):
        assert kills.kill_when(start(tmp_path, path), lambda share=share: indexed(path) >= share * PICTURES)
        assert indexed(path) >= share * PICTURES
    assert not indexes.load(path).is_complete
    already = indexed(path)
    _, err = start(tmp_path, path).communicate(timeout=120)
    assert f"{PICTURES - 1 - already} embedded" in err and "indexing was not finished" in err
    first, second = indexes.load(path), indexes.load(tmp_path / "undisturbed")
    assert first.is_complete and first.entries == second.entries and first.failed == second.failed
    np.testing.assert_allclose(first.student, second.student, atol=1e-6)
    np.testing.assert_allclose(first.teacher, second.teacher, atol=1e-6)
