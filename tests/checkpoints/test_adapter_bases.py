"""Adapters in use: where their base is found, and what the converter makes of them."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints import big_vision
from paligemma_jax.errors import CheckpointError
from paligemma_jax.runs.convert import main as convert

TABLE = "language_model/embed_tokens/weight"


def load(path: Path, dtype: str | None = None) -> dict[str, np.ndarray]:
    _, params = checkpoints.load(path, dtype, progress=False)
    return {name: np.asarray(value) for name, value in flatten_dict(params, sep="/").items()}


# Bases


def test_the_base_is_found_from_here_or_from_the_adapter(checkpoint, adapter, tmp_path, monkeypatch):
    base = checkpoint()
    directory = adapter(base_model_name_or_path="../checkpoint")
    assert checkpoints.locate(directory).base.samefile(base)
    monkeypatch.chdir(tmp_path)
    adapter(base_model_name_or_path="checkpoint")
    assert checkpoints.locate("adapter").base.samefile(base)
    adapter(base_model_name_or_path="./gone")
    assert checkpoints.locate("checkpoint", "adapter") == checkpoints.Source(Path("checkpoint"), Path("adapter"))
    with pytest.raises(
        CheckpointError, match=r"base of the adapter adapter is not there: \./gone does not exist.*BASE"
    ):
        checkpoints.locate("adapter")


@pytest.mark.parametrize(
    "fields, asked",
    [
        ({}, "org/name"),
        ({"revision": None}, "org/name"),
        ({"revision": "bfloat16"}, "org/name@bfloat16"),
    ],
)
def test_the_base_may_be_on_the_hub(adapter, monkeypatch, tmp_path, fields, asked):
    directory, calls = adapter(base_model_name_or_path="org/name", **fields), []
    monkeypatch.setattr("paligemma_jax.checkpoints.hub._fetch", lambda *hub: calls.append(hub) or tmp_path)
    assert checkpoints.locate(directory) == checkpoints.Source(tmp_path, directory)
    assert ["@".join(filter(None, call)) for call in calls] == [asked]


def test_what_names_no_base_or_is_no_adapter_is_said(checkpoint, adapter, tmp_path):
    base = checkpoint()
    directory = adapter(base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match=r"does not say what its base is .*checkpoint=BASE adapter="):
        checkpoints.locate(directory)
    with pytest.raises(CheckpointError, match=r"is no adapter: expected a directory with adapter_config\.json"):
        checkpoints.locate(base, base)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="other is an adapter itself: merge it first"):
        checkpoints.locate(tmp_path / "other", directory)
    with pytest.raises(CheckpointError, match="is an adapter itself: merge it first"):
        checkpoints.locate(adapter(base_model_name_or_path=str(tmp_path / "other")))


# The converter


@pytest.mark.parametrize("arguments", [["{adapter}", "{out}"], ["{base}", "{out}", "--adapter", "{adapter}"]])
@pytest.mark.parametrize("destination", ["out", "out.npz"])
def test_the_converter_merges(checkpoint, adapter, tmp_path, arguments, destination, config, monkeypatch, capsys):
    paths = {"base": checkpoint("A", "bfloat16"), "adapter": adapter(), "out": tmp_path / destination}
    (paths["base"] / "tokenizer.model").write_bytes(b"of the base")
    (paths["adapter"] / "README.md").write_text("not this")
    assert convert([argument.format(**paths) for argument in arguments]) == 0
    scan = big_vision.scan
    monkeypatch.setattr(big_vision, "scan", lambda path, _: scan(path, config))
    found, expected = load(paths["out"]), load(paths["adapter"])
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    assert found[TABLE].dtype == ml_dtypes.bfloat16
    folder = tmp_path if destination.endswith(".npz") else paths["out"]
    assert (folder / "tokenizer.model").read_bytes() == b"of the base"


def test_an_adapters_own_tokenizer_comes_along(checkpoint, adapter, tmp_path):
    base, directory = checkpoint(), adapter()
    for place, names in ((base, ("tokenizer.model", "preprocessor_config.json")), (directory, ("tokenizer.json",))):
        for name in names:
            (place / name).write_text(place.name)
    assert convert([str(directory), str(tmp_path / "out")]) == 0
    out = {path.name: path.read_text() for path in (tmp_path / "out").glob("[tp]*")}
    assert out == {"tokenizer.json": "adapter", "preprocessor_config.json": "checkpoint"}


def test_a_merge_is_rounded_once_to_the_dtype_that_is_asked_for(checkpoint, adapter, tmp_path):
    checkpoint("A", "bfloat16")
    assert convert([str(adapter()), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    merged = written["language_model.model.layers.0.self_attn.q_proj.weight"]
    assert merged.dtype == np.float32 and not np.array_equal(merged, merged.astype(ml_dtypes.bfloat16))


def test_verify_says_what_an_adapter_is(checkpoint, adapter, capsys, understood):
    checkpoint()
    assert convert(["--verify", str(adapter())]) == 0
    assert "Hugging Face, layout A, 1 file, and an adapter of 3 parameters" in capsys.readouterr().out
    assert convert(["--verify", str(adapter(r=4, use_dora=True))]) == 1
    assert "has no magnitude vector beside it" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--overwrite", "--quantize", "int8"]])
def test_nothing_is_written_into_an_adapters_directory(checkpoint, adapter, capsys, options):
    """It would not be loaded: the directory stays an adapter."""
    base, directory = checkpoint(), adapter()
    assert convert([str(base), str(directory), *options]) == 1
    line = capsys.readouterr().err
    assert "holds adapter_config.json" in line and "give another directory" in line and line.count("\n") == 1
    assert {path.name for path in directory.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_model_is_not_saved_into_an_adapters_directory(checkpoint, adapter, config, params):
    directory = adapter()
    with pytest.raises(CheckpointError, match=r"holds adapter_config\.json.*give another directory"):
        checkpoints.save(directory, config, params)
    assert not (directory / "config.json").exists()
