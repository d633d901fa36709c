"""Masks drawn as matrices, and rotations."""

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.models.attention import prefix_lm_mask, rope, rotation


def draw(positions, num_keys, prefix_length, length, window=None):
    """Mask of one row as lines of 0 and 1."""
    arrays = (jnp.array([value]) for value in (positions, prefix_length, length))
    positions, prefix_length, length = arrays
    mask = prefix_lm_mask(positions, num_keys, prefix_length, length, window)[0]
    return ["".join(str(int(seen)) for seen in row) for row in mask]


def test_prefix_sees_itself_and_suffix_is_causal():
    assert draw(range(6), 6, prefix_length=3, length=5) == [
        "111000",
        "111000",
        "111000",
        "111100",
        "111110",
        "111110",
    ]


def test_window_limits_the_suffix_only():
    assert draw(range(7), 7, prefix_length=3, length=7, window=2) == [
        "1110000",
        "1110000",
        "1110000",
        "0011000",
        "0001100",
        "0000110",
        "0000011",
    ]


def test_decode_queries_see_the_slots_up_to_their_own():
    assert draw([5], 8, prefix_length=3, length=6) == ["11111100"]
    assert draw([5], 8, prefix_length=3, length=6, window=2) == ["00001100"]


def test_rows_of_a_batch_have_their_own_lengths():
    positions = jnp.broadcast_to(jnp.arange(4), (2, 4))
    mask = prefix_lm_mask(positions, 4, jnp.array([1, 3]), jnp.array([3, 4]))
    for row, (prefix, length) in enumerate([(1, 3), (3, 4)]):
        np.testing.assert_array_equal(
            mask[row], prefix_lm_mask(positions[:1], 4, *map(jnp.array, ([prefix], [length])))[0]
        )


def test_rope_depends_on_distance_only_and_keeps_lengths():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(query_position: int, key_position: int) -> jax.Array:
        at = (jnp.array([[query_position]]), jnp.array([[key_position]]))
        return jnp.vdot(rope(q, rotation(at[0], 8, 10000.0)), rope(k, rotation(at[1], 8, 10000.0)))

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-2
    np.testing.assert_allclose(
        jnp.linalg.norm(rope(q, rotation(jnp.array([[50]]), 8, 10000.0))), jnp.linalg.norm(q), rtol=1e-5
    )


def test_rope_turns_the_halves_of_a_head_as_complex_numbers():
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 7], [5, 9, 300]])
    angle = positions[:, :, None, None] * 100.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    found = rope(x, rotation(jnp.array(positions), 8, 100.0))
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-4)
    assert "concatenate" not in jax.jit(rope).lower(x, rotation(jnp.array(positions), 8, 100.0)).as_text()
