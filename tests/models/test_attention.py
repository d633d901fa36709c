"""Masks drawn as matrices, rotations, grouped heads, and the products that a CPU is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models import attention, cpu
from paligemma_jax.models.attention import attend, prefix_lm_mask, rope, rotation, write_cache


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


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attend_is_softmax_of_capped_scores_per_head(num_kv_heads):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, 4, 6)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, num_kv_heads, 5, 6)).astype(np.float32)
    mask = rng.random((2, 3, 5)) < 0.6
    mask[..., 0] = True
    expected = np.zeros_like(q)
    for b, t, n in np.ndindex(2, 3, 4):
        kv_head = n // (4 // num_kv_heads)
        scores = 2.0 * np.tanh(0.7 * (k[b, kv_head] @ q[b, t, n]) / 2.0)
        weights = np.exp(scores) * mask[b, t]
        expected[b, t, n] = weights / weights.sum() @ v[b, kv_head]
    np.testing.assert_allclose(attend(q, k, v.swapaxes(2, 3), 0.7, mask, softcap=2.0), expected, atol=1e-5)


def test_a_lone_half_precision_query_gives_what_it_gives_among_others():
    q = jax.random.normal(jax.random.key(1), (2, 5, 6, 8), jnp.bfloat16)
    k, v = jax.random.normal(jax.random.key(2), (2, 2, 3, 7, 8), jnp.bfloat16)
    v = jnp.swapaxes(v, 2, 3)
    np.testing.assert_allclose(attend(q[:, :1], k, v, 1.0), attend(q, k, v, 1.0)[:, :1], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("as_sums", [True, False])
def test_a_query_over_a_long_cache_is_what_float32_makes_of_it(monkeypatch, as_sums):
    monkeypatch.setattr(cpu, "sums_win_per_head", lambda rows, x: as_sums and x.dtype == jnp.bfloat16)
    q = jax.random.normal(jax.random.key(0), (2, 1, 8, 256), jnp.bfloat16)
    k = jax.random.normal(jax.random.key(1), (2, 4, 304, 256), jnp.bfloat16)
    v = jax.random.normal(jax.random.key(2), (2, 4, 256, 304), jnp.bfloat16)
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, (2, 1, 304))
    expected = attend(*(x.astype(jnp.float32) for x in (q, k, v)), 0.05, mask, 50.0)
    found = attend(q, k, v, 0.05, mask, 50.0)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=6e-3)


def test_half_precision_queries_are_not_rounded_again_by_the_scale():
    q = jax.random.normal(jax.random.key(2), (1, 6, 2, 72), jnp.bfloat16)
    k = jax.random.normal(jax.random.key(3), (1, 2, 6, 72), jnp.bfloat16)
    scale = 72**-0.5
    scores = np.einsum("btnh,bnsh->bnts", *(np.asarray(x, np.float64) for x in (q, k))) * scale
    identity = jnp.broadcast_to(jnp.eye(72, 6), (1, 2, 72, 6))  # the weights come out as they are
    weights = attend(q, k, identity, scale)[..., :6]
    np.testing.assert_allclose(np.moveaxis(weights, 2, 1), jax.nn.softmax(scores, axis=-1), atol=1e-5)


def test_a_row_that_sees_nothing_stays_finite():
    q, k, v = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 4, 2))
    assert jnp.isfinite(attend(q, k, v, 1.0, jnp.zeros((1, 2, 2), bool))).all()


def test_write_cache_takes_each_rows_positions_and_drops_what_is_beyond():
    cache, new = (jnp.zeros((2, 1, 4, 1)), jnp.zeros((2, 1, 1, 4))), (jnp.ones((2, 1, 1, 1)),) * 2
    for written in write_cache(cache, new, jnp.array([[1], [4]])):
        np.testing.assert_array_equal(written.reshape(2, 4), [[0, 1, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("positions", [[[2]], [[4]], [[9]], [[3, 4]], [[0], [3]], [[1, 2], [2, 3]]])
def test_write_cache_is_an_assignment_per_row_and_position(positions):
    num_rows, num_new = np.shape(positions)
    cache = np.random.default_rng(0).normal(size=(2, num_rows, 2, 4, 3)).astype(np.float32)
    new = np.random.default_rng(1).normal(size=(2, num_rows, 2, num_new, 3)).astype(np.float32)
    expected = cache.copy()
    for row, t in np.ndindex(num_rows, num_new):
        if positions[row][t] < 4:
            expected[:, row, :, positions[row][t]] = new[:, row, :, t]

    def laid_out(pair: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return jnp.array(pair[0]), jnp.swapaxes(pair[1], 2, 3)

    written = write_cache(laid_out(cache), laid_out(new), jnp.array(positions))
    jax.tree.map(np.testing.assert_array_equal, written, laid_out(expected))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "num_queries, cached, count",
    [
        pytest.param(96, 96 * 4 * 96, 2, marks=pytest.mark.slow),
        (160, 1, 5),
        (97, 1, 1),
        pytest.param(96, 1 << 22, 1, marks=pytest.mark.slow),
    ],
)
def test_queries_that_take_turns_see_the_same(monkeypatch, masked, num_queries, cached, count):
    shapes = [(2, num_queries, 4, 8), (2, 2, 96, 8), (2, 2, 8, 96)]
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, (2, num_queries, 96)) if masked else None
    expected = attend(q, k, v, 0.3, mask, 5.0)
    monkeypatch.setattr(attention, "_CACHED_SCORES", cached)
    assert attention._turns(q.shape, 96) == count
    np.testing.assert_allclose(attend(q, k, v, 0.3, mask, 5.0), expected, rtol=1e-5, atol=1e-5)

    def loss(function, q):
        return jnp.square(function(q, k, v, 0.3, mask, 5.0)).sum()

    gradients = [jax.grad(loss, argnums=1)(function, q) for function in (attend, attention._attend)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)
