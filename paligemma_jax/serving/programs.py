"""The compiled programs of a server: few, known beforehand, and compiled before the first request.

The slots are rows of one `DecodeState`, which has one of two sizes: a usual one, with room for an image, a short prompt
and a short answer, and the largest that any request may need. It grows when a row needs more, and shrinks when none
does: a step takes time for all slots of the cache, used or not.

Axes: I images, N soft tokens of an image, S side of an image, R rows of the state, B rows that are prefilled, T prompt
tokens, W tokens of a row that are shown, M tokens of an answer, D decoder width.
"""

import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import paligemma_jax as pj
from paligemma_jax import buckets, ops
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.engine import steps
from paligemma_jax.engine.sampling import RowOptions, StepConfig, row_keys, row_options
from paligemma_jax.engine.state import DecodeState, answer_size, empty, fresh, insert, say
from paligemma_jax.engine.steps import Params
from paligemma_jax.ops import pad_cache
from paligemma_jax.processing.request import GenerateOptions
from paligemma_jax.serving.scheduler import split
from paligemma_jax.serving.settings import EngineSettings
from paligemma_jax.serving.shown import Shown, TopLogprobs, most_likely, show
from paligemma_jax.sharding import put, trace

_SHORT_TEXTS = (16, 64)  # sizes that the text of a prompt is padded to; in the largest state to the last, or the most
_SHORT_ANSWER = 128  # tokens that the usual size has room for, behind an image and the longest short text
_BATCHES = (4, 1)  # prompts that are prefilled at once, and images that are embedded
_USUAL_TABLE, _LARGEST_TABLE = (64, 8), (512, 64)  # nodes of a grammar, and single ids of a node
_FIELDS = 5  # numbers of a node before those of its single ids
_STEPS = {"cpu": 4}  # decode steps between two looks
_MANY_STEPS = 8  # off the CPU
_COMPILERS = 4  # programs that are compiled at once, at most

Program = Callable[..., Any]  # compiled, takes arrays only


@dataclasses.dataclass(frozen=True)
class Size:
    """What each row of a state has room for.

    num_slots: positions of prompt and answer.
    num_nodes, num_single: of its grammar table.
    """

    num_slots: int
    num_nodes: int
    num_single: int


class Programs:
    """Programs of one model and the sizes of its slots, compiled when first needed or by `warm`.

    Args:
      model: whose parameters are taken, and whose target is compiled for.
      settings: sizes.
    """

    def __init__(self, model: pj.PaliGemma, settings: EngineSettings):
        config = model.config
        self.config, self.params, self.num_rows = config, model.params, settings.num_slots
        self._runner = model.runner
        self.num_steps = settings.num_steps or _STEPS.get(self._runner.target.platform, _MANY_STEPS)
        self._num_tokens = answer_size(settings.max_new_tokens)
        limit, per_image = config.text.max_positions, config.vision.num_tokens
        most_text, max_images, max_new_tokens = settings.max_prompt_tokens, settings.max_images, settings.max_new_tokens
        most = buckets.sequence(most_text)
        shorts = [*(size for size in _SHORT_TEXTS if size < most), min(most, _SHORT_TEXTS[-1])]
        longs = {shorts[-1], most}
        usual_slots = min(limit, buckets.sequence(per_image + shorts[-1] + min(_SHORT_ANSWER, max_new_tokens)))
        most_prompt = min(limit, max_images * per_image + most)
        largest_slots = max(usual_slots, min(limit, most_prompt + max_new_tokens))
        self.usual, self.largest = Size(usual_slots, *_USUAL_TABLE), Size(largest_slots, *_LARGEST_TABLE)
        # What prompts with so many images are padded to, in a state of each size.
        self._lengths = {(self.usual, 1): sorted({min(limit, per_image + size) for size in shorts})}
        for count in range(1, min(max_images, (limit - 1) // per_image) + 1):
            self._lengths[self.largest, count] = sorted({min(limit, count * per_image + size) for size in longs})
        loc_start = model.processor.tokenizer.loc_start
        whole = StepConfig(config, loc_start, True, ("top_k", "top_p", "min_p"), constrained=True, delayed=True)
        plain = StepConfig(config, loc_start)
        self._plain, self._objects, self._whole = plain, dataclasses.replace(plain, constrained=True), whole
        self._lock = threading.Lock()
        self._compiled: dict[Hashable, Future[Program]] = {}  # or being compiled

    def __len__(self) -> int:
        return len(self._compiled)

    def prompt_size(self, size: Size, num_images: int, length: int) -> int | None:
        """T for a prompt of so many tokens, those of its images included, in a state; None when it does not fit."""
        return next((found for found in self._lengths.get((size, num_images), ()) if found >= length), None)

    def batch_sizes(self, size: Size, length: int) -> tuple[int, ...]:
        """How many prompts of so many tokens may be prefilled at once, the most first."""
        most = min(self.num_rows, steps.most_at_once(length)) if size == self.usual else 1
        return tuple(count for count in _BATCHES if count <= most)

    def image_batches(self, count: int) -> list[int]:
        """How many images are embedded at once, call after call."""
        most = steps.most_at_once(self.config.vision.num_tokens)
        return split(count, [size for size in _BATCHES if size <= most])

    def warm(self, is_wanted: Callable[[], bool] = lambda: True, only_first: bool = False) -> None:
        """Compile all programs, as long as they are wanted; with this, serving compiles nothing.

        Args:
          only_first: those that a usual request needs when it is alone.
        """
        keys = self._first() if only_first else dict.fromkeys([*self._first(), *self._all()])
        with ThreadPoolExecutor(min(_COMPILERS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(lambda key: is_wanted() and self._get(*key), keys):
                pass
        for count in _BATCHES:
            jax.block_until_ready(row_keys([0] * count, range(count)))

    def blank(self, size: Size) -> DecodeState:
        """A state whose rows are all free."""
        return self._get("blank", size)()

    def resize(self, state: DecodeState, before: Size, after: Size) -> DecodeState:
        """A state of another size, which all rows in use must fit."""
        return self._get("resize", before, after)(state)

    def embed(self, pixels: np.ndarray) -> tuple[jax.Array, ...]:
        """Soft tokens [N, D] of each of the images f32 [I, S, S, 3], I being one of `image_batches`."""
        return self._get("embed", len(pixels))(self.params, pixels)

    def admit(
        self,
        state: DecodeState,
        size: Size,
        slots: Sequence[int],
        prompts: Sequence[np.ndarray],
        soft_tokens: Sequence[Sequence[jax.Array]],
        options: Sequence[GenerateOptions],
        tables: Sequence[np.ndarray],
        with_top: bool = False,
    ) -> tuple[DecodeState, Shown]:
        """Run prompts, choose the first token of each, and put them into slots; the old state is gone.

        Args:
          prompts: i32, tokens of each, those of its images included; all of one `prompt_size`.
          soft_tokens: [N, D] of the images of each prompt; all have as many.
          tables: of their grammars, [nodes, F].
          with_top: show the most likely tokens too.
        """
        count, num_images = len(prompts), len(soft_tokens[0])
        length = self.prompt_size(size, num_images, max(map(len, prompts)))
        lengths = np.array(list(map(len, prompts)), np.int32)
        num_soft = num_images * self.config.vision.num_tokens
        tokens, image_slots = np.zeros((count, length), np.int32), np.full((count, length), -1, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            image_slots[row, :num_soft] = row * num_soft + np.arange(num_soft)
        fitted = np.stack([_fit_table(table, size, np) for table in tables])
        keys = row_keys([o.sampling.seed for o in options], range(count))  # each as if it were alone
        given = row_options(options, keys, fitted)
        flat = tuple(soft for row in soft_tokens for soft in row)
        prefill, join = self._get("prefill", size, count, num_images, length), self._get("join", size, count)
        logits, cache = prefill(self.params, flat, tokens, image_slots, lengths)
        return join(state, np.array(slots, np.int32), logits, cache, lengths, given, np.bool_(with_top))

    def decode(
        self, state: DecodeState, size: Size, needs: Iterable[str], with_top: bool = False
    ) -> tuple[DecodeState, Shown]:
        """Lengthen each answer by up to `num_steps` tokens; the old state is gone.

        Args:
          needs: what the rows in use ask for, as of `needs_of`.
          with_top: show the most likely tokens too.
        """
        config = next(config for config in self._steps(size) if all(getattr(config, name) for name in needs))
        return self._get("decode", size, config)(self.params, state, np.bool_(with_top))

    def _steps(self, size: Size) -> tuple[StepConfig, ...]:
        """Of decode, the cheapest first."""
        return (self._plain, self._objects, self._whole) if size == self.usual else (self._plain, self._whole)

    def _first(self) -> list[tuple[Hashable, ...]]:
        """What `_get` takes, for the programs of a usual request alone."""
        size, lengths = self.usual, self._lengths[self.usual, 1]
        decodes = [("decode", size, config) for config in (self._plain, self._objects)]
        prefills = [("prefill", size, 1, 1, length) for length in lengths]
        return [*decodes, ("join", size, 1), *prefills, ("blank", size), ("embed", 1)]

    def _all(self) -> Iterable[tuple[Hashable, ...]]:
        """What `_get` takes, for each program that serving needs."""
        for size in (self.usual, self.largest):
            yield "blank", size
            yield from (("decode", size, config) for config in self._steps(size))
        yield from (("embed", count) for count in {*self.image_batches(sum(_BATCHES))})
        prefills = [
            (size, count, num_images, length)
            for (size, num_images), lengths in self._lengths.items()
            for length in lengths
            for count in self.batch_sizes(size, length)
        ]
        yield from (("prefill", *each) for each in prefills)
        yield from (("join", *each) for each in dict.fromkeys(each[:2] for each in prefills))
        yield from (("resize", *pair) for pair in ((self.usual, self.largest), (self.largest, self.usual)))

    def _get(self, name: str, *key: Any) -> Program:
        with self._lock:
            program = self._compiled.get((name, *key))
            if is_new := program is None:
                program = self._compiled[name, *key] = Future()
        if is_new:
            try:
                program.set_result(getattr(self, f"_compile_{name}")(*key))
            except BaseException as error:
                program.set_exception(error)
        return program.result()

    def _compile(self, function: Any, *args: Any, **static: Any) -> Program:
        runner = self._runner
        program = ops.compile_traced(runner.target, trace(runner.layout, function, *args, **static))
        return lambda *args: program(*(arg if arg is self.params else put(runner.layout, arg) for arg in args))

    def _compile_blank(self, size: Size) -> Program:
        return self._compile(jax.jit(functools.partial(self._blank, size)))

    def _compile_resize(self, before: Size, after: Size) -> Program:
        return self._compile(_resize, self._shapes(before), size=after)

    def _compile_embed(self, count: int) -> Program:
        side = self.config.vision.image_size
        pixels = jax.ShapeDtypeStruct((count, side, side, 3), np.float32)
        return self._compile(_embed, self.params, pixels, config=self.config)

    def _compile_prefill(self, size: Size, count: int, num_images: int, length: int) -> Program:
        return self._compile(_prefill, self.params, *self._prompts(count, num_images, length), **self._static(size))

    def _compile_join(self, size: Size, count: int) -> Program:
        prompts = self._prompts(count, 1, self.config.vision.num_tokens + 1)
        logits, cache = jax.eval_shape(functools.partial(_prefill, **self._static(size)), self.params, *prompts)
        slots = length = np.zeros(count, np.int32)
        arguments = self._shapes(size), slots, logits, cache, length, self._options(size, count), np.bool_(False)
        return self._compile(_join, *arguments, config=self._whole, num_tokens=self._num_tokens)

    def _compile_decode(self, size: Size, config: StepConfig) -> Program:
        arguments = self.params, self._shapes(size), np.bool_(False)
        return self._compile(_decode, *arguments, config=config, num_steps=self.num_steps)

    def _static(self, size: Size) -> dict[str, Any]:
        return {"config": self.config, "num_slots": size.num_slots}

    def _prompts(self, count: int, num_images: int, length: int) -> tuple[Any, ...]:
        """Shapes of what `_prefill` takes."""
        dtype = self.params["language_model"]["norm"]["weight"].dtype
        soft = jax.ShapeDtypeStruct((self.config.vision.num_tokens, self.config.text.width), dtype)
        ids, lengths = (np.zeros(shape, np.int32) for shape in ((count, length), count))
        return (soft,) * (count * num_images), ids, ids, lengths

    def _options(self, size: Size, count: int) -> RowOptions:
        """Shapes of the options of some rows."""
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
        table = np.zeros((count, size.num_nodes, _FIELDS + 3 * size.num_single), np.int32)
        return row_options([GenerateOptions()] * count, keys, table)

    def _blank(self, size: Size) -> DecodeState:
        def prefix(params: Params, *prompts: Any) -> DecodeState:
            _, cache = _prefill(params, *prompts, **self._static(size))
            options = self._options(size, 1)
            options = dataclasses.replace(options, key=jax.random.split(jax.random.key(0), 1))
            return fresh(cache, prompts[-1], options, self._whole, self._num_tokens)

        shapes = jax.eval_shape(prefix, self.params, *self._prompts(1, 1, self.config.vision.num_tokens + 1))
        return empty(shapes, self.num_rows, size.num_slots, self._whole)

    def _shapes(self, size: Size) -> DecodeState:
        return jax.eval_shape(functools.partial(self._blank, size))


def needs_of(options: GenerateOptions, constrained: bool) -> frozenset[str]:
    """What a `StepConfig` must have for a request."""
    sampling = options.sampling
    needs = {
        "samples": sampling.temperature > 0,
        "filters": sampling.filters,
        "constrained": constrained,
        "delayed": options.min_new_tokens > 0,
    }
    return frozenset(name for name, is_needed in needs.items() if is_needed)


def table_fits(table: np.ndarray, size: Size) -> bool:
    """Whether a grammar table [nodes, F] fits the rows of a state."""
    return len(table) <= size.num_nodes and (table.shape[1] - _FIELDS) // 3 <= size.num_single


def _fit_table(table: Any, size: Size, xp: Any) -> Any:
    """Grammar tables [..., nodes, F] with the nodes and single ids of a state; what is cut off is not in use."""
    head, singles = table[..., :_FIELDS], xp.split(table[..., _FIELDS:], 3, axis=-1)
    parts = [_fit(part, -1, size.num_single, fill, xp) for part, fill in zip(singles, (-1, 0, 0), strict=True)]
    return _fit(xp.concatenate([head, *parts], axis=-1), -2, size.num_nodes, 0, xp)


def _fit(x: Any, axis: int, size: int, fill: int, xp: Any) -> Any:
    """An array cut, or filled up, to a size along an axis."""
    axis %= x.ndim
    kept = x[tuple(slice(0, size) if i == axis else slice(None) for i in range(x.ndim))]
    more = [(0, size - kept.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return xp.pad(kept, more, constant_values=fill)


@functools.partial(jax.jit, static_argnames="config")
def _embed(params: Params, pixels: jax.Array, *, config: PaliGemmaConfig) -> tuple[jax.Array, ...]:
    soft_tokens = steps.run(params, pixels, config=config, method="embed_image")
    return tuple(soft_tokens[i] for i in range(len(pixels)))


@functools.partial(jax.jit, static_argnames=("config", "num_slots"))
def _prefill(
    params: Params,
    soft_tokens: tuple[jax.Array, ...],
    tokens: jax.Array,
    image_slots: jax.Array,
    length: jax.Array,
    *,
    config: PaliGemmaConfig,
    num_slots: int,
) -> tuple[jax.Array, ops.Cache]:
    """Logits [B, V] after each prompt, and whole rows of the cache.

    What is masked must be finite, and the last request of a slot may have left NaN: so none of its keys may stay.
    """
    inputs = steps.Inputs(jnp.stack(soft_tokens), tokens, image_slots, length, length)
    logits, cache = steps.first_logits(params, config, inputs)
    return logits, pad_cache(cache, num_slots)


@functools.partial(jax.jit, static_argnames=("config", "num_tokens"), donate_argnames="state")
def _join(
    state: DecodeState,
    slots: jax.Array,
    logits: jax.Array,
    cache: ops.Cache,
    length: jax.Array,
    options: RowOptions,
    with_top: jax.Array,
    *,
    config: StepConfig,
    num_tokens: int,
) -> tuple[DecodeState, Shown]:
    """Choose the first token of prompts, and put them into slots; compiled once for prompts of all lengths."""
    prefix = say(fresh(cache, length, options, config, num_tokens), logits, config)
    return insert(state, slots, prefix), show(prefix, 1, most_likely(logits[None], with_top))


@functools.partial(jax.jit, static_argnames=("config", "num_steps"), donate_argnames="state")
def _decode(
    params: Params, state: DecodeState, with_top: jax.Array, *, config: StepConfig, num_steps: int
) -> tuple[DecodeState, Shown]:
    def step(state: DecodeState, _: None) -> tuple[DecodeState, TopLogprobs]:
        state, logits = steps.decode_step(params, state, config)
        return state, most_likely(logits, with_top)

    state, top = lax.scan(step, state, None, length=num_steps)
    return state, show(state, num_steps, top)


@functools.partial(jax.jit, static_argnames="size")
def _resize(state: DecodeState, *, size: Size) -> DecodeState:
    options = dataclasses.replace(state.options, grammar=_fit_table(state.options.grammar, size, jnp))
    kept = min(size.num_slots, ops.num_cache_slots(state.cache))
    cache = tuple((k[:, :, :kept], v[..., :kept]) for k, v in state.cache)
    return dataclasses.replace(state, options=options, cache=pad_cache(cache, size.num_slots))
