"""Fine-tuning end to end, through the command line, on eight examples and a very small random model."""

import contextlib
import dataclasses
import io
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import ConfigError
from paligemma_jax.runs import command_line
from paligemma_jax.training.data import Batches
from paligemma_jax.training.optimizer import Recipe, make_optimizer

ANSWERS = ("a red star", "two blue circles")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Dark pictures have one answer, bright ones the other; the last example sees two."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(8):
        Image.new("RGB", (30, 20), (200 * (i % 2) + 5 * i,) * 3).save(folder / f"{i}.png")
        image = f"{i}.png" if i < 7 else ["1.png", "7.png"]
        lines.append({"image": image, "prefix": "caption en", "suffix": ANSWERS[i % 2]})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def train(checkpoint, data):
    """train(output_dir, KEY=VALUE, ...): the exit status of `python main.py --config=configs/finetune.py ...`."""

    def run(output_dir, **keys):
        defaults = {"checkpoint": checkpoint, "data": data / "data.jsonl", "output_dir": output_dir, "epochs": 25}
        defaults |= {"batch_size": 4, "text_length": 32, "learning_rate": 0.01, "compilation_cache": False}
        arguments = [f"--config.{key}={value}" for key, value in (defaults | keys).items()]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"the load_module\(\)", DeprecationWarning)  # in ml_collections
            return command_line.main(["--config=configs/finetune.py", *arguments])

    return run


@pytest.fixture(scope="module")
def tuned(train, tmp_path_factory):
    """The directory of a tuned model; its training was stopped with Ctrl-C after 7 steps, and went on."""
    original, directory = Batches.__call__, tmp_path_factory.mktemp("finetune") / "tuned"

    def interrupted(self, step):
        if step == 7:
            raise KeyboardInterrupt
        return original(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Batches, "__call__", interrupted)
        train(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoints", "training.json"]
    messages = io.StringIO()
    with contextlib.redirect_stderr(messages):
        assert train(directory) == 0
    (directory / "log.txt").write_text(messages.getvalue())
    return directory


@pytest.fixture
def refused(train, capsys, tmp_path):
    """refused(KEY=VALUE, ...): the one line that a run ends with."""

    def run(**keys):
        assert train(tmp_path / "refused", **keys) == 1
        err = capsys.readouterr().err
        [line] = [line for line in err.splitlines() if line.startswith("error: ")]
        assert err.endswith(line + "\n")
        return line

    return run


@pytest.mark.slow
def test_the_tuned_model_gives_the_answers(tuned, data):
    model = pj.load(tuned, dtype="float32")
    images = [data / f"{i}.png" for i in range(6)] + [[data / "1.png", data / "7.png"]]
    outputs = model.generate(images, "caption en", max_new_tokens=12)
    assert [output.text for output in outputs] == [*ANSWERS * 3, ANSWERS[1]]
    assert {path.name for path in tuned.iterdir()} >= {"config.json", "tokenizer.model", "preprocessor_config.json"}


@pytest.mark.slow
def test_training_goes_on_and_the_loss_falls(tuned):
    log = (tuned / "log.txt").read_text()
    assert "8 examples, 50 steps of 4" in log and "finetune goes on from step 7 of 50" in log
    steps, losses = zip(*re.findall(r"finetune (\d+)/50  loss (\S+)", log), strict=True)
    assert [int(step) for step in steps] == [10, 20, 30, 40, 50]
    assert float(losses[-1]) < 0.2 * float(losses[0])


@pytest.mark.slow
def test_adapters_learn_the_answers_and_go_on_where_they_stopped(train, data, tmp_path, capsys):
    """The merged model gives them; a run that is stopped in the middle ends with the same adapter."""
    keys = {"method": "lora", "lora_targets": "all", "accumulate": 2, "remat": "layers", "learning_rate": 0.02}
    keys |= {"epochs": 20, "lora_rank": 4}
    assert train(tmp_path / "whole", **keys) == 0
    told = capsys.readouterr().err
    assert "adapters of rank 4 over image encoder: 2 q_proj" in told and "memory of each device:" in told
    original = Batches.__call__

    def interrupted(self, step):
        if step == 10:
            raise KeyboardInterrupt
        return original(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Batches, "__call__", interrupted)
        train(tmp_path / "stopped", **keys)
    assert train(tmp_path / "stopped", **keys) == 0
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped")
    ]
    assert adapters[0] == adapters[1]
    outputs = pj.load(tmp_path / "whole", dtype="float32").generate([data / "0.png", data / "1.png"], "caption en")
    assert [output.text for output in outputs] == list(ANSWERS)


@pytest.mark.slow
def test_a_folder_with_another_training_is_refused(train, tuned, small, random_params, processor, tmp_path, capsys):
    text = dataclasses.replace(small.text, mlp_dim=40)
    other = dataclasses.replace(small, text=text)
    pj.PaliGemma(other, random_params(other), processor).save(tmp_path)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}
    changes = [("checkpoint", tmp_path), ("epochs", 2), ("learning_rate", 0.5)]
    for key, value in changes:
        assert train(tuned, **{key: value}) == 1
        assert f"tuned has another training, which differs in {key}: name another output_dir" in capsys.readouterr().err
    (tuned / "training.json").rename(tuned / "hidden")
    assert train(tuned) == 1 and "is not empty, and holds no training" in capsys.readouterr().err
    assert train(tuned, overwrite=True) == 1  # it is not known to be a training's
    capsys.readouterr()
    (tuned / "hidden").rename(tuned / "training.json")
    assert before == {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_overwriting_begins_when_data_and_model_are_right(train, tuned, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text("{")
    before = {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}
    for keys in ({"data": tmp_path / "bad.jsonl"}, {"checkpoint": tmp_path / "nowhere"}, {"text_length": 5}):
        assert train(tuned, overwrite=True, **keys) == 1
    assert before == {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}


def test_a_training_that_failed_early_is_in_nobodys_way(train, data, tmp_path, capsys):
    assert train(tmp_path / "out", text_length=5) == 1
    assert train(tmp_path / "out", text_length=6) == 1
    assert "text_length=6: raise" in capsys.readouterr().err


def test_bad_data_is_one_clear_line(refused, tmp_path, data):
    lines = (data / "data.jsonl").read_text().splitlines()
    assert "none.jsonl is not there: give a .jsonl file" in refused(data=tmp_path / "none.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*lines[:2], "{"]))
    assert f"{broken} line 3 is not JSON" in refused(data=broken, image_root=data)
    assert "line 1 names" in refused(image_root=tmp_path)
    assert "more than text_length=5: raise text_length" in refused(text_length=5)
    assert "8 examples and epochs=1 do not fill one batch of 9" in refused(batch_size=9, epochs=1)


@pytest.mark.parametrize("keys, message", [({"epochs": 0}, "epochs=0"), ({"b2": 1.0}, "b2=1.0 is not possible: give")])
def test_bad_settings_are_one_clear_line(refused, keys, message):
    assert message in refused(**keys)


def test_what_matches_nothing_is_known_before_anything_is_written(refused, tmp_path, data):
    assert "'nothing' matches no parameter" in refused(lr_multipliers="nothing=2 ; .*=1")
    assert "'nothing' matches no parameter" in refused(decayed="nothing")
    assert "metric=detection_f1 is of objects" in refused(metric="detection_f1", val_data=data / "data.jsonl")
    assert not (tmp_path / "refused").exists()


def test_a_damaged_picture_is_one_clear_line(refused, data, tmp_path):
    for path in data.glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "2.png").write_bytes(b"not a picture")
    line = refused(data=tmp_path / "data.jsonl", epochs=1)
    assert "data.jsonl line 3: " in line and "2.png is not a picture" in line
    assert not (tmp_path / "refused" / "checkpoints").exists()  # it is known before the first step
    line = refused(data=tmp_path / "data.jsonl", epochs=1, check_pictures=False)
    assert "2.png is not a picture" in line and " line 3" not in line


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", -1.0),
        ("label_smoothing", 1.0),
        ("b2", float("nan")),
        ("clip_norm", -0.1),
        ("clip_norm", 0.0),
        ("weight_decay", 1.0),
    ],
)
def test_recipes_have_limits(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value} is not possible"):
        Recipe(**{name: value})


def test_decay_is_for_kernels_of_the_picture_side_and_follows_the_schedule_alone(small, random_params):
    """With gradients of zero, what moves is what is decayed, by weight_decay at the height of the schedule.

    A number of each parameter is enough: which ones they are goes by their names and ranks.
    """
    params = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1)[:1].reshape((1,) * leaf.ndim), random_params(small))
    optimizer = make_optimizer(Recipe(learning_rate=0.02, weight_decay=0.1, warmup_fraction=0.5), num_steps=4)
    zeros, state = jax.tree.map(np.zeros_like, params), optimizer.init(params)
    for _ in range(3):  # warm-up of two steps from 0
        updates, state = optimizer.update(zeros, state, params)
    updates = flatten_dict(updates, sep="/")
    plain = flatten_dict(params, sep="/")
    moved = {path for path, update in updates.items() if np.any(update)}
    kernels = {
        path
        for path in plain
        if re.match(r"vision_tower/.*(proj|fc\d|patch_embedding)/weight|multi_modal_projector/linear/weight", path)
    }
    assert moved == kernels and len(kernels) == 2 * 6 + 2
    for path in moved:
        np.testing.assert_allclose(updates[path], -0.1 * plain[path], rtol=1e-4)


def test_learning_rate_rises_and_falls_to_zero():
    optimizer = make_optimizer(Recipe(learning_rate=1.0, warmup_fraction=0.2, clip_norm=1e9), num_steps=10)
    params = {"language_model": {"norm": {"weight": jnp.ones(1)}}}
    state, sizes = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(10):
        updates, state = update(params, state, params)  # steady gradients: Adam moves by the learning rate
        sizes.append(-float(updates["language_model"]["norm"]["weight"][0]))
    assert sizes[0] == 0 and sizes[2] == pytest.approx(1, rel=1e-3) and np.argmax(sizes) == 2
    assert (np.diff(sizes[2:]) < 0).all() and sizes[-1] < 0.05
