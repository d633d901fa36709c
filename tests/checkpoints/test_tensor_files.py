"""The file format itself: agreement with the safetensors package, casts, pieces larger than the reading step."""

import mmap
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from paligemma_jax.checkpoints import mapping, tensor_files
from paligemma_jax.errors import CheckpointError

DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"matrix": (33, 7), "vector": (5,), "scalar": (), "conv": (2, 3, 4, 5)}
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """All but scalars count as large, and are read in many pieces."""
    monkeypatch.setattr(tensor_files, "_PIECE_ELEMENTS", 10)
    monkeypatch.setattr(tensor_files, "_LARGE", 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_package_reads_what_we_write(tmp_path, arrays, dtype):
    path = tmp_path / "file"
    tensor_files.write(path, arrays, np.dtype(dtype))
    found = load_file(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name], array.astype(dtype))
    with safe_open(path, "np") as file:
        assert file.metadata()["format"] == "pt"  # as transformers demands


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_what_the_package_writes(tmp_path, arrays, dtype, target):
    path = tmp_path / "file"
    save_file({name: array.astype(dtype) for name, array in arrays.items()}, path)
    seen = []
    for name, tensor in tensor_files.read_header(path).items():
        found = tensor_files.read(tensor, np.dtype(target), seen.append)
        assert found.dtype == target
        assert np.array_equal(found, arrays[name].astype(dtype).astype(target))
    assert sum(seen) == sum(array.size for array in arrays.values()) * np.dtype(dtype).itemsize


def test_arrays_in_any_memory_order_are_written(tmp_path, arrays):
    path = tmp_path / "file"
    tensor_files.write(path, {"matrix": arrays["matrix"].T})
    assert np.array_equal(load_file(path)["matrix"], arrays["matrix"].T)


def test_infinities_are_cast_but_overflow_is_refused(tmp_path):
    path = tmp_path / "file"
    tensor_files.write(path, {"a": np.array([np.inf, -1.0], np.float32)}, np.dtype(np.float16))
    assert np.array_equal(load_file(path)["a"], np.array([np.inf, -1.0], np.float16))
    with pytest.raises(CheckpointError, match="a holds values beyond the range of float16"):
        tensor_files.write(path, {"a": np.array([70000.0], ml_dtypes.bfloat16)}, np.dtype(np.float16))


def test_other_dtypes_are_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="scales is int16"):
        tensor_files.write(tmp_path / "file", {"scales": np.zeros(3, np.int16)})
    assert list(tmp_path.iterdir()) == []


def test_equal_values_are_told_across_dtypes(tmp_path, arrays):
    path = tmp_path / "file"
    rounded = arrays["matrix"].astype(ml_dtypes.bfloat16)
    other = arrays["matrix"].copy()
    other[-1, -1] += 1  # in the last piece
    save_file({"a": rounded, "b": rounded.astype(np.float32), "c": arrays["matrix"], "d": other}, path)
    tensors = tensor_files.read_header(path)
    assert tensor_files.same_values(tensors["a"], tensors["b"])
    assert not tensor_files.same_values(tensors["a"], tensors["c"])
    assert not tensor_files.same_values(tensors["c"], tensors["d"])


@pytest.fixture
def large(tmp_path):
    """A file, and what it holds; `odd` displaces what follows it."""
    arrays = {"odd": np.arange(3, dtype=np.int8), "a": np.arange(64.0, dtype=np.float32), "b": np.ones(32, np.uint8)}
    tensor_files.write(tmp_path / "x.safetensors", arrays)
    return tmp_path / "x.safetensors", arrays


def test_what_is_written_is_aligned_and_comes_from_the_pages_of_the_file(large):
    path, arrays = large
    tensors = tensor_files.read_header(path)
    assert tensors["a"].offset % 64 == 0
    found = {name: tensor_files.read(tensor) for name, tensor in tensors.items()}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    [pages] = mapping._MAPPINGS.values()
    assert np.shares_memory(found["a"], np.frombuffer(pages, np.uint8))
    cast = tensor_files.read(tensors["a"], np.dtype(np.float64))
    assert cast.dtype == np.float64 and not np.shares_memory(cast, np.frombuffer(pages, np.uint8))


def test_what_cannot_be_mapped_is_read(large, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no such device")

    path, arrays = large
    monkeypatch.setattr(mapping.mmap, "mmap", refuse)
    np.testing.assert_array_equal(tensor_files.read(tensor_files.read_header(path)["a"]), arrays["a"])


def test_a_file_put_in_the_place_of_a_mapped_one_changes_nothing(large):
    path, arrays = large
    found = tensor_files.read(tensor_files.read_header(path)["a"])
    tensor_files.write(path, {name: array + array.dtype.type(1) for name, array in arrays.items()})
    np.testing.assert_array_equal(found, arrays["a"])
    with pytest.raises(ValueError, match="read-only"):
        found[1] += 1
    np.testing.assert_array_equal(tensor_files.read(tensor_files.read_header(path)["a"])[:2], [1, 2])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_pages_of_numbers_that_are_gone_are_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_PIECE_ELEMENTS", 2**20)  # small ones would take seconds
    arrays = {name: np.full(2**24, i, np.uint8) for i, name in enumerate("ab")}
    tensor_files.write(tmp_path / "x.safetensors", arrays)
    tensors = tensor_files.read_header(tmp_path / "x.safetensors")

    def resident() -> int:
        """Bytes of files that this process has in memory."""
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE

    first, second = (tensor_files.read(tensors[name]) for name in "ab")
    before, view = resident(), first[2:]
    del first
    assert before - resident() < 2**22  # somebody still has them
    del view
    assert before - resident() > 2**23
    np.testing.assert_array_equal(second, arrays["b"])
    assert len(mapping._MAPPINGS) == 1
    np.testing.assert_array_equal(tensor_files.read(tensors["a"]), arrays["a"])


def test_a_file_that_became_shorter_is_named(large):
    path, _ = large
    tensor = tensor_files.read_header(path)["a"]
    with path.open("r+b") as file:
        file.truncate(tensor.offset + 8)
    with pytest.raises(CheckpointError, match="ended while a was read"):
        tensor_files.read(tensor)


@pytest.mark.parametrize("sizes", [(64, 64), (3, 64), (64, 3), (32, 96), (7, 5)])
def test_most_bytes_of_large_tensors_are_aligned_and_equal_arrays_give_equal_files(tmp_path, sizes):
    arrays = {
        f"{dtype.__name__}{i}": np.full(size, i, dtype)
        for i, size in enumerate(sizes)
        for dtype in (np.float32, np.uint8)
    }
    arrays |= {f"u{i}": np.full(size, i, ml_dtypes.bfloat16) for i, size in enumerate(sizes)}
    paths = [tmp_path / f"{i}" for i in range(8)]
    for path in paths:
        tensor_files.write(path, arrays)
    assert len({path.read_bytes() for path in paths}) == 1
    tensors = tensor_files.read_header(paths[0]).values()
    aligned = [
        sum(t.nbytes for t in tensors if (t.offset + shift) % 64 == 0 and t.nbytes >= 10) for shift in range(0, 64, 8)
    ]
    assert aligned[0] == max(aligned)


def test_a_file_system_without_mappings_is_read_all_the_same(large, monkeypatch):
    def open_file(*arguments, backend="mmap"):
        if backend == "mmap":
            raise OSError("no such device")
        return safe_open(*arguments, backend=backend)

    path, arrays = large
    monkeypatch.setattr(tensor_files, "safe_open", open_file)
    found = tensor_files.read(tensor_files.read_header(path)["a"], np.dtype(np.float16))
    np.testing.assert_array_equal(found, arrays["a"])


def test_arrays_in_host_memory_are_written_from_where_they_are():
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    assert tensor_files._host_array(array, array.dtype, "a") is array
    assert np.shares_memory(tensor_files._host_array(array[1:], array.dtype, "a"), array)
    placed = jax.device_put(array, jax.devices("cpu")[0])
    assert tensor_files._host_array(placed, array.dtype, "a").ctypes.data == placed.unsafe_buffer_pointer()


def test_a_file_may_be_read_by_whom_the_umask_allows(large):
    path, _ = large
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


def test_a_note_is_read_back_and_equal_ones_give_equal_files(tmp_path):
    arrays, note = {"a": np.arange(6, dtype=np.float32)}, {"about": '{"name": "x\\"y"}', "more": "z"}
    for name in ("first", "second"):
        tensor_files.write(tmp_path / name, arrays, note=note)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    found = tensor_files.read_note(tmp_path / "first")
    assert found["format"] == "pt" and {key: found[key] for key in note} == note
    np.testing.assert_array_equal(tensor_files.read(tensor_files.read_header(tmp_path / "first")["a"]), arrays["a"])
