"""What is measured and told while a model is tuned, by the keys of configs/finetune.py."""

import json
import types
import warnings

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import ConfigError
from paligemma_jax.files import recover_folder
from paligemma_jax.runs import command_line
from paligemma_jax.runs import train as train_run
from paligemma_jax.training import finetune
from paligemma_jax.training.data import open_data
from paligemma_jax.training.optimizer import Recipe, make_optimizer
from paligemma_jax.training.step import init_state
from paligemma_jax.training.watch import BEST, Watch, make_validation, metric_named


@pytest.fixture
def told(monkeypatch, tmp_path):
    """told(KEY=VALUE, ...): the settings, the recipe and the watch that a run is told."""
    given = []
    monkeypatch.setattr(train_run, "finetune", lambda *arguments: given.append([*arguments[:2], arguments[4]]))
    for name in ("data", "val"):
        (tmp_path / f"{name}.jsonl").write_text(f"{{}}  {name}")

    def run(**keys):
        keys = {"data": tmp_path / "data.jsonl", "output_dir": tmp_path / "out", "compilation_cache": False} | keys
        arguments = [f"--config.{key}={value}" for key, value in keys.items()]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"the load_module\(\)", DeprecationWarning)  # in ml_collections
            assert command_line.main(["--config=configs/finetune.py", *arguments]) == 0
        return given[-1]

    return run


def test_keys_are_told(told, tmp_path):
    assert told()[1:] == [Recipe(), Watch()]  # the defaults of the config are those of the code
    keys = {"val_every": 7, "val_examples": 9, "metric": "", "patience": 3, "keep_best": False, "log": "tensorboard"}
    watch = told(val_data=tmp_path / "val.jsonl", **keys)[2]
    assert watch == Watch(val_data=str(tmp_path / "val.jsonl"), **keys)
    keys = {"schedule": "linear", "lr_multipliers": "vision_tower=0.1;.*=1", "decayed": "bias", "b1": 0.5}
    keys |= {"dropout": 0.25, "ema": 0.5}
    assert told(**keys)[1] == Recipe(**keys)


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "0.png")
    line = json.dumps({"image": "0.png", "prefix": "caption en", "suffix": "a star"})
    (tmp_path / "val.jsonl").write_text(f"{line}\n" * 5)
    return tmp_path / "val.jsonl"


@pytest.fixture
def plan(small, random_params, processor, data, tmp_path, monkeypatch):
    """plan(KEY=VALUE, ...): the rule of validation, with the arguments of `HeldOut` as `held_out`."""
    made = []

    class Recorded:
        def __init__(self, *arguments):
            made.append(arguments)

        def __call__(self, params, check):
            check()
            return {"val_loss": params["scale"]}, []

    monkeypatch.setattr("paligemma_jax.training.watch.HeldOut", Recorded)
    model = pj.PaliGemma(small, random_params(small), processor)

    def save(params, folder):
        assert not list(folder.iterdir())
        (folder / "model").write_text(str(params["w"]))

    def run(**keys):
        watch = Watch(**({"val_data": str(data)} | keys))
        rest = (
            list(open_data(watch.val_data)) if watch.val_data else [],
            2,
            6,
            tmp_path / "out",
            lambda params: {"scale": float(params["w"][0])},
            save,
        )
        return make_validation(watch, model, *rest), made[-1] if made else None

    return run


def test_the_rule_is_that_of_the_keys(plan):
    """val_data, val_every, val_examples, metric and patience."""
    assert plan(val_data="") == (None, None)
    rule, (_, examples, metric, batch_size) = plan()
    assert (rule.every, rule.metric, rule.patience, len(examples), batch_size) == (6, "val_exact", 0, 5, 2)
    assert metric is metric_named("exact")
    rule, (_, examples, metric, _) = plan(val_every=4, val_examples=3, metric="", patience=2)
    assert (rule.every, rule.metric, rule.patience, len(examples), metric) == (4, "", 2, 3, None)


def test_the_best_is_kept(plan, tmp_path):
    """keep_best: of the average, where there is one; an older best is replaced whole."""
    rule, _ = plan()
    for value in (1.0, 2.0):
        optimizer = make_optimizer(Recipe(ema=0.5), 10)
        state = init_state({"w": np.full(1, value, np.float32)}, optimizer)
        rule.keep(state)
        assert rule.run(state, lambda: None) == ({"val_loss": value}, [])
        assert (tmp_path / "out" / BEST / "model").read_text() == f"[{value:.0f}.]"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [BEST]
    assert plan(keep_best=False)[0].keep is None


def test_a_folder_whose_writing_failed_or_was_killed_leaves_the_old_one(plan, tmp_path):
    best = tmp_path / "out" / BEST
    rule, _ = plan()
    optimizer = make_optimizer(Recipe(), 10)
    rule.keep(init_state({"w": np.ones(1, np.float32)}, optimizer))
    with pytest.raises(KeyError):
        rule.keep(init_state({"v": np.ones(1, np.float32)}, optimizer))
    assert (best / "model").exists() and [path.name for path in best.parent.iterdir()] == [BEST]
    best.rename(best.with_name(f".{BEST}.old"))  # killed between two renames
    best.with_name(f".{BEST}.new").mkdir()
    recover_folder(best)
    assert (best / "model").exists() and [path.name for path in best.parent.iterdir()] == [BEST]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"val_every": -1}, "val_every=-1 is not possible"),
        ({"patience": 3}, "patience=3 needs examples to validate on: give val_data"),
        ({"metric": "exat"}, "metric='exat' is not possible: give exact"),
        ({"log": "x"}, "'x' is not one of tensorboard, wandb"),
    ],
)
def test_what_cannot_be_watched(keys, message):
    with pytest.raises(ConfigError, match=message):
        Watch(**keys)


def test_exact_is_the_share_of_equal_answers():
    metric = metric_named("exact")
    assert next(iter(metric.score(["a", " b ", "c"], ["a", "b", "d"]).values())) == pytest.approx(2 / 3)
    assert metric_named("") is None


def test_dropout_keys_are_added_to_the_batches():
    def keyed(step, accumulate, host_index=0, host_count=1):
        settings = types.SimpleNamespace(seed=3, batch_size=6, accumulate=accumulate)

        class Batches:
            def __init__(self):
                self.host_index, self.host_count = host_index, host_count

            def __call__(self, step):
                return {"step": np.array(step)}

        return finetune.global_batch(Batches(), None, settings, True, step)

    first, again, second, parts = keyed(0, 1), keyed(0, 1), keyed(1, 1), keyed(0, 3)
    assert first["step"] == 0 and first["dropout_keys"].shape == (6, 2)
    np.testing.assert_array_equal(parts["dropout_keys"], first["dropout_keys"].reshape(3, 2, 2))
    np.testing.assert_array_equal(first["dropout_keys"], again["dropout_keys"])
    assert (first["dropout_keys"] != second["dropout_keys"]).any()
    hosts = [keyed(0, 1, index, 2)["dropout_keys"] for index in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(hosts), first["dropout_keys"])
