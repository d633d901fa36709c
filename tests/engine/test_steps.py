"""Prefill and decode against the network without a cache, and the work that their programs do."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import ops
from paligemma_jax.engine import steps
from paligemma_jax.engine.sampling import step_config
from paligemma_jax.engine.state import answer_size
from paligemma_jax.engine.steps import most_at_once, select_rows
from paligemma_jax.ops.cpu import gemv
from paligemma_jax.processing.processor import Batch
from paligemma_jax.processing.request import GenerateOptions

PROMPTS = (7, 12, 9, 10, 6)
OPTIONS = GenerateOptions(14)
CPU = ops.Target("cpu")


def traced(make_group, runner, config, params, inputs, num_slots=None):
    """Prefill and decode of plain answers as `jax.jit` traced them, and the shapes of the state between."""
    group = make_group(config, inputs, OPTIONS, num_steps=2)
    static = group.strategy.prefill_static | ({"num_slots": num_slots} if num_slots else {})
    first = runner.declare(steps.prefill, params, group.inputs, group.options, **static)
    second = runner.declare(steps.decode, params, first.result, **group.strategy.decode_static)
    return first.traced, second.traced, first.result


def test_greedy_tokens_and_logprobs_are_those_of_the_full_pass(config, params, make_inputs, full_logits, answer):
    inputs = make_inputs(config, PROMPTS)
    assert len(inputs.tokens) == 8  # five rows, padded
    *_, last = answer(config, params, inputs, OPTIONS)
    for row in range(len(PROMPTS)):
        chosen = last.tokens[row, : last.step[row]]
        assert len(chosen) == 14 or chosen[-1] == config.eos_token_id
        logits = full_logits(config, params, inputs, row, chosen)[:-1]
        np.testing.assert_array_equal(chosen, logits[:, : config.image_token_id].argmax(axis=-1))
        expected = jax.nn.log_softmax(logits, axis=-1)[np.arange(len(chosen)), chosen]
        np.testing.assert_allclose(last.scores.logprobs[row, : len(chosen)], expected, atol=1e-4)


def test_fewer_sequences_run_at_once_the_longer_they_are():
    """The float32 scores of a head stay within 64 MiB, as those of one picture at 896 px do."""
    assert [most_at_once(n) for n in (256, 1024, 4096, 4352)] == [256, 16, 1, 1]
    lengths = range(1, 5000, 7)
    counts = [most_at_once(n) for n in lengths]
    assert counts == sorted(counts, reverse=True)
    assert all(count == 1 or count * n**2 <= 2**24 for count, n in zip(counts, lengths, strict=True))


def test_selected_rows_take_their_pictures_only():
    slots = np.array([[0, 1, -1], [8, 9, -1], [4, 5, -1]], np.int32)
    lengths = np.full(3, 3, np.int32)
    soft_tokens = jnp.arange(10.0).reshape(5, 2, 1)
    batch = Batch(np.zeros((0, 2, 2, 3), np.float32), np.full((3, 3), 7, np.int32), slots, lengths, lengths)
    inputs = select_rows(batch, soft_tokens, range(1, 3))
    np.testing.assert_array_equal(inputs.image_slots, [[2, 3, -1], [0, 1, -1]])
    flat = inputs.soft_tokens.reshape(-1)
    np.testing.assert_array_equal(flat[inputs.image_slots[:, :2]], [[8, 9], [4, 5]])
    assert len(select_rows(batch, soft_tokens, range(3)).tokens) == 4
    shapes = select_rows(batch, jax.eval_shape(lambda: soft_tokens), range(1, 3))  # to declare a program
    assert shapes.soft_tokens.shape == inputs.soft_tokens.shape and shapes.soft_tokens.dtype == soft_tokens.dtype


def test_the_cache_has_few_sizes():
    assert {64 + answer_size(n) for n in range(1, 257)} == {96, 128, 192, 320}
    assert all(answer_size(n) >= n for n in range(1, 3000, 7))


def test_a_step_does_what_some_row_uses_and_no_more():
    def used(**options) -> tuple:
        both = [GenerateOptions(), GenerateOptions(**options)]
        return dataclasses.astuple(step_config(None, 0, both, False))[2:]

    def sampling(**values) -> dict:
        return {"sampling": type(OPTIONS.sampling)(**values)}

    assert used() == (False, (), False, False)
    assert used(**sampling(temperature=1.0)) == (True, (), False, False)
    assert used(**sampling(temperature=1.0, top_p=0.5)) == (True, ("top_p",), False, False)
    assert used(**sampling(top_p=0.5, top_k=3, min_p=0.1)) == (False, (), False, False)  # greedy all the same
    assert used(min_new_tokens=2) == (False, (), False, True)


def test_no_half_precision_matmul_has_a_single_row(config, random_params, make_inputs, make_group, runner):
    """On CPU such a matmul is far slower than one of several rows; so weights are prepared to fill rows up."""
    params = ops.prepare(random_params(config, "bfloat16"), CPU)
    inputs = make_inputs(config, PROMPTS, range(1))
    assert len(inputs.tokens) == 1
    *programs, _ = traced(make_group, runner, config, params, inputs)
    for text in (program.lower().as_text() for program in programs):
        products = list(_free_sizes(text))
        assert len(products) > 7  # of one layer: the others are the same function
        assert all(min(sizes) > 1 for sizes in products), products


_TENSOR = r"tensor<([\dx]+)x(bf16|f32)>"
_PRODUCT = re.compile(
    rf"dot_general [^,]+, [^,]+,(?: batching_dims = \[([\d, ]*)\] x \[([\d, ]*)\],)? "
    rf"contracting_dims = \[([\d, ]*)\] x \[([\d, ]*)\][^:]*: \({_TENSOR}, {_TENSOR}\)"
)


def _free_sizes(text: str):
    """For each matmul of bf16 operands, over how many rows its operands run beside batch and contracted axes."""
    assert text.count("dot_general ") == len(_PRODUCT.findall(text))
    for *axes, left, left_dtype, right, right_dtype in _PRODUCT.findall(text):
        if "bf16" in (left_dtype, right_dtype):
            batch_left, batch_right, summed_left, summed_right = ([int(a) for a in x.split(",") if a] for x in axes)
            sides = (left, batch_left + summed_left), (right, batch_right + summed_right)
            shapes = (([int(n) for n in shape.split("x")], taken) for shape, taken in sides)
            yield tuple(int(np.prod([n for i, n in enumerate(s) if i not in taken])) for s, taken in shapes)


def test_decoding_keeps_no_second_copy_of_the_embedding_table(gemma2, random_params, make_inputs, make_group, runner):
    """XLA on CPU would convert a half-precision table to float32, once for a whole chunk of steps."""
    config = dataclasses.replace(gemma2, text=dataclasses.replace(gemma2.text, vocab_size=50_000))
    params = ops.prepare(random_params(config, "bfloat16"), CPU)
    _, decode, _ = traced(make_group, runner, config, params, make_inputs(config, PROMPTS, range(1)))
    used = ops.compile_traced(CPU, decode).memory_analysis()
    table = params["language_model"]["embed_tokens"]["weight"]
    assert used.temp_size_in_bytes < table.size * table.dtype.itemsize


@pytest.mark.parametrize("dtype, uses_gemv", [("float32", False), ("bfloat16", False), ("bfloat16", True)])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_step_copies_no_cache(
    config, random_params, make_inputs, make_group, runner, monkeypatch, num_rows, dtype, uses_gemv
):
    """Nor transposes it."""
    monkeypatch.setattr("paligemma_jax.ops.attention._LARGE_HEADS", 0 if uses_gemv else 2**30)
    taken, matmul = [], gemv.per_head_matmul
    monkeypatch.setattr(gemv, "per_head_matmul", lambda *args: taken.append(args) or matmul(*args))
    params = ops.prepare(random_params(config, dtype), CPU)
    inputs = make_inputs(config, PROMPTS, range(num_rows))
    num_slots = inputs.tokens.shape[1] + (96 if uses_gemv else 64)  # layers that were traced are not traced again
    _, decode, state = traced(make_group, runner, config, params, inputs, num_slots)
    text = ops.compile_traced(CPU, decode).as_text()
    assert bool(taken) == (uses_gemv and config.text.num_heads > config.text.num_kv_heads)  # one query alone has none
    sizes = state.cache[0][0].shape
    for part in state.cache[0]:
        assert f"[{','.join(map(str, part.shape))}]" in text
    moved = re.findall(r"(?:copy|transpose)[\w.]* = \w+\[([\d,]+)\]", text)
    assert not [shape for shape in moved if sorted(map(int, shape.split(","))) == sorted(sizes)]
