"""Every key of configs/finetune.py changes what it should: batches, loss, optimizer and loop, without any training."""

import inspect
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, SingleDeviceSharding
from PIL import Image

from paligemma_jax.checkpoints import expected_shapes
from paligemma_jax.runs import command_line, train
from paligemma_jax.training import finetune
from paligemma_jax.training.optimizer import Recipe, make_optimizer
from tests.training.data import worlds


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six examples whose pictures are in a folder of their own."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    lines = []
    for i in range(6):
        Image.new("RGB", (30, 20), (40 * i,) * 3).save(folder / "pictures" / f"{i}.png")
        lines.append({"image": f"{i}.png", "prefix": "caption en", "suffix": f"{i} stars"})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def planned(checkpoint, data, monkeypatch, tmp_path):
    """planned(KEY=VALUE, ...): what would be trained, by the names of the parameters of `fit` and `suffix_loss`."""
    plans = []

    def recorded(name: str, result) -> None:
        signature = inspect.signature(getattr(finetune, name))

        def call(*args, **options):
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            plans[-1][name] = dict(bound.arguments)
            return result(bound.arguments)

        monkeypatch.setattr(finetune, name, call)

    recorded("suffix_loss", lambda given: (jnp.zeros(()), {}))
    recorded("make_step", lambda given: given["loss_fn"](None, None) and SimpleNamespace(compile=lambda *_: None))
    monkeypatch.setattr(finetune, "memory_table", lambda *_: "memory")
    recorded("fit", lambda given: given["state"])

    def run(**keys) -> dict:
        plans.append({})
        defaults = {"checkpoint": checkpoint, "data": data / "data.jsonl", "image_root": data / "pictures"}
        defaults |= {"output_dir": tmp_path / "tuned", "batch_size": 2, "epochs": 1, "compilation_cache": False}
        defaults |= {"overwrite": True}
        arguments = [f"--config.{key}={value}" for key, value in (defaults | keys).items()]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"the load_module\(\)", DeprecationWarning)  # in ml_collections
            assert command_line.main(["--config=configs/finetune.py", *arguments]) == 0
        return plans[-1]

    return run


def test_batches(planned, data):
    """data, image_root, epochs, batch_size, text_length and seed."""
    plain, more = planned(), planned(epochs=3, batch_size=3, text_length=40)
    for plan, steps, rows, texts in ((plain, 3, 2, 128), (more, 6, 3, 40)):
        fit = plan["fit"]
        assert fit["num_steps"] == steps
        batch = fit["batch_at"](0)
        assert batch["tokens"].shape == (rows, texts + 16) and len(batch["pixels"]) == rows

    def order(seed: int) -> list[float]:
        """The pictures by their brightness: all of them, once."""
        batch_at = planned(seed=seed)["fit"]["batch_at"]
        return [float(pixels.mean()) for step in range(3) for pixels in batch_at(step)["pixels"]]

    first, again, second = order(0), order(0), order(1)
    assert first == again != second and sorted(first) == sorted(second) and len(set(first)) == 6
    line = (data / "data.jsonl").read_text().splitlines()[5]
    (data / "pictures" / "one.jsonl").write_text(line)
    one = planned(data=data / "pictures" / "one.jsonl", image_root="", batch_size=1)["fit"]  # beside the file itself
    assert one["num_steps"] == 1 and float(one["batch_at"](0)["pixels"].mean()) == max(first)


def test_how_data_are_read(planned, tmp_path):
    """data_format, data_task, augment and data_threads."""
    folder = worlds.write_coco(tmp_path / "set")
    keys = {"data": folder, "image_root": "", "batch_size": 3}
    shipped = {"checkpoint": "tiny"}  # which has a mask VQ-VAE, and its own tokenizer

    def batches(**more):
        return planned(**keys, **more)["fit"]["batch_at"].args[0]

    assert {example.prefix for example in batches(data_format="coco").examples(0)} == {worlds.PREFIX}
    masked = batches(data_task="segment", **shipped).examples(0)
    assert {example.prefix for example in masked} == {worlds.PREFIX.replace("detect", "segment")}
    assert any("<seg" in example.suffix for example in masked)
    plain, changed = batches(), batches(augment="flip,crop,color", data_threads=2)
    assert (plain.num_threads, changed.num_threads) == (4, 2)
    assert plain(0)["pixels"].shape == changed(0)["pixels"].shape
    assert (plain(0)["pixels"] != changed(0)["pixels"]).any()


def test_the_loop(planned, tmp_path):
    """output_dir, log_every, save_every, save_minutes, and overwrite of what is there."""
    plain, often = planned()["fit"], planned(output_dir=tmp_path / "b", log_every=3, save_every=7)["fit"]
    assert [(fit["log_every"], fit["save_every"]) for fit in (plain, often)] == [(10, 500), (3, 7)]
    assert [planned(**keys)["fit"]["save_minutes"] for keys in ({}, {"save_minutes": 0.5})] == [10.0, 0.5]
    for fit, name in ((plain, "tuned"), (often, "b")):
        assert Path(fit["checkpoints"].directory) == tmp_path / name / "checkpoints"
        assert (tmp_path / name / "model.safetensors").is_file()


def test_nothing_of_the_training_before_stays(planned, tmp_path):
    for method, has_adapter in (("lora", True), ("full", False)):
        planned(method=method)
        assert (tmp_path / "tuned" / "adapter").exists() == has_adapter


def test_pictures_are_checked_before(planned, monkeypatch):
    checked = []
    monkeypatch.setattr(finetune, "check_pictures", lambda examples, settings: checked.append(len(examples)))
    planned()
    planned(check_pictures=False)
    assert checked == [6]


def test_the_loss(planned):
    """label_smoothing; the formula itself is tested with the loss."""
    assert [planned(**keys)["suffix_loss"]["label_smoothing"] for keys in ({}, {"label_smoothing": 0.2})] == [0.0, 0.2]


def test_the_weights(planned):
    """dtype: of what the network is given; what trains, and so the optimizer's state, is float32."""
    for keys, dtype in (({}, jnp.float32), ({"dtype": "bfloat16"}, jnp.bfloat16)):
        plan = planned(**keys)
        state, make_step = plan["fit"]["state"], plan["make_step"]
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
        assert {leaf.dtype for leaf in [*jax.tree.leaves(state.params), *moments]} == {jnp.dtype("float32")}
        network = make_step["join"](state.params, make_step["frozen"])
        assert {leaf.dtype for leaf in jax.tree.leaves(network)} == {jnp.dtype(dtype)}


def test_a_mesh(planned):
    """mesh: of what devices, here a single one, the state and the batches lie on."""
    for mesh, kind in (("", SingleDeviceSharding), ("fsdp=1", NamedSharding)):
        fit = planned(mesh=mesh)["fit"]
        assert {type(leaf.sharding) for leaf in jax.tree.leaves(fit["state"])} == {kind}
        assert isinstance(fit["batch_at"](0)["tokens"], jax.Array if mesh else np.ndarray)


def test_processes_are_joined(planned, monkeypatch, capsys):
    """coordinator, num_processes and process_id."""
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: told.append(given))
    planned(coordinator="localhost:9", num_processes=2, process_id=1)
    planned(coordinator="auto")
    planned()
    assert told == [{"coordinator_address": "localhost:9", "num_processes": 2, "process_id": 1}, {}]
    for keys in ({"num_processes": 2}, {"coordinator": "a:1", "num_processes": 2, "process_id": 2}):
        with pytest.raises(AssertionError):
            planned(**keys)
        assert "coordinator=" in capsys.readouterr().err


def test_of_several_processes_the_first_one_writes(planned, monkeypatch, tmp_path, capsys):
    done = []
    for module in (finetune, train):
        monkeypatch.setattr(module, "is_first", lambda: False)
    monkeypatch.setattr(finetune, "recover", done.append)
    monkeypatch.setattr(train, "compare_answers", done.append)
    planned(verify=True)
    assert not done and "wrote" not in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["checkpoints"]


def test_several_processes_need_a_mesh(planned, monkeypatch, capsys):
    """Or each would train for itself, and all write one folder."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(AssertionError):
        planned()
    assert "2 processes need a mesh" in capsys.readouterr().err
    assert finetune.explain(None, None, 1, None, None) == ""  # a process cannot look at what others hold


def leaves(plan):
    """What trains, by its path."""
    return flatten_dict(plan["fit"]["state"].params, sep="/")


def test_what_trains(planned, small):
    """method, trainable, freeze, lora_targets, use_dora and quantization."""
    everything = expected_shapes(small)
    assert set(leaves(planned())) == set(everything)
    assert set(leaves(planned(method="decoder"))) == {path for path in everything if path.startswith("language")}
    assert set(leaves(planned(freeze="language_model vision_tower"))) == {p for p in everything if "projector" in p}
    assert set(leaves(planned(trainable="language_model/norm"))) == {"language_model/norm/weight"}
    q = "language_model/layers_0/self_attn/q_proj/weight/"
    lora = leaves(planned(method="lora"))
    assert len(lora) == 2 * 7 * 2 and {q + "down", q + "up"} <= set(lora)
    dora = leaves(planned(method="lora", use_dora=True, lora_targets="q_proj", freeze="vision_tower layers_1"))
    assert set(dora) == {q + part for part in ("down", "up", "magnitude")}
    for keys, format in (({}, "int4"), ({"quantization": "int8"}, "int8")):
        frozen = flatten_dict(planned(method="qlora", **keys)["make_step"]["frozen"], sep="/")
        assert frozen[q.removesuffix("/")].quantization == format


def test_adapters(planned):
    """lora_rank, lora_alpha and use_rslora; seed draws them."""

    def scale_and_rank(**keys):
        plan = planned(method="lora", **keys)
        weight = plan["make_step"]["join"](plan["fit"]["state"].params, plan["make_step"]["frozen"])
        weight = weight["language_model"]["layers_0"]["mlp"]["up_proj"]["weight"]
        return weight.scale, len(weight.down)

    assert scale_and_rank() == (2.0, 8)
    assert scale_and_rank(lora_rank=4, lora_alpha=2.0) == (0.5, 4)
    assert scale_and_rank(lora_rank=4, lora_alpha=2.0, use_rslora=True) == (1.0, 4)
    first, second = (leaves(planned(method="lora", seed=seed)) for seed in (0, 1))
    down = next(path for path in first if path.endswith("down"))
    assert (first[down] != second[down]).any()


def test_memory_is_saved(planned):
    """accumulate and remat."""
    plain, parts = planned(), planned(accumulate=2)
    assert [plan["make_step"]["accumulate"] for plan in (plain, parts)] == [1, 2]
    assert plain["fit"]["num_steps"] == parts["fit"]["num_steps"] == 3
    whole, halves = (plan["fit"]["batch_at"](1) for plan in (plain, parts))
    assert halves["tokens"].shape[:2] == (2, 1)
    for name in ("tokens", "length", "pixels"):
        np.testing.assert_array_equal(halves[name].reshape(whole[name].shape), whole[name])
    assert [planned(**keys)["suffix_loss"]["model"].remat for keys in ({}, {"remat": "layers"})] == [False, True]


def test_the_answers_are_compared_if_that_is_asked(planned, monkeypatch, capsys):
    monkeypatch.setattr(train, "compare_answers", lambda directory: f"compared {directory.name}")
    planned()
    assert "compared tuned" not in capsys.readouterr().err
    planned(verify=True)
    assert "compared tuned" in capsys.readouterr().err


def test_a_learning_rate_that_is_not_given_is_the_methods(planned, monkeypatch):
    told = []
    monkeypatch.setattr(
        finetune, "make_optimizer", lambda recipe, *rest: told.append(recipe) or make_optimizer(recipe, *rest)
    )
    for keys in ({}, {"method": "lora"}, {"method": "lora", "learning_rate": 0.5}):
        planned(**keys)
    assert [recipe.learning_rate for recipe in told] == [1e-5, 1e-4, 0.5]


RECIPES = {
    "plain": {},
    "learning_rate": {"learning_rate": 0.25},
    "warmup_fraction": {"warmup_fraction": 0.5},
    "weight_decay": {"weight_decay": 0.0},
    "b2": {"b2": 0.5},
    "clip_norm": {"clip_norm": 1.0},
}


def _adam(recipe: Recipe, num_steps: int, start: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Parameters [n] after some steps: clipping, Adam with bias correction, a warm-up to a cosine, decay of entry 0."""
    warmup = round(recipe.warmup_fraction * num_steps)
    params, first, second = start.astype(np.float64), np.zeros(len(start)), np.zeros(len(start))
    for step, gradient in enumerate(gradients):
        gradient = gradient * min(1.0, recipe.clip_norm / np.linalg.norm(gradient))
        first = 0.9 * first + 0.1 * gradient
        second = recipe.b2 * second + (1 - recipe.b2) * gradient**2
        height = step / warmup if step < warmup else (1 + np.cos(np.pi * (step - warmup) / (num_steps - warmup))) / 2
        adam = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - recipe.b2 ** (step + 1))) + 1e-8)
        decay = np.zeros(len(start))
        decay[0] = recipe.weight_decay * params[0]
        params = params - height * (recipe.learning_rate * adam + decay)
    return params


def test_the_optimizer_is_that_of_the_recipe(monkeypatch, planned):
    """learning_rate, warmup_fraction, weight_decay, b2 and clip_norm, against Adam written by hand."""
    start = np.array([2.0, -1.0, 0.5], np.float32)
    gradients = np.array([[3.0, -0.5, 1.0], [-1.0, 2.0, 0.25], [0.5, 0.5, -4.0], [2.0, 1.0, 1.0]], np.float32)

    def tree(values: np.ndarray) -> dict:
        """Entry 0 is a kernel of the projector, which decays, 1 its bias and 2 a kernel of the decoder."""
        linear = {"weight": values[:1].reshape(1, 1), "bias": values[1:2]}
        return {
            "multi_modal_projector": {"linear": linear},
            "language_model": {"a": {"weight": values[2:].reshape(1, 1)}},
        }

    ends = {}
    for name, changed in RECIPES.items():
        keys = {
            "learning_rate": 0.1,
            "weight_decay": 0.05,
            "b2": 0.9,
            "clip_norm": 2.5,
            "warmup_fraction": 0.25,
        } | changed
        recipe = Recipe(**keys)
        optimizer = make_optimizer(recipe, num_steps=8)
        params = tree(start)
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(tree(gradient), state, params)
            params = jax.tree.map(np.add, params, updates)
        linear = params["multi_modal_projector"]["linear"]
        ends[name] = np.concatenate([linear["weight"][0], linear["bias"], params["language_model"]["a"]["weight"][0]])
        np.testing.assert_allclose(ends[name], _adam(recipe, 8, start, gradients), rtol=1e-4)
        assert name == "plain" or np.abs(ends[name] - ends["plain"]).max() > 1e-3

    told = []
    monkeypatch.setattr(
        finetune,
        "make_optimizer",
        lambda recipe, *more: told.append((recipe, more[0])) or make_optimizer(recipe, *more),
    )
    keys = {"learning_rate": 0.5, "weight_decay": 0.25, "b2": 0.75, "clip_norm": 2.0, "warmup_fraction": 0.125}
    planned(**keys, label_smoothing=0.5)
    assert told == [(Recipe(**keys, label_smoothing=0.5), 3)]
