"""run=patch_vit_distill and make_patch_vit: what is told to the training, which is tested with patch_vit/."""

import dataclasses

import pytest

from configs import make_patch_vit, patch_vit_distill
from paligemma_jax.patch_vit.distill import Settings
from paligemma_jax.patch_vit.plateau import Recipe
from paligemma_jax.runs import patch_vit_distill as distill_run
from paligemma_jax.shapes_world import patch_vit_stage

UNUSED = {"run", "checkpoint", "hub_id", "platform", "compilation_cache"}


def another(default):
    """A value of the same type that is not the default and is possible."""
    if isinstance(default, bool):
        return not default
    return {int: lambda: default * 2 + 1, float: lambda: default * 0.5, str: lambda: f"{default}x"}[type(default)]()


def arguments(values: dict) -> list[str]:
    return [f"--config.{key}={value}" for key, value in ({"compilation_cache": False} | values).items()]


@pytest.fixture
def told(monkeypatch):
    calls = []
    monkeypatch.setattr(distill_run, "distill", lambda settings, recipe: calls.append((settings, recipe)))
    return calls


def test_every_number_is_told_to_the_distillation(main, told):
    defaults = patch_vit_distill.get_config()
    changed = {key: another(defaults[key]) for key in defaults if key not in UNUSED} | {"dtype": "bfloat16"}
    changed |= {"plateau_factor": 0.25}
    assert main("--config=configs/patch_vit_distill.py", *arguments(changed))[0] == 0
    [(settings, recipe)] = told
    found = dataclasses.asdict(settings) | dataclasses.asdict(recipe)
    assert found == changed


def test_the_defaults_are_the_original_s(main, told):
    assert main("--config=configs/patch_vit_distill.py", *arguments({"train": "a", "teacher": "b"}))[0] == 0
    [(settings, recipe)] = told
    assert recipe == Recipe() and (settings.epochs, settings.batch_size) == (100, 64)
    assert settings.student == dataclasses.replace(settings.student, teacher="b")
    assert (settings.student.width, settings.student.num_patches) == (528, 64)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({}, "no pictures are given"),
        ({"train": "x"}, "teacher is empty"),
        ({"train": "x", "teacher": "y", "output_dir": ""}, "output_dir is empty"),
        ({"train": "x", "teacher": "y", "plateau_factor": 2.0}, "plateau_factor=2.0 is not possible"),
        ({"train": "x", "teacher": "nowhere.y"}, "nowhere.y does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(main, keys, message):
    status, _, err = main("--config=configs/patch_vit_distill.py", *arguments(keys))
    assert status == 1 and message in err and err.count("\n") == 1


def test_stages_of_make_patch_vit_are_told_every_number(main, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(patch_vit_stage, "build", lambda *args: calls.append(args))
    defaults = make_patch_vit.get_config()
    changed = {key: another(defaults[key]) for key in defaults if key not in UNUSED | {"dtype"}}
    changed |= {"work_dir": str(tmp_path / "work"), "output_dir": str(tmp_path / "out")}
    assert main("--config=configs/make_patch_vit.py", *arguments(changed))[0] == 0
    [(work, output, recipe)] = calls
    assert {"work_dir": work, "output_dir": output} | dataclasses.asdict(recipe) == changed


def test_settings_have_a_key_each():
    keys = set(patch_vit_distill.get_config())
    fields = {field.name for kind in (Settings, Recipe) for field in dataclasses.fields(kind)}
    assert fields == keys - UNUSED
