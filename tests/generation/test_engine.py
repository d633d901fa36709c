"""Prefill and decode against the network without a cache; batches, padding, early stop, and the work that is done."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation import cache as kv_cache
from paligemma_jax.generation.engine import decode, embed_pictures, generate, most_at_once, prefill, prepare
from paligemma_jax.generation.sampling import Sampling, row_keys
from paligemma_jax.models import cpu, few_rows
from paligemma_jax.processing.processor import Batch

PROMPTS = (7, 12, 9, 10, 6)
NEW_TOKENS = 14
GREEDY = Sampling()


def run(config, params, inputs, clock, sampling=GREEDY, max_new_tokens=NEW_TOKENS, chunk=5, requests=None):
    """Tokens and log-probabilities [steps, B]."""
    keys = row_keys(sampling.seed, requests or [str(i) for i in range(len(inputs.tokens))])
    chunks = list(generate(params, config, inputs, keys, sampling.rule(), max_new_tokens, chunk, clock))
    tokens, odds = jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)
    return tokens, odds.logprobs


def answer(tokens: np.ndarray, config) -> np.ndarray:
    """A row's tokens [n] up to its first <eos>."""
    ends = np.flatnonzero(tokens == config.eos_token_id)
    return tokens[: ends[0] + 1] if len(ends) else tokens


def test_greedy_tokens_and_logprobs_are_those_of_the_full_pass(config, params, make_inputs, full_logits, clock):
    inputs = make_inputs(config, PROMPTS)
    assert len(inputs.tokens) == 8  # five rows, padded
    tokens, logprobs = run(config, params, inputs, clock)
    for row in range(len(PROMPTS)):
        chosen = answer(tokens[:, row], config)
        logits = full_logits(config, params, inputs, row, chosen)[:-1]
        np.testing.assert_array_equal(chosen, logits[:, : config.image_token_id].argmax(axis=-1))
        expected = jax.nn.log_softmax(logits, axis=-1)[np.arange(len(chosen)), chosen]
        np.testing.assert_allclose(logprobs[: len(chosen), row], expected, atol=1e-4)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.5, top_k=20, seed=3)], ids=["greedy", "sampled"]
)
def test_a_batch_equals_its_rows_alone(gemma2, random_params, make_inputs, clock, sampling):
    params = random_params(gemma2)
    tokens, logprobs = run(gemma2, params, make_inputs(gemma2, PROMPTS), clock, sampling)
    for row in range(len(PROMPTS)):
        inputs = make_inputs(gemma2, PROMPTS, range(row, row + 1))
        alone, alone_logprobs = run(gemma2, params, inputs, clock, sampling, requests=["alone"])
        chosen = answer(alone[:, 0], gemma2)
        np.testing.assert_array_equal(tokens[: len(chosen), row], chosen)
        np.testing.assert_allclose(logprobs[: len(chosen), row], alone_logprobs[: len(chosen), 0], atol=1e-4)


def test_chunks_change_nothing_and_lengths_are_kept(gemma2, random_params, make_inputs, clock):
    inputs = make_inputs(gemma2, PROMPTS)
    tokens, _ = run(gemma2, random_params(gemma2), inputs, clock, Sampling(temperature=1.0))
    for limit in (1, 7):
        other, _ = run(gemma2, random_params(gemma2), inputs, clock, Sampling(temperature=1.0), limit, chunk=3)
        np.testing.assert_array_equal(other, tokens[:limit])


def test_rows_end_on_their_own_and_the_loop_with_the_last(gemma2, random_params, make_inputs, clock):
    params = random_params(gemma2)
    inputs = make_inputs(gemma2, PROMPTS)
    sampling = Sampling(temperature=1.0)
    free, _ = run(gemma2, params, inputs, clock, sampling)
    ended = next(t for t in free[2:6, 0] if t not in free[:2, 0])
    config = dataclasses.replace(gemma2, eos_token_id=int(ended))
    tokens, logprobs = run(config, params, inputs, clock, sampling, max_new_tokens=30)
    for row in range(len(PROMPTS)):
        chosen = answer(tokens[:, row], config)
        assert (tokens[len(chosen) :, row] == config.pad_token_id).all()
        assert (logprobs[len(chosen) :, row] == 0.0).all()
    assert 3 <= len(answer(tokens[:, 0], config)) <= 6
    longest = max(len(answer(row, config)) for row in tokens.T)
    assert longest == 30 or len(tokens) <= longest + 5  # at most a chunk is wasted


def test_nothing_is_decoded_when_all_rows_end_at_once(gemma2, random_params, make_inputs, clock):
    inputs = make_inputs(gemma2, PROMPTS, range(1))
    first, _ = run(gemma2, random_params(gemma2), inputs, clock, max_new_tokens=1)
    config = dataclasses.replace(gemma2, eos_token_id=int(first[0, 0]))
    tokens, _ = run(config, random_params(gemma2), inputs, clock)
    np.testing.assert_array_equal(tokens, first)


def test_new_settings_of_a_kind_and_new_prompts_compile_nothing(gemma2, random_params, make_inputs, clock):
    params = random_params(gemma2)
    run(gemma2, params, make_inputs(gemma2, (8, 9)), clock, Sampling(temperature=1.0, top_p=0.9))
    before = prefill._cache_size(), decode._cache_size(), clock.timing(1).compile_s
    sampling = Sampling(temperature=0.3, top_p=0.5, seed=9)
    run(gemma2, params, make_inputs(gemma2, (11, 6)), clock, sampling, max_new_tokens=20)
    assert (prefill._cache_size(), decode._cache_size()) == before[:2]
    assert clock.timing(1).compile_s - before[2] < 0.05


def test_pictures_are_embedded_once_each_in_powers_of_two(gemma2, random_params, clock, monkeypatch):
    sizes = []
    call = clock.call
    monkeypatch.setattr(
        clock, "call", lambda f, p, pixels, **static: sizes.append(len(pixels)) or call(f, p, pixels, **static)
    )
    pixels = np.random.default_rng(0).uniform(-1, 1, (7, 28, 28, 3)).astype(np.float32)
    soft_tokens = embed_pictures(random_params(gemma2), gemma2, pixels, clock)
    assert sizes == [4, 2, 1]
    assert soft_tokens.shape == (7, gemma2.vision.num_tokens, gemma2.text.width)
    alone = embed_pictures(random_params(gemma2), gemma2, pixels[5:6], clock)
    np.testing.assert_allclose(soft_tokens[5:6], alone, atol=1e-5)


def test_fewer_sequences_run_at_once_the_longer_they_are():
    """The float32 scores of a head stay within 64 MiB, as those of one picture at 896 px do."""
    assert [most_at_once(n) for n in (256, 1024, 4096, 4352)] == [256, 16, 1, 1]
    lengths = range(1, 5000, 7)
    counts = [most_at_once(n) for n in lengths]
    assert counts == sorted(counts, reverse=True)
    assert all(count == 1 or count * n**2 <= 2**24 for count, n in zip(counts, lengths, strict=True))


def test_prepare_takes_the_pictures_of_the_rows_only():
    slots = np.array([[0, 1, -1], [8, 9, -1], [4, 5, -1]], np.int32)
    lengths = np.full(3, 3, np.int32)
    soft_tokens = jnp.arange(10.0).reshape(5, 2, 1)
    batch = Batch(np.zeros((0, 2, 2, 3), np.float32), np.full((3, 3), 7, np.int32), slots, lengths, lengths)
    inputs = prepare(batch, soft_tokens, range(1, 3))
    np.testing.assert_array_equal(inputs.image_slots, [[2, 3, -1], [0, 1, -1]])
    flat = inputs.soft_tokens.reshape(-1)
    np.testing.assert_array_equal(flat[inputs.image_slots[:, :2]], [[8, 9], [4, 5]])
    assert len(prepare(batch, soft_tokens, range(3)).tokens) == 4


def test_the_cache_has_few_sizes():
    assert {kv_cache.num_slots(64, n) for n in range(1, 257)} == {96, 128, 192, 320}


def test_no_half_precision_product_has_a_single_row(config, random_params, make_inputs):
    """On CPU such a product is far slower than one of several rows."""
    params = random_params(config, "bfloat16")
    inputs = make_inputs(config, PROMPTS, range(1))
    assert len(inputs.tokens) == 1
    keys, rule = row_keys(0, ["a"]), Sampling().rule()
    start = functools.partial(prefill, config=config, num_slots=44)
    state = jax.eval_shape(start, params, inputs, keys, rule)
    lowered = [
        prefill.lower(params, inputs, keys, rule, config=config, num_slots=44),
        decode.lower(params, state, rule, config=config, num_steps=2),
    ]
    for text in (program.as_text() for program in lowered):
        products = list(_free_sizes(text))
        assert len(products) > 7  # of one layer: the others are the same function
        assert all(min(sizes) > 1 for sizes in products), products


_TENSOR = r"tensor<([\dx]+)x(bf16|f32)>"
_PRODUCT = re.compile(
    rf"dot_general [^,]+, [^,]+,(?: batching_dims = \[([\d, ]*)\] x \[([\d, ]*)\],)? "
    rf"contracting_dims = \[([\d, ]*)\] x \[([\d, ]*)\][^:]*: \({_TENSOR}, {_TENSOR}\)"
)


def _free_sizes(text: str):
    """For each product of bf16 operands, over how many rows its operands run beside batch and contracted axes."""
    assert text.count("dot_general ") == len(_PRODUCT.findall(text))
    for *axes, left, left_dtype, right, right_dtype in _PRODUCT.findall(text):
        if "bf16" in (left_dtype, right_dtype):
            batch_left, batch_right, summed_left, summed_right = ([int(a) for a in x.split(",") if a] for x in axes)
            sides = (left, batch_left + summed_left), (right, batch_right + summed_right)
            shapes = (([int(n) for n in shape.split("x")], taken) for shape, taken in sides)
            yield tuple(int(np.prod([n for i, n in enumerate(s) if i not in taken])) for s, taken in shapes)


def test_decoding_keeps_no_second_copy_of_the_embedding_table(gemma2, random_params, make_inputs):
    """XLA on CPU would convert a half-precision table to float32, once for a whole chunk of steps."""
    config = dataclasses.replace(gemma2, text=dataclasses.replace(gemma2.text, vocab_size=50_000))
    params = random_params(config, "bfloat16")
    inputs, rule = make_inputs(config, PROMPTS, range(1)), Sampling().rule()
    state = jax.eval_shape(
        functools.partial(prefill, config=config, num_slots=44), params, inputs, row_keys(0, ["a"]), rule
    )
    compiled = decode.lower(params, state, rule, config=config, num_steps=2).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["language_model"]["embed_tokens"]["weight"].nbytes


@pytest.mark.parametrize("dtype, as_sums", [("float32", False), ("bfloat16", False), ("bfloat16", True)])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_step_copies_no_cache(config, random_params, make_inputs, monkeypatch, num_rows, dtype, as_sums):
    """Nor transposes it."""
    monkeypatch.setattr(cpu, "_LARGE_HEADS", 0 if as_sums else 2**30)
    taken, product = [], few_rows.product_per_head
    monkeypatch.setattr(few_rows, "product_per_head", lambda *args: taken.append(args) or product(*args))
    params, inputs = random_params(config, dtype), make_inputs(config, PROMPTS, range(num_rows))
    keys, rule = row_keys(0, ["a", "b"][:num_rows]), GREEDY.rule()
    num_slots = inputs.tokens.shape[1] + (96 if as_sums else 64)  # layers that were traced are not traced again
    start = functools.partial(prefill, config=config, num_slots=num_slots)
    state = jax.eval_shape(start, params, inputs, keys, rule)
    text = decode.lower(params, state, rule, config=config, num_steps=2).compile().as_text()
    assert bool(taken) == (as_sums and config.text.num_heads > config.text.num_kv_heads)  # one query alone has none
    sizes = state.cache[0][0].shape
    for part in state.cache[0]:
        assert f"[{','.join(map(str, part.shape))}]" in text
    moved = re.findall(r"(?:copy|transpose)[\w.]* = \w+\[([\d,]+)\]", text)
    assert not [shape for shape in moved if sorted(map(int, shape.split(","))) == sorted(sizes)]
