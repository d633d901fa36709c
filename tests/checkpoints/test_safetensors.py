"""The file format itself: agreement with the safetensors package, casts, pieces larger than the reading step."""

import mmap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from paligemma_jax.checkpoints import safetensors
from paligemma_jax.errors import CheckpointError

DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"matrix": (33, 7), "vector": (5,), "scalar": (), "conv": (2, 3, 4, 5)}
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(safetensors, "_PIECE_ELEMENTS", 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_package_reads_what_we_write(tmp_path, arrays, dtype):
    path = tmp_path / "file"
    safetensors.write(path, arrays, np.dtype(dtype))
    found = load_file(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name], array.astype(dtype))
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_what_the_package_writes(tmp_path, arrays, dtype, target):
    path = tmp_path / "file"
    save_file({name: array.astype(dtype) for name, array in arrays.items()}, path)
    seen = []
    for name, tensor in safetensors.read_header(path).items():
        found = safetensors.read(tensor, np.dtype(target), seen.append)
        assert found.dtype == target
        assert np.array_equal(found, arrays[name].astype(dtype).astype(target))
    assert sum(seen) == sum(array.size for array in arrays.values()) * np.dtype(dtype).itemsize


def test_arrays_in_any_memory_order_are_written(tmp_path, arrays):
    path = tmp_path / "file"
    safetensors.write(path, {"matrix": arrays["matrix"].T})
    assert np.array_equal(load_file(path)["matrix"], arrays["matrix"].T)


def test_infinities_are_cast_but_overflow_is_refused(tmp_path):
    path = tmp_path / "file"
    safetensors.write(path, {"a": np.array([np.inf, -1.0], np.float32)}, np.dtype(np.float16))
    assert np.array_equal(load_file(path)["a"], np.array([np.inf, -1.0], np.float16))
    with pytest.raises(CheckpointError, match="a holds values beyond the range of float16"):
        safetensors.write(path, {"a": np.array([70000.0], ml_dtypes.bfloat16)}, np.dtype(np.float16))


def test_other_dtypes_are_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="scales is int16"):
        safetensors.write(tmp_path / "file", {"scales": np.zeros(3, np.int16)})
    assert list(tmp_path.iterdir()) == []


def test_equal_values_are_told_across_dtypes(tmp_path, arrays):
    path = tmp_path / "file"
    rounded = arrays["matrix"].astype(ml_dtypes.bfloat16)
    other = arrays["matrix"].copy()
    other[-1, -1] += 1  # in the last piece
    save_file({"a": rounded, "b": rounded.astype(np.float32), "c": arrays["matrix"], "d": other}, path)
    tensors = safetensors.read_header(path)
    assert safetensors.same_values(tensors["a"], tensors["b"])
    assert not safetensors.same_values(tensors["a"], tensors["c"])
    assert not safetensors.same_values(tensors["c"], tensors["d"])


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file whose tensors all count as large, and what it holds; `odd` displaces what follows it."""
    monkeypatch.setattr(safetensors, "_MAPPED_BYTES", 1)
    arrays = {"odd": np.arange(3, dtype=np.int8), "a": np.arange(64.0, dtype=np.float32), "b": np.ones(32, np.uint8)}
    safetensors.write(tmp_path / "x.safetensors", arrays)
    return tmp_path / "x.safetensors", arrays


def test_what_is_written_is_aligned_and_comes_from_the_pages_of_the_file(large):
    path, arrays = large
    tensors = safetensors.read_header(path)
    assert tensors["a"].offset % 64 == 0
    found = {name: safetensors.read(tensor) for name, tensor in tensors.items()}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    [pages] = safetensors._PAGES.values()
    assert np.shares_memory(found["a"], np.frombuffer(pages, np.uint8))
    cast = safetensors.read(tensors["a"], np.dtype(np.float64))
    assert cast.dtype == np.float64 and not np.shares_memory(cast, np.frombuffer(pages, np.uint8))


def test_what_cannot_be_mapped_is_read(large, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no such device")

    path, arrays = large
    monkeypatch.setattr(safetensors.mmap, "mmap", refuse)
    np.testing.assert_array_equal(safetensors.read(safetensors.read_header(path)["a"]), arrays["a"])


def test_a_file_put_in_the_place_of_a_mapped_one_changes_nothing(large):
    path, arrays = large
    found = safetensors.read(safetensors.read_header(path)["a"])
    safetensors.write(path, {name: array + array.dtype.type(1) for name, array in arrays.items()})
    np.testing.assert_array_equal(found, arrays["a"])
    with pytest.raises(ValueError, match="read-only"):
        found[1] += 1
    np.testing.assert_array_equal(safetensors.read(safetensors.read_header(path)["a"])[:2], [1, 2])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_pages_of_numbers_that_are_gone_are_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "_PIECE_ELEMENTS", 2**20)  # small ones would take seconds
    arrays = {name: np.full(2**24, i, np.uint8) for i, name in enumerate("ab")}
    safetensors.write(tmp_path / "x.safetensors", arrays)
    tensors = safetensors.read_header(tmp_path / "x.safetensors")

    def resident() -> int:
        """Bytes of files that this process has in memory."""
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE

    first, second = (safetensors.read(tensors[name]) for name in "ab")
    before, view = resident(), first[2:]
    del first
    assert before - resident() < 2**22  # somebody still has them
    del view
    assert before - resident() > 2**23
    np.testing.assert_array_equal(second, arrays["b"])
    assert len(safetensors._PAGES) == 1
    np.testing.assert_array_equal(safetensors.read(tensors["a"]), arrays["a"])


def test_a_file_that_became_shorter_is_named(large):
    path, _ = large
    tensor = safetensors.read_header(path)["a"]
    with path.open("r+b") as file:
        file.truncate(tensor.offset + 8)
    with pytest.raises(CheckpointError, match="ended while a was read"):
        safetensors.read(tensor)
