"""The real command, killed at random moments while it trains or saves: the student is that of an undisturbed run."""

import random
import subprocess
from pathlib import Path

import pytest

from paligemma_jax.shapes_world.samples import scene_sample
from tests import kills
from tests.patch_vit.small import VARIANTS, small_clip

EPOCHS = 12

pytestmark = pytest.mark.slow


def start(directory: Path, output: Path) -> subprocess.Popen:
    student = VARIANTS["masked"]
    sizes = {name: getattr(student, name) for name in ("image_size", "patch_size", "embed_dim", "num_layers")}
    sizes |= {"num_heads": student.num_heads, "mlp_dim": student.mlp_dim, "batch_size": 8, "epochs": EPOCHS}
    folders = {"teacher": directory / "clip", "train": directory / "train", "val": directory / "val"}
    return kills.start("patch_vit_distill", directory / "cache", output_dir=output, **folders, **sizes)


def saved(output: Path) -> int:
    """Checkpoints begun, finished or not, by the highest number of steps."""
    names = [path.name.partition(".")[0] for path in (output / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def test_killed_at_random_moments(tmp_path):
    for name, count in (("train", 24), ("val", 4)):
        (tmp_path / name).mkdir()
        for i in range(count):
            scene_sample(len(name), i).image.resize((40, 40)).save(tmp_path / name / f"{i}.png")
    small_clip().save(tmp_path / "clip")
    _, err = start(tmp_path, tmp_path / "whole").communicate(timeout=120)
    assert f"epoch {EPOCHS}/{EPOCHS}" in err, err

    rng = random.Random(2)
    for epoch in sorted(rng.sample(range(1, EPOCHS - 1), 3)):  # the state of an epoch is being written, or was just now
        process = start(tmp_path, tmp_path / "parts")
        assert kills.kill_when(process, lambda epoch=epoch: saved(tmp_path / "parts") >= 3 * epoch)
    _, err = start(tmp_path, tmp_path / "parts").communicate(timeout=120)
    assert "goes on from step" in err, err
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
