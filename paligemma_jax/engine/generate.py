"""Requests to answers: rows that run at once, the strategy that answers them, and the loop that drives it.

Axes: I images, N soft tokens of an image, S side of an image, B rows, M tokens of an answer, D decoder width.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.engine import steps
from paligemma_jax.engine.constraints import grammar
from paligemma_jax.engine.runner import Call, Program, Runner
from paligemma_jax.engine.sampling import RowOptions, TokenScores, row_keys, row_options, step_config
from paligemma_jax.engine.state import answer_size
from paligemma_jax.engine.steps import Inputs, Params, image_batches, most_at_once, padded_rows, select_rows
from paligemma_jax.engine.strategies.strategy import Strategy, choose_strategy
from paligemma_jax.errors import ImageError, PromptError
from paligemma_jax.processing.processor import Batch, Processor, identity
from paligemma_jax.processing.request import GenerateOptions, Request
from paligemma_jax.processing.tokenizer import StreamDecoder, Tokenizer
from paligemma_jax.tasks.output import Output
from paligemma_jax.tasks.prompts import Prompt

BATCH_SIZE = 16  # rows that run at once


@dataclasses.dataclass(frozen=True)
class Progress:
    """Answers in progress, on the host.

    tokens: i32 [B, M]; the first step[b] of row b are said.
    scores: [B, M].
    step: i32 [B].
    done: bool [B].
    """

    tokens: np.ndarray
    scores: TokenScores
    step: np.ndarray
    done: np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that run at once. Arrays are padded to a power of two; `rows` are the real ones."""

    rows: range
    inputs: Inputs
    options: RowOptions
    strategy: Strategy


@dataclasses.dataclass(frozen=True)
class Generation:
    """Prompts that are laid out, with their images embedded and what their answers are to be.

    prompts, options: of each row of the batch.
    soft_tokens: [I, N, D]; shapes suffice to declare programs.
    """

    config: PaliGemmaConfig
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    options: Sequence[GenerateOptions]
    batch: Batch
    soft_tokens: jax.Array

    def groups(self, runner: Runner, params: Params, batch_size: int) -> Iterator[Group]:
        """Rows that run at once, in turn; those with another number of beams or another wish to speculate are apart."""
        requests = zip(self.batch.tokens, self.batch.image_slots, strict=True)
        seeds = [options.sampling.seed for options in self.options]
        keys = row_keys(seeds, [(ids.tobytes(), slots.tobytes()) for ids, slots in requests])
        for rows in self.runs(batch_size, lambda o: (o.sampling.num_beams, o.speculate)):
            yield self._group(runner, params, rows, keys)

    def runs(self, batch_size: int, kind: Callable[[GenerateOptions], Any] = lambda _: None) -> Iterator[range]:
        """Neighbouring rows of a kind, as many as may run at once."""
        count, num_tokens = self.batch.tokens.shape
        size = min(batch_size, most_at_once(num_tokens))
        kinds = [kind(options) for options in self.options]
        start = 0
        while start < count:
            stop = next((i for i in range(start, min(start + size, count)) if kinds[i] != kinds[start]), None)
            rows = range(start, min(start + size, count) if stop is None else stop)
            yield rows
            start = rows.stop

    def _group(self, runner: Runner, params: Params, rows: range, keys: jax.Array) -> Group:
        inputs = select_rows(self.batch, self.soft_tokens, rows)
        index = np.asarray(rows)[padded_rows(len(rows))]
        prompts, options = [self.prompts[i] for i in index], [self.options[i] for i in index]
        allowed = [p if o.constrain and p.labels else None for p, o in zip(prompts, options, strict=True)]
        constrained = any(allowed)
        tables = grammar.tables(self.tokenizer, allowed, self.config) if constrained else None
        config = step_config(self.config, self.tokenizer.loc_start, options, constrained)
        num_tokens = answer_size(max(o.max_new_tokens for o in options))
        num_slots = inputs.tokens.shape[1] + num_tokens
        strategy = choose_strategy(runner, params, self.tokenizer, prompts, options[0], config, num_tokens, num_slots)
        return Group(rows, inputs, row_options(options, keys[index], tables), strategy)


def answers(call: Call, group: Group) -> Iterator[Progress]:
    """The answers of a group as they grow: after the first token, then after each call of `decode`, until all end."""
    strategy = group.strategy
    state = call.prefill(strategy.prefill, group.inputs, group.options, *strategy.extra, **strategy.prefill_static)
    progress = Progress(*jax.device_get(strategy.view(state)))
    yield progress
    while not progress.done.all():
        state = call.decode(strategy.decode, state, **strategy.decode_static)
        before, progress = progress, Progress(*jax.device_get(strategy.view(state)))
        call.add_steps(strategy.num_steps or int(progress.step.max() - before.step.max()))
        yield progress


def programs(
    runner: Runner, params: Params, processor: Processor, requests: Sequence[Request], batch_size: int
) -> Iterator[Program]:
    """All programs that answer some requests together, in their order: what a warm-up compiles.

    Neither images nor weights are needed: `params` may be shapes, and images are told apart only.
    """
    config = processor.config
    index: dict[Any, int] = {}
    groups = [[index.setdefault(identity(image), len(index)) for image in request.images] for request in requests]
    prompts, options = [request.prompt for request in requests], [request.options for request in requests]
    batch = processor.layout(groups, prompts)
    check_length(config, batch, options)
    side, dtype = config.vision.image_size, params["language_model"]["norm"]["weight"].dtype
    for size in image_batches(len(index), config.vision.num_tokens):
        pixels = jax.ShapeDtypeStruct((size, side, side, 3), np.float32)
        yield runner.declare(steps.run, params, pixels, config=config, method="embed_image")
    soft_tokens = jax.ShapeDtypeStruct((len(index), config.vision.num_tokens, config.text.width), dtype)
    generation = Generation(config, processor.tokenizer, prompts, options, batch, soft_tokens)
    for group in generation.groups(runner, params, batch_size):
        strategy = group.strategy
        arguments = group.inputs, group.options, *strategy.extra
        first = runner.declare(strategy.prefill, params, *arguments, **strategy.prefill_static)
        yield first
        if group.options.limit.max() > 1:
            yield runner.declare(strategy.decode, params, first.result, **strategy.decode_static)


def embed_images(call: Call, config: PaliGemmaConfig, pixels: np.ndarray, method: str = "embed_image") -> jax.Array:
    """Pixels [I, S, S, 3] to soft tokens [I, N, D], or by `encode_image` to features [I, N, E], each image once."""
    pieces, start = [], 0
    for size in image_batches(len(pixels), config.vision.num_tokens):
        pieces.append(call.run(steps.run, pixels[start : start + size], config=config, method=method))
        start += size
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def check_length(config: PaliGemmaConfig, batch: Batch, options: Sequence[GenerateOptions]) -> None:
    """Raise a PromptError when prompts and answers do not fit the positions of a model."""
    longest, limit = int(batch.length.max()), config.text.max_positions
    max_new_tokens = max((o.max_new_tokens for o in options), default=0)
    if longest + max_new_tokens > limit:
        count = int((batch.image_slots[batch.length.argmax()] >= 0).sum())
        raise PromptError(
            f"a prompt of {longest} tokens ({count} of them for images) and max_new_tokens={max_new_tokens} "
            f"do not fit the model's {limit} positions: shorten one of them"
        )


def check_embeddings(
    embeddings: jax.Array | np.ndarray, config: PaliGemmaConfig, params: Params, projected: bool = True
) -> jax.Array:
    """Soft tokens [I, N, D], or the encoder's features [I, N, E], in a model's dtype; ImageError for another shape."""
    name, width = ("image_embeddings", config.text.width) if projected else ("features", config.vision.width)
    shape, count = np.shape(embeddings), config.vision.num_tokens
    if len(shape) != 3 or shape[1:] != (count, width) or not shape[0]:
        raise ImageError(
            f"{name} have shape {shape}, this model takes (images, {count}, {width}): "
            "take those of an image of the same model"
        )
    return jnp.asarray(embeddings, params["language_model"]["norm"]["weight"].dtype)


def text_pieces(growing: Iterator[Progress], call: Call, generation: Generation) -> Iterator[str | Output]:
    """The text of the first row as it comes, then its whole output."""
    decoder = StreamDecoder(generation.tokenizer)
    given = 0
    for progress in growing:
        said = int(progress.step[0])
        tokens = progress.tokens[0, given:said]
        if piece := "".join(decoder.feed(id_) for id_ in tokens if id_ not in generation.config.eos_token_ids):
            yield piece
        given = said
    if rest := decoder.finish():
        yield rest
    yield to_output(progress, 0, call, generation)


def to_output(progress: Progress, row: int, call: Call, generation: Generation) -> Output:
    """The answer of one row."""
    count = int(progress.step[row])
    tokens = progress.tokens[row, :count]
    scores = jax.tree.map(lambda x: x[row, :count], progress.scores)
    ended = tokens[-1] in generation.config.eos_token_ids
    text = generation.tokenizer.decode(tokens[: count - ended])  # what ends an answer may have a text, as <end_of_turn>
    reason = "eos" if ended else "length"
    return Output(text, tokens, scores.logprobs, reason, call.timing(count), scores.near, scores.expected)
