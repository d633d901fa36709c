"""config.run=train: what is checked before training starts; training itself is tested with training/."""

import shutil
import sys

import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.runs import train as train_run


@pytest.fixture
def train(main, monkeypatch):
    """train(KEY=VALUE, ...) -> (exit status, stderr, settings and recipes that were trained with)."""
    trained = []
    monkeypatch.setattr(train_run, "finetune", lambda *given: trained.append(given[:2]))

    def run(**keys):
        arguments = [f"--config.{key}={value}" for key, value in ({"compilation_cache": False} | keys).items()]
        status, out, err = main("--config=configs/finetune.py", *arguments)
        assert out == ""
        return status, err, trained

    return run


def test_trains_with_the_recipe(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.jsonl").write_text("{}")
    status, err, [(settings, recipe)] = train(data="cats.jsonl", epochs=2, checkpoint="tiny", output_dir="out")
    assert (status, err) == (0, "wrote out: use it with --config.checkpoint=out\n")
    assert (settings.data, settings.epochs, settings.batch_size) == ("cats.jsonl", 2, 32)
    assert (recipe.learning_rate, recipe.b2) == (1e-5, 0.999)


def test_validation_on_the_training_data_is_told(train, tmp_path):
    (tmp_path / "cats.jsonl").write_text("{}")
    (tmp_path / "dogs.jsonl").write_text("{ }")
    data, place = tmp_path / "cats.jsonl", tmp_path / "out"
    assert "val_data has the same examples" in train(data=data, val_data=data, checkpoint="tiny", output_dir=place)[1]
    status, err, _ = train(data=data, val_data=tmp_path / "dogs.jsonl", checkpoint="tiny", output_dir=place)
    assert status == 0 and "val_data" not in err


@pytest.mark.parametrize("name", [".", "best"])
def test_what_training_starts_from_is_not_replaced_by_it(train, tmp_path, checkpoint, name):
    shutil.copytree(checkpoint, tmp_path / "out" / name, dirs_exist_ok=True)
    (tmp_path / "cats.jsonl").write_text("{}")
    keys = {"data": tmp_path / "cats.jsonl", "output_dir": tmp_path / "out", "overwrite": True}
    status, err, trained = train(checkpoint=tmp_path / "out" / name, **keys)
    assert status == 1 and "lies in output_dir=" in err and not trained


def test_edited_validation_data_are_other_data(train, tmp_path, monkeypatch):
    prints = []
    monkeypatch.setattr(train_run, "_check", lambda directory, fresh, overwrite: prints.append(fresh))
    (tmp_path / "cats.jsonl").write_text("{}")
    for text in ("{ }", "{  }"):
        (tmp_path / "val.jsonl").write_text(text)
        keys = {"data": tmp_path / "cats.jsonl", "val_data": tmp_path / "val.jsonl", "output_dir": tmp_path / "out"}
        assert train(checkpoint="tiny", **keys)[0] == 0
    assert prints[0]["val_data"] != prints[1]["val_data"] and prints[0]["data"] == prints[1]["data"]


def test_a_place_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir=.*file/out is not possible: .*; name a folder"):
        train_run._claim(tmp_path / "file" / "out", {}, overwrite=False)


@pytest.mark.parametrize("keys, message", [({}, "no data is given"), ({"data": "x", "output_dir": ""}, "output_dir")])
def test_needs_data_and_a_place(train, keys, message):
    status, err, trained = train(**keys)
    assert (status, trained) == (1, [])
    assert message in err and err.count("\n") == 1


def test_a_missing_package_says_what_to_install(train, monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "paligemma_jax.training.finetune":
                raise ModuleNotFoundError("no", name="orbax")

    for name in ("runs.train", "training.finetune"):
        monkeypatch.delitem(sys.modules, f"paligemma_jax.{name}")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    status, err, _ = train(data="x")
    assert status == 1 and err == 'error: run=train needs orbax: pip install -e ".[train]"\n'
