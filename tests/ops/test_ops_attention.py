"""Attention against its formulas, by the ways of every platform, and the key-value cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.ops import (
    attend,
    attention,
    attention_probabilities,
    pad_cache,
    write_cache,
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


@pytest.mark.parametrize("uses_gemv", [True, False])
def test_a_query_over_a_long_cache_is_what_float32_makes_of_it(monkeypatch, uses_gemv):
    monkeypatch.setattr(attention, "_uses_gemv", lambda x, y: uses_gemv and y.dtype == jnp.bfloat16)
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

    def plain(q, k, v, scale, mask, softcap):
        return attention._attend(q, k, v, mask, scale, softcap, attention._dot)

    gradients = [jax.grad(loss, argnums=1)(function, q) for function in (attend, plain)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("num_queries", [1, 6])
def test_the_ways_of_all_platforms_agree(num_queries, softcap):
    shapes = [(2, num_queries, 4, 8), (2, 2, 9, 8), (2, 2, 8, 9)]
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, (2, num_queries, 9)).at[..., 0].set(True)
    dots = [attention._dot, attention._dot_on_cpu]
    found = [attention._attend(q, k, v, mask, 0.3, softcap, dot) for dot in dots]
    if softcap is None:
        found.append(attention._attend_by_library(q, k, v, mask, 0.3, None))
    for out in found:
        np.testing.assert_allclose(attend(q, k, v, 0.3, mask, softcap), out, rtol=1e-5, atol=1e-5)
    weights = attention_probabilities(q, k, 0.3, mask, softcap)
    np.testing.assert_allclose(weights.sum(-1), np.ones((2, 4, num_queries)), rtol=1e-5)
    by_head = np.einsum("bnts,bnhs->btnh", weights, np.repeat(v, 2, axis=1))
    np.testing.assert_allclose(by_head, found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_gemv_per_head_has_the_gradients_of_the_matmul(dtype):
    x, y = (jax.random.normal(jax.random.key(i), (1, 2, rows, 128), dtype) for i, rows in enumerate((2, 8)))

    def gradients(dot):
        return jax.grad(lambda x, y: jnp.square(dot(x, y)).sum(), argnums=(0, 1))(x, y)

    for found, expected in zip(gradients(attention._gemv), gradients(attention._dot), strict=True):
        assert found.dtype == dtype
        found, expected = (np.asarray(part, np.float32) for part in (found, expected))
        np.testing.assert_allclose(found, expected, atol=2e-2 * np.abs(expected).max())


def test_a_gemv_per_head_is_for_few_rows_and_many_half_precision_numbers():
    def used(num_rows: int, num_keys: int, dtype: str = "bfloat16") -> bool:
        return attention._uses_gemv(*(jax.ShapeDtypeStruct((1, 4, n, 256), dtype) for n in (num_rows, num_keys)))

    assert [used(count, 304) for count in (1, 2, 4, 5)] == [False, True, True, False]
    assert not used(2, 16) and not used(2, 304, "float32")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_programs_for_other_platforms_have_none_of_the_ways_of_a_cpu(platform, softcap, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("the backend was asked for"))
    cache = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 4, 304, 256), (1, 4, 256, 304)))
    new = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 4, 1, 256), (1, 4, 256, 1)))
    q, positions = jax.ShapeDtypeStruct((1, 1, 8, 256), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def step(q, cache, new, positions):
        k, v = write_cache(cache, new, positions)
        return attend(q, k, v, 0.1, None, softcap)

    lowered = jax.jit(step).trace(q, cache, new, positions).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert "optimization_barrier" not in text and text.count("stablehlo.dot_general") == 2
    assert text.count('"stablehlo.scatter"(') == 2
    assert ("stablehlo.pad" in text) == (platform == "cuda")  # a second write, which is dropped
    on_cpu = jax.jit(step).lower(q, cache, new, positions).as_text()
    assert "optimization_barrier" in on_cpu and "stablehlo.dot_general" not in on_cpu


def test_attention_is_mapped_scanned_and_differentiated():
    q, k, v = (jnp.ones(shape, jnp.bfloat16) for shape in ((2, 1, 1, 8, 16), (2, 1, 4, 9, 16), (2, 1, 4, 16, 9)))
    run = functools.partial(attend, scale=0.1)
    mapped = jax.jit(jax.vmap(run))(q, k, v)
    _, scanned = jax.lax.scan(lambda _, xs: (None, run(*xs)), None, (q, k, v))
    np.testing.assert_array_equal(mapped, scanned)
    assert jnp.isfinite(jax.grad(lambda q: run(q, k[0], v[0]).astype(jnp.float32).sum())(q[0])).all()


def test_a_cache_is_padded_behind_its_prompts():
    rng = np.random.default_rng(0)
    prompts = tuple((rng.normal(size=(3, 2, 5, 4)), rng.normal(size=(3, 2, 4, 5))) for _ in range(2))
    cache = pad_cache(jax.tree.map(jnp.asarray, prompts), 8)
    for (keys, values), (k, v) in zip(cache, prompts, strict=True):
        np.testing.assert_allclose(keys, np.pad(k, ((0, 0), (0, 0), (0, 3), (0, 0))), rtol=1e-6)
        np.testing.assert_allclose(values, np.pad(v, ((0, 0), (0, 0), (0, 0), (0, 3))), rtol=1e-6)
