"""config.run=evaluate: the table and the file; measuring itself is tested with shapes_world/."""

import inspect
import json
import math

import pytest

from paligemma_jax.shapes_world import evaluation
from paligemma_jax.shapes_world.foreign_scenes import foreign_sample, wide_foreign_sample
from paligemma_jax.shapes_world.samples import scene_sample, wide_sample

METRICS = {"caption": {"exact_en": 0.5, "exact_de": math.nan}, "counts": {"scenes": 3}}


@pytest.fixture(autouse=True)
def measured(monkeypatch) -> list[dict]:
    """Arguments that the evaluation was called with, by their names."""
    calls, signature = [], inspect.signature(evaluation.evaluate)

    def evaluate(*args, **options):
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        calls.append({name: value for name, value in bound.arguments.items() if name != "model"})
        return METRICS

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    return calls


def test_prints_a_table_and_writes_json(generate, measured, tmp_path):
    file = tmp_path / "new" / "metrics.json"
    status, out, err = generate(run="evaluate", num_scenes=3, scenes_seed=7, output=file)
    assert status == 0
    assert out == "caption exact_en  0.5000\ncaption exact_de  -\ncounts scenes     3\n"
    assert json.loads(file.read_text())["caption"] == {"exact_en": 0.5, "exact_de": None}
    expected = {"num_scenes": 3, "seed": 7, "source": scene_sample, "constrain": False}
    assert measured == [expected] and str(file) in err


@pytest.mark.parametrize(
    "data, source",
    [("foreign", foreign_sample), ("wide", wide_sample), ("wide_foreign", wide_foreign_sample)],
)
def test_pictures_of_another_program_or_world(generate, measured, data, source):
    assert generate(run="evaluate", data=data, num_scenes=3)[0] == 0
    assert measured[0]["source"] is source


def test_a_profile_is_written(generate, tmp_path):
    status, _, err = generate(run="evaluate", profile=tmp_path)
    [trace] = tmp_path.glob("plugins/profile/*/*.trace.json.gz")
    assert status == 0 and f"wrote {trace}" in err


def test_prints_json(generate):
    status, out, _ = generate(run="evaluate", format="json")
    assert status == 0 and json.loads(out)["counts"] == {"scenes": 3}


@pytest.mark.parametrize("keys, message", [({"num_scenes": 0}, "num_scenes=0"), ({"data": "coco"}, "give scenes")])
def test_bad_values_are_refused(refused, keys, message):
    assert message in refused(run="evaluate", **keys)
