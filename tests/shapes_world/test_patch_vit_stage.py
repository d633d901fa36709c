import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from paligemma_jax import checkpoints, patch_vit
from paligemma_jax.patch_vit import weights
from paligemma_jax.shapes_world import patch_vit_stage as stage
from paligemma_jax.shapes_world import teacher_stage

TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny"
RECIPE = stage.Recipe(
    seed=0, num_scenes=16, num_validation=4, teacher_scenes=8, teacher_steps=2, teacher_learning_rate=1e-3,
    teacher_batch_size=8, close_up_epochs=1, epochs=1, last_epochs=1, batch_size=8, learning_rate=1e-3, masked=True,
    same_norm=True, scale=3.0, encoder_from=str(TINY),
)  # fmt: skip


def test_pictures_are_written_once_and_whole(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), np.uint8)
    stage.write_pictures(tmp_path / "p", pixels)
    files = sorted((tmp_path / "p").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    times = [file.stat().st_mtime_ns for file in files]
    stage.write_pictures(tmp_path / "p", pixels)
    assert [file.stat().st_mtime_ns for file in files] == times
    np.testing.assert_array_equal(np.asarray(Image.open(files[1])), pixels[1])


def test_close_ups_cut_through_no_shape():
    """One scene with a shape in each of two corners: a window holds one of them, whole, or is left out."""
    pixels = np.zeros((1, 12, 12, 3), np.uint8)
    pixels[0, 1:3, 1:3], pixels[0, 8:11, 8:11] = 1, 2
    box = np.zeros((1, 4, 4), np.float32)
    box[0, :2] = np.array([[1, 1, 3, 3], [8, 8, 11, 11]]) / 12
    pool = {"pixels": pixels, "box": box}
    pool |= {"shape": np.array([[3, 4, -1, -1]], np.int8), "color": np.array([[0, 1, -1, -1]], np.int8)}
    pool = {key: np.repeat(values, 50, axis=0) for key, values in pool.items()}
    found = stage.close_ups(pool, 6, 200, 0)
    assert 20 < len(found["pixels"]) < 200 and found["pixels"].shape[1:] == (6, 6, 3)
    for picture, shape, color in zip(found["pixels"], found["shape"], found["color"], strict=True):
        first = (picture == 1).any()
        assert (picture > 0).all(axis=-1).sum() == (4 if first else 9)
        assert shape.tolist() == ([3, -1, -1, -1] if first else [-1, 4, -1, -1])
        assert (color >= 0).tolist() == (shape >= 0).tolist()
    assert len(stage.close_ups(pool, 6, 7, 0)["pixels"]) == 7


def test_an_enlarged_student_has_its_positions_side_by_side():
    config = patch_vit.StudentConfig(image_size=4, patch_size=2, embed_dim=6, num_layers=1, num_heads=1, mlp_dim=4)
    positions = np.arange(4 * 7, dtype=np.float32).reshape(4, 7)
    large = stage.enlarged(patch_vit.Student(config, {"position_embedding": {"weight": positions}}), 8)
    found = large.params["position_embedding"]["weight"].reshape(4, 4, 7)
    assert large.config.grid == 4
    for row in range(4):
        for column in range(4):
            np.testing.assert_array_equal(found[row, column], positions.reshape(2, 2, 7)[row % 2, column % 2])


def test_the_pair_fits_together_and_is_small():
    config = patch_vit.StudentConfig(image_size=120, embed_dim=teacher_stage.PROJECTION, **stage.STUDENT)
    count = sum(int(np.prod(shape)) for shape in weights.student_shapes(config).values())
    tokenizer = teacher_stage.train_vocabulary(teacher_stage.phrases())
    geometry = teacher_stage.geometry(tokenizer, checkpoints.scan(TINY).config.vision)
    count += sum(int(np.prod(s)) for s in weights.clip_shapes(geometry).values())
    assert 2 * count < 5_800_000


@pytest.mark.slow
def test_all_stages_run_and_go_on(tmp_path, capsys):
    stage.build(tmp_path / "work", tmp_path / "out", RECIPE)
    student, clip = patch_vit.load(tmp_path / "out" / "student"), patch_vit.load_clip(tmp_path / "out" / "teacher")
    patch_vit.check_pair(student, clip)
    assert (
        student.config.grid == 12
        and student.params["scale"] == 3
        and sum(f.stat().st_size for f in (tmp_path / "out").rglob("*.*")) < 6_000_000
    )
    capsys.readouterr()
    stage.build(tmp_path / "work", tmp_path / "again", RECIPE)
    assert "teacher 2/2" not in capsys.readouterr().err
    again = patch_vit.load(tmp_path / "again" / "student")
    jax.tree.map(np.testing.assert_array_equal, again.params, student.params)
    plain = dataclasses.replace(RECIPE, masked=False, same_norm=False)
    stage.build(tmp_path / "work", tmp_path / "plain", plain)
    config = patch_vit.load(tmp_path / "plain" / "student").config
    assert not config.masked and not config.same_norm and not config.has_scale
