"""Rows that are ready to be answered, for scripts that time a stage of the engine."""

from collections.abc import Sequence
from typing import Any

import jax

import paligemma_jax as pj
from paligemma_jax.engine.generate import Generation, Group, embed_images
from paligemma_jax.engine.runner import Call
from paligemma_jax.tasks.prompts import read_prompt


def make_group(
    model: pj.PaliGemma,
    images: Sequence[Any],
    prompts: Sequence[str],
    options: pj.GenerateOptions,
    soft_tokens: jax.Array | None = None,
) -> tuple[Call, Group]:
    """A call of the API, and the rows of one batch with their images embedded, unless their soft tokens are given."""
    call = Call(model.runner, model.params)
    batch = model.processor(list(images), list(prompts))
    if soft_tokens is None:
        soft_tokens = embed_images(call, model.config, batch.pixels)
    parsed, tokenizer = list(map(read_prompt, prompts)), model.processor.tokenizer
    generation = Generation(model.config, tokenizer, parsed, [options] * len(parsed), batch, soft_tokens)
    [group] = generation.groups(model.runner, model.params, len(parsed))
    return call, group


def prefill(call: Call, group: Group) -> Any:
    """The state after the first tokens."""
    strategy = group.strategy
    return call.prefill(strategy.prefill, group.inputs, group.options, *strategy.extra, **strategy.prefill_static)


def decode(call: Call, group: Group, state: Any, num_steps: int) -> Any:
    """The state some steps later, finished."""
    static = group.strategy.decode_static | {"num_steps": num_steps}
    return jax.block_until_ready(call.decode(group.strategy.decode, state, **static))
