"""Every option of the converter on every way it can go: directory or .npz to directory or .npz."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from paligemma_jax import checkpoints
from paligemma_jax.errors import CheckpointError
from paligemma_jax.runs.convert import main


@pytest.fixture
def source(checkpoint, tmp_path):
    """source(KIND, DTYPE): a directory, or an .npz and what it takes to read it."""

    def build(kind: str, dtype: str = "float32") -> list[str]:
        directory = checkpoint("A", dtype)
        if kind == "directory":
            return [str(directory)]
        assert main([str(directory), str(tmp_path / "source.npz")]) == 0
        return [str(tmp_path / "source.npz"), "--config", str(directory / "config.json")]

    return build


def arrays_in(path) -> dict[str, np.ndarray]:
    """The arrays of a file as they are stored, bfloat16 told from its two bytes."""
    if path.suffix != ".npz":
        return load_file(path / "model.safetensors")
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    return {key: array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array for key, array in arrays.items()}


@pytest.mark.parametrize("kind", ["directory", "npz"])
@pytest.mark.parametrize("destination", ["out", "out.npz"])
@pytest.mark.parametrize(
    "stored, dtype",
    [("float32", None), ("float32", "float16"), ("float32", "bfloat16"), ("bfloat16", "float16"), ("bfloat16", None)],
)
def test_dtype_is_that_of_every_array(source, tmp_path, params, kind, destination, stored, dtype):
    """--dtype, and no --dtype, which keeps each array's own."""
    file, *options = source(kind, stored)
    options += ["--dtype", dtype] if dtype else []
    assert main([file, str(tmp_path / destination), *options]) == 0
    arrays = arrays_in(tmp_path / destination)
    assert {array.dtype.name for array in arrays.values()} == {dtype or stored}
    norm = params["language_model"]["norm"]["weight"].astype(stored).astype(dtype or stored)
    key = "params/llm/final_norm/scale" if destination == "out.npz" else "language_model.model.norm.weight"
    np.testing.assert_array_equal(arrays[key], norm)
    if destination == "out":
        stated = json.loads((tmp_path / "out" / "config.json").read_text())
        assert stated["torch_dtype"] == (dtype or stored)


@pytest.mark.parametrize("rows", ["-1", "0", "89", "97", "257152"])
def test_rows_below_the_tokens_and_beyond_the_table_are_refused(source, tmp_path, capsys, rows):
    """Before anything is read."""
    file, *options = source("directory")
    assert main([file, str(tmp_path / "out"), *options, "--rows", rows]) == 1
    error = capsys.readouterr().err
    expected = f"error: --rows {rows} is impossible: the tokenizer has 90 ids, and the table 96 rows\n"
    assert error == expected and not (tmp_path / "out").exists()


@pytest.mark.parametrize("destination", ["a/b/c", "a/b/c.npz"])
def test_folders_are_made(source, tmp_path, destination):
    file, *options = source("directory")
    assert main([file, str(tmp_path / destination), *options]) == 0
    assert (tmp_path / destination).exists()


@pytest.mark.parametrize("kind", ["directory", "npz"])
@pytest.mark.parametrize("destination", ["out/there", "out/there.npz"])
def test_what_lies_beside_the_weights_comes_along(source, tmp_path, kind, destination):
    """Tokenizer, processor, generation settings and mask VQ-VAE; those beside an .npz already are not touched."""
    file, *options = source(kind)
    beside = tmp_path / "checkpoint" if kind == "directory" else tmp_path
    names = ("tokenizer.model", "tokenizer_config.json", "preprocessor_config.json", "vae-oid.npz")
    for name in (*names, "README.md"):
        (beside / name).write_bytes(name.encode())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "vae-oid.npz").write_bytes(b"of another model")
    assert main([file, str(tmp_path / destination), *options]) == 0
    folder = tmp_path / "out" if destination.endswith(".npz") else tmp_path / destination
    found = {name: (folder / name).read_bytes() for name in names}
    kept = {"vae-oid.npz": b"of another model"} if destination.endswith(".npz") else {}
    assert found == {name: name.encode() for name in names} | kept
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize("kind", ["directory", "npz"])
@pytest.mark.parametrize("destination", ["out", "out.npz"])
def test_rows_are_those_kept(source, tmp_path, params, kind, destination):
    file, *options = source(kind)
    assert main([file, str(tmp_path / destination), *options, "--rows", "91"]) == 0
    arrays = arrays_in(tmp_path / destination)
    [table] = [array for key, array in arrays.items() if "embed" in key and array.shape == (91, 20)]
    np.testing.assert_array_equal(table, params["language_model"]["embed_tokens"]["weight"][:91])


@pytest.mark.parametrize("kind", ["directory", "npz"])
def test_format_goes_before_the_name(source, tmp_path, kind):
    file, *options = source(kind)
    assert main([file, str(tmp_path / "plain"), *options, "--format", "big_vision"]) == 0
    with np.load(tmp_path / "plain", allow_pickle=False) as arrays:
        assert "params/llm/final_norm/scale" in arrays.files
    assert main([file, str(tmp_path / "folder.npz"), *options, "--format", "huggingface"]) == 0
    assert (tmp_path / "folder.npz" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["directory", "npz"])
@pytest.mark.parametrize("name, width", [("int8", 20), ("int4", 10)])
def test_quantize_rounds_to_as_many_bits(source, tmp_path, params, kind, name, width):
    """Gate and up of a layer, 2 x 28 x 20, are stored in bytes, two numbers in each of 4 bits; a norm as it is."""
    file, *options = source(kind)
    assert main([file, str(tmp_path / name), *options, "--quantize", name]) == 0
    assert checkpoints.scan(tmp_path / name).quantization == name
    arrays = arrays_in(tmp_path / name)
    gate = [array for key, array in arrays.items() if "language_model.model.layers.1.mlp.gate_up_proj" in key]
    assert (56, width) in {array.shape for array in gate if array.dtype.itemsize == 1}
    norm = params["language_model"]["norm"]["weight"]
    np.testing.assert_array_equal(arrays["language_model.model.norm.weight"], norm)


@pytest.mark.parametrize("tokenizer", ["tokenizer.model", "tokenizer.json"])
def test_processor_is_where_tokenizer_and_preprocessor_come_from(source, tmp_path, capsys, tokenizer):
    file, *options = source("directory")
    folder = tmp_path / "processor"
    folder.mkdir()
    for name in (tokenizer, "preprocessor_config.json"):
        (folder / name).write_bytes(name.encode())
    assert main([file, str(tmp_path / "bare"), *options]) == 0
    assert "no tokenizer was copied" in capsys.readouterr().err
    assert main([file, str(tmp_path / "whole"), *options, "--processor", str(folder)]) == 0
    assert (tmp_path / "whole" / tokenizer).read_bytes() == tokenizer.encode()
    assert (tmp_path / "whole" / "preprocessor_config.json").is_file() and not capsys.readouterr().err


def test_overwrite_replaces_and_debug_shows_the_error(source, tmp_path):
    file, *options = source("directory")
    out = str(tmp_path / "out")
    assert main([file, out, *options]) == 0
    with pytest.raises(CheckpointError, match="--overwrite"):
        main([file, out, *options, "--dtype", "float16", "--debug"])
    assert {array.dtype.name for array in arrays_in(tmp_path / "out").values()} == {"float32"}
    assert main([file, out, *options, "--dtype", "float16", "--overwrite"]) == 0
    assert {array.dtype.name for array in arrays_in(tmp_path / "out").values()} == {"float16"}


def test_verify_counts_bytes_tensors_and_rows(source, capsys, tmp_path, config, understood):
    [file] = source("directory")
    assert main(["--verify", file]) == 0
    report = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    path = tmp_path / "checkpoint" / "model.safetensors"
    assert int(report["bytes"].replace(",", "")) == path.stat().st_size
    assert report["dtype"] == f"float32 ({len(load_file(path))} tensors)"
    assert report["vision"] == "28 px, 16 tokens, 3 layers of 24"
    heads = "4 / 1 heads of 6" if config.version == 1 else "4 / 2 heads of 6"
    assert report["text"].startswith(f"3 layers of 20, {heads}, 96 rows")
    assert ("softcaps 50.0 / 30.0, window 16" in report["text"]) == (config.version == 2)
