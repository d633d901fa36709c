"""Embeddings as files, in part, mixed and rounded."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from paligemma_jax.errors import DataError, ImageError
from paligemma_jax.inspection import embeddings as em

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, 1, 16, 5)).astype(np.float32)


def test_saved_and_loaded_they_are_the_same(tmp_path):
    em.save(tmp_path / "a.npy", A)
    np.testing.assert_array_equal(em.load(tmp_path / "a.npy"), A)
    np.save(tmp_path / "one.npy", A[0].astype(np.float16))
    assert em.load(tmp_path / "one.npy").shape == A.shape  # without the axis of pictures


def write_bytes(path):
    path.write_bytes(b"not numpy")


def write_cut(path):
    em.save(path, A)
    path.write_bytes(path.read_bytes()[:-7])


def write_several(path):
    with path.open("wb") as file:
        np.savez(file, a=A, b=B)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "does not exist"),
        (write_bytes, "damaged"),
        (write_cut, "damaged"),
        (lambda path: np.save(path, np.array([{}]), allow_pickle=True), "damaged"),
        (write_several, "of one array"),
        (lambda path: np.save(path, np.zeros(3)), r"shape \(3,\)"),
        (lambda path: np.save(path, np.zeros((2, 3), int)), "int64"),
        (lambda path: np.save(path, np.full((2, 3), np.nan)), "finite"),
        (lambda path: np.save(path, np.full((2, 3), 1e300)), "finite"),
        (lambda path: path.write_bytes(b"PK\x03\x04garbage"), "damaged"),
    ],
)
def test_files_that_are_none(tmp_path, write, message):
    write(tmp_path / "a.npy")
    with pytest.raises(DataError, match=message):
        em.load(tmp_path / "a.npy")


def test_damaged_headers_are_errors_of_ours(tmp_path):
    em.save(tmp_path / "a.npy", A)
    whole, rng = (tmp_path / "a.npy").read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(0, 100)] = rng.integers(0, 256)
        (tmp_path / "b.npy").write_bytes(damaged)
        with contextlib.suppress(DataError):
            em.load(tmp_path / "b.npy")


def test_swaps_and_mixtures_end_in_the_originals():
    everywhere, nowhere = np.ones(16, bool), np.zeros(16, bool)
    np.testing.assert_array_equal(em.swap(A, B, nowhere), A)
    np.testing.assert_array_equal(em.swap(A, B, everywhere), B)
    np.testing.assert_array_equal(em.swap(A, B, ~everywhere | (np.arange(16) < 4))[:, :4], B[:, :4])
    np.testing.assert_array_equal(em.mix(A, B, 1.0), A)
    np.testing.assert_array_equal(em.mix(A, B, 0.0), B)
    np.testing.assert_allclose(em.mix(A, B, 0.25), 0.25 * A + 0.75 * B, rtol=1e-6)
    for change in (lambda: em.swap(A, B[:, :9], nowhere), lambda: em.mix(A, B[..., :3], 0.5)):
        with pytest.raises(ImageError, match=r"\(1, .*\(1, 16, 5\)"):
            change()


def test_patches_of_a_box():
    grid = em.patches_in((0, 0, 0.5, 1), 16).reshape(4, 4)
    np.testing.assert_array_equal(grid, np.arange(4)[None] < 2 + np.zeros((4, 1)))
    assert em.patches_in((0, 0, 1, 1), 16).all()
    np.testing.assert_array_equal(np.flatnonzero(em.patches_in((0.3, 0.6, 0.31, 0.61), 16)), [9])  # smaller than one
    for box in ((0, 0, 0, 1), (0.5, 0, 0.2, 1), (0, 0, 1.5, 1), (-0.1, 0, 1, 1)):
        with pytest.raises(DataError, match="shares of the picture"):
            em.patches_in(box, 16)
    with pytest.raises(DataError, match="15 patches"):
        em.patches_in((0, 0, 1, 1), 15)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(values=arrays(np.float32, (2, 3, 4), elements=st.floats(-1e4, 1e4, width=32)), bits=st.sampled_from(em.BITS))
def test_rounding_errs_by_half_a_step_at_most(values, bits):
    codes, scales = em.quantize(values, bits)
    assert codes.dtype == np.int16 and abs(codes).max() <= 2 ** (bits - 1) - 1
    assert (abs(em.fake_quantize(values, bits) - values) <= scales * 0.501 + 1e-6).all()


def test_fewer_bits_lose_more():
    losses = [np.abs(em.fake_quantize(A, bits) - A).max() for bits in em.BITS]
    assert losses == sorted(losses) and losses[0] < 1e-3
    with pytest.raises(DataError, match="give one of 16, 8, 4, 2"):
        em.quantize(A, 3)
