import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from paligemma_jax import patch_vit
from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.patch_vit import distill as module
from paligemma_jax.patch_vit.augment import augment
from paligemma_jax.patch_vit.distill import Settings, distill, distill_loss
from paligemma_jax.patch_vit.plateau import Recipe
from paligemma_jax.patch_vit.student import PatchViT
from paligemma_jax.patch_vit.teacher_cache import TeacherCache, find_pictures, is_validation
from tests.patch_vit import reference
from tests.patch_vit.test_student import pixels_of, state_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def teacher(clip, tmp_path) -> Path:
    clip.save(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """24 to train on, in folders of folders, 5 to validate, and one that is damaged."""
    rng = np.random.default_rng(0)
    for i in range(29):
        path = (
            tmp_path
            / "pictures"
            / ("val" if i >= 24 else "train/a" if i % 2 else "train")
            / f"{i}.{'PNG' if i % 3 else 'jpg'}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (26, 31, 3), np.uint8)).save(path)
    whole = (tmp_path / "pictures" / "train" / "2.PNG").read_bytes()
    (tmp_path / "pictures" / "train" / "broken.png").write_bytes(whole[:200])
    (tmp_path / "pictures" / "train" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def settings(clip_dir, pictures, output, **changes) -> Settings:
    values = {
        "teacher": str(clip_dir),
        "train": str(pictures / "train"),
        "val": str(pictures / "val"),
        "extra": "",
        "output_dir": str(output),
        "cache": "",
        "start_from": "",
        "epochs": 2,
        "batch_size": 8,
        "dtype": "float32",
        "augment": True,
        "seed": 0,
        "log_every": 100,
        "image_size": 20,
        "patch_size": 5,
        "embed_dim": 12,
        "num_layers": 2,
        "num_heads": 3,
        "mlp_dim": 20,
        "masked": True,
        "same_norm": True,
    }
    return Settings(**values | changes)


def assert_same(first: Path, second: Path) -> None:
    a, b = patch_vit.load(first), patch_vit.load(second)
    assert a.config == b.config
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_the_loss_and_its_gradient_are_those_of_the_specification(student):
    """By float64 numpy: the loss, and its slope along random directions."""
    cfg, pixels = student.config, pixels_of(student, 2)
    targets = np.random.default_rng(5).normal(size=(2, cfg.embed_dim)).astype(np.float32)
    options = {"num_heads": cfg.num_heads, "masked": cfg.masked, "same_norm": cfg.same_norm}

    def expected(state) -> float:
        losses = []
        for picture, target in zip(pixels, targets.astype(np.float64), strict=True):
            pooled = reference.patch_vit(state, picture, **options)[2]
            losses.append(abs(pooled / np.linalg.norm(pooled) - target / np.linalg.norm(target)).mean())
        return 20 * float(np.mean(losses))

    loss = functools.partial(distill_loss, PatchViT(cfg), "float32")
    batch = {"pixels": pixels, "targets": targets}
    (found, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(student.params, batch)
    state = {key: value.astype(np.float64) for key, value in state_of(student).items()}
    np.testing.assert_allclose(found, expected(state), rtol=1e-5)
    gradients = state_of(_Holder(gradient))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = {key: rng.normal(size=value.shape) for key, value in state.items()}
        ahead, behind = ({key: state[key] + sign * 1e-6 * direction[key] for key in state} for sign in (1, -1))
        slope = (expected(ahead) - expected(behind)) / 2e-6
        np.testing.assert_allclose(sum((gradients[k] * direction[k]).sum() for k in state), slope, rtol=2e-3, atol=1e-3)


@dataclasses.dataclass
class _Holder:
    params: dict


def test_a_run_that_was_stopped_goes_on_bit_for_bit(teacher, pictures, tmp_path, monkeypatch, capsys):
    first = module.start(settings(teacher, pictures, tmp_path / "whole"))
    distill(settings(teacher, pictures, tmp_path / "whole"), Recipe())
    found = patch_vit.load(tmp_path / "whole")
    np.testing.assert_array_equal(found.params["scale"], 1.0)  # what the loss does not depend on stays
    np.testing.assert_array_equal(found.params["ln_post"]["weight"], 1.0)
    assert (found.params["patch_embedding"]["weight"] != first.params["patch_embedding"]["weight"]).any()
    said = capsys.readouterr().err
    assert "24 pictures to train on, 5 to validate" in said
    assert said.count("left out: ") == 1 and "1 pictures cannot be read" in said
    [line] = (tmp_path / "whole" / "corrupt.txt").read_text().splitlines()
    assert "broken.png is damaged or truncated" in line
    assert said.count("validation loss") == 2
    read, count = module.load_image, 0

    def dies(path):
        nonlocal count
        count += 1
        if count > 44:  # in the second epoch
            raise KeyboardInterrupt
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_image", dies)
        with pytest.raises(KeyboardInterrupt):
            distill(settings(teacher, pictures, tmp_path / "parts"), Recipe())
    assert patch_vit.load(tmp_path / "parts").config.masked  # of the first epoch
    distill(settings(teacher, pictures, tmp_path / "parts"), Recipe())
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_the_teacher_is_asked_once_for_each_content(teacher, pictures, tmp_path, monkeypatch):
    asked = []
    embed = patch_vit.Clip.embed_image
    monkeypatch.setattr(patch_vit.Clip, "embed_image", lambda self, x: asked.append(len(x)) or embed(self, x))
    cache = str(tmp_path / "cache.sqlite")
    distill(settings(teacher, pictures, tmp_path / "a", cache=cache, epochs=1), Recipe())
    assert asked == [64]
    (pictures / "train" / "2.PNG").rename(pictures / "train" / "moved.png")
    distill(settings(teacher, pictures, tmp_path / "b", cache=cache, epochs=1), Recipe())
    assert asked == [64]


def test_another_teacher_s_cache_is_refused(teacher, pictures, tmp_path):
    TeacherCache(tmp_path / "cache.sqlite", "another")
    with pytest.raises(DataError, match="holds what another teacher said"):
        distill(settings(teacher, pictures, tmp_path / "a", cache=str(tmp_path / "cache.sqlite")), Recipe())
    (tmp_path / "text").write_text("no database, and longer than a header of one " * 9)
    with pytest.raises(DataError, match="cannot be used as a cache"):
        TeacherCache(tmp_path / "text", "x")


@pytest.mark.slow
def test_a_run_starts_from_a_student_without_its_optimizer(teacher, pictures, masked_student, tmp_path):
    masked_student.save(tmp_path / "first")
    made = settings(teacher, pictures, tmp_path / "out", start_from=str(tmp_path / "first"), epochs=1)
    distill(made, Recipe(learning_rate=0.0))
    assert_same(tmp_path / "first", tmp_path / "out")


def test_extra_folders_are_split_by_content(teacher, pictures, tmp_path):
    cache = TeacherCache(tmp_path / "c.sqlite", "x")
    paths = find_pictures([str(pictures / "train"), str(pictures / "val")])
    known, corrupt = cache.fill(paths, patch_vit.load_clip(teacher))
    train, val = module.split({"train": [], "val": [], "extra": paths}, known)
    assert len(known) == 29 and len(corrupt) == 1 and sorted(train + val) == sorted(known)
    assert all(is_validation(known[path]) for path in val) and not any(is_validation(known[path]) for path in train)


@pytest.mark.slow
def test_mixed_precision_keeps_float32_weights(teacher, pictures, tmp_path):
    distill(settings(teacher, pictures, tmp_path / "half", dtype="bfloat16", epochs=1), Recipe())
    distill(settings(teacher, pictures, tmp_path / "full", epochs=1), Recipe())
    half, full = (patch_vit.load(tmp_path / name).params["patch_embedding"]["weight"] for name in ("half", "full"))
    assert half.dtype == np.float32 and (half != full).any()
    np.testing.assert_allclose(half, full, atol=0.01)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"embed_dim": 15}, "this CLIP has embeddings of 12 numbers, the student of 15"),
        ({"train": "nowhere"}, "nowhere is no folder"),
        ({"val": ""}, "no pictures to validate on"),
        ({"batch_size": 25}, "24 pictures do not fill one batch of 25"),
        ({"dtype": "float16"}, "give float32 or bfloat16"),
        ({"epochs": 0}, "give an integer of at least 1"),
        ({"teacher": ""}, "teacher is empty"),
    ],
)
def test_impossible_settings_are_refused(teacher, pictures, tmp_path, change, problem):
    with pytest.raises((ConfigError, DataError), match=problem):
        distill(settings(teacher, pictures, tmp_path / "out", **change), Recipe())


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no jpg, jpeg or png files"):
        find_pictures([str(tmp_path)])


def test_augmented_pictures_are_a_function_of_their_generator():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    first, again, other = (np.asarray(augment(image, 20, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert first.shape == (20, 20, 3) and (first == again).all() and (first != other).any()
    grey = [
        np.ptp(np.asarray(augment(image, 20, np.random.default_rng(s)), int), axis=2).max() == 0 for s in range(300)
    ]
    assert 3 <= sum(grey) <= 30  # about 5%


@pytest.mark.slow
def test_devices_share_a_batch(teacher, pictures, tmp_path):
    """Four devices train as one does, but for the order of sums."""
    program = f"""
import jax
jax.config.update("jax_num_cpu_devices", 4)
from pathlib import Path
from tests.patch_vit.test_distill import settings
from paligemma_jax.patch_vit.distill import distill
from paligemma_jax.patch_vit.plateau import Recipe
if __name__ == "__main__":
    assert jax.device_count() == 4
    distill(settings({str(teacher)!r}, Path({str(pictures)!r}), {str(tmp_path / "four")!r}, epochs=1), Recipe())
"""
    subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, env={**_environment(), "JAX_PLATFORMS": "cpu"}
    )
    distill(settings(teacher, pictures, tmp_path / "one", epochs=1), Recipe())
    a, b = (patch_vit.load(tmp_path / name).params for name in ("four", "one"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), a, b)
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(
            [sys.executable, "-c", program.replace("epochs=1", "batch_size=6")],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
